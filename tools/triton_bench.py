"""What Triton's front costs: the model that embeds the runtime against the same runtime in one process.

    python -m tools.triton_bench BUNDLE OUT.json --engine onnxruntime --precision fp32 [--ratio 4] [--shapes 1x32,8x32]

Beside it stands a model that only answers: what Triton, its Python backend and the client cost by themselves.
Sixteen clients at once, and one alone, over gRPC on the loopback, with requests of so many rows by so many tokens. In
process the same number of threads hand the same requests to the same queue. Both in turn, for a second each, and call
by call for the client that is alone: others on the machine then slow both. Medians and quartiles of pairs; where
the load average is above the number of cores, or the quartiles lie far apart, they say little. Clients take their
share of the processors, too: it is measured beside.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton_grpc

from tools.record import begun, save
from tools.triton_server import WHEEL, TritonServer
from variator.cli import parse_shapes
from variator.engines.runtime import Runtime
from variator.engines.scheduler import Batch
from variator.engines.serving import Server, ServeSettings
from variator.exporters.triton import RUNTIME, triton
from variator.exporters.triton_config import TritonSettings
from variator.toolkit.plugin_format import Key, parse_key
from variator.toolkit.rows import Row

SCHEMA = "variator.triton/1"
CLIENTS, PAIRS = 16, 150
SLO_MS = 60_000.0
TARGET_THROUGHPUT, TARGET_OVERHEAD_MS = 0.9, 1.0
NOTHING = {
    "config.pbtxt": """backend: "python"
max_batch_size: 64
dynamic_batching {}
input [{name: "input_ids" data_type: TYPE_INT64 dims: [-1]}]
output [{name: "embedding" data_type: TYPE_FP32 dims: [384]}]
""",
    "1/model.py": """import numpy as np
import triton_python_backend_utils as backend


class TritonPythonModel:
    def execute(self, requests):
        rows = [len(request.inputs()[0].as_numpy()) for request in requests]
        tensors = [backend.Tensor("embedding", np.zeros((count, 384), np.float32)) for count in rows]
        return [backend.InferenceResponse([tensor]) for tensor in tensors]
""",
}
"""A model that only answers."""

Call = Callable[[], Any]


class Counting:
    """An observer of batches."""

    def __init__(self) -> None:
        self.rows = self.batches = 0

    def batch(self, batch: Batch, queue_ms: Sequence[float], compute_ms: float, tokens: int, padded: int) -> None:
        """See `Observer.batch`."""
        self.rows += batch.rows
        self.batches += 1

    def outcome(self, outcome: str, ratio: Key | None, latency_ms: float) -> None:
        """See `Observer.outcome`."""

    def queue(self, requests: int) -> None:
        """See `Observer.queue`."""


def ids_of(runtime: Runtime, rows: int, length: int) -> list[list[int]]:
    """Token ids of a request."""
    rng = np.random.default_rng(rows * length)
    found: list[list[int]] = rng.integers(1, runtime.bundle.manifest.vocabulary, (rows, length)).tolist()
    return found


def in_process(server: Server, ids: list[list[int]], ratio: Key) -> Call:
    """A request to the queue of this process."""
    rows = [Row(one, [0] * len(one)) for one in ids]

    def call() -> Any:
        return server.submit(rows, slo_ms=SLO_MS, min_ratio=ratio, max_ratio=ratio).result().outputs["embedding"]

    return call


def over_grpc(client: Any, ids: list[list[int]], ratio: Key, model: str = RUNTIME) -> Call:
    """A request to Triton."""
    array = np.array(ids, np.int64)
    given = triton_grpc.InferInput("input_ids", list(array.shape), "INT64")
    given.set_data_from_numpy(array)
    parameters = {"ratio": str(ratio), "slo_ms": str(SLO_MS)}
    wanted = [triton_grpc.InferRequestedOutput("embedding")]

    def call() -> Any:
        return client.infer(model, [given], outputs=wanted, parameters=parameters).as_numpy("embedding")

    return call


def rate(calls: Sequence[Call], seconds: float) -> float:
    """Requests per second of clients that ask again as soon as they are answered."""
    end = time.perf_counter() + seconds

    def ask(call: Call) -> int:
        done = 0
        while time.perf_counter() < end:
            call()
            done += 1
        return done

    started = time.perf_counter()
    with ThreadPoolExecutor(len(calls)) as pool:
        done = sum(pool.map(ask, calls))
    return done / (time.perf_counter() - started)


def alone_ms(here: Call, there: Call, pairs: int) -> dict[str, list[float]]:
    """Latencies of one client, call by call in turn; the order changes, too."""
    taken: dict[str, list[float]] = {"triton": [], "in_process": []}
    for turn in range(pairs):
        both = [("triton", there), ("in_process", here)]
        for name, call in both if turn % 2 else both[::-1]:
            started = time.perf_counter()
            call()
            taken[name].append((time.perf_counter() - started) * 1e3)
    return taken


def nothing(server: TritonServer, ids: list[list[int]], seconds: float) -> dict[str, float]:
    """What a request costs that nothing is computed for."""
    clients = [triton_grpc.InferenceServerClient(server.grpc) for _ in range(CLIENTS)]
    calls = [over_grpc(one, ids, 1, "nothing") for one in clients]
    calls[0]()
    taken = alone_ms(lambda: None, calls[0], PAIRS)["triton"]
    found = {"one_client_ms": statistics.median(taken), "requests_per_s": rate(calls, seconds)}
    for one in clients:
        one.close()
    return found


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return [float(value) for value in np.percentile(values, (25, 50, 75))]


def counted(server: TritonServer) -> tuple[float, float]:
    """Rows and batches that Triton's metrics tell, once they are told."""
    time.sleep(1.3)
    lines = [line for line in server.metrics().splitlines() if line.startswith("variator_")]
    rows, batches = (
        sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))
        for name in ("variator_rows", "variator_batches")
    )
    return rows, batches


def measure(
    runtime: Runtime, server: TritonServer, shape: tuple[int, int], ratio: Key, rounds: int, seconds: float
) -> dict[str, Any]:
    """One shape of requests, both ways in turn."""
    ids = ids_of(runtime, *shape)
    counting = Counting()
    clients = [triton_grpc.InferenceServerClient(server.grpc) for _ in range(CLIENTS)]
    rates: dict[str, list[float]] = {"triton": [], "in_process": []}
    client_cpu = 0.0
    before = counted(server)
    with runtime.serve(ServeSettings(), [counting]) as queue:
        here, there = in_process(queue, ids, ratio), [over_grpc(one, ids, ratio) for one in clients]
        difference = float(np.abs(here() - there[0]()).max())
        calls = {"triton": there, "in_process": [here] * CLIENTS}
        for turn in range(rounds + 1):
            for name in ("triton", "in_process") if turn % 2 else ("in_process", "triton"):
                cpu = time.process_time()
                found = rate(calls[name], seconds if turn else 1.0)
                if turn:
                    rates[name].append(found)
                    client_cpu += (time.process_time() - cpu) if name == "triton" else 0.0
        after = counted(server)
        alone = alone_ms(here, there[0], PAIRS)
    for one in clients:
        one.close()
    relative = [a / b for a, b in zip(rates["triton"], rates["in_process"], strict=True)]
    overhead = [a - b for a, b in zip(alone["triton"], alone["in_process"], strict=True)]
    fastest = {name: float(np.percentile(values, 5)) for name, values in alone.items()}
    return {
        "rows": shape[0],
        "tokens": shape[1],
        "ratio": ratio,
        "clients": CLIENTS,
        "rounds": rounds,
        "requests_per_s": {name: statistics.median(values) for name, values in rates.items()},
        "relative_throughput": statistics.median(relative),
        "relative_throughput_quartiles": quartiles(relative),
        "rows_per_batch": {
            "triton": (after[0] - before[0]) / (after[1] - before[1]),
            "in_process": counting.rows / counting.batches,
        },
        "one_client_ms": {name: statistics.median(values) for name, values in alone.items()},
        "overhead_ms": statistics.median(overhead),
        "overhead_ms_quartiles": quartiles(overhead),
        "one_client_p5_ms": fastest,
        "overhead_p5_ms": fastest["triton"] - fastest["in_process"],
        "nothing": nothing(server, ids, 3 * seconds),
        "load_average": os.getloadavg()[0],
        "client_cpu_cores": client_cpu / (rounds * seconds),
        "largest_difference": difference,
    }


def _write(output: Path, runtime: Runtime, version: str, results: list[dict[str, Any]]) -> None:
    """The record so far: a run that is cut short keeps what it has measured."""
    record = begun(SCHEMA, runtime)
    record["versions"] |= {"tritonserver": version, "wheel": WHEEL}
    record["targets"] = {"relative_throughput": TARGET_THROUGHPUT, "overhead_ms": TARGET_OVERHEAD_MS}
    save(record | {"results": results}, output)


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """What is measured, and where the record goes: the same for all that measure a bundle in Triton."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--precision")
    parser.add_argument("--ratio", action="append", help="repeat for several; 1 and 4 by default")
    parser.add_argument("--shapes", default="1x32,8x32", help="rows x tokens of a request")
    return parser


def main() -> None:
    """Measure and write the record."""
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=1.0)
    asked = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as scratch, Runtime.open(asked.bundle, asked.engine, asked.precision) as runtime:
        built = runtime.built.record
        repository = triton(
            asked.bundle, Path(scratch) / "models", built.backend, built.precision, TritonSettings(max_queue=10_000)
        )
        for name, text in NOTHING.items():
            (repository.path / "nothing" / name).parent.mkdir(parents=True, exist_ok=True)
            (repository.path / "nothing" / name).write_text(text)
        with TritonServer(repository.path, Path(scratch), [RUNTIME, "nothing"]) as server:
            told = triton_grpc.InferenceServerClient(server.grpc).get_server_metadata()
            for ratio in map(parse_key, asked.ratio or ["1", "4"]):
                for shape in parse_shapes(asked.shapes):
                    found = measure(runtime, server, shape, ratio, asked.rounds, asked.seconds)
                    results.append({**found, "engine": built.backend, "precision": runtime.load(ratio).precision})
                    print(json.dumps(results[-1]), file=sys.stderr)
                    _write(asked.output, runtime, told.version, results)


if __name__ == "__main__":
    main()
