"""When replicas come and go: the decision by itself, case by case and second by second."""

from __future__ import annotations

from dataclasses import replace

import pytest

from variator.errors import InputError
from variator.serving.scaling import WINDOW_S, Replicas, Scaling, State, Told, decide

SCALING = Scaling(high_s=15, late_s=3, calm_s=300)
CALM = Told(0, answers=100, first=100, requests=100, busy=0.2)
RAISED = Told(0, answers=100, high=10, first=20, requests=100, busy=0.9)
HIGH = Told(0, answers=100, high=90, requests=100, busy=1.0)
OLD = replace(RAISED, age=1.2)
BEHIND = replace(RAISED, drain=1.5)
LOSING = replace(RAISED, requests=110, lost=10)
HOPELESS = replace(CALM, requests=200, lost=100)
"""Objectives that none can meet, asked of an engine that has nothing to do."""

IDLE = Told(0)
SILENT = None


def after(
    seconds: float, *words: Told | None, running: int = 0, wanted: int = 0, most: int = 100, scaling: Scaling = SCALING
) -> list[tuple[float, int]]:
    """(second, replicas) of every change while replicas tell the same all the time; the wanted come at once."""
    running = running or len(words)
    wanted, state, changes = wanted or running, State(), []
    for tick in range(int(seconds * 2) + 1):
        now = 1000 + tick / 2
        told = [replace(one, at_s=now) for one in words if one is not None]
        found, state = decide(told, Replicas(running, wanted, 1, most), now, state, scaling)
        if found != wanted:
            changes.append((now - 1000, found))
            return changes
    return changes


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((CALM,), []),
        ((RAISED,), []),  # the ratio does it
        ((HIGH,), [(WINDOW_S + 15, 2)]),
        ((OLD,), [(WINDOW_S + 3, 2)]),
        ((BEHIND,), [(WINDOW_S + 3, 2)]),
        ((LOSING,), [(WINDOW_S + 3, 2)]),
        ((HOPELESS,), []),
        ((IDLE,), []),
        ((SILENT,), []),
        ((HIGH, HIGH), [(WINDOW_S + 15, 3)]),
        ((HIGH, RAISED, RAISED), []),  # a balancer's outlier
        ((HIGH, IDLE), [(WINDOW_S + 15, 3)]),  # most answers are at the highest ratio
        ((OLD, RAISED, RAISED), []),
        ((OLD, OLD, RAISED), [(WINDOW_S + 3, 4)]),
        ((HIGH, SILENT), [(WINDOW_S + 15, 3)]),
        ((HIGH,) * 40, [(WINDOW_S + 15, 44)]),
        ((HIGH,) * 15, [(WINDOW_S + 15, 17)]),
        ((HIGH,) * 30, [(WINDOW_S + 15, 33)]),
        ((CALM, CALM), [(WINDOW_S + 300, 1)]),
        ((CALM, RAISED), []),
        ((CALM, SILENT), []),  # nobody knows what it does
        ((IDLE, IDLE), [(WINDOW_S + 300, 1)]),
        ((HOPELESS, CALM), []),
        ((CALM,) * 40, [(WINDOW_S + 300, 36)]),
        ((replace(CALM, busy=0.4),) * 2, []),  # one alone would be 80 % busy
        ((replace(CALM, busy=0.57),) * 40, [(WINDOW_S + 300, 38)]),
        ((replace(CALM, busy=0.9),) * 2, []),  # and more are not needed either
        ((replace(CALM, age=0.7), CALM), []),
    ],
)
def test_what_replicas_tell_decides(words: tuple[Told | None, ...], expected: list[tuple[float, int]]) -> None:
    assert after(1000, *words) == expected


def test_bounds_are_kept() -> None:
    assert after(1000, HIGH, HIGH, most=2) == []
    assert after(1000, CALM) == []
    assert after(5, CALM, CALM, CALM, most=2) == [(0, 2)]


def test_while_replicas_are_on_their_way_no_more_are_asked_for_but_fewer_may_be() -> None:
    assert after(1000, HIGH, running=1, wanted=2) == []
    assert after(1000, CALM, running=1, wanted=2) == [(WINDOW_S + 300, 1)]
    assert after(1000, CALM, CALM, CALM, running=3, wanted=2) == []


def test_after_a_decision_it_takes_as_long_again() -> None:
    state, wanted, changes = State(), 5, []
    for second in range(1000):
        told = [replace(CALM, at_s=second)] * 3
        found, state = decide(told, Replicas(3, wanted, 1, 9), second, state, SCALING)
        changes += [second] if found != wanted else []
        wanted = found
    assert (changes, wanted) == ([305, 606, 907], 2)


def test_a_moment_of_rest_begins_anew() -> None:
    state, wanted = State(), 1
    for second in range(200):
        word = RAISED if second % 14 == 0 else HIGH
        wanted, state = decide([replace(word, at_s=second)], Replicas(1, 1, 1, 9), second, state, SCALING)
        assert wanted == 1


def test_what_was_told_before_a_replica_came_or_long_ago_is_not_believed() -> None:
    state = State()
    for second in range(25):
        at_s = min(second, 4.0)
        wanted, state = decide([replace(HIGH, at_s=at_s)], Replicas(1, 1, 1, 9), second, state, SCALING)
        assert wanted == 1 and state.high_s is None
    _, state = decide([replace(HIGH, at_s=25)], Replicas(1, 1, 1, 9), 25, state, SCALING)
    assert state.high_s == 25
    words = [replace(HIGH, at_s=26), replace(HIGH, at_s=26)]
    _, state = decide(words, Replicas(2, 2, 1, 9), 26, state, SCALING)
    assert state == State(2, 26), "the second replica has changed everything"
    _, state = decide([replace(HIGH, at_s=32)] * 2, Replicas(2, 2, 1, 9), 32, state, SCALING)
    assert state.high_s == 32
    wanted, state = decide([replace(HIGH, at_s=32)] * 2, Replicas(2, 2, 1, 9), 33 + SCALING.stale_s, state, SCALING)
    assert (wanted, state.high_s) == (2, None)


def test_a_state_survives_a_dictionary_that_holds_more() -> None:
    state = State(2, 3.0, None, 4.0, None)
    assert State.read({**vars(state), "other": 1}) == state and State.read({}) == State()


@pytest.mark.parametrize("wrong", [{"high": 0}, {"high": 1.5}, {"fill": -1}, {"calm_s": 0}, {"late_s": True}])
def test_settings_that_make_no_sense_are_told(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Scaling(**wrong)
