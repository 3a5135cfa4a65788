"""Memory of resident ratios: the proportional set size of a fresh process that loads them one after another.

Run as a process of its own by `bench.run`: `python -m variator.bench.memory BUNDLE ENGINE PRECISION BATCH LENGTH`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from variator.bench.record import Memory
from variator.engines.build import find_built, load_engine
from variator.errors import EngineError
from variator.exporters.gate import full_feed
from variator.toolkit.bundle import Bundle


def pss_bytes() -> int:
    """Proportional set size of this process: shared pages count in parts."""
    for line in Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise EngineError(
        "this kernel does not report the proportional set size", valid="Linux with /proc/self/smaps_rollup"
    )


def measure(bundle: Path, engine: str, precision: str, shape: tuple[int, int]) -> list[Memory]:
    """Load a built engine's ratios, ascending, in a fresh process, and run each at `shape` (batch, length).

    Returns:
        One entry per number of resident ratios: bytes added to the process by all of them together.
    """
    command = [sys.executable, "-m", "variator.bench.memory", str(bundle), engine, precision, *map(str, shape)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineError(f"measuring memory failed: {done.stderr.strip().splitlines()[-1:]}", fix=" ".join(command))
    return [Memory(**entry) for entry in json.loads(done.stdout)]


def _main(bundle_path: str, engine: str, precision: str, batch: int, length: int) -> None:
    bundle = Bundle.open(bundle_path)
    built, _ = find_built(bundle, engine, precision)
    feed = full_feed(bundle.manifest.inputs, bundle.manifest.vocabulary, (batch, length))
    entries: list[dict[str, object]] = []
    loaded = []
    empty = pss_bytes()
    for ratio in bundle.ratios:
        loaded.append(load_engine(bundle, built, bundle.ratio(ratio).graph))
        for _ in range(3):
            loaded[-1].run(feed)
        ratios = bundle.ratios[: len(loaded)]
        entries.append({"engine": engine, "precision": precision, "ratios": ratios, "pss_bytes": pss_bytes() - empty})
    print(json.dumps(entries))


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
