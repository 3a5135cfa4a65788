"""What a Triton request means to the runtime, and which of Triton's error codes an error of ours is. Knows no Triton.

`serving.triton_model` hands in arrays and parameters as they came over the wire; nothing in them is believed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from variator.engines.runtime import AUTO
from variator.errors import DeadlineExceeded, InputError, Overloaded, VariatorError
from variator.toolkit.plugin_format import Key, parse_key
from variator.toolkit.rows import Input, Row

TEXT, PAIR = "text", "text_pair"
IDS, MASK, TYPES = "input_ids", "attention_mask", "token_type_ids"
INPUTS = (TEXT, PAIR, IDS, MASK, TYPES)
RATIO = "ratio"
"""The output that says which ratio served a row, and the parameter that asks for one."""

PARAMETERS = (RATIO, "slo_ms", "min_ratio", "max_ratio", "min_quality", "truncate")
Tensors = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Asked:
    """What a request's parameters ask for.

    Args:
        slo_ms: None where neither a parameter nor Triton's own timeout says one.
        bounds: `min_ratio`, `max_ratio`, `min_quality`, as `Server.submit` takes them.
    """

    ratio: Key
    slo_ms: float | None
    truncate: bool
    bounds: Mapping[str, Any]


def error_code(error: VariatorError) -> str:
    """Name of Triton's code: `INVALID_ARG` is HTTP 400, `UNAVAILABLE` 503, `INTERNAL` 500."""
    if isinstance(error, InputError):
        return "INVALID_ARG"
    return "UNAVAILABLE" if isinstance(error, DeadlineExceeded | Overloaded) else "INTERNAL"


def read_parameters(text: str, timeout_us: int, default_ratio: Key, ratios: Sequence[Key]) -> Asked:
    """Read a request's parameters.

    Args:
        text: JSON, as Triton gives it.
        timeout_us: Triton's own `timeout` of the request, µs; 0 for none.
        ratios: That are served.

    Raises:
        InputError: For a parameter that there is not, or a value that it cannot have.
    """
    given: dict[str, Any] = json.loads(text) if text else {}
    unknown = [name for name in given if name not in PARAMETERS]
    if unknown:
        raise InputError(f"no parameter {unknown[0]!r}", valid=", ".join(PARAMETERS))
    ratio = _ratio(given.get(RATIO, default_ratio), RATIO, [AUTO, *ratios])
    bounds: dict[str, Any] = {}
    for name in ("min_ratio", "max_ratio"):
        if name in given:
            bounds[name] = _ratio(given[name], name, ratios)
    if "min_quality" in given:
        bounds["min_quality"] = _number(given["min_quality"], "min_quality")
    if bounds and ratio != AUTO:
        raise InputError(f"{next(iter(bounds))} with ratio {ratio!r}", valid=f"it with ratio {AUTO!r}")
    slo_ms = _number(given["slo_ms"], "slo_ms") if "slo_ms" in given else timeout_us / 1e3 or None
    return Asked(ratio, slo_ms, _flag(given.get("truncate", False)), bounds)


def _ratio(value: Any, what: str, ratios: Sequence[Key]) -> Key:
    valid = ", ".join(map(str, ratios))
    if isinstance(value, str | int) and not isinstance(value, bool):
        try:
            key = parse_key(value)
        except InputError:
            key = ""
        if key in ratios:
            return key
    raise InputError(f"{what} {value!r}", valid=valid)


def _number(value: Any, what: str) -> float:
    """Protocols differ in which numbers they can send; as text all of them can."""
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        raise InputError(f"{what} is {value!r}", valid="a number, or one as text") from None


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"truncate is {value!r}", valid="true or false")
    return value


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
