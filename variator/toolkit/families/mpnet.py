"""MPNet (all-mpnet-base): BERT with a bias by relative position besides its table of positions, and no token types."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from variator.toolkit.encoder import EncoderConfig
from variator.toolkit.families.base import Classifier, Family, Weights, relative_rows
from variator.toolkit.families.bert import EMBEDDINGS, LAYER
from variator.toolkit.positions import log_bucket

BIAS = "encoder.relative_attention_bias.weight"
BUCKETS, FARTHEST = 32, 128
"""As MPNet's code has them, whatever the configuration says."""


def _relation(weights: Weights, config: Any, sizes: EncoderConfig) -> dict[str, Tensor]:
    rows = relative_rows(lambda distance: log_bucket(distance, BUCKETS, FARTHEST), sizes.reach)
    return {"relation.weight": weights[BIAS][rows]}


FAMILY = Family(
    name="mpnet",
    model_types=("mpnet",),
    embeddings={name: source for name, source in EMBEDDINGS.items() if name != "token_type.weight"},
    layer={
        **LAYER,
        "attention.query": "encoder.layer.{layer}.attention.attn.q",
        "attention.key": "encoder.layer.{layer}.attention.attn.k",
        "attention.value": "encoder.layer.{layer}.attention.attn.v",
        "attention.output": "encoder.layer.{layer}.attention.attn.o",
        "attention_norm": "encoder.layer.{layer}.attention.LayerNorm",
    },
    classifier=Classifier(dense="classifier.dense", activation="tanh", output="classifier.out_proj"),
    kind=lambda config: {"relation": "bias", "reach": FARTHEST},
    relation=_relation,
    relation_sources=(BIAS,),
    unused_positions=lambda config: 2,  # rows count from its padding id, which the code fixes at 1
)
