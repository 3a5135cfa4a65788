"""A served bundle: any ratio through one queue, replaced while it serves, and what it tells of itself."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from variator.engines.runtime import Runtime
from variator.engines.serving import wall_clock
from variator.errors import BundleError, DeadlineExceeded, EngineError, InputError
from variator.serving.asked import Asked
from variator.serving.service import OpenSettings, Service
from variator.toolkit.rows import Row

SETTINGS = OpenSettings("onnxruntime", "fp32")


@pytest.fixture
def copy(calibrated: Path, tmp_path: Path) -> Path:
    return shutil.copytree(calibrated, tmp_path / "bundle")


@pytest.fixture(scope="module")
def service(calibrated: Path) -> Iterator[Service]:
    with Service(calibrated, SETTINGS) as opened:
        yield opened


@pytest.mark.parametrize("ratio", [1, "2", 4])
def test_a_fixed_ratio_goes_through_the_queue_and_answers_like_the_runtime(service: Service, ratio: int | str) -> None:
    texts = ["w5 w9", "w1 w2 w3 w4"]
    result = service.submit(texts, Asked(ratio)).future.result(10)
    with Runtime.open(service.path, "onnxruntime", "fp32") as runtime:
        expected = runtime.infer(texts, ratio=int(ratio)).outputs["embedding"]
    assert str(result.ratio) == str(ratio)
    np.testing.assert_allclose(result.outputs["embedding"], expected, atol=1e-5)
    assert service.submit(texts, Asked()).future.result(10).ratio == 1, "nothing waits: there is no need to compress"
    assert service.submit(texts, Asked(min_ratio="2")).future.result(10).ratio == 2


@pytest.mark.parametrize(
    "asked",
    [
        Asked(3),
        Asked("none such"),
        Asked("a/b"),
        Asked(4, min_ratio=2),
        Asked(4, min_quality=0.9),
        Asked(slo_ms=-1),
        Asked(min_ratio=4, max_ratio=2),
    ],
)
def test_what_cannot_be_asked_is_told(service: Service, asked: Asked) -> None:
    with pytest.raises(InputError):
        service.submit(["w5"], asked)


def test_a_bundle_is_replaced_under_load_without_losing_a_request(copy: Path, shared_bundle: object) -> None:
    answers: list[np.ndarray] = []
    errors: list[Exception] = []
    with Service(copy, SETTINGS) as service:
        going = threading.Event()
        going.set()

        def ask() -> None:
            while going.is_set():
                try:
                    answers.append(
                        service.submit(["w5 w9 w30"], Asked(slo_ms=20_000)).future.result(30).outputs["embedding"]
                    )
                except Exception as error:  # noqa: BLE001 - whatever it is, it must not happen
                    errors.append(error)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(3):
            before, old = len(answers), service.runtime
            service.reload()
            assert service.runtime is not old
            deadline = time.monotonic() + 20
            while len(answers) < before + 20 and time.monotonic() < deadline:
                time.sleep(0.01)
        going.clear()
        for thread in threads:
            thread.join()
        assert not errors and len(answers) > 60 and service.reloads == 3
        np.testing.assert_allclose(np.concatenate(answers), np.repeat(answers[0], len(answers), axis=0), atol=1e-6)
        with pytest.raises(EngineError, match="closed"):
            old.infer(["w5"], ratio=1)


@contextlib.contextmanager
def held(service: Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A run of the service that does not end before it is let go."""
    going, inside, real = threading.Event(), threading.Event(), service.runtime.run_together

    def run(*arguments: Any) -> Any:
        inside.set()
        assert going.wait(30)
        return real(*arguments)

    monkeypatch.setattr(service.runtime, "run_together", run)
    try:
        service.submit(["w1"], Asked(1, 20_000))
        assert inside.wait(10)
        yield going
    finally:
        going.set()


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def renamed(bundle: Path, name: str) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**manifest, "model": name}))


def test_who_waits_while_a_bundle_is_replaced_is_answered_by_the_one_that_read_the_request(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Service(copy, SETTINGS) as service:
        old = service.manifest.model
        renamed(copy, "another")
        with held(service, monkeypatch) as going:
            waiting = service.submit(lambda manifest: [f"{manifest.model} w5"], Asked(1, 20_000))
            reloading = threading.Thread(target=service.reload)
            reloading.start()
            until(lambda: service.manifest.model == "another")
            assert not waiting.future.done() and waiting.manifest.model == old
            with pytest.raises(EngineError, match="already"):  # one at a time
                service.reload()
            assert service.submit(["w5"], Asked(1)).manifest.model == "another"
            going.set()
            reloading.join()
        assert waiting.future.result(10).ratio == 1


def test_a_request_that_comes_too_late_for_a_bundle_goes_to_the_next(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Service(copy, SETTINGS) as service:

        def closed(*_: Any, **__: Any) -> None:
            service.reload()
            raise EngineError("the server is closed")

        monkeypatch.setattr(service.server, "submit", closed)
        assert service.submit(["w5"], Asked(2)).future.result(10).ratio == 2 and service.reloads == 1

        def broken(*_: Any, **__: Any) -> None:
            raise EngineError("the engine does not answer")

        monkeypatch.setattr(service.server, "submit", broken)
        with pytest.raises(EngineError, match="does not answer"):
            service.submit(["w5"], Asked(2))


def test_a_bundle_that_does_not_end_is_replaced_all_the_same(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Service(copy, SETTINGS) as service:
        old, close = service.runtime, service.runtime.close

        def hangs() -> None:
            raise EngineError("a run does not end")

        monkeypatch.setattr(old, "close", hangs)
        renamed(copy, "another")
        with pytest.warns(UserWarning, match="did not end"):
            service.reload()
        assert service.submit(["w5"], Asked(2)).future.result(10).ratio == 2 and service.info()["model_id"] == "another"
        close()


def test_the_time_counts_from_the_arrival(service: Service) -> None:
    asked = Asked(1, 60_000)
    late = service.submit(["w5"], asked, arrival_ms=wall_clock() - 5000).future.result(10)
    assert late.queue_ms >= 5000 > service.submit(["w5"], asked).future.result(10).queue_ms
    with pytest.raises(DeadlineExceeded):
        service.submit(["w5"], Asked(1, 100), arrival_ms=wall_clock() - 5000)


def test_a_check_sees_the_tokens_before_they_wait(service: Service) -> None:
    def check(rows: Sequence[Row]) -> None:
        raise InputError(f"{sum(len(row.ids) for row in rows)} tokens")

    with pytest.raises(InputError, match="7 tokens"):
        service.submit(["w5 w9", "w1"], Asked(), check)


def test_what_waits_is_told_when_nothing_does_any_more(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that leave while a run goes on, after which nobody asks."""
    with Service(copy, SETTINGS) as service, held(service, monkeypatch) as going:
        waiting = [service.submit(["w5"], Asked(1, 20_000)).future for _ in range(5)]
        waiting += [service.submit(["w5"], Asked(1, 300)).future]  # overdue while it waits
        service.history.queue(6)
        for future in waiting[:5]:
            assert future.cancel()
        until(waiting[5].done)
        until(lambda: service.status()["waiting"] == 0)
        going.set()


def test_a_damaged_bundle_does_not_replace_a_good_one(copy: Path) -> None:
    with Service(copy, SETTINGS) as service:
        manifest = json.loads((copy / "manifest.json").read_text())
        (copy / "ratio-4.onnx").write_bytes(b"x" * manifest["files"]["ratio-4.onnx"]["bytes"])
        with pytest.raises(BundleError, match="sha256"):
            service.reload()
        shutil.rmtree(copy)
        with pytest.raises(BundleError, match="not a bundle"):
            service.reload()
        assert service.submit(["w5"], Asked(2)).future.result(10).ratio == 2 and service.reloads == 0


def test_what_cannot_be_served_is_told(copy: Path) -> None:
    next(copy.glob("engines/*/latency.json")).unlink()
    with pytest.raises(EngineError, match="calibrate"):
        Service(copy, SETTINGS)
    with pytest.raises(InputError, match="policy"):
        Service(copy, OpenSettings("onnxruntime", "fp32", policy="hope"))


def test_the_history_sums_what_happened(calibrated: Path) -> None:
    with Service(calibrated, SETTINGS) as service:
        assert service.status()["moments"] == [], "warming up is nobody's request"
        for _ in range(5):
            service.submit(["w5", "w9"], Asked(4)).future.result(10)
        with pytest.raises(InputError):
            service.submit([""], Asked())
        deadline = time.monotonic() + 5
        while sum(one["requests"] for one in service.status()["moments"]) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        status = service.status()
        assert (status["ratio"], status["waiting"], status["draining"]) == ("4", 0, False)
        moments = status["moments"]
        assert sum(one["requests"] for one in moments) == 5 and sum(one["rows"] for one in moments) == 10
        assert sum(one["ratios"].get("4", 0) for one in moments) == 5
        assert 0 < max(one["latency_ms"] for one in moments) < 5000 and moments[-1]["ago_s"] >= 0
        info = service.info()
        assert info["precision"] == "fp32" and info["ratios"] == ["1", "2", "4"] and info["task"] == "embed"
