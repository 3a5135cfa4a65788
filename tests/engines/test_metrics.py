"""Metrics and spans of a server, as Prometheus and OpenTelemetry see them."""

from __future__ import annotations

from typing import Any

import pytest

from variator.engines.scheduler import Batch, Request

prometheus_client = pytest.importorskip("prometheus_client")
sdk = pytest.importorskip("opentelemetry.sdk.trace")

from variator.engines.metrics import PrometheusObserver, SpanObserver  # noqa: E402

BATCH = Batch([Request(1, 5, 0.0, 100.0)], 1, 2, 3, 4.0)
OTHER = Batch([Request(1, 5, 0.0, 100.0)], 0, 1, 1, 4.0)


def happen(observer: Any) -> None:
    observer.batch(BATCH, [1.0, 2.0, 3.0], 5.0, 30, 36)
    observer.batch(OTHER, [1.0], 6.0, 10, 10)
    for outcome, ratio in (("served", 2), ("served", 2), ("late", 1), ("refused", None)):
        observer.outcome(outcome, ratio, 12.0)
    observer.queue(7)


def test_prometheus_counts_what_happened() -> None:
    registry = prometheus_client.CollectorRegistry()
    happen(PrometheusObserver(registry))

    def value(name: str, **labels: str) -> float | None:
        found: float | None = registry.get_sample_value(name, labels)
        return found

    assert value("variator_requests_total", outcome="served", ratio="2") == 2
    assert value("variator_requests_total", outcome="refused", ratio="none") == 1
    assert value("variator_request_seconds_count", ratio="2") == 2
    assert value("variator_request_seconds_sum", ratio="1") == pytest.approx(0.012)
    assert value("variator_queue_seconds_count") == 4 and value("variator_queue_requests") == 7
    assert value("variator_batch_tokens_sum") == 40 and value("variator_padding_tokens_total") == 6
    assert value("variator_compute_seconds_sum", ratio="2") == pytest.approx(0.005)
    assert value("variator_last_batch_ratio", ratio="1") == 1 and value("variator_last_batch_ratio", ratio="2") == 0


def test_spans_have_their_times_and_attributes() -> None:
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    provider, exporter = sdk.TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    happen(SpanObserver(provider.get_tracer("test")))
    spans = exporter.get_finished_spans()
    assert [span.name for span in spans] == ["variator.batch"] * 2 + ["variator.request"] * 4
    first = spans[0]
    assert (first.end_time - first.start_time) / 1e6 == pytest.approx(5.0, abs=0.01)
    assert first.attributes["variator.ratio"] == "2" and first.attributes["variator.padding"] == 6
    assert spans[-1].attributes == {"variator.outcome": "refused", "variator.ratio": "none"}
