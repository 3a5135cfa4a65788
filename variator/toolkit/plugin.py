"""The method: the maths of a plugin's sites.

Pure functions over tensors, no model in sight. `toolkit.encoder` calls the sites, `toolkit.plugin_format` says what
tensors they take, `training` fits them. Source of the equations: Variator (Xiao et al., Findings of EMNLP 2023,
arXiv 2310.15724), section 3, with a padding mask added (see `compress`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from variator.toolkit.plugin_format import PluginConfig, layer_operands, tensor_shapes

MASKED = -3.0e4
"""Added to the score of a padded position: exp() of it is 0 in fp32, and it still fits in fp16."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
"""Activations by name, for plugins (all of `ACTIVATION_NAMES`) and backbones alike."""

Site = Mapping[str, Tensor]
"""The operands of one site in one layer, by the names of `plugin_format.layer_operands`."""

LayerPlugin = Mapping[str, Site]
"""The sites of one layer, by name; a site that is absent leaves the backbone as it is there."""


@dataclass(frozen=True)
class Compression:
    """A plugin as the encoder runs it.

    Args:
        sites: Gives each layer's sites by its index.
        multiple: Of all ratios; sequences are padded to a multiple of it.
        activation: Of the bottlenecks.
        alone: Whether the first token is kept in a group of its own.
    """

    sites: Callable[[int], LayerPlugin]
    multiple: int
    activation: str
    alone: bool = False

    @property
    def lead(self) -> int:
        """Masked positions in front of the first token: with them it is the last, and only, one of its group."""
        return self.multiple - 1 if self.alone else 0


def compression(config: PluginConfig, tensors: Mapping[str, Tensor]) -> Compression:
    """A configuration with its tensors, named as `plugin_format.tensor_shapes` says."""
    return Compression(partial(layer_operands, tensors), config.multiple, config.activation, config.first_alone)


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
    """Cut sequences into groups of `ratio` adjacent vectors, with padded ones set to zero.

    Args:
        x: [batch, n * ratio, d] hidden vectors.
        mask: [batch, n * ratio], 1 for tokens and 0 for padding, in the type of `x`.

    Returns:
        [batch * n, ratio, d].
    """
    return (x * mask.unsqueeze(-1)).reshape(-1, ratio, x.shape[-1])


def compress(groups: Tensor, mask: Tensor, score_weight: Tensor, score_bias: Tensor) -> Tensor:
    """Merge each group into one vector: c = sum_j softmax_j(W_s concat(g) + b_s + m) g_j.

    The mask term m and the zeroed padding are this project's addition to the paper: without either, a result
    would depend on how far its batch was padded.

    Args:
        groups: [groups, k, d] from `group`.
        mask: [batch, n * k] with groups = batch * n, 1 for tokens and 0 for padding.
        score_weight: [k * d, k].
        score_bias: [k].

    Returns:
        [groups, d].
    """
    count, k, d = groups.shape
    scores = torch.matmul(groups.reshape(count, k * d), score_weight) + score_bias
    weights = torch.softmax(scores + ((1.0 - mask) * MASKED).reshape(count, k), dim=-1)
    return torch.matmul(weights.unsqueeze(1), groups).squeeze(1)


def expand(y: Tensor, x: Tensor, site: Site, activation: str) -> Tensor:
    """Give every token its own output again: o = y + W_u act(W_d [y ; x] + b_d) + b_u.

    W_d [y ; x] is split into W_y y + W_x x, so the first part is computed once per group and broadcast.

    Args:
        y: [groups, d] the FFN's output per group.
        x: [groups * k, d] the FFN site's input per token.
        site: `down_group.weight` and `down_token.weight` [d, r], `down.bias` [r], `up.weight` [r, d], `up.bias` [d].

    Returns:
        [groups, k, d].
    """
    count, d = y.shape
    per_group = torch.matmul(y, site["down_group.weight"]) + site["down.bias"]
    per_token = torch.matmul(x, site["down_token.weight"])
    rank = per_token.shape[-1]
    bottleneck = ACTIVATIONS[activation](per_group.unsqueeze(1) + per_token.reshape(count, -1, rank))
    update = torch.matmul(bottleneck.reshape(-1, rank), site["up.weight"])
    return (y + site["up.bias"]).unsqueeze(1) + update.reshape(count, -1, d)


def compressed_ffn(x: Tensor, mask: Tensor, ffn: Callable[[Tensor], Tensor], site: Site, activation: str) -> Tensor:
    """The FFN site: compress, run the frozen FFN on the shorter sequence, expand.

    The plugin's products are of two dimensions: with weights that come as inputs, runtimes multiply each row of a
    batch by itself otherwise (OpenVINO bf16, MiniLM 32 x 64: 4 to 8 % slower). The FFN's are of three as at ratio 1,
    so that ONNX Runtime packs the same matrices for the same kernel and all ratios share them.

    Args:
        x: [batch, n * k, d] what the FFN's first linear map reads.
        mask: [batch, n * k], 1 for tokens and 0 for padding, in the type of `x`.
        ffn: The layer's own FFN, [..., d] -> [..., d], with its biases and activation.
        site: The operands of the FFN site, see `plugin_format.layer_operands`.

    Returns:
        [batch, n * k, d] in place of FFN(x).
    """
    batch, _, d = x.shape
    ratio = site["score.bias"].shape[0]
    merged = compress(group(x, mask, ratio), mask, site["score.weight"], site["score.bias"])
    y = ffn(merged.reshape(batch, -1, d)).reshape(-1, d)
    return expand(y, x.reshape(-1, d), site, activation).reshape(x.shape)


def compressed_memory(x: Tensor, mask: Tensor, site: Site, activation: str) -> tuple[Tensor, Tensor]:
    """The keys/values site: what K and V are computed from instead of every token, and how it is attended to.

    Each group is merged as at the FFN site, with an optional correction of low rank that reads the whole group:
    c + W_u act(W_d concat(g) + b_d) + b_u. Queries stay per token, so nothing is expanded again. A merged vector stands
    for as many tokens as its group holds: the logarithm of their number is added to its score (proportional
    attention: Bolya et al., Token Merging, ICLR 2023).

    Args:
        x: [batch, n * k, d] the layer's input.
        mask: [batch, n * k], 1 for tokens and 0 for padding, in the type of `x`.
        site: `score.weight` [k d, k], `score.bias` [k]; with a correction `down.weight` [k d, r], `down.bias` [r],
            `up.weight` [r, d], `up.bias` [d].

    Returns:
        [batch, n, d] and what is added to the attention scores, [batch, 1, 1, n].
    """
    batch, _, d = x.shape
    ratio = site["score.bias"].shape[0]
    groups = group(x, mask, ratio)
    merged = compress(groups, mask, site["score.weight"], site["score.bias"])
    if "down.weight" in site:
        inner = torch.matmul(groups.reshape(-1, ratio * d), site["down.weight"]) + site["down.bias"]
        merged = merged + torch.matmul(ACTIVATIONS[activation](inner), site["up.weight"]) + site["up.bias"]
    tokens = mask.reshape(batch, -1, ratio).sum(dim=-1)
    scores = torch.log(tokens.clamp(min=1.0)) + (1.0 - tokens.clamp(max=1.0)) * MASKED
    return merged.reshape(batch, -1, d), scores[:, None, None, :]
