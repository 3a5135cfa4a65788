"""Plugins that the paper's authors released, as ours: a torch state dict in, a `Plugin` out.

Their checkpoints hold, per encoder layer i, `mux_layer.{i}.mux_layer` (the scores, k x kd) and
`mux_layer.{i}.demux_adapter` (`w_in` 64 x 2d over [y ; x], tanh, `w_out` d x 64): the same equations as
`toolkit.plugin` has, without the padding mask. Backbone weights and LoRA matrices in the same file are left aside.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from variator.errors import InputError, PluginError
from variator.files import sha256_of
from variator.toolkit.plugin_file import Plugin
from variator.toolkit.plugin_format import PluginConfig

NAMES = {
    "mux_layer.weight": "score.weight",
    "mux_layer.bias": "score.bias",
    "demux_adapter.w_in.weight": "down.weight",
    "demux_adapter.w_in.bias": "down.bias",
    "demux_adapter.w_out.weight": "up.weight",
    "demux_adapter.w_out.bias": "up.bias",
}
"""Their name of a layer's tensor -> ours, in the FFN site."""

PATTERN = re.compile(r"(?:^|\.)mux_layer\.(\d+)\.(" + "|".join(map(re.escape, NAMES)) + r")$")


def read_authors_checkpoint(path: Path, family: str = "t5") -> Plugin:
    """Read a released checkpoint.

    Args:
        family: Of the backbone it was trained for. The file does not say which weights those were, so the plugin fits
            every backbone of that family and of its sizes.

    Raises:
        InputError: If there is no such file.
        PluginError: If it holds anything but tensors, lacks some, or their shapes contradict each other.
    """
    found: dict[str, torch.Tensor] = {}
    layers = set()
    for name, value in _state_dict(path).items():
        if (match := PATTERN.search(str(name))) and isinstance(value, torch.Tensor):
            found[f"layers.{match[1]}.ffn.{NAMES[match[2]]}"] = value.float()
            layers.add(int(match[1]))
    valid = "mux_layer.{i}.mux_layer.{weight,bias} and mux_layer.{i}.demux_adapter.w_in/w_out.{weight,bias}"
    if not layers:
        raise PluginError(f"{path} holds no plugin: no tensor is called mux_layer.{{i}}.…", valid=valid)
    score, down = found.get("layers.0.ffn.score.weight"), found.get("layers.0.ffn.down.weight")
    if score is None or down is None or score.ndim != 2 or down.ndim != 2 or score.shape[1] % score.shape[0]:
        raise PluginError(f"{path}: layer 0 has no scores of shape k x kd or no w_in of r x 2d", valid=valid)
    ratio, hidden = score.shape[0], score.shape[1] // score.shape[0]
    record = {"stage": "imported", "file": path.name, "sha256": sha256_of(path)}
    config = PluginConfig(ratio, down.shape[0], "tanh")
    tensors = {name: tensor.numpy() for name, tensor in found.items()}
    plugin = Plugin(config, tensors, family, max(layers) + 1, hidden, "", record)
    plugin.check_tensors(str(path))
    return plugin


def _state_dict(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise InputError(f"there is no file {path}", valid="a checkpoint of the authors, CHECKPOINT.pkl")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, UnicodeDecodeError) as error:
        raise PluginError(
            f"{path} is refused: {str(error).strip().splitlines()[0] if str(error).strip() else error!r}",
            valid="a torch state dict of tensors alone; a pickle that carries code is never run",
        ) from error
    while isinstance(found, Mapping) and len(found) == 1 and isinstance(inner := next(iter(found.values())), Mapping):
        found = inner  # {"state_dict": {...}}
    if not isinstance(found, Mapping):
        raise PluginError(f"{path} holds a {type(found).__name__}", valid="a torch state dict")
    return found
