"""How long a run takes here: measured per ratio, rows and length, kept beside the engine, asked by policies.

`calibrate` measures; `LatencyTable` smooths and interpolates. A table belongs to one engine on one machine and says so.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from variator import machine
from variator.engines.backends import BACKENDS
from variator.engines.built import LATENCY_FILE, BuiltEngine
from variator.engines.profiles import Shape, hold
from variator.errors import EngineError
from variator.exporters.gate import full_feed
from variator.files import write_atomically
from variator.toolkit.plugin_format import Key

if TYPE_CHECKING:
    from variator.engines.runtime import Runtime

SCHEMA = "variator.latency/1"
BATCHES = (1, 2, 4, 8, 16, 32)
LENGTHS = (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
MAX_ROWS = 64
"""Most rows that a table is asked about."""

LONG_MS = 250.0
"""A length's rows are not doubled any more when a run takes longer than this."""

POINT_MS, LEAST_RUNS = 400.0, 5
"""A shape is not measured again after this time, but at least so often."""


@dataclass(frozen=True)
class Point:
    """One measured shape; ms."""

    ratio: Key
    batch: int
    length: int
    p50_ms: float
    p95_ms: float
    runs: int


@dataclass(frozen=True)
class LatencyTable:
    """Latency of one engine on one machine, for any rows and length.

    Noise is smoothed away first: more rows or longer ones never take less time. Of all values at shapes that are not
    larger the largest, of all at shapes that are not smaller the smallest, and the mean of both; a table that is
    monotone already stays as it is. Between measured points it is linear, in rows and in tokens; beyond the most rows
    it goes on with the cost of a row there, beyond the longest with the cost of a token.

    Args:
        engine, precision, key: Of the engine that was measured.
        machine: What the figures depend on: processor or GPU, cores, threads.
        points: As measured. All ratios have the same shapes.
    """

    engine: str
    precision: str
    key: str
    machine: Mapping[str, str]
    points: tuple[Point, ...]
    date: str = ""
    schema: str = SCHEMA
    _lines: dict[tuple[Key, int], list[float]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.points:
            raise EngineError("the latency table holds no point", fix="variator bench BUNDLE --calibrate")
        for point in self.points:
            times = (point.p50_ms, point.p95_ms)
            if not all(math.isfinite(one) and one > 0 for one in times) or point.batch < 1 or point.length < 1:
                raise EngineError(f"the latency table holds {point}", valid="positive times and sizes")
        if 1 not in self.ratios:
            raise EngineError("the latency table has no ratio 1", fix="variator bench BUNDLE --calibrate")

    @cached_property
    def ratios(self) -> tuple[Key, ...]:
        """Slowest first: 1, then whatever is faster at the largest shape that all have."""
        found = list(dict.fromkeys(point.ratio for point in self.points))
        common = set.intersection(*({(p.batch, p.length) for p in self.points if p.ratio == ratio} for ratio in found))
        if not common:
            raise EngineError("the ratios of the latency table have no shape in common", valid="the same for all")
        largest = max(common, key=lambda shape: (shape[0] * shape[1], shape))
        at = {p.ratio: p.p50_ms for p in self.points if (p.batch, p.length) == largest}
        return tuple(sorted(found, key=lambda ratio: (ratio != 1, -at[ratio])))

    @cached_property
    def _grids(self) -> dict[Key, tuple[list[int], list[int], npt.NDArray[np.float64]]]:
        """By ratio: measured rows, lengths, and smoothed medians; shapes that were not measured go on from the last."""
        return {ratio: _grid([point for point in self.points if point.ratio == ratio]) for ratio in self.ratios}

    def line(self, ratio: Key, length: int) -> list[float]:
        """ms of 0, 1, 2 … `MAX_ROWS` rows of `length` tokens; for 0 it is 0."""
        if (ratio, length) not in self._lines:
            batches, lengths, values = self._grids[ratio]
            column = [_between(length, lengths, row) for row in values]
            self._lines[ratio, length] = [0.0, *(_between(rows, batches, column) for rows in range(1, MAX_ROWS + 1))]
        return self._lines[ratio, length]

    def ms(self, ratio: Key, rows: int, length: int) -> float:
        """Median latency of a run.

        Raises:
            KeyError: For a ratio that was not measured.
        """
        return of_rows(self.line(ratio, length), rows)

    def spread(self) -> float:
        """Typical p95 over p50."""
        return float(np.median([point.p95_ms / point.p50_ms for point in self.points]))

    def to_json(self) -> str:
        """As it is kept."""
        data = {name: value for name, value in asdict(self).items() if not name.startswith("_")}
        return json.dumps(data, indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> LatencyTable:
        """Read one back.

        Raises:
            EngineError: If it is none, or holds times that cannot be.
        """
        try:
            data = json.loads(text)
            if data.pop("schema") != SCHEMA:
                raise EngineError("a latency table of another schema", valid=SCHEMA)
            points = tuple(Point(**point) for point in data.pop("points"))
            data["machine"] = {str(name): str(value) for name, value in data["machine"].items()}
            return LatencyTable(points=points, **data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EngineError(f"not a latency table: {error}", fix="variator bench BUNDLE --calibrate") from error


def of_rows(line: Sequence[float], rows: int) -> float:
    """ms of a number of rows, from those of 0 to `MAX_ROWS`; beyond in proportion."""
    return line[rows] if rows <= MAX_ROWS else line[MAX_ROWS] / MAX_ROWS * rows


def _grid(points: Sequence[Point]) -> tuple[list[int], list[int], npt.NDArray[np.float64]]:
    batches, lengths = sorted({point.batch for point in points}), sorted({point.length for point in points})
    values = np.full((len(batches), len(lengths)), np.nan)
    for point in points:
        values[batches.index(point.batch), lengths.index(point.length)] = point.p50_ms
    for row in range(len(batches)):  # where runs became too long to measure: in proportion to the rows
        for column in np.flatnonzero(np.isnan(values[row])):
            known = values[:row, column][~np.isnan(values[:row, column])]
            if not len(known):
                raise EngineError(
                    f"the latency table misses {batches[row]} x {lengths[column]}",
                    valid="all lengths for the smallest number of rows",
                    fix="variator bench BUNDLE --calibrate",
                )
            values[row, column] = values[row - 1, column] * batches[row] / batches[row - 1]
    below = np.maximum.accumulate(np.maximum.accumulate(values, 0), 1)
    above = np.minimum.accumulate(np.minimum.accumulate(values[::-1, ::-1], 0), 1)[::-1, ::-1]
    return batches, lengths, (below + above) / 2


def _between(at: float, places: Sequence[int], values: Sequence[float]) -> float:
    """Linear between places; before the first its value, after the last in proportion."""
    if at > places[-1]:
        return float(values[-1] * at / places[-1])
    return float(np.interp(at, places, values))


def fingerprint(built: BuiltEngine, threads: int) -> dict[str, str]:
    """What figures depend on beside the engine."""
    return {
        "device": BACKENDS[built.record.backend].device(),
        "cpu": machine.cpu_name(),
        "cores": str(machine.cores()),
        "threads": str(threads),
    }


def calibrate(
    runtime: Runtime,
    runs: int = 9,
    batches: Sequence[int] = BATCHES,
    lengths: Sequence[int] = LENGTHS,
    on_progress: Callable[[str, float], None] = lambda what, share: None,
) -> LatencyTable:
    """Measure all ratios at all shapes, and keep the table beside the engine.

    Shapes follow one another in changing order, as they do in service: some libraries prepare anew for every shape
    that is not the last one's, and that is part of what a run takes.
    """
    limit, manifest = runtime.bundle.manifest.max_length, runtime.bundle.manifest
    times: dict[tuple[int, int], dict[Key, list[float]]] = {}

    def measure(shape: tuple[int, int]) -> dict[Key, float]:
        feed = full_feed(manifest, shape)
        return {ratio: runtime.timed_run(ratio, feed) for ratio in runtime.bundle.ratios}

    engines = [runtime.load(ratio) for ratio in runtime.bundle.ratios]
    for length in [limit] if manifest.picture else sorted({min(length, limit) for length in lengths}):
        for batch in batches:
            if not all(hold(engine.profiles, Shape(batch, length)) for engine in engines):
                continue
            on_progress(f"latency at {batch} x {length}", 0.0)
            first = measure((batch, length))  # finds nothing ready: does not count
            times[batch, length] = {ratio: [] for ratio in first}
            if max(first.values()) > LONG_MS:
                break
    rng = np.random.default_rng(0)
    for turn in range(runs):
        shapes = list(times)
        for done, index in enumerate(rng.permutation(len(shapes))):
            found = times[shapes[index]]
            spent = sum(map(sum, found.values()))
            if turn < LEAST_RUNS or spent < POINT_MS:
                on_progress("latency", (turn + done / len(shapes)) / runs)
                for ratio, elapsed in measure(shapes[index]).items():
                    found[ratio].append(elapsed)
    points = []
    for (batch, length), by_ratio in times.items():
        for ratio, values in by_ratio.items():
            p50, p95 = (round(float(value), 4) for value in np.percentile(values, (50, 95)))
            points.append(Point(ratio, batch, length, p50, p95, len(values)))
    record = runtime.built.record
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    measured_on = fingerprint(runtime.built, runtime.threads)
    table = LatencyTable(record.backend, record.precision, record.key, measured_on, tuple(points), date)
    write_atomically(runtime.built.directory / LATENCY_FILE, table.to_json())
    return table


def load_table(built: BuiltEngine, threads: int) -> LatencyTable:
    """The table of a built engine.

    Raises:
        EngineError: If there is none, it is damaged, or it was measured with another engine, machine or threads.
    """
    path, record = built.directory / LATENCY_FILE, built.record
    command = (
        f"variator bench {built.directory.parent.parent} --calibrate --engine {record.backend} "
        f"--precision {record.precision}"
    )
    try:
        table = LatencyTable.from_json(path.read_bytes().decode("utf-8", "replace"))
    except OSError:
        raise EngineError(f"no latency was measured for {built.directory}", fix=command) from None
    except EngineError as error:
        raise EngineError(f"{path}: {error.what}", valid=error.valid, fix=command) from error
    here = fingerprint(built, threads)
    if table.key != record.key:
        raise EngineError(f"{path} was measured with another engine ({table.key})", fix=command)
    differing = [name for name in here if table.machine.get(name) != here[name]]
    if differing:
        name = differing[0]
        raise EngineError(
            f"{path} was measured with {name} {table.machine.get(name)!r}, here it is {here[name]!r}", fix=command
        )
    return table


def calibrated(
    bundle: Path | str,
    built: BuiltEngine,
    threads: int = 0,
    on_progress: Callable[[str, float], None] = lambda what, share: None,
    again: bool = False,
) -> LatencyTable:
    """The table of a built engine, measured now if there is none that fits (or `again`)."""
    from variator.engines.runtime import Runtime

    with Runtime.open(bundle, built.record.backend, built.record.precision, threads) as runtime:
        if not again:
            with contextlib.suppress(EngineError):
                return load_table(runtime.built, runtime.threads)
        return calibrate(runtime, on_progress=on_progress)
