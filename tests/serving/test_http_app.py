"""The HTTP application in this process: its limits, what it says when the engine hangs, and connections that idle."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from pydantic import ValidationError
from starlette.testclient import TestClient

from variator.serving.bodies import Embed, OpenAIEmbeddings, Predict, Rerank
from variator.serving.http import HttpSettings, create_app
from variator.serving.process import Impatient
from variator.serving.service import OpenSettings, Service


@pytest.fixture(scope="module")
def service(calibrated: Path) -> Iterator[Service]:
    with Service(calibrated, OpenSettings("onnxruntime", "fp32")) as opened:
        yield opened


@pytest.fixture
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(create_app(service, HttpSettings(max_tokens=50, body_s=0.2))) as opened:
        yield opened


def test_tokens_of_a_request_are_limited(client: TestClient) -> None:
    assert client.post("/embed", json={"inputs": ["w5 w9"] * 12}).status_code == 200
    refused = client.post("/embed", json={"inputs": ["w5 w9"] * 13})
    assert refused.status_code == 413 and "52 tokens" in refused.json()["error"]


def test_an_engine_that_hangs_is_unhealthy(client: TestClient, service: Service) -> None:
    service.server.hanging = True
    try:
        assert client.get("/health").status_code == 503
        answer = client.post("/embed", json={"inputs": "w5"})
        assert answer.status_code == 503 and "does not answer" in answer.json()["error"]
    finally:
        service.server.hanging = False
    assert client.get("/health").status_code == 200


def test_a_known_quality_is_told(client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "x-variator-quality" not in client.post("/embed", json={"inputs": "w5", "ratio": 4}).headers
    monkeypatch.setitem(service.runtime.__dict__, "quality", {1: 1.0, 4: 0.9876})
    assert client.post("/embed", json={"inputs": "w5", "ratio": 4}).headers["x-variator-quality"] == "0.9876"


def test_a_page_of_somebody_else_reloads_nothing(client: TestClient, service: Service) -> None:
    before = service.reloads
    assert client.post("/reload", headers={"origin": "http://elsewhere.example"}).status_code == 403
    assert service.reloads == before
    assert client.post("/reload", headers={"origin": "http://testserver"}).status_code == 200


def test_below_a_prefix_the_same_paths_are_open_and_errors_have_the_same_form(service: Service) -> None:
    app = create_app(service, HttpSettings(token="word"))
    with TestClient(app, root_path="/scaled") as client:
        assert client.get("/scaled/health").status_code == 200 and client.get("/scaled/info").status_code == 401
        headers = {"authorization": "Bearer word"}
        assert client.get("/scaled/info", headers=headers).status_code == 200
        refused = client.post("/scaled/v1/embeddings", json={"input": []}, headers=headers)
        assert refused.status_code == 422 and refused.json()["error"]["message"]


def test_a_body_that_trickles_in_is_given_up(client: TestClient) -> None:
    async def ask() -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(0.05)
            return {"type": "http.request", "body": b" ", "more_body": True}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/embed", "headers": [], "query_string": b""}
        await client.app(scope, receive, send)
        return sent

    start, _ = asyncio.run(ask())
    assert start["status"] == 408 and (b"connection", b"close") in start["headers"]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (Embed, {"inputs": [*[1] * 100_000, 1.5]}),
        (Embed, {"inputs": [[1.5] * 100_000]}),
        (OpenAIEmbeddings, {"input": [*["a"] * 100_000, 7]}),
        (Predict, {"inputs": [[7] * 100_000]}),
        (Rerank, {"query": "a", "texts": [7] * 100_000}),
    ],
)
def test_a_long_list_of_the_wrong_kind_is_one_error(kind: Any, body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as raised:
        kind.model_validate_json(json.dumps(body))
    assert raised.value.error_count() < 10


@pytest.fixture(scope="module")
def impatient() -> Iterator[int]:
    """A port with a server that takes a second for an answer, and waits for 0.4 s for a request."""

    class Hurried(Impatient):
        idle_s = 0.4

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(1.0)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, http=Hurried, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    yield listening.getsockname()[1]
    server.should_exit = True
    thread.join(10)


HEAD = b"GET / HTTP/1.1\r\nhost: x\r\n"


@pytest.mark.parametrize("dribbled", [b"", HEAD], ids=["silent", "letter by letter"])
def test_a_connection_on_which_no_request_begins_is_closed(impatient: int, dribbled: bytes) -> None:
    with socket.create_connection(("127.0.0.1", impatient), timeout=0.05) as idle:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                idle.sendall(dribbled[:1])
                dribbled = dribbled[1:] + dribbled[:1]
                if idle.recv(100) == b"":
                    return
            except TimeoutError:
                continue
            except ConnectionError:
                return
    raise AssertionError("it was never closed")


def test_who_waits_for_an_answer_or_asks_again_is_not_turned_away(impatient: int) -> None:
    with socket.create_connection(("127.0.0.1", impatient), timeout=10) as asking:
        for _ in range(2):
            asking.sendall(HEAD + b"\r\n")
            answer = b""
            while not answer.endswith(b"ok"):
                part = asking.recv(100)
                assert part, "closed"
                answer += part
