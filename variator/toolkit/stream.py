"""A checkpoint read tensor by tensor, for models larger than memory.

`open_stream` gives a checkpoint's tensors by name, straight from its safetensors files; `Layered` prepares them layer
by layer, as a family wants them; `Stream` has the canonical model's, each computed when it is asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from variator import machine
from variator.errors import BackboneError
from variator.toolkit.families.base import DecoderParts, Family

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

SMALL = 512 * 512
"""Numbers of a tensor that is kept in memory: up to here the exporter folds what is computed from weights alone."""


class Files(Mapping[str, Tensor]):
    """Tensors by name, each read when it is asked for, as stored; fp32 where it is a number.

    Args:
        places: File of each tensor.
        shapes: Of each.
        prefix: Of the names in the files, which ours lack: `bert.`.
    """

    def __init__(
        self, directory: Path, places: Mapping[str, str], shapes: Mapping[str, Sequence[int]], prefix: str
    ) -> None:
        self.directory, self._prefix = directory, prefix
        self._places = {name.removeprefix(prefix): (name, file) for name, file in places.items()}
        self._shapes = {name.removeprefix(prefix): tuple(shapes[name]) for name in places}

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import SafetensorError, safe_open

        stored, file = self._places[name]
        path = self.directory / file
        try:
            with safe_open(path, framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(stored)
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, error) from error
        return tensor.float() if tensor.is_floating_point() else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    @property
    def files(self) -> list[Path]:
        """Those that hold them."""
        return [self.directory / name for name in sorted({file for _, file in self._places.values()})]

    def check(self, model: PreTrainedModel, needed: Callable[[str], bool] = lambda name: True) -> None:
        """Compare names and shapes with those of transformers' own model, which may be on the `meta` device.

        Args:
            needed: Whether a tensor must be there, by its name.

        Raises:
            BackboneError: If one is missing or of another shape.
        """
        tied = model.all_tied_weights_keys
        for whole, parameter in model.named_parameters(remove_duplicate=False):
            name = whole.removeprefix(self._prefix)
            found, promised = self._shapes.get(name), tuple(parameter.shape)
            if found is None and whole not in tied and needed(name):
                raise _missing(self.directory, name)
            if found not in (None, promised):
                raise BackboneError(
                    f"tensor {name!r} in {self.directory} is of shape {found}",
                    valid=f"{promised}, which its config.json promises",
                    fix="download the checkpoint again",
                )


def _unreadable(path: Path, error: Exception) -> BackboneError:
    return BackboneError(
        f"cannot read {path}: {error}", valid="a complete safetensors file", fix="copy or download the checkpoint again"
    )


def open_stream(model: str, prefix: str) -> Files:
    """The tensors of a checkpoint in a local directory, in one safetensors file or in shards.

    Raises:
        BackboneError: If there are none, or a shard is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    directory = Path(model)
    single, index = directory / SINGLE, directory / INDEX
    if index.is_file():
        try:
            places = {str(name): str(file) for name, file in json.loads(index.read_text("utf-8"))["weight_map"].items()}
        except (ValueError, KeyError, AttributeError, OSError) as error:
            raise BackboneError(f"{index} is damaged: {error!r}", fix="download the checkpoint again") from error
    elif single.is_file():
        places = {}
    else:
        raise BackboneError(
            f"{model!r} has no {SINGLE} and no {INDEX}",
            valid="a local directory with safetensors files for --low-memory",
            fix="download or convert the checkpoint, or export without --low-memory",
        )
    shapes: dict[str, Sequence[int]] = {}
    for file in sorted(set(places.values()) or {SINGLE}):
        # A plain name; where it leads is the file system's business: the hub's cache consists of links.
        if file != Path(file).name or file in ("", ".", ".."):
            raise BackboneError(f"{index} names a file outside of its directory: {file!r}", valid="plain file names")
        path = directory / file
        try:
            with safe_open(path, framework="pt") as opened:  # its header tells whether all bytes are there
                names = set(opened.keys())
                shapes |= {name: opened.get_slice(name).get_shape() for name in names}
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, error) from error
        if not index.is_file():
            places = dict.fromkeys(sorted(names), SINGLE)
        missing = sorted(name for name, where in places.items() if where == file and name not in names)
        if missing:
            raise BackboneError(f"{path} lacks tensor {missing[0]!r}", fix="download the checkpoint again")
    return Files(directory, places, shapes, prefix)


class MissingTensorError(BackboneError, KeyError):
    """A checkpoint lacks a tensor."""


def _missing(directory: Path, name: str) -> MissingTensorError:
    return MissingTensorError(
        f"{directory} lacks tensor {name!r}, which its config.json promises",
        valid="a complete checkpoint in the names of today's transformers",
        fix="download it again, or load and save it with transformers",
    )


class Layered(Mapping[str, Tensor]):
    """A checkpoint's tensors as a family prepares them, with no more than one layer of them in memory."""

    def __init__(self, files: Files, family: Family, config: PretrainedConfig) -> None:
        self._files, self._family, self._config = files, family, config
        self._held: tuple[str, Mapping[str, Tensor]] = ("", {})

    @property
    def directory(self) -> Path:
        """Of the checkpoint."""
        return self._files.directory

    def state(self) -> list[tuple[str, int, int]]:
        """Name, size and time of every file: what tells one checkpoint from another without reading it."""
        return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self._files.files]

    def release(self) -> None:
        """Let go of the layer that is kept."""
        self._held = ("", {})
        machine.release_memory()

    def _layer(self, name: str) -> Mapping[str, Tensor]:
        """Everything of the layer that a name belongs to; of none, everything that is asked for by itself."""
        match = re.match(r"(.*?\b(?:layers?|block)\.\d+\.)", name)
        if match is None:
            return self._files
        prefix = match[1]
        if self._held[0] != prefix:
            self.release()  # the allocator, too: it keeps what is freed in the sizes of most layers
            raw = {one: self._files[one] for one in self._files if one.startswith(prefix)}
            self._held = (prefix, self._family.prepare(raw, self._config))
        return self._held[1]

    def __getitem__(self, name: str) -> Tensor:
        found = self._layer(name)
        if name not in found:
            raise _missing(self._files.directory, name)
        return found[name]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._layer(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class Stream:
    """The tensors of a canonical encoder and decoder by name, each computed when it is asked for.

    Args:
        weights: Prepared.
        decoder: Where the model has one.
    """

    def __init__(
        self, weights: Layered, family: Family, config: PretrainedConfig, decoder: DecoderParts | None = None
    ) -> None:
        self._weights, self._family, self._config, self._decoder = weights, family, config, decoder
        self.sizes = family.encoder_config(config)
        self.state = weights.state()
        self._held: tuple[object, dict[str, Tensor]] = (None, {})

    def release(self) -> None:
        """Let go of the layer that is kept."""
        self._held = (None, {})
        self._weights.release()

    def encoder(self, name: str) -> Tensor:
        """A tensor of `encoder.Encoder`."""
        try:
            return self._encoder(name)
        except MissingTensorError:
            raise
        except KeyError as error:
            raise MissingTensorError(
                f"{self._weights.directory} lacks what the encoder's {name!r} is made of",
                valid="a complete checkpoint in the names of today's transformers",
                fix="download it again, or load and save it with transformers",
            ) from error

    def _encoder(self, name: str) -> Tensor:
        match = re.match(r"layers\.(\d+)\.(.*)", name)
        if match and not match[2].startswith("attention.relative_"):
            return self.encoder_layer(int(match[1]))[match[2]]
        outside = self._family.weights_outside(self._weights, self._config)
        if name in outside:
            return outside[name]
        return self._family.relation(self._weights, self._config, self.sizes)[name].clone()

    def encoder_layer(self, index: int) -> dict[str, Tensor]:
        """All tensors of a layer of the encoder, but for relative embeddings; the last one asked for is kept."""
        key = ("encoder", index)
        if self._held[0] != key:
            self._held = (None, {})
            self._held = (key, self._family.layer_weights(self._weights, index, self.sizes))
            self._weights.release()
        return self._held[1]

    def decoder(self, name: str) -> Tensor:
        """A tensor of `decoder.Decoder`, but for the embedding table."""
        parts = self._decoder
        assert parts is not None
        match = re.match(r"layers\.(\d+)\.(.*)", name)
        if match:
            return self.decoder_layer(int(match[1]))[match[2]]
        if name == "vocabulary" and parts.output is not None:
            return parts.output()
        return parts.outside[name]

    def decoder_layer(self, index: int) -> dict[str, Tensor]:
        """All tensors of a layer of the decoder; the last one asked for is kept."""
        key = ("decoder", index)
        if self._held[0] != key:
            assert self._decoder is not None
            self._held = (None, {})
            self._held = (key, self._decoder.layer(index))
            self._weights.release()
        return self._held[1]


def placeholders(
    module: torch.nn.Module, tensor: Callable[[str], Tensor], kept: Mapping[str, Tensor] = MappingProxyType({})
) -> None:
    """Give a module on the `meta` device tensors that take no memory: zeros of the right shape, real ones if small.

    Args:
        kept: That are shared with another module, and stay what they are.
    """
    state = {
        name: kept[name]
        if name in kept
        else tensor(name)
        if value.numel() <= SMALL
        else torch.zeros(()).expand(value.shape)
        for name, value in module.state_dict().items()
    }
    module.load_state_dict(state, assign=True)


def is_placeholder(tensor: Tensor) -> bool:
    """Whether a tensor stands for one that was not read."""
    return tensor.numel() > SMALL and not any(tensor.stride())
