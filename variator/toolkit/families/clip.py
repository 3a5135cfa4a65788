"""The vision towers of CLIP and SigLIP; SigLIP has no class token, CLIP a norm behind the embeddings and none last."""

from __future__ import annotations

from variator.toolkit.families.base import Family, PictureNames, picture_kind

LAYER = {
    "attention.query": "encoder.layers.{layer}.self_attn.q_proj",
    "attention.key": "encoder.layers.{layer}.self_attn.k_proj",
    "attention.value": "encoder.layers.{layer}.self_attn.v_proj",
    "attention.output": "encoder.layers.{layer}.self_attn.out_proj",
    "attention_norm": "encoder.layers.{layer}.layer_norm1",
    "ffn.inner": "encoder.layers.{layer}.mlp.fc1",
    "ffn.outer": "encoder.layers.{layer}.mlp.fc2",
    "ffn_norm": "encoder.layers.{layer}.layer_norm2",
}

CLIP = Family(
    name="clip",
    model_types=("clip_vision_model", "clip"),
    embeddings={},
    picture=PictureNames(
        patch="embeddings.patch_embedding",
        position="embeddings.position_embedding.weight",
        token="embeddings.class_embedding",
        norm="pre_layrnorm",
    ),
    layer=LAYER,
    classifier=None,
    kind=lambda config: {**picture_kind(config, token=True), "final_norm": False},
    auto_classes={"clip_vision_model": "CLIPVisionModel", "clip": "CLIPVisionModel"},
)

SIGLIP = Family(
    name="siglip",
    model_types=("siglip_vision_model", "siglip"),
    embeddings={},
    picture=PictureNames(patch="embeddings.patch_embedding", position="embeddings.position_embedding.weight"),
    layer=LAYER,
    classifier=None,
    final_norm="post_layernorm",
    kind=lambda config: {**picture_kind(config, token=False), "embedding_norm": False},
    auto_classes={"siglip_vision_model": "SiglipVisionModel", "siglip": "SiglipVisionModel"},
)
