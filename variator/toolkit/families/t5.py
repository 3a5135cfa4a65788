"""T5's encoder: v1.0 (ReLU), v1.1 and Flan (gated GELU), mT5. One table of relative positions, no biases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from variator.toolkit.encoder import EncoderConfig
from variator.toolkit.families.base import UNBOUNDED, DecoderParts, Family, Weights, relative_rows
from variator.toolkit.positions import log_bucket

BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
FFN = "encoder.block.{layer}.layer.1.DenseReluDense"
DECODER_BIAS = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
DECODER_LAYER = {
    "attention.query": "0.SelfAttention.q",
    "attention.key": "0.SelfAttention.k",
    "attention.value": "0.SelfAttention.v",
    "attention.output": "0.SelfAttention.o",
    "attention_norm": "0.layer_norm",
    "attention_cross.query": "1.EncDecAttention.q",
    "attention_cross.output": "1.EncDecAttention.o",
    "cross_norm": "1.layer_norm",
    "ffn.inner": "2.DenseReluDense.wi",
    "ffn.gate": "2.DenseReluDense.wi_0",
    "ffn.outer": "2.DenseReluDense.wo",
    "ffn_norm": "2.layer_norm",
}


def _kind(config: Any) -> dict[str, Any]:
    return {
        "max_length": UNBOUNDED,
        "head_size": config.d_kv,
        "norm_first": True,
        "rms": True,
        "attention_bias": False,
        "ffn_bias": False,
        "gated": config.is_gated_act,
        "positions": False,
        "embedding_norm": False,
        "relation": "bias",
        "reach": config.relative_attention_max_distance,
    }


def _relation(weights: Weights, config: Any, sizes: EncoderConfig) -> dict[str, Tensor]:
    buckets, farthest = config.relative_attention_num_buckets, config.relative_attention_max_distance
    rows = relative_rows(lambda distance: log_bucket(distance, buckets, farthest), sizes.reach)
    return {"relation.weight": weights[BIAS][rows]}


def _apart(weights: Weights, config: Any) -> Weights:
    """Gated FFNs have two inner maps, `wi_0` (the gate) and `wi_1`; name them as if there were always both."""
    return {name.replace(".wi_1.", ".wi."): tensor for name, tensor in weights.items()}


def _decoder(weights: Weights, config: Any, sizes: EncoderConfig) -> DecoderParts:
    """Causal distances are all in one half of the buckets: nobody looks ahead."""
    buckets, farthest = config.relative_attention_num_buckets, config.relative_attention_max_distance
    rows = relative_rows(lambda distance: log_bucket(min(distance, 0), 2 * buckets, farthest), sizes.reach)
    own = replace(sizes, layers=config.num_decoder_layers)
    outside = {
        "relation.weight": weights[DECODER_BIAS][rows],
        "final_norm.weight": weights["decoder.final_layer_norm.weight"],
    }

    def layer(index: int) -> dict[str, Tensor]:
        place = f"decoder.block.{index}.layer"
        memory = [weights[f"{place}.1.EncDecAttention.{part}.weight"].t() for part in ("k", "v")]
        found = {"attention_cross.memory.weight": torch.cat(memory, dim=1)}
        for name, source in DECODER_LAYER.items():
            if f"{place}.{source}.weight" in weights:
                tensor = weights[f"{place}.{source}.weight"]
                found[f"{name}.weight"] = tensor.t().contiguous() if tensor.ndim == 2 else tensor
        return found

    def vocabulary() -> Tensor:
        return weights["lm_head.weight"].t().contiguous()

    table, output = weights["shared.weight"], weights.get("lm_head.weight")
    tied = output is None or torch.equal(output, table)
    scaled = getattr(config, "scale_decoder_outputs", False)  # v1.0; neither v1.1 nor mT5
    scale = config.d_model**-0.5 if scaled else 1.0
    return DecoderParts(own, outside, layer, None if tied else vocabulary, scale)


FAMILY = Family(
    name="t5",
    model_types=("t5", "mt5"),
    embeddings={"token.weight": "shared.weight"},
    layer={
        "attention.query": "encoder.block.{layer}.layer.0.SelfAttention.q",
        "attention.key": "encoder.block.{layer}.layer.0.SelfAttention.k",
        "attention.value": "encoder.block.{layer}.layer.0.SelfAttention.v",
        "attention.output": "encoder.block.{layer}.layer.0.SelfAttention.o",
        "attention_norm": "encoder.block.{layer}.layer.0.layer_norm",
        "ffn.inner": f"{FFN}.wi",
        "ffn.gate": f"{FFN}.wi_0",
        "ffn.outer": f"{FFN}.wo",
        "ffn_norm": "encoder.block.{layer}.layer.1.layer_norm",
    },
    classifier=None,
    final_norm="encoder.final_layer_norm",
    settings={"hidden_act": "dense_act_fn", "intermediate_size": "d_ff", "layer_norm_eps": "layer_norm_epsilon"},
    kind=_kind,
    prepare=_apart,
    relation=_relation,
    relation_sources=(BIAS,),
    scale=lambda sizes: 1.0,
    auto_classes={"t5": "T5EncoderModel", "mt5": "MT5EncoderModel"},
    decoder=_decoder,
)
