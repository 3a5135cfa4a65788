"""The method: what a plugin is made of and the maths of its sites.

Pure functions over tensors, no model in sight. `toolkit.encoder` calls the sites, `toolkit.plugin_file`
stores the tensors, `toolkit.train` fits them. Source of the equations: Variator (Xiao et al., Findings of
EMNLP 2023, arXiv 2310.15724), section 3, with a padding mask added (see `compress`).

A plugin is a set of *sites* per layer. Today there is one, the feed-forward network ("ffn"); a site is added
by giving it tensor shapes in `SITES` and a function beside `compressed_ffn`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from variator.errors import InputError

MAX_RATIO = 16
"""Largest ratio accepted: the paper's curves end there, and the score matrix grows with its square."""

MASKED = -3.0e4
"""Added to the score of a padded position: exp() of it is 0 in fp32, and it still fits in fp16."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
"""Activations by name, for plugins and backbones alike."""

Site = Mapping[str, Tensor]
"""The tensors of one site in one layer, by the names in `SITES`."""

LayerPlugin = Mapping[str, Site]
"""The sites of one layer, by name; a site that is absent leaves the backbone as it is there."""


@dataclass(frozen=True)
class PluginConfig:
    """The parameters of a plugin, the same for all layers.

    Args:
        ratio: Hidden vectors merged into one (k), 2 to 16.
        rank: Width of the bottleneck that expands a group again (r), at least 1.
        activation: Its activation, a key of `ACTIVATIONS`.

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
        if self.activation not in ACTIVATIONS:
            raise InputError(f"unknown plugin activation {self.activation!r}", valid=", ".join(ACTIVATIONS))


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
    """Names and shapes of all tensors of a plugin: `layers.<l>.<site>.<tensor>`."""
    return {
        f"layers.{layer}.{site}.{name}": shape
        for layer in range(layers)
        for site, shapes in SITES.items()
        for name, shape in shapes(config, hidden_size).items()
    }


def layer_plugin(tensors: Mapping[str, Tensor], layer: int) -> dict[str, dict[str, Tensor]]:
    """Sort a flat mapping with names as in `tensor_shapes` into the sites of one layer."""
    sites: dict[str, dict[str, Tensor]] = {}
    for site in SITES:
        prefix = f"layers.{layer}.{site}."
        found = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if found:
            sites[site] = found
    return sites


def initial_tensors(config: PluginConfig, hidden_size: int, layers: int, seed: int = 0) -> dict[str, Tensor]:
    """An untrained plugin: groups are averaged, the bottleneck is random and its output zero."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes(config, hidden_size, layers).items():
        if name.endswith("down.weight"):
            tensors[name] = torch.randn(shape, generator=generator) / math.sqrt(shape[1])
        else:
            tensors[name] = torch.zeros(shape)
    return tensors


def group(x: Tensor, mask: Tensor, ratio: int) -> Tensor:
    """Cut a sequence into groups of `ratio` adjacent vectors, with padded ones set to zero.

    Args:
        x: [batch, n * ratio, d] hidden vectors.
        mask: [batch, n * ratio], 1 for tokens and 0 for padding, in the type of `x`.

    Returns:
        [batch, n, ratio, d].
    """
    batch, _, d = x.shape
    return (x * mask.unsqueeze(-1)).reshape(batch, -1, ratio, d)


def compress(groups: Tensor, mask: Tensor, score_weight: Tensor, score_bias: Tensor) -> Tensor:
    """Merge each group into one vector: c = sum_j softmax_j(W_s concat(g) + b_s + m) g_j.

    The mask term m and the zeroed padding are this project's addition to the paper: without either, a result
    would depend on how far its batch was padded.

    Args:
        groups: [batch, n, k, d] from `group`.
        mask: [batch, n * k], 1 for tokens and 0 for padding.
        score_weight: [k, k * d].
        score_bias: [k].

    Returns:
        [batch, n, d].
    """
    batch, n, k, d = groups.shape
    scores = torch.matmul(groups.reshape(batch, n, k * d), score_weight.t()) + score_bias
    weights = torch.softmax(scores + (1.0 - mask).reshape(batch, n, k) * MASKED, dim=-1)
    return torch.matmul(weights.unsqueeze(2), groups).squeeze(2)


def expand(y: Tensor, x: Tensor, site: Site, activation: str) -> Tensor:
    """Give every token its own output again: o = y + W_u act(W_d [y ; x] + b_d) + b_u.

    W_d [y ; x] is split into W_y y + W_x x, so the first part is computed once per group and broadcast.

    Args:
        y: [batch, n, d] the FFN's output per group.
        x: [batch, n * k, d] the FFN site's input per token.
        site: `down.weight` [r, 2 d], `down.bias` [r], `up.weight` [d, r], `up.bias` [d].

    Returns:
        [batch, n * k, d].
    """
    batch, n, d = y.shape
    down = site["down.weight"].t()
    per_group = torch.matmul(y, down[:d]) + site["down.bias"]
    per_token = torch.matmul(x, down[d:])
    rank = per_token.shape[-1]
    bottleneck = ACTIVATIONS[activation](per_group.unsqueeze(2) + per_token.reshape(batch, n, -1, rank))
    update = torch.matmul(bottleneck, site["up.weight"].t())
    return ((y + site["up.bias"]).unsqueeze(2) + update).reshape(batch, -1, d)


def compressed_ffn(x: Tensor, mask: Tensor, ffn: Callable[[Tensor], Tensor], site: Site, activation: str) -> Tensor:
    """The FFN site: compress, run the frozen FFN on the shorter sequence, expand.

    Args:
        x: [batch, n * k, d] what the FFN's first linear map reads.
        mask: [batch, n * k], 1 for tokens and 0 for padding, in the type of `x`.
        ffn: The layer's own FFN, [..., d] -> [..., d], with its biases and activation.
        site: The tensors named in `SITES["ffn"]`.

    Returns:
        [batch, n * k, d] in place of FFN(x).
    """
    ratio = site["score.bias"].shape[0]
    merged = compress(group(x, mask, ratio), mask, site["score.weight"], site["score.bias"])
    return expand(ffn(merged), x, site, activation)
