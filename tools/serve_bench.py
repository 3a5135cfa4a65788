"""What HTTP costs, and how it behaves beyond what the machine can do.

    python -m tools.serve_bench BUNDLE OUT.json [--engine onnxruntime] [--precision fp32] [--soak SECONDS] [--rounds 9]

- *throughput*: requests of 8 texts each at ratio 1 by several clients that always wait for their answer, over HTTP and
  in process through the same queue; in turn, medians. The clients of HTTP are a process of their own on the same cores.
- *soak*: twice what the server can answer at its highest ratio, for SECONDS, with an objective; every answer has to be
  200, or 429 with Retry-After.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tools.record import begun, save
from variator.errors import VariatorError
from variator.serving.asked import Asked
from variator.serving.service import OpenSettings, Service

SCHEMA = "variator.serve/1"
ROWS, CLIENTS, ROUND_S = 8, 8, 4.0
TEXT = "the boat came in late again and nobody on the pier had seen the light that evening because of the rain "
SLO_MS = 20_000.0
SOAK_SLO_MS, SOAK_CALIBRATION_S = 500.0, 8.0
HEAD = b"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: "


def texts(index: int) -> list[str]:
    """The texts of a request: 10 to 60 words."""
    words, found = (3 * TEXT).split(), []
    for place in range(index, index + ROWS):
        found.append(" ".join(words[place % 7 :][: 10 + 7 * place % 50]))
    return found


def in_process(service: Service, seconds: float) -> float:
    """Requests per second by threads that wait for their answers."""
    end, counts = time.perf_counter() + seconds, [0] * CLIENTS

    def ask(client: int) -> None:
        while time.perf_counter() < end:
            service.submit(texts(client + counts[client]), Asked(1, SLO_MS)).future.result()
            counts[client] += 1

    started = time.perf_counter()
    threads = [threading.Thread(target=ask, args=(client,)) for client in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - started)


async def _client(
    port: int, end: float, client: int, counts: Counter[str], every_s: float, body: dict[str, Any]
) -> None:
    """One connection: requests written by hand, so that the clients cost little.

    A request is due every so often, however long the answers take; one that is overdue is sent at once.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    index, due = 0, time.perf_counter() + every_s * random.random()
    while (now := time.perf_counter()) < end:
        if due > now:
            await asyncio.sleep(due - now)
        due += every_s
        content = json.dumps({"inputs": texts(client + index), **body}).encode()
        writer.write(HEAD + f"{len(content)}\r\n\r\n".encode() + content)
        answer = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = re.search(rb"content-length: (\d+)", answer)
        rest = await reader.readexactly(int(length[1])) if length else b""
        counts[_kind(answer, rest)] += 1
        index += 1
    writer.close()


def _kind(head: bytes, body: bytes) -> str:
    """200, 429, or what is wrong with an answer."""
    status = head.split(b" ", 2)[1].decode()
    if status == "429":
        return "429" if b"retry-after: " in head and b'"error"' in body else "429, malformed"
    return status if status != "200" or (body[:2] == b"[[" and b"x-variator-ratio: " in head) else "200, malformed"


async def clients(port: int, seconds: float, count: int, every_s: float, body: dict[str, Any]) -> dict[str, int]:
    """Answers by kind."""
    counts: Counter[str] = Counter()
    end = time.perf_counter() + seconds
    done = await asyncio.gather(
        *(_client(port, end, client, counts, every_s, body) for client in range(count)), return_exceptions=True
    )
    counts["broken connections"] += sum(isinstance(one, BaseException) for one in done)
    return dict(counts)


def over_http(port: int, seconds: float, count: int = CLIENTS, every_s: float = 0.0, **body: Any) -> dict[str, int]:
    """Answers by kind, of clients in a process of their own."""
    command = [
        sys.executable,
        "-m",
        "tools.serve_bench",
        "--clients",
        str(port),
        str(seconds),
        str(count),
        str(every_s),
    ]
    done = subprocess.run([*command, json.dumps(body)], capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout)
    return found


def measure(bundle: str, engine: str, precision: str, rounds: int, soak_s: float) -> dict[str, Any]:
    """Both parts."""
    options = ["--engine", engine, "--precision", precision, "--slo-ms", str(SLO_MS), "--port", "0"]
    command = [sys.executable, "-m", "variator", "serve", bundle, *options]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    line = server.stderr.readline()
    found = re.search(r":(\d+)$", line.strip())
    if not found:
        sys.exit(line + server.stderr.read())
    port = int(found[1])
    try:
        with Service(bundle, OpenSettings(engine, precision)) as service:
            in_process(service, 1.0)
            over_http(port, 1.0, ratio=1)
            inside, outside = [], []
            for index in range(rounds):
                inside.append(in_process(service, ROUND_S))
                outside.append(over_http(port, ROUND_S, ratio=1)["200"] / ROUND_S)
                print(f"{index}: {inside[-1]:.1f} in process, {outside[-1]:.1f} over HTTP per s", file=sys.stderr)
            info = service.info()
        rate = statistics.median(inside)
        record: dict[str, Any] = {
            "bundle": info["model_id"], "engine": info["engine"], "precision": info["precision"], "real": info["real"],
            "rows": ROWS, "clients": CLIENTS, "rounds": rounds,
            "in_process_per_s": rate, "http_per_s": statistics.median(outside),
            "share": statistics.median(out / ins for out, ins in zip(outside, inside, strict=True)),
            "shares": [round(out / ins, 4) for out, ins in zip(outside, inside, strict=True)],
        }  # fmt: skip
        if soak_s:
            capacity = over_http(port, SOAK_CALIBRATION_S, 4 * CLIENTS, ratio=info["ratios"][-1])["200"]
            capacity /= SOAK_CALIBRATION_S
            count = math.ceil(
                2 * capacity * 2 * SOAK_SLO_MS / 1e3
            )  # each can wait twice the objective and keep its pace
            before = _rss(server.pid)
            answers = over_http(port, soak_s, count, count / (2 * capacity), slo_ms=SOAK_SLO_MS)
            record["soak"] = {
                "seconds": soak_s, "connections": count, "capacity_per_s": capacity,
                "asked_per_s": sum(answers.values()) / soak_s, "slo_ms": SOAK_SLO_MS,
                "answers": answers, "memory_bytes": [before, _rss(server.pid)],
            }  # fmt: skip
        return record
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def _rss(parent: int) -> int:
    child = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()[0]
    return int(Path(f"/proc/{child}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """See the module."""
    if sys.argv[1:2] == ["--clients"]:
        port, seconds, count, every, body = sys.argv[2:]
        print(json.dumps(asyncio.run(clients(int(port), float(seconds), int(count), float(every), json.loads(body)))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("out", type=Path)
    parser.add_argument("--engine", default="onnxruntime")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--soak", type=float, default=0.0)
    given = parser.parse_args()
    try:
        found = measure(given.bundle, given.engine, given.precision, given.rounds, given.soak)
    except VariatorError as error:
        sys.exit(str(error))
    record = begun(SCHEMA) | found
    save(record, given.out)
    print(json.dumps({name: record[name] for name in ("in_process_per_s", "http_per_s", "share")}))


if __name__ == "__main__":
    main()
