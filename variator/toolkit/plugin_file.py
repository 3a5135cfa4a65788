"""Plugin files: one ratio's tensors for one backbone, as safetensors with a JSON header.

Written by training, read by export. Also finds the plugins that ship with the package.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from variator.errors import InputError, PluginError
from variator.files import disk_errors, write_atomically
from variator.toolkit.plugin import PluginConfig, initial_tensors, tensor_shapes

if TYPE_CHECKING:
    from variator.toolkit.checkpoint import Backbone

FORMAT_VERSION = 1
HEADER = "variator.plugin"
"""Metadata entry that holds everything but the tensors, as JSON."""

SHIPPED = Path(__file__).parent.parent / "plugins"
"""Directory of the plugins that come with the package, one folder per backbone."""


@dataclass(frozen=True)
class Plugin:
    """One ratio's plugin for one backbone.

    Args:
        config: Ratio, rank and activation.
        tensors: fp32, named as `toolkit.plugin.tensor_shapes` says.
        backbone: Fingerprint of the backbone it was trained for.
        training: How it was trained; empty for an untrained one.
    """

    config: PluginConfig
    tensors: Mapping[str, Tensor]
    family: str
    layers: int
    hidden_size: int
    backbone: str
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def untrained(self) -> bool:
        """Whether it was made up for speed measurements only."""
        return not self.training

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def digest(self) -> str:
        """sha256 over names, shapes and bytes of its tensors."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()

    def check_backbone(self, backbone: Backbone) -> None:
        """Raise `PluginError` unless this plugin was trained for this very backbone."""
        if self.backbone != backbone.fingerprint:
            raise PluginError(
                f"the ratio-{self.config.ratio} plugin was trained for another backbone "
                f"({self.family}, {self.layers} layers of {self.hidden_size}, fingerprint {self.backbone[:12]})",
                valid=f"a plugin for {backbone.id} ({backbone.family}, {backbone.config.layers} layers of "
                f"{backbone.config.hidden_size}, fingerprint {backbone.fingerprint[:12]})",
                fix=f"variator train {backbone.source} --ratio {self.config.ratio} --corpus FILE -o DIR",
            )


def untrained_plugin(backbone: Backbone, config: PluginConfig) -> Plugin:
    """A plugin that was never trained, for speed measurements."""
    sizes = backbone.config
    return Plugin(
        config,
        initial_tensors(config, sizes.hidden_size, sizes.layers),
        backbone.family,
        sizes.layers,
        sizes.hidden_size,
        backbone.fingerprint,
    )


def plugin_bytes(plugin: Plugin, dtype: torch.dtype = torch.float16) -> bytes:
    """The file's content, the same for the same plugin. fp16 halves it; its rounding (1e-3 relative) is far below
    what the plugin itself loses.

    Raises:
        PluginError: If a value is not finite or too large for the type.
    """
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in plugin.tensors.items()}
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise PluginError(f"tensor {bad[0]!r} of the ratio-{plugin.config.ratio} plugin is not finite in {dtype}",
                          fix="train it again with a lower learning rate")  # fmt: skip
    header = {
        "format_version": FORMAT_VERSION,
        "config": asdict(plugin.config),
        "family": plugin.family,
        "layers": plugin.layers,
        "hidden_size": plugin.hidden_size,
        "backbone": plugin.backbone,
        "training": plugin.training,
    }
    # One entry: safetensors writes several in random order, and the same seed is to give the same file.
    return save(tensors, {HEADER: json.dumps(header)})


def save_plugin(plugin: Plugin, directory: Path) -> Path:
    """Write `ratio-<k>.safetensors` in `directory`, whole or not at all, and return its path."""
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"ratio-{plugin.config.ratio}.safetensors"
    write_atomically(path, plugin_bytes(plugin))
    return path


def load_plugin(path: Path) -> Plugin:
    """Read a plugin file.

    Raises:
        PluginError: If it is missing, damaged, of another format, or its tensors do not fit its own header.
    """
    fix = "train it again with `variator train`, or copy the file again"
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - no iterator
    except (SafetensorError, OSError) as error:
        raise PluginError(
            f"cannot read plugin {path}: {error}", valid="a plugin written by `variator train`", fix=fix
        ) from error
    if HEADER not in metadata:
        raise PluginError(f"{path} is a safetensors file but not a plugin", valid="one written by `variator train`")
    try:
        header = json.loads(metadata[HEADER])
        version = header["format_version"]
        if version == FORMAT_VERSION:
            plugin = Plugin(
                PluginConfig(**header["config"]), tensors, str(header["family"]), int(header["layers"]),
                int(header["hidden_size"]), str(header["backbone"]), dict(header["training"]),
            )  # fmt: skip
    except (KeyError, ValueError, TypeError, InputError) as error:
        raise PluginError(f"the header of plugin {path} is damaged: {error}", fix=fix) from error
    if version != FORMAT_VERSION:
        raise PluginError(
            f"{path} has plugin format version {version}",
            valid=str(FORMAT_VERSION),
            fix="use the version of variator that wrote it, or train again",
        )
    shapes = tensor_shapes(plugin.config, plugin.hidden_size, plugin.layers)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != shapes:
        wrong = sorted(name for name in found.keys() | shapes.keys() if found.get(name) != shapes.get(name))
        raise PluginError(
            f"plugin {path}: tensor {wrong[0]!r} has shape {found.get(wrong[0])}",
            valid=str(shapes.get(wrong[0])),
            fix=fix,
        )
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise PluginError(f"plugin {path}: tensor {bad[0]!r} holds NaN or infinity", fix=fix)
    return plugin


def find_plugin(backbone: Backbone, ratio: int, directory: Path | None = None) -> Plugin | None:
    """The plugin of a ratio: from `directory` if given, else from those that ship with the package.

    Returns:
        None if there is none for this backbone and ratio.

    Raises:
        PluginError: If the file in `directory` is damaged or for another backbone.
    """
    if directory is not None:
        path = directory / f"ratio-{ratio}.safetensors"
        if not path.exists():
            return None
        plugin = load_plugin(path)
        if plugin.config.ratio != ratio:
            raise PluginError(
                f"{path} holds a plugin of ratio {plugin.config.ratio}",
                valid=f"ratio {ratio}",
                fix="plugin files are named by their ratio; rename it back",
            )
        plugin.check_backbone(backbone)
        return plugin
    for path in sorted(SHIPPED.glob(f"*/ratio-{ratio}.safetensors")):
        plugin = load_plugin(path)
        if plugin.backbone == backbone.fingerprint:
            return plugin
    return None
