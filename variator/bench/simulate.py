"""The scheduler on a virtual clock: the same code as in the runtime, latencies drawn from a measured table.

For what a machine cannot run: many replicas behind a balancer that joins the shortest queue, millions of requests,
replicas that fail. `bench.replay` compares it with the real thing before any of its figures is shown.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from variator.bench.arrivals import Arrivals
from variator.engines.latency import LatencyTable
from variator.engines.policies import Costs, Policy
from variator.engines.scheduler import MAX_QUEUE, Batch, Request, Scheduler, buckets_up_to
from variator.errors import DeadlineExceeded, InputError, Overloaded
from variator.toolkit.plugin_format import Key

SERVED, LATE, DROPPED, REFUSED, FAILED = range(5)
"""What became of a request."""

DONE, DOWN, UP = range(3)
"""Events: a batch has ended, a replica goes, a replica is back."""

UNKNOWN = -1


@dataclass(frozen=True)
class Failure:
    """A replica that is gone for a while: what it ran and what waited there fails; it comes back empty. Seconds."""

    replica: int
    start: float
    end: float


@dataclass(frozen=True)
class SimulationSettings:
    """What is simulated.

    Args:
        pace: What runs take over what the table says, second by second, as a replay measured it; it begins anew at
            its end, and none is 1.
        spread: p95 over p50 of a run; latencies vary accordingly (log-normal).
        limit: The model's, tokens.
    """

    slo_ms: float
    ratios: tuple[Key, ...]
    limit: int
    max_rows: int = 64
    max_queue: int = MAX_QUEUE
    replicas: int = 1
    pace: tuple[float, ...] = ()
    spread: float = 1.0
    failures: tuple[Failure, ...] = ()
    seed: int = 0


@dataclass
class Outcomes:
    """What became of every request, in the order of arrival.

    Args:
        outcome: `SERVED`, … or `UNKNOWN`.
        level: It was served at; -1 if not.
        latency_ms: From the scheduled arrival to the answer.
        arrival_s: When it came.
        queued_ms: Of those, waiting.
        busy_ms, expected_ms: By second: from the start of a run until the next could start, and what the table says
            its runs would take.
        tokens, padded: Computed for real tokens, and with padding.
        decisions: (seconds, level) of every batch.
    """

    outcome: npt.NDArray[np.int8]
    level: npt.NDArray[np.int8]
    latency_ms: npt.NDArray[np.float64]
    arrival_s: npt.NDArray[np.float64]
    queued_ms: npt.NDArray[np.float64]
    busy_ms: dict[int, float] = field(default_factory=dict)
    expected_ms: dict[int, float] = field(default_factory=dict)
    tokens: int = 0
    padded: int = 0
    decisions: list[tuple[float, int]] = field(default_factory=list)

    def ran(self, started_s: float, expected_ms: float, busy_ms: float) -> None:
        """Count a run."""
        second = max(0, int(started_s))
        self.busy_ms[second] = self.busy_ms.get(second, 0.0) + busy_ms
        self.expected_ms[second] = self.expected_ms.get(second, 0.0) + expected_ms

    def paces(self) -> tuple[float, ...]:
        """By second, what runs took over what the table says; the mean where none ran."""
        mean = sum(self.busy_ms.values()) / max(sum(self.expected_ms.values()), 1e-9)
        last = max(self.expected_ms, default=-1)
        return tuple(
            self.busy_ms[second] / self.expected_ms[second] if self.expected_ms.get(second) else mean
            for second in range(last + 1)
        )

    @staticmethod
    def of(arrival_s: npt.NDArray[np.float64]) -> Outcomes:
        """Nothing has become of any yet."""
        count = len(arrival_s)
        zeros = np.zeros(count)
        return Outcomes(np.full(count, UNKNOWN, np.int8), np.full(count, -1, np.int8), zeros, arrival_s, zeros.copy())


class _Replica:
    """One engine with its queue."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.running: Batch | None = None
        self.work = 0
        self.took = 0.0
        self.up = True
        self.epoch = 0


def simulate(
    table: LatencyTable,
    policy: Policy,
    load: Arrivals,
    lengths: npt.NDArray[np.int64],
    settings: SimulationSettings,
) -> Outcomes:
    """Serve a workload, one row per request.

    Args:
        policy: The same for all replicas: it has no memory.
        lengths: Tokens of each request.
    """
    if settings.replicas < 1:
        raise InputError(f"{settings.replicas} replicas", valid="at least one")
    costs = Costs(table, settings.ratios, buckets_up_to(settings.limit), settings.max_rows)
    replicas = [
        _Replica(Scheduler(costs, policy, settings.slo_ms, settings.max_queue)) for _ in range(settings.replicas)
    ]
    return _Simulation(costs, replicas, load, lengths, settings).run()


class _Simulation:
    def __init__(
        self,
        costs: Costs,
        replicas: list[_Replica],
        load: Arrivals,
        lengths: npt.NDArray[np.int64],
        settings: SimulationSettings,
    ) -> None:
        self.costs, self.replicas, self.settings = costs, replicas, settings
        self.times, self.lengths = (load.times * 1e3).tolist(), lengths.tolist()
        self.found = Outcomes.of(load.times)
        self.events: list[tuple[float, int, int, int]] = []  # ms, kind, replica, epoch
        self.rng = np.random.default_rng(settings.seed)
        self.sigma = math.log(max(settings.spread, 1.0)) / 1.645  # log-normal: p95 is exp(1.645 sigma) times the median
        self.noise: list[float] = []
        self.pace = settings.pace or (1.0,)
        # The shortest queue by a heap of (work, replica) that is corrected where it turns out to be stale.
        self.shortest = [(0, index) for index in range(len(replicas))]

    def run(self) -> Outcomes:
        """All events in order."""
        for failure in self.settings.failures:
            if not 0 <= failure.replica < len(self.replicas) or not 0 <= failure.start < failure.end:
                raise InputError(f"{failure}", valid=f"replica 0 to {len(self.replicas) - 1}, a start before its end")
            heapq.heappush(self.events, (failure.start * 1e3, DOWN, failure.replica, 0))
            heapq.heappush(self.events, (failure.end * 1e3, UP, failure.replica, 0))
        events, times, slo = self.events, self.times, self.settings.slo_ms
        index, count = 0, len(times)
        while index < count or events:
            if index < count and (not events or times[index] <= events[0][0]):
                now = times[index]
                self._arrive(Request(1, self.lengths[index], now, now + slo, payload=index), now)
                index += 1
            else:
                now, kind, replica, epoch = heapq.heappop(events)
                self._event(now, kind, replica, epoch)
        return self.found

    def _event(self, now: float, kind: int, index: int, epoch: int) -> None:
        replica = self.replicas[index]
        if kind == DONE and epoch == replica.epoch:
            self._finish(index, now)
            self._start(index, now)
        elif kind == DOWN:
            left = replica.scheduler.drain() + (replica.running.requests if replica.running else [])
            for request in left:
                self._end(request, FAILED, now)
            replica.up, replica.running, replica.work, replica.epoch = False, None, 0, replica.epoch + 1
        elif kind == UP:
            replica.up = True
            replica.scheduler.done(now)
            heapq.heappush(self.shortest, (0, index))

    def _arrive(self, request: Request, now: float) -> None:
        index = self._join()
        if index is None:
            self._end(request, FAILED, now)
            return
        replica = self.replicas[index]
        try:
            replica.scheduler.submit(request, now)
        except (DeadlineExceeded, Overloaded):
            self._end(request, REFUSED, now)
            return
        replica.work += 1
        heapq.heappush(self.shortest, (replica.work, index))
        if len(self.shortest) > 8 * len(self.replicas) + 64:  # most of it is of the past
            self.shortest = [(one.work, place) for place, one in enumerate(self.replicas) if one.up]
            heapq.heapify(self.shortest)
        if replica.running is None:
            self._start(index, now)

    def _join(self) -> int | None:
        """The replica with least requests."""
        heap, replicas = self.shortest, self.replicas
        while heap:
            work, index = heap[0]
            if replicas[index].up and replicas[index].work == work:
                return index
            heapq.heappop(heap)
        return None

    def _start(self, index: int, now: float) -> None:
        replica = self.replicas[index]
        batch, hopeless = replica.scheduler.next_batch(now)
        for request in hopeless:
            self._end(request, DROPPED, now)
        replica.work -= len(hopeless)
        if hopeless:
            heapq.heappush(self.shortest, (replica.work, index))
        replica.running = batch
        if batch is None:
            return
        longest, tokens = 0, 0
        for request in batch.requests:
            self.found.queued_ms[request.payload] = now - request.arrival
            tokens += request.length
            longest = max(longest, request.length)
        self.found.tokens += tokens
        self.found.padded += longest * batch.rows
        self.found.decisions.append((now / 1e3, batch.level))
        if not self.noise:
            self.noise = np.exp(self.rng.normal(0.0, self.sigma, 4096)).tolist()
        replica.took = batch.expected_ms * self.noise.pop() * self.pace[int(now / 1e3) % len(self.pace)]
        self.found.ran(now / 1e3, batch.expected_ms, replica.took)
        heapq.heappush(self.events, (now + replica.took, DONE, index, replica.epoch))

    def _finish(self, index: int, now: float) -> None:
        replica = self.replicas[index]
        batch = replica.running
        assert batch is not None
        replica.scheduler.done(now, batch, replica.took)
        for request in batch.requests:
            self.found.level[request.payload] = batch.level
            self._end(request, SERVED if now <= request.deadline else LATE, now)
        replica.work -= len(batch.requests)
        heapq.heappush(self.shortest, (replica.work, index))

    def _end(self, request: Request, outcome: int, now: float) -> None:
        assert self.found.outcome[request.payload] == UNKNOWN, "a request has two outcomes"
        self.found.outcome[request.payload] = outcome
        self.found.latency_ms[request.payload] = now - request.arrival
