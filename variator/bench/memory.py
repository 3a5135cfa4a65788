"""Memory of resident ratios and tasks: the proportional set size of a fresh process that loads one after another.

Run as a process of its own by `bench.run`:
`python -m variator.bench.memory BUNDLE ENGINE PRECISION BATCH LENGTH TASKS`.
"""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from variator.bench.record import Memory
from variator.engines.backends import BACKENDS
from variator.engines.base import Feed
from variator.engines.cuda import free_bytes
from variator.engines.gpu import gpu, no_gpu
from variator.engines.runtime import DEFAULT, Runtime
from variator.errors import EngineError
from variator.exporters.gate import full_feed
from variator.toolkit.bundle import SHARED, Bundle
from variator.toolkit.plugin_format import Key


def pss_bytes() -> int:
    """Proportional set size of this process: shared pages count in parts."""
    for line in Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise EngineError(
        "this kernel does not report the proportional set size", valid="Linux with /proc/self/smaps_rollup"
    )


def measure(bundle: Path, engine: str, precision: str, shape: tuple[int, int], tasks: int = 1) -> list[Memory]:
    """Load a built engine's ratios, ascending, in a fresh process, and run each at `shape` (batch, length).

    Args:
        tasks: How many plugins to hold at the end, each at all ratios. In a shared layout they are plugged in; with
            per-ratio graphs each is a bundle of its own (a copy).

    Returns:
        One entry per number of resident ratios, and one per number of tasks: bytes added to the process by all of
        them together.
    """
    numbers = map(str, (*shape, tasks))
    command = [sys.executable, "-m", "variator.bench.memory", str(bundle), engine, precision, *numbers]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineError(f"measuring memory failed: {done.stderr.strip().splitlines()[-1:]}", fix=" ".join(command))
    return [Memory(**entry) for entry in json.loads(done.stdout)]


def _main(bundle_path: str, engine: str, precision: str, batch: int, length: int, tasks: int) -> None:
    bundle = Bundle.open(bundle_path)
    feed = full_feed(bundle.manifest, (batch, length))
    entries: list[Memory] = []
    with contextlib.ExitStack() as stack:
        runtime = stack.enter_context(Runtime.open(bundle, engine, precision))
        on_gpu = not no_gpu() and BACKENDS[engine].device() == gpu().name
        free = free_bytes() if on_gpu else 0  # makes the GPU's context: before anything is counted
        empty = pss_bytes()

        def enter(ratios: list[Key], task: int) -> None:
            gc.collect()
            taken = free - free_bytes() if on_gpu else None
            layout = bundle.manifest.layout
            entries.append(Memory(engine, precision, ratios, pss_bytes() - empty, layout, task, taken))

        for count, ratio in enumerate(bundle.ratios, 1):
            _run(runtime, ratio, DEFAULT, feed)
            enter(bundle.ratios[:count], 1)
        for task in range(2, tasks + 1):
            name = f"task-{task}"
            if bundle.manifest.layout == SHARED:
                runtime.plug(name, bundle.path)
                for ratio in runtime.plugins[name]:
                    _run(runtime, ratio, name, feed)
            else:
                scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=bundle.path.parent)))
                other = shutil.copytree(bundle.path, scratch / name)
                another = stack.enter_context(Runtime.open(other, engine, precision))
                for ratio in bundle.ratios:
                    _run(another, ratio, DEFAULT, feed)
            enter(bundle.ratios, task)
    print(json.dumps([asdict(entry) for entry in entries]))


def _run(runtime: Runtime, ratio: Key, plugin: str, feed: Feed) -> None:
    engine = runtime.load(ratio, plugin)
    for _ in range(3):
        engine.run(feed)


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], sys.argv[3], *map(int, sys.argv[4:]))
