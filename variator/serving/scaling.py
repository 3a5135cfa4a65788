"""How many replicas: a pure decision over what they tell. `serving.ray` asks it, any other autoscaler could.

Every replica follows the load with its ratio, within milliseconds and at the cost of a little quality. Replicas take
minutes and money, so they come second: one is added only where the ratio has stayed high, or where even the highest no
longer answers in time; one is taken away only after a long calm at ratio 1, and only if the others can do its work at
ratio 1, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from variator.errors import InputError

WINDOW_S = 5.0
"""What a replica tells is of its last so many seconds."""

BUSY = 0.5
"""Share of the time in the engine from which on what is lost is lost to load, not to objectives that none can meet."""

QUEUE = 0.5
"""Up to this share of the objective the head of the queue may be old in a calm."""


@dataclass(frozen=True)
class Told:
    """What one replica told of its last `WINDOW_S`.

    Args:
        at_s: When, on the clock of the decision.
        answers, high, first: How many it gave; of those, at the highest ratios and at ratio 1.
        requests, lost: How many have ended; of those, how many were refused, given up or late.
        busy: Share of the time in the engine.
        age: Of the queue's head, now, over the objective.
        drain: Time to serve all that waits at the highest ratio, now, over the objective.
    """

    at_s: float
    answers: float = 0.0
    high: float = 0.0
    first: float = 0.0
    requests: float = 0.0
    lost: float = 0.0
    busy: float = 0.0
    age: float = 0.0
    drain: float = 0.0


@dataclass(frozen=True)
class Scaling:
    """When replicas come and go.

    Args:
        high: Share of all answers at the highest ratios from which on the load counts as high.
        high_s: Seconds for which it has to stay so before replicas are added.
        late_s: The same for requests that are not answered in time: the head of the queue is older than the objective,
            all that waits takes longer than it, or more than `lost` of the requests come to nothing.
        lost: Share of the requests that may be refused, given up or late.
        calm_s: Seconds at ratio 1, with nothing lost, before replicas are taken away.
        fill: Share of its time in the engine up to which those that stay may be busy then.
        step: Share of the replicas that come or go at once; one at least.
        stale_s: Age from which on what a replica told is not believed.
    """

    high: float = 0.5
    high_s: float = 15.0
    late_s: float = 3.0
    lost: float = 0.01
    calm_s: float = 300.0
    fill: float = 0.6
    step: float = 0.1
    stale_s: float = 30.0

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            share = not one.name.endswith("_s")
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= (1 if share else 1e6):
                raise InputError(f"{one.name} is {value!r}", valid="a share, 0 to 1" if share else "seconds, above 0")


@dataclass(frozen=True)
class State:
    """What a decision leaves for the next: since when it has been so, on the decision's clock; None if it is not.

    Args:
        running: How many served then.
        changed_s: When that last changed; what was told of the time before says nothing about now.
    """

    running: int = -1
    changed_s: float = 0.0
    high_s: float | None = None
    late_s: float | None = None
    calm_s: float | None = None

    @staticmethod
    def read(held: Mapping[str, Any]) -> State:
        """From a dictionary that may hold more, or nothing yet."""
        return State(**{one.name: held[one.name] for one in fields(State) if one.name in held})


@dataclass(frozen=True)
class Replicas:
    """How many there are.

    Args:
        running, wanted: That serve, and that are to serve by the last decision; the two differ until it has come about.
        least, most: Bounds of the decision.
    """

    running: int
    wanted: int
    least: int
    most: int


def decide(told: Sequence[Told], replicas: Replicas, now_s: float, state: State, scaling: Scaling) -> tuple[int, State]:
    """How many replicas are wanted now, and what the next decision has to know.

    Args:
        told: The last word of every replica that has told something.
    """
    if replicas.running != state.running:
        state = State(replicas.running, now_s)
    of_now = max(now_s - scaling.stale_s, state.changed_s + WINDOW_S)
    heard = [one for one in told if one.at_s >= of_now]
    complete = len(heard) == replicas.running == state.running
    state = State(
        replicas.running,
        state.changed_s,
        _since(state.high_s, _is_high(heard, scaling), now_s),
        _since(state.late_s, _is_late(heard, scaling), now_s),
        _since(state.calm_s, complete and _is_calm(heard, scaling), now_s),
    )
    wanted = _bounded(_wanted(heard, replicas, now_s, state, scaling), replicas)
    return wanted, state if wanted == replicas.wanted else State(replicas.running, state.changed_s)


def _wanted(heard: Sequence[Told], replicas: Replicas, now_s: float, state: State, scaling: Scaling) -> int:
    def for_long(since: float | None, limit_s: float) -> bool:
        return since is not None and now_s - since >= limit_s

    running, wanted, step = replicas.running, replicas.wanted, scaling.step * replicas.wanted
    if running == wanted and (for_long(state.high_s, scaling.high_s) or for_long(state.late_s, scaling.late_s)):
        return wanted + max(1, _ceil(step))
    if running <= wanted and for_long(state.calm_s, scaling.calm_s):
        enough = _ceil(sum(one.busy for one in heard) / scaling.fill)
        return min(wanted, max(enough, wanted - max(1, int(step + 1e-9))))
    return wanted


def _ceil(value: float) -> int:
    """Rounded up; a sum's rounding is not a replica."""
    return math.ceil(value - 1e-9)


def _bounded(wanted: int, replicas: Replicas) -> int:
    return min(max(wanted, replicas.least), replicas.most)


def _since(before: float | None, holds: bool, now_s: float) -> float | None:
    if not holds:
        return None
    return now_s if before is None else before


def _is_high(heard: Sequence[Told], scaling: Scaling) -> bool:
    """Whether the ratio is high, over all answers: a balancer's outlier is not the load."""
    answers = sum(one.answers for one in heard)
    return answers > 0 and sum(one.high for one in heard) >= scaling.high * answers


def _is_late(heard: Sequence[Told], scaling: Scaling) -> bool:
    """Whether the objective is missed for want of replicas: by half of them, or in more requests than may be lost."""
    behind = sum(one.age > 1 or one.drain > 1 for one in heard)
    if behind and 2 * behind >= len(heard):
        return True
    busy = [one for one in heard if one.busy >= BUSY]
    return 2 * len(busy) >= len(heard) and _loses(busy, scaling)


def _is_calm(heard: Sequence[Told], scaling: Scaling) -> bool:
    quiet = all(one.age <= QUEUE and one.drain <= QUEUE for one in heard)
    at_first = sum(one.first for one in heard) >= (1 - scaling.lost) * sum(one.answers for one in heard)
    return quiet and at_first and not _loses(heard, scaling)


def _loses(heard: Sequence[Told], scaling: Scaling) -> bool:
    return sum(one.lost for one in heard) > scaling.lost * sum(one.requests for one in heard)
