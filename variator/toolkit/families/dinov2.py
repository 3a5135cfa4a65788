"""DINOv2: ViT with a scale behind attention and FFN, folded into their last maps; the giant's FFN is gated."""

from __future__ import annotations

from typing import Any

from variator.toolkit.families.base import Family, PictureNames, Weights, picture_kind

LAYER = "encoder.layer.{layer}"
SCALED = {"attention.o_proj": "layer_scale1", "mlp.fc2": "layer_scale2", "mlp.down_proj": "layer_scale2"}
NAMES = {"mlp.fc1": "mlp.inner", "mlp.up_proj": "mlp.inner", "mlp.fc2": "mlp.outer", "mlp.down_proj": "mlp.outer",
         "mlp.gate_proj": "mlp.gate"}  # fmt: skip


def _kind(config: Any) -> dict[str, Any]:
    """The giant's gated FFN is two thirds as wide, rounded up to eights."""
    inner = int(config.hidden_size * config.mlp_ratio)
    if config.use_swiglu_ffn:
        inner = (int(inner * 2 / 3) + 7) // 8 * 8
    own = {"intermediate_size": inner, "gated": config.use_swiglu_ffn, "embedding_norm": False}
    return {**picture_kind(config, token=True), **own, **({"activation": "silu"} if config.use_swiglu_ffn else {})}


def _scaled(weights: Weights, config: Any) -> Weights:
    found = dict(weights)
    for name, tensor in weights.items():
        module, _, part = name.rpartition(".")
        for end, scale in SCALED.items():
            if module.endswith(f".{end}"):
                factor = weights[f"{module.removesuffix(end)}{scale}.lambda1"]
                found[name] = tensor * (factor[:, None] if part == "weight" else factor)
        for end, ours in NAMES.items():
            if module.endswith(f".{end}"):
                found[f"{module.removesuffix(end)}{ours}.{part}"] = found[name]
    return found


FAMILY = Family(
    name="dinov2",
    model_types=("dinov2",),
    embeddings={},
    picture=PictureNames(
        patch="embeddings.patch_embeddings.projection",
        position="embeddings.position_embeddings",
        token="embeddings.cls_token",
    ),
    layer={
        "attention.query": f"{LAYER}.attention.q_proj",
        "attention.key": f"{LAYER}.attention.k_proj",
        "attention.value": f"{LAYER}.attention.v_proj",
        "attention.output": f"{LAYER}.attention.o_proj",
        "attention_norm": f"{LAYER}.norm1",
        "ffn.inner": f"{LAYER}.mlp.inner",
        "ffn.gate": f"{LAYER}.mlp.gate",
        "ffn.outer": f"{LAYER}.mlp.outer",
        "ffn_norm": f"{LAYER}.norm2",
    },
    classifier=None,
    final_norm="layernorm",
    kind=_kind,
    prepare=_scaled,
    auto_classes={"dinov2": "Dinov2Model"},
)
