"""Serving under an objective: right answers, each exactly once, whatever the engine and the clients do."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path

import numpy as np
import pytest

from variator.engines import serving as module
from variator.engines.policies import Costs, Drain, Fixed, Queue
from variator.engines.runtime import Result, Runtime
from variator.engines.serving import Server, ServeSettings
from variator.errors import DeadlineExceeded, EngineError, InputError, Overloaded
from variator.toolkit.rows import Outputs, Row

LONG = 60_000.0
Start = Callable[[], None]
Ran = tuple[Outputs, float]


@pytest.fixture
def runtime(calibrated: Path) -> Iterator[Runtime]:
    with Runtime.open(calibrated, "onnxruntime", "fp32") as opened:
        yield opened


def texts(count: int, seed: int = 0) -> list[Row]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 150, count)
    return [Row(rng.integers(5, 119, length).tolist(), [0] * int(length)) for length in lengths]


def test_auto_answers_like_the_ratio_it_says(runtime: Runtime) -> None:
    result = runtime.infer(["w1 w2", "w3"], ratio="auto", slo_ms=LONG)
    assert result.ratio in (1, 2, 4) and result.engine == "onnxruntime" and result.lengths == [4, 3]
    expected = runtime.infer(["w1 w2", "w3"], ratio=result.ratio).outputs["embedding"]
    np.testing.assert_allclose(result.outputs["embedding"], expected, atol=1e-6)
    assert result.queue_ms >= 0 and result.compute_ms > 0
    assert runtime.infer(["w1"], ratio="auto", slo_ms=LONG, min_ratio=4).ratio == 4
    assert runtime.infer(["w1"], ratio="auto", slo_ms=LONG, max_ratio=1).ratio == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slo_ms": -1}, "SLO of -1"),
        ({"slo_ms": 1e12}, "SLO of"),
        ({"min_ratio": 3}, "min_ratio 3"),
        ({"max_ratio": True}, "max_ratio True"),
        ({"min_ratio": 4, "max_ratio": 2}, "no ratio is left with min_ratio 4, max_ratio 2"),
        ({"min_quality": 2.0}, "quality of 2.0"),
        ({"min_ratio": 2, "min_quality": 0.999}, "no ratio is left"),  # toys have no scores: only 1 is known
        ({"plugin": "other"}, "no plugin 'other'"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(runtime: Runtime, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        runtime.infer(["w1"], ratio="auto", **options)  # type: ignore[arg-type]


def test_bounds_are_for_auto_alone(runtime: Runtime) -> None:
    with pytest.raises(InputError, match="slo_ms with ratio 4"):
        runtime.infer(["w1"], ratio=4, slo_ms=10.0)


def test_a_quality_that_is_asked_for_is_a_ceiling(runtime: Runtime) -> None:
    runtime.__dict__["quality"] = {1: 1.0, 2: 0.99, 4: 0.97}
    with runtime.serve(ServeSettings(slo_ms=LONG, policy=Fixed(2))) as server:
        found = [server.submit(["w1"], min_quality=q).result().ratio for q in (0.9, 0.98, 0.995)]
        assert found == [4, 2, 1]
        assert server.submit(["w1"], min_quality=0.98).result().expected_quality == 0.99


class Changing:
    """A ratio after the other, batches of any size."""

    name = "changing"

    def __init__(self) -> None:
        self.turn = 0

    def choose(self, queue: Queue, costs: Costs, now: float) -> tuple[int, int]:
        self.turn += 1
        return self.turn % 3, 1 + self.turn % 7


def test_no_answer_is_lost_doubled_or_swapped_under_load(runtime: Runtime) -> None:
    rows = texts(60)
    expected = {ratio: runtime.infer(rows, ratio=ratio).outputs["embedding"] for ratio in (1, 2, 4)}
    answered = [0] * 3
    with runtime.serve(ServeSettings(slo_ms=LONG, policy=Changing())) as server:

        def client(number: int) -> None:
            rng = np.random.default_rng(number)
            for _ in range(120):
                picked = rng.integers(0, len(rows), rng.integers(1, 4)).tolist()
                result = server.submit([rows[i] for i in picked]).result()
                np.testing.assert_allclose(result.outputs["embedding"], expected[result.ratio][picked], atol=1e-5)
                answered[number] += 1

        threads = [threading.Thread(target=client, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answered == [120, 120, 120]


def test_asyncio_clients_are_served_and_one_that_is_cancelled_leaves_the_queue(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    real = Runtime.run_together

    def held(self: Runtime, ratio: object, rows: list[Row], on_start: Start) -> Ran:
        gate.wait(20)
        return real(self, ratio, rows, on_start)  # type: ignore[arg-type]

    async def clients(server: Server) -> list[object]:
        first = asyncio.create_task(server.ainfer(["w1"]))
        await asyncio.sleep(0.05)  # it runs, and waits for the gate
        gone = asyncio.create_task(server.ainfer(["w2"]))
        stays = asyncio.create_task(server.ainfer(["w3"]))
        await asyncio.sleep(0.05)
        assert server.scheduler.requests == 2
        gone.cancel()
        await asyncio.sleep(0.05)
        assert server.scheduler.requests == 1
        gate.set()
        return await asyncio.gather(first, gone, stays, return_exceptions=True)

    with runtime.serve(ServeSettings(slo_ms=LONG, policy=Fixed(0))) as server:
        monkeypatch.setattr(Runtime, "run_together", held)
        first, gone, stays = asyncio.run(clients(server))
    assert isinstance(first, Result) and isinstance(gone, asyncio.CancelledError) and isinstance(stays, Result)
    monkeypatch.undo()
    expected = runtime.infer(["w3"], ratio=1).outputs["embedding"]
    np.testing.assert_allclose(stays.outputs["embedding"], expected, atol=1e-6)


def test_an_engine_that_fails_fails_its_own_requests_only(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Runtime.run_together

    def moody(self: Runtime, ratio: object, rows: list[Row], on_start: Start) -> Ran:
        if any(50 in row.ids for row in rows):
            raise RuntimeError("out of luck")
        return real(self, ratio, rows, on_start)  # type: ignore[arg-type]

    with runtime.serve(ServeSettings(slo_ms=LONG, policy=Changing())) as server:
        monkeypatch.setattr(Runtime, "run_together", moody)
        good = [server.submit([[7, 8, 9]], priority=1) for _ in range(20)]
        bad = [server.submit([[50, 8, 9]]) for _ in range(20)]
        after = [server.submit([[7, 8, 9]], priority=-1) for _ in range(20)]
        assert all(future.result().ratio for future in (*good, *after))
        for future in bad:
            with pytest.raises(EngineError, match="the engine failed: out of luck"):
                future.result()


def test_a_row_that_is_not_finite_is_an_error_of_its_own_request(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Runtime.run_together

    def broken(self: Runtime, ratio: object, rows: list[Row], on_start: Start) -> Ran:
        given, took = real(self, ratio, rows, on_start)  # type: ignore[arg-type]
        outputs = {name: values.copy() for name, values in given.items()}
        for index, row in enumerate(rows):
            if 50 in row.ids:
                outputs["embedding"][index, 3] = np.nan
        return outputs, took

    with runtime.serve(ServeSettings(slo_ms=LONG, policy=Fixed(1))) as server:
        monkeypatch.setattr(Runtime, "run_together", broken)
        futures = [server.submit([[50 if i % 3 else 7, 8, 9]]) for i in range(12)]
        for index, future in enumerate(futures):
            if index % 3:
                with pytest.raises(EngineError, match="embedding at ratio 2 is not finite"):
                    future.result()
            else:
                assert np.isfinite(future.result().outputs["embedding"]).all()


def test_an_engine_that_hangs_is_said_to_and_nobody_waits_for_it(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    real = Runtime.run_together

    def hanging(self: Runtime, ratio: object, rows: list[Row], on_start: Start) -> Ran:
        on_start()
        gate.wait(30)
        return real(self, ratio, rows, on_start)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "HANG_MS", 300.0)
    with runtime.serve(ServeSettings(slo_ms=LONG, policy=Fixed(0))) as server:
        monkeypatch.setattr(Runtime, "run_together", hanging)
        stuck = server.submit(["w1"])
        time.sleep(0.05)
        soon, patient = server.submit(["w2"], slo_ms=100.0), server.submit(["w3"])
        with pytest.raises(DeadlineExceeded, match=r"of 100\.0 ms"):  # at its deadline, not when the engine is given up
            soon.result(timeout=0.25)
        for future in (stuck, patient):
            with pytest.raises(EngineError, match="does not answer"):
                future.result(timeout=10)
        with pytest.raises(EngineError, match="does not answer"):
            server.submit(["w4"])
        gate.set()  # it comes back after all
        for _ in range(100):
            try:
                assert server.submit(["w5"]).result().ratio == 1
                break
            except EngineError:
                time.sleep(0.02)
        else:
            pytest.fail("it never served again")


def test_closing_answers_or_refuses_everybody(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Runtime.run_together

    def slow(self: Runtime, ratio: object, rows: list[Row], on_start: Start) -> Ran:
        time.sleep(0.01)
        return real(self, ratio, rows, on_start)  # type: ignore[arg-type]

    monkeypatch.setattr(Runtime, "run_together", slow)
    settings = ServeSettings(slo_ms=LONG, max_rows=2)
    server = runtime.serve(settings)
    waiting = [server.submit([row]) for row in texts(40)]
    server.close()
    assert all(future.result(timeout=0).ratio for future in waiting)  # drained
    with pytest.raises(EngineError, match="closed"):
        server.submit(["w1"])
    server = runtime.serve(settings)
    waiting = [server.submit([row]) for row in texts(40)]
    server.close(drain=False)
    assert all(future.done() for future in waiting)
    refused = [future for future in waiting if future.exception(timeout=0)]
    assert 30 < len(refused) <= 40 and all("closed before" in str(future.exception()) for future in refused)


def test_closing_the_runtime_closes_its_server(calibrated: Path) -> None:
    with Runtime.open(calibrated, "onnxruntime", "fp32") as runtime:
        runtime.infer(["w1"], ratio="auto", slo_ms=LONG)
        server = runtime.server()
    with pytest.raises(EngineError, match="closed"):
        server.submit(["w1"])
    with pytest.raises(EngineError, match="closed"):
        runtime.infer(["w1"], ratio="auto")


def test_a_full_queue_is_overloaded_and_a_cancelled_request_is_not_run(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    seen: list[int] = []
    real = Runtime.run_together

    def held(self: Runtime, ratio: object, rows: list[Row], on_start: Start) -> Ran:
        seen.extend(len(row.ids) for row in rows)
        gate.wait(20)
        return real(self, ratio, rows, on_start)  # type: ignore[arg-type]

    with runtime.serve(ServeSettings(slo_ms=LONG, max_queue=3, policy=Drain())) as server:
        monkeypatch.setattr(Runtime, "run_together", held)
        running = server.submit([[7] * 20])
        time.sleep(0.05)
        waiting: list[Future[Result]] = [server.submit([[7] * (21 + i)]) for i in range(3)]
        with pytest.raises(Overloaded, match="3 requests are waiting"):
            server.submit([[7]])
        assert waiting[1].cancel()
        server.submit([[7] * 30])
        gate.set()
        assert running.result().lengths == [20] and waiting[2].result().lengths == [23]
    with pytest.raises(CancelledError):
        waiting[1].result()
    assert sorted(seen) == [20, 21, 23, 30]


def test_everybody_who_listens_is_told_what_happened(runtime: Runtime) -> None:
    class Listener:
        def __init__(self) -> None:
            self.batches: list[tuple[int, int, int]] = []
            self.outcomes: list[str] = []

        def batch(self, batch: object, queue_ms: object, compute_ms: float, tokens: int, padded: int) -> None:
            self.batches.append((batch.rows, tokens, padded))  # type: ignore[attr-defined]

        def outcome(self, outcome: str, ratio: object, latency_ms: float) -> None:
            self.outcomes.append(outcome)

        def queue(self, requests: int) -> None: ...

    listener = Listener()
    with runtime.serve(ServeSettings(slo_ms=LONG), observers=[listener]) as server:
        server.submit([[7] * 5, [7] * 8]).result()
        with pytest.raises(DeadlineExceeded):
            server.submit([[7] * 5], slo_ms=1e-6)
    assert listener.batches == [(2, 13, 16)] and listener.outcomes == ["served", "refused"]


def test_a_quality_is_held_by_every_ratio_that_may_answer(runtime: Runtime) -> None:
    runtime.__dict__["quality"] = {1: 1.0, 2: 0.96, 4: 0.985}
    with runtime.serve(ServeSettings(slo_ms=LONG, policy=Fixed(1))) as server:
        assert server.submit(["w1"], min_quality=0.98).result().ratio == 1  # 4 would do, but 2 is between
    settings = ServeSettings(slo_ms=LONG, ratios=(2, 4))
    with runtime.serve(settings) as server, pytest.raises(InputError, match=r"min_quality 0\.99"):
        server.submit(["w1"], min_quality=0.99)


def test_policies_and_observers_that_raise_take_nobody_with_them(runtime: Runtime) -> None:
    class Broken:
        name = "broken"
        well = False

        def choose(self, queue: Queue, costs: Costs, now: float) -> tuple[int, int]:
            if not self.well:
                raise ValueError("no idea")
            return 0, 4

    class Deaf:
        def batch(self, *_: object) -> None:
            raise RuntimeError("cannot hear")

        outcome = queue = batch

    policy = Broken()
    with runtime.serve(ServeSettings(slo_ms=LONG, policy=policy)) as server:
        with pytest.raises(EngineError, match="the policy failed: ValueError: no idea"):
            server.submit(["w1"]).result(timeout=10)
        policy.well = True
        with pytest.warns(UserWarning, match="an observer failed and is told no more: RuntimeError: cannot hear"):
            server.observe(Deaf())
            assert server.submit(["w1"]).result(timeout=10).ratio == 1
            server.submit(["w1"]).result(timeout=10)
        assert server.submit(["w1"]).result(timeout=10).ratio == 1


def test_waiting_for_others_is_no_computing(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HANG_MS", 100.0)
    with runtime.serve(ServeSettings(slo_ms=LONG, policy=Fixed(0))) as server:
        with runtime._compute_lock:  # somebody's long request at a fixed ratio
            future = server.submit(["w1"])
            time.sleep(0.4)
        result = future.result(timeout=10)
        assert result.queue_ms > 300 and result.compute_ms < 100 and server.scheduler.pace < 4.0


def test_settings_that_make_no_sense_are_refused(runtime: Runtime) -> None:
    for options in ({"max_rows": 0}, {"max_queue": -1}, {"slo_ms": 0}, {"max_rows": True}):
        with pytest.raises(InputError):
            ServeSettings(**options)  # type: ignore[arg-type]
    with runtime.serve(ServeSettings(slo_ms=LONG)) as server, pytest.raises(InputError, match="arrival at nan"):
        server.submit(["w1"], arrival_ms=float("nan"))
