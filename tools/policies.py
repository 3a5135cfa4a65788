"""Policies on the virtual clock: beside each other on machines of the same pace, and over many replicas.

    python -m tools.policies BUNDLE OUT.json --engine onnxruntime --precision fp32 [--texts FILE] [--slo-ms 350]
    python -m tools.policies table OUT.json

A real machine is not as fast at all times, so replays of two policies are never quite comparable; here both meet the
same arrivals, lengths, noise and pace. The latencies are those measured for the engine on this machine, and `variator
replay --simulate` says how far the simulator is from the real thing. Every workload is simulated at several paces (what
runs take over what the table says) and with several seeds, and the means are kept.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tools.record import begun, save
from variator.bench.arrivals import arrivals, lengths_like
from variator.bench.replay import capacity_per_s
from variator.bench.replay_record import summarise
from variator.bench.simulate import Failure, SimulationSettings, simulate
from variator.bench.wording import markdown_table
from variator.engines.latency import LatencyTable, load_table
from variator.engines.policies import Policy, policy_named
from variator.engines.runtime import Runtime
from variator.errors import VariatorError
from variator.tasks.read import plain_texts
from variator.toolkit.plugin_format import Key

SCHEMA = "variator.policies/1"
WORKLOADS = (
    ("poisson", 1.15),
    ("gamma:4", 1.15),
    ("gamma:16", 0.95),
    ("step", 0.5),
    ("gamma:64", 0.6),
)
PACES = (0.9, 1.0, 1.1, 1.2)
SEEDS = (0, 1, 2)
SECONDS = 30.0
POLICIES = ("drain", "thresholds", "slackfit", "fixed(1)")
FLEETS = ((1, 30.0), (10, 30.0), (100, 20.0), (1000, 10.0))
"""Replicas, and seconds of the workload."""

FLEET_LOAD = 1.2
FAILING = 0.05
"""Share of the replicas that are gone for the third quarter of the time, where some fail."""


@dataclass(frozen=True)
class Known:
    """What is simulated with."""

    table: LatencyTable
    ratios: tuple[Key, ...]
    lengths: npt.NDArray[np.int64]
    limit: int
    slo_ms: float
    quality: dict[Key, float]

    def capacity(self) -> float:
        """Requests per second that ratio 1 serves by the table."""
        return capacity_per_s(self.table, self.ratios, self.lengths, self.limit, self.slo_ms)

    def served(self, policy: Policy, kind: str, rate: float, seconds: float, **options: Any) -> dict[str, Any]:
        """One simulation."""
        seed = options.get("seed", 0)
        load = arrivals(kind, rate, seconds, seed)
        lengths = lengths_like(self.lengths, len(load.times), self.limit, seed)
        settings = SimulationSettings(self.slo_ms, self.ratios, self.limit, spread=self.table.spread(), **options)
        outcomes = simulate(self.table, policy, load, lengths, settings)
        row = summarise(outcomes, load, self.ratios, self.quality, policy="", source="simulation")
        return {
            "requests": len(load.times),
            "attainment": row.attainment,
            "quality": row.quality,
            "p99_ms": row.p99_ms,
            "failed": row.failed,
            "mix": row.mix,
        }


def beside(known: Known, names: Sequence[str], on_step: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Every policy on every workload at every pace: means over the seeds."""
    for kind, load in (*WORKLOADS, *((trace, 1.0) for trace in names)):
        for pace in PACES:
            on_step(f"{kind} at pace {pace}")
            for name in POLICIES:
                policy, rate = policy_named(name, known.ratios), load * known.capacity()
                found = [known.served(policy, kind, rate, SECONDS, pace=(pace,), seed=seed) for seed in SEEDS]
                yield {
                    "workload": Path(kind).name.split(".")[0],
                    "load": load,
                    "pace": pace,
                    "policy": name,
                    "attainment": round(float(np.mean([one["attainment"] for one in found])), 5),
                    "quality": round(float(np.mean([one["quality"] or 0.0 for one in found])), 5),
                }


def fleets(known: Known, on_step: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Many replicas behind a balancer that joins the shortest queue, some of them failing."""
    for replicas, seconds in FLEETS:
        gone = max(1, round(FAILING * replicas))
        broken = tuple(Failure(index, 0.5 * seconds, 0.75 * seconds) for index in range(gone))
        for failures in ((), broken) if replicas > 1 else ((),):
            for name in ("drain", "fixed(1)"):
                on_step(f"{replicas} replicas, {len(failures)} failing, {name}")
                started = time.perf_counter()
                row = known.served(
                    policy_named(name, known.ratios),
                    "poisson",
                    FLEET_LOAD * known.capacity() * replicas,
                    seconds,
                    replicas=replicas,
                    failures=failures,
                )
                took = round(time.perf_counter() - started, 1)
                yield {"replicas": replicas, "failing": len(failures), "policy": name, "took_s": took, **row}


def better(rows: Sequence[dict[str, Any]], ours: str = "drain") -> list[str]:
    """Where another policy than `ours` has more of one and no less of the other: attainment to 0.1 points, quality to
    0.0002."""
    found = []
    for row in rows:
        mine = next(
            one for one in rows if (one["workload"], one["pace"], one["policy"]) == (row["workload"], row["pace"], ours)
        )
        gained, kept = row["attainment"] - mine["attainment"], row["quality"] - mine["quality"]
        if (gained > 0.001 and kept > -0.0002) or (kept > 0.0002 and gained > -0.001):
            found.append(f"{row['policy']} on {row['workload']} at pace {row['pace']}")
    return found


def table(record: dict[str, Any]) -> str:
    """Both tables, in Markdown."""
    cells: dict[tuple[str, float], dict[str, str]] = {}
    for row in record["beside"]:
        key = f"{row['workload']}, load {row['load']}", row["pace"]
        cells.setdefault(key, {})[row["policy"]] = f"{100 * row['attainment']:.2f} % at {row['quality']:.4f}"
    lines = [[place, str(pace), *(cells[place, pace][name] for name in POLICIES)] for place, pace in cells]
    fleet = [
        [
            str(row["replicas"]), str(row["failing"]), row["policy"], f"{row['requests']:,}", str(row["failed"]),
            f"{100 * row['attainment']:.2f} %", f"{row['quality'] or 0:.4f}", f"{row['p99_ms']:.0f}",
        ]
        for row in record["fleets"]
    ]  # fmt: skip
    first = markdown_table(("workload", "pace", *POLICIES), lines, 2)
    head = ("replicas", "failing", "policy", "requests", "lost with a replica", "in time", "quality", "p99 ms")
    return f"{first}\n{markdown_table(head, fleet, 3)}"


def main() -> None:
    """See the module."""
    if sys.argv[1] == "table":
        print(table(json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))), end="")
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--precision")
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--trace", action="append", default=[])
    parser.add_argument("--slo-ms", type=float, default=350.0)
    chosen = parser.parse_args()

    def tell(step: str) -> None:
        print(step, file=sys.stderr, flush=True)

    try:
        with Runtime.open(chosen.bundle, chosen.engine, chosen.precision) as runtime:
            texts = list(plain_texts(chosen.texts)[:5000]) if chosen.texts else ["w1 w2", "w3 w4 w5 w6", "w1"]
            lengths = np.array([len(row.ids) for row in runtime.tokenise(texts, truncate=True)], np.int64)
            measured = load_table(runtime.built, runtime.threads)
            limit = runtime.bundle.manifest.max_length
            known = Known(measured, measured.ratios, lengths, limit, chosen.slo_ms, runtime.quality)
            record = {
                **begun(SCHEMA, runtime),
                "slo_ms": chosen.slo_ms,
                "table_date": measured.date,
                "capacity_per_s": known.capacity(),
                "mean_tokens": float(lengths.mean()),
                "beside": list(beside(known, chosen.trace, tell)),
                "fleets": list(fleets(known, tell)),
            }
    except VariatorError as error:
        sys.exit(f"error: {error}")
    tell(f"better than drain: {', '.join(better(record['beside'])) or 'none'}")  # type: ignore[arg-type]
    save(record, chosen.out)


if __name__ == "__main__":
    main()
