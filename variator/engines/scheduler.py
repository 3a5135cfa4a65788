"""What waits, in which order, and what runs next. Pure: time comes in as an argument, nothing is computed here.

Earliest deadline first within a priority. A batch takes the first request and those of its length bucket that come
next: little is padded, and nobody waits for a longer text than his own kind. `engines.serving` drives this with threads
and a real engine, `bench.simulate` with a virtual clock.

The same request is in two heaps, in that of its bucket and in that of all; what has left is skipped where it turns up.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Any

from variator.engines.policies import Costs, Policy
from variator.errors import DeadlineExceeded, InputError, Overloaded, VariatorError
from variator.toolkit.plugin_format import Key

BUCKETS = (
    8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512,
    640, 768, 1024, 1280, 1536, 2048, 2560, 3072, 4096, 6144,
)  # fmt: skip
"""Lengths that requests are grouped by; finer than a fixed ratio's, because what waits is sorted anyway."""

MARGIN = 1.05
"""What a run's latency is multiplied by where a batch is cut so that its first request is in time."""

PACE_MS, PACES = 1000.0, (0.5, 4.0)
"""Memory of the pace, in ms of expected work, and what it may be: one run that hangs says nothing about the next."""

MAX_SLO_MS = 3_600_000.0
MAX_QUEUE = 10_000
SLACK = 64
"""Entries of requests that have left which a queue may hold beside as many as wait."""

MAX_TOKENS = 16_384
"""Rows x length of one batch."""


def buckets_up_to(limit: int) -> tuple[int, ...]:
    """The buckets of a model that takes `limit` tokens."""
    return (*(bucket for bucket in BUCKETS if bucket < limit), limit)


@dataclass(slots=True, eq=False)
class Request:
    """One request in the queue: rows that are answered together.

    Args:
        rows: How many.
        length: Tokens of the longest.
        arrival, deadline: On the scheduler's clock, ms.
        priority: Higher goes first, whatever the deadlines.
        lowest, highest: Levels that it may be served at.
        payload: Whatever the driver needs.
    """

    rows: int
    length: int
    arrival: float
    deadline: float
    priority: int = 0
    lowest: int = 0
    highest: int = 1 << 30
    payload: Any = None
    bucket: int = -1
    waiting: bool = field(default=False, repr=False)


@dataclass(frozen=True, slots=True)
class Batch:
    """What runs next; `expected_ms` by the latency table."""

    requests: list[Request]
    level: int
    ratio: Key
    rows: int
    expected_ms: float


Entry = tuple[int, float, int, Request]


class PolicyError(VariatorError):
    """A policy that raised. `given_up` has left the queue, all others still wait."""

    def __init__(self, what: str, given_up: list[Request]) -> None:
        self.given_up = given_up
        super().__init__(what)


class _Group:
    """Requests of one bucket and priority."""

    __slots__ = ("heap", "rows")

    def __init__(self) -> None:
        self.heap: list[Entry] = []
        self.rows = 0


class Scheduler:
    """The queue.

    Args:
        policy: Of the ratio.
        slo_ms: That most requests have; the time to drain the queue is counted in batches that fit it.
        max_queue: Requests that may wait.
    """

    def __init__(self, costs: Costs, policy: Policy, slo_ms: float, max_queue: int = MAX_QUEUE) -> None:
        check_slo(slo_ms)
        self.costs, self.policy, self.max_queue = costs, policy, max_queue
        self.head: Request
        self.waiting = 0
        self.drain_ms = [0.0] * len(costs.ratios)
        self.requests = self.rows = 0
        self.busy_until = -math.inf
        self.pace = 1.0
        self._took = self._expected = PACE_MS
        self._rested = -math.inf
        self._shares = costs.shares(slo_ms)
        self._groups: dict[tuple[int, int], _Group] = {}
        self._all: list[Entry] = []
        self._numbers = count()
        self._now = -math.inf
        self._earliest = math.inf
        self._bucket_of = _bucket_of(costs.buckets)
        self._token_rows = [max(1, MAX_TOKENS // length) for length in costs.buckets]

    def submit(self, request: Request, now: float) -> None:
        """Let a request wait.

        Raises:
            InputError: If it is longer than any bucket, or its levels leave none.
            DeadlineExceeded: If it cannot be answered in time even at the highest ratio that it allows.
            Overloaded: If the queue is full.
        """
        now = self._forward(now)
        self._rest(now)
        if not 1 <= request.length <= self.costs.buckets[-1]:
            raise InputError(f"a row of {request.length} tokens", valid=f"1 to {self.costs.buckets[-1]}")
        last = len(self.drain_ms) - 1
        request.highest = min(request.highest, last)
        if not 0 <= request.lowest <= request.highest:
            raise InputError(
                f"the request allows no ratio: from level {request.lowest} to {request.highest}",
                valid=", ".join(map(str, self.costs.ratios)),
            )
        if self.requests >= self.max_queue:
            raise Overloaded(f"{self.requests} requests are waiting", fix="try again later, or send less")
        request.bucket = bucket = self._bucket_of[request.length]
        least = self.costs.ms(request.highest, request.rows, bucket) * self.pace
        if max(now, self.busy_until) + least > request.deadline:
            raise DeadlineExceeded(
                f"a deadline in {request.deadline - now:.1f} ms cannot be met: {request.rows} rows of up to "
                f"{request.length} tokens take {least:.1f} ms at ratio {self.costs.ratios[request.highest]}, and "
                f"{max(0.0, self.busy_until - now):.1f} ms are spoken for",
                fix="allow more time or a higher ratio",
            )
        self._add(request, (-request.priority, request.deadline, next(self._numbers), request))

    def _add(self, request: Request, entry: Entry) -> None:
        group = self._groups.get((request.priority, request.bucket))
        if group is None:
            group = self._groups[request.priority, request.bucket] = _Group()
        heappush(group.heap, entry)
        heappush(self._all, entry)
        request.waiting = True
        self._earliest = min(self._earliest, request.deadline)
        self._count(request, group, 1)

    def _count(self, request: Request, group: _Group, sign: int) -> None:
        rows = sign * request.rows
        self.requests += sign
        self.rows += rows
        group.rows += rows
        drain, bucket = self.drain_ms, request.bucket
        if self.requests:
            for level, shares in enumerate(self._shares):
                drain[level] += rows * shares[bucket]
        else:  # nothing is left of rounding either
            self._all.clear()
            self.drain_ms[:] = [0.0] * len(drain)
        if not group.rows:
            del self._groups[request.priority, bucket]
        if len(self._all) > 2 * self.requests + SLACK:
            self._compact()

    def _compact(self) -> None:
        """Throw out what has left: one who may wait for an hour must not keep all that came and went before him."""
        self._all = [entry for entry in self._all if entry[3].waiting]
        heapify(self._all)
        for group in self._groups.values():
            group.heap = [entry for entry in group.heap if entry[3].waiting]
            heapify(group.heap)

    def discard(self, request: Request) -> bool:
        """Take a request out; whether it was still waiting."""
        if not request.waiting:
            return False
        request.waiting = False
        self._count(request, self._groups[request.priority, request.bucket], -1)
        return True

    def next_batch(self, now: float) -> tuple[Batch | None, list[Request]]:
        """What runs now, if anything waits, and the requests that are given up because no ratio is fast enough."""
        now = self._forward(now)
        hopeless: list[Request] = []
        while (first := self._first()) is not None:
            group = self._groups[first.priority, first.bucket]
            if now + self._soonest(first, group) <= first.deadline:
                break
            self.discard(first)
            hopeless.append(first)
        else:
            return None, hopeless
        self.head, self.waiting = first, group.rows
        try:
            chosen, rows = map(int, self.policy.choose(self, self.costs, now))
        except Exception as error:  # whatever a policy raises
            raise PolicyError(f"the policy failed: {type(error).__name__}: {error}", hopeless) from error
        level = min(max(chosen, first.lowest), first.highest)
        if level != chosen:
            rows = min(rows, self.costs.caps(first.deadline - first.arrival)[level][first.bucket])
        in_time = bisect_right(self.costs.lines[level][first.bucket], (first.deadline - now) / (MARGIN * self.pace)) - 1
        batch = self._take(first, group, level, min(rows, in_time, self._token_rows[first.bucket]))
        self.busy_until = now + batch.expected_ms * self.pace
        return batch, hopeless

    def _soonest(self, first: Request, group: _Group) -> float:
        """ms until the first could be answered, in as large a batch as the queue needs now.

        In a small one it might still be in time, but those behind it would not be: who cannot make a full batch is
        given up for them.
        """
        caps = self.costs.caps(first.deadline - first.arrival)[first.highest]
        rows = min(group.rows, caps[first.bucket])
        return self.costs.ms(first.highest, max(rows, first.rows), first.bucket) * self.pace

    def done(self, now: float, batch: Batch | None = None, took_ms: float = 0.0) -> None:
        """A batch has ended, sooner or later than expected: what comes next is expected accordingly.

        The pace is that of about the last `PACE_MS`, so that a machine that others use too, or that runs hot, is not
        taken for the one that was measured.
        """
        self.busy_until = self._forward(now)
        if batch is not None:
            kept, (least, most) = math.exp(-batch.expected_ms / PACE_MS), PACES
            took = min(max(took_ms, least * batch.expected_ms), most * batch.expected_ms)
            self._took, self._expected = self._took * kept + took, self._expected * kept + batch.expected_ms
            self.pace = self._took / self._expected

    def _rest(self, now: float) -> None:
        """Time in which nothing ran tells nothing: the pace goes back to the table's."""
        idle = now - max(self._rested, self.busy_until)
        if idle > 0 and not self.requests:
            self.pace = 1 + (self.pace - 1) * math.exp(-idle / PACE_MS)
            self._took, self._rested = self.pace * self._expected, now

    def age(self, now: float) -> float:
        """ms since the request that is served next arrived; 0 if none waits."""
        first = self._first()
        return 0.0 if first is None else max(0.0, now - first.arrival)

    def _first(self) -> Request | None:
        heap = self._all
        while heap:
            if heap[0][3].waiting:
                return heap[0][3]
            heappop(heap)
        return None

    def _take(self, first: Request, group: _Group, level: int, most: int) -> Batch:
        """Requests of a group that may be served at a level, the first in any case."""
        taken: list[Request] = []
        aside: list[Entry] = []
        rows, heap = 0, group.heap
        while heap and (rows < most or not taken):
            entry = heappop(heap)
            request = entry[3]
            if not request.waiting:
                continue
            fits = request is first or (rows + request.rows <= most and request.lowest <= level <= request.highest)
            if not fits:
                aside.append(entry)
                if len(aside) > most:
                    break
                continue
            taken.append(request)
            rows += request.rows
        for entry in aside:
            heappush(heap, entry)
        for request in taken:
            request.waiting = False
            self._count(request, group, -1)
        return Batch(taken, level, self.costs.ratios[level], rows, self.costs.ms(level, rows, first.bucket))

    def overdue(self, now: float) -> list[Request]:
        """Take out whose deadline has passed: nobody waits for an answer any more. For when the engine is busy."""
        now = self._forward(now)
        if now <= self._earliest:  # asked many times a second, with thousands in the queue
            return []
        waiting = [entry[3] for entry in self._all if entry[3].waiting]
        late = [request for request in waiting if request.deadline < now]
        self._earliest = min((one.deadline for one in waiting if one.deadline >= now), default=math.inf)
        for request in late:
            self.discard(request)
        return late

    def drain(self) -> list[Request]:
        """Take everything out."""
        left = [entry[3] for entry in sorted(self._all, key=lambda entry: entry[:3]) if entry[3].waiting]
        for request in left:
            self.discard(request)
        return left

    def _forward(self, now: float) -> float:
        """Time as it may be: a clock that jumps back stands still instead."""
        self._now = max(self._now, now)
        return self._now


def check_slo(slo_ms: float) -> None:
    """Raise `InputError` unless a time can be an objective."""
    if not isinstance(slo_ms, int | float) or isinstance(slo_ms, bool) or not 0 < slo_ms <= MAX_SLO_MS:
        raise InputError(f"an SLO of {slo_ms!r} ms", valid=f"more than 0, up to {MAX_SLO_MS:.0f} ms")


def _bucket_of(buckets: Sequence[int]) -> list[int]:
    """Index of the bucket by length."""
    found = [0]
    for index, bucket in enumerate(buckets):
        found += [index] * (bucket - len(found) + 1)
    return found
