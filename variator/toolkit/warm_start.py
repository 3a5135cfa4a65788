"""Where training starts: the bottleneck fitted in closed form, by reduced-rank regression.

With groups averaged (scores at zero) what is left to explain for token t is e_t = FFN(x_t) - y_g, from
z_t = [y_g ; x_t]. The best linear map of rank r from z to e (least squares, then the r leading directions of its
fit; Izenman 1975) becomes W_d and W_u, scaled so that the activation works near its linear part. Training then
starts at an error that random starts reach after several hundred steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from variator.toolkit.encoder import Encoder
from variator.toolkit.plugin import MASKED, PluginConfig, compress, group, initial_tensors

INPUT_SCALE = 0.5
"""Standard deviation of what goes into the activation: tanh and GELU bend little there."""

RIDGE = 1e-3
"""Added to the inputs' covariance, relative to its mean variance."""


@dataclass
class Moments:
    """Sums over tokens of z z', z e', z and e, enough for the regression."""

    zz: Tensor
    ze: Tensor
    z: Tensor
    e: Tensor
    count: int = 0

    @staticmethod
    def empty(d: int) -> Moments:
        """All zero, for hidden size d."""
        return Moments(torch.zeros(2 * d, 2 * d), torch.zeros(2 * d, d), torch.zeros(2 * d), torch.zeros(d))

    def add(self, z: Tensor, e: Tensor) -> None:
        """z: [tokens, 2 d], e: [tokens, d], fp32."""
        with torch.autocast("cpu", enabled=False):  # in bf16 the covariance would be noise
            self.zz += z.T @ z
            self.ze += z.T @ e
        self.z += z.sum(dim=0)
        self.e += e.sum(dim=0)
        self.count += len(z)


@torch.no_grad()
def fitted_tensors(
    encoder: Encoder, configs: Sequence[PluginConfig], batches: Iterable[tuple[Tensor, Tensor]], seed: int
) -> dict[int, dict[str, Tensor]]:
    """Initial tensors by ratio.

    Args:
        batches: (input_ids, attention_mask), int64 [batch, S] each, S a multiple of every ratio.
        seed: For directions that the regression leaves empty.
    """
    d, layers = encoder.config.hidden_size, encoder.config.layers
    moments = {config.ratio: [Moments.empty(d) for _ in range(layers)] for config in configs}
    for ids, mask in batches:
        _accumulate(encoder, moments, ids, mask)
    fitted = {}
    for config in configs:
        tensors = initial_tensors(config, d, layers, seed)
        for layer in range(layers):
            for name, value in _regress(moments[config.ratio][layer], config).items():
                target = tensors[f"layers.{layer}.ffn.{name}"]
                target[tuple(slice(size) for size in value.shape)] = value
        fitted[config.ratio] = tensors
    return fitted


def _accumulate(encoder: Encoder, moments: dict[int, list[Moments]], ids: Tensor, mask: Tensor) -> None:
    x = encoder.embeddings(ids, None)
    float_mask, real = mask.to(x.dtype), mask.bool()
    scores_mask = ((1.0 - float_mask) * MASKED)[:, None, None, :]
    for index, layer in enumerate(encoder.blocks):
        x = layer.attend(x, scores_mask)
        target = layer.ffn(x)
        for ratio, by_layer in moments.items():
            zeros = torch.zeros(ratio, ratio * x.shape[-1])
            merged = compress(group(x, float_mask, ratio), float_mask, zeros, zeros[:, 0])
            y = layer.ffn(merged).repeat_interleave(ratio, dim=1)
            by_layer[index].add(torch.cat([y, x], dim=-1)[real].float(), (target - y)[real].float())
        x = layer.finish(x, target)


def _regress(moments: Moments, config: PluginConfig) -> dict[str, Tensor]:
    n = max(moments.count, 1)
    mean_z, mean_e = moments.z / n, moments.e / n
    covariance = moments.zz / n - torch.outer(mean_z, mean_z)
    cross = moments.ze / n - torch.outer(mean_z, mean_e)
    ridge = RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance))
    slopes = torch.linalg.solve(covariance + ridge, cross)
    values, vectors = torch.linalg.eigh(slopes.T @ covariance @ slopes)
    rank = min(config.rank, int((values > 1e-9 * values.max()).sum()))
    directions = vectors[:, -rank:] if rank else vectors[:, :0]
    deviations = values[-rank:].sqrt() if rank else values[:0]
    down = (slopes @ directions).T * (INPUT_SCALE / deviations)[:, None]
    # GELU and its kin have slope 1/2 at zero, tanh has 1.
    gain = 1.0 if config.activation in ("tanh", "relu") else 2.0
    return {
        "down.weight": down,
        "down.bias": -down @ mean_z,
        "up.weight": directions * (deviations / INPUT_SCALE) * gain,
        "up.bias": mean_e,
    }


def padded_to(ids: Tensor, mask: Tensor, configs: Sequence[PluginConfig]) -> tuple[Tensor, Tensor]:
    """Pad a batch on the right to a multiple of every ratio."""
    extra = -ids.shape[1] % math.lcm(*(config.ratio for config in configs))
    return torch.nn.functional.pad(ids, (0, extra)), torch.nn.functional.pad(mask, (0, extra))
