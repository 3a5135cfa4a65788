"""What NVIDIA's perf_analyzer says of a bundle in a real Triton server on this machine.

    python -m tools.triton_perf BUNDLE OUT.json --engine onnxruntime --precision fp32 [--ratio 4] [--shapes 1x32,8x32]

Over gRPC on the loopback, one client and sixteen; before and after each of its runs the same requests go to the same
queue in this process, by as many threads. It is written in C++, and costs less than a client in Python does, but takes
its share of the processors, too. It comes with the wheel of Triton's client, without two libraries that it needs: one
is another wheel, one a package of Debian's, which is unpacked without being installed.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from tools.record import begun, save
from tools.triton_bench import in_process, parser_of, rate
from tools.triton_server import CACHE, WHEEL, TritonServer, fetch
from variator.cli import parse_shapes
from variator.engines.runtime import Runtime
from variator.engines.serving import ServeSettings
from variator.errors import EngineError, VariatorError
from variator.exporters.triton import RUNTIME, triton
from variator.exporters.triton_config import TritonSettings
from variator.files import directory_written_whole
from variator.toolkit.plugin_format import Key, parse_key

SCHEMA = "variator.triton-perf/1"
CLIENT, CUDA, BASE64 = "tritonclient==2.51.0", "nvidia-cuda-runtime-cu12", "libb64-0d"
CLIENTS = (1, 16)
SLO_MS = 60_000
ALONE, INSIDE_S = 200, 3.0
"""Requests of the thread that is alone, and seconds for throughput, in this process."""


def perf_analyzer(cache: Path = CACHE) -> tuple[str, dict[str, str]]:
    """The program, and the environment that it runs in; fetched once, then found.

    Raises:
        EngineError: If it, or a library of its, cannot be had.
    """
    place = cache / CLIENT
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / ".lock"):
        if not place.exists():
            with directory_written_whole(place) as partial:
                for wheel in (CLIENT, CUDA):
                    fetch(wheel, partial / "site")
                for command in (["apt-get", "download", BASE64], ["sh", "-c", "dpkg -x libb64*.deb ."]):
                    done = subprocess.run(command, cwd=partial, capture_output=True, text=True)
                    if done.returncode:
                        raise EngineError(f"{BASE64} cannot be had: {done.stderr.strip()[-200:]}")
                (partial / "site" / "bin" / "perf_analyzer").chmod(0o755)
    libraries = {path.parent for name in ("libcudart.so.12", "libb64.so.0d") for path in place.rglob(name)}
    return str(place / "site" / "bin" / "perf_analyzer"), {
        **os.environ,
        "LD_LIBRARY_PATH": ":".join(map(str, sorted(libraries))),
    }


def measure(address: str, rows: list[list[int]], ratio: Key, work: Path) -> list[dict[str, Any]]:
    """Throughput and latency by number of clients."""
    program, environment = perf_analyzer()
    data, table = work / "data.json", work / "latency.csv"
    inputs = [{"input_ids": {"content": row, "shape": [len(row)]}} for row in rows]
    data.write_text(json.dumps({"data": inputs}), encoding="utf-8")
    command = [
        program, "-m", RUNTIME, "-i", "grpc", "-u", address, "-b", str(len(rows)), f"--input-data={data}",
        f"--shape=input_ids:{len(rows[0])}", f"--request-parameter=ratio:{ratio}:string",
        f"--request-parameter=slo_ms:{SLO_MS}:string", "--percentile=50", "--stability-percentage=15",
        "--concurrency-range", f"{CLIENTS[0]}:{CLIENTS[1]}:{CLIENTS[1] - CLIENTS[0]}", f"-f{table}",
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode or not table.exists():
        raise EngineError(f"perf_analyzer failed: {(done.stderr or done.stdout).strip()[-600:]}")
    found = []
    for line in csv.DictReader(table.read_text(encoding="utf-8").splitlines()):
        row: dict[str, Any] = {"clients": int(line["Concurrency"]), "rows_per_s": float(line["Inferences/Second"])}
        row |= {f"p{q}_ms": float(line[f"p{q} latency"]) / 1e3 for q in (50, 90, 99)}
        found.append(row)
    return found


def inside(runtime: Runtime, rows: list[list[int]], ratio: Key) -> dict[int, dict[str, float]]:
    """The same in this process, by number of threads."""
    found = {}
    with runtime.serve(ServeSettings()) as queue:
        call = in_process(queue, rows, ratio)
        rate([call], 0.5)
        taken = []
        for _ in range(ALONE):
            started = time.perf_counter()
            call()
            taken.append((time.perf_counter() - started) * 1e3)
        for clients in CLIENTS:
            found[clients] = {"rows_per_s": len(rows) * rate([call] * clients, INSIDE_S)}
        found[1]["p50_ms"] = statistics.median(taken)
    return found


def compared(found: list[dict[str, Any]], around: list[dict[int, dict[str, float]]]) -> list[dict[str, Any]]:
    """With what the process itself reached before and after."""
    for row in found:
        own = [one[row["clients"]] for one in around]
        row["in_process_rows_per_s"] = [one["rows_per_s"] for one in own]
        row["relative_throughput"] = row["rows_per_s"] / statistics.mean(row["in_process_rows_per_s"])
        if row["clients"] == 1:
            row["in_process_p50_ms"] = [one["p50_ms"] for one in own]
            row["overhead_ms"] = row["p50_ms"] - statistics.mean(row["in_process_p50_ms"])
    return found


def main() -> None:
    """Measure and write the record."""
    asked = parser_of(__doc__).parse_args()
    results: list[dict[str, Any]] = []
    try:
        with contextlib.ExitStack() as stack:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            runtime = stack.enter_context(Runtime.open(asked.bundle, asked.engine, asked.precision))
            built, vocabulary = runtime.built.record, runtime.bundle.manifest.vocabulary
            record = begun(SCHEMA, runtime)
            record["versions"] |= {"perf_analyzer": CLIENT, "wheel": WHEEL}
            repository = triton(
                asked.bundle, work / "models", built.backend, built.precision, TritonSettings(max_queue=10_000)
            )
            with TritonServer(repository.path, work, [RUNTIME]) as server:
                for ratio in map(parse_key, asked.ratio or ["1", "4"]):
                    for rows, tokens in parse_shapes(asked.shapes):
                        ids = np.random.default_rng(0).integers(1, vocabulary, (rows, tokens)).tolist()
                        before = inside(runtime, ids, ratio)
                        measured = measure(server.grpc, ids, ratio, work)
                        for found in compared(measured, [before, inside(runtime, ids, ratio)]):
                            results.append({"rows": rows, "tokens": tokens, "ratio": ratio, **found})
                            print(json.dumps(results[-1]), file=sys.stderr)
                        save(record | {"results": results}, asked.output)
    except VariatorError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
