"""What a plugin consists of: its parameters, its tensors and their shapes, and the operands they become.

Names and numbers only, without torch: a serving machine plugs plugin files in with this and `toolkit.plugin_file`.
The equations that use the operands are in `toolkit.plugin`.

A plugin is a set of *sites* per layer. Today there is one, the feed-forward network ("ffn"); a site is added
by giving it tensor shapes in `SITES`, operands in `operands` and a function beside `plugin.compressed_ffn`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from variator.errors import InputError

PLUGIN_FORMAT = 1
"""Version of plugin files, and of the operands that a shared graph takes."""

MAX_RATIO = 16
"""Largest ratio accepted: the paper's curves end there, and the score matrix grows with its square."""

ACTIVATION_NAMES = ("tanh", "gelu", "gelu_tanh", "relu", "silu")
"""Activations of the bottleneck; `toolkit.plugin` has the functions."""


@dataclass(frozen=True)
class PluginConfig:
    """The parameters of a plugin, the same for all layers.

    Args:
        ratio: Hidden vectors merged into one (k), 2 to 16.
        rank: Width of the bottleneck that expands a group again (r), at least 1.
        activation: Its activation, one of `ACTIVATION_NAMES`.

    Raises:
        InputError: For a value outside these.
    """

    ratio: int
    rank: int = 64
    activation: str = "tanh"

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        if self.ratio == 1:
            raise InputError("ratio 1 is the backbone itself and has no plugin", valid=f"2 to {MAX_RATIO}")
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise InputError(f"rank {self.rank!r} is not a positive whole number", valid="1 or more; the paper uses 64")
        if self.activation not in ACTIVATION_NAMES:
            raise InputError(f"unknown plugin activation {self.activation!r}", valid=", ".join(ACTIVATION_NAMES))


def check_ratio(ratio: object) -> int:
    """Return `ratio` if it is a whole number from 1 to `MAX_RATIO`, else raise `InputError`."""
    if isinstance(ratio, bool) or not isinstance(ratio, int) or not 1 <= ratio <= MAX_RATIO:
        raise InputError(
            f"ratio {ratio!r} is not usable",
            valid=f"a whole number from 1 (the backbone itself) to {MAX_RATIO}",
            fix="use 2, 4 or 8 unless you have measured another",
        )
    return ratio


def _ffn_shapes(config: PluginConfig, d: int) -> dict[str, tuple[int, ...]]:
    k, r = config.ratio, config.rank
    return {
        "score.weight": (k, k * d),
        "score.bias": (k,),
        "down.weight": (r, 2 * d),
        "down.bias": (r,),
        "up.weight": (d, r),
        "up.bias": (d,),
    }


SITES: dict[str, Callable[[PluginConfig, int], dict[str, tuple[int, ...]]]] = {"ffn": _ffn_shapes}
"""Which tensors a plugin has in one layer: site name -> shapes by tensor name, from the config and hidden size."""


def tensor_shapes(config: PluginConfig, hidden_size: int, layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a plugin: `layers.<l>.<site>.<tensor>`, weights as [out, in]."""
    return {
        f"layers.{layer}.{site}.{name}": shape
        for layer in range(layers)
        for site, shapes in SITES.items()
        for name, shape in shapes(config, hidden_size).items()
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
            sites[site] = operands(found)
    return sites


def operands(site: Mapping[str, M]) -> dict[str, M]:
    """What the equations multiply with: weights as [in, out], W_d cut into its parts for the group and the token.

    Args:
        site: One site's tensors in one layer, by the names and shapes of `SITES["ffn"]`.

    Returns:
        `score.weight` [k d, k], `score.bias` [k], `down_group.weight` [d, r], `down_token.weight` [d, r],
        `down.bias` [r], `up.weight` [r, d], `up.bias` [d].
    """
    down = site["down.weight"].T
    d = down.shape[0] // 2
    return {
        "score.weight": site["score.weight"].T,
        "score.bias": site["score.bias"],
        "down_group.weight": down[:d],
        "down_token.weight": down[d:],
        "down.bias": site["down.bias"],
        "up.weight": site["up.weight"].T,
        "up.bias": site["up.bias"],
    }
