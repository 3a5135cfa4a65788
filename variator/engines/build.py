"""The verb `build`: a bundle's graphs -> engines for this machine, gated, keyed, reused while nothing changed."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from filelock import FileLock

from variator import machine
from variator.engines.backends import BACKENDS, resolve
from variator.engines.base import Backend, BuildOptions, Engine, Feed, OnProgress
from variator.engines.built import (
    ENGINE_FILE,
    BuiltEngine,
    EngineRecord,
    engine_directories,
    key_of,
    made_from,
    read_record,
    remove_stale,
)
from variator.engines.profiles import Shape, hold
from variator.errors import EngineError
from variator.exporters.gate import Case, compare, full_feed, gate_head, load_cases, reshaped
from variator.files import directory_written_whole, disk_errors, inside, write_atomically
from variator.toolkit.bundle import DECODER_GATE_FILE, DECODER_GRAPH, GATE_FILE, SHARED_GRAPH, Bundle, list_files
from variator.toolkit.stack import inputs_of, neutral_inputs

PROBE_SHAPE = (8, 64)
"""Batch and length of the timing that `auto` compares engines by."""


def build(
    bundle: Bundle | Path | str,
    engine: str = "auto",
    precision: str | None = None,
    threads: int = 0,
    rebuild: bool = False,
    on_stage: Callable[[str], None] = lambda stage: None,
    options: BuildOptions = BuildOptions(),  # noqa: B008 - frozen
    on_progress: OnProgress = lambda what, share: None,
) -> BuiltEngine:
    """Build an engine for all ratios of a bundle, or return the one that is there.

    An engine for another machine (`options.compute_capabilities`, or a GPU library where no GPU is) is built ahead of
    time, unchecked: built again where it can run, it is not compiled anew but checked.

    Args:
        threads: For the gate and the probe; 0 means all cores.
        rebuild: Build even if an unchanged engine is there.
        options: Of backends for GPUs.
        on_progress: Told how far a compilation is.

    Raises:
        BundleError, EngineError, InputError: If the bundle is damaged or the engine not available.
        GateError: If the engine's numbers differ from PyTorch's by more than its precision allows.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    backend, precision, reason = resolve(engine, precision)
    parts, target = made_from(bundle, backend, precision), backend.target(options, precision)
    choices = backend.choices(bundle, options)
    unable = backend.cannot_run() or backend.misfit(target)
    on_stage(reason)
    key = key_of(parts, target, choices)
    directory = bundle.path / "engines" / f"{backend.name}-{precision}-{key}"
    if not (unable or rebuild or directory.exists()):
        directory = (
            _ahead_of_time(bundle, backend, precision, parts, choices if options.profiles else None) or directory
        )
    with disk_errors(directory):
        directory.parent.mkdir(exist_ok=True)
    # Two processes that build the same engine: the second waits and finds it done.
    with FileLock(directory.parent / f".{backend.name}-{precision}.lock"):
        found = None if rebuild else _found(directory, on_stage)
        if found is not None and (found.record.gated or unable):
            on_stage(f"unchanged: {directory.name}")
            return found
        if found is None:
            bundle.verify()
            with directory_written_whole(directory, replace=True) as partial:
                on_stage(f"compiling {len(bundle.ratios)} ratios with {backend.name} in {precision}")
                backend.compile(bundle, precision, partial, options, on_progress)
                files = list_files(partial)
                device = "ahead of time" if unable else backend.device()
                record = EngineRecord(
                    backend.name, precision, key, device, parts, target, choices, False, {}, {}, files
                )
                _write(record if unable else _checked(bundle, record, partial, threads, on_stage), partial)
        else:
            device = backend.device()
            _write(_checked(bundle, replace(found.record, device=device), directory, threads, on_stage), directory)
        if unable:
            on_stage(f"built ahead of time, not checked: {unable}")
        built = BuiltEngine(directory, read_record(directory))
        remove_stale(built)
    return built


def _ahead_of_time(
    bundle: Bundle, backend: Backend, precision: str, parts: Mapping[str, str], choices: Mapping[str, str] | None
) -> Path | None:
    """An engine that was built elsewhere from the same, fits this machine, and has the choices that are asked for."""
    for directory, name, found in engine_directories(bundle):
        if (name, found) != (backend.name, precision):
            continue
        try:
            record = read_record(directory)
        except EngineError:
            continue
        if record.parts == parts and choices in (None, record.choices) and not backend.misfit(record.target):
            return directory
    return None


def _found(directory: Path, on_stage: Callable[[str], None]) -> BuiltEngine | None:
    """The undamaged engine that is there already."""
    if not directory.exists():
        return None
    try:
        found = BuiltEngine(directory, read_record(directory))
        found.verify()
    except EngineError as damage:
        on_stage(f"building again: {damage.what}")
        return None
    return found


def _write(record: EngineRecord, directory: Path) -> None:
    write_atomically(directory / ENGINE_FILE, json.dumps(asdict(record), indent=1) + "\n")


def _checked(
    bundle: Bundle, record: EngineRecord, directory: Path, threads: int, on_stage: Callable[[str], None]
) -> EngineRecord:
    """Compare an engine with PyTorch at every ratio and time it: its record with what was found."""
    backend, precision = BACKENDS[record.backend], record.precision
    threads = threads or machine.cores()
    cases = load_cases(inside(bundle.path, GATE_FILE))
    shared = bundle.manifest.shared
    head = gate_head(bundle.manifest.hidden_size) if shared and shared.head else None
    gate_of_decoder = inside(bundle.path, DECODER_GATE_FILE)
    errors, probes = {}, {}
    for graph in bundle.graphs:
        loaded = backend.load(bundle, precision, directory, graph.name, threads)
        if loaded.precision != precision:
            raise EngineError(
                f"{backend.name} built {loaded.precision} where {precision} was asked for",
                valid=", ".join(backend.precisions()),
                fix=f"--precision {loaded.precision}",
            )
        if graph.name == DECODER_GRAPH:
            on_stage("checking the decoder against PyTorch")
            label = f"{backend.name} {precision} decoder"
            errors["decoder"] = compare(label, precision, load_cases(gate_of_decoder), 1, loaded.run)
        for ratio in (ratio for ratio in bundle.ratios if bundle.graph(ratio) == graph):
            on_stage(f"checking ratio {ratio} against PyTorch")
            engine = loaded.hold(inputs_of(bundle, ratio, head))
            label = f"{backend.name} {precision} ratio {ratio}"
            errors[str(ratio)] = compare(label, precision, _fitting(cases, engine), ratio, engine.run)
            probes[str(ratio)] = _time(engine, _probe_feed(bundle, engine))
        if graph.name == SHARED_GRAPH:  # whatever ratios there are, it has to be right without any plugin
            engine = loaded.hold(neutral_inputs(bundle, head))
            label = f"{backend.name} {precision} {graph.name} at ratio 1"
            compare(label, precision, _fitting(cases, engine), 1, engine.run)
        loaded.close()
    return replace(record, gated=True, max_abs_error=errors, probe_ms=probes)


def _fitting(cases: Sequence[Case], engine: Engine) -> Sequence[Case]:
    """The gate's cases in shapes that an engine takes: as they are, or at every corner of its profiles.

    The corners three times over, in turn: a shape's second run may be captured, and its third a captured one.
    """
    if not engine.profiles:
        return cases
    corners = {corner for profile in engine.profiles for corner in profile.corners}
    return 3 * [reshaped(cases, corner.batch, corner.length) for corner in sorted(corners)]


def _probe_feed(bundle: Bundle, engine: Engine) -> Feed:
    """What an engine is timed with: `PROBE_SHAPE`, or the first optimum where its profiles do not hold that."""
    longest = bundle.manifest.max_length
    shape = Shape(PROBE_SHAPE[0], longest if bundle.manifest.picture else min(PROBE_SHAPE[1], longest))
    if not hold(engine.profiles, shape):
        shape = engine.profiles[0].optimum
    return full_feed(bundle.manifest, (shape.batch, shape.length))


def _time(engine: Engine, feed: Feed, runs: int = 7) -> float:
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        engine.run(feed)
        times.append((time.perf_counter() - started) * 1e3)
    return round(statistics.median(times), 3)
