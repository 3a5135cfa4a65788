"""Which ratio the next batch runs at, and how many rows it takes: small pure classes over (queue, costs, now).

A policy sees the queue's head (the request that is served next), the rows that wait, and what runs cost. It has no
clock and no memory; the same objects decide in the runtime, in the replay and in the simulator. Levels are the ratios
from slowest to fastest: level 0 is ratio 1. Times are in ms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from variator.engines.latency import MAX_ROWS, LatencyTable, of_rows
from variator.errors import InputError
from variator.toolkit.plugin_format import Key

BATCH_SHARE = 1 / 3
"""Of its SLO that a single run may take: a request that just missed one batch still makes the next."""

EFFICIENT = 1.1
"""A batch is full when a row costs no more than this many times what it costs at best."""

MAX_CACHED = 256
"""Different SLOs whose limits are kept."""


class Costs:
    """A latency table as policies ask it: by level, rows and length bucket, without a search.

    Args:
        buckets: Lengths that requests are grouped by.
        max_rows: Most rows of a batch.
    """

    def __init__(
        self, table: LatencyTable, ratios: Sequence[Key], buckets: Sequence[int], max_rows: int = MAX_ROWS
    ) -> None:
        missing = [ratio for ratio in ratios if ratio not in table.ratios]
        if missing:
            raise InputError(
                f"the latency of ratio {missing[0]} was not measured", valid=", ".join(map(str, table.ratios))
            )
        self.ratios = tuple(ratio for ratio in table.ratios if ratio in ratios)
        self.buckets = tuple(buckets)
        self.max_rows = min(max_rows, MAX_ROWS)
        self.lines = [[table.line(ratio, length) for length in buckets] for ratio in self.ratios]
        """ms by level, bucket and rows."""
        self._caps: dict[float, list[list[int]]] = {}
        self._shares: dict[float, list[list[float]]] = {}

    def caps(self, slo_ms: float) -> list[list[int]]:
        """Most rows of a batch by level and bucket, at least 1.

        A run takes no more than `BATCH_SHARE` of the SLO, and no batch is larger than it takes to be efficient: whoever
        comes meanwhile waits for its end.
        """
        slo_ms = round(slo_ms, 1)
        if slo_ms not in self._caps:
            if len(self._caps) >= MAX_CACHED:
                self._caps.clear()
                self._shares.clear()
            self._caps[slo_ms] = [[_cap(line[: self.max_rows + 1], slo_ms) for line in level] for level in self.lines]
        return self._caps[slo_ms]

    def shares(self, slo_ms: float) -> list[list[float]]:
        """ms that a row of a full batch takes, by level and bucket."""
        slo_ms = round(slo_ms, 1)
        if slo_ms not in self._shares:
            caps = self.caps(slo_ms)
            self._shares[slo_ms] = [
                [line[cap] / cap for line, cap in zip(level, of_level, strict=True)]
                for level, of_level in zip(self.lines, caps, strict=True)
            ]
        return self._shares[slo_ms]

    def ms(self, level: int, rows: int, bucket: int) -> float:
        """A run's latency."""
        return of_rows(self.lines[level][bucket], rows)


def _cap(line: Sequence[float], slo_ms: float) -> int:
    """Rows of a full batch, from its latency by rows."""
    within = [rows for rows in range(1, len(line)) if line[rows] <= slo_ms * BATCH_SHARE] or [1]
    best = min(line[rows] / rows for rows in within)
    return next(rows for rows in within if line[rows] / rows <= best * EFFICIENT)


class Head(Protocol):
    """The request that is served next."""

    arrival: float
    deadline: float
    bucket: int
    rows: int


class Queue(Protocol):
    """What waits."""

    @property
    def head(self) -> Head:
        """First of all."""

    @property
    def waiting(self) -> int:
        """Rows that can go into the head's batch."""

    @property
    def drain_ms(self) -> Sequence[float]:
        """Time to serve all that waits, by level, in full batches, by the table."""

    @property
    def pace(self) -> float:
        """What runs take at present, over what the table says."""


class Policy(Protocol):
    """Decides."""

    @property
    def name(self) -> str:
        """In records."""

    def choose(self, queue: Queue, costs: Costs, now: float) -> tuple[int, int]:
        """Level and most rows of the next batch."""


@dataclass(frozen=True)
class Fixed:
    """Always the same level."""

    level: int
    name: str = "fixed"

    def choose(self, queue: Queue, costs: Costs, now: float) -> tuple[int, int]:
        """See `Policy.choose`."""
        head = queue.head
        return self.level, costs.caps(head.deadline - head.arrival)[self.level][head.bucket]


@dataclass(frozen=True)
class Thresholds:
    """A level per amount of waiting work: what an operator would set by hand.

    Args:
        shares: Level 1 from this share of the SLO on that it would take to serve the queue at ratio 1, level 2 from the
            next, …; the last goes for all further levels.
    """

    shares: tuple[float, ...] = (0.25, 0.5, 1.0)
    name: str = "thresholds"

    def choose(self, queue: Queue, costs: Costs, now: float) -> tuple[int, int]:
        """See `Policy.choose`."""
        head = queue.head
        slo = head.deadline - head.arrival
        work = queue.drain_ms[0] * queue.pace
        level = min(sum(work > share * slo for share in self.shares), len(costs.ratios) - 1)
        return level, costs.caps(slo)[level][head.bucket]


@dataclass(frozen=True)
class SlackFit:
    """SuperServe's policy (Khare et al., arXiv 2312.16733, section 4): the head's slack picks the largest feasible
    bucket of latencies; in it the largest batch, and of those the most accurate.

    Args:
        bins: Buckets that latencies are sorted into, evenly between the shortest and the longest.
    """

    bins: int = 12
    name: str = "slackfit"

    def choose(self, queue: Queue, costs: Costs, now: float) -> tuple[int, int]:
        """See `Policy.choose`."""
        head = queue.head
        slack, slo = (head.deadline - now) / queue.pace, (head.deadline - head.arrival) / queue.pace
        # Several rows of the queue at once, as many as there are: a larger batch than that does not exist.
        least = min(head.rows, costs.max_rows)
        most = max(least, min(queue.waiting, costs.max_rows))
        lines = [line[head.bucket] for line in costs.lines]
        low = lines[-1][1]
        width = max(slo - low, 1e-9) / self.bins
        best: tuple[int, int, int] | None = None  # latency bin, rows, -level
        for level, line in enumerate(lines):
            rows = most
            while rows > least and line[rows] > slack:
                rows -= 1
            if line[rows] <= slack:
                found = (int((line[rows] - low) / width), rows, -level)
                best = found if best is None or found > best else best
        return (-best[2], best[1]) if best else (len(lines) - 1, 1)


@dataclass(frozen=True)
class Drain:
    """The lowest ratio at which the head is in time and the whole queue is served soon; else the highest.

    Args:
        alpha: Share of the SLO that serving all that waits may take.
        margin: What a run's measured latency is multiplied by.
    """

    alpha: float = 0.4
    margin: float = 1.1
    name: str = "drain"

    def choose(self, queue: Queue, costs: Costs, now: float) -> tuple[int, int]:
        """See `Policy.choose`."""
        head = queue.head
        slo = head.deadline - head.arrival
        caps, bucket, waiting = costs.caps(slo), head.bucket, queue.waiting
        soon, slack = self.alpha * slo / queue.pace, (head.deadline - now) / (self.margin * queue.pace)
        last = len(caps) - 1
        for level in range(last):
            if queue.drain_ms[level] <= soon:
                cap = caps[level][bucket]
                if costs.ms(level, max(head.rows, min(cap, waiting)), bucket) <= slack:
                    return level, cap
        return last, caps[last][bucket]


POLICIES: dict[str, Callable[[], Policy]] = {"drain": Drain, "slackfit": SlackFit, "thresholds": Thresholds}


def policy_named(text: str, ratios: Sequence[Key]) -> Policy:
    """`drain`, `slackfit`, `thresholds`, or `fixed(4)` for one of the ratios.

    Raises:
        InputError: If it is none of them.
    """
    if text in POLICIES:
        return POLICIES[text]()
    names = {f"fixed({ratio})": level for level, ratio in enumerate(ratios)}
    if text in names:
        return Fixed(names[text], text)
    raise InputError(f"no policy {text!r}", valid=", ".join([*POLICIES, *names]))
