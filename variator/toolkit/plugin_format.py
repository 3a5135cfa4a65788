"""What a plugin consists of: its parameters, its tensors and their shapes, and the operands they become.

Names and numbers only, without torch: a serving machine plugs plugin files in with this and `toolkit.plugin_file`.
The equations that use the operands are in `toolkit.plugin`.

A plugin is a set of *sites* per layer: the feed-forward network ("ffn", the paper's) and the keys and values of the
attention ("kv", ours). A site is added by giving it tensor shapes and operands in `SITES` and a function beside
`plugin.compressed_ffn`. A layer may lack a site, and sites may differ from layer to layer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

from variator.errors import InputError

PLUGIN_FORMAT = 1
"""Version of plugin files, and of the operands that a shared graph takes."""

EXTENDED_FORMAT = 2
"""Version of files with a name, a schedule or keys and values: an older reader says that it is too old."""

MAX_RATIO = 16
"""Largest ratio accepted: the paper's curves end there, and the score matrix grows with its square."""

ACTIVATION_NAMES = ("tanh", "gelu", "gelu_tanh", "relu", "silu")
"""Activations of the bottleneck; `toolkit.plugin` has the functions."""

NAME = re.compile(r"[a-z][a-z0-9-]{0,30}")
"""Names of settings that are no plain ratio."""

Key = int | str
"""What a setting is asked for by: a ratio, or the name of one that is more than a ratio."""


class SiteSize(NamedTuple):
    """Ratio and rank of one site in one layer."""

    ratio: int
    rank: int


LayerSites = Mapping[str, SiteSize]
"""The compressed sites of a layer, by name."""


@dataclass(frozen=True)
class PluginConfig:
    """The parameters of a plugin.

    Args:
        ratio: Hidden vectors merged into one (k) at the FFN site, 1 to 16; the largest of a schedule.
        rank: Width of the bottleneck that expands a group again (r), at least 1; the largest of a schedule.
        activation: Its activation, one of `ACTIVATION_NAMES`.
        keys_values: Ratio of the keys/values site in every layer; 1 leaves them per token.
        keys_values_rank: Width of that site's correction, 0 without.
        schedule: Ratio and rank of the FFN site layer by layer, ratio 1 for a layer that is left alone; empty: the
            same in all layers.
        first_alone: Whether the first token ([CLS], which classifiers read) is kept in a group of its own.
        name: What the setting is asked for by; needed for all but plain ratios.

    Raises:
        InputError: For a value outside these.
    """

    ratio: int
    rank: int = 64
    activation: str = "tanh"
    keys_values: int = 1
    keys_values_rank: int = 0
    schedule: tuple[SiteSize, ...] = ()
    first_alone: bool = False
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedule", tuple(SiteSize(*size) for size in self.schedule))
        for ratio in (self.ratio, self.keys_values, *(size.ratio for size in self.schedule)):
            check_ratio(ratio)
        if self.ratio == self.keys_values == 1:
            raise InputError("ratio 1 is the backbone itself and has no plugin", valid=f"2 to {MAX_RATIO}")
        for rank, least in ((self.rank, 1), (self.keys_values_rank, 0), *((size.rank, 1) for size in self.schedule)):
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < least:
                raise InputError(f"rank {rank!r} is not a positive whole number", valid="1 or more; the paper uses 64")
        if self.activation not in ACTIVATION_NAMES:
            raise InputError(f"unknown plugin activation {self.activation!r}", valid=", ".join(ACTIVATION_NAMES))
        if self.schedule and (self.ratio, self.rank) != tuple(map(max, zip(*self.schedule, strict=True))):
            raise InputError(
                f"ratio {self.ratio} and rank {self.rank} are not the largest of the schedule {self.schedule}",
                fix="make it with plugin_format.scheduled",
            )
        if self.multiple > MAX_RATIO:
            raise InputError(
                f"sequences would be padded to a multiple of {self.multiple}",
                valid=f"ratios with a common multiple up to {MAX_RATIO}",
                fix="use powers of 2",
            )
        if self.name and not NAME.fullmatch(self.name):
            raise InputError(f"name {self.name!r} of a setting", valid="a to z, 0 to 9 and -, a letter first")
        if not self.name and not self.plain:
            raise InputError("a setting that is more than a ratio needs a name", fix="--setting long")

    @property
    def key(self) -> Key:
        """What it is asked for by."""
        return self.name or self.ratio

    @property
    def plain(self) -> bool:
        """Whether it is nothing but a ratio at the FFN site of every layer, which a shared graph can take."""
        return not self.schedule and self.keys_values == 1 and not self.first_alone

    @property
    def multiple(self) -> int:
        """What sequences are padded to a multiple of."""
        return math.lcm(self.ratio, self.keys_values, *(size.ratio for size in self.schedule))

    def sites(self, layer: int) -> dict[str, SiteSize]:
        """The sites of a layer that are compressed, by name."""
        ffn = self.schedule[layer] if self.schedule else SiteSize(self.ratio, self.rank)
        found = {"ffn": ffn, "kv": SiteSize(self.keys_values, self.keys_values_rank)}
        return {site: size for site, size in found.items() if size.ratio > 1}

    @property
    def summary(self) -> str:
        """In words: `ratio 8, rank 192, gelu, keys and values 4 (rank 64)`."""
        said = [f"ratio {self.ratio}", f"rank {self.rank}"]
        if self.schedule:
            said = [
                f"layers {' '.join(f'{size.ratio}/{size.rank}' if size.ratio > 1 else '1' for size in self.schedule)}"
            ]
        said.append(self.activation)
        if self.keys_values > 1:
            rank = f" (rank {self.keys_values_rank})" if self.keys_values_rank else ""
            said.append(f"keys and values {self.keys_values}{rank}")
        if self.first_alone:
            said.append("first token alone")
        return ", ".join(said)

    def header(self) -> dict[str, Any]:
        """As JSON: `ratio`, `rank`, `activation` and whatever else is not usual."""
        usual = asdict(PluginConfig(2))
        always = ("ratio", "rank", "activation")
        return {key: value for key, value in asdict(self).items() if key in always or value != usual[key]}


def scheduled(
    name: str,
    schedule: Sequence[tuple[int, int]],
    activation: str = "tanh",
    keys_values: int = 1,
    keys_values_rank: int = 0,
    first_alone: bool = False,
) -> PluginConfig:
    """A configuration from ratio and rank of every layer."""
    sizes = tuple(SiteSize(*size) for size in schedule)
    ratio, rank = (max(size[part] for size in sizes) for part in (0, 1))
    return PluginConfig(ratio, rank, activation, keys_values, keys_values_rank, sizes, first_alone, name)


def parse_key(text: Key) -> Key:
    """`4` or `"4"` -> 4, `"long"` -> `"long"`, else `InputError`."""
    if isinstance(text, str) and text.isdecimal() and len(text) < 10:
        return check_ratio(int(text))
    if isinstance(text, str) and NAME.fullmatch(text):
        return text
    return check_ratio(text)


def in_order(keys: Iterable[Key]) -> list[Key]:
    """Ratios ascending, then names."""
    return sorted(keys, key=order)


def order(key: Key) -> tuple[bool, int, str]:
    """What settings are sorted by."""
    return isinstance(key, str), key if isinstance(key, int) else 0, str(key)


def file_name(key: Key) -> str:
    """Name of a setting's plugin file: `ratio-4.safetensors`, `setting-long.safetensors`."""
    return f"{setting_name(key)}.safetensors"


def setting_name(key: Key) -> str:
    """How files are called by a setting: `ratio-4`, `setting-long`."""
    return f"ratio-{key}" if isinstance(key, int) else f"setting-{key}"


def check_ratio(ratio: object) -> int:
    """Return `ratio` if it is a whole number from 1 to `MAX_RATIO`, else raise `InputError`."""
    if isinstance(ratio, bool) or not isinstance(ratio, int) or not 1 <= ratio <= MAX_RATIO:
        raise InputError(
            f"ratio {ratio!r} is not usable",
            valid=f"a whole number from 1 (the backbone itself) to {MAX_RATIO}",
            fix="use 2, 4 or 8 unless you have measured another",
        )
    return ratio


def _ffn_shapes(size: SiteSize, d: int) -> dict[str, tuple[int, ...]]:
    k, r = size
    return {
        "score.weight": (k, k * d),
        "score.bias": (k,),
        "down.weight": (r, 2 * d),
        "down.bias": (r,),
        "up.weight": (d, r),
        "up.bias": (d,),
    }


def _kv_shapes(size: SiteSize, d: int) -> dict[str, tuple[int, ...]]:
    k, r = size
    correction = {"down.weight": (r, k * d), "down.bias": (r,), "up.weight": (d, r), "up.bias": (d,)}
    return {"score.weight": (k, k * d), "score.bias": (k,), **(correction if r else {})}


SITES: dict[str, Callable[[SiteSize, int], dict[str, tuple[int, ...]]]] = {"ffn": _ffn_shapes, "kv": _kv_shapes}
"""Which tensors a plugin has in one layer: site name -> shapes by tensor name, from ratio, rank and hidden size."""


def tensor_shapes(config: PluginConfig, hidden_size: int, layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a plugin: `layers.<l>.<site>.<tensor>`, weights as [out, in].

    Raises:
        InputError: If the schedule is for another number of layers.
    """
    if config.schedule and len(config.schedule) != layers:
        raise InputError(f"a schedule of {len(config.schedule)} layers for {layers} layers", valid=f"{layers}")
    return {
        f"layers.{layer}.{site}.{name}": shape
        for layer in range(layers)
        for site, size in config.sites(layer).items()
        for name, shape in SITES[site](size, hidden_size).items()
    }


class Matrix(Protocol):
    """What `operands` needs of a tensor, torch's or numpy's."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def T(self: M) -> M: ...  # noqa: N802
    def __getitem__(self: M, index: slice) -> M: ...


M = TypeVar("M", bound=Matrix)


def layer_operands(tensors: Mapping[str, M], layer: int) -> dict[str, dict[str, M]]:
    """Sort a flat mapping with names as in `tensor_shapes` into one layer's operands, by site.

    A site without tensors is absent, and leaves the backbone as it is there.
    """
    sites = {}
    for site in SITES:
        prefix = f"layers.{layer}.{site}."
        found = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if found:
            sites[site] = _ffn_operands(found) if site == "ffn" else _transposed(found)
    return sites


def _ffn_operands(site: Mapping[str, M]) -> dict[str, M]:
    """What the equations multiply with: weights as [in, out], W_d cut into its parts for the group and the token.

    Returns:
        `score.weight` [k d, k], `score.bias` [k], `down_group.weight` [d, r], `down_token.weight` [d, r],
        `down.bias` [r], `up.weight` [r, d], `up.bias` [d].
    """
    found = _transposed(site)
    down = found.pop("down.weight")
    d = down.shape[0] // 2
    return {**found, "down_group.weight": down[:d], "down_token.weight": down[d:]}


def _transposed(site: Mapping[str, M]) -> dict[str, M]:
    """Weights as [in, out], biases as they are."""
    return {name: tensor.T if name.endswith("weight") else tensor for name, tensor in site.items()}
