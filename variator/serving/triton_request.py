"""What a Triton request means to the runtime, and which of Triton's error codes an error of ours is. Knows no Triton.

`serving.triton_model` hands in arrays and parameters as they came over the wire; nothing in them is believed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from variator.engines.runtime import AUTO
from variator.errors import DeadlineExceeded, InputError, Overloaded, VariatorError
from variator.serving.asked import FIELDS, Asked, asked_from
from variator.toolkit.plugin_format import Key
from variator.toolkit.rows import Input, Row

TEXT, PAIR = "text", "text_pair"
IDS, MASK, TYPES = "input_ids", "attention_mask", "token_type_ids"
RATIO = "ratio"
"""The output that says which ratio served a row."""

Tensors = Mapping[str, npt.NDArray[Any]]


def error_code(error: VariatorError) -> str:
    """Name of Triton's code: `INVALID_ARG` is HTTP 400, `UNAVAILABLE` 503, `INTERNAL` 500."""
    if isinstance(error, InputError):
        return "INVALID_ARG"
    return "UNAVAILABLE" if isinstance(error, DeadlineExceeded | Overloaded) else "INTERNAL"


def read_parameters(text: str, timeout_us: int = 0, ratio: Key = AUTO, patience_ms: float | None = None) -> Asked:
    """Read a request's parameters.

    Args:
        text: JSON, as Triton gives it.
        timeout_us: Triton's own `timeout` of the request, µs; 0 for none.
        ratio: Of a request that names none.
        patience_ms: Of a request with a fixed ratio that names no time: it wants an answer, not a fast one.

    Raises:
        InputError: For a parameter that there is not, or a value that it cannot have.
    """
    given: dict[str, Any] = json.loads(text) if text else {}
    unknown = [name for name in given if name not in FIELDS]
    if unknown:
        raise InputError(f"no parameter {unknown[0]!r}", valid=", ".join(FIELDS))
    asked = asked_from(given, Asked(ratio, timeout_us / 1e3 or None))
    return replace(asked, slo_ms=patience_ms) if asked.slo_ms is None and asked.ratio != AUTO else asked


def read_inputs(tensors: Tensors) -> list[Input]:
    """The inputs of a request: texts, pairs of texts, or rows of token ids.

    Raises:
        InputError: Unless there are either texts or token ids, the texts are UTF-8, and a mask is that of padding on
            the right.
    """
    if (TEXT in tensors) == (IDS in tensors):
        raise InputError(
            "the request has both texts and token ids" if TEXT in tensors else "the request has no texts and no ids",
            valid=f"either {TEXT} or {IDS}",
        )
    beside = (MASK, TYPES) if TEXT in tensors else (PAIR,)
    foreign = [name for name in beside if name in tensors]
    if foreign:
        raise InputError(f"{foreign[0]} goes not with {TEXT if TEXT in tensors else IDS}", fix="leave it out")
    return _texts(tensors) if TEXT in tensors else _rows(tensors)


def _texts(tensors: Tensors) -> list[Input]:
    texts = [_text(value, f"{TEXT} {index}") for index, value in enumerate(tensors[TEXT].ravel())]
    if PAIR not in tensors:
        return [*texts]
    pairs = [_text(value, f"{PAIR} {index}") for index, value in enumerate(tensors[PAIR].ravel())]
    if len(texts) != len(pairs):
        raise InputError(f"{len(texts)} texts with {len(pairs)} second ones", valid="as many")
    return list(zip(texts, pairs, strict=True))


def _text(value: bytes | str, what: str) -> str:
    if isinstance(value, str):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{what} is not UTF-8: {error.reason} at byte {error.start}", valid="UTF-8") from None


def _rows(tensors: Tensors) -> list[Input]:
    ids = tensors[IDS]
    for name in (MASK, TYPES):
        if name in tensors and tensors[name].shape != ids.shape:
            raise InputError(f"{name} is {tensors[name].shape}, {IDS} are {ids.shape}", valid="the same shape")
    mask = tensors.get(MASK)
    lengths = np.full(len(ids), ids.shape[1]) if mask is None else _lengths(mask)
    types = tensors.get(TYPES, np.zeros_like(ids))
    rows: list[Input] = []
    for one, kinds, length in zip(ids.tolist(), types.tolist(), lengths.tolist(), strict=True):
        rows.append(Row(one[:length], kinds[:length]))
    return rows


def _lengths(mask: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Tokens of each row."""
    lengths = mask.sum(1)
    if not np.array_equal(mask, np.arange(mask.shape[1]) < lengths[:, None]):
        raise InputError(f"{MASK} is not that of rows padded on the right", valid="ones, then zeros, in every row")
    return np.asarray(lengths, np.int64)
