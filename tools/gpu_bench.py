"""Everything there is to measure on a GPU, with one command, on a host that has nothing but what it has.

    python tools/gpu_bench.py OUT.json [--work DIR] [--minilm MODEL] [--models minilm,bert-base,bert-large] [--rehearse]

Runs the tests marked `gpu`, then builds and measures each model with whichever of the engines for GPUs can be imported.
A library that refuses is written down in its own words. OUT.json is written again after every step; tests and figures
that are in it are not made again, so that a run that was stopped goes on. `--rehearse` does the same with a tiny model
and the engines of the processor, to see that every step works before a GPU's minutes are spent.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from variator.bench.record import package_versions, this_machine
from variator.bench.run import BenchSettings, bench
from variator.engines.backends import BACKENDS
from variator.engines.base import BuildOptions
from variator.engines.build import build
from variator.engines.gpu import no_gpu
from variator.errors import VariatorError
from variator.exporters.export import ExportSettings, export
from variator.files import write_atomically
from variator.toolkit.bundle import PER_RATIO, SHARED
from variator.toolkit.random_models import PREFIX

SCHEMA = "variator.gpu-bench/1"
MINILM = "all-MiniLM-L6-v2"
BATCHES, LENGTHS = (1, 8, 32, 128), (32, 128, 384, 512)
PROFILES = tuple(f"1x1:{min(32, BATCHES[-1])}x{length}:{BATCHES[-1]}x{length}" for length in LENGTHS)


@dataclass(frozen=True)
class Model:
    """One model.

    Args:
        source: As `variator export` takes it.
        precisions: To build it in, where an engine has them; the first for the shared layout, too.
        known_as: Name that its shipped plugins are found by.
    """

    name: str
    source: str
    precisions: tuple[str, ...]
    known_as: str | None = None


@dataclass(frozen=True)
class Plan:
    """What is measured with what.

    Args:
        engines: Backends, those alone that can run here.
        shapes: (batch, length) pairs.
        profiles: For engines that have them.
        tests: Arguments of pytest.
    """

    models: tuple[Model, ...]
    engines: tuple[str, ...]
    ratios: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]
    profiles: tuple[str, ...]
    tests: tuple[str, ...]
    runs: int


def real(minilm: str) -> Plan:
    """On a GPU."""
    engines = tuple(name for name in ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda") if _runs(name))
    models = (
        Model("minilm", minilm, ("fp16", "bf16", "fp32", "int8", "fp8"), None if minilm.startswith(PREFIX) else MINILM),
        Model("bert-base", "random:bert-base", ("fp16",)),
        Model("bert-large", "random:bert-large", ("fp16",)),
    )
    shapes = tuple((batch, length) for batch in BATCHES for length in LENGTHS)
    return Plan(models, engines, (2, 4, 8), shapes, PROFILES, ("-m", "gpu", "tests/engines"), 20)


def rehearsal() -> Plan:
    """On a processor: the same steps, nothing to be proud of."""
    engines = tuple(name for name in ("onnxruntime", "openvino") if _runs(name))
    models = (Model("tiny", "random:tiny", ("fp32",)),)
    return Plan(models, engines, (2, 4), ((1, 8), (2, 16)), (), ("--collect-only", "-m", "gpu", "tests/engines"), 5)


def _runs(name: str) -> bool:
    return not (BACKENDS[name].missing() or BACKENDS[name].cannot_run())


class Steps:
    """The record on disk, step by step."""

    def __init__(self, path: Path, rehearsed: bool) -> None:
        self.path = path
        self.record: dict[str, Any] = {
            "schema": SCHEMA,
            "rehearsal": rehearsed,
            "machine": asdict(this_machine()),
            "versions": package_versions(),
            "engines": {name: BACKENDS[name].missing() or BACKENDS[name].cannot_run() or "here" for name in BACKENDS},
            "steps": {},
        }
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            same = ("schema", "rehearsal", "versions")
            if any(found.get(name) != self.record[name] for name in same) or _host(found) != _host(self.record):
                sys.exit(f"error: {path} holds figures of another machine or other versions\nfix: another OUT.json")
            self.record["steps"] = found["steps"]

    def done(self, name: str) -> bool:
        """Whether a step is in the record without an error."""
        return "done" in self.record["steps"].get(name, {})

    def do(self, name: str, work: Callable[[], Any]) -> bool:
        """Do a step and write down what came of it, what it raised, too; whether it went well."""
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            self.record["steps"][name] = {"done": work()}
        except VariatorError as error:
            self.record["steps"][name] = {"error": str(error)}
        except Exception:  # noqa: BLE001 - a GPU's minutes are short: the next step is tried, this one told
            self.record["steps"][name] = {"error": traceback.format_exc()}
        write_atomically(self.path, json.dumps(self.record, indent=1) + "\n")
        told = self.record["steps"][name]
        print(f"{name}: {told.get('error', 'done')}", file=sys.stderr, flush=True)
        return "done" in told


def _host(record: dict[str, Any]) -> tuple[str, str]:
    return record["machine"]["cpu"], record["machine"]["gpu"]


def run_all(plan: Plan, steps: Steps, work: Path) -> None:
    """All steps, correctness first. Tests and figures that are in the record are not made again."""
    if not steps.done("tests"):
        steps.do("tests", lambda: _tests(plan))
    for model in plan.models:
        if not steps.done(f"{model.name}: bench"):
            _measure(model, plan, steps, work)


def _measure(model: Model, plan: Plan, steps: Steps, work: Path) -> None:
    own, shared = work / model.name, work / f"{model.name}-shared"
    for at, layout in ((own, PER_RATIO), (shared, SHARED)):
        if not at.exists() and not steps.do(
            f"{model.name}: export {layout}", partial(_export, model, plan, layout, at)
        ):
            return
    for engine in plan.engines:
        first, *others = [one for one in model.precisions if one in BACKENDS[engine].precisions()]
        for bundle, precisions in ((own, [first, *others]), (shared, [first])):
            for precision in precisions:
                steps.do(f"{bundle.name}: build {engine} {precision}", partial(_build, bundle, engine, precision, plan))
    built = tuple(
        one for one in plan.engines if any(steps.done(f"{own.name}: build {one} {p}") for p in model.precisions)
    )
    steps.do(f"{model.name}: bench", partial(_bench, model, replace(plan, engines=built), own, shared))


def _tests(plan: Plan) -> str:
    """pytest's last line; anything that failed is an error."""
    command = [sys.executable, "-m", "pytest", "-q", *plan.tests]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise VariatorError("\n".join(done.stdout.splitlines()[-40:]) or done.stderr)
    return done.stdout.splitlines()[-1]


def _export(model: Model, plan: Plan, layout: str, at: Path) -> str:
    untrained = model.source.startswith(PREFIX)
    settings = ExportSettings(plan.ratios, layout=layout, untrained=untrained)
    return str(export(model.source, at, settings, name=model.known_as).path)


def _build(bundle: Path, engine: str, precision: str, plan: Plan) -> dict[str, Any]:
    profiles = plan.profiles if engine.startswith("tensorrt") else ()
    record = build(bundle, engine, precision, options=BuildOptions(profiles)).record
    return {"device": record.device, "max_abs_error": record.max_abs_error, "parts": record.parts}


def _bench(model: Model, plan: Plan, own: Path, shared: Path) -> dict[str, Any]:
    settings = BenchSettings(
        plan.engines, plan.shapes, runs=plan.runs, budget_s=10.0, model=model.source, against=shared
    )
    record = bench(own, settings, " ".join(sys.argv), lambda stage: print(f"  {stage}", file=sys.stderr, flush=True))
    return dict(json.loads(record.to_json()))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--work", type=Path, default=Path("out/gpu"))
    parser.add_argument("--minilm", default="random:minilm")
    parser.add_argument("--models", default="")
    parser.add_argument("--rehearse", action="store_true")
    chosen = parser.parse_args()
    lacking = no_gpu()
    if lacking and not chosen.rehearse:
        sys.exit(f"error: {lacking}\nfix: run it on a machine with a GPU, or rehearse it here with --rehearse")
    plan = rehearsal() if chosen.rehearse else real(chosen.minilm)
    if chosen.models:
        wanted = chosen.models.split(",")
        plan = replace(plan, models=tuple(model for model in plan.models if model.name in wanted))
    chosen.work.mkdir(parents=True, exist_ok=True)
    steps = Steps(chosen.out, chosen.rehearse)
    run_all(plan, steps, chosen.work)
    if any("error" in step for step in steps.record["steps"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
