"""What a model is asked, and what it answers: the contract between the runtime, the gate, the tasks and training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Outputs = dict[str, npt.NDArray[np.float32]]
"""A task's outputs by name, one row per input."""

PER_TOKEN = ("last_hidden_state", "start_logits", "end_logits")
"""Outputs that have a value for every token."""

PADDING = {"start_logits": -3.0e4, "end_logits": -3.0e4}
"""What token outputs hold behind a row's end, so that no answer is found there; 0 for others."""


@dataclass(frozen=True)
class Row:
    """One tokenised input: token ids and token types, of one length.

    Args:
        pixels: Of a picture, fp32 [channels, size, size]; its patches then are the ids, all 0.
    """

    ids: Sequence[int]
    types: Sequence[int]
    pixels: npt.NDArray[np.float32] | None = None


Input = str | tuple[str, str] | Sequence[int] | Row | npt.NDArray[np.float32]
"""A text, a pair of texts, token ids, token ids with their types, or a picture [channels, size, size]."""

Encode = Callable[[Sequence[Input]], Outputs]
"""Whatever answers inputs with a task's outputs: PyTorch, an engine, a runtime. Texts beyond its limit are cut."""

Write = Callable[[Sequence[Input]], list[str]]
"""Whatever answers inputs with a text each, of at most `LONGEST_WRITTEN` tokens."""

LONGEST_WRITTEN = 32


def place(
    outputs: Outputs, name: str, values: npt.NDArray[np.float32], indices: Sequence[int], lengths: Sequence[int]
) -> None:
    """Copy a part's values into a whole request's, rows in the order given, token outputs up to each row's length.

    Args:
        outputs: Of the request; filled.
        values: One output of the rows `indices`.
        lengths: Tokens of every row of the request.
    """
    per_token = name in PER_TOKEN
    if name not in outputs:
        shape = (max(lengths), *values.shape[2:]) if per_token else values.shape[1:]
        outputs[name] = np.full((len(lengths), *shape), PADDING.get(name, 0.0), np.float32)
    for row, index in enumerate(indices):
        if per_token:
            outputs[name][index, : lengths[index]] = values[row, : lengths[index]]
        else:
            outputs[name][index] = values[row]


@dataclass(frozen=True)
class Special:
    """Token ids with a meaning of their own, for texts that are generated.

    Args:
        start: What every text begins with; not part of the result.
        ends: Any of these ends a text, and is its last token.
        pad: What shorter ones are filled up with meanwhile.
    """

    start: int
    ends: tuple[int, ...]
    pad: int
