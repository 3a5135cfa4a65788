"""ViT: patches and a class token, norms in front."""

from variator.toolkit.families.base import Family, PictureNames, picture_kind

FAMILY = Family(
    name="vit",
    model_types=("vit",),
    embeddings={},
    picture=PictureNames(
        patch="embeddings.patch_embeddings.projection",
        position="embeddings.position_embeddings",
        token="embeddings.cls_token",
    ),
    layer={
        "attention.query": "layers.{layer}.attention.q_proj",
        "attention.key": "layers.{layer}.attention.k_proj",
        "attention.value": "layers.{layer}.attention.v_proj",
        "attention.output": "layers.{layer}.attention.o_proj",
        "attention_norm": "layers.{layer}.layernorm_before",
        "ffn.inner": "layers.{layer}.mlp.fc1",
        "ffn.outer": "layers.{layer}.mlp.fc2",
        "ffn_norm": "layers.{layer}.layernorm_after",
    },
    classifier=None,
    final_norm="layernorm",
    kind=lambda config: {**picture_kind(config, token=True), "embedding_norm": False},
    auto_classes={"vit": "ViTModel"},
)
