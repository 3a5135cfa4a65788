"""Plans from graphs: writes what precision asks for into the graphs, and has each compiled by a process of its own."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from variator.engines.base import OnProgress
from variator.engines.profiles import ShapeProfile
from variator.engines.tensorrt.compile import Job, Range
from variator.engines.tensorrt.flavours import Flavour
from variator.engines.written import QUANTISED, written_in
from variator.errors import EngineError
from variator.toolkit.bundle import Bundle
from variator.toolkit.stack import HEAD_INPUTS, PLUGIN_INPUTS, shapes
from variator.toolkit.weights import check_external_data

CHILD = "variator.engines.tensorrt.compile"

SAID = re.compile(r"\[(?:TRT|E|!)\].*|.*(?:Error|error|Invalid|failed).*")
"""Lines of the library's output that belong into an error."""

DETAIL = 6
"""Of them."""


def compile_bundle(
    flavour: Flavour,
    bundle: Bundle,
    precision: str,
    directory: Path,
    profiles: Sequence[ShapeProfile],
    compute_capabilities: Sequence[str],
    on_progress: OnProgress,
) -> None:
    """Write one plan per graph of a bundle into `directory`: `ratio-4.plan` of `ratio-4.onnx`.

    Raises:
        EngineError: With the library's words, if it refuses a graph, crashes or is killed; or gives another precision.
    """
    cache = ""
    if flavour.timing_cache:  # of all builds of this bundle with this version
        cache = str(directory.parent / f".{flavour.name}-{flavour.load().__version__}.timing")
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        for graph in bundle.graphs:
            check_external_data(graph)
            source = written_in(bundle, graph, precision, Path(scratch))
            job = Job(
                flavour.module,
                str(source),
                str(directory / plan_name(graph.name)),
                input_ranges(bundle, graph, profiles),
                [(int(major), int(minor)) for major, minor in (text.split(".") for text in compute_capabilities)],
                cache,
            )
            found = _run(job, f"{flavour.name} {graph.name}", on_progress, _debugging(flavour, bundle, precision, job))
            if found != precision:
                raise EngineError(
                    f"{flavour.name} made a plan in {found} of {graph.name}, where {precision} was asked for",
                    fix=f"--precision {found}",
                )


def plan_name(graph: str) -> str:
    """The plan of a graph."""
    return f"{Path(graph).stem}.plan"


def input_ranges(bundle: Bundle, graph: Path, profiles: Sequence[ShapeProfile]) -> list[dict[str, Range]]:
    """The range of every input of a graph, profile by profile; a shared graph has a set of profiles for each ratio."""
    m = bundle.manifest
    tokens = [{name: _range(profile) for name in m.inputs} for profile in profiles]
    if m.shared is None:
        return tokens
    head: dict[str, Range] = {}
    if m.shared.head:
        weight, bias = HEAD_INPUTS
        most = m.shared.max_classes
        head = {weight: tuple([m.hidden_size, n] for n in (1, 2, most)), bias: tuple([n] for n in (1, 2, most))}
    if graph == bundle.graph(1):
        return [{**ranges, **head} for ranges in tokens]
    found: list[dict[str, Range]] = []
    # Ratio 1 goes through the shared graph, too, where nothing is plugged in yet.
    for ratio in dict.fromkeys([1, *(ratio for ratio in bundle.ratios if isinstance(ratio, int))]):
        rank = max(1, m.ratios[ratio].rank) if ratio in m.ratios else 1
        sizes = [shapes(m.layers, m.hidden_size, ratio, width) for width in (1, rank, m.shared.max_rank)]
        plugin: dict[str, Range] = {name: tuple(list(size[name]) for size in sizes) for name in PLUGIN_INPUTS}
        found += [{**ranges, **plugin, **head} for ranges in tokens]
    return found


def _range(profile: ShapeProfile) -> Range:
    return tuple([shape.batch, shape.length] for shape in (profile.minimum, profile.optimum, profile.maximum))


def _run(job: Job, what: str, on_progress: OnProgress, fix: str) -> str:
    """One child: its progress told, its end turned into a precision or an error."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True
        )
        precision = ""
        try:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps(asdict(job)))
            process.stdin.close()
            for line in process.stdout:
                told: Mapping[str, str | int] = json.loads(line)
                if "percent" in told:
                    on_progress(f"{what}: {told['phase']}", int(told["percent"]) / 100)
                else:
                    precision = str(told["precision"])
            process.wait()
        finally:  # Ctrl-C, too: no builder is left running
            process.kill()
            process.wait()
        if process.returncode or not precision:
            said.seek(0)
            raise EngineError(f"{what}: {_ending(process.returncode)}{_words(said.read())}", fix=fix)
    return precision


def _ending(code: int) -> str:
    """How the builder's process ended, in words."""
    if code >= 0:
        return "the builder gave up"
    name = signal.Signals(-code).name
    return f"the builder's process ended with {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def _words(said: str) -> str:
    """What the library said that explains it."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = [line for line in dict.fromkeys(lines) if SAID.fullmatch(line)] or lines
    return "".join(f"\n  {line[:400]}" for line in telling[-DETAIL:])


def _debugging(flavour: Flavour, bundle: Bundle, precision: str, job: Job) -> str:
    """The commands that repeat a build outside of this package."""
    ranges = job.profiles[0]
    shapes = " ".join(
        f"--trt-{kind}-shapes "
        + " ".join(f"{name}:[{','.join(map(str, limits[place]))}]" for name, limits in ranges.items())
        for place, kind in enumerate(("min", "opt", "max"))
    )
    graph = Path(job.graph).name
    switch = "POLYGRAPHY_USE_TENSORRT_RTX=1 " if flavour.module == "tensorrt_rtx" else ""
    written = "fp16" if precision in QUANTISED else precision
    return (
        f"export with --precision {written} and see what the library makes of it: "
        f"{switch}polygraphy convert {graph} --convert-to trt --strongly-typed {shapes} -o {plan_name(graph)}"
    )
