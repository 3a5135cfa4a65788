"""What a server does, for those who watch it: Prometheus metrics and OpenTelemetry spans, through their own libraries.

Both are observers (`engines.serving.Observer`): `runtime.serve(observers=[PrometheusObserver()])`. Extra `metrics`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
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


class PrometheusObserver:
    """Requests by ratio and outcome, latency, queue age, tokens of batches and how many were padding, the ratio now.

    Args:
        registry: That the metrics are registered with; None is the library's own.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        from prometheus_client import REGISTRY, Counter, Gauge, Histogram

        where: Any = registry if registry is not None else REGISTRY
        self._requests = Counter("variator_requests", "Requests that have ended.", ["outcome", "ratio"], registry=where)
        self._latency = Histogram(
            "variator_request_seconds", "From arrival to answer.", ["ratio"], buckets=SECONDS, registry=where
        )
        self._waited = Histogram("variator_queue_seconds", "From arrival to run.", buckets=SECONDS, registry=where)
        self._computed = Histogram(
            "variator_compute_seconds", "A batch in the engine.", ["ratio"], buckets=SECONDS, registry=where
        )
        self._tokens = Histogram("variator_batch_tokens", "Tokens of a batch's rows.", buckets=TOKENS, registry=where)
        self._padding = Counter("variator_padding_tokens", "Tokens computed for nothing.", registry=where)
        self._queue = Gauge("variator_queue_requests", "Requests that wait.", registry=where)
        self._ratio = Gauge(
            "variator_last_batch_ratio", "1 for the ratio of the last batch.", ["ratio"], registry=where
        )
        self._last = ""

    def batch(self, batch: Batch, queue_ms: Sequence[float], compute_ms: float, tokens: int, padded: int) -> None:
        """See `Observer.batch`."""
        ratio = str(batch.ratio)
        for waited in queue_ms:
            self._waited.observe(max(0.0, waited) / 1e3)
        self._computed.labels(ratio).observe(compute_ms / 1e3)
        self._tokens.observe(tokens)
        self._padding.inc(padded - tokens)
        if ratio != self._last:
            if self._last:
                self._ratio.labels(self._last).set(0)
            self._ratio.labels(ratio).set(1)
            self._last = ratio

    def outcome(self, outcome: str, ratio: Key | None, latency_ms: float) -> None:
        """See `Observer.outcome`."""
        name = NONE if ratio is None else str(ratio)
        self._requests.labels(outcome, name).inc()
        if ratio is not None:
            self._latency.labels(name).observe(max(0.0, latency_ms) / 1e3)

    def queue(self, requests: int) -> None:
        """See `Observer.queue`."""
        self._queue.set(requests)


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
