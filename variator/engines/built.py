"""Engines on disk: what is recorded of each, which of a bundle's can be run here, loading one.

Each engine is a directory `engines/<backend>-<precision>-<key>` with its artefacts and an `engine.json`. The key hashes
the graphs and weights, the options, the library's version and the machine it is bound to, all of which the record
repeats: what does not belong here is told by what differs, before anything of it is loaded.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import variator
from variator import machine
from variator.engines.backends import BACKENDS, check_name
from variator.engines.base import Backend, Engine
from variator.errors import EngineError
from variator.files import sha256_of_json
from variator.toolkit.bundle import DECODER_GATE_FILE, GATE_FILE, Bundle, FileEntry, list_files

ENGINE_FILE = "engine.json"
LATENCY_FILE = "latency.json"
"""Beside it: how long the engine's runs take here (`engines.latency`). Measured, so no part of what is hashed."""

ENGINE_FORMAT = 2

LOSSY = ("int8", "fp8")
"""Precisions that are run only when they are asked for."""


@dataclass(frozen=True)
class EngineRecord:
    """What `engine.json` says.

    Args:
        precision: As read back from the built engine.
        key: Hash of `parts`, `target` and `choices`.
        device: The processor or GPU it was built on or for, in words.
        parts: What it was made from: format, versions, options, and the hash of the bundle's graphs and weights.
        target: The machine that it is bound to.
        choices: What the user chose.
        gated: Whether it was compared with PyTorch; one that was built ahead of time was not yet.
        max_abs_error: By ratio, and of a `decoder`, against PyTorch's fp32 outputs.
        probe_ms: By ratio, median latency at `build.PROBE_SHAPE` when it was built; orders engines, is no benchmark.
    """

    backend: str
    precision: str
    key: str
    device: str
    parts: dict[str, str]
    target: dict[str, str]
    choices: dict[str, str]
    gated: bool
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
        ours = (ENGINE_FILE, LATENCY_FILE)
        found = {name: entry for name, entry in list_files(self.directory, *names).items() if name not in ours}
        recorded = {name: entry for name, entry in self.record.files.items() if not names or name in names}
        unknown = [name for name in names if name not in self.record.files]
        if found != recorded or unknown:
            wrong = unknown or sorted(n for n in found.keys() | recorded.keys() if found.get(n) != recorded.get(n))
            raise EngineError(
                f"{self.directory / wrong[0]} is missing or has changed since it was built",
                fix=f"variator build {self.directory.parent.parent} --engine {self.record.backend} "
                f"--precision {self.record.precision} --rebuild",
            )


def made_from(bundle: Bundle, backend: Backend, precision: str) -> dict[str, str]:
    """What an engine that is built now is made from: `EngineRecord.parts`."""
    return {
        "format": str(ENGINE_FORMAT),
        "variator": variator.__version__,
        "backend": backend.name,
        "version": importlib.metadata.version(backend.distribution),
        "precision": precision,
        "options": json.dumps(backend.options(precision), sort_keys=True),
        "graphs": graphs_hash(bundle),
    }


def key_of(parts: Mapping[str, str], target: Mapping[str, str], choices: Mapping[str, str]) -> str:
    """The key of an engine: a hash of everything it depends on."""
    return sha256_of_json({"parts": parts, "target": target, "choices": choices})[:16]


def graphs_hash(bundle: Bundle) -> str:
    """`EngineRecord.parts["graphs"]`: hash of the bundle's graphs, weights and gate (whose texts calibrate int8)."""
    kinds = (".onnx", ".data", GATE_FILE, DECODER_GATE_FILE)
    return sha256_of_json({name: f.sha256 for name, f in bundle.manifest.files.items() if name.endswith(kinds)})


def why_not(bundle: Bundle, record: EngineRecord) -> str:
    """Why an engine cannot be run here, now, for this bundle; empty if it can."""
    backend = BACKENDS[record.backend]
    lacking = backend.missing() or backend.cannot_run()
    if lacking:
        return lacking
    now = made_from(bundle, backend, record.precision)
    differing = [name for name in now if record.parts.get(name) != now[name]]
    if "version" in differing:
        library = backend.distribution
        return f"stale: it was built with {library} {record.parts.get('version')}, {now['version']} is here"
    if differing:
        return f"stale: other {', '.join(differing)}"
    misfit = backend.misfit(record.target)
    if misfit:
        return f"stale: {misfit}"
    return "" if record.gated else "it was built ahead of time and not yet checked here; `build` does that at once"


def engine_directories(bundle: Bundle) -> list[tuple[Path, str, str]]:
    """The engines of a bundle: directory, backend's name and precision; of backends that are known."""
    found = []
    for directory in sorted((bundle.path / "engines").glob("*-*-*")):
        name, precision, _ = directory.name.rsplit("-", 2)
        if name in BACKENDS:
            found.append((directory, name, precision))
    return found


def read_record(directory: Path) -> EngineRecord:
    """Read `engine.json`.

    Raises:
        EngineError: If it is damaged, or not that of the engine its directory is named for.
    """
    try:
        data = json.loads((directory / ENGINE_FILE).read_text(encoding="utf-8"))
        files = {name: FileEntry(**entry) for name, entry in data.pop("files").items()}
        record = EngineRecord(files=files, **data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(f"{directory / ENGINE_FILE} is damaged: {error}", fix="variator build … --rebuild") from error
    key = key_of(record.parts, record.target, record.choices)
    named = f"{record.backend}-{record.precision}-{key}"
    if record.format != ENGINE_FORMAT or record.key != key or directory.name.split(".part-")[0].lstrip(".") != named:
        raise EngineError(f"{directory} does not hold the engine it is named for", fix="variator build … --rebuild")
    return record


def remove_stale(built: BuiltEngine) -> None:
    """Remove engines of the same kind that nobody will run: of another export, or of this machine's past libraries."""
    kind = built.directory.name.rsplit("-", 1)[0]
    for other in built.directory.parent.glob(f"{kind}-*"):
        if other == built.directory:
            continue
        try:
            record = read_record(other)
            same_graphs = record.parts["graphs"] == built.record.parts["graphs"]
            stale = not same_graphs or record.target == built.record.target
        except EngineError:
            stale = True
        if stale:
            shutil.rmtree(other, ignore_errors=True)


def find_built(bundle: Bundle, engine: str = "auto", precision: str | None = None) -> tuple[BuiltEngine, str]:
    """The built engine to serve with, and why it was picked.

    `auto` takes the fastest by the probe; int8 and fp8 cost quality and are used only when asked for.

    Raises:
        EngineError: If none that is built fits; says how to build one.
    """
    check_name(engine)
    candidates, stale = [], []
    for directory, name, found in engine_directories(bundle):
        if not asked_for(name, found, engine, precision):
            continue
        try:
            record = read_record(directory)
            reason = why_not(bundle, record)
        except EngineError as damage:
            reason = damage.what
        if reason:
            stale.append(f"{name} {found}: {reason}")
        else:
            candidates.append(BuiltEngine(directory, record))
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
    lossless = _lossless(candidates)
    best = fastest(candidates)
    others = ", ".join(f"{c.record.backend} {c.record.precision} {_probe(c):.1f} ms" for c in lossless if c is not best)
    why = f"fastest when built ({_probe(best):.1f} ms; {others})" if others else "the only one that fits"
    ignored = f"; not usable: {'; '.join(stale)}" if stale else ""
    return best, f"{best.record.backend} {best.record.precision}: {why}{ignored}"


def asked_for(name: str, found: str, engine: str, precision: str | None) -> bool:
    """Whether an engine of backend `name` in precision `found` is meant; int8 and fp8 only where they are named."""
    return engine in ("auto", name) and (
        precision == found or (precision is None and (found not in LOSSY or engine == name))
    )


def fastest(candidates: Sequence[BuiltEngine]) -> BuiltEngine:
    """The fastest by the probe."""
    return min(_lossless(candidates), key=_probe)


def _lossless(candidates: Sequence[BuiltEngine]) -> Sequence[BuiltEngine]:
    """int8 and fp8 cost quality: last, even where its backend was asked for by name."""
    return [candidate for candidate in candidates if candidate.record.precision not in LOSSY] or candidates


def _probe(built: BuiltEngine) -> float:
    return statistics.fmean(built.record.probe_ms.values())


def built_summary(bundle: Bundle) -> list[str]:
    """What each engine of a bundle is and whether it can be run here; of plans, in further lines, what they are for."""
    lines = []
    for directory, name, precision in engine_directories(bundle):
        details: list[str] = []
        try:
            record = read_record(directory)
            reason = why_not(bundle, record)
            details = _details(record) if record.choices else []
            if not reason:
                details += _told(bundle, BuiltEngine(directory, record))
        except EngineError as damage:
            reason = damage.what
        lines.append("\n  ".join([f"engine {name} {precision}: {reason or 'built'} ({directory.name})", *details]))
    return lines


def _details(record: EngineRecord) -> list[str]:
    """What a plan is: version, target, what was chosen, sizes."""
    words = {"version": record.parts["version"], **record.target, **record.choices}
    found = [f"{name.replace('_', ' ')}: {value.replace(',', ', ')}" for name, value in words.items()]
    files = ", ".join(f"{name} {entry.bytes / 1e6:.1f} MB" for name, entry in record.files.items())
    return [*found, f"files: {files}", f"checked: {'yes' if record.gated else 'not yet'}"]


def _told(bundle: Bundle, built: BuiltEngine) -> list[str]:
    """What the engine itself tells, graph by graph, where it can be asked."""
    backend, found = BACKENDS[built.record.backend], []
    for graph in bundle.graphs:
        built.verify(*backend.artefacts(graph.name, built.record.files))
        lines = backend.describe(bundle, built.record.precision, built.directory, graph.name)
        found += [f"{graph.stem}: {line}" for line in lines]
    return found


def load_engine(bundle: Bundle, built: BuiltEngine, graph: str, threads: int = 0) -> Engine:
    """Hash what one graph of a built engine will read, and load it.

    Raises:
        EngineError, BundleError: If a file has changed, or the precision is not what the record says.
    """
    backend = BACKENDS[built.record.backend]
    names = backend.artefacts(graph, built.record.files)
    if names:
        built.verify(*names)
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
