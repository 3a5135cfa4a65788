"""The written repository in a real Triton Inference Server (CPU), over HTTP and gRPC."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from tools.triton_server import TritonServer, install
from variator.engines.built import LATENCY_FILE
from variator.engines.runtime import Runtime
from variator.errors import EngineError
from variator.exporters.triton import RUNTIME, TOKENS, triton
from variator.exporters.triton_config import TritonSettings
from variator.toolkit.rows import Row

TEXTS = ["a b c", "w1 w2 w3 w4 w5", "w7"]
PATIENT = {"slo_ms": "60000"}
PROTOCOLS = {"http": triton_http, "grpc": triton_grpc}


@pytest.fixture(scope="module")
def installed() -> Path:
    try:
        return install()
    except EngineError as error:
        pytest.skip(f"no tritonserver here: {error}")


@pytest.fixture(scope="module")
def repository(installed: Path, calibrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return triton(calibrated, tmp_path_factory.mktemp("triton") / "models", settings=TritonSettings(max_rows=8)).path


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    with TritonServer(repository, tmp_path_factory.mktemp("server"), [RUNTIME, TOKENS]) as running:
        yield running


@pytest.fixture(scope="module")
def runtime(calibrated: Path) -> Iterator[Runtime]:
    with Runtime.open(calibrated, "onnxruntime", "fp32") as opened:
        yield opened


Ask = Callable[..., Any]


def client_of(server: TritonServer, protocol: str) -> Any:
    """A client that waits no longer than a test should."""
    if protocol == "http":
        return triton_http.InferenceServerClient(server.http, network_timeout=30.0)
    return triton_grpc.InferenceServerClient(server.grpc)


def tensor(protocol: str, name: str, values: Any, kind: str = "") -> Any:
    """An input of a request; texts as bytes."""
    array = np.array(values, np.int64) if kind or isinstance(values[0][0], int) else np.array(values, object)
    kinds = {"INT32": np.int32, "INT64": np.int64}
    array = array.astype(kinds[kind]) if kind else array
    given = PROTOCOLS[protocol].InferInput(
        name, list(array.shape), kind or ("INT64" if array.dtype == np.int64 else "BYTES")
    )
    given.set_data_from_numpy(array)
    return given


def texts(protocol: str, *values: str | bytes, name: str = "text") -> list[Any]:
    """The input of texts."""
    return [tensor(protocol, name, [[one.encode() if isinstance(one, str) else one] for one in values])]


@pytest.fixture(params=list(PROTOCOLS))
def ask(request: pytest.FixtureRequest, server: TritonServer) -> Iterator[Ask]:
    """Calls a model over either protocol."""
    protocol = request.param
    client = client_of(server, protocol)

    def call(*values: str | bytes, inputs: list[Any] | None = None, model: str = RUNTIME, **options: Any) -> Any:
        return client.infer(model, inputs or texts(protocol, *values), **options)

    call.protocol = protocol  # type: ignore[attr-defined]
    yield call
    client.close()


def ratios_of(answer: Any) -> list[str]:
    return [one.decode() for one in answer.as_numpy("ratio").ravel()]


@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_answers_are_the_runtimes(ask: Ask, runtime: Runtime, ratio: int) -> None:
    answer = ask(*TEXTS, parameters={"ratio": str(ratio)})
    expected = runtime.infer(TEXTS, ratio=ratio).outputs["embedding"]
    np.testing.assert_allclose(answer.as_numpy("embedding"), expected, atol=1e-5)
    assert ratios_of(answer) == [str(ratio)] * len(TEXTS)


def test_pairs_and_token_ids_are_read_as_the_runtime_does(ask: Ask, runtime: Runtime) -> None:
    protocol = ask.protocol  # type: ignore[attr-defined]
    pairs = [*texts(protocol, "a b", "c"), *texts(protocol, "w1", "w2 w3", name="text_pair")]
    expected = runtime.infer([("a b", "w1"), ("c", "w2 w3")], ratio=2).outputs["embedding"]
    answer = ask(inputs=pairs, parameters={"ratio": "2"})
    np.testing.assert_allclose(answer.as_numpy("embedding"), expected, atol=1e-5)
    ids, mask, types = [[5, 6, 7, 8], [9, 10, 99, 98]], [[1, 1, 1, 1], [1, 1, 0, 0]], [[0, 0, 1, 1], [0, 1, 1, 1]]
    rows = [Row([5, 6, 7, 8], [0, 0, 1, 1]), Row([9, 10], [0, 1])]
    named = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    answer = ask(inputs=[tensor(protocol, name, values) for name, values in named.items()], parameters={"ratio": "4"})
    expected = runtime.infer(rows, ratio=4).outputs["embedding"]
    np.testing.assert_allclose(answer.as_numpy("embedding"), expected, atol=1e-5)


def test_the_load_chooses_a_ratio_within_the_bounds(ask: Ask, runtime: Runtime) -> None:
    served = ratios_of(ask("a b c", parameters={**PATIENT, "ratio": "auto"}))
    assert served == ["1"]  # nothing else waits
    answer = ask("a b c", parameters={**PATIENT, "min_ratio": "4"})
    faster = ratios_of(answer)[0]
    assert faster != "1"
    expected = runtime.infer(["a b c"], ratio=int(faster)).outputs["embedding"]
    np.testing.assert_allclose(answer.as_numpy("embedding"), expected, atol=1e-5)


def test_the_front_gives_what_graphs_take(ask: Ask, runtime: Runtime) -> None:
    answer = ask(*TEXTS, model=TOKENS)
    rows = runtime.tokenise(TEXTS)
    found, mask = answer.as_numpy("input_ids"), answer.as_numpy("attention_mask")
    assert found.shape == mask.shape == (3, 8)
    for row, ids, ones in zip(rows, found, mask, strict=True):
        assert ids[: len(row.ids)].tolist() == list(row.ids) and ones.sum() == len(row.ids)


def burst(server: TritonServer, count: int, **options: Any) -> list[Any]:
    """Send requests all at once; the answers, or what was said instead."""
    client = client_of(server, "grpc")
    done: list[Any] = [None] * count
    left = threading.Semaphore(0)

    def keep(index: int, result: Any, error: Any) -> None:
        done[index] = error or result
        left.release()

    for index in range(count):
        client.async_infer(
            RUNTIME,
            texts("grpc", f"w{index % 9} b"),
            lambda result, error, index=index: keep(index, result, error),
            client_timeout=30,
            **options,
        )
    for _ in range(count):
        assert left.acquire(timeout=40)
    client.close()
    return done


def counted(server: TritonServer, name: str) -> float:
    """Sum of a metric over its labels, once it has been told."""
    time.sleep(1.3)
    return sum(float(line.rsplit(" ", 1)[1]) for line in server.metrics().splitlines() if line.startswith(name + "{"))


def test_requests_that_come_together_are_batched_and_answered_right(server: TritonServer, runtime: Runtime) -> None:
    client = client_of(server, "grpc")

    def statistics() -> tuple[int, int]:
        told = client.get_inference_statistics(RUNTIME).model_stats[0]
        return told.inference_count, told.execution_count

    rows, runs = counted(server, "variator_rows"), counted(server, "variator_batches")
    inferences, executions = statistics()
    answers = burst(server, 200, parameters={"ratio": "2", **PATIENT})
    expected = runtime.infer([f"w{n} b" for n in range(9)], ratio=2).outputs["embedding"]
    for index, answer in enumerate(answers):
        np.testing.assert_allclose(answer.as_numpy("embedding")[0], expected[index % 9], atol=1e-5)
    now = statistics()
    assert now[0] - inferences == 200 > now[1] - executions
    assert counted(server, "variator_rows") - rows == 200 > counted(server, "variator_batches") - runs
    client.close()


INVALID = {"http": "400", "grpc": "StatusCode.INVALID_ARGUMENT"}
UNAVAILABLE = {"http": "503", "grpc": "StatusCode.UNAVAILABLE"}


@pytest.mark.parametrize(
    ("values", "parameters", "said"),
    [
        (["x"], {"ratio": "7"}, "valid: auto, 1"),
        (["x"], {"ratio": "../../etc"}, "valid: auto, 1"),
        (["x"], {"ratio": True}, "valid: auto, 1"),
        (["x"], {"ratoi": "4"}, "no parameter 'ratoi'"),
        (["x"], {"slo_ms": "soon"}, "slo_ms is 'soon'"),
        (["x"], {"slo_ms": "-1"}, "SLO"),
        (["x"], {"slo_ms": "nan"}, "SLO"),
        (["x"], {"min_ratio": "3"}, "min_ratio"),
        (["x"], {"ratio": "4", "min_ratio": "2"}, "min_ratio with ratio 4"),
        (["x"], {"truncate": "yes"}, "truncate"),
        ([b"good", b"\xff\xfe"], {}, "text 1 is not UTF-8"),
        ([""], {}, "empty text"),
        (["  "], {}, "empty text"),
        (["w1 " * 400], {}, "the model's limit"),
        (["x"] * 9, {}, "batch-size must be <= 8"),
    ],
)
def test_what_cannot_be_served_is_said(
    ask: Ask, values: list[str | bytes], parameters: dict[str, Any], said: str
) -> None:
    with pytest.raises(InferenceServerException) as error:
        ask(*values, parameters=parameters)
    assert said in error.value.message()
    assert error.value.status() == INVALID[ask.protocol]  # type: ignore[attr-defined]


def test_inputs_of_wrong_kinds_and_shapes_are_refused(ask: Ask) -> None:
    protocol = ask.protocol  # type: ignore[attr-defined]
    ids = tensor(protocol, "input_ids", [[5, 6]])
    wrong = {
        "data-type is 'INT32'": [tensor(protocol, "input_ids", [[5, 6]], "INT32")],
        "no texts and no ids": [tensor(protocol, "attention_mask", [[1, 1]])],
        "both texts and token ids": [*texts(protocol, "a"), ids],
        "padded on the right": [ids, tensor(protocol, "attention_mask", [[0, 1]])],
        "the same shape": [ids, tensor(protocol, "attention_mask", [[1]])],
        "token id -1": [tensor(protocol, "input_ids", [[-1, 6]])],
        "token id 99999": [tensor(protocol, "input_ids", [[99999, 6]])],
        "token types": [ids, tensor(protocol, "token_type_ids", [[7, 0]])],
        "goes not with": [ids, *texts(protocol, "a", name="text_pair")],
        "unexpected": [tensor(protocol, "text", [[b"a", b"b"]])],
    }
    for said, inputs in wrong.items():
        with pytest.raises(InferenceServerException) as error:
            ask(inputs=inputs)
        assert said in error.value.message(), (said, error.value.message())
        assert error.value.status() == INVALID[protocol]
    assert ratios_of(ask("still there", parameters={"ratio": "1"})) == ["1"]


def test_an_objective_that_cannot_be_met_is_unavailable(ask: Ask) -> None:
    with pytest.raises(InferenceServerException, match="cannot be met") as error:
        ask("x", parameters={"slo_ms": "0.01"})
    assert error.value.status() == UNAVAILABLE[ask.protocol]  # type: ignore[attr-defined]
    with pytest.raises(InferenceServerException) as error:  # Triton's own, in its queue or in ours
        ask("x", timeout=1)
    assert error.value.status() == UNAVAILABLE[ask.protocol]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "path",
    ["..%2f..%2fetc%2fpasswd", "%2e%2e", "variator%00", "variator/versions/..%2f1", "variator/versions/-1", "no"],
)
def test_names_that_lead_elsewhere_are_unknown_models(server: TritonServer, path: str) -> None:
    body = b'{"inputs":[]}'
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(urllib.request.Request(f"http://{server.http}/v2/models/{path}/infer", body), timeout=10)
    assert 400 <= error.value.code < 500
    assert client_of(server, "http").is_server_live()


@pytest.mark.parametrize("name", ["../models/variator", "/etc", "..", "variator/../variator", "no-such-model"])
def test_no_model_is_loaded_from_elsewhere(server: TritonServer, name: str) -> None:
    with pytest.raises(InferenceServerException):
        client_of(server, "grpc").load_model(name, client_timeout=20)
    index = client_of(server, "grpc").get_model_repository_index().models
    assert {model.name for model in index if model.state == "READY"} == {RUNTIME, TOKENS}


def test_the_metrics_tell_what_was_served(server: TritonServer, ask: Ask) -> None:
    before = counted(server, "variator_requests")
    ask("a b", parameters={"ratio": "4"})
    assert counted(server, "variator_requests") == before + 1
    told = server.metrics()
    assert f'nv_inference_request_success{{model="{RUNTIME}"' in told
    assert 'outcome="served",ratio="4"' in told and "variator_queue_requests{" in told


class Traffic:
    """Requests from several clients at once until told to stop."""

    def __init__(self, server: TritonServer) -> None:
        self.versions: list[str] = []
        self.failed: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._send, args=(server, name)) for name in ("http", "grpc") * 2]
        for thread in self._threads:
            thread.start()

    def _send(self, server: TritonServer, protocol: str) -> None:
        client = client_of(server, protocol)
        while not self._stop.is_set():
            try:
                answer = client.infer(RUNTIME, texts(protocol, "a b c"), parameters={"ratio": "2", **PATIENT})
                told = answer.get_response()
                self.versions.append(told["model_version"] if protocol == "http" else told.model_version)
            except Exception as error:  # noqa: BLE001 - whatever it is, it must not be
                self.failed.append(str(error))
        client.close()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(40)


def other_version(calibrated: Path, place: Path) -> Path:
    """The same bundle with another table: another version."""
    bundle = Path(shutil.copytree(calibrated, place))
    table = next(bundle.glob(f"engines/*/{LATENCY_FILE}"))
    told = json.loads(table.read_text())
    table.write_text(json.dumps({**told, "date": "another day"}))
    return bundle


def test_a_new_version_takes_over_under_traffic_without_a_failure(
    server: TritonServer, repository: Path, calibrated: Path, tmp_path: Path
) -> None:
    settings, client = TritonSettings(max_rows=8), client_of(server, "grpc")
    old = triton(calibrated, repository, settings=settings).version
    bundle = other_version(calibrated, tmp_path / "bundle")
    traffic = Traffic(server)

    def answered_by(version: int) -> bool:
        return traffic.versions[-20:] == [str(version)] * 20

    try:
        wait_until(lambda: answered_by(old))
        new = triton(bundle, repository, settings=settings).version
        client.load_model(RUNTIME, client_timeout=60)
        wait_until(lambda: answered_by(new))
        assert new != old and triton(calibrated, repository, settings=settings).version == old
        client.load_model(RUNTIME, client_timeout=60)  # and back, to files that were kept
        wait_until(lambda: answered_by(old))
    finally:
        traffic.stop()
    assert traffic.failed == []
    assert {str(old), str(new)} == set(traffic.versions)
    assert (repository / RUNTIME / str(new)).is_dir() and (repository / RUNTIME / str(old)).is_dir()
    wait_until(lambda: set(server.stubs()) == {f"{RUNTIME}/{old}", f"{TOKENS}/{old}"})  # the other's memory is back


def test_a_version_that_does_not_load_leaves_the_old_one_in_service(
    server: TritonServer, repository: Path, calibrated: Path, tmp_path: Path
) -> None:
    settings, client = TritonSettings(max_rows=8), client_of(server, "grpc")
    new = triton(other_version(calibrated, tmp_path / "bundle"), repository, settings=settings).version
    try:
        next((repository / RUNTIME / str(new)).glob(f"bundle/engines/*/{LATENCY_FILE}")).unlink()
        with pytest.raises(InferenceServerException, match=r"no latency was measured(.|\n)*--calibrate"):
            client.load_model(RUNTIME, client_timeout=60)
        answer = client.infer(RUNTIME, texts("grpc", "a"), parameters={"ratio": "1"}, client_timeout=10)
        assert answer.get_response().model_version != str(new)
    finally:
        triton(calibrated, repository, settings=settings)
        client.load_model(RUNTIME, client_timeout=60)


def test_a_full_queue_refuses_what_is_too_much_and_answers_the_rest(server: TritonServer, runtime: Runtime) -> None:
    client = client_of(server, "http")
    config = client.get_model_config(RUNTIME)
    config["parameters"]["max_queue"]["string_value"] = "1"
    client.load_model(RUNTIME, config=json.dumps(config))
    try:
        answers = burst(server, 200, parameters={"ratio": "1", **PATIENT})
    finally:
        client.unload_model(RUNTIME)
        wait_until(lambda: not any(name.startswith(f"{RUNTIME}/") for name in server.stubs()))
        client.load_model(RUNTIME)
    refused = [one for one in answers if isinstance(one, Exception)]
    assert 0 < len(refused) < 200
    assert {one.status() for one in refused} == {UNAVAILABLE["grpc"]}
    assert all("1 requests are waiting" in one.message() for one in refused)
    expected = runtime.infer([f"w{n} b" for n in range(9)], ratio=1).outputs["embedding"]
    for index, one in enumerate(answers):
        if not isinstance(one, Exception):
            np.testing.assert_allclose(one.as_numpy("embedding")[0], expected[index % 9], atol=1e-5)


def wait_until(there: Callable[[], bool], timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not there():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def test_a_stub_that_dies_is_reported_and_comes_back_when_loaded_again(server: TritonServer, runtime: Runtime) -> None:
    client = client_of(server, "grpc")
    stub = next(process for name, process in server.stubs().items() if name.startswith(f"{RUNTIME}/"))
    os.kill(stub, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(InferenceServerException, match="is not healthy") as error:
        client.infer(RUNTIME, texts("grpc", "a"), client_timeout=20)
    assert error.value.status() == "StatusCode.INTERNAL" and time.monotonic() - started < 10
    answer = client.infer(TOKENS, texts("grpc", "a b"), client_timeout=10)  # the others go on
    assert answer.as_numpy("input_ids").shape == (1, 8)
    client.unload_model(RUNTIME, client_timeout=30)
    client.load_model(RUNTIME, client_timeout=60)
    answer = client.infer(RUNTIME, texts("grpc", "a b c"), parameters={"ratio": "4"}, client_timeout=10)
    expected = runtime.infer(["a b c"], ratio=4).outputs["embedding"]
    np.testing.assert_allclose(answer.as_numpy("embedding"), expected, atol=1e-5)


def test_the_commands_of_the_docs_work(server: TritonServer, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "triton.md").read_text(encoding="utf-8")
    posts = re.findall(r"curl -X POST localhost:8000(\S+)", text)
    assert len(posts) == 3
    for path in posts:
        with urllib.request.urlopen(urllib.request.Request(f"http://{server.http}{path}", b"{}"), timeout=60) as answer:
            assert answer.status == 200
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code) == 1 and "localhost:8000" in code[0]
    exec(compile(code[0].replace("localhost:8000", server.http), "docs", "exec"), {})  # noqa: S102 - our own page
    assert capsys.readouterr().out.count("b'") == 2


@pytest.mark.slow
@pytest.mark.skipif(int(np.__version__.split(".")[0]) < 2, reason="numpy 1 fits the stub")
def test_a_numpy_that_the_stub_does_not_fit_is_refused(repository: Path, tmp_path: Path) -> None:
    with TritonServer(repository, tmp_path, [RUNTIME], numpy=False) as running:
        assert not client_of(running, "http").is_model_ready(RUNTIME)
        assert "it does not fit numpy" in running.said()


@pytest.mark.slow
def test_the_cpu_configuration_of_the_same_directory_serves(repository: Path, runtime: Runtime, tmp_path: Path) -> None:
    options = ["--model-config-name=cpu"]
    with TritonServer(repository, tmp_path, [RUNTIME, TOKENS], options) as running:
        answer = client_of(running, "http").infer(RUNTIME, texts("http", *TEXTS), parameters={"ratio": "2"})
        expected = runtime.infer(TEXTS, ratio=2).outputs["embedding"]
        np.testing.assert_allclose(answer.as_numpy("embedding"), expected, atol=1e-5)
