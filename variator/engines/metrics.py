"""What a server does, for those who watch it: Prometheus metrics and OpenTelemetry spans, through their own libraries.

Both are observers (`engines.serving.Observer`): `runtime.serve(observers=[PrometheusObserver()])`. Extra `metrics`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from variator.engines.scheduler import Batch
from variator.toolkit.plugin_format import Key

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer
    from prometheus_client import CollectorRegistry

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
TOKENS = (16, 64, 256, 1024, 4096, 16384)
NONE = "none"
"""The ratio of a request that none answered."""


@dataclass(frozen=True)
class Metric:
    """What is told under a name.

    Args:
        kind: `counter`, `histogram` or `gauge`.
        text: What it is.
        labels: That every value has.
        bounds: Of a histogram.
    """

    kind: str
    text: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()


METRICS = {
    "variator_requests": Metric("counter", "Requests that have ended.", ("outcome", "ratio")),
    "variator_request_seconds": Metric("histogram", "From arrival to answer.", ("ratio",), SECONDS),
    "variator_queue_seconds": Metric("histogram", "From arrival to run.", (), SECONDS),
    "variator_compute_seconds": Metric("histogram", "A batch in the engine.", ("ratio",), SECONDS),
    "variator_batch_tokens": Metric("histogram", "Tokens of a batch's rows.", (), TOKENS),
    "variator_padding_tokens": Metric("counter", "Tokens computed for nothing."),
    "variator_queue_requests": Metric("gauge", "Requests that wait."),
    "variator_last_batch_ratio": Metric("gauge", "1 for the ratio of the last batch.", ("ratio",)),
}


VERBS = {"counter": "inc", "histogram": "observe", "gauge": "set"}
"""Methods of both libraries' metrics."""


class MetricsObserver(ABC):
    """Tells `METRICS`: requests by ratio and outcome, latency, queue age, batches and their padding, the ratio now."""

    def __init__(self) -> None:
        self._last = ""

    @abstractmethod
    def tell(self, name: str, value: float, **labels: str) -> None:
        """Add to a counter, put into a histogram, set a gauge."""

    def batch(self, batch: Batch, queue_ms: Sequence[float], compute_ms: float, tokens: int, padded: int) -> None:
        """See `Observer.batch`."""
        ratio = str(batch.ratio)
        for waited in queue_ms:
            self.tell("variator_queue_seconds", max(0.0, waited) / 1e3)
        self.tell("variator_compute_seconds", compute_ms / 1e3, ratio=ratio)
        self.tell("variator_batch_tokens", tokens)
        self.tell("variator_padding_tokens", padded - tokens)
        if ratio != self._last:
            if self._last:
                self.tell("variator_last_batch_ratio", 0, ratio=self._last)
            self.tell("variator_last_batch_ratio", 1, ratio=ratio)
            self._last = ratio

    def outcome(self, outcome: str, ratio: Key | None, latency_ms: float) -> None:
        """See `Observer.outcome`."""
        name = NONE if ratio is None else str(ratio)
        self.tell("variator_requests", 1, outcome=outcome, ratio=name)
        if ratio is not None:
            self.tell("variator_request_seconds", max(0.0, latency_ms) / 1e3, ratio=name)

    def queue(self, requests: int) -> None:
        """See `Observer.queue`."""
        self.tell("variator_queue_requests", requests)


class PrometheusObserver(MetricsObserver):
    """Tells Prometheus.

    Args:
        registry: That the metrics are registered with; None is the library's own.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        from prometheus_client import REGISTRY, Counter, Gauge, Histogram

        super().__init__()
        where = registry if registry is not None else REGISTRY
        self._metrics: dict[str, Counter | Gauge | Histogram] = {}
        for name, metric in METRICS.items():
            if metric.kind == "histogram":
                self._metrics[name] = Histogram(name, metric.text, metric.labels, buckets=metric.bounds, registry=where)
            else:
                kind = Counter if metric.kind == "counter" else Gauge
                self._metrics[name] = kind(name, metric.text, metric.labels, registry=where)

    def tell(self, name: str, value: float, **labels: str) -> None:
        """See `MetricsObserver.tell`."""
        metric = self._metrics[name]
        getattr(metric.labels(**labels) if labels else metric, VERBS[METRICS[name].kind])(value)


class SpanObserver:
    """A span for every batch and for every request that ends.

    Args:
        tracer: None is the one that the process has set up.
    """

    def __init__(self, tracer: Tracer | None = None) -> None:
        from opentelemetry import trace

        self._tracer = tracer or trace.get_tracer("variator")

    def batch(self, batch: Batch, queue_ms: Sequence[float], compute_ms: float, tokens: int, padded: int) -> None:
        """See `Observer.batch`."""
        attributes: dict[str, str | int | float] = {
            "variator.ratio": str(batch.ratio),
            "variator.rows": batch.rows,
            "variator.tokens": tokens,
            "variator.padding": padded - tokens,
            "variator.expected_ms": batch.expected_ms,
            "variator.longest_wait_ms": max(queue_ms, default=0.0),
        }
        self._span("variator.batch", compute_ms, attributes)

    def outcome(self, outcome: str, ratio: Key | None, latency_ms: float) -> None:
        """See `Observer.outcome`."""
        name = NONE if ratio is None else str(ratio)
        self._span("variator.request", latency_ms, {"variator.outcome": outcome, "variator.ratio": name})

    def queue(self, requests: int) -> None:
        """See `Observer.queue`."""

    def _span(self, name: str, took_ms: float, attributes: dict[str, Any]) -> None:
        end = time.time_ns()
        span = self._tracer.start_span(name, attributes=attributes, start_time=end - int(max(0.0, took_ms) * 1e6))
        span.end(end)
