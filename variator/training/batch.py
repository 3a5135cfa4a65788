"""A batch, and what gives batches: the neighbour of every training stage. Called by `training.train`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from variator.toolkit.checkpoint import Backbone
from variator.toolkit.encoder import Encoder
from variator.toolkit.plugin import Compression
from variator.toolkit.rows import Row


@dataclass(frozen=True)
class Batch:
    """Tokenised rows, padded on the right.

    Args:
        ids, mask: int64 [rows, S].
        types: int64 [rows, S] token types, None where all are 0.
        labels: What a task loss needs, by name; empty for plain text.
        pixels: Of pictures, [rows, channels, size, size]; `ids` and `mask` then stand for their patches.
    """

    ids: Tensor
    mask: Tensor
    types: Tensor | None = None
    labels: Mapping[str, Tensor] = field(default_factory=dict)
    pixels: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return int(self.mask.sum())

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        types = None if self.types is None else self.types.to(device)
        labels = {name: value.to(device) for name, value in self.labels.items()}
        pixels = None if self.pixels is None else self.pixels.to(device)
        return Batch(self.ids.to(device), self.mask.to(device), types, labels, pixels)

    def through(
        self, encoder: Encoder, plugin: Compression | None = None, states: list[Tensor] | None = None
    ) -> Tensor:
        """Last hidden states [rows, S, d]; the rest as `Encoder.forward`."""
        if self.pixels is not None:
            return encoder.look(self.pixels, plugin, states)
        hidden: Tensor = encoder(self.ids, self.mask, self.types, plugin, states)
        return hidden


class Data(Protocol):
    """Gives the batch of any index by itself, so that a resumed run sees what an uninterrupted one would have seen."""

    def batch(self, backbone: Backbone, seed: str, index: int, tokens: int) -> Batch:
        """The batch of an index from 0, of at most `tokens` tokens with padding."""
        ...

    def record(self) -> list[dict[str, Any]]:
        """What a plugin's training record says about the data."""
        ...


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows as one int64 tensor [rows, longest], filled up with 0."""
    longest = max(map(len, rows))
    return torch.tensor([list(row) + [0] * (longest - len(row)) for row in rows])


def batch_of(rows: Sequence[Row], token_types: bool, labels: Mapping[str, Tensor] | None = None) -> Batch:
    """Tokenised rows as one batch.

    Args:
        token_types: Whether the model has them in use.
        labels: As in `Batch`.
    """
    mask = padded([[1] * len(row.ids) for row in rows])
    types = padded([row.types for row in rows]) if token_types else None
    return Batch(padded([row.ids for row in rows]), mask, types, labels or {})


def fitting(lengths: Iterable[int], tokens: int) -> int:
    """How many of the first rows, given their lengths, fit a budget of rows x longest row; at least one."""
    longest = count = 0
    for length in lengths:
        longest = max(longest, length)
        if count and longest * (count + 1) > tokens:
            break
        count += 1
    return count
