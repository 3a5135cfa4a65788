"""MLPerf's LoadGen as an independent judge of a bundle that follows the load.

    python tools/loadgen.py BUNDLE OUT.json --scenario server --qps 200 --slo-ms 350 [--policy drain] [--seconds 60]

LoadGen (package mlcommons-loadgen) makes the queries, takes the times and says whether the result is valid; what it
prints is kept. Scenarios: single-stream (one query after the other), offline (all at once), server (Poisson, p99
within the objective). LoadGen knows no query that is given up: one that the scheduler refuses or drops is sent again
without an objective, and counts as late as it then is.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import mlperf_loadgen as lg
import numpy as np

from tools.record import begun, save
from variator.engines.latency import load_table
from variator.engines.policies import policy_named
from variator.engines.runtime import Runtime
from variator.engines.serving import Server, ServeSettings
from variator.errors import DeadlineExceeded, VariatorError
from variator.tasks.read import plain_texts
from variator.toolkit.rows import Row

SCHEMA = "variator.loadgen/1"
UNHURRIED_MS = 600_000.0
SCENARIOS = {
    "single-stream": lg.TestScenario.SingleStream,
    "offline": lg.TestScenario.Offline,
    "server": lg.TestScenario.Server,
}
FIGURES = re.compile(r"^(.+?)\s*:\s*(.+?)\s*$")


class Judged:
    """A server as LoadGen's system under test."""

    def __init__(self, server: Server, rows: list[Row], hurried: bool) -> None:
        self.server, self.rows, self.hurried = server, rows, hurried
        self.again = 0
        self.ratios: dict[str, int] = {}

    def issue(self, samples: list[Any]) -> None:
        """Queries of LoadGen."""
        for sample in samples:
            self._submit(sample.id, sample.index, None if self.hurried else UNHURRIED_MS)

    def flush(self) -> None:
        """Nothing is held back."""

    def _submit(self, number: int, index: int, slo_ms: float | None) -> None:
        try:
            future = self.server.submit([self.rows[index]], slo_ms=slo_ms)
        except DeadlineExceeded:
            self._submit_again(number, index)
            return
        except VariatorError:
            self._complete(number, "failed")
            return
        future.add_done_callback(lambda done: self._done(number, index, done))

    def _submit_again(self, number: int, index: int) -> None:
        self.again += 1
        self._submit(number, index, UNHURRIED_MS)

    def _done(self, number: int, index: int, future: Future[Any]) -> None:
        error = future.exception()
        if isinstance(error, DeadlineExceeded):
            self._submit_again(number, index)
        else:
            self._complete(number, "failed" if error else str(future.result().ratio))

    def _complete(self, number: int, ratio: str) -> None:
        """Whatever came of it: LoadGen waits for every query."""
        self.ratios[ratio] = self.ratios.get(ratio, 0) + 1
        lg.QuerySamplesComplete([lg.QuerySampleResponse(number, 0, 0)])


def judge(server: Server, rows: list[Row], chosen: argparse.Namespace) -> dict[str, Any]:
    """One scenario: what LoadGen says of it, and the ratios that answered."""
    settings = lg.TestSettings()
    settings.scenario = SCENARIOS[chosen.scenario]
    settings.mode = lg.TestMode.PerformanceOnly
    settings.min_duration_ms = int(chosen.seconds * 1e3)
    if chosen.scenario == "server":
        settings.server_target_qps = chosen.qps
        settings.server_target_latency_ns = int(chosen.slo_ms * 1e6)
        settings.server_target_latency_percentile = 0.99
    elif chosen.scenario == "offline":
        settings.offline_expected_qps = chosen.qps
    else:
        settings.single_stream_expected_latency_ns = int(5e6)
    judged = Judged(server, rows, hurried=chosen.scenario == "server")
    system = lg.ConstructSUT(judged.issue, judged.flush)
    library = lg.ConstructQSL(len(rows), len(rows), lambda samples: None, lambda samples: None)
    with tempfile.TemporaryDirectory() as logs:
        output = lg.LogOutputSettings()
        output.outdir = logs
        output.copy_summary_to_stdout = False
        log = lg.LogSettings()
        log.log_output = output
        log.enable_trace = False
        lg.StartTestWithLogSettings(system, library, settings, log)
        summary = Path(logs, "mlperf_log_summary.txt").read_text(encoding="utf-8")
    lg.DestroyQSL(library)
    lg.DestroySUT(system)
    figures = {found[1]: found[2] for line in summary.splitlines() if (found := FIGURES.match(line.strip()))}
    return {"loadgen": figures, "sent_again": judged.again, "ratios": judged.ratios, "summary": summary}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scenario", choices=SCENARIOS, default="server")
    parser.add_argument("--qps", type=float, default=100.0)
    parser.add_argument("--slo-ms", type=float, default=350.0)
    parser.add_argument("--policy", default="drain")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--precision")
    parser.add_argument("--texts", type=Path)
    chosen = parser.parse_args()
    try:
        with Runtime.open(chosen.bundle, chosen.engine, chosen.precision) as runtime:
            texts = (
                list(plain_texts(chosen.texts)[:1024]) if chosen.texts else ["a short text", "a text, a little longer"]
            )
            rows = runtime.tokenise(texts, truncate=True)
            policy = policy_named(chosen.policy, load_table(runtime.built, runtime.threads).ratios)
            slo_ms = chosen.slo_ms if chosen.scenario == "server" else UNHURRIED_MS
            with runtime.serve(ServeSettings(slo_ms=slo_ms, policy=policy, max_queue=1_000_000)) as server:
                for row in rows[:64]:
                    for ratio in server.ratios:
                        server.submit([row], slo_ms=UNHURRIED_MS, min_ratio=ratio, max_ratio=ratio).result()
                found = judge(server, rows, chosen)
            record = {
                **begun(SCHEMA, runtime),
                "scenario": chosen.scenario,
                "policy": chosen.policy,
                "mean_tokens": float(np.mean([len(row.ids) for row in rows])),
                **found,
            }
    except VariatorError as error:
        sys.exit(f"error: {error}")
    save(record, chosen.out)
    print(found["summary"])


if __name__ == "__main__":
    main()
