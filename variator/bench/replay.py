"""The verb `replay`: a workload sent to the real runtime as it would come, and what became of every request.

Open loop: a request is sent when the workload says so, whether or not earlier ones were answered, and its latency
counts from then, so that a slow server cannot slow its own load down. The same workload goes through every policy.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from variator.bench.arrivals import Arrivals, arrivals, lengths_like
from variator.bench.memory import pss_bytes
from variator.bench.quality import sentences
from variator.bench.record import model_of, package_versions, this_machine
from variator.bench.replay_record import ReplayRecord, Served, Workload, summarise
from variator.bench.simulate import (
    DROPPED,
    FAILED,
    LATE,
    REFUSED,
    SERVED,
    Outcomes,
    SimulationSettings,
    simulate,
)
from variator.engines.latency import LatencyTable, load_table
from variator.engines.policies import Costs, Policy, policy_named
from variator.engines.runtime import Result, Runtime
from variator.engines.scheduler import Batch, buckets_up_to, check_slo
from variator.engines.serving import Server, ServeSettings
from variator.errors import DeadlineExceeded, InputError, Overloaded, VariatorError
from variator.tasks.read import plain_texts
from variator.toolkit.bundle import Bundle
from variator.toolkit.plugin_format import Key
from variator.toolkit.rows import Input, Row

AGREEMENT = 0.02
"""How far a simulation may be from the replay, in attainment and in mean ratio (relative), before it is believed."""

MOST_TEXTS = 5000
"""Of a file, whose lengths requests have."""

SETTLE_S = 0.5
"""Pause before a workload, after the runtime was warmed up."""


@dataclass(frozen=True)
class ReplaySettings:
    """What is replayed.

    Args:
        trace: As `bench.arrivals` reads it.
        policies: As `policy_named` reads them.
        rate: Requests per second; None takes `load`.
        load: Rate as a share of what ratio 1 can serve in full batches, by the latency table.
        texts: Files of texts whose lengths requests have; without them a trace's own, else those of the package's.
        rounds: Times that every policy is replayed, in turn with the others; the run of median attainment is kept.
        replicas: Above 1: simulated with so many, at the load of one times their number, after one was validated.
    """

    trace: str = "poisson"
    policies: tuple[str, ...] = ("drain", "fixed(1)")
    slo_ms: float = 250.0
    rate: float | None = None
    load: float = 1.0
    seconds: float = 60.0
    texts: tuple[Path, ...] = ()
    engine: str = "auto"
    precision: str | None = None
    threads: int = 0
    seed: int = 0
    simulated: bool = False
    replicas: int = 1
    rounds: int = 1


def replay(
    bundle: Bundle | Path | str,
    settings: ReplaySettings,
    command: str = "",
    on_stage: Callable[[str], None] = lambda stage: None,
) -> ReplayRecord:
    """Send a workload through policies.

    Raises:
        EngineError: If nothing is built, or no latency was measured here.
        InputError: For a workload, policy or objective that is none.
    """
    check_slo(settings.slo_ms)
    if not settings.policies:
        raise InputError("no policy to replay", valid="drain, slackfit, thresholds, fixed(4)")
    if settings.replicas < 1:
        raise InputError(f"{settings.replicas} replicas", valid="1 or more; more than 1 are simulated")
    if settings.rounds < 1:
        raise InputError(f"{settings.rounds} rounds", valid="1 or more")
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    notes: list[str] = []
    with Runtime.open(bundle, settings.engine, settings.precision, settings.threads) as runtime:
        table = load_table(runtime.built, runtime.threads)
        ratios = tuple(ratio for ratio in table.ratios if ratio in bundle.ratios)
        policies = {name: policy_named(name, ratios) for name in settings.policies}
        sent = _sent(runtime, table, ratios, settings)
        load, lengths, limit = sent.load, sent.lengths, bundle.manifest.max_length
        served = []
        simulation = SimulationSettings(settings.slo_ms, ratios, limit, spread=table.spread(), seed=settings.seed)
        for name, (outcomes, row) in _replayed(runtime, policies, sent, ratios, settings, on_stage).items():
            served.append(row)
            if settings.simulated or settings.replicas > 1:
                on_stage(f"simulating {name}")
                simulation = replace(simulation, pace=outcomes.paces())
                policy = policies[name]
                one = simulate(table, policy, load, lengths, simulation)
                alike = summarise(one, load, ratios, runtime.quality, policy=name, source="simulation")
                apart = disagreement(served[-1], alike, ratios)
                if apart:
                    notes.append(f"No simulation of {name} is shown: {apart}.")
                    continue
                served.append(alike)
                if settings.replicas > 1:
                    served.append(_many(table, policy, settings, sent, simulation, ratios, runtime, name))
        engine, precision = runtime.engine, runtime.built.record.precision
        quality = {str(ratio): value for ratio, value in runtime.quality.items() if ratio in ratios}
    return ReplayRecord(
        this_machine(),
        model_of(bundle),
        command,
        package_versions(),
        engine,
        precision,
        settings.slo_ms,
        table.date,
        quality,
        _workload(sent, settings),
        served,
        notes,
    )


def _replayed(
    runtime: Runtime,
    policies: Mapping[str, Policy],
    sent: _Sent,
    ratios: tuple[Key, ...],
    settings: ReplaySettings,
    on_stage: Callable[[str], None],
) -> dict[str, tuple[Outcomes, Served]]:
    """Every policy's run, of several the one of median attainment: a machine is not as fast at all times."""
    load, found = sent.load, {name: list[tuple[Outcomes, Served]]() for name in policies}
    for turn in range(settings.rounds):
        for name, policy in policies.items():
            which = f", {turn + 1} of {settings.rounds}" if settings.rounds > 1 else ""
            on_stage(f"{len(load.times)} requests in {load.times[-1]:.0f} s through {name}{which}")
            outcomes, late, grown = replay_once(runtime, policy, load, sent.lengths, settings.slo_ms, settings.seed)
            row = summarise(
                outcomes,
                load,
                ratios,
                runtime.quality,
                policy=name,
                source="replay",
                sent_late_ms=late,
                memory_bytes=grown,
            )
            found[name].append((outcomes, row))
    return {name: median_run(runs) for name, runs in found.items()}


def median_run(runs: Sequence[tuple[Outcomes, Served]]) -> tuple[Outcomes, Served]:
    """The run of median attainment, and of quality among equals; with what all of them reached."""
    outcomes, row = sorted(runs, key=lambda run: (run[1].attainment, run[1].quality or 0.0))[(len(runs) - 1) // 2]
    reached = [(served.attainment, served.quality) for _, served in runs]
    return outcomes, replace(row, rounds=reached if len(runs) > 1 else [])


@dataclass(frozen=True)
class _Sent:
    """What is sent: when, how long; all lengths that are known, requests per second, and what ratio 1 can serve."""

    load: Arrivals
    lengths: npt.NDArray[np.int64]
    known: npt.NDArray[np.int64]
    rate: float
    capacity: float


def _sent(runtime: Runtime, table: LatencyTable, ratios: Sequence[Key], settings: ReplaySettings) -> _Sent:
    """The workload of some settings."""
    limit = runtime.bundle.manifest.max_length

    def paced(known: npt.NDArray[np.int64]) -> tuple[Arrivals, float, float]:
        capacity = capacity_per_s(table, ratios, np.minimum(known, limit), limit, settings.slo_ms)
        rate = settings.load * capacity if settings.rate is None else settings.rate
        return arrivals(settings.trace, rate, settings.seconds, settings.seed), rate, capacity

    known = _lengths(runtime, settings.texts)
    load, rate, capacity = paced(known)
    if load.lengths is None or settings.texts:
        return _Sent(load, lengths_like(known, len(load.times), limit, settings.seed), known, rate, capacity)
    known = load.lengths
    load, rate, capacity = paced(known)
    own = load.lengths if load.lengths is not None else known
    return _Sent(load, np.maximum(1, np.minimum(own, limit)), known, rate, capacity)


def _workload(sent: _Sent, settings: ReplaySettings) -> Workload:
    """For the record."""
    load = sent.load
    return Workload(
        load.name,
        round(load.rate, 3),
        round(load.rate / sent.capacity, 4),
        round(float(load.times[-1]), 3),
        len(load.times),
        round(load.peak, 2),
        round(float(sent.lengths.mean()), 2),
        int(sent.lengths.max()),
        settings.seed,
        load.step,
    )


def _many(
    table: LatencyTable,
    policy: Policy,
    settings: ReplaySettings,
    sent: _Sent,
    simulation: SimulationSettings,
    ratios: tuple[Key, ...],
    runtime: Runtime,
    name: str,
) -> Served:
    """The same kind of workload over many replicas."""
    load = arrivals(settings.trace, sent.rate * settings.replicas, settings.seconds, settings.seed)
    lengths = np.maximum(1, lengths_like(sent.known, len(load.times), simulation.limit, settings.seed))
    many = replace(simulation, replicas=settings.replicas)
    outcomes = simulate(table, policy, load, lengths, many)
    return summarise(
        outcomes,
        load,
        ratios,
        runtime.quality,
        policy=name,
        source="simulation",
        replicas=settings.replicas,
    )


def disagreement(real: Served, simulated: Served, ratios: Sequence[Key]) -> str:
    """Why a simulation is not to be believed; empty if it is."""

    def mean_ratio(served: Served) -> float:
        return sum(served.mix[str(ratio)] * level for level, ratio in enumerate(ratios)) / max(1, len(ratios) - 1)

    gap = abs(real.attainment - simulated.attainment)
    other = abs(mean_ratio(real) - mean_ratio(simulated))
    if gap > AGREEMENT:
        return f"its attainment is {simulated.attainment:.3f}, the replay's {real.attainment:.3f}"
    if other > AGREEMENT:
        return f"its mean level is {mean_ratio(simulated):.3f} of the highest, the replay's {mean_ratio(real):.3f}"
    return ""


def capacity_per_s(
    table: LatencyTable,
    ratios: Sequence[Key],
    lengths: npt.NDArray[np.int64],
    limit: int,
    slo_ms: float,
    level: int = 0,
) -> float:
    """Rows per second that a level serves in full batches, for rows of these lengths."""
    costs = Costs(table, ratios, buckets_up_to(limit))
    shares = costs.shares(slo_ms)[level]
    buckets = np.searchsorted(costs.buckets, np.minimum(lengths, limit))
    return 1e3 / float(np.mean(np.asarray(shares)[buckets]))


def _lengths(runtime: Runtime, texts: Sequence[Path]) -> npt.NDArray[np.int64]:
    """Tokens of real texts."""
    lines: list[Input] = [text for path in texts for text in plain_texts(path)[:MOST_TEXTS]] or list(sentences())
    rows = runtime.tokenise(lines, truncate=True)
    return np.array([len(row.ids) for row in rows], np.int64)


class _Tally:
    """An observer of a server: what batches were made of."""

    def __init__(self, outcomes: Outcomes, began: float) -> None:
        self.outcomes, self.began = outcomes, began

    def batch(self, batch: Batch, queue_ms: Sequence[float], compute_ms: float, tokens: int, padded: int) -> None:
        """See `Observer.batch`."""
        self.outcomes.tokens += tokens
        self.outcomes.padded += padded
        started = (batch.requests[0].arrival + queue_ms[0]) / 1e3
        self.outcomes.decisions.append((started - self.began, batch.level))
        # Until now: whoever answers requests does not run the next batch.
        self.outcomes.ran(started - self.began, batch.expected_ms, (time.perf_counter() - started) * 1e3)

    def outcome(self, outcome: str, ratio: Key | None, latency_ms: float) -> None:
        """See `Observer.outcome`."""

    def queue(self, requests: int) -> None:
        """See `Observer.queue`."""


def replay_once(
    runtime: Runtime,
    policy: Policy,
    load: Arrivals,
    lengths: npt.NDArray[np.int64],
    slo_ms: float,
    seed: int = 0,
) -> tuple[Outcomes, float, int]:
    """One policy: what became of each request, the p99 of how late they were sent in ms, and bytes that were not
    given back.
    """
    vocabulary = runtime.bundle.manifest.vocabulary
    ids = np.random.default_rng(seed).integers(5, vocabulary, int(lengths.max())).tolist()
    rows = {int(length): Row(ids[: int(length)], [0] * int(length)) for length in np.unique(lengths)}
    requests = [rows[int(length)] for length in lengths]
    outcomes = Outcomes.of(load.times)
    with runtime.serve(ServeSettings(slo_ms=slo_ms, policy=policy)) as server:
        _warm(server, rows)
        gc.collect()
        before = pss_bytes()
        began = time.perf_counter() + SETTLE_S
        server.observe(_Tally(outcomes, began))
        late = _send(server, requests, load.times.tolist(), began, outcomes)
    gc.collect()
    return outcomes, float(np.percentile(late, 99)), pss_bytes() - before


def _warm(server: Server, rows: dict[int, Row]) -> None:
    """Run something of every length at every ratio: kernels are chosen and memory is taken before anything counts."""
    for row in rows.values():
        for ratio in server.ratios:
            server.submit([row], slo_ms=60_000, min_ratio=ratio, max_ratio=ratio).result()


def _send(
    server: Server, requests: Sequence[Row], times: Sequence[float], began: float, outcomes: Outcomes
) -> list[float]:
    """Send each when it is due; ms that each was sent late."""
    late: list[float] = []
    levels = {ratio: level for level, ratio in enumerate(server.ratios)}

    def settle(index: int, due: float, future: Future[Result]) -> None:
        took = time.perf_counter() * 1e3 - due
        outcomes.latency_ms[index] = took
        error = future.exception()
        if error is None:
            result = future.result()
            outcomes.level[index] = levels[result.ratio]
            outcomes.queued_ms[index] = result.queue_ms
            outcomes.outcome[index] = SERVED if took <= server.settings.slo_ms else LATE
        else:
            outcomes.outcome[index] = DROPPED if isinstance(error, DeadlineExceeded) else FAILED

    for index, (row, at) in enumerate(zip(requests, times, strict=True)):
        due = began + at
        pause = due - time.perf_counter()
        if pause > 0:
            time.sleep(pause)
        late.append((time.perf_counter() - due) * 1e3)
        try:
            future = server.submit([row], arrival_ms=due * 1e3)
        except (DeadlineExceeded, Overloaded):
            outcomes.outcome[index] = REFUSED
            outcomes.latency_ms[index] = time.perf_counter() * 1e3 - due * 1e3
        except VariatorError:
            outcomes.outcome[index] = FAILED
        else:
            future.add_done_callback(lambda done, index=index, due=due: settle(index, due * 1e3, done))  # type: ignore[misc]
    return late
