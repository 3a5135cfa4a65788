"""ModernBERT: norms in front, gated FFN, rotary positions, local attention in two layers of three."""

from __future__ import annotations

from typing import Any

from variator.toolkit.families.base import Classifier, Family, Weights, rotary_theta

ATTENTION, FFN = "layers.{layer}.attn", "layers.{layer}.mlp"


def _kind(config: Any) -> dict[str, Any]:
    local = [kind == "sliding_attention" for kind in config.layer_types]
    return {
        "norm_first": True,
        "norm_bias": config.norm_bias,
        "attention_bias": config.attention_bias,
        "ffn_bias": config.mlp_bias,
        "gated": True,
        "positions": False,
        "first_norm": False,
        "relation": "rotary",
        "thetas": tuple(rotary_theta(config.rope_parameters[kind]) for kind in config.layer_types),
        "windows": tuple(config.sliding_window if one else 0 for one in local),
    }


def _apart(weights: Weights, config: Any) -> Weights:
    """Queries, keys and values lie in one tensor, and so do the gate and the inner map of the FFN."""
    found = dict(weights)
    for name, tensor in weights.items():
        module, _, part = name.rpartition(".")
        if module.endswith(".attn.Wqkv"):
            for one, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                found[f"{module.removesuffix('Wqkv')}{one}.{part}"] = piece
        elif module.endswith(".mlp.Wi"):
            for one, piece in zip(("gate", "inner"), tensor.chunk(2), strict=True):
                found[f"{module.removesuffix('Wi')}{one}.{part}"] = piece
    return found


FAMILY = Family(
    name="modernbert",
    model_types=("modernbert",),
    embeddings={
        "token.weight": "embeddings.tok_embeddings.weight",
        "norm.weight": "embeddings.norm.weight",
        "norm.bias": "embeddings.norm.bias",
    },
    layer={
        "attention.query": f"{ATTENTION}.query",
        "attention.key": f"{ATTENTION}.key",
        "attention.value": f"{ATTENTION}.value",
        "attention.output": f"{ATTENTION}.Wo",
        "attention_norm": "layers.{layer}.attn_norm",
        "ffn.gate": f"{FFN}.gate",
        "ffn.inner": f"{FFN}.inner",
        "ffn.outer": f"{FFN}.Wo",
        "ffn_norm": "layers.{layer}.mlp_norm",
    },
    classifier=Classifier(
        dense="head.dense",
        activation="gelu",
        output="classifier",
        norm="head.norm",
        activation_setting="classifier_activation",
        pooling_setting="classifier_pooling",
    ),
    final_norm="final_norm",
    settings={"hidden_act": "hidden_activation", "layer_norm_eps": "norm_eps"},
    kind=_kind,
    prepare=_apart,
    answers=False,  # its head has a norm
)
