"""What NVIDIA's perf_analyzer says of a bundle in a real Triton server on this machine.

    python -m tools.triton_perf BUNDLE OUT.json --engine onnxruntime --precision fp32 [--ratio 4] [--shapes 1x32,8x32]

Over gRPC on the loopback, one client and sixteen. Its clients take their share of the processors. It comes with the
wheel of Triton's client, without two libraries that it needs: one is another wheel, one a package of Debian's, which is
unpacked without being installed.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from tools.record import begun, save
from tools.triton_server import CACHE, WHEEL, TritonServer, fetch
from variator.cli import parse_shapes
from variator.engines.runtime import Runtime
from variator.errors import EngineError, VariatorError
from variator.exporters.triton import RUNTIME, triton
from variator.exporters.triton_config import TritonSettings
from variator.files import directory_written_whole

SCHEMA = "variator.triton-perf/1"
CLIENT, CUDA, BASE64 = "tritonclient==2.51.0", "nvidia-cuda-runtime-cu12", "libb64-0d"
CLIENTS = (1, 16)
SLO_MS = 60_000


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


def measure(address: str, rows: list[list[int]], ratio: str, work: Path) -> list[dict[str, Any]]:
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


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--precision")
    parser.add_argument("--ratio", action="append", help="repeat for several; 1 and 4 by default")
    parser.add_argument("--shapes", default="1x32,8x32", help="rows x tokens of a request")
    asked = parser.parse_args()
    results: list[dict[str, Any]] = []
    try:
        with tempfile.TemporaryDirectory() as scratch:
            work = Path(scratch)
            with Runtime.open(asked.bundle, asked.engine, asked.precision) as runtime:
                built, vocabulary = runtime.built.record, runtime.bundle.manifest.vocabulary
                record = begun(SCHEMA, runtime)
            record["versions"] |= {"perf_analyzer": CLIENT, "wheel": WHEEL}
            repository = triton(
                asked.bundle, work / "models", built.backend, built.precision, TritonSettings(max_queue=10_000)
            )
            with TritonServer(repository.path, work, [RUNTIME]) as server:
                for ratio in asked.ratio or ["1", "4"]:
                    for rows, tokens in parse_shapes(asked.shapes):
                        ids = np.random.default_rng(0).integers(1, vocabulary, (rows, tokens)).tolist()
                        for found in measure(server.grpc, ids, ratio, work):
                            results.append({"rows": rows, "tokens": tokens, "ratio": ratio, **found})
                            print(json.dumps(results[-1]), file=sys.stderr)
                        save(record | {"results": results}, asked.output)
    except VariatorError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
