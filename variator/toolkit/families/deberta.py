"""DeBERTa-v2 and v3: attention to the embeddings of distances, which each layer projects with its own weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from variator.errors import BackboneError
from variator.toolkit.encoder import EncoderConfig
from variator.toolkit.families.base import Classifier, Family, Weights, relative_rows
from variator.toolkit.families.bert import EMBEDDINGS, LAYER
from variator.toolkit.positions import deberta_row

SELF = "encoder.layer.{layer}.attention.self"
RELATIVE = "encoder.rel_embeddings.weight"
NORM = "encoder.LayerNorm"


def _buckets(config: Any) -> int:
    return max(0, getattr(config, "position_buckets", -1))


def _farthest(config: Any) -> int:
    most = getattr(config, "max_relative_positions", -1)
    return int(most if most > 0 else config.max_position_embeddings)


def _kind(config: Any) -> dict[str, Any]:
    """Refuses what only some of the first checkpoints of v2 have."""
    embedding = getattr(config, "embedding_size", None) or config.hidden_size
    attended = config.pos_att_type or []
    for wrong, what, valid in (
        (not config.relative_attention, "no relative attention", "relative_attention true"),
        (set(attended) != {"p2c", "c2p"}, f"pos_att_type {attended}", "p2c and c2p"),
        (getattr(config, "conv_kernel_size", 0) > 0, "a convolution behind its first layer", "none"),
        (embedding != config.hidden_size, f"embeddings of {embedding}", f"{config.hidden_size}, the hidden size"),
        (getattr(config, "attention_head_size", None), "heads of a size of their own", "hidden size over heads"),
    ):
        if wrong:
            raise BackboneError(f"a DeBERTa with {what} is not supported", valid=valid)
    return {
        "embedding_size": config.hidden_size,
        "positions": config.position_biased_input,
        "relation": "pairs",
        "reach": _farthest(config),
        "relative_rows": 2 * (_buckets(config) or _farthest(config)),
    }


def _scale(sizes: EncoderConfig) -> float:
    """Three terms are added: content to content, content to position and position to content."""
    return float((3 * sizes.hidden_size // sizes.heads) ** -0.5)


def _relation(weights: Weights, config: Any, sizes: EncoderConfig) -> dict[str, Tensor]:
    """The embeddings of distances as every layer's queries and keys meet them."""
    embeddings = weights[RELATIVE].float()[: sizes.relative_rows]
    if "layer_norm" in config.norm_rel_ebd:
        size = (sizes.hidden_size,)
        scale, shift = weights[f"{NORM}.weight"].float(), weights[f"{NORM}.bias"].float()
        embeddings = F.layer_norm(embeddings, size, scale, shift, sizes.norm_eps)
    shared = getattr(config, "share_att_key", False)
    found = {}
    for layer in range(sizes.layers):
        for kind, own in (("key", "pos_key_proj"), ("query", "pos_query_proj")):
            place = f"{SELF.format(layer=layer)}.{f'{kind}_proj' if shared else own}"
            projected = F.linear(embeddings, weights[f"{place}.weight"].float(), weights[f"{place}.bias"].float())
            heads = projected.reshape(sizes.relative_rows, sizes.heads, -1).permute(1, 0, 2)  # [heads, rows, h]
            found[f"layers.{layer}.attention.relative_{kind}"] = (
                heads.transpose(1, 2).contiguous() if kind == "key" else (heads * _scale(sizes)).contiguous()
            )
    # Rows are by query minus key, the table by key minus query.
    rows = relative_rows(lambda distance: deberta_row(-distance, _buckets(config), _farthest(config)), sizes.reach)
    return found | {"relation.rows": torch.tensor(rows)}


FAMILY = Family(
    name="deberta",
    model_types=("deberta-v2",),
    embeddings=EMBEDDINGS,
    layer={
        **LAYER,
        "attention.query": f"{SELF}.query_proj",
        "attention.key": f"{SELF}.key_proj",
        "attention.value": f"{SELF}.value_proj",
        "relative.key": f"{SELF}.pos_key_proj",
        "relative.query": f"{SELF}.pos_query_proj",
    },
    classifier=Classifier(
        dense="pooler.dense", activation="gelu", output="classifier", activation_setting="pooler_hidden_act"
    ),
    kind=_kind,
    relation=_relation,
    relation_sources=(RELATIVE, f"{NORM}.weight", f"{NORM}.bias"),
    scale=_scale,
)
