"""Latency, measured so that it can be trusted: interleaved runs, medians, spread and a verdict."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

Key = TypeVar("Key", bound=Hashable)

SETTLE_S = 0.003
"""Pause before each timed run: other libraries' threads spin for a moment after theirs."""

MAX_SPREAD = 0.25
MAX_DRIFT = 0.08


@dataclass(frozen=True)
class Timing:
    """Distribution of one runner's latency in ms.

    Args:
        spread: (p90 - p10) / p50.
        drift: Difference of the two halves' medians / p50.
    """

    p50_ms: float
    p90_ms: float
    p99_ms: float
    runs: int
    spread: float
    drift: float

    @property
    def stable(self) -> bool:
        """Whether the figure would come out alike tomorrow."""
        return self.spread <= MAX_SPREAD and self.drift <= MAX_DRIFT


def wall_ms(work: Callable[[], object]) -> float:
    """Time that some work takes by the clock on the wall."""
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1e3


def race(
    runners: Mapping[Key, Callable[[], Any]],
    runs: int,
    warmup: int = 2,
    budget_s: float = 60.0,
    on_round: Callable[[int], None] = lambda done: None,
    timed: Callable[[Callable[[], Any]], float] = wall_ms,
) -> dict[Key, Timing]:
    """Time runners in turn, A B C A B C ..., so that a machine's drift meets all of them alike.

    Args:
        runs: Rounds; fewer, but at least 5, once the budget is spent.
        on_round: Called after each round.
        timed: Runs one of them and gives its time in ms.
    """
    for _ in range(warmup):
        for runner in runners.values():
            runner()
    times: dict[Key, list[float]] = {name: [] for name in runners}
    until = time.perf_counter() + budget_s
    for done in range(1, runs + 1):
        for name, runner in runners.items():
            time.sleep(SETTLE_S)
            times[name].append(timed(runner))
        on_round(done)
        if done >= 5 and time.perf_counter() > until:
            break
    return {name: summarise(values) for name, values in times.items()}


def race_twice(
    runners: Mapping[Key, Callable[[], object]], runs: int, budget_s: float = 60.0
) -> tuple[dict[Key, Timing], dict[Key, Timing]]:
    """Time runners in turn, each twice in a row, the order of every round drawn anew; the first round warms up.

    Returns:
        Timings of the first runs and of the second ones. The second finds everything as its own kind left it; the
        difference is what it costs to take over from another runner.
    """
    times: dict[Key, tuple[list[float], list[float]]] = {name: ([], []) for name in runners}
    rng, names = np.random.default_rng(0), list(runners)
    until = time.perf_counter() + budget_s
    for done in range(runs + 1):
        for index in rng.permutation(len(names)):
            for position in range(2):
                time.sleep(SETTLE_S)
                elapsed = wall_ms(runners[names[index]])
                if done:
                    times[names[index]][position].append(elapsed)
        if done >= 5 and time.perf_counter() > until:
            break
    first, second = ({name: summarise(values[i]) for name, values in times.items()} for i in range(2))
    return first, second


def summarise(times: list[float]) -> Timing:
    """Percentiles, spread and drift of latencies in ms, in the order they were measured."""
    p10, p50, p90, p99 = (float(value) for value in np.percentile(times, (10, 50, 90, 99)))
    half = len(times) // 2
    drift = abs(float(np.median(times[:half])) - float(np.median(times[half:]))) / p50 if half else 1.0
    return Timing(p50, p90, p99, len(times), (p90 - p10) / p50, drift)
