"""The two layouts against each other: what the shared graph costs in speed, and how fast a plugin goes live.

Called by `bench.run` for a bundle and its counterpart in the other layout; memory of both is in `bench.memory`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from variator.bench.latency import race_twice
from variator.bench.record import LayoutResult, Plugging
from variator.engines.built import BuiltEngine
from variator.engines.runtime import Runtime
from variator.errors import InputError
from variator.exporters.gate import full_feed
from variator.toolkit.bundle import SHARED, Bundle
from variator.toolkit.plugin_format import Key

IDLE_PLUGS, LOADED_PLUGS = 50, 200
REQUEST = 4
"""Rows of the requests that run while plugins are swapped, of 64 tokens (or the model's limit)."""


def ordered(bundle: Bundle, against: Bundle) -> tuple[Bundle, Bundle]:
    """The per-ratio bundle and the shared one.

    Raises:
        InputError: If they are not the same model in the two layouts.
    """
    if bundle.manifest.layout == against.manifest.layout:
        raise InputError(
            f"{bundle.path} and {against.path} both have layout {bundle.manifest.layout}",
            valid="one of each layout",
            fix=f"export {bundle.manifest.model} again with the other --layout",
        )
    if (bundle.manifest.backbone, bundle.manifest.task) != (against.manifest.backbone, against.manifest.task):
        raise InputError(
            f"{against.path} holds another model than {bundle.path}",
            valid=f"{bundle.manifest.model}, task {bundle.manifest.task}",
        )
    for ratio in set(bundle.ratios) & set(against.ratios):
        if bundle.ratio(ratio).plugin_sha256 != against.ratio(ratio).plugin_sha256:
            raise InputError(
                f"the plugins of ratio {ratio} in {bundle.path} and {against.path} differ",
                valid="the same plugins in both layouts",
                fix=f"export {bundle.manifest.model} again with the same plugins",
            )
    return (against, bundle) if bundle.manifest.layout == SHARED else (bundle, against)


def compare(
    per_ratio: Runtime, shared: Runtime, ratios: Sequence[Key], shape: tuple[int, int], runs: int, budget_s: float
) -> list[LayoutResult]:
    """Time both layouts in turn at one shape (batch, length).

    Every turn runs twice. The second run is compared: the same shape as just before, for both. The first one tells what
    a switch costs, because the shared engine last ran another ratio.
    """
    manifest = shared.bundle.manifest
    feed = full_feed(manifest, shape)
    engines = {(runtime, ratio): runtime.load(ratio) for ratio in ratios for runtime in (per_ratio, shared)}
    first, second = race_twice({key: partial(engine.run, feed) for key, engine in engines.items()}, runs, budget_s)
    results = []
    for ratio in ratios:
        own, other = second[per_ratio, ratio], second[shared, ratio]
        results.append(
            LayoutResult(
                engine=shared.engine,
                precision=engines[shared, ratio].precision,
                ratio=ratio,
                batch=shape[0],
                sequence=shape[1],
                per_ratio_ms=round(own.p50_ms, 3),
                shared_ms=round(other.p50_ms, 3),
                relative=round(other.p50_ms / own.p50_ms, 4),
                switched_ms=round(first[shared, ratio].p50_ms, 3),
                runs=other.runs,
                spread=round(max(own.spread, other.spread), 3),
                stable=own.stable and other.stable,
            )
        )
    return results


def _timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return (time.perf_counter() - started) * 1e3


def plugging(runtime: Runtime, ratio: Key) -> Plugging:
    """Plug the bundle's own plugin of a ratio in from its file: idle, and again and again while requests run."""
    manifest = runtime.bundle.manifest
    file = runtime.bundle.path / manifest.ratios[ratio].plugin
    length = min(64, manifest.max_length)
    request = [[1] * length] * REQUEST
    runtime.plug("bench", file)
    runtime.infer(request, ratio=ratio, plugin="bench")
    idle = [_timed(lambda: runtime.plug("bench", file)) for _ in range(IDLE_PLUGS)]
    quiet = [_timed(lambda: runtime.infer(request, ratio=ratio, plugin="bench")) for _ in range(LOADED_PLUGS)]
    done, busy = threading.Event(), list[float]()

    def client() -> None:
        while not done.is_set():
            busy.append(_timed(lambda: runtime.infer(request, ratio=ratio, plugin="bench")))

    thread = threading.Thread(target=client)
    thread.start()
    try:
        loaded = [_timed(lambda: runtime.plug("bench", file)) for _ in range(LOADED_PLUGS)]
    finally:
        done.set()
        thread.join()
    precision = runtime.load(ratio, "bench").precision
    runtime.unplug("bench")
    return Plugging(
        runtime.engine,
        precision,
        ratio,
        file.stat().st_size,
        *(round(float(value), 3) for times in (idle, loaded) for value in np.percentile(times, (50, 99))),
        *(round(float(value), 3) for times in (quiet, busy) for value in np.percentile(times, (50, 99))),
    )


def kind_of(built: BuiltEngine) -> tuple[str, str]:
    """Backend and precision of an engine."""
    return built.record.backend, built.record.precision


def pairs(ours: Sequence[BuiltEngine], theirs: Sequence[BuiltEngine]) -> list[tuple[str, str]]:
    """Backends and precisions that are built in both layouts."""
    others = {kind_of(built) for built in theirs}
    return [kind_of(built) for built in ours if kind_of(built) in others]
