"""Past one machine: a Ray Serve application of replicas that follow the load, and come and go with it. Extra `ray`.

    serve run variator.serving.ray:application bundle=/models/minilm slo_ms=350 max_replicas=8

Every replica is a `Service` with its own queue, which raises the ratio; `serving.scaling` decides over what they tell
when that is not enough. HTTP is that of `variator serve`. Ray must not queue in front of a replica, because a queue
that the scheduler does not see raises no ratio: replicas take more than fits into their queues, and refuse the rest.
"""

from __future__ import annotations

import asyncio
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve import metrics
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from variator import machine
from variator.engines.metrics import METRICS, VERBS, MetricsObserver
from variator.engines.runtime import Result
from variator.errors import EngineError, InputError
from variator.serving.asked import FIELDS, asked_from
from variator.serving.http import HEADER, HttpSettings, create_app
from variator.serving.process import TOKEN, ServerSettings
from variator.serving.scaling import WINDOW_S, Replicas, Scaling, State, Told, decide
from variator.serving.service import Service
from variator.toolkit.plugin_format import Key, parse_key
from variator.toolkit.rows import Input

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application
    from ray.serve.config import AutoscalingContext
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

ROOM = 1024
"""Requests that a replica takes beyond those that may wait, so that it is the one that refuses."""

TELL_S = 2.0
"""How often a replica tells how it is."""

SHARED = "variator_"
"""In front of the names of what a replica tells."""


@dataclass(frozen=True)
class RaySettings:
    """An application.

    Args:
        server: What every replica serves; host and port are Ray's.
        scaling: When replicas come and go.
        min_replicas, max_replicas: Bounds; the same for a fixed number.
        num_cpus, num_gpus: That a replica takes of its node; processors None: those its engine uses.
        high_ratio: The lowest of the ratios that count as high; None is the bundle's highest.
    """

    server: ServerSettings
    scaling: Scaling = field(default_factory=Scaling)
    min_replicas: int = 1
    max_replicas: int = 1
    num_cpus: float | None = None
    num_gpus: float = 0.0
    high_ratio: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise InputError(f"{self.min_replicas} to {self.max_replicas} replicas", valid="1 or more, least to most")
        for name in ("num_cpus", "num_gpus"):
            if (getattr(self, name) or 0) < 0:
                raise InputError(f"{name} is {getattr(self, name)}", valid="0 or more")

    @staticmethod
    def read(arguments: Mapping[str, Any]) -> RaySettings:
        """From names and values as `serve run` takes them: those of all settings, in one row.

        Raises:
            InputError: For a name that is none, or a value that does not fit.
        """
        kinds = {"server": ServerSettings, "http": HttpSettings, "scaling": Scaling, "own": RaySettings}
        not_here = {"host", "port", "drain_s", "http", "token", "server", "scaling"}
        homes = {one.name: (home, one) for home, kind in kinds.items() for one in fields(kind)}
        homes = {name: found for name, found in homes.items() if name not in not_here}
        given: dict[str, dict[str, Any]] = {home: {} for home in kinds}
        for name, value in arguments.items():
            if name not in homes:
                raise InputError(f"no setting {name!r}", valid=", ".join(homes))
            home, one = homes[name]
            given[home][name] = _value(name, value, str(one.type))
        if missing := [name for name, (_, one) in homes.items() if _required(one) and name not in arguments]:
            raise InputError(
                f"{missing[0]} is missing", fix=f"serve run variator.serving.ray:application {missing[0]}=…"
            )
        given["server"]["bundle"] = str(Path(given["server"]["bundle"]).absolute())
        server = ServerSettings(**given["server"], http=HttpSettings(**given["http"]))
        return RaySettings(server, Scaling(**given["scaling"]), **given["own"])


def _required(one: Any) -> bool:
    return one.default is MISSING and one.default_factory is MISSING


def _value(name: str, value: Any, kind: str) -> Any:
    """A value of a field's type, from a text or from YAML."""
    convert = next((of for of in (float, int) if of.__name__ in kind), str)
    try:
        if isinstance(value, bool) or (convert is int and isinstance(value, float)):
            raise ValueError
        return convert(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is {value!r}", valid="a whole number" if convert is int else "a number") from error


class Replica:
    """One served bundle: what Ray starts, asks, and ends. Its methods are called through a handle.

    Raises:
        BundleError, EngineError, InputError: If the bundle cannot be served.
    """

    def __init__(self, settings: RaySettings) -> None:
        self.settings, self.context = settings, serve.get_replica_context()
        self.service = settings.server.opened()
        self.high = high_level(self.service.server.ratios, settings.high_ratio)
        self.service.observe(RayObserver())

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """HTTP, once the replica is made: Ray's way to an application that needs its replica."""
        http = HttpSettings(**asdict(self.settings.server.http) | {"token": os.environ.get(TOKEN, "")})
        app: FastAPI = create_app(self.service, http, close=True, reload=self._reload_all)
        app.add_middleware(Named, name=self.context.replica_tag)
        return app

    async def infer(self, inputs: Sequence[Input], **asked: Any) -> Result:
        """`Server.submit`, for callers with a handle.

        Args:
            asked: Fields of `Asked`.
        """
        if unknown := sorted(set(asked).difference(FIELDS)):
            raise InputError(f"no option {unknown[0]!r}", valid=", ".join(FIELDS))
        options = asked_from(asked)
        submitted = await asyncio.to_thread(self.service.submit, inputs, options)
        waiting = asyncio.wrap_future(submitted.future)
        try:
            return await waiting
        finally:
            waiting.cancel()

    async def status(self) -> dict[str, Any]:
        """`/status`, of this replica."""
        return self.service.status() | {"replica": self.context.replica_tag, "told": self.record_autoscaling_stats()}

    async def info(self) -> dict[str, Any]:
        """`/info`."""
        return self.service.info()

    async def reload(self) -> None:
        """Serve what lies at the bundle's path now, on this replica. Errors as `Service.reload`."""
        await asyncio.to_thread(self.service.reload)

    async def _reload_all(self) -> None:
        """The same on all replicas; where one cannot, the others may have."""
        handle = serve.get_deployment_handle(self.context.deployment, self.context.app_name)
        await handle.broadcast("reload").results_async()

    def check_health(self) -> None:
        """Asked by Ray, which replaces a replica that raises."""
        if self.service.server.hanging:
            raise EngineError("the engine does not answer")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Asked by Ray: numbers for `Scaler`."""
        found = told(self.service, self.high)
        return {SHARED + name: float(value) for name, value in asdict(found).items() if name != "at_s"}


def high_level(ratios: Sequence[Key], asked: str | None) -> int:
    """From which level on a ratio is high; none is where there is nothing to raise.

    Raises:
        InputError: For a ratio that the bundle does not have, or ratio 1.
    """
    if asked is None:
        return max(len(ratios) - 1, 1)
    key = parse_key(asked)
    if key not in ratios[1:]:
        raise InputError(f"high_ratio {asked}", valid=", ".join(map(str, ratios[1:])) or "none: there is only ratio 1")
    return list(ratios).index(key)


def told(service: Service, high: int) -> Told:
    """What a service has to tell. Times are shares of its objective; `at_s` is Ray's to set."""
    moments = [one for one in service.history.moments() if one["ago_s"] <= WINDOW_S]
    levels = {str(ratio): level for level, ratio in enumerate(service.server.ratios)}
    counts = [(levels.get(ratio, 0), count) for one in moments for ratio, count in one["ratios"].items()]
    backlog, slo_ms = service.server.backlog(), service.settings.serve.slo_ms
    return Told(
        0.0,
        answers=sum(count for _, count in counts),
        high=sum(count for level, count in counts if level >= high),
        first=sum(count for level, count in counts if level == 0),
        requests=sum(one["requests"] for one in moments),
        lost=sum(one["refused"] + one["late"] for one in moments),
        busy=min(1.0, sum(one["compute_ms"] for one in moments) / (1e3 * WINDOW_S)),
        age=backlog.age_ms / slo_ms,
        drain=backlog.drain_ms[-1] / slo_ms,
    )


class Scaler:
    """Ray's question, how many replicas: `decide`, over what they told last.

    Args:
        scaling: Of `Scaling`.
    """

    def __init__(self, **scaling: float) -> None:
        self.scaling = Scaling(**scaling)

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """See Ray's custom autoscaling policies."""
        replicas = Replicas(
            context.current_num_replicas,
            context.target_num_replicas,
            context.capacity_adjusted_min_replicas,
            context.capacity_adjusted_max_replicas,
        )
        last: dict[Any, dict[str, float]] = {}
        for name, by_replica in (context.raw_metrics or {}).items():
            for replica, series in by_replica.items():
                if name.startswith(SHARED) and series:
                    values = last.setdefault(replica, {"at_s": series[-1].timestamp})
                    values[name.removeprefix(SHARED)] = series[-1].value
        words = [Told(**values) for values in last.values()]
        wanted, state = decide(words, replicas, context.current_time, State.read(context.policy_state), self.scaling)
        return wanted, asdict(state)


class RayObserver(MetricsObserver):
    """Tells Ray, which adds the replica's name and exports it from every node."""

    def __init__(self) -> None:
        super().__init__()
        self._metrics: dict[str, Any] = {}
        for name, metric in METRICS.items():
            if metric.kind == "histogram":
                self._metrics[name] = metrics.Histogram(name, metric.text, list(metric.bounds), metric.labels)
            else:
                kind = metrics.Counter if metric.kind == "counter" else metrics.Gauge
                self._metrics[name] = kind(name, metric.text, metric.labels)

    def tell(self, name: str, value: float, **labels: str) -> None:
        """See `MetricsObserver.tell`."""
        if value or METRICS[name].kind != "counter":  # Ray's counters refuse 0
            getattr(self._metrics[name], VERBS[METRICS[name].kind])(value, tags=labels)


class Named:
    """ASGI middleware: every answer says who gave it."""

    def __init__(self, app: ASGIApp, name: str) -> None:
        self.app, self.header = app, (f"{HEADER}replica".encode(), name.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), self.header]}
            await send(message)

        await self.app(scope, receive, named if scope["type"] == "http" else send)


def application(arguments: Mapping[str, Any]) -> Application:
    """What `serve run variator.serving.ray:application name=value …` starts. Errors as `RaySettings.read`."""
    return application_of(RaySettings.read(dict(arguments)))


def application_of(settings: RaySettings) -> Application:
    """The application of settings, for `serve.run`."""
    server = settings.server
    cpus = settings.num_cpus if settings.num_cpus is not None else server.threads or machine.cores()
    options: dict[str, Any] = {
        "name": "variator",
        "max_ongoing_requests": server.max_queue + ROOM,
        "logging_config": {"enable_access_log": False},
        "ray_actor_options": {"num_cpus": cpus, "num_gpus": settings.num_gpus},
    }
    if settings.min_replicas == settings.max_replicas:
        options["num_replicas"] = settings.max_replicas
    else:
        options["autoscaling_config"] = _autoscaling(settings)
    return serve.deployment(**options)(serve.ingress()(Replica)).bind(settings)


def _autoscaling(settings: RaySettings) -> AutoscalingConfig:
    """Ray's part of it: it asks `Scaler` and does at once what that says."""
    with warnings.catch_warnings():  # Ray names variables of the environment instead, which 2.60 does not read here
        warnings.simplefilter("ignore", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=settings.min_replicas,
            max_replicas=settings.max_replicas,
            metrics_interval_s=TELL_S,
            look_back_period_s=5 * TELL_S,
            upscale_delay_s=0,
            downscale_delay_s=0,
            policy=AutoscalingPolicy(
                policy_function=f"{Scaler.__module__}:{Scaler.__name__}", policy_kwargs=asdict(settings.scaling)
            ),
        )
