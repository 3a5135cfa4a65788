"""What serving under an objective costs and holds: decisions, throughput, the highest rate, and a soak.

    python tools/serving_limits.py BUNDLE OUT.json --engine onnxruntime --precision fp32 [--texts FILE] [--slo-ms 350]
        [--soak SECONDS] [--rate-seconds 12] [--soak-rate PER_S]

- *decision*: time of a policy's choice, and of taking the whole batch out, with 1,000 requests in the queue.
- *throughput*: rows per second through the queue, batches full all the time, over the same batches straight through
  the engine; in turn, medians.
- *rate*: the highest Poisson rate at which a policy holds p99 within the objective, by bisection over replays.
- *soak*: mixed lengths, two bursts a minute, every answer compared with the one that its ratio gives alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tools.record import begun, save
from variator.bench.arrivals import arrivals, lengths_like
from variator.bench.memory import pss_bytes
from variator.bench.replay import capacity_per_s, replay_once
from variator.bench.replay_record import summarise
from variator.engines.latency import load_table
from variator.engines.policies import POLICIES, Fixed, Policy, policy_named
from variator.engines.runtime import Result, Runtime
from variator.engines.scheduler import Request, Scheduler
from variator.engines.serving import Server, ServeSettings
from variator.errors import DeadlineExceeded, VariatorError
from variator.exporters.gate import full_feed
from variator.tasks.read import plain_texts
from variator.toolkit.rows import Row

SCHEMA = "variator.serving-limits/1"
WAITING = 1000
LENGTH = 64


def decisions(server: Server, slo_ms: float) -> dict[str, Any]:
    """µs by policy: the choice alone, and a whole batch taken from a full queue."""
    found = {}
    rng = np.random.default_rng(0)
    for name in POLICIES:
        costs = server.scheduler.costs
        policy = policy_named(name, costs.ratios)
        choices, batches = [], []
        for _ in range(200):
            queue = Scheduler(costs, policy, slo_ms)
            for at in range(WAITING):
                queue.submit(Request(1, int(rng.integers(5, 120)), 0.01 * at, 0.01 * at + slo_ms), 0.01 * at)
            queue.next_batch(0.01 * WAITING)  # sets the head
            started = time.perf_counter()
            policy.choose(queue, costs, 0.01 * WAITING)
            chosen = time.perf_counter()
            batch, _ = queue.next_batch(0.01 * WAITING)
            done = time.perf_counter()
            assert batch is not None
            choices.append((chosen - started) * 1e6)
            batches.append((done - chosen) * 1e6 / len(batch.requests))
        found[name] = {"choice_us": statistics.median(choices), "batch_us_per_request": statistics.median(batches)}
    return found


def throughput(runtime: Runtime, rounds: int = 15, batches: int = 10) -> dict[str, Any]:
    """Rows per second through the queue over straight through the engine, at ratio 1."""
    manifest = runtime.bundle.manifest
    row = Row(full_feed(manifest, (1, LENGTH))["input_ids"][0].tolist(), [0] * LENGTH)
    rows = 32
    straight, queued = [], []
    settings = ServeSettings(slo_ms=600_000.0, policy=_Whole(rows), max_rows=rows)
    with runtime.serve(settings) as server:
        for turn in range(rounds + 1):
            together = [row] * rows
            started = time.perf_counter()
            for _ in range(batches):
                runtime.run_together(1, together)
            middle = time.perf_counter()
            futures = [server.submit([row]) for _ in range(rows * batches)]
            for future in futures:
                future.result()
            done = time.perf_counter()
            if turn:
                straight.append(rows * batches / (middle - started))
                queued.append(rows * batches / (done - middle))
    ratios = [b / a for a, b in zip(straight, queued, strict=True)]
    return {
        "batch": rows,
        "length": LENGTH,
        "straight_rows_per_s": statistics.median(straight),
        "queued_rows_per_s": statistics.median(queued),
        "relative": statistics.median(ratios),
        "spread": float(np.ptp(np.percentile(ratios, (10, 90)))),
    }


class _Whole(Fixed):
    """Ratio 1 in batches of a size."""

    def __init__(self, rows: int) -> None:
        super().__init__(0)
        object.__setattr__(self, "rows", rows)

    def choose(self, queue: Any, costs: Any, now: float) -> tuple[int, int]:
        """See `Policy.choose`."""
        return 0, int(self.rows)  # type: ignore[attr-defined]


def highest_rate(
    runtime: Runtime,
    policies: dict[str, Policy],
    known: npt.NDArray[np.int64],
    slo_ms: float,
    seconds: float,
    on_step: Callable[[str], None],
) -> dict[str, Any]:
    """Requests per second that each policy holds p99 at: the highest that did, and the next that did not."""
    table = load_table(runtime.built, runtime.threads)
    limit = runtime.bundle.manifest.max_length
    base = capacity_per_s(table, table.ratios, known, limit, slo_ms)
    found = {}
    for name, policy in policies.items():
        trials: list[dict[str, Any]] = []

        def holds(rate: float, name: str = name, policy: Policy = policy) -> bool:
            load = arrivals("poisson", rate, seconds)
            lengths = lengths_like(known, len(load.times), limit)
            outcomes, _, _ = replay_once(runtime, policy, load, lengths, slo_ms)
            served = summarise(outcomes, load, table.ratios, runtime.quality, policy=name, source="replay")
            on_step(f"{name} at {rate:.0f}/s: {100 * served.attainment:.2f} % in time")
            trials.append({"rate": rate, "attainment": served.attainment, "quality": served.quality})  # noqa: B023
            return served.attainment >= 0.99  # what is dropped or refused counts as late

        low, high = 0.0, base
        while holds(high):
            low, high = high, 1.25 * high
        while low == 0.0 or high / low > 1.04:
            rate = 0.8 * high if low == 0.0 else (low * high) ** 0.5
            low, high = (rate, high) if holds(rate) else (low, rate)
        found[name] = {"rate_per_s": low, "not_at": high, "trials": trials}
    return found


def soak(
    runtime: Runtime, rows: list[Row], slo_ms: float, seconds: float, rate: float, on_step: Callable[[str], None]
) -> dict[str, Any]:
    """Mixed load for a while: answers that were lost, doubled or another's, and memory along the way."""
    ratios = runtime.bundle.ratios
    expected = {ratio: next(iter(runtime.infer(rows, ratio=ratio).outputs.values())) for ratio in ratios}
    counts = {"answered": 0, "refused": 0, "dropped": 0, "wrong": 0, "failed": 0}
    settled = 0
    memory: list[int] = []
    rng = np.random.default_rng(0)
    sent = 0

    def settle(index: int, future: Future[Result]) -> None:
        nonlocal settled
        settled += 1
        error = future.exception()
        if error is None:
            result = future.result()
            own = next(iter(result.outputs.values()))[0]
            counts["wrong"] += not np.allclose(own, expected[result.ratio][index], atol=1e-4)
            counts["answered"] += 1
        else:
            counts["dropped" if isinstance(error, DeadlineExceeded) else "failed"] += 1

    with runtime.serve(ServeSettings(slo_ms=slo_ms)) as server:
        began, marked = time.perf_counter(), 0.0
        while (elapsed := time.perf_counter() - began) < seconds:
            burst = 2.0 if elapsed % 30 > 22 else 0.6
            time.sleep(float(rng.exponential(1 / (rate * burst))))
            index = int(rng.integers(0, len(rows)))
            sent += 1
            try:
                future = server.submit([rows[index]])
                future.add_done_callback(lambda done, index=index: settle(index, done))  # type: ignore[misc]
            except DeadlineExceeded:
                counts["refused"] += 1
            if elapsed - marked >= 30:
                marked = elapsed
                memory.append(pss_bytes())
                on_step(f"{elapsed:.0f} s: {counts}, {memory[-1] / 1e6:.0f} MB")
    lost = sent - settled - counts["refused"]
    return {"seconds": seconds, "sent": sent, "lost": lost, **counts, "pss_bytes": memory}


def _limits(
    runtime: Runtime, known: npt.NDArray[np.int64], chosen: argparse.Namespace, tell: Callable[[str], None]
) -> dict[str, Any]:
    """All but the soak."""
    record: dict[str, Any] = {}
    with runtime.serve(ServeSettings(slo_ms=chosen.slo_ms)) as server:
        record["decision"] = decisions(server, chosen.slo_ms)
    tell(f"decisions: {record['decision']}")
    record["throughput"] = throughput(runtime)
    tell(f"throughput: {record['throughput']}")
    ratios = load_table(runtime.built, runtime.threads).ratios
    names = ("fixed(1)", f"fixed({ratios[-1]})", "drain")
    policies = {name: policy_named(name, ratios) for name in names}
    record["rate"] = highest_rate(runtime, policies, known, chosen.slo_ms, chosen.rate_seconds, tell)
    return record


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--precision")
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--slo-ms", type=float, default=350.0)
    parser.add_argument("--rate-seconds", type=float, default=12.0)
    parser.add_argument("--soak", type=float, default=60.0)
    parser.add_argument("--soak-rate", type=float, help="nothing but a soak, at so many requests per second")
    chosen = parser.parse_args()

    def tell(step: str) -> None:
        print(step, file=sys.stderr, flush=True)

    try:
        with Runtime.open(chosen.bundle, chosen.engine, chosen.precision) as runtime:
            texts = list(plain_texts(chosen.texts)[:1000]) if chosen.texts else ["w1 w2", "w3 w4 w5 w6", "w1"]
            rows = runtime.tokenise(texts, truncate=True)
            known = np.array([len(row.ids) for row in rows], np.int64)
            record: dict[str, Any] = {
                **begun(SCHEMA, runtime),
                "slo_ms": chosen.slo_ms,
                "mean_tokens": float(known.mean()),
            }
            if chosen.soak_rate is None:
                record |= _limits(runtime, known, chosen, tell)
            rate = chosen.soak_rate or record["rate"]["fixed(1)"]["rate_per_s"]
            record["soak"] = soak(runtime, rows, chosen.slo_ms, chosen.soak, rate, tell)
            tell(f"soak: {record['soak']}")
    except VariatorError as error:
        sys.exit(f"error: {error}")
    save(record, chosen.out)


if __name__ == "__main__":
    main()
