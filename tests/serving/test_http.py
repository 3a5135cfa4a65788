"""`variator serve` as its clients see it: a real process on loopback, asked with their own libraries."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest

from tests.conftest import write_checkpoint, write_latency
from variator.engines.build import build
from variator.engines.runtime import Runtime
from variator.exporters.export import ExportSettings, export
from variator.serving.process import ServerSettings
from variator.toolkit.checkpoint import load_backbone

TOKEN = "secret-word"


@contextlib.contextmanager
def served(bundle: Path, *options: str, token: str = "") -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server on a free port: its address and its process."""
    command = [sys.executable, "-m", "variator", "serve", str(bundle), "--port", "0", "--engine", "onnxruntime"]
    environment = {**os.environ, "VARIATOR_TOKEN": token}
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"http://[\w.:\[\]]+", line):
            break
    else:
        raise AssertionError("".join(lines))
    threading.Thread(target=process.stderr.read, daemon=True).start()
    try:
        yield found[0], process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


@pytest.fixture(scope="module")
def address(calibrated: Path) -> Iterator[str]:
    with served(calibrated, "--slo-ms", "10000", "--max-batch", "16", "--max-body", "100000") as (found, _):
        yield found


@pytest.fixture(scope="module")
def expected(calibrated: Path) -> dict[int, np.ndarray]:
    with Runtime.open(calibrated, "onnxruntime", "fp32") as runtime:
        return {ratio: runtime.infer(["w5 w9", "w1 w2"], ratio=ratio).outputs["embedding"] for ratio in (1, 2, 4)}


def embed(address: str, **body: object) -> httpx.Response:
    return httpx.post(f"{address}/embed", json={"inputs": ["w5 w9", "w1 w2"], **body}, timeout=30)


def test_the_openai_client_works_unchanged(address: str, expected: dict[int, np.ndarray]) -> None:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any") as client:
        for options in ({}, {"encoding_format": "float"}):
            found = client.embeddings.create(model="x", input=["w5 w9", "w1 w2"], **options)  # type: ignore[arg-type]
            np.testing.assert_allclose([one.embedding for one in found.data], expected[1], atol=1e-5)
            assert [one.index for one in found.data] == [0, 1] and found.usage.total_tokens == 8
        raw = client.embeddings.with_raw_response.create(model="x", input="w5 w9", extra_body={"ratio": 4})
        assert raw.headers["x-variator-ratio"] == "4"
        np.testing.assert_allclose(raw.parse().data[0].embedding, expected[4][0], atol=1e-5)
        ids = client.embeddings.create(model="x", input=[[2, 10, 3], [2, 3]])
        assert len(ids.data) == 2
        assert client.models.list().data[0].id == found.model
        for wrong in ({"input": ""}, {"input": []}, {"input": ["w5"], "dimensions": 7}):
            with pytest.raises(openai.UnprocessableEntityError) as raised:
                client.embeddings.create(model="x", **wrong)  # type: ignore[arg-type]
            assert raised.value.body["message"]  # type: ignore[index]


@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_ratio_and_objective_come_in_the_body_or_in_a_header(
    address: str, expected: dict[int, np.ndarray], ratio: int
) -> None:
    for answer in (
        embed(address, ratio=ratio),
        embed(address, ratio=str(ratio), slo_ms=9000),
        httpx.post(
            f"{address}/embed",
            json={"inputs": ["w5 w9", "w1 w2"]},
            headers={"x-variator-ratio": str(ratio), "X-Variator-SLO-ms": "9000"},
        ),
        embed(address, min_ratio=ratio),
    ):
        assert (answer.status_code, answer.headers["x-variator-ratio"]) == (200, str(ratio)), answer.text
        assert float(answer.headers["x-variator-compute-ms"]) > 0 <= float(answer.headers["x-variator-queue-ms"])
        np.testing.assert_allclose(answer.json(), expected[ratio], atol=1e-5)


def test_the_forms_of_text_embeddings_inference(address: str, expected: dict[int, np.ndarray]) -> None:
    one = httpx.post(f"{address}/embed", json={"inputs": "w5 w9"}).json()
    np.testing.assert_allclose(one, expected[1][:1], atol=1e-5)
    np.testing.assert_allclose(httpx.post(f"{address}/", json={"inputs": "w5 w9"}).json(), one, atol=1e-6)
    long = {"inputs": "w5 " * 400}
    assert httpx.post(f"{address}/embed", json=long).status_code == 422
    assert httpx.post(f"{address}/embed", json={**long, "truncate": True}).status_code == 200
    texts = ["w9 w9", "w5 w9", "w40"]
    found = httpx.post(f"{address}/rerank", json={"query": "w5 w9", "texts": texts, "return_text": True}).json()
    assert found[0]["index"] == 1 and found[0]["text"] == "w5 w9" and found[0]["score"] == pytest.approx(1, abs=1e-5)
    assert sorted(one["index"] for one in found) == [0, 1, 2]
    assert [one["score"] for one in found] == sorted((one["score"] for one in found), reverse=True)
    info = httpx.get(f"{address}/info").json()
    assert info["max_input_length"] == 150 and info["precision"] == "fp32" and info["ratios"] == ["1", "2", "4"]
    assert httpx.get(f"{address}/health").status_code == 200
    refused = httpx.post(f"{address}/predict", json={"inputs": "w5"})
    assert refused.status_code == 422 and "gives embedding" in refused.json()["error"]


def test_metrics_and_the_status_tell_what_happened(address: str) -> None:
    before = httpx.get(f"{address}/metrics").text
    assert embed(address, ratio=2).status_code == 200
    name = 'variator_requests_total{outcome="served",ratio="2"}'

    def count(text: str) -> float:
        return next((float(line.split()[-1]) for line in text.splitlines() if line.startswith(name)), 0.0)

    deadline = time.monotonic() + 5
    while count(httpx.get(f"{address}/metrics").text) == count(before) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert count(httpx.get(f"{address}/metrics").text) == count(before) + 1
    status = httpx.get(f"{address}/status").json()
    assert status["ratio"] == "2" and sum(one["requests"] for one in status["moments"]) > 0
    page = httpx.get(f"{address}/")
    assert page.headers["content-type"].startswith("text/html") and "Requests per second" in page.text


@pytest.mark.parametrize(
    ("path", "content", "status"),
    [
        ("/embed", b"{", 400),
        ("/embed", b"\xff\xfe{}", 400),
        ("/v1/embeddings", b'{"input": "\xc3\x28"}', 400),
        ("/", b"[1, 2", 400),
        ("/embed", b"{}", 422),
        ("/embed", b'{"inputs": 7}', 422),
        ("/embed", b'{"inputs": [1.5]}', 422),
        ("/embed", b'{"inputs": [true]}', 422),
        ("/embed", b'{"inputs": []}', 422),
        ("/embed", b'{"inputs": ["w5", ""]}', 422),
        ("/embed", b'{"inputs": [[4, 99999]]}', 422),
        ("/embed", b'{"inputs": "\\ud800"}', 422),
        ("/embed", b'{"inputs": "w5", "ratio": 3}', 422),
        ("/embed", b'{"inputs": "w5", "ratio": "../x"}', 422),
        ("/embed", b'{"inputs": "w5", "ratio": "%s"}' % (b"9" * 5000), 422),
        ("/embed", b'{"inputs": "w5", "slo_ms": "soon"}', 422),
        ("/embed", b'{"inputs": "w5", "slo_ms": -1}', 422),
        ("/embed", b'{"inputs": "w5", "min_ratio": 4, "max_ratio": 1}', 422),
        ("/embed", json.dumps({"inputs": ["w5"] * 17}).encode(), 413),
        ("/embed", b" " * 100_001, 413),
        ("/rerank", b'{"query": "w5", "texts": []}', 422),
        ("/rerank", b'{"query": "w5"}', 422),
        ("/nothing", b"{}", 404),
    ],
)
def test_bad_requests_get_an_answer_that_says_why(address: str, path: str, content: bytes, status: int) -> None:
    answer = httpx.post(address + path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert (error["message"] if path.startswith("/v1") else error) and "Traceback" not in answer.text
    assert embed(address).status_code == 200


def test_headers_that_are_wrong_are_told(address: str) -> None:
    for headers in ({"x-variator-slo-ms": "soon"}, {"x-variator-ratio": "none"}):
        answer = httpx.post(f"{address}/embed", json={"inputs": "w5"}, headers=headers)
        assert answer.status_code == 422 and answer.json()["error_type"] == "Validation"
    assert httpx.get(f"{address}/embed").status_code == 405


def test_ten_megabytes_are_refused_before_they_are_read(address: str) -> None:
    answer = httpx.post(f"{address}/embed", content=b'{"inputs": "' + b"w5 " * 3_500_000 + b'"}')
    assert answer.status_code == 413 and "100000" in answer.json()["error"]

    def parts() -> Iterator[bytes]:  # of no announced length
        yield b'{"inputs": "'
        for _ in range(200):
            yield b"w5 " * 1000

    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as sending:
        sending.sendall(b"POST /embed HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):  # the server may hang up while we still send
            for part in parts():
                sending.sendall(b"%x\r\n%s\r\n" % (len(part), part))
        assert sending.recv(100).startswith(b"HTTP/1.1 413 ")
    assert embed(address).status_code == 200


@pytest.mark.parametrize("path", ["/../manifest.json", "/..%2fmanifest.json", "/%2e%2e/manifest.json", "//etc/passwd"])
def test_paths_that_lead_elsewhere_lead_nowhere(address: str, path: str) -> None:
    with connection(address) as asking:
        asking.sendall(b"GET %s HTTP/1.1\r\nhost: x\r\n\r\n" % path.encode())
        assert asking.recv(100).startswith(b"HTTP/1.1 404 ")


def connection(address: str) -> socket.socket:
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def test_idle_slow_and_vanished_clients_cost_the_others_nothing(address: str) -> None:
    idle = [connection(address) for _ in range(900)]
    slow = connection(address)
    slow.sendall(b"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-length: 500\r\n\r\n{")
    for _ in range(20):
        gone = connection(address)
        body = json.dumps({"inputs": ["w5 " * 100] * 16}).encode()
        gone.sendall(b"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        gone.close()
    for _ in range(5):
        assert embed(address).status_code == 200
    for one in (*idle, slow):
        one.close()
    deadline = time.monotonic() + 10
    while httpx.get(f"{address}/status").json()["waiting"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert httpx.get(f"{address}/status").json()["waiting"] == 0


def test_what_cannot_be_answered_in_time_is_refused_with_when_to_come_back(calibrated: Path) -> None:
    with served(calibrated, "--slo-ms", "5000", "--max-queue", "2") as (address, _):
        answers: list[httpx.Response] = []

        def ask() -> None:
            for _ in range(10):
                answers.append(httpx.post(f"{address}/embed", json={"inputs": ["w5 " * 100] * 64}, timeout=60))

        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {answer.status_code for answer in answers} == {200, 429}
        for answer in answers:
            if answer.status_code == 429:
                assert int(answer.headers["retry-after"]) >= 1 and answer.json()["error_type"] == "Overloaded"
        assert embed(address, slo_ms=0.001).status_code == 429, "an objective that nothing can hold"


def test_a_token_is_asked_for(calibrated: Path) -> None:
    with served(calibrated, token=TOKEN) as (address, _):
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": TOKEN}, {"authorization": "Bearer"}):
            answer = httpx.post(f"{address}/embed", json={"inputs": "w5"}, headers=headers)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            for path in ("/info", "/metrics", "/status", "/v1/models"):
                assert httpx.get(address + path, headers=headers).status_code == 401
            assert httpx.post(f"{address}/reload", headers=headers).status_code == 401
        assert httpx.get(f"{address}/health").status_code == httpx.get(f"{address}/").status_code == 200
        good = {"authorization": f"Bearer {TOKEN}"}
        assert httpx.post(f"{address}/embed", json={"inputs": "w5"}, headers=good).status_code == 200
        with openai.OpenAI(base_url=f"{address}/v1", api_key=TOKEN) as client:
            assert client.embeddings.create(model="x", input="w5").data
        other = openai.OpenAI(base_url=f"{address}/v1", api_key="no", max_retries=0)
        with other, pytest.raises(openai.AuthenticationError):
            other.embeddings.create(model="x", input="w5")


def test_a_bundle_is_replaced_under_load_and_a_damaged_one_is_not_taken(calibrated: Path, tmp_path: Path) -> None:
    place = shutil.copytree(calibrated, tmp_path / "bundle")
    with served(place, "--slo-ms", "20000") as (address, _):
        statuses: list[int] = []
        going = threading.Event()
        going.set()

        def ask() -> None:
            with httpx.Client() as client:
                while going.is_set():
                    statuses.append(client.post(f"{address}/embed", json={"inputs": "w5 w9"}, timeout=60).status_code)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(3):
            assert httpx.post(f"{address}/reload", timeout=60).status_code == 200
        manifest = json.loads((place / "manifest.json").read_text())
        (place / "ratio-2.onnx").write_bytes(b"x" * manifest["files"]["ratio-2.onnx"]["bytes"])
        refused = httpx.post(f"{address}/reload", timeout=60)
        assert refused.status_code == 409 and "old bundle is still served" in refused.json()["error"]
        going.clear()
        for thread in threads:
            thread.join()
        assert set(statuses) == {200} and len(statuses) > 50
        assert httpx.get(f"{address}/status").json()["reloads"] == 3
        assert embed(address, ratio=2).status_code == 200


def child_of(process: subprocess.Popen[str]) -> int:
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


def test_requests_under_way_are_answered_when_the_server_ends(calibrated: Path) -> None:
    with served(calibrated, "--slo-ms", "20000") as (address, process), ThreadPoolExecutor(8) as pool:
        body = {"inputs": ["w5 " * 100] * 64, "ratio": 1}
        asked = [pool.submit(httpx.post, f"{address}/embed", json=body, timeout=60) for _ in range(8)]
        deadline = time.monotonic() + 10
        while httpx.get(f"{address}/status").json()["waiting"] < 2 and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        statuses = [one.result().status_code for one in asked if one.exception() is None]
        assert statuses.count(200) >= 2 and set(statuses) <= {200, 503}
        assert process.wait(30) == 0


def test_a_killed_worker_is_started_again_and_who_waited_is_told(calibrated: Path) -> None:
    with served(calibrated, "--slo-ms", "20000") as (address, process):
        first = child_of(process)
        failed: list[Exception] = []
        statuses: list[int] = []

        def ask() -> None:
            for _ in range(40):
                try:
                    body = {"inputs": ["w5 " * 100] * 64}
                    statuses.append(httpx.post(f"{address}/embed", json=body, timeout=30).status_code)
                except httpx.TransportError as error:
                    failed.append(error)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        os.kill(first, signal.SIGKILL)
        for thread in threads:
            thread.join()
        assert not any(isinstance(error, httpx.TimeoutException) for error in failed), "silence"
        assert failed and statuses and set(statuses) == {200}
        assert child_of(process) != first and embed(address).status_code == 200


def test_it_drains_before_it_ends(calibrated: Path) -> None:
    with served(calibrated, "--drain-s", "3") as (address, process), httpx.Client() as client:
        assert client.get(f"{address}/health").status_code == 200
        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 3
        while client.get(f"{address}/health").status_code == 200 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert client.get(f"{address}/health").status_code == 503
        answer = client.post(f"{address}/embed", json={"inputs": "w5"})
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
        assert process.wait(20) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/health")


def test_a_server_ends_with_whoever_started_it(calibrated: Path) -> None:
    command = [sys.executable, "-m", "variator", "serve", str(calibrated), "--port", "0", "--engine", "onnxruntime"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None and "http://" in process.stderr.readline()
    worker = child_of(process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{worker}/cmdline").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{worker}/stat").read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}/cmdline").exists() or not Path(f"/proc/{worker}/cmdline").read_bytes()


def told(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "variator", "serve", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    return done.stderr


def test_what_cannot_be_served_is_told_at_once(calibrated: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "cannot listen" in told(str(calibrated), "--port", str(taken.getsockname()[1]))
    assert "not a bundle" in told(str(tmp_path), "--port", "0")
    place = shutil.copytree(calibrated, tmp_path / "bundle")
    next(place.glob("engines/*/latency.json")).unlink()
    assert "calibrate" in told(str(place), "--port", "0")


def test_settings_survive_their_way_to_the_child(tmp_path: Path) -> None:
    settings = ServerSettings(str(tmp_path), port=0, policy="fixed(2)", slo_ms=7.5)
    assert TOKEN not in settings.to_json()
    assert ServerSettings.from_json(settings.to_json(), "") == settings


def test_a_classifier_predicts_and_ranks(tmp_path: Path) -> None:
    labels = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    for name, more in (("two", labels), ("one", {"num_labels": 1})):
        backbone = load_backbone(
            str(write_checkpoint("bert", tmp_path / name, "AutoModelForSequenceClassification", **more))
        )
        build(export(backbone, tmp_path / f"{name}-bundle", ExportSettings(())), "onnxruntime", "fp32")
        write_latency(tmp_path / f"{name}-bundle")
    with Runtime.open(tmp_path / "two-bundle") as runtime:
        logits = runtime.infer(["w5", ("w5", "w9")], ratio=1).outputs["logits"]
    with served(tmp_path / "two-bundle", "--slo-ms", "10000") as (address, _):
        one = httpx.post(f"{address}/predict", json={"inputs": "w5"}).json()
        assert {entry["label"] for entry in one} == {"bad", "good"} and one[0]["score"] >= one[1]["score"]
        assert sum(entry["score"] for entry in one) == pytest.approx(1, abs=1e-5)
        raw = httpx.post(f"{address}/predict", json={"inputs": [["w5"], ["w5", "w9"]], "raw_scores": True}).json()
        for row, entries in zip(logits, raw, strict=True):
            scores = {entry["label"]: entry["score"] for entry in entries}
            np.testing.assert_allclose([scores["bad"], scores["good"]], row, atol=1e-4)
        pair = httpx.post(f"{address}/", json={"inputs": ["w5", "w9"]})
        assert pair.json()[0]["score"] <= 1 and pair.headers["x-variator-ratio"] == "1"
        assert httpx.post(f"{address}/rerank", json={"query": "w5", "texts": ["w9"]}).status_code == 422
        assert httpx.post(f"{address}/embed", json={"inputs": "w5"}).status_code == 422
    with served(tmp_path / "one-bundle", "--slo-ms", "10000") as (address, _):
        found = httpx.post(f"{address}/rerank", json={"query": "w5", "texts": ["w9", "w5 w7", "w2"]}).json()
        assert len(found) == 3 and all(0 <= one["score"] <= 1 for one in found)


def test_base64_is_little_endian_floats(address: str, expected: dict[int, np.ndarray]) -> None:
    body = {"input": "w5 w9", "encoding_format": "base64"}
    text = httpx.post(f"{address}/v1/embeddings", json=body).json()["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(text), "<f4"), expected[1][0], atol=1e-5)
