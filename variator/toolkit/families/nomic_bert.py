"""NomicBERT (nomic-embed-text): BERT with rotary positions, a gated FFN and no biases but the norms'."""

from __future__ import annotations

from typing import Any

from variator.toolkit.families.base import Classifier, Family, rotary_theta
from variator.toolkit.families.bert import EMBEDDINGS


def _kind(config: Any) -> dict[str, Any]:
    return {
        "head_size": config.head_dim,
        "attention_bias": False,
        "ffn_bias": False,
        "gated": True,
        "positions": False,
        "relation": "rotary",
        "thetas": (rotary_theta(config.rope_parameters),) * config.num_hidden_layers,
    }


FAMILY = Family(
    name="nomic_bert",
    model_types=("nomic_bert",),
    embeddings=EMBEDDINGS,
    layer={
        "attention.query": "layers.{layer}.self_attn.q_proj",
        "attention.key": "layers.{layer}.self_attn.k_proj",
        "attention.value": "layers.{layer}.self_attn.v_proj",
        "attention.output": "layers.{layer}.self_attn.o_proj",
        "attention_norm": "layers.{layer}.post_attention_layernorm",
        "ffn.gate": "layers.{layer}.mlp.gate_proj",
        "ffn.inner": "layers.{layer}.mlp.up_proj",
        "ffn.outer": "layers.{layer}.mlp.down_proj",
        "ffn_norm": "layers.{layer}.post_mlp_layernorm",
    },
    classifier=Classifier(dense="pooler.dense", activation="tanh", output="classifier"),
    kind=_kind,
)
