"""What waits and what runs next: order, bounds, what is given up, and that nothing is lost on the way."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from tests.engines.tables import made_up
from variator.engines.policies import (
    Costs,
    Drain,
    Fixed,
    Policy,
    Queue,
    SlackFit,
    Thresholds,
    policy_named,
)
from variator.engines.scheduler import Request, Scheduler, buckets_up_to
from variator.errors import DeadlineExceeded, InputError, Overloaded

RATIOS = (1, 2, 4, 8)
COSTS = Costs(made_up(), RATIOS, buckets_up_to(512))
SLO = 100.0


SLOWEST = Fixed(0)


def scheduler(policy: Policy = SLOWEST, **options: int) -> Scheduler:
    return Scheduler(COSTS, policy, SLO, **options)


def request(length: int = 32, arrival: float = 0.0, slo: float = SLO, **options: object) -> Request:
    return Request(1, length, arrival, arrival + slo, **options)  # type: ignore[arg-type]


def run(queue: Scheduler, now: float = 0.0) -> list[Request]:
    batch, hopeless = queue.next_batch(now)
    assert not hopeless and batch is not None
    return batch.requests


def test_the_earliest_deadline_goes_first_with_those_of_its_length_that_come_next() -> None:
    queue = scheduler()
    late, early, other = request(slo=90), request(slo=50), request(length=400, slo=60)
    middle = request(slo=70)
    for one in (late, early, other, middle):
        queue.submit(one, 0.0)
    assert run(queue) == [early, middle, late]  # as many of its bucket as a run in a third of the SLO takes
    assert run(queue) == [other]
    assert queue.next_batch(0.0) == (None, [])


def test_priority_goes_before_deadlines() -> None:
    queue = scheduler()
    soon, important = request(slo=50), request(slo=90, priority=1)
    queue.submit(soon, 0.0)
    queue.submit(important, 0.0)
    assert run(queue) == [important] and run(queue) == [soon]


def test_a_batch_is_no_larger_than_is_efficient_and_never_so_long_that_its_first_is_late() -> None:
    queue = scheduler()
    for _ in range(100):
        queue.submit(request(length=64), 0.0)
    batch, _ = queue.next_batch(0.0)
    assert batch is not None and batch.expected_ms <= SLO / 3
    line = COSTS.lines[0][batch.requests[0].bucket]
    within = [rows for rows in range(1, 65) if line[rows] <= SLO / 3]
    best = min(line[rows] / rows for rows in within)
    assert line[batch.rows] / batch.rows <= 1.1 * best < line[batch.rows - 1] / (batch.rows - 1)
    late, hopeless = queue.next_batch(91.0)  # 9 ms are left: fewer rows
    assert not hopeless and late is not None and late.rows < batch.rows and late.expected_ms <= 9 / 1.05


def test_no_more_are_given_up_than_have_to_be() -> None:
    queue = scheduler()
    for _ in range(100):
        queue.submit(request(length=64), 0.0)
    batch, hopeless = queue.next_batch(97.0)  # 3 ms are left: two rows at ratio 8, a full batch takes longer
    assert batch is not None and len(hopeless) == 98 and batch.rows <= 2


def test_floors_and_ceilings_are_honoured_whatever_the_policy_says() -> None:
    queue = scheduler(Fixed(3))
    exact = [request(highest=0) for _ in range(3)]
    free = [request() for _ in range(3)]
    for one in (*exact, *free):
        queue.submit(one, 0.0)
    batch, _ = queue.next_batch(0.0)
    assert batch is not None and batch.ratio == 1 and batch.requests[:3] == exact  # the first decides
    queue = scheduler(Fixed(0))
    for one in [request(), request(lowest=2), request()]:
        queue.submit(one, 0.0)
    first, second = queue.next_batch(0.0)[0], queue.next_batch(0.0)[0]
    assert first is not None and second is not None
    assert (first.ratio, len(first.requests), second.ratio, len(second.requests)) == (1, 2, 4, 1)


def test_bounds_that_leave_no_ratio_are_refused() -> None:
    for bounds in ({"lowest": 2, "highest": 1}, {"lowest": 7}, {"lowest": -1}):
        with pytest.raises(InputError, match="allows no ratio"):
            scheduler().submit(request(**bounds), 0.0)


def test_what_cannot_be_met_is_refused_at_once_and_what_becomes_hopeless_is_given_up() -> None:
    queue = scheduler(Drain())
    with pytest.raises(DeadlineExceeded, match=r"cannot be met(.|\n)*ratio 8"):
        queue.submit(request(length=512, slo=3.0), 0.0)
    with pytest.raises(DeadlineExceeded, match="ratio 1"):
        queue.submit(request(length=512, slo=8.0, highest=0), 0.0)  # at 8 it could be
    queue.submit(request(length=512, slo=8.0), 0.0)
    with pytest.raises(DeadlineExceeded):
        queue.submit(request(arrival=-200.0), 0.0)  # its deadline has passed
    batch, hopeless = queue.next_batch(5.0)
    assert batch is None and len(hopeless) == 1 and not queue.requests


def test_a_running_batch_counts_when_a_deadline_is_promised() -> None:
    queue = scheduler()
    for _ in range(50):
        queue.submit(request(length=64), 0.0)
    batch, _ = queue.next_batch(0.0)
    assert batch is not None
    with pytest.raises(DeadlineExceeded, match="are spoken for"):
        queue.submit(request(slo=batch.expected_ms), 0.0)
    queue.done(1.0)  # sooner than expected
    queue.submit(request(arrival=1.0, slo=batch.expected_ms), 1.0)


def test_a_full_queue_refuses_and_one_that_leaves_makes_room() -> None:
    queue = scheduler(max_queue=2)
    first = request()
    queue.submit(first, 0.0)
    queue.submit(request(), 0.0)
    with pytest.raises(Overloaded, match="2 requests are waiting"):
        queue.submit(request(), 0.0)
    assert queue.discard(first) and not queue.discard(first)
    queue.submit(request(), 0.0)


def test_rows_longer_than_the_model_takes_are_refused() -> None:
    for length in (0, 513):
        with pytest.raises(InputError, match=f"{length} tokens"):
            scheduler().submit(request(length=length), 0.0)


@pytest.mark.parametrize("slo", [0, -1, math.nan, math.inf, 1e9, True, "x", None])
def test_objectives_that_are_none_are_refused(slo: object) -> None:
    with pytest.raises(InputError, match="SLO"):
        Scheduler(COSTS, Drain(), slo)  # type: ignore[arg-type]


def test_a_clock_that_jumps_loses_nobody() -> None:
    queue = scheduler(Drain())
    waiting = [request() for _ in range(5)]
    for one in waiting:
        queue.submit(one, 50.0)
    assert run(queue, 10.0)  # back: time stands still
    queue.submit(request(arrival=60.0), 60.0)
    batch, hopeless = queue.next_batch(1e9)  # and far ahead: everything is too late, and said so
    assert batch is None and len(hopeless) + 5 == 6 and not queue.requests


def test_one_run_that_took_forever_is_forgotten() -> None:
    queue = Scheduler(COSTS, Drain(), 20.0)
    queue.submit(request(length=64, slo=20.0), 0.0)
    batch, _ = queue.next_batch(0.0)
    queue.done(12_000.0, batch, 12_000.0)
    assert 1.0 < queue.pace < 1.1  # a run of 2 ms counts like 8 ms, not like 12 s
    for number in range(200):
        queue.submit(request(length=64, arrival=12_000.0 + number, slo=5000.0), 12_000.0 + number)
    for _ in range(60):
        batch, _ = queue.next_batch(12_200.0)
        if batch is not None:
            queue.done(12_200.0, batch, 3 * batch.expected_ms)
    slow = queue.pace
    assert slow > 1.3 and not queue.requests
    queue.submit(request(arrival=30_000.0), 30_000.0)  # it has rested since
    assert queue.pace == pytest.approx(1.0, abs=1e-3)


def test_who_waits_for_long_does_not_keep_all_that_came_and_went() -> None:
    queue = scheduler()
    queue.submit(request(length=400, slo=3_000_000.0), 0.0)
    for now in range(3000):
        one = request(arrival=float(now), priority=1)
        queue.submit(one, float(now))
        assert queue.next_batch(float(now))[0] is not None
    assert queue.requests == 1 and len(queue._all) < 100


def test_a_request_of_many_rows_is_counted_with_all_of_them() -> None:
    for policy in (Drain(), SlackFit()):
        queue = scheduler(policy)
        queue.submit(Request(25, 64, 0.0, SLO), 0.0)
        batch, _ = queue.next_batch(SLO - 30.0)  # 33 ms at ratio 1, 19 at ratio 8
        assert batch is not None and batch.expected_ms <= 30 and batch.ratio != 1


@pytest.mark.parametrize("policy", [Fixed(0), Fixed(3), Drain(), Thresholds(), SlackFit()])
def test_every_request_leaves_exactly_once(policy: Policy) -> None:
    rng = random.Random(7)
    queue, now, gone, open_ = scheduler(policy), 0.0, [], set()
    for _ in range(4000):
        now += rng.expovariate(0.6)
        action = rng.random()
        if action < 0.75:
            one = Request(
                rng.choice([1, 1, 1, 5]),
                rng.randint(1, 300),
                now,
                now + rng.choice([40.0, 100.0, 400.0]),
                rng.choice([0, 0, 0, 1]),
                *rng.choice([(0, 9), (0, 9), (0, 0), (2, 3)]),
            )
            try:
                queue.submit(one, now)
                open_.add(one)
            except DeadlineExceeded:
                pass
        elif action < 0.8 and open_:
            one = rng.choice(sorted(open_, key=lambda r: r.arrival))
            assert queue.discard(one)
            open_.remove(one)
        elif action < 0.82:
            late = {one for one in open_ if one.deadline < now}
            assert set(queue.overdue(now)) == late
            open_ -= late
        else:
            batch, hopeless = queue.next_batch(now)
            left = hopeless + (batch.requests if batch else [])
            for one in left:
                open_.remove(one)  # raises if it has left before
                assert not one.waiting
            if batch:
                assert all(one.lowest <= batch.level <= one.highest for one in batch.requests)
                assert len({(one.bucket, one.priority) for one in batch.requests}) == 1
                assert batch.rows == sum(one.rows for one in batch.requests)
            gone += left
        assert queue.requests == len(open_) and queue.rows == sum(one.rows for one in open_)
    assert set(queue.drain()) == open_ and len(gone) > 500
    assert queue.drain_ms == [0.0] * 4 and not queue.requests


def chosen(policy: Policy, waiting: int, age: float = 0.0) -> object:
    queue = scheduler(policy)
    for _ in range(waiting):
        queue.submit(request(length=64), 0.0)
    batch, _ = queue.next_batch(age)
    return batch.ratio if batch else None


def test_drain_takes_the_lowest_ratio_that_serves_all_that_waits_soon() -> None:
    assert chosen(Drain(), 1) == 1
    assert [chosen(Drain(), waiting) for waiting in (5, 26, 28, 35, 45, 300)] == [1, 1, 2, 4, 8, 8]
    assert chosen(Drain(), 1, age=98.15) == 8 and chosen(Drain(), 1, age=90.0) == 1  # or the head is late


def test_thresholds_follow_the_work_that_waits() -> None:
    found = [chosen(Thresholds(), waiting) for waiting in (1, 30, 60, 300)]
    assert found == [1, 2, 4, 8]


def test_slackfit_follows_the_slack_of_the_first() -> None:
    assert [chosen(SlackFit(), 1), chosen(SlackFit(), 40, age=60.0), chosen(SlackFit(), 1, age=98.2)] == [1, 2, 8]


def test_a_policy_of_ones_own_needs_nothing_of_ours() -> None:
    class Odd:
        name = "odd"

        def choose(self, queue: Queue, costs: Costs, now: float) -> tuple[int, int]:
            return (2, 3) if queue.waiting > 3 else (0, 1)

    queue = scheduler(Odd())
    for _ in range(5):
        queue.submit(request(), 0.0)
    found = [(batch.ratio, batch.rows) for batch in (queue.next_batch(0.0)[0] for _ in range(3)) if batch]
    assert found == [(4, 3), (1, 1), (1, 1)]


def test_policies_have_names() -> None:
    assert policy_named("drain", RATIOS) == Drain() and policy_named("fixed(4)", RATIOS) == Fixed(2, "fixed(4)")
    with pytest.raises(InputError, match=r"no policy 'fast'(.|\n)*drain, slackfit, thresholds, fixed\(1\)"):
        policy_named("fast", RATIOS)


def test_costs_need_every_ratio() -> None:
    with pytest.raises(InputError, match="ratio 16 was not measured"):
        Costs(made_up(), (1, 16), (8, 16))


def test_buckets_end_with_the_models_limit() -> None:
    ends: Sequence[int] = [buckets_up_to(limit)[-1] for limit in (5, 8, 100, 512, 2048)]
    assert ends == [5, 8, 100, 512, 2048] and buckets_up_to(100)[-2] == 96
