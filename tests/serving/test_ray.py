"""Replicas behind Ray Serve: two on this machine, killed, overloaded, and as many as the load asks for."""

from __future__ import annotations

import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'variator[ray]'")
from ray import serve  # noqa: E402

import variator  # noqa: E402
from variator.engines.runtime import Runtime  # noqa: E402
from variator.errors import InputError, VariatorError  # noqa: E402
from variator.serving.ray import RaySettings, Scaler, application, high_level  # noqa: E402
from variator.serving.scaling import WINDOW_S, Scaling, State  # noqa: E402

TEXTS = ["w5 w9", "w1 w2"]
LARGE = ["w5 w9 w30 " * 40] * 64
"""Takes an engine long enough for others to wait."""

MEMORY = 80 * 2**20


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A cluster of one small node; its HTTP address."""
    before = dict(os.environ)
    os.environ |= {
        "PYTHONPATH": str(Path(variator.__file__).parents[1]),  # for the controller, which runs the decision
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    try:
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=MEMORY, log_to_driver=False)
        port = free_port()
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
    finally:
        ray.shutdown()
        os.environ.clear()
        os.environ.update(before)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def served(calibrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(calibrated, tmp_path_factory.mktemp("ray") / "bundle")


@pytest.fixture(scope="module")
def two(cluster: str, served: Path) -> Iterator[Any]:
    """A handle of two replicas, which answer at /."""
    arguments = {"bundle": str(served), "engine": "onnxruntime", "slo_ms": "20000", "max_queue": "4"}
    counts = {"min_replicas": "2", "max_replicas": "2", "num_cpus": "0.1"}
    yield serve.run(application(arguments | counts), name="two", route_prefix="/")
    serve.delete("two")


@pytest.fixture(scope="module")
def expected(calibrated: Path) -> dict[int, np.ndarray]:
    with Runtime.open(calibrated, "onnxruntime", "fp32") as runtime:
        return {ratio: runtime.infer(TEXTS, ratio=ratio).outputs["embedding"] for ratio in (1, 2, 4)}


def embed(address: str, **body: object) -> httpx.Response:
    return httpx.post(f"{address}/embed", json={"inputs": TEXTS, **body}, timeout=60)


def replicas_of(app: str) -> dict[str, Any]:
    """Running replicas by the name that their answers bear."""
    names = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True)]
    return {name.rsplit("#", 1)[1]: name for name in names if f"REPLICA::{app}#" in name}


def until(holds: Callable[[], bool], seconds: float) -> float:
    """Wait for it; how long that took."""
    start = time.monotonic()
    while not holds():
        assert time.monotonic() - start < seconds, f"not within {seconds} s"
        time.sleep(0.2)
    return time.monotonic() - start


def test_both_replicas_answer_like_the_runtime(cluster: str, two: Any, expected: dict[int, np.ndarray]) -> None:
    serving: set[str] = set()
    for turn in range(40):
        ratio = (1, 2, 4)[turn % 3]
        answer = embed(cluster, ratio=ratio)
        assert (answer.status_code, answer.headers["x-variator-ratio"]) == (200, str(ratio)), answer.text
        np.testing.assert_allclose(answer.json(), expected[ratio], atol=1e-5)
        serving.add(answer.headers["x-variator-replica"])
    assert serving == set(replicas_of("two")) and len(serving) == 2
    openai = httpx.post(f"{cluster}/v1/embeddings", json={"input": TEXTS, "model": "x"}).json()
    np.testing.assert_allclose([one["embedding"] for one in openai["data"]], expected[1], atol=1e-5)
    assert httpx.get(f"{cluster}/health").status_code == 200
    assert httpx.get(f"{cluster}/info").json()["ratios"] == ["1", "2", "4"]


def test_a_handle_answers_like_the_runtime_and_tells_what_is_wrong(two: Any, expected: dict[int, np.ndarray]) -> None:
    asked = [(ratio, two.infer.remote(TEXTS, ratio=ratio)) for ratio in (1, 2, 4)]
    for ratio, answer in asked:
        result = answer.result(timeout_s=30)
        assert result.ratio == ratio
        np.testing.assert_allclose(result.outputs["embedding"], expected[ratio], atol=1e-5)
    for wrong in ({"ratio": 3}, {"slo_ms": -1}, {"rato": 2}):
        with pytest.raises(InputError):
            two.infer.remote(TEXTS, **wrong).result(timeout_s=30)
    long = " ".join(["w5"] * 500)
    with pytest.raises(InputError, match="tokens"):
        two.infer.remote([long]).result(timeout_s=30)
    assert two.infer.remote([long], truncate=True).result(timeout_s=30).ratio == 1
    told = two.broadcast("status").results(timeout_s=30)
    assert {one["replica"] for one in told} == set(replicas_of("two"))
    assert sum(one["told"]["variator_answers"] for one in told) >= 3


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 400),
        (b"{}", 422),
        (b'{"inputs": []}', 422),
        (b'{"inputs": "w5", "ratio": 3}', 422),
        (b'{"inputs": "w5", "slo_ms": "soon"}', 422),
        (b'{"inputs": [' + b'"w5", ' * 200 + b'"w5"]}', 413),
    ],
)
def test_bad_requests_get_an_answer_that_says_why(cluster: str, two: Any, content: bytes, status: int) -> None:
    answer = httpx.post(f"{cluster}/embed", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status and answer.json()["error"] and "Traceback" not in answer.text


def test_what_is_too_much_is_refused_by_the_replica_in_good_form(cluster: str, two: Any) -> None:
    def ask(_: int) -> httpx.Response:
        return httpx.post(f"{cluster}/embed", json={"inputs": LARGE, "truncate": True}, timeout=60)

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, range(96)))
    refused = [one for one in answers if one.status_code == 429]
    good = [one for one in answers if one.status_code == 200]
    assert len(refused) + len(good) == 96 and refused and good
    for one in refused:
        assert one.json()["error_type"] == "Overloaded" and one.headers["retry-after"] == "1"
        assert one.headers["x-variator-replica"] in replicas_of("two")
    by_ratio: dict[str, list[Any]] = {}
    for one in good:
        by_ratio.setdefault(one.headers["x-variator-ratio"], []).append(one.json())
    for found in by_ratio.values():
        np.testing.assert_allclose(found, np.broadcast_to(found[0], np.shape(found)), atol=1e-5)


def test_a_bundle_is_reloaded_on_all_replicas_and_a_damaged_one_on_none(cluster: str, two: Any, served: Path) -> None:
    def reloads() -> list[int]:
        return sorted(one["reloads"] for one in two.broadcast("status").results(timeout_s=30))

    assert httpx.post(f"{cluster}/reload", timeout=60).status_code == 200 and reloads() == [1, 1]
    held = (served / "ratio-4.onnx").read_bytes()
    (served / "ratio-4.onnx").write_bytes(b"x" * len(held))
    answer = httpx.post(f"{cluster}/reload", timeout=60)
    (served / "ratio-4.onnx").write_bytes(held)
    assert (answer.status_code, answer.json()["error_type"]) == (409, "Unloadable")
    assert "sha256" in answer.json()["error"] and reloads() == [1, 1]


def test_a_killed_replica_is_replaced_and_no_answer_is_wrong(
    cluster: str, two: Any, expected: dict[int, np.ndarray]
) -> None:
    before, going = set(replicas_of("two")), threading.Event()
    answers: list[httpx.Response] = []
    going.set()

    def ask() -> None:
        while going.is_set():
            answers.append(embed(cluster, ratio=2))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    victim = sorted(before)[0]
    until(lambda: any(one.headers.get("x-variator-replica") == victim for one in answers), 20)
    ray.kill(ray.get_actor(replicas_of("two")[victim], namespace="serve"))
    count = len(answers)

    def recovered() -> bool:
        serving = {one.headers.get("x-variator-replica") for one in answers[count:]} - {None}
        return len(serving - {victim}) == 2

    until(recovered, 40)
    going.clear()
    for thread in threads:
        thread.join()
    assert victim not in replicas_of("two") and len(before & set(replicas_of("two"))) == 1
    failed = [one for one in answers if one.status_code != 200]
    assert len(failed) <= 3 and all(one.status_code >= 500 for one in failed), "at most what each client had under way"
    for one in answers:
        if one.status_code == 200:
            np.testing.assert_allclose(one.json(), expected[2], atol=1e-5)


def test_every_replica_counts_through_ray(cluster: str, two: Any) -> None:
    assert all(embed(cluster, ratio=4).status_code == 200 for _ in range(20))
    node = ray.nodes()[0]
    exported = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def counted() -> set[str]:
        lines = [one for one in httpx.get(exported).text.splitlines() if one.startswith("ray_variator_requests_total")]
        lines = [one for one in lines if 'ratio="4"' in one and 'outcome="served"' in one]
        return {replica for one in lines for replica in re.findall(r'replica="(\w+)"', one)}

    until(lambda: counted() >= set(replicas_of("two")), 30)


@pytest.mark.slow
def test_a_replica_comes_when_the_ratio_does_not_suffice_and_goes_after_a_calm(cluster: str, served: Path) -> None:
    arguments = {"bundle": served, "engine": "onnxruntime", "slo_ms": 200, "num_cpus": 0.1, "max_replicas": 2}
    patience = {"high_s": 2, "late_s": 1, "calm_s": 5}
    serve.run(application(arguments | patience), name="scaled", route_prefix="/scaled")
    going, calm = threading.Event(), threading.Event()
    going.set()
    answers: list[httpx.Response] = []

    def ask(on: threading.Event, body: dict[str, Any]) -> None:
        while on.is_set():
            answers.append(httpx.post(f"{cluster}/scaled/embed", json=body, timeout=60))

    def names(since: int = 0) -> set[str]:
        return {one.headers["x-variator-replica"] for one in answers[since:] if one.status_code == 200}

    try:
        threads = [threading.Thread(target=ask, args=(going, {"inputs": LARGE, "truncate": True})) for _ in range(24)]
        for thread in threads:
            thread.start()
        raised = until(lambda: any(one.headers.get("x-variator-ratio") == "4" for one in answers), 30)
        assert len(replicas_of("scaled")) == 1, "the ratio comes first"
        up = raised + until(lambda: len(replicas_of("scaled")) == 2, 60)
        serving = up + until(lambda: len(names()) == 2, 60)
        going.clear()
        for thread in threads:
            thread.join()
        assert {one.status_code for one in answers} <= {200, 429}
        calm.set()
        count, quiet = len(answers), threading.Thread(target=ask, args=(calm, {"inputs": TEXTS, "slo_ms": 10_000}))
        quiet.start()
        down = until(lambda: len(replicas_of("scaled")) == 1, 120)
        assert {one.status_code for one in answers[count:]} == {200}, "who goes answers what it has"
        print(f"ratio {raised:.1f} s, replica {up:.1f} s, its first answer {serving:.1f} s; gone {down:.1f} s after")
    finally:
        going.clear()
        calm.clear()
        serve.delete("scaled")


def test_what_replicas_tell_reaches_the_decision() -> None:
    scaler, held, wanted = Scaler(**asdict(Scaling(high_s=2))), {}, 1
    for second in range(int(WINDOW_S) + 3):
        word = {"answers": 10.0, "high": 10.0, "requests": 10.0, "first": 0.0, "lost": 0.0}
        series = {
            f"variator_{name}": {"a": [SimpleNamespace(timestamp=0.0, value=0.0), point(second, value)]}
            for name, value in word.items()
        }
        series["running_requests"] = {"a": [point(second, 3.0)]}
        wanted, held = scaler(context(series, second, {**held, "of Ray": 1}))
    assert wanted == 2 and State.read(held) == State(1, 0.0)
    assert scaler(context({}, 99, {}))[0] == 1, "nobody has told anything"


def point(at_s: float, value: float) -> SimpleNamespace:
    return SimpleNamespace(timestamp=at_s, value=value)


def context(metrics: dict[str, Any], now: float, state: dict[str, Any]) -> Any:
    counts = {"current_num_replicas": 1, "target_num_replicas": 1}
    bounds = {"capacity_adjusted_min_replicas": 1, "capacity_adjusted_max_replicas": 4}
    return SimpleNamespace(raw_metrics=metrics, current_time=now, policy_state=state, **counts, **bounds)


def test_arguments_become_settings() -> None:
    found = RaySettings.read(
        {"bundle": "/b", "slo_ms": "35", "threads": 2, "max_body": "9", "calm_s": "60", "max_replicas": "3", "high": 1}
    )
    assert (found.server.bundle, found.server.slo_ms, found.server.threads) == ("/b", 35.0, 2)
    assert (found.server.http.max_body, found.scaling, found.max_replicas) == (9, Scaling(1, calm_s=60), 3)
    assert Path(RaySettings.read({"bundle": "b"}).server.bundle).is_absolute()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "bundle is missing"),
        ({"bundle": "b", "slo": "5"}, "no setting 'slo'"),
        ({"bundle": "b", "port": "5"}, "no setting 'port'"),
        ({"bundle": "b", "token": "word"}, "no setting 'token'"),
        ({"bundle": "b", "slo_ms": "soon"}, "slo_ms is 'soon'"),
        ({"bundle": "b", "max_replicas": "1.5"}, "whole number"),
        ({"bundle": "b", "max_replicas": 1.5}, "whole number"),
        ({"bundle": "b", "min_replicas": "0"}, "0 to 1 replicas"),
        ({"bundle": "b", "min_replicas": "3", "max_replicas": "2"}, "3 to 2 replicas"),
        ({"bundle": "b", "num_cpus": "-1"}, "num_cpus"),
        ({"bundle": "b", "calm_s": "0"}, "calm_s"),
    ],
)
def test_arguments_that_make_no_sense_are_told(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(VariatorError, match=told):
        RaySettings.read(arguments)


def test_which_ratios_are_high() -> None:
    assert high_level([1, 2, 4], None) == 2 and high_level([1, 2, 4], "2") == 1
    assert high_level([1], None) == 1, "where there is nothing to raise, nothing is high"
    for wrong in ("1", "3"):
        with pytest.raises(InputError, match="2, 4"):
            high_level([1, 2, 4], wrong)
