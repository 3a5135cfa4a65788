"""The verb `build`: a bundle's graphs -> engines for this machine, gated, keyed, reused while nothing changed.

Each engine is a directory `engines/<backend>-<precision>-<key>` with its artefacts and an `engine.json`. The key
hashes the graphs and weights, the options, the library's version and the processor's features, so what is stale
has another name and is never run.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock

import variator
from variator import machine
from variator.engines.base import Backend, Engine, Feed
from variator.engines.onnxruntime import OnnxRuntimeBackend
from variator.engines.openvino import OpenVinoBackend
from variator.errors import EngineError, InputError
from variator.exporters.gate import compare, full_feed, gate_head, load_cases
from variator.files import directory_written_whole, disk_errors, inside, sha256_of_json, write_atomically
from variator.toolkit.bundle import GATE_FILE, SHARED_GRAPH, Bundle, FileEntry, list_files
from variator.toolkit.stack import inputs_of, neutral_inputs

ENGINE_FILE = "engine.json"
ENGINE_FORMAT = 1
BACKENDS: dict[str, Backend] = {"openvino": OpenVinoBackend(), "onnxruntime": OnnxRuntimeBackend()}
"""By name, best default first."""

PROBE_SHAPE = (8, 64)
"""Batch and length of the timing that `auto` compares engines by."""


@dataclass(frozen=True)
class EngineRecord:
    """What `engine.json` says.

    Args:
        precision: As read back from the built engine.
        graphs: Hash of the bundle's graphs and weights it was built from.
        max_abs_error: By ratio, against PyTorch's fp32 outputs.
        probe_ms: By ratio, median latency at `PROBE_SHAPE` when it was built; orders engines, is no benchmark.
    """

    backend: str
    precision: str
    key: str
    version: str
    cpu: str
    graphs: str
    max_abs_error: dict[str, float]
    probe_ms: dict[str, float]
    files: dict[str, FileEntry]
    format: int = ENGINE_FORMAT


@dataclass(frozen=True)
class BuiltEngine:
    """An engine on disk that belongs to this bundle and this machine."""

    directory: Path
    record: EngineRecord

    def verify(self, *names: str) -> None:
        """Hash the named files, or all.

        Raises:
            EngineError: If one is missing or has changed.
        """
        found = {name: entry for name, entry in list_files(self.directory, *names).items() if name != ENGINE_FILE}
        recorded = {name: entry for name, entry in self.record.files.items() if not names or name in names}
        unknown = [name for name in names if name not in self.record.files]
        if found != recorded or unknown:
            wrong = unknown or sorted(n for n in found.keys() | recorded.keys() if found.get(n) != recorded.get(n))
            raise EngineError(
                f"{self.directory / wrong[0]} is missing or has changed since it was built",
                fix=f"variator build {self.directory.parent.parent} --engine {self.record.backend} "
                f"--precision {self.record.precision} --rebuild",
            )


def resolve(engine: str, precision: str | None) -> tuple[Backend, str, str]:
    """Choose a backend and a precision for this machine.

    Returns:
        The backend, the precision, and the reason for the choice.

    Raises:
        InputError: For an unknown name or a precision this machine cannot build.
        EngineError: If the asked backend is not installed.
    """
    if engine != "auto" and engine not in BACKENDS:
        raise InputError(f"unknown engine {engine!r}", valid=", ".join(["auto", *BACKENDS]))
    reasons = []
    for backend in BACKENDS.values() if engine == "auto" else [BACKENDS[engine]]:
        missing = backend.missing()
        if missing and engine != "auto":
            raise EngineError(f"engine {engine} cannot be used: {missing}")
        if missing or (engine == "auto" and precision and precision not in backend.precisions()):
            reasons.append(missing or f"{backend.name} has no {precision} here")
            continue
        available = backend.precisions()
        if precision and precision not in available:
            raise InputError(f"{backend.name} cannot build {precision!r} on this machine", valid=", ".join(available))
        choice = precision or available[0]
        why = "asked for" if precision else "the usual best of those without int8's loss"
        return backend, choice, "; ".join([*reasons, f"{backend.name} {choice}: {why}"])
    raise InputError(f"no engine can build precision {precision!r} here: {'; '.join(reasons)}")


def build_key(bundle: Bundle, backend: Backend, precision: str) -> str:
    """Hash of everything an engine depends on."""
    parts = {
        "format": ENGINE_FORMAT,
        "variator": variator.__version__,
        "backend": backend.name,
        "version": importlib.metadata.version(backend.distribution),
        "precision": precision,
        "options": backend.options(precision),
        "graphs": _graphs(bundle),
        "cpu": machine.cpu_features(),
    }
    return sha256_of_json(parts)[:16]


def _graphs(bundle: Bundle) -> str:
    """Hash of the bundle's graphs, weights and gate (whose texts calibrate int8)."""
    kinds = (".onnx", ".data", GATE_FILE)
    return sha256_of_json({name: f.sha256 for name, f in bundle.manifest.files.items() if name.endswith(kinds)})


def build(
    bundle: Bundle | Path | str,
    engine: str = "auto",
    precision: str | None = None,
    threads: int = 0,
    rebuild: bool = False,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> BuiltEngine:
    """Build an engine for all ratios of a bundle, or return the one that is there.

    Args:
        threads: For the gate and the probe; 0 means all cores.
        rebuild: Build even if an unchanged engine is there.

    Raises:
        BundleError, EngineError, InputError: If the bundle is damaged or the engine not available.
        GateError: If the engine's numbers differ from PyTorch's by more than its precision allows.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    backend, precision, reason = resolve(engine, precision)
    if bundle.manifest.precision != "fp32":
        raise InputError(
            f"{backend.name} runs no {bundle.manifest.precision}, in which the graphs of {bundle.path} are written",
            fix="variator export --precision fp32",
        )
    on_stage(reason)
    directory = bundle.path / "engines" / f"{backend.name}-{precision}-{build_key(bundle, backend, precision)}"
    with disk_errors(directory):
        directory.parent.mkdir(exist_ok=True)
    # Two processes that build the same engine: the second waits and finds it done.
    with FileLock(directory.parent / f".{backend.name}-{precision}.lock"):
        if directory.exists() and not rebuild:
            try:
                found = BuiltEngine(directory, _read_record(directory))
                found.verify()
                on_stage(f"unchanged: {directory.name}")
                return found
            except EngineError as damage:
                on_stage(f"building again: {damage.what}")
        bundle.verify()
        with directory_written_whole(directory, replace=True) as partial:
            _build(bundle, backend, precision, directory.name, partial, threads or machine.cores(), on_stage)
        built = BuiltEngine(directory, _read_record(directory))
        _remove_stale(built)
    return built


def _build(
    bundle: Bundle,
    backend: Backend,
    precision: str,
    name: str,
    directory: Path,
    threads: int,
    on_stage: Callable[[str], None],
) -> None:
    on_stage(f"compiling {len(bundle.ratios)} ratios with {backend.name} in {precision}")
    backend.compile(bundle, precision, directory)
    cases = load_cases(inside(bundle.path, GATE_FILE))
    batch, length = PROBE_SHAPE
    shape = (batch, min(length, bundle.manifest.max_length))
    probe = full_feed(bundle.manifest.inputs, bundle.manifest.vocabulary, shape)
    shared = bundle.manifest.shared
    head = gate_head(bundle.manifest.hidden_size) if shared and shared.head else None
    errors, probes = {}, {}
    for graph in bundle.graphs:
        loaded = backend.load(bundle, precision, directory, graph.name, threads)
        if loaded.precision != precision:
            raise EngineError(
                f"{backend.name} built {loaded.precision} where {precision} was asked for",
                valid=", ".join(backend.precisions()),
                fix=f"--precision {loaded.precision}",
            )
        for ratio in (ratio for ratio in bundle.ratios if bundle.graph(ratio) == graph):
            on_stage(f"checking ratio {ratio} against PyTorch")
            engine = loaded.hold(inputs_of(bundle, ratio, head))
            label = f"{backend.name} {precision} ratio {ratio}"
            errors[str(ratio)] = compare(label, precision, cases, ratio, engine.run)
            probes[str(ratio)] = _time(engine, probe)
        if graph.name == SHARED_GRAPH:  # whatever ratios there are, it has to be right without any plugin
            engine = loaded.hold(neutral_inputs(bundle, head))
            compare(f"{backend.name} {precision} {graph.name} at ratio 1", precision, cases, 1, engine.run)
        loaded.close()
    record = EngineRecord(
        backend.name,
        precision,
        name.rsplit("-", 1)[-1],
        importlib.metadata.version(backend.distribution),
        machine.cpu_name(),
        _graphs(bundle),
        errors,
        probes,
        list_files(directory),
    )
    write_atomically(directory / ENGINE_FILE, json.dumps(asdict(record), indent=1) + "\n")


def _time(engine: Engine, feed: Feed, runs: int = 7) -> float:
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        engine.run(feed)
        times.append((time.perf_counter() - started) * 1e3)
    return round(statistics.median(times), 3)


def _read_record(directory: Path) -> EngineRecord:
    try:
        data = json.loads((directory / ENGINE_FILE).read_text(encoding="utf-8"))
        files = {name: FileEntry(**entry) for name, entry in data.pop("files").items()}
        record = EngineRecord(files=files, **data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(f"{directory / ENGINE_FILE} is damaged: {error}", fix="variator build … --rebuild") from error
    if record.format != ENGINE_FORMAT or record.key != directory.name.rsplit("-", 1)[-1]:
        raise EngineError(f"{directory} does not hold the engine it is named for", fix="variator build … --rebuild")
    return record


def _remove_stale(built: BuiltEngine) -> None:
    """Remove engines of the same kind that nobody will run: of another export, or of this machine's past libraries."""
    kind = built.directory.name.rsplit("-", 1)[0]
    for other in built.directory.parent.glob(f"{kind}-*"):
        if other == built.directory:
            continue
        try:
            record = _read_record(other)
            stale = record.graphs != built.record.graphs or record.cpu == built.record.cpu
        except EngineError:
            stale = True
        if stale:
            shutil.rmtree(other, ignore_errors=True)


def find_built(bundle: Bundle, engine: str = "auto", precision: str | None = None) -> tuple[BuiltEngine, str]:
    """The built engine to serve with, and why it was picked.

    `auto` takes the fastest by the probe among fp32 and bf16; int8 costs quality and is used only when asked for.

    Raises:
        EngineError: If none that is built fits; says how to build one.
    """
    if engine != "auto" and engine not in BACKENDS:
        raise InputError(f"unknown engine {engine!r}", valid=", ".join(["auto", *BACKENDS]))
    candidates, stale = [], []
    for directory in sorted((bundle.path / "engines").glob("*-*-*")):
        name, found, _ = directory.name.rsplit("-", 2)
        wanted = engine in ("auto", name) and (
            precision == found or (precision is None and (found != "int8" or engine == name))
        )
        if not wanted or name not in BACKENDS:
            continue
        if BACKENDS[name].missing() or directory.name.rsplit("-", 1)[-1] != build_key(bundle, BACKENDS[name], found):
            stale.append(f"{name} {found}: stale or its library is missing")
            continue
        try:
            candidates.append(BuiltEngine(directory, _read_record(directory)))
        except EngineError as damage:
            stale.append(f"{name} {found}: {damage.what}")
    if not candidates:
        asked = f"--engine {engine}" + (f" --precision {precision}" if precision else "")
        what = (
            f"the engines built for {bundle.path} cannot be used ({'; '.join(stale)})"
            if stale
            else f"no engine is built for {bundle.path} that fits {asked}"
        )
        raise EngineError(
            what,
            valid="an engine built on this machine, by this library version, from this export",
            fix=f"variator build {bundle.path} {asked}",
        )
    # int8 costs quality: last, even where its backend was asked for by name.
    lossless = [candidate for candidate in candidates if candidate.record.precision != "int8"] or candidates
    best = min(lossless, key=_probe)
    others = ", ".join(f"{c.record.backend} {c.record.precision} {_probe(c):.1f} ms" for c in lossless if c is not best)
    why = f"fastest when built ({_probe(best):.1f} ms; {others})" if others else "the only one that fits"
    ignored = f"; not usable: {'; '.join(stale)}" if stale else ""
    return best, f"{best.record.backend} {best.record.precision}: {why}{ignored}"


def _probe(built: BuiltEngine) -> float:
    return statistics.fmean(built.record.probe_ms.values())


def built_summary(bundle: Bundle) -> list[str]:
    """One line per engine directory of a bundle: what it is and whether it can be run here."""
    lines = []
    for directory in sorted((bundle.path / "engines").glob("*-*-*")):
        name, precision, key = directory.name.rsplit("-", 2)
        if name in BACKENDS:
            usable = not BACKENDS[name].missing() and key == build_key(bundle, BACKENDS[name], precision)
            lines.append(f"{name} {precision}: {'built' if usable else 'stale'} ({directory.name})")
    return lines


def load_engine(bundle: Bundle, built: BuiltEngine, graph: str, threads: int = 0) -> Engine:
    """Hash what one graph of a built engine will read, and load it.

    Raises:
        EngineError, BundleError: If a file has changed, or the precision is not what the record says.
    """
    backend = BACKENDS[built.record.backend]
    if built.record.files:
        built.verify(graph, *(name for name in built.record.files if not name.endswith(".onnx")))
    else:  # compiled from the bundle's own graphs
        data = (name for name in bundle.manifest.files if name.endswith(".data"))
        bundle.verify(graph, *data)
    engine = backend.load(bundle, built.record.precision, built.directory, graph, threads or machine.cores())
    if engine.precision != built.record.precision:
        raise EngineError(
            f"{built.directory} runs in {engine.precision}, its record says {built.record.precision}",
            fix=f"variator build {bundle.path} --engine {backend.name} --rebuild",
        )
    return engine
