"""What Triton's metrics endpoint is told, through a stand-in for its Python module."""

from __future__ import annotations

from variator.engines.scheduler import Batch
from variator.serving.triton_metrics import QUEUE, TritonMetrics

TOLD: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}


class Metric:
    def __init__(self, name: str, labels: dict[str, str]) -> None:
        self.key = name, frozenset(labels.items())

    def increment(self, value: float) -> None:
        TOLD[self.key] = TOLD.get(self.key, 0) + value

    def set(self, value: float) -> None:
        TOLD[self.key] = value


class Backend:
    class MetricFamily:
        COUNTER, GAUGE = 1, 2

        def __init__(self, name: str, description: str, kind: int) -> None:
            self.name = name

        def Metric(self, labels: dict[str, str]) -> Metric:  # noqa: N802 - Triton's name
            return Metric(self.name, labels)


def test_all_is_told_at_the_end() -> None:
    metrics = TritonMetrics(Backend, {"model": "m"})
    metrics.batch(Batch([], 2, 4, 3, 1.0), [1.0], 2.5, 10, 12)
    metrics.outcome("served", 4, 3.0)
    metrics.queue(2)
    metrics.close()
    assert TOLD["variator_rows", frozenset({("model", "m"), ("ratio", "4")})] == 3
    assert TOLD["variator_compute_us", frozenset({("model", "m"), ("ratio", "4")})] == 2500
    assert TOLD["variator_requests", frozenset({("model", "m"), ("ratio", "4"), ("outcome", "served")})] == 1
    assert TOLD[QUEUE, frozenset({("model", "m")})] == 2
