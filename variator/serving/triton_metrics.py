"""What the runtime does, on Triton's own metrics endpoint: requests by outcome and ratio, batches, rows, the queue.

Every value that Triton is told costs a message between processes, so they are gathered and told once a second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from threading import Event, Lock, Thread
from typing import Any

from variator.engines.metrics import NONE
from variator.engines.scheduler import Batch
from variator.toolkit.plugin_format import Key

EVERY_S = 1.0
COUNTERS = {
    "variator_requests": "Requests that have ended, by outcome and ratio.",
    "variator_batches": "Batches that have run, by ratio.",
    "variator_rows": "Rows of those batches, by ratio.",
    "variator_compute_us": "Time in the engine, in microseconds, by ratio.",
}
QUEUE = "variator_queue_requests"
Labels = tuple[tuple[str, str], ...]


class TritonMetrics:
    """An observer of a server, for as long as it is not closed.

    Args:
        backend: Triton's Python module.
        labels: That all values have: the model and its version.
    """

    def __init__(self, backend: Any, labels: Mapping[str, str]) -> None:
        family, self._labels = backend.MetricFamily, tuple(labels.items())
        self._families = {
            name: family(name=name, description=text, kind=family.COUNTER) for name, text in COUNTERS.items()
        }
        self._queue_family = family(name=QUEUE, description="Requests that wait.", kind=family.GAUGE)
        self._queue = self._queue_family.Metric(labels=dict(labels))
        self._metrics: dict[tuple[str, Labels], Any] = {}
        self._lock, self._closing = Lock(), Event()
        self._counted: Counter[tuple[str, Labels]] = Counter()
        self._waiting = 0
        self._teller = Thread(target=self._tell_often, name="variator-metrics", daemon=True)
        self._teller.start()

    def batch(self, batch: Batch, queue_ms: Sequence[float], compute_ms: float, tokens: int, padded: int) -> None:
        """See `Observer.batch`."""
        ratio = (("ratio", str(batch.ratio)),)
        with self._lock:
            self._counted["variator_batches", ratio] += 1
            self._counted["variator_rows", ratio] += batch.rows
            self._counted["variator_compute_us", ratio] += round(compute_ms * 1e3)

    def outcome(self, outcome: str, ratio: Key | None, latency_ms: float) -> None:
        """See `Observer.outcome`."""
        name = NONE if ratio is None else str(ratio)
        with self._lock:
            self._counted["variator_requests", (("outcome", outcome), ("ratio", name))] += 1

    def queue(self, requests: int) -> None:
        """See `Observer.queue`."""
        self._waiting = requests

    def close(self) -> None:
        """Tell the rest. The metrics stay Triton's: giving them back can hang the unloading of a model."""
        self._closing.set()
        self._teller.join()

    def _tell_often(self) -> None:
        while not self._closing.wait(EVERY_S):
            self._tell()
        self._tell()

    def _tell(self) -> None:
        with self._lock:
            counted, self._counted = self._counted, Counter()
        for (name, labels), value in counted.items():
            if (name, labels) not in self._metrics:
                everything = dict((*self._labels, *labels))
                self._metrics[name, labels] = self._families[name].Metric(labels=everything)
            self._metrics[name, labels].increment(value)
        self._queue.set(self._waiting)
