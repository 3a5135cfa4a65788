"""The record of a replay, schema `variator.replay/1`: how one workload was served, policy by policy.

Written by `bench.replay`, printed by `bench.replay_report`. Latencies are in ms, times in seconds.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from variator.bench.arrivals import Arrivals
from variator.bench.record import Machine, Model
from variator.bench.simulate import DROPPED, FAILED, LATE, REFUSED, SERVED, UNKNOWN, Outcomes
from variator.errors import InputError
from variator.toolkit.plugin_format import Key

SCHEMA = "variator.replay/1"
STEADY = 10
"""Batches at ratio 1 in a row, from which on a replay is back there."""

Z95 = 1.959964
"""Of the normal distribution, two-sided 95 %."""


@dataclass(frozen=True)
class Workload:
    """What was sent.

    Args:
        kind: `poisson`, `gamma:16`, `step` or the trace's name.
        load: The average rate over what ratio 1 alone can serve in full batches, by the latency table.
        peak: Most requests in a second, over the average.
    """

    kind: str
    rate: float
    load: float
    seconds: float
    requests: int
    peak: float
    mean_tokens: float
    longest_tokens: int
    seed: int
    step: tuple[float, float] | None = None


@dataclass(frozen=True)
class Served:
    """How one policy served it.

    Args:
        source: `replay`, or `simulation` on the virtual clock.
        attainment: Share of all requests that were answered in time, with its 95 % interval (Wilson's, as if requests
            did not depend on one another; in bursts they do, and it is too narrow).
        p50_ms …: Of all that were answered, from the scheduled arrival; late ones, too.
        quality: Mean of what was answered in time, relative to ratio 1; None if it is not known for a ratio.
        mix: Share of what was answered in time by ratio.
        switches: Changes of the ratio from batch to batch.
        back_s: From the end of a step until ratio 1 is steady again; None without a step, or if it never is.
        pace: What runs took, answers included, over what the latency table says; mean of the seconds.
        padding: Share of the computed tokens that were padding.
        sent_late_ms: p99 of how much later than scheduled requests were really sent; 0 in a simulation.
        memory_bytes: Of the process, after less before.
        by_second: Arrivals, p99 latency (ms, or None) and share of each ratio's answers, second by second.
        rounds: Attainment and quality of all its runs, of which this is the median one; empty if it is the only one.
    """

    policy: str
    source: str
    replicas: int
    attainment: float
    interval: tuple[float, float]
    p50_ms: float
    p95_ms: float
    p99_ms: float
    p999_ms: float
    quality: float | None
    mix: dict[str, float]
    late: int
    dropped: int
    refused: int
    failed: int
    switches: int
    back_s: float | None
    pace: float
    padding: float
    sent_late_ms: float
    memory_bytes: int
    by_second: list[dict[str, Any]]
    rounds: list[tuple[float, float | None]] = field(default_factory=list)


@dataclass(frozen=True)
class ReplayRecord:
    """One workload."""

    machine: Machine
    model: Model
    command: str
    versions: dict[str, str]
    engine: str
    precision: str
    slo_ms: float
    table_date: str
    relative_quality: dict[str, float]
    workload: Workload
    served: list[Served]
    notes: list[str] = field(default_factory=list)
    schema: str = SCHEMA

    def to_json(self) -> str:
        """As it is kept."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> ReplayRecord:
        """Read one back.

        Raises:
            InputError: If the text is none.
        """
        try:
            data = json.loads(text)
            if data.pop("schema") != SCHEMA:
                raise InputError("a record of another schema", valid=SCHEMA)
            step = data["workload"].pop("step")
            data["workload"] = Workload(**data["workload"], step=tuple(step) if step else None)
            for row in data["served"]:
                row["interval"] = tuple(row["interval"])
                row["rounds"] = [(attained, quality) for attained, quality in row.get("rounds", [])]
            data["served"] = [Served(**row) for row in data["served"]]
            return ReplayRecord(**{**data, "machine": Machine(**data["machine"]), "model": Model(**data["model"])})
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"not a replay's record: {error}", valid=f"JSON of schema {SCHEMA}") from error


def wilson(hits: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927)."""
    if not count:
        return 0.0, 1.0
    share, z2 = hits / count, Z95 * Z95
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count)) / (1 + z2 / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def summarise(
    outcomes: Outcomes,
    load: Arrivals,
    ratios: Sequence[Key],
    quality: Mapping[Key, float],
    *,
    policy: str,
    source: str,
    replicas: int = 1,
    sent_late_ms: float = 0.0,
    memory_bytes: int = 0,
) -> Served:
    """What there is to say about the outcomes of one policy."""
    found, level = outcomes.outcome, outcomes.level
    good, answered = found == SERVED, (found == SERVED) | (found == LATE)
    count, hits = len(found), int(good.sum())
    mix = {
        str(ratio): round(float((level[good] == index).mean()) if hits else 0.0, 5)
        for index, ratio in enumerate(ratios)
    }
    known = all(ratio in quality for ratio in ratios)
    mean = sum(mix[str(ratio)] * quality[ratio] for ratio in ratios) if known and hits else None
    latencies = outcomes.latency_ms[answered]
    marks = np.percentile(latencies, (50, 95, 99, 99.9)) if len(latencies) else np.zeros(4)
    p50, p95, p99, p999 = (round(float(mark), 3) for mark in marks)
    chosen = [level for _, level in outcomes.decisions]
    low, high = wilson(hits, count)
    return Served(
        policy,
        source,
        replicas,
        round(hits / count, 6),
        (round(low, 6), round(high, 6)),
        p50,
        p95,
        p99,
        p999,
        None if mean is None else round(mean, 5),
        mix,
        int((found == LATE).sum()),
        int((found == DROPPED).sum()),
        int((found == REFUSED).sum()),
        int(((found == FAILED) | (found == UNKNOWN)).sum()),
        sum(a != b for a, b in itertools.pairwise(chosen)),
        _back(outcomes.decisions, load.step),
        round(float(np.mean(paces)), 4) if (paces := outcomes.paces()) else 1.0,
        round(1 - outcomes.tokens / outcomes.padded, 4) if outcomes.padded else 0.0,
        round(sent_late_ms, 3),
        memory_bytes,
        _by_second(outcomes, ratios),
    )


def _back(decisions: Sequence[tuple[float, int]], step: tuple[float, float] | None) -> float | None:
    """Seconds from a step's end until `STEADY` batches in a row run at ratio 1."""
    if step is None:
        return None
    after = [(when, level) for when, level in decisions if when >= step[1]]
    run: list[float] = []
    for when, level in after:
        run = [*run, when] if level == 0 else []
        if len(run) == STEADY:
            return round(run[0] - step[1], 4)
    return None


def _by_second(outcomes: Outcomes, ratios: Sequence[Key]) -> list[dict[str, Any]]:
    second = outcomes.arrival_s.astype(np.int64)
    answered = outcomes.level >= 0
    rows = []
    for index in range(int(second.max()) + 1):
        here = second == index
        served = outcomes.level[here & answered]
        latencies = outcomes.latency_ms[here & answered]
        rows.append(
            {
                "second": index,
                "arrivals": int(here.sum()),
                "in_time": int((outcomes.outcome[here] == SERVED).sum()),
                "p99_ms": round(float(np.percentile(latencies, 99)), 2) if len(latencies) else None,
                "mix": {
                    str(ratio): round(float((served == level).mean()), 4) if len(served) else 0.0
                    for level, ratio in enumerate(ratios)
                },
            }
        )
    return rows
