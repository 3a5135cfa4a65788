"""A latency table for tests. EVERY FIGURE IS MADE UP: 1 ms and 0.02 ms for each token, less at higher ratios."""

from __future__ import annotations

from variator.engines.latency import LatencyTable, Point

SPEED = {1: 1.0, 2: 1.25, 4: 1.55, 8: 1.8}


def made_up(*ratios: int, **changes: object) -> LatencyTable:
    """At a few shapes, for these ratios, or for all."""
    points = tuple(
        Point(ratio, batch, length, 1 + 0.02 * batch * length / SPEED[ratio], 1.2 + 0.024 * batch * length, 9)
        for ratio in ratios or SPEED
        for batch in (1, 4, 16, 64)
        for length in (8, 64, 512)
    )
    return LatencyTable("made-up", "fp32", "key", {"cpu": "none"}, points, **changes)  # type: ignore[arg-type]
