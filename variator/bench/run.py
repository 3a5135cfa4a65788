"""The verb `bench`: everything that is measured about a bundle, into one record."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from variator import machine
from variator.bench import layouts, memory
from variator.bench.latency import Timing, race
from variator.bench.quality import Judge
from variator.bench.record import (
    PEER,
    DeviceResult,
    Flops,
    LayoutResult,
    Memory,
    Plugging,
    Plugin,
    Quality,
    Record,
    Result,
    model_of,
    package_versions,
    this_machine,
)
from variator.bench.resident import Resident, measure, resident
from variator.engines.backends import BACKENDS
from variator.engines.base import DeviceEngine, Feed
from variator.engines.built import BuiltEngine, find_built
from variator.engines.gpu import gpu, no_gpu
from variator.engines.runtime import Runtime
from variator.errors import EngineError, InputError
from variator.exporters.flops import count_flops
from variator.exporters.gate import full_feed
from variator.tasks.catalogue import TASKS
from variator.tasks.read import Split, read_split
from variator.toolkit.bundle import SHARED, Bundle
from variator.toolkit.plugin_format import Key, in_order
from variator.toolkit.rows import Encode, Input, Outputs
from variator.toolkit.stack import inputs_of

if TYPE_CHECKING:
    from variator.bench.peers import Peer

QUALITY_BATCH = 32

SHARED_TASKS = 10
"""Plugins that are held at once when memory per further task is measured in the shared layout."""

PLUGGED_RATIO = 4
"""Ratio whose plugin is timed when it is plugged in, where there is one; others differ only in the size of the file."""


SHAPES = ((1, 32), (1, 128), (8, 128), (32, 64))
PICTURES = (1, 8, 32)
"""What is measured unless something else is asked for: batch and length; pictures at once."""


@dataclass(frozen=True)
class BenchSettings:
    """What to measure.

    Args:
        engines: Backends, or empty for all that are built.
        shapes: (batch, length) pairs; empty for `SHAPES`, or `PICTURES` of the one length that pictures have.
        ratios: Or empty for all.
        runs: Timed rounds per shape.
        budget_s: Seconds per shape after which no further round starts (5 rounds are always run).
        model: Directory or hub id of the checkpoint, for the peers; None leaves them out.
        pairs: STS-B file for Spearman's correlation; None leaves it out.
        threads: Per engine; 0 means all cores.
        against: The same model in the other layout: speed and memory of both are compared.
    """

    engines: tuple[str, ...] = ()
    shapes: tuple[tuple[int, int], ...] = ()
    ratios: tuple[Key, ...] = ()
    runs: int = 15
    budget_s: float = 60.0
    model: str | None = None
    pairs: Path | None = None
    threads: int = 0
    quality: bool = True
    memory: bool = True
    against: Path | None = None


@dataclass(frozen=True)
class Runner:
    """One row of the tables: something that runs a feed."""

    engine: str
    precision: str
    ratio: Key
    run: Callable[[Feed], Outputs]


def bench(
    bundle: Bundle | Path | str,
    settings: BenchSettings = BenchSettings(),
    command: str = "",
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Record:
    """Measure a bundle's built engines, and the peers if the checkpoint is at hand.

    Raises:
        EngineError: If nothing is built.
        InputError: For a shape beyond the model's limit or a ratio the bundle does not hold.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    if not settings.shapes:
        pictures = tuple((batch, bundle.manifest.max_length) for batch in PICTURES)
        settings = replace(settings, shapes=pictures if bundle.manifest.picture else SHAPES)
    _check(bundle, settings)
    pairs = read_split(TASKS["stsb"], "dev", settings.pairs) if settings.pairs else None
    threads = settings.threads or machine.cores()
    built, notes = built_engines(bundle, settings.engines)
    ratios = in_order({1, *(settings.ratios or bundle.ratios)})
    lengths = {length for _, length in settings.shapes}
    beside = {ratio: inputs_of(bundle, ratio) for ratio in ratios}
    flops = {
        (ratio, length): count_flops(bundle.graph(ratio), length, beside[ratio])
        for ratio in ratios
        for length in lengths
    }
    results: list[Result] = []
    device: list[DeviceResult] = []
    # Before anything else is loaded into this process: it would share the pages that are counted.
    memories, compared, plugged, remarks = _both_layouts(bundle, built, ratios, settings, threads, on_stage)
    peers, absent = _peers(bundle, built, settings, threads, on_stage)
    with contextlib.ExitStack() as stack:
        runtimes = [stack.enter_context(Runtime.open(bundle, *layouts.kind_of(e), threads)) for e in built]
        runners = _runners(runtimes, ratios, peers, on_stage)
        on_device = _on_device(runtimes, ratios, peers)
        for batch, length in settings.shapes:
            on_stage(f"timing {len(runners)} runners at {batch} x {length}")
            feed = full_feed(bundle.manifest, (batch, length))
            results += _time(runners, feed, (batch, length), flops, settings)
            device += measure(on_device, feed, 2 * settings.runs, settings.budget_s) if on_device else []
        quality, more = _quality(bundle, runtimes, ratios, peers, pairs, on_stage) if settings.quality else ([], [])
    return Record(
        machine=this_machine(),
        model=model_of(bundle),
        command=command,
        versions=package_versions(),
        plugins=_plugins(bundle, ratios),
        flops=_flops(settings, ratios, flops),
        results=results,
        quality=quality,
        memory=memories,
        disk=_disk(bundle),
        notes=[*_notes(bundle, settings), *notes, *remarks, *absent, *more],
        layout=bundle.manifest.layout,
        layouts=compared,
        plugging=plugged,
        device=device,
    )


def _check(bundle: Bundle, settings: BenchSettings) -> None:
    for ratio in settings.ratios:
        bundle.ratio(ratio)
    most = bundle.manifest.max_length
    least = most if bundle.manifest.picture else 1
    for batch, length in settings.shapes:
        if batch < 1 or not least <= length <= most:
            lengths = f"length 1 to {most}" if least < most else f"length {most}: the patches of a picture"
            raise InputError(f"shape {batch}x{length} cannot be measured", valid=f"batch 1 or more, {lengths}")
    if bundle.manifest.picture and (settings.model or settings.pairs):
        raise InputError("texts or plain libraries with a model of pictures", fix="leave --model and --stsb out")
    if bundle.manifest.decoder and settings.model:
        raise InputError("plain libraries beside a bundle with a decoder", fix="leave --model out, or --task hidden")


def built_engines(bundle: Bundle, names: Sequence[str]) -> tuple[list[BuiltEngine], list[str]]:
    """Every engine that is built for this bundle on this machine, of these backends or of all.

    Returns:
        The engines, and a note for each directory that cannot be used.

    Raises:
        EngineError: If there is none, or none of an asked backend.
    """
    found: list[BuiltEngine] = []
    notes: list[str] = []
    for name in names or BACKENDS:
        before = len(found)
        for precision in BACKENDS[name].precisions() if name in BACKENDS and not BACKENDS[name].missing() else ():
            try:
                found.append(find_built(bundle, name, precision)[0])
            except EngineError as error:
                if "cannot be used" in error.what:
                    notes.append(f"Not measured: {error.what}")
        if names and len(found) == before:
            find_built(bundle, name)  # raises, and says why
    if not found:
        raise EngineError(f"no engine is built for {bundle.path}", fix=f"variator build {bundle.path}")
    return found, notes


def _both_layouts(
    bundle: Bundle,
    built: Sequence[BuiltEngine],
    ratios: Sequence[Key],
    settings: BenchSettings,
    threads: int,
    on_stage: Callable[[str], None],
) -> tuple[list[Memory], list[LayoutResult], list[Plugging], list[str]]:
    """Memory, and what there is to say about layouts: with `against` of both, else of the bundle's own; and notes."""
    own = [layouts.kind_of(engine) for engine in built]
    if settings.against is None:
        memories = _memory(bundle, own, [], settings, on_stage)
        plugged = _plugging(bundle, own, threads, on_stage) if bundle.manifest.layout == SHARED else []
        return memories, [], plugged, []
    against = Bundle.open(settings.against)
    per_ratio, shared = layouts.ordered(bundle, against)
    theirs, notes = built_engines(against, settings.engines)
    kinds = layouts.pairs(built, theirs)
    if not kinds:
        raise InputError(
            f"no engine is built in both {bundle.path} and {against.path}",
            valid="the same backend and precision in both",
            fix=f"variator build {against.path} --engine {own[0][0]} --precision {own[0][1]}",
        )
    missing = in_order(set(ratios) - set(against.ratios))
    notes += [f"Layouts: ratio {ratio} is not in {against.path} and was not compared." for ratio in missing]
    memories = _memory(bundle, own, kinds, settings, on_stage) + _memory(against, kinds, kinds, settings, on_stage)
    compared = _layouts(per_ratio, shared, kinds, ratios, settings, threads, on_stage)
    return memories, compared, _plugging(shared, kinds, threads, on_stage), notes


def _memory(
    bundle: Bundle,
    kinds: Sequence[tuple[str, str]],
    with_tasks: Sequence[tuple[str, str]],
    settings: BenchSettings,
    on_stage: Callable[[str], None],
) -> list[Memory]:
    """Memory of one bundle's engines of these kinds; for those in `with_tasks` also of further plugins."""
    if not settings.memory:
        return []
    shape = max(settings.shapes, key=math.prod)
    found: list[Memory] = []
    for kind in kinds:
        on_stage(f"memory of {' '.join(kind)}, layout {bundle.manifest.layout}")
        tasks = (SHARED_TASKS if bundle.manifest.layout == SHARED else 2) if kind in with_tasks else 1
        found += memory.measure(bundle.path, *kind, shape, tasks)
    return found


def _plugging(
    shared: Bundle, kinds: Sequence[tuple[str, str]], threads: int, on_stage: Callable[[str], None]
) -> list[Plugging]:
    """Time to plug in, per engine."""
    found = []
    ratio = PLUGGED_RATIO if PLUGGED_RATIO in shared.ratios else shared.ratios[-1]
    for kind in kinds if ratio != 1 else ():
        on_stage(f"plugging into {' '.join(kind)}")
        with Runtime.open(shared, *kind, threads) as runtime:
            found.append(layouts.plugging(runtime, ratio))
    return found


def _layouts(
    per_ratio: Bundle,
    shared: Bundle,
    kinds: Sequence[tuple[str, str]],
    ratios: Sequence[Key],
    settings: BenchSettings,
    threads: int,
    on_stage: Callable[[str], None],
) -> list[LayoutResult]:
    """Speed of both layouts at the smallest and the largest shape."""
    found: list[LayoutResult] = []
    common = [ratio for ratio in ratios if ratio in per_ratio.ratios and ratio in shared.ratios]
    shapes = {min(settings.shapes, key=math.prod), max(settings.shapes, key=math.prod)}
    for kind in kinds:
        with Runtime.open(per_ratio, *kind, threads) as first, Runtime.open(shared, *kind, threads) as second:
            for shape in sorted(shapes, key=math.prod):
                on_stage(f"both layouts in {' '.join(kind)} at {shape[0]} x {shape[1]}")
                found += layouts.compare(first, second, common, shape, 2 * settings.runs, settings.budget_s)
    return found


def _peers(
    bundle: Bundle,
    built: Sequence[BuiltEngine],
    settings: BenchSettings,
    threads: int,
    on_stage: Callable[[str], None],
) -> tuple[list[Peer], list[str]]:
    """Those of the processor, of the GPU, or of both, as the engines are; and notes."""
    if settings.model is None:
        return [], []
    from variator.toolkit.checkpoint import load_backbone

    on_stage("loading the peers")
    backbone = load_backbone(settings.model, bundle.manifest.task)
    if backbone.fingerprint != bundle.manifest.backbone:
        raise InputError(
            f"{settings.model} is not the checkpoint that {bundle.path} was exported from",
            valid=f"the checkpoint of {bundle.manifest.model}",
        )
    devices, cache = {engine.record.device for engine in built}, bundle.path / "engines"
    here = None if no_gpu() else gpu().name
    peers: list[Peer] = []
    notes: list[str] = []
    if devices - {here}:
        from variator.bench.peers import load_peers

        peers += load_peers(backbone, cache, threads, on_stage)
    if here in devices:
        from variator.bench.peers_cuda import load_cuda_peers

        more, notes = load_cuda_peers(backbone, cache, on_stage)
        peers += more
    return peers, notes


def _on_device(runtimes: Sequence[Runtime], ratios: Sequence[Key], peers: Sequence[Peer]) -> list[Resident]:
    """Everything that runs what lies on a GPU."""
    found = []
    for runtime in runtimes:
        for ratio in ratios:
            engine = runtime.load(ratio)
            if isinstance(engine, DeviceEngine):
                found.append(resident(runtime.engine, ratio, engine, engine.precision))
    return [*found, *(Resident(PEER + peer.name, peer.precision, 1, peer.prepare) for peer in peers if peer.prepare)]


def _runners(
    runtimes: Sequence[Runtime], ratios: Sequence[Key], peers: Sequence[Peer], on_stage: Callable[[str], None]
) -> list[Runner]:
    runners = []
    for runtime in runtimes:
        on_stage(f"loading {runtime.engine}")
        for ratio in ratios:
            engine = runtime.load(ratio)
            runners.append(Runner(runtime.engine, engine.precision, ratio, engine.run))
    return [*runners, *(Runner(PEER + peer.name, peer.precision, 1, peer.run) for peer in peers)]


def _time(
    runners: Sequence[Runner],
    feed: Feed,
    shape: tuple[int, int],
    flops: Mapping[tuple[Key, int], Mapping[str, int]],
    settings: BenchSettings,
) -> list[Result]:
    batch, length = shape
    timings = race(
        {index: (lambda runner=runner: runner.run(feed)) for index, runner in enumerate(runners)},  # type: ignore[misc]
        settings.runs,
        budget_s=settings.budget_s,
    )
    first = {(r.engine, r.precision): timings[index] for index, r in enumerate(runners) if r.ratio == 1}
    return [
        _result(runner, timings[index], first[runner.engine, runner.precision], (batch, length), flops)
        for index, runner in enumerate(runners)
    ]


def _result(
    runner: Runner,
    timing: Timing,
    first: Timing,
    shape: tuple[int, int],
    flops: Mapping[tuple[Key, int], Mapping[str, int]],
) -> Result:
    batch, length = shape
    whole, total = flops[1, length]["total"], flops[runner.ratio, length]["total"]
    speedup = first.p50_ms / timing.p50_ms
    return Result(
        engine=runner.engine,
        precision=runner.precision,
        ratio=runner.ratio,
        batch=batch,
        sequence=length,
        p50_ms=round(timing.p50_ms, 3),
        p90_ms=round(timing.p90_ms, 3),
        p99_ms=round(timing.p99_ms, 3),
        runs=timing.runs,
        spread=round(timing.spread, 3),
        stable=timing.stable,
        speedup=round(speedup, 3),
        flops=total * batch,
        flops_saved=round(1 - total / whole, 4),
        efficiency=round(speedup / (whole / total), 3),
        throughput_per_s=round(batch / timing.p50_ms * 1e3, 1),
    )


def _quality(
    bundle: Bundle,
    runtimes: Sequence[Runtime],
    ratios: Sequence[Key],
    peers: Sequence[Peer],
    pairs: Split | None,
    on_stage: Callable[[str], None],
) -> tuple[list[Quality], list[str]]:
    """Scores of everything that runs, and a note on what they are compared with."""
    if not Judge.judges(bundle.manifest.task):
        return [], [f"No quality: there is no score for task {bundle.manifest.task} here yet."]
    encoders: list[tuple[Encode, Key, str, str]] = []
    for runtime in runtimes:
        for ratio in ratios:
            encode = _batched(lambda texts, r=runtime, k=ratio: r.infer(texts, ratio=k, truncate=True).outputs)  # type: ignore[misc]
            encoders.append((encode, ratio, runtime.engine, runtime.load(ratio).precision))
    for peer in peers:
        encode = _batched(lambda texts, p=peer: p.run(_padded_feed(runtimes[0], texts)))  # type: ignore[misc]
        encoders.append((encode, 1, PEER + peer.name, peer.precision))
    exact = [(engine, encode) for encode, ratio, engine, precision in encoders if ratio == 1 and precision == "fp32"]
    if not exact:
        return [], ["No quality: build an fp32 engine or pass the checkpoint with --model, to compare with."]
    # PyTorch's if it is at hand, else an engine that passed the gate.
    name, reference = min(exact, key=lambda item: not item[0].startswith(f"{PEER}torch"))
    judge = Judge(bundle.manifest.task, reference, pairs)
    scores: list[Quality] = []
    for encode, ratio, engine, precision in encoders:
        on_stage(f"quality of {engine} {precision} ratio {ratio}")
        scores += judge.score(encode, ratio, engine, precision)
    return scores, [f"Quality is compared with {name.removeprefix(PEER)} fp32 at ratio 1."]


def _batched(encode: Encode) -> Encode:
    """Encode in batches of similar length, rows in the order given."""

    def run(texts: Sequence[Input]) -> Outputs:
        order = sorted(range(len(texts)), key=lambda index: len(str(texts[index])))
        parts: dict[str, list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]] = {}
        for start in range(0, len(order), QUALITY_BATCH):
            for name, values in encode([texts[i] for i in order[start : start + QUALITY_BATCH]]).items():
                parts.setdefault(name, []).append(values)
        back = np.argsort(order)
        return {name: np.concatenate(values)[back] for name, values in parts.items()}

    return run


def _padded_feed(runtime: Runtime, texts: Sequence[Input]) -> Feed:
    rows = runtime.tokenise(list(texts), truncate=True)
    return runtime.feed(rows, max(len(row.ids) for row in rows))


def _plugins(bundle: Bundle, ratios: Sequence[Key]) -> list[Plugin]:
    entries = {ratio: bundle.ratio(ratio) for ratio in ratios if ratio != 1}
    return [
        Plugin(
            ratio,
            entry.rank,
            entry.activation,
            entry.plugin_parameters,
            round(entry.plugin_parameters / bundle.manifest.parameters, 5),
            entry.untrained,
            entry.training,
        )
        for ratio, entry in entries.items()
    ]


def _flops(
    settings: BenchSettings, ratios: Sequence[Key], flops: Mapping[tuple[Key, int], Mapping[str, int]]
) -> list[Flops]:
    return [
        Flops(
            ratio,
            batch,
            length,
            **{part: count * batch for part, count in flops[ratio, length].items()},
            saved=round(1 - flops[ratio, length]["total"] / flops[1, length]["total"], 4),
        )
        for batch, length in settings.shapes
        for ratio in ratios
    ]


def _disk(bundle: Bundle) -> dict[str, int]:
    sizes = {name: entry.bytes for name, entry in bundle.manifest.files.items()}
    for directory in sorted((bundle.path / "engines").glob("*-*")):
        if directory.is_dir() and not directory.name.startswith((".", "peer")):
            label = f"engines/{directory.name.rsplit('-', 1)[0]}"
            sizes[label] = sizes.get(label, 0) + sum(file.stat().st_size for file in directory.iterdir())
    return sizes


def _notes(bundle: Bundle, settings: BenchSettings) -> list[str]:
    notes = []
    if bundle.untrained:
        notes.append("Some plugins are untrained: speed only, their quality means nothing.")
    if settings.model is None:
        notes.append("No peers: pass the checkpoint with --model to measure them.")
    if settings.pairs is None and bundle.manifest.task == "embed":
        notes.append("No STS-B score: pass its file with --stsb.")
    return notes
