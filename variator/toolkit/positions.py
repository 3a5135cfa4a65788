"""How tokens know where they are, beyond a table of positions: what attention is told about every pair of them.

`toolkit.encoder` asks for it once per run and layer kind; `toolkit.families` fills the tables. Distances are looked up
in tables instead of being computed, so that no runtime's logarithm decides in which bucket a distance falls.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from variator.toolkit.plugin import MASKED


@dataclass(frozen=True)
class Context:
    """What a layer's attention knows beside its input.

    Args:
        scores: Added to the attention scores, [batch, heads or 1, S or 1, S]: very negative on padding and outside of a
            local window, and a relative bias.
        rotary: Cosine and sine, [S, head size] each, that queries and keys are turned by.
        pairs: Row of the relative embeddings for each pair, int64 [S, S].
    """

    scores: Tensor
    rotary: tuple[Tensor, Tensor] | None = None
    pairs: Tensor | None = None


def masked_scores(mask: Tensor) -> Tensor:
    """mask [batch, S] -> what attention scores get added [batch, 1, 1, S]: 0 on tokens, very negative on padding."""
    return ((1.0 - mask) * MASKED)[:, None, None, :]


def distances(length: int, device: torch.device) -> Tensor:
    """Key minus query: int64 [S, S]."""
    places = torch.arange(length, device=device)
    return places[None, :] - places[:, None]


def local_scores(between: Tensor, window: int) -> Tensor:
    """0 up to `window` positions away on either side, very negative beyond: [S, S]."""
    return (between.abs() > window).to(torch.float32) * MASKED


class RelativeBias(nn.Module):
    """A bias per head and distance, the same in all layers (T5, MPNet).

    Its table has a row for every distance from -`reach` to `reach`; what is farther counts as that far.
    """

    def __init__(self, reach: int, heads: int) -> None:
        super().__init__()
        self.reach = reach
        self.weight = nn.Parameter(torch.empty(2 * reach + 1, heads))

    def forward(self, between: Tensor) -> Tensor:
        """[S, S] distances -> [1, heads, S, S]."""
        rows = between.clamp(-self.reach, self.reach) + self.reach
        return self.weight[rows].permute(2, 0, 1)[None]


class RelativePairs(nn.Module):
    """Which relative embedding a pair of tokens has (DeBERTa): a table of rows by distance, as `RelativeBias`'s."""

    rows: Tensor

    def __init__(self, reach: int) -> None:
        super().__init__()
        self.reach = reach
        self.register_buffer("rows", torch.zeros(2 * reach + 1, dtype=torch.int64))

    def forward(self, between: Tensor) -> Tensor:
        """[S, S] distances -> int64 [S, S]."""
        return self.rows[between.clamp(-self.reach, self.reach) + self.reach]


class Rotary(nn.Module):
    """Rotary position embeddings (Su et al., RoFormer, arXiv 2104.09864), the two halves of a head turned together.

    Args:
        theta: Base of the frequencies.
        length: Positions in the table; the last stands for all beyond, which are padding.
    """

    cosine: Tensor
    sine: Tensor

    def __init__(self, theta: float, head_size: int, length: int) -> None:
        super().__init__()
        frequencies = 1.0 / theta ** (torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
        angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def forward(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosine and sine, [S, head size] each."""
        places = torch.arange(length, device=device).clamp(max=self.cosine.shape[0] - 1)
        return self.cosine[places], self.sine[places]


def turned(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys at their positions: [batch, heads, S, head size] -> the same."""
    cosine, sine = rotary
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine


def log_bucket(distance: int, buckets: int, farthest: int) -> int:
    """T5's bucket of a distance (key minus query): half for either direction; exact near, logarithmic up to `farthest`.

    Raffel et al., arXiv 1910.10683; in fp32, like the code that models were trained with.
    """
    half = buckets // 2
    away, exact = abs(distance), half // 2
    if away < exact:
        bucket = away
    else:
        share = torch.log(torch.tensor(float(away)) / exact) / math.log(farthest / exact)
        bucket = min(exact + int((share * (half - exact)).item()), half - 1)
    return bucket + (half if distance > 0 else 0)


def deberta_row(distance: int, buckets: int, farthest: int) -> int:
    """DeBERTa-v2's row of the relative embeddings for a distance (query minus key).

    He et al., arXiv 2006.03654 and 2111.09543. Args: buckets: On either side; 0 for one row per distance.
    """
    if not buckets:
        return min(max(distance + farthest, 0), 2 * farthest - 1)
    middle, away = buckets // 2, abs(distance)
    place = float(distance)
    if away > middle:
        scale = torch.log(torch.tensor((farthest - 1) / middle))
        logarithm = torch.ceil(torch.log(torch.tensor(float(away)) / middle) / scale * (middle - 1)) + middle
        place = float(logarithm) * (1 if distance > 0 else -1)
    return min(max(int(place) + buckets, 0), 2 * buckets - 1)
