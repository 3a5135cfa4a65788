"""Times on a GPU without what leads there: tensors stay on the device, CUDA's events tell the time.

For engines that take device tensors, and for peers that can do the like. Called by `bench.run`, after the times from
host memory to host memory.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from variator.bench.latency import Timing, race
from variator.bench.record import DeviceResult
from variator.engines.base import DeviceEngine, Feed
from variator.engines.cuda import Buffer, Stream
from variator.engines.device import DeviceArray
from variator.toolkit.plugin_format import Key

Prepare = Callable[[Feed], Callable[[], float]]
"""Takes a feed to the device; what it gives runs there once and returns the time in ms."""

LATENCY_BATCH = 1
"""Rows of the requests for which it is measured what captured graphs gain."""


@dataclass(frozen=True)
class Resident:
    """One row: something that runs what lies on the device.

    Args:
        plain: The same without captured graphs, where it has them.
    """

    engine: str
    precision: str
    ratio: Key
    run: Prepare
    plain: Prepare | None = None


def resident(name: str, ratio: Key, engine: DeviceEngine, precision: str) -> Resident:
    """An engine's row."""

    def prepare(feed: Feed, captured: bool = True) -> Callable[[], float]:
        tensors = upload(feed)
        return lambda: engine.run_on_device(tensors, captured).device_ms

    plain = (lambda feed: prepare(feed, False)) if engine.captures else None
    return Resident(name, precision, ratio, prepare, plain)


def upload(feed: Feed) -> dict[str, DeviceArray]:
    """Arrays on the device."""
    stream, found = Stream(), {}
    try:
        for name, array in feed.items():
            whole, buffer = np.ascontiguousarray(array), _Owned()
            buffer.ensure(whole.nbytes, name)
            stream.to_device(buffer.address, whole.ctypes.data, whole.nbytes)
            stream.wait()
            found[name] = DeviceArray(buffer.address, whole.shape, whole.dtype, buffer)
    finally:
        stream.close()
    return found


class _Owned(Buffer):
    """A buffer that goes with its last reference."""

    def __del__(self) -> None:
        self.close()


def measure(rows: Sequence[Resident], feed: Feed, runs: int, budget_s: float) -> list[DeviceResult]:
    """Time rows in turn at one shape; for one row of a request also without captured graphs."""
    batch, length = next(iter(feed.values())).shape
    prepared = {index: row.run(feed) for index, row in enumerate(rows)}
    timings = race(prepared, runs, warmup=4, budget_s=budget_s, timed=lambda run: run())
    clock = clock_mhz()
    plain: Mapping[int, Timing] = {}
    if batch == LATENCY_BATCH:
        without = {index: row.plain(feed) for index, row in enumerate(rows) if row.plain is not None}
        plain = race(without, runs, warmup=4, budget_s=budget_s, timed=lambda run: run()) if without else {}
    first = {(row.engine, row.precision): timings[index] for index, row in enumerate(rows) if row.ratio == 1}
    return [
        DeviceResult(
            row.engine,
            row.precision,
            row.ratio,
            batch,
            length,
            round(timings[index].p50_ms, 4),
            round(plain[index].p50_ms, 4) if index in plain else None,
            round(first[row.engine, row.precision].p50_ms / timings[index].p50_ms, 3),
            timings[index].runs,
            round(timings[index].spread, 3),
            timings[index].stable,
            clock,
        )
        for index, row in enumerate(rows)
    ]


def clock_mhz() -> int | None:
    """The GPU's clock now, as its driver tells; None where that cannot be asked."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=clocks.sm", "--format=csv,noheader,nounits", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    told = done.stdout.strip()
    return int(told) if done.returncode == 0 and told.isdigit() else None
