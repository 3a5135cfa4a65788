"""A bundle that is served and can be replaced while it is: what every network front stands on.

Requests go through the runtime's queue (`engines.serving`), with a fixed ratio as well: its batches are shared.
"""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from variator.engines.policies import policy_named
from variator.engines.runtime import AUTO, Result, Runtime
from variator.engines.scheduler import Batch
from variator.engines.serving import Observer, Server, ServeSettings, wall_clock
from variator.errors import EngineError, InputError, VariatorError
from variator.serving.asked import Asked
from variator.toolkit.plugin_format import Key
from variator.toolkit.rows import Input, Row

if TYPE_CHECKING:
    from variator.toolkit.bundle import Manifest

    Inputs = Sequence[Input] | Callable[[Manifest], Sequence[Input]]

WARM_UP_MS = 60_000.0
"""Objective of the first run of every ratio, which nobody waits for."""

HISTORY_S, MOMENTS_S = 120, 1.0
"""How far back the history goes, and over what each of its moments is summed."""


@dataclass(frozen=True)
class OpenSettings:
    """How a bundle is opened, again for every one that replaces it.

    Args:
        engine, precision, threads: As for `Runtime.open`.
        policy: By name, as for `replay`.
        serve: Of the queue.
        verify: Whether all hashes are compared first.
    """

    engine: str = AUTO
    precision: str | None = None
    threads: int = 0
    policy: str = "drain"
    serve: ServeSettings = field(default_factory=ServeSettings)
    verify: bool = True


@dataclass
class _Moment:
    """What happened in one stretch of the history."""

    at_s: float
    requests: int = 0
    refused: int = 0
    failed: int = 0
    late: int = 0
    rows: int = 0
    compute_ms: float = 0.0
    latency_ms: float = 0.0
    ratios: dict[str, int] = field(default_factory=dict)


class History:
    """The last two minutes, for a status page: an observer that sums by the second."""

    def __init__(self) -> None:
        self._moments: deque[_Moment] = deque(maxlen=int(HISTORY_S / MOMENTS_S))
        self._lock = threading.Lock()
        self.waiting = 0
        self.ratio: Key | None = None

    def _now(self) -> _Moment:
        at = int(wall_clock() / 1e3 / MOMENTS_S) * MOMENTS_S
        if not self._moments or self._moments[-1].at_s != at:
            self._moments.append(_Moment(at))
        return self._moments[-1]

    def batch(self, batch: Batch, queue_ms: Sequence[float], compute_ms: float, tokens: int, padded: int) -> None:
        """See `Observer.batch`."""
        with self._lock:
            moment = self._now()
            moment.rows += batch.rows
            moment.compute_ms += compute_ms
            self.ratio = batch.ratio
            moment.ratios[str(batch.ratio)] = moment.ratios.get(str(batch.ratio), 0) + len(queue_ms)

    def outcome(self, outcome: str, ratio: Key | None, latency_ms: float) -> None:
        """See `Observer.outcome`."""
        with self._lock:
            moment = self._now()
            moment.requests += 1
            moment.refused += outcome in ("refused", "dropped")
            moment.failed += outcome == "failed"
            moment.late += outcome == "late"
            if outcome in ("served", "late"):
                moment.latency_ms = max(moment.latency_ms, latency_ms)

    def queue(self, requests: int) -> None:
        """See `Observer.queue`."""
        self.waiting = requests

    def moments(self) -> list[dict[str, Any]]:
        """What happened, oldest first; `ago_s` tells when."""
        now = wall_clock() / 1e3
        with self._lock:
            return [asdict(one) | {"ago_s": round(now - one.at_s, 1)} for one in self._moments]


class Opened:
    """One opened bundle with its queue, warm.

    Raises:
        BundleError, EngineError, InputError: If it cannot be served.
    """

    def __init__(self, bundle: Path, settings: OpenSettings, observers: Sequence[Observer]) -> None:
        self.runtime = Runtime.open(bundle, settings.engine, settings.precision, settings.threads)
        try:
            if settings.verify:
                self.runtime.bundle.verify()
            if self.runtime.bundle.manifest.decoder is not None:
                raise InputError(f"{bundle} writes texts, which is not served", valid="a bundle of an encoder")
            policy = policy_named(settings.policy, self.runtime.bundle.ratios)
            self.server: Server = self.runtime.serve(replace(settings.serve, policy=policy))
            for ratio in self.server.ratios:  # the first real request pays for nothing
                self.server.submit([[0]], min_ratio=ratio, max_ratio=ratio, slo_ms=WARM_UP_MS).result()
            for observer in observers:
                self.server.observe(observer)
        except BaseException:
            self.runtime.close()
            raise


class Submitted(NamedTuple):
    """A request that waits, and the manifest of the bundle that answers it, which may be replaced meanwhile."""

    future: Future[Result]
    manifest: Manifest


class Service:
    """A served bundle; use it as a context manager.

    Args:
        bundle: Its directory. `reload` opens what lies there then.
        observers: Told what happens, whichever bundle it happens to.

    Raises:
        BundleError, EngineError, InputError: If it cannot be served.
    """

    def __init__(
        self, bundle: Path | str, settings: OpenSettings | None = None, observers: Sequence[Observer] = ()
    ) -> None:
        self.path, self.settings = Path(bundle), settings or OpenSettings()
        self.history = History()
        self._observers = [self.history, *observers]
        self._reloading = threading.Lock()
        self._current = self._open()
        self.draining = False
        self.reloads = 0

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _open(self) -> Opened:
        return Opened(self.path, self.settings, self._observers)

    @property
    def manifest(self) -> Manifest:
        """Of the bundle that is served now."""
        return self._current.runtime.bundle.manifest

    @property
    def runtime(self) -> Runtime:
        """That serves now."""
        return self._current.runtime

    @property
    def server(self) -> Server:
        """The queue of today's bundle."""
        return self._current.server

    def observe(self, observer: Observer) -> None:
        """Tell one more what happens, whichever bundle it happens to."""
        self._observers = [*self._observers, observer]
        self._current.server.observe(observer)

    def submit(
        self,
        inputs: Inputs,
        asked: Asked,
        check: Callable[[Sequence[Row]], None] = lambda rows: None,
        arrival_ms: float | None = None,
    ) -> Submitted:
        """Queue a request, which one bundle reads and answers.

        Args:
            inputs: Also what makes them of the manifest of the bundle that will answer.
            check: Told the tokens; what it raises is raised.
            arrival_ms: As for `Server.submit`, on `engines.serving.wall_clock`.

        Raises:
            BundleError, EngineError, InputError, DeadlineExceeded, Overloaded: As `Server.submit`.
        """
        while True:
            opened = self._current
            manifest = opened.runtime.bundle.manifest
            options = asked.options(opened.server.ratios)
            try:
                rows = opened.runtime.tokenise(inputs(manifest) if callable(inputs) else inputs, asked.truncate)
                check(rows)
                return Submitted(opened.server.submit(rows, arrival_ms=arrival_ms, **options), manifest)
            except EngineError:
                if opened is self._current:  # else it was replaced in between
                    raise

    def reload(self) -> None:
        """Serve what lies at the bundle's path now; the old bundle answers what it was asked, for a minute at most.

        Raises:
            BundleError, EngineError, InputError: If it cannot be served; the old one goes on. One at a time.
        """
        if not self._reloading.acquire(blocking=False):
            raise EngineError("the bundle is being opened again already", fix="wait until that has ended")
        try:
            new = self._open()
            old, self._current = self._current, new
            self.reloads += 1
            try:
                old.runtime.close()
            except VariatorError as error:  # what is served is well
                warnings.warn(f"the bundle that was served before did not end: {error}", stacklevel=2)
        finally:
            self._reloading.release()

    def close(self) -> None:
        """Answer what waits, and end."""
        self.draining = True
        self._current.runtime.close()

    def info(self) -> dict[str, Any]:
        """What is served, as `/info` tells it."""
        opened = self._current
        manifest, runtime, server = opened.runtime.bundle.manifest, opened.runtime, opened.server
        return {
            "model_id": manifest.model,
            "task": manifest.task,
            "max_input_length": manifest.max_length,
            "engine": runtime.engine,
            "precision": runtime.load(1).precision,
            "ratios": [str(ratio) for ratio in server.ratios],
            "quality": {str(ratio): value for ratio, value in server.quality.items()},
            "labels": list(manifest.labels),
            "real": manifest.real,
            "backbone": manifest.backbone,
            "slo_ms": self.settings.serve.slo_ms,
            "max_queue": self.settings.serve.max_queue,
            "versions": manifest.versions,
        }

    def status(self) -> dict[str, Any]:
        """What goes on, for a status page."""
        last = self.history.ratio
        return {
            "model": self.manifest.model,
            "engine": self.runtime.picked,
            "waiting": self.history.waiting,
            "ratio": None if last is None else str(last),
            "ratios": [str(ratio) for ratio in self.server.ratios],
            "slo_ms": self.settings.serve.slo_ms,
            "draining": self.draining,
            "reloads": self.reloads,
            "moments": self.history.moments(),
        }
