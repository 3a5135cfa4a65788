"""Plugin files: one ratio's tensors for one backbone, as safetensors with a JSON header.

Written by training, read by export and by a runtime that plugs them in (numpy only: a serving machine has no torch).
Also finds the plugins that ship with the package.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from variator.errors import InputError, PluginError, VariatorError
from variator.files import disk_errors, write_atomically
from variator.toolkit.plugin_format import (
    EXTENDED_FORMAT,
    PLUGIN_FORMAT,
    Key,
    PluginConfig,
    file_name,
    in_order,
    parse_key,
    tensor_shapes,
)

if TYPE_CHECKING:
    from variator.toolkit.checkpoint import Backbone

HEADER = "variator.plugin"
"""Metadata entry that holds everything but the tensors, as JSON."""

SHIPPED = Path(__file__).parent.parent / "plugins"
"""Directory of the plugins that come with the package, one folder per backbone."""


HEAD_TENSORS = ("head.weight", "head.bias")
"""Names of a head's tensors in a plugin file."""

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Head:
    """A linear classifier on the pooled embedding: logits = W embedding + b. Keeps copies in fp32.

    Args:
        weight: [classes, d].
        bias: [classes].

    Raises:
        PluginError: If the shapes do not fit each other or a value is not finite.
    """

    weight: Array
    bias: Array

    def __post_init__(self) -> None:
        for name in ("weight", "bias"):
            try:
                with np.errstate(over="ignore"):
                    value = np.array(getattr(self, name), np.float32)
            except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # the last: torch
                raise PluginError(f"head.{name} is no array of numbers: {error}") from error
            object.__setattr__(self, name, value)
        shapes = np.shape(self.weight), np.shape(self.bias)
        if len(shapes[0]) != 2 or shapes[1] != shapes[0][:1] or shapes[0][0] < 1:
            raise PluginError(
                f"a head of shapes {shapes[0]} and {shapes[1]} is no classifier", valid="[classes, d] and [classes]"
            )
        for name, value in zip(HEAD_TENSORS, (self.weight, self.bias), strict=True):
            if not np.isfinite(value).all():
                raise PluginError(f"{name} holds NaN, infinity or a value beyond fp32", fix="fit the head again")


@dataclass(frozen=True)
class Plugin:
    """One ratio's plugin for one backbone.

    Args:
        config: Ratio, rank and activation.
        tensors: fp32, named as `toolkit.plugin_format.tensor_shapes` says.
        backbone: Fingerprint of the backbone it was trained for; empty where that is not known (imported ones): then it
            fits every backbone of its family and sizes.
        training: How it was trained; empty for an untrained one.
        head: A small task head that travels with it.
    """

    config: PluginConfig
    tensors: Mapping[str, Array]
    family: str
    layers: int
    hidden_size: int
    backbone: str
    training: dict[str, Any] = field(default_factory=dict)
    head: Head | None = None

    @property
    def untrained(self) -> bool:
        """Whether it was made up for speed measurements only."""
        return not self.training

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(tensor.size for tensor in self.tensors.values())

    @property
    def digest(self) -> str:
        """sha256 over names, shapes and bytes of its tensors, without the head."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(np.ascontiguousarray(tensor).data)
        return digest.hexdigest()

    def check_tensors(self, where: str) -> None:
        """Raise `PluginError` unless every tensor is there, of its shape and finite; `where` names the plugin."""
        fix = "train it again with `variator train`, or copy the file again"
        try:
            shapes = tensor_shapes(self.config, self.hidden_size, self.layers)
        except InputError as error:
            raise PluginError(f"{where}: {error.what}", fix=fix) from error
        found = {name: np.shape(tensor) for name, tensor in self.tensors.items()}
        if found != shapes:
            wrong = sorted(name for name in found.keys() | shapes.keys() if found.get(name) != shapes.get(name))
            place = found.get(wrong[0])
            raise PluginError(
                f"{where}: tensor {wrong[0]!r} " + (f"has shape {place}" if place is not None else "is missing"),
                valid=str(shapes.get(wrong[0], "no such tensor")),
                fix=fix,
            )
        bad = [name for name, tensor in self.tensors.items() if not np.isfinite(tensor).all()]
        if bad:
            raise PluginError(f"{where}: tensor {bad[0]!r} holds NaN or infinity", fix=fix)
        if self.head is not None and self.head.weight.shape[1] != self.hidden_size:
            raise PluginError(
                f"{where}: the head reads {self.head.weight.shape[1]} values", valid=f"{self.hidden_size}", fix=fix
            )

    def check_plain(self, where: str) -> None:
        """Raise `PluginError` unless a shared graph can take it; `where` names the plugin."""
        if not self.config.plain:
            raise PluginError(
                f"{where} is more than a ratio",
                valid="one ratio at the FFN of every layer, which is what a shared graph takes",
                fix="export it with --layout per-ratio",
            )

    def check_backbone(
        self, fingerprint: str, name: str, family: str, sizes: tuple[int, int], source: str = "MODEL"
    ) -> None:
        """Raise `PluginError` unless this plugin was trained for this very backbone.

        Args:
            fingerprint, name, family, sizes: Of the backbone it is to run with; sizes are its layers and hidden size.
            source: Where that backbone's checkpoint is, for the command in the message.
        """
        known = self.backbone == fingerprint or (not self.backbone and self.family == family)
        if not known or (self.layers, self.hidden_size) != sizes:
            whose = f"fingerprint {self.backbone[:12]}" if self.backbone else "weights unknown"
            raise PluginError(
                f"the ratio-{self.config.key} plugin was trained for another backbone "
                f"({self.family}, {self.layers} layers of {self.hidden_size}, {whose})",
                valid=f"a plugin for {name} ({family}, {sizes[0]} layers of {sizes[1]}, "
                f"fingerprint {fingerprint[:12]})",
                fix=f"variator train {source} --ratio {self.config.key} --corpus FILE -o DIR",
            )


def heads_agree(plugins: Sequence[Plugin]) -> bool:
    """Whether plugins bring the same head, value by value, or all none: then it is the head of ratio 1, too."""

    def same(one: Head | None, other: Head | None) -> bool:
        if one is None or other is None:
            return one is other
        return np.array_equal(one.weight, other.weight) and np.array_equal(one.bias, other.bias)

    return all(same(plugins[0].head, plugin.head) for plugin in plugins)


def half(tensor: Array, name: str, key: Key) -> npt.NDArray[np.float16]:
    """A tensor in fp16, as plugin files and shared graphs hold it, in C order.

    Raises:
        PluginError: If a value is not finite or too large for the type.
    """
    with np.errstate(over="ignore"):
        found = np.ascontiguousarray(tensor, np.float16)
    if not np.isfinite(found).all():
        raise PluginError(
            f"tensor {name!r} of the ratio-{key} plugin is not finite in fp16",
            fix="train it again with a lower learning rate",
        )
    return found


def untrained_plugin(backbone: Backbone, config: PluginConfig) -> Plugin:
    """A plugin that was never trained, for speed measurements."""
    from variator.toolkit.plugin import initial_tensors

    sizes = backbone.config
    tensors = initial_tensors(config, sizes.hidden_size, sizes.layers)
    return Plugin(
        config,
        {name: tensor.half().float().numpy() for name, tensor in tensors.items()},  # as a plugin file would hold them
        backbone.family,
        sizes.layers,
        sizes.hidden_size,
        backbone.fingerprint,
    )


def plugin_bytes(plugin: Plugin) -> bytes:
    """The file's content, the same for the same plugin. fp16 halves it; its rounding (1e-3 relative) is far below
    what the plugin itself loses. Heads stay in fp32.

    Raises:
        PluginError: If a value is not finite or too large for the type.
    """
    key = plugin.config.key
    tensors: dict[str, npt.NDArray[Any]] = {name: half(value, name, key) for name, value in plugin.tensors.items()}
    if plugin.head is not None:
        values = (np.ascontiguousarray(value, np.float32) for value in (plugin.head.weight, plugin.head.bias))
        tensors |= dict(zip(HEAD_TENSORS, values, strict=True))
    header = {
        "format_version": PLUGIN_FORMAT if plugin.config.plain and not plugin.config.name else EXTENDED_FORMAT,
        "config": plugin.config.header(),
        "family": plugin.family,
        "layers": plugin.layers,
        "hidden_size": plugin.hidden_size,
        "backbone": plugin.backbone,
        "training": plugin.training,
    }
    # One entry: safetensors writes several in random order, and the same seed is to give the same file.
    return save(tensors, {HEADER: json.dumps(header)})


def save_plugin(plugin: Plugin, directory: Path) -> Path:
    """Write `ratio-<k>.safetensors` (or by name) in `directory`, whole or not at all, and return its path."""
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    path = directory / file_name(plugin.config.key)
    write_atomically(path, plugin_bytes(plugin))
    return path


def load_plugin(path: Path) -> Plugin:
    """Read a plugin file.

    Raises:
        PluginError: If it is missing, damaged, of another format, or its tensors do not fit its own header.
    """
    fix = "train it again with `variator train`, or copy the file again"
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}  # noqa: SIM118 - no iterator
    except (SafetensorError, OSError, TypeError) as error:  # TypeError: a type that numpy does not have
        raise PluginError(
            f"cannot read plugin {path}: {error}", valid="a plugin written by `variator train`", fix=fix
        ) from error
    if HEADER not in metadata:
        raise PluginError(f"{path} is a safetensors file but not a plugin", valid="one written by `variator train`")
    try:
        header = json.loads(metadata[HEADER])
        version = header["format_version"]
        if version in (PLUGIN_FORMAT, EXTENDED_FORMAT):
            head = [tensors.pop(name) for name in HEAD_TENSORS] if tensors.keys() & set(HEAD_TENSORS) else []
            plugin = Plugin(
                PluginConfig(**header["config"]), tensors, str(header["family"]), int(header["layers"]),
                int(header["hidden_size"]), str(header["backbone"]), dict(header["training"]),
                Head(*head) if head else None,
            )  # fmt: skip
    except (KeyError, ValueError, TypeError, OverflowError, InputError, PluginError) as error:
        reason = error.what if isinstance(error, VariatorError) else error
        raise PluginError(f"the header or head of plugin {path} is damaged: {reason}", fix=fix) from error
    if version not in (PLUGIN_FORMAT, EXTENDED_FORMAT):
        raise PluginError(
            f"{path} has plugin format version {version}",
            valid=f"{PLUGIN_FORMAT}, {EXTENDED_FORMAT}",
            fix="use the version of variator that wrote it, or train again",
        )
    if not 1 <= plugin.layers <= max(1, len(tensors)) or plugin.hidden_size < 1:
        raise PluginError(f"plugin {path} is for {plugin.layers} layers of {plugin.hidden_size}", fix=fix)
    plugin.check_tensors(f"plugin {path}")
    return plugin


def load_named(path: Path) -> Plugin:
    """Read a plugin file that its setting gives the name, `ratio-<k>.safetensors`. Errors as `load_plugin`."""
    plugin = load_plugin(path)
    if path.name != file_name(plugin.config.key):
        raise PluginError(
            f"{path} holds a plugin of ratio {plugin.config.key}",
            valid=file_name(plugin.config.key),
            fix="plugin files are named by their ratio; rename it back",
        )
    return plugin


def load_plain(place: Path) -> list[Plugin]:
    """Plugins of plain ratios: of a directory's `ratio-<k>.safetensors`, or of one file. Errors as `load_plugin`."""
    if not place.is_dir():
        return [load_plugin(place)]
    return [load_named(path) for path in sorted(place.glob("ratio-*.safetensors"))]


def keys_in(directory: Path) -> list[Key]:
    """Ratios and names of the plugin files in a directory."""
    names = [path.stem for path in directory.glob("*.safetensors")]
    return in_order({parse_key(name.split("-", 1)[1]) for name in names if name.startswith(("ratio-", "setting-"))})


def find_plugin(backbone: Backbone, key: Key, directory: Path | None = None) -> Plugin | None:
    """The plugin of a ratio or name: from `directory` if given, else from those that ship with the package.

    Returns:
        None if there is none for this backbone and ratio.

    Raises:
        PluginError: If the file in `directory` is damaged or for another backbone.
    """
    if directory is not None:
        path = directory / file_name(key)
        if not path.exists():
            return None
        plugin = load_named(path)
        sizes = (backbone.config.layers, backbone.config.hidden_size)
        plugin.check_backbone(backbone.fingerprint, backbone.id, backbone.family, sizes, backbone.source)
        return plugin
    for path in sorted(SHIPPED.glob(f"*/{file_name(key)}")):
        plugin = load_plugin(path)
        if plugin.backbone == backbone.fingerprint:
            return plugin
    return None
