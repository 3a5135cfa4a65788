"""Requests as they come: times and lengths, from a process or from a trace of real ones. Times are in seconds."""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from variator.errors import InputError

STEP_FACTOR, STEP_S = 3.0, 10.0
"""`step`: how many times the load, and how long."""

TIME_COLUMNS = ("timestamp", "time", "arrival", "arrival_s")
LENGTH_COLUMNS = ("contexttokens", "tokens", "length", "input_tokens")


@dataclass(frozen=True)
class Arrivals:
    """One workload.

    Args:
        name: Of the process or the trace.
        times: When each request arrives, seconds from the start, ascending.
        lengths: Tokens of each, where the trace says so.
        step: Start and end of the burst of a `step`, seconds.
    """

    name: str
    times: npt.NDArray[np.float64]
    lengths: npt.NDArray[np.int64] | None = None
    step: tuple[float, float] | None = None

    @property
    def rate(self) -> float:
        """Requests per second, on average."""
        return len(self.times) / max(float(self.times[-1]), 1e-9)

    @property
    def peak(self) -> float:
        """Most requests in a second, over the average."""
        per_second = np.bincount(self.times.astype(np.int64))
        return float(per_second.max() / max(per_second.mean(), 1e-9))


def arrivals(kind: str, rate: float, seconds: float, seed: int = 0) -> Arrivals:
    """A workload.

    Args:
        kind: `poisson`, `gamma:<CV²>` (`gamma` is CV² 4), `step` (Poisson, `STEP_FACTOR` times the rate for `STEP_S`
            seconds from a third of the time on), or a CSV file of time stamps, which is rescaled to the rate.
        rate: Requests per second; of a `step`, outside of it.
        seconds: How long.

    Raises:
        InputError: For an unknown kind, a rate or time that is not positive, or a bad file, with the line.
    """
    for what, value in (("rate", rate), ("duration", seconds)):
        if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
            raise InputError(f"a {what} of {value!r}", valid="a positive number")
    rng = np.random.default_rng(seed)
    if kind == "poisson":
        return Arrivals(kind, _renewal(rng, 1.0, rate, seconds))
    if kind == "gamma" or kind.startswith("gamma:"):
        return Arrivals(kind, _renewal(rng, _number(kind), rate, seconds))
    if kind == "step":
        start = seconds / 3
        end = min(seconds, start + STEP_S)
        calm, burst = _renewal(rng, 1.0, rate, seconds), _renewal(rng, 1.0, rate * (STEP_FACTOR - 1), end - start)
        return Arrivals(kind, np.sort(np.concatenate([calm, start + burst])), step=(start, end))
    path = Path(kind)
    if not path.suffixes:
        raise InputError(
            f"no arrivals {kind!r}", valid="poisson, gamma, gamma:16, step, or a CSV file with time stamps"
        )
    return _rescaled(read_trace(path), rate, seconds)


def _number(kind: str) -> float:
    text = kind.partition(":")[2] or "4"
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1000:
        raise InputError(f"gamma with a squared coefficient of variation of {text!r}", valid="gamma:4, more than 0")
    return value


def _renewal(
    rng: np.random.Generator, squared_variation: float, rate: float, seconds: float
) -> npt.NDArray[np.float64]:
    """Times with gamma distributed gaps; a variation of 1 is Poisson's process."""
    found = np.zeros(0)
    shape = 1 / squared_variation
    while not len(found) or found[-1] < seconds:
        gaps = rng.gamma(shape, 1 / (rate * shape), size=max(64, int(rate * seconds * 1.2)))
        found = np.concatenate([found, (found[-1] if len(found) else 0.0) + np.cumsum(gaps)])
    found = found[found < seconds]
    if not len(found):
        raise InputError(f"nothing arrives in {seconds} s at {rate} per second", valid="at least one request")
    return found


def read_trace(path: Path) -> Arrivals:
    """A CSV file, also .gz, with a header: time stamps (seconds, or dates) and, where it has them, tokens.

    Raises:
        InputError: With the line, for what is no time or goes back.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the trace {path}: {error}", valid="a CSV file, also .gz") from error
    reader = csv.DictReader(io.StringIO(text))
    names = {name.strip().lower(): name for name in reader.fieldnames or ()}
    column = next((names[name] for name in TIME_COLUMNS if name in names), None)
    if column is None:
        raise InputError(
            f"{path}: no column of times in {', '.join(names) or 'an empty header'}", valid=", ".join(TIME_COLUMNS)
        )
    tokens = next((names[name] for name in LENGTH_COLUMNS if name in names), None)
    times: list[float] = []
    lengths: list[int] = []
    for row in reader:
        place = f"{path}, line {reader.line_num}"
        time = _time(row.get(column), place)
        if times and time < times[-1]:
            raise InputError(f"{place}: time goes back", valid="time stamps in order")
        times.append(time)
        if tokens is not None:
            value = row.get(tokens) or ""
            if not value.strip().isdigit():
                raise InputError(f"{place}: {value!r} tokens", valid="a whole number")
            lengths.append(int(value))
    if len(times) < 2 or times[-1] == times[0]:
        raise InputError(f"{path} holds {len(times)} requests at one time", valid="at least two, at different times")
    stamps = np.array(times) - times[0]
    return Arrivals(path.name, stamps, np.array(lengths, np.int64) if tokens is not None else None)


def _time(text: str | None, place: str) -> float:
    """Seconds."""
    value = (text or "").strip()
    try:
        found = float(value)
    except ValueError:
        try:  # Python reads six digits behind the second
            whole, _, fraction = value.partition(".")
            moment = datetime.datetime.fromisoformat(whole).replace(tzinfo=datetime.UTC)
            found = moment.timestamp() + (float(f"0.{fraction}") if fraction else 0.0)
        except ValueError:
            raise InputError(f"{place}: {value!r} is no time", valid="seconds, or 2023-11-16 18:15:46.68") from None
    if not math.isfinite(found):
        raise InputError(f"{place}: {value!r} is no time", valid="a finite number of seconds")
    return found


def _rescaled(trace: Arrivals, rate: float, seconds: float) -> Arrivals:
    """The beginning of a trace at another pace: its first `rate * seconds` requests in about that time."""
    count = min(len(trace.times), max(2, round(rate * seconds)))
    times = trace.times[:count]
    pace = (count - 1) / rate / max(float(times[-1]), 1e-9)
    lengths = trace.lengths[:count] if trace.lengths is not None else None
    return Arrivals(trace.name, times * pace, lengths)


def lengths_like(lengths: npt.NDArray[np.int64], count: int, limit: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """As many lengths, drawn from real ones, no longer than the model's limit."""
    if not len(lengths):
        raise InputError("there are no lengths to draw from", valid="at least one text")
    drawn: npt.NDArray[np.int64] = lengths[np.random.default_rng(seed).integers(0, len(lengths), count)]
    return np.minimum(drawn, limit)
