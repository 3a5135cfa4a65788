"""Workloads, the simulator and the replay: what is counted, and that both tell the same."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.engines.tables import made_up
from variator.bench import replay_report
from variator.bench.arrivals import Arrivals, arrivals, lengths_like, read_trace
from variator.bench.replay import ReplaySettings, capacity_per_s, disagreement, median_run, replay
from variator.bench.replay_record import ReplayRecord, summarise, wilson
from variator.bench.simulate import (
    DROPPED,
    FAILED,
    LATE,
    REFUSED,
    SERVED,
    UNKNOWN,
    Failure,
    Outcomes,
    SimulationSettings,
    simulate,
)
from variator.engines.policies import Drain, Fixed
from variator.errors import CorpusError, InputError

RATIOS = (1, 2, 4, 8)
SLO = 200.0
KNOWN = np.arange(10, 101)


def test_processes_have_their_rate_and_their_burstiness() -> None:
    calm, bursty = arrivals("poisson", 100, 400), arrivals("gamma:16", 100, 400)
    for found, variation in ((calm, 1.0), (bursty, 16.0)):
        gaps = np.diff(found.times)
        assert found.rate == pytest.approx(100, rel=0.1)
        assert gaps.var() / gaps.mean() ** 2 == pytest.approx(variation, rel=0.25)
        assert (gaps >= 0).all() and found.times[-1] < 400
    assert bursty.peak > calm.peak
    np.testing.assert_array_equal(calm.times, arrivals("poisson", 100, 400).times)
    assert len(arrivals("poisson", 100, 400, seed=1).times) != len(calm.times)


def test_a_step_is_three_times_the_rate_for_ten_seconds() -> None:
    found = arrivals("step", 100, 60)
    assert found.step == (20.0, 30.0)
    inside = ((found.times >= 20) & (found.times < 30)).sum()
    assert inside == pytest.approx(3000, rel=0.1) and len(found.times) - inside == pytest.approx(5000, rel=0.1)


@pytest.mark.parametrize(
    ("kind", "rate", "seconds", "message"),
    [
        ("uniform", 1, 1, "no arrivals 'uniform'"),
        ("gamma:x", 1, 1, "'x'"),
        ("gamma:-1", 1, 1, "'-1'"),
        ("poisson", 0, 1, "rate of 0"),
        ("poisson", float("nan"), 1, "rate of nan"),
        ("poisson", 1, -1, "duration of -1"),
        ("poisson", 1e-6, 1, "nothing arrives"),
        ("missing.csv", 1, 1, r"cannot read the trace missing\.csv"),
    ],
)
def test_workloads_that_are_none_are_refused(kind: str, rate: float, seconds: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        arrivals(kind, rate, seconds)


def test_a_trace_keeps_its_shape_at_another_pace(tmp_path: Path) -> None:
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    lines += [f"2023-11-16 18:15:{46 + at // 10}.{at % 10}805900,{100 + at},1" for at in (0, 1, 5, 9, 30, 31)]
    path = tmp_path / "trace.csv.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    trace = read_trace(path)
    np.testing.assert_allclose(trace.times, [0.0, 0.1, 0.5, 0.9, 3.0, 3.1], atol=1e-5)
    assert trace.lengths is not None and trace.lengths.tolist() == [100, 101, 105, 109, 130, 131]
    found = arrivals(str(path), rate=10, seconds=0.6)
    np.testing.assert_allclose(found.times, np.array([0.0, 0.1, 0.5, 0.9, 3.0, 3.1]) * 0.5 / 3.1, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("when,what\n1,2\n", "no column of times"),
        ("", "no column of times"),
        ("time\n1\nx\n", r"line 3: 'x' is no time"),
        ("time\n1\n\n0.5\n", r"line \d: (time goes back|'' is no time)"),
        ("time\n2\n1\n", "line 3: time goes back"),
        ("time\n1\nnan\n", "line 3: 'nan' is no time"),
        ("time,tokens\n1,5\n2,-5\n", "line 3: '-5' tokens"),
        ("time\n1\n", "holds 1 requests"),
        ("time\n1\n1\n", "at one time"),
    ],
)
def test_a_bad_trace_is_told_with_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_trace(path)


def simulated(policy: object, load: Arrivals, **options: object) -> Outcomes:
    settings = SimulationSettings(SLO, RATIOS, 512, **options)  # type: ignore[arg-type]
    lengths = lengths_like(KNOWN, len(load.times), 512)
    return simulate(made_up(), policy, load, lengths, settings)  # type: ignore[arg-type, return-value]


def rate(share: float) -> float:
    return share * capacity_per_s(made_up(), RATIOS, KNOWN, 512, SLO)


def test_under_little_load_everything_is_answered_at_ratio_1() -> None:
    found = simulated(Drain(), arrivals("poisson", rate(0.3), 60))
    assert (found.outcome == SERVED).all() and (found.level == 0).all()
    assert found.latency_ms.max() < SLO and found.padded >= found.tokens > 0


def test_where_ratio_1_fails_drain_holds_and_comes_back() -> None:
    load = arrivals("step", rate(0.45), 40)
    fixed, drained = (simulated(policy, load) for policy in (Fixed(0), Drain()))
    one, two = (
        summarise(found, load, RATIOS, {1: 1.0, 2: 0.99, 4: 0.98, 8: 0.97}, policy="p", source="simulation")
        for found in (fixed, drained)
    )
    assert one.attainment < 0.9 and two.attainment > 0.99 and two.quality is not None and two.quality > 0.98
    assert one.quality == 1.0 and two.switches > 0 and two.back_s is not None and two.back_s < 2 * SLO / 1e3
    calm = [row["mix"]["1"] for row in two.by_second if row["second"] < 13 or row["second"] > 25]
    assert np.mean(calm) > 0.97


def test_every_request_has_one_outcome_also_where_replicas_fail() -> None:
    load = arrivals("poisson", rate(2.5), 30)
    failures = (Failure(0, 5.0, 10.0), Failure(1, 8.0, 12.0), Failure(2, 9.0, 11.0))
    found = simulated(Drain(), load, replicas=3, failures=failures)
    assert (found.outcome != UNKNOWN).all()  # and none has two: the simulator sees to it
    gone = (found.arrival_s > 9.0) & (found.arrival_s < 10.0)
    assert (found.outcome[gone] == FAILED).all()  # none was left
    after = found.arrival_s > 13.0
    assert (found.outcome[after] == SERVED).mean() > 0.99
    assert ((found.outcome == SERVED) == ((found.level >= 0) & (found.latency_ms <= SLO))).all()


def test_the_balancer_joins_the_shortest_queue() -> None:
    load = arrivals("poisson", rate(0.8) * 20, 10)
    found = simulated(Fixed(0), load, replicas=20)
    alone = simulated(Fixed(0), arrivals("poisson", rate(0.8), 10))
    assert np.percentile(found.latency_ms, 99) < np.percentile(alone.latency_ms, 99)


def test_failures_that_make_no_sense_are_refused() -> None:
    for failure in (Failure(3, 0.0, 1.0), Failure(0, 2.0, 1.0)):
        with pytest.raises(InputError, match="Failure"):
            simulated(Drain(), arrivals("poisson", 5, 1), replicas=2, failures=(failure,))


def test_what_is_counted() -> None:
    times = np.array([0.1, 0.2, 1.5, 2.5, 2.6])
    found = Outcomes.of(times)
    found.outcome[:] = [SERVED, LATE, SERVED, DROPPED, REFUSED]
    found.level[:] = [0, 1, 3, -1, -1]
    found.latency_ms = np.array([10.0, 300.0, 20.0, 200.0, 0.0])
    found.decisions = [(0.1, 0), (0.2, 1), (1.5, 3)]
    served = summarise(
        found, Arrivals("p", times), RATIOS, {1: 1.0, 2: 0.9, 4: 0.8, 8: 0.7}, policy="p", source="replay"
    )
    assert served.attainment == 0.4 and served.interval == tuple(round(x, 6) for x in wilson(2, 5))
    assert (served.late, served.dropped, served.refused, served.failed, served.switches) == (1, 1, 1, 0, 2)
    assert served.quality == pytest.approx(0.85) and served.mix == {"1": 0.5, "2": 0.0, "4": 0.0, "8": 0.5}
    assert served.p50_ms == 20.0  # of what was answered, late or not
    assert [row["arrivals"] for row in served.by_second] == [2, 1, 2] and served.by_second[2]["p99_ms"] is None


def test_wilsons_interval() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(95, 100)
    assert low == pytest.approx(0.8882, abs=1e-4) and high == pytest.approx(0.9785, abs=1e-4)
    assert wilson(100, 100)[1] == 1.0


def test_a_replay_counts_every_request_from_when_it_was_due(calibrated: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": " ".join(["w1"] * length)}) for length in range(1, 60)))
    settings = ReplaySettings(
        "poisson", ("drain", "fixed(4)"), 500.0, 50.0, seconds=2.0, texts=(texts,), simulated=True
    )
    record = replay(calibrated, settings)
    assert ReplayRecord.from_json(record.to_json()) == record
    real = [one for one in record.served if one.source == "replay"]
    assert [one.policy for one in real] == ["drain", "fixed(4)"] and real[1].mix["4"] == 1.0
    for one in real:
        ended = one.late + one.dropped + one.refused + one.failed + round(one.attainment * record.workload.requests)
        assert ended == record.workload.requests == sum(row["arrivals"] for row in one.by_second)
        assert one.failed == 0 and one.quality is None  # toys have no scores
    assert record.workload.rate == pytest.approx(50, rel=0.5) and record.workload.longest_tokens == 61
    page = replay_report.html(record)
    assert page.count("<svg") == 2 and "http" not in page.replace("http://www.w3.org", "")
    assert replay_report.markdown([record]).count("\n") == 2 + len(real)


def test_of_several_runs_the_median_is_kept_and_all_are_told(calibrated: Path) -> None:
    load = arrivals("poisson", rate(1.1), 5)
    runs = []
    for seed in range(3):
        outcomes = simulated(Fixed(0), load, seed=seed, spread=1.3)
        runs.append((outcomes, summarise(outcomes, load, RATIOS, {}, policy="p", source="replay")))
    runs = [
        (outcomes, replace(row, attainment=share)) for (outcomes, row), share in zip(runs, (0.7, 0.9, 0.8), strict=True)
    ]
    outcomes, row = median_run(runs)
    assert outcomes is runs[2][0] and row.attainment == 0.8
    assert row.rounds == [(0.7, None), (0.9, None), (0.8, None)]
    record = replay(calibrated, ReplaySettings("poisson", ("drain",), 500.0, 40.0, seconds=0.5, rounds=2))
    assert len(record.served[0].rounds) == 2 and ReplayRecord.from_json(record.to_json()) == record
    assert " to " in replay_report.rows(record)[0][-1]
    with pytest.raises(InputError, match="0 rounds"):
        replay(calibrated, ReplaySettings(rounds=0))


def test_a_simulation_that_does_not_agree_is_not_shown(calibrated: Path) -> None:
    load = arrivals("poisson", rate(1.3), 20)
    quality = dict.fromkeys(RATIOS, 1.0)
    one, two = (
        summarise(simulated(policy, load), load, RATIOS, quality, policy="p", source="replay")
        for policy in (Fixed(0), Drain())
    )
    assert "attainment" in disagreement(one, two, RATIOS) and not disagreement(one, one, RATIOS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policy", "best"], "no policy 'best'"),
        (["--policy", "fixed(3)"], "fixed\\(3\\)"),
        (["--slo-ms", "-5"], "SLO of -5"),
        (["--trace", "sometimes"], "no arrivals 'sometimes'"),
        (["--texts", "nowhere.jsonl"], "cannot read"),
        (["--precision", "int8"], "variator build"),
    ],
)
def test_what_cannot_be_replayed_is_told(calibrated: Path, options: list[str], message: str) -> None:
    command = [sys.executable, "-m", "variator", "replay", str(calibrated), "--seconds", "1", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(message, done.stderr)


def test_texts_for_lengths_are_read_or_refused(tmp_path: Path) -> None:
    from variator.tasks.read import plain_texts

    path = tmp_path / "t.jsonl"
    path.write_text('{"question": "a", "sentence": "b", "label": 1}\n{"text": "c"}\n')
    assert plain_texts(path) == [("a", "b"), "c"]
    for bad in ('{"label": 1}\n', "[]\n", "\n"):
        path.write_text(bad)
        with pytest.raises(CorpusError, match="no text"):
            plain_texts(path)
