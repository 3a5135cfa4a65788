"""Serving under an objective: a queue, one worker that runs batches at the ratio of the moment, answers as futures.

`Runtime.infer(..., ratio="auto")` goes through here. One worker per runtime, because an engine has one device and all
of its threads; a second thread answers what has become too late while the engine is busy, so that nobody waits in the
queue much longer than his deadline, whatever the engine does.
"""

from __future__ import annotations

import asyncio
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from threading import Condition, Lock, Thread
from typing import TYPE_CHECKING, Protocol

import numpy as np

from variator.engines.latency import LatencyTable
from variator.engines.policies import Costs, Drain, Policy
from variator.engines.scheduler import (
    MAX_QUEUE,
    Batch,
    PolicyError,
    Request,
    Scheduler,
    buckets_up_to,
    check_slo,
)
from variator.errors import DeadlineExceeded, EngineError, InputError, VariatorError
from variator.toolkit.plugin_format import Key
from variator.toolkit.rows import Input, Outputs, Row, place

if TYPE_CHECKING:
    from variator.engines.runtime import Result, Runtime

HANG_FACTOR, HANG_MS = 20.0, 10_000.0
"""A run is given up after this many times its expected latency, or after this time, whichever is longer."""

WATCH_S = 0.02
"""How often it is looked for answers that are overdue."""

Clock = Callable[[], float]


def wall_clock() -> float:
    """ms, never back."""
    return time.perf_counter() * 1e3


@dataclass(frozen=True)
class ServeSettings:
    """How requests are served.

    Args:
        slo_ms: For requests that bring none of their own.
        max_queue: Requests that may wait; one more is refused.
        max_rows: Most rows of a batch.
        policy: Of the ratio; None is `Drain()`.
        ratios: That may be chosen; empty for all of the bundle.
    """

    slo_ms: float = 100.0
    max_queue: int = MAX_QUEUE
    max_rows: int = 64
    policy: Policy | None = None
    ratios: tuple[Key, ...] = ()

    def __post_init__(self) -> None:
        check_slo(self.slo_ms)
        for name in ("max_queue", "max_rows"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name} is {value!r}", valid="a whole number, 1 or more")


@dataclass(frozen=True)
class Backlog:
    """What waits at a server.

    Args:
        age_ms: Of the request that is served next.
        drain_ms: Time to serve all of it, by level.
    """

    requests: int
    age_ms: float
    drain_ms: tuple[float, ...]


class Observer(Protocol):
    """Told what happens, from the threads that it happens on: for metrics and spans."""

    def batch(self, batch: Batch, queue_ms: Sequence[float], compute_ms: float, tokens: int, padded: int) -> None:
        """A batch has run: tokens of its rows, and rows x the longest."""

    def outcome(self, outcome: str, ratio: Key | None, latency_ms: float) -> None:
        """A request has ended: `served`, `late`, `dropped`, `refused`, `failed` or `cancelled`."""

    def queue(self, requests: int) -> None:
        """How many wait now."""


@dataclass(slots=True)
class _Payload:
    future: Future[Result]
    rows: list[Row]
    started: float
    tokenise_ms: float


class Server:
    """The queue and the worker of one runtime. Made by `Runtime.serve`; use it as a context manager.

    Args:
        quality: Relative to ratio 1, by ratio, where that is known.
    """

    def __init__(
        self,
        runtime: Runtime,
        table: LatencyTable,
        settings: ServeSettings,
        quality: Mapping[Key, float],
        clock: Clock = wall_clock,
        observers: Sequence[Observer] = (),
    ) -> None:
        ratios = settings.ratios or tuple(ratio for ratio in table.ratios if ratio in runtime.bundle.ratios)
        for ratio in ratios:
            runtime.bundle.ratio(ratio)
        costs = Costs(table, ratios, buckets_up_to(runtime.bundle.manifest.max_length), settings.max_rows)
        self.scheduler = Scheduler(costs, settings.policy or Drain(), settings.slo_ms, settings.max_queue)
        self.settings, self.ratios, self.quality = settings, costs.ratios, dict(quality)
        self._runtime, self._clock, self._observers = runtime, clock, list(observers)
        self._lock, self._telling = Lock(), Lock()
        self._work_is_there, self._something_runs = Condition(self._lock), Condition(self._lock)
        self._running: Batch | None = None
        self._running_since = 0.0
        self.hanging = self._watching_nothing = False
        """Whether the engine has not come back from a run that was given up."""
        self._closing = self._closed = False
        for ratio in self.ratios:  # so that no request waits for a ratio to load
            runtime.load(ratio)
        self._worker = Thread(target=self._work, name="variator-worker", daemon=True)
        self._watcher = Thread(target=self._watch, name="variator-watcher", daemon=True)
        self._worker.start()
        self._watcher.start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def submit(
        self,
        inputs: Sequence[Input],
        *,
        slo_ms: float | None = None,
        arrival_ms: float | None = None,
        priority: int = 0,
        min_ratio: Key | None = None,
        max_ratio: Key | None = None,
        min_quality: float | None = None,
        truncate: bool = False,
    ) -> Future[Result]:
        """Queue a request.

        Args:
            slo_ms: From arrival to answer; None is that of the settings.
            arrival_ms: When it arrived, on this server's clock; None is now.
            priority: Higher goes first.
            min_ratio, max_ratio: Slowest and fastest ratio that may answer it.
            min_quality: Relative to ratio 1, 0.98: no ratio that is known to be worse or not known.

        Raises:
            InputError: For inputs that cannot be served, an SLO that is none, or bounds that leave no ratio.
            DeadlineExceeded: If it cannot be met.
            Overloaded: If the queue is full.
            EngineError: If the server is closed, or its engine does not answer.
        """
        started = self._clock()
        slo_ms = self.settings.slo_ms if slo_ms is None else slo_ms
        check_slo(slo_ms)
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise InputError(f"a priority of {priority!r}", valid="a whole number")
        lowest, highest = self._levels(min_ratio, max_ratio, min_quality)
        rows = self._runtime.tokenise(inputs, truncate)
        now = self._clock()
        arrival = started if arrival_ms is None else arrival_ms
        if not math.isfinite(arrival):
            raise InputError(f"an arrival at {arrival_ms!r} ms", valid="a finite number on the server's clock")
        future: Future[Result] = Future()
        payload = _Payload(future, rows, started, now - started)
        longest = max(len(row.ids) for row in rows)
        request = Request(len(rows), longest, arrival, arrival + slo_ms, priority, lowest, highest, payload)
        with self._lock:
            if self._closing or self.hanging:
                raise EngineError("the engine does not answer" if self.hanging else "the server is closed")
            try:
                self.scheduler.submit(request, now)
                refused = None
            except VariatorError as error:
                refused = error
            if self.scheduler.requests == 1:  # else the worker is on its way
                self._work_is_there.notify()
        if refused is not None:  # told without the lock: whoever listens may take his time
            self._tell_outcome("refused", None, now - arrival)
            raise refused
        future.add_done_callback(lambda done: self._cancelled(request) if done.cancelled() else None)
        return future

    async def ainfer(self, inputs: Sequence[Input], **options: object) -> Result:
        """`submit`, awaited; a task that is cancelled takes its request out of the queue."""
        return await asyncio.wrap_future(self.submit(inputs, **options))  # type: ignore[arg-type]

    def observe(self, observer: Observer) -> None:
        """Tell one more what happens."""
        with self._lock:
            self._observers = [*self._observers, observer]

    def backlog(self) -> Backlog:
        """What waits now."""
        with self._lock:
            now, pace = self._clock(), self.scheduler.pace
            drain_ms = tuple(level * pace for level in self.scheduler.drain_ms)
            return Backlog(self.scheduler.requests, self.scheduler.age(now), drain_ms)

    def _levels(self, min_ratio: Key | None, max_ratio: Key | None, min_quality: float | None) -> tuple[int, int]:
        """Lowest and highest level of a request."""
        last = len(self.ratios) - 1
        low = self._level(min_ratio, "min_ratio") if min_ratio is not None else 0
        high = self._level(max_ratio, "max_ratio") if max_ratio is not None else last
        if min_quality is not None:
            if not isinstance(min_quality, int | float) or not 0 <= min_quality <= 1:
                raise InputError(f"a quality of {min_quality!r}", valid="0 to 1, relative to ratio 1")
            good = [self.quality.get(ratio, -math.inf) >= min_quality for ratio in self.ratios]
            high = next((level - 1 for level in range(low, high + 1) if not good[level]), high)
        if low > high:
            raise InputError(
                f"no ratio is left with min_ratio {min_ratio}, max_ratio {max_ratio} and min_quality {min_quality}",
                valid=", ".join(map(str, self.ratios)),
                fix="lower min_ratio, raise max_ratio, or ask for less quality",
            )
        return low, high

    def _level(self, ratio: Key, what: str) -> int:
        if isinstance(ratio, bool) or ratio not in self.ratios:
            raise InputError(f"{what} {ratio!r}", valid=", ".join(map(str, self.ratios)))
        return self.ratios.index(ratio)

    def _cancelled(self, request: Request) -> None:
        with self._lock:
            waited = self.scheduler.discard(request)
        if waited:
            self._tell_waiting()
            self._tell_outcome("cancelled", None, self._clock() - request.arrival)

    def _work(self) -> None:
        """The worker: batch after batch until the server is closed and nothing waits."""
        while True:
            batch: Batch | None = None
            lost: list[tuple[Request, VariatorError]] = []
            with self._lock:
                while not self.scheduler.requests and not self._closing:
                    self._work_is_there.wait()
                if not self.scheduler.requests:
                    return
                try:
                    batch, hopeless = self.scheduler.next_batch(self._clock())
                except PolicyError as error:
                    hopeless = error.given_up
                    lost = [(request, error) for request in self.scheduler.drain()]
                self._running, self._running_since = batch, math.inf
                if batch is not None and self._watching_nothing:
                    self._something_runs.notify()
            self._tell_waiting()
            for request in hopeless:
                self._give_up(request)
            for request, why in lost:
                self._fail(request, EngineError(why.what))
            if batch is not None:
                try:
                    self._serve(batch)
                except Exception as error:  # noqa: BLE001 - a fault of ours: this batch's requests are told, serving goes on
                    for request in batch.requests:
                        self._fail(request, EngineError(f"serving failed: {type(error).__name__}: {error}"))

    def _serve(self, batch: Batch) -> None:
        """Run a batch and answer each of its requests once; one that fails takes no other with it."""
        requests = [request for request in batch.requests if self._begins(request)]
        payloads: list[_Payload] = [request.payload for request in requests]
        error: VariatorError | None = None
        outputs: Outputs = {}
        compute_ms = 0.0
        rows = [row for payload in payloads for row in payload.rows]
        try:
            if rows:
                outputs, compute_ms = self._runtime.run_together(batch.ratio, rows, self._starts)
        except Exception as raised:  # noqa: BLE001 - whatever an engine raises is the answer of this batch's requests
            error = raised if isinstance(raised, VariatorError) else EngineError(f"the engine failed: {raised}")
        done = self._clock()
        # Of the whole batch at once; row by row only where one is not.
        broken = [name for name, values in outputs.items() if not np.isfinite(values).all()]
        with self._lock:
            whole = len(requests) == len(batch.requests) and error is None
            self._running, self.hanging = None, False
            self.scheduler.done(done, batch if whole else None, compute_ms)
        first = 0
        for request, payload in zip(requests, payloads, strict=True):
            part = slice(first, first + len(payload.rows))
            own = error or _not_finite({name: outputs[name][part] for name in broken}, batch.ratio)
            self._answer(request, payload, batch, outputs, part, (done - compute_ms, done), own)
            first = part.stop
        if rows and error is None:
            longest = max(len(row.ids) for row in rows)
            tokens = sum(len(row.ids) for row in rows)
            queued = [done - compute_ms - request.arrival for request in requests]
            self._tell(lambda observer: observer.batch(batch, queued, compute_ms, tokens, longest * len(rows)))

    def _begins(self, request: Request) -> bool:
        """Whether a request still wants an answer."""
        payload: _Payload | None = request.payload
        if payload is None:
            return False
        try:
            wanted = payload.future.set_running_or_notify_cancel()
        except (InvalidStateError, RuntimeError):  # answered already: the server was closed in a hurry
            return False
        if not wanted:
            self._tell_outcome("cancelled", None, self._clock() - request.arrival)
        return wanted

    def _starts(self) -> None:
        """The run's turn has come: from now on it may hang."""
        self._running_since = self._clock()

    def _answer(
        self,
        request: Request,
        payload: _Payload,
        batch: Batch,
        outputs: Outputs,
        part: slice,
        times: tuple[float, float],
        error: VariatorError | None,
    ) -> None:
        """Settle one request's future, unless the watcher has done so."""
        done = times[1]
        try:
            result = error or self._result(request, payload, batch, outputs, part, times)
        except Exception as raised:  # noqa: BLE001 - one request's answer must not take the worker with it
            result = raised if isinstance(raised, VariatorError) else EngineError(f"no answer could be made: {raised}")
        outcome = "failed" if isinstance(result, VariatorError) else "late" if done > request.deadline else "served"
        if self._settle(request, payload.future, result):
            self._tell_outcome(outcome, batch.ratio, done - request.arrival)

    def _result(
        self,
        request: Request,
        payload: _Payload,
        batch: Batch,
        outputs: Outputs,
        part: slice,
        times: tuple[float, float],
    ) -> Result:
        """What one request of a batch gets."""
        started, done = times
        lengths = [len(row.ids) for row in payload.rows]
        own: Outputs = {}
        for name, values in outputs.items():
            place(own, name, values[part], range(len(lengths)), lengths)
        return self._runtime.result(
            own,
            lengths,
            batch.ratio,
            tokenise_ms=payload.tokenise_ms,
            queue_ms=max(0.0, started - request.arrival),
            compute_ms=done - started,
        )

    def _settle(self, request: Request, future: Future[Result], result: Result | VariatorError) -> bool:
        """Answer once; whether this was it. What the request held goes: its future keeps it alive by a callback."""
        try:
            if isinstance(result, VariatorError):
                future.set_exception(result)
            else:
                future.set_result(result)
        except InvalidStateError:  # somebody else was first
            return False
        request.payload = None
        return True

    def _give_up(self, request: Request) -> None:
        """Answer a request that no ratio is fast enough for any more."""
        waited, whole = self._clock() - request.arrival, request.deadline - request.arrival
        error = DeadlineExceeded(
            f"the request waited {waited:.1f} ms of {whole:.1f} ms", fix="send less, or allow more"
        )
        self._fail(request, error, "dropped")

    def _watch(self) -> None:
        """Answer what is too late while a run goes on, and give a run up that does not end."""
        while True:
            late: list[Request] = []
            lost: list[Request] = []
            with self._lock:
                if self._closed:
                    return
                running, now = self._running, self._clock()
                if running is None:
                    self._watching_nothing = True
                    self._something_runs.wait()
                    self._watching_nothing = False
                    continue
                limit = self._running_since + max(HANG_MS, HANG_FACTOR * running.expected_ms)
                if now > limit and not self.hanging:
                    self.hanging = True
                    lost = [*running.requests, *self.scheduler.drain()]
                else:
                    late = self.scheduler.overdue(now)
            if late or lost:
                self._tell_waiting()
            for request in late:
                self._give_up(request)
            for request in lost:
                self._fail(
                    request, EngineError("the engine does not answer", fix="wait until it does, or end this process")
                )
            time.sleep(WATCH_S)

    def _fail(self, request: Request, error: VariatorError, outcome: str = "failed") -> None:
        payload: _Payload | None = request.payload
        if payload is not None and self._settle(request, payload.future, error):
            self._tell_outcome(outcome, None, self._clock() - request.arrival)

    def _tell_outcome(self, outcome: str, ratio: Key | None, latency_ms: float) -> None:
        self._tell(lambda observer: observer.outcome(outcome, ratio, latency_ms))

    def _tell_waiting(self) -> None:
        """How many wait now; the last who tells it tells the latest."""
        with self._telling:
            self._tell(lambda observer: observer.queue(self.scheduler.requests))

    def _tell(self, what: Callable[[Observer], None]) -> None:
        """Everybody who listens; one that raises is not told again, and serving goes on."""
        for observer in self._observers:
            try:
                what(observer)
            except Exception as error:  # noqa: BLE001 - whatever an observer raises
                self._observers = [one for one in self._observers if one is not observer]
                warnings.warn(f"an observer failed and is told no more: {type(error).__name__}: {error}", stacklevel=2)

    def close(self, drain: bool = True, timeout_s: float = 60.0) -> None:
        """Take no more requests; answer those that wait, or refuse them (`drain=False`). Every one is answered.

        Args:
            timeout_s: After which what still waits is refused.
        """
        with self._lock:
            self._closing = True
            left = [] if drain else self.scheduler.drain()
            self._work_is_there.notify_all()
        for request in left:
            self._refuse(request)
        self._worker.join(1.0 if self.hanging else timeout_s)
        with self._lock:
            left = self.scheduler.drain()
            running = self._running.requests if self._running is not None else []
            self._closed = True
            self._something_runs.notify_all()
        for request in (*left, *running):
            self._refuse(request)
        self._watcher.join(timeout_s)

    def _refuse(self, request: Request) -> None:
        self._fail(request, EngineError("the server was closed before this request was served"))


def _not_finite(outputs: Outputs, ratio: Key) -> EngineError | None:
    """The answer to a request whose part of a batch holds infinities or no numbers."""
    for name, values in outputs.items():
        if not np.isfinite(values).all():
            return EngineError(f"the engine's {name} at ratio {ratio} is not finite", fix="use another ratio")
    return None
