"""Backbone families: which checkpoint tensor is which tensor of the canonical encoder.

A family is one `Family` value in one small file and holds no maths. To add one, write the file and add it to
`FAMILIES`. `toolkit.checkpoint` is the only caller.
"""

from __future__ import annotations

from variator.errors import BackboneError
from variator.toolkit.families import (
    bert,
    clip,
    deberta,
    dinov2,
    distilbert,
    electra,
    modernbert,
    mpnet,
    nomic_bert,
    roberta,
    t5,
    vit,
)
from variator.toolkit.families.base import Family

FAMILIES: tuple[Family, ...] = (
    bert.FAMILY,
    roberta.FAMILY,
    distilbert.FAMILY,
    electra.FAMILY,
    mpnet.FAMILY,
    deberta.FAMILY,
    modernbert.FAMILY,
    nomic_bert.FAMILY,
    t5.FAMILY,
    vit.FAMILY,
    clip.CLIP,
    clip.SIGLIP,
    dinov2.FAMILY,
)


def family_of(model_type: str) -> Family:
    """The family that loads checkpoints of this `model_type` (transformers' name).

    Raises:
        BackboneError: If none does; the error lists those that are supported.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    supported = ", ".join(kind for family in FAMILIES for kind in family.model_types)
    raise BackboneError(
        f"architecture {model_type!r} is not supported",
        valid=f"{supported} (MiniLM checkpoints are of type bert)",
        fix="choose a checkpoint of one of these, or add a family file in variator/toolkit/families",
    )
