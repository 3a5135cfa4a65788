"""The runtime: right rows in the right order, lazily, from many threads; bad requests are refused."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import write_checkpoint
from variator.engines.build import build
from variator.engines.reader import BUCKETS
from variator.engines.runtime import Runtime
from variator.errors import BundleError, EngineError, InputError
from variator.exporters.export import ExportSettings, export
from variator.toolkit.bundle import Bundle
from variator.toolkit.checkpoint import Backbone, load_backbone

TEXTS = ["w1 w2 w3", "a b c d e f g h i", "w4", " ".join(["w5"] * 70)]


@pytest.fixture(scope="module")
def built(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A copy with an ONNX Runtime engine."""
    path = shutil.copytree(bundle.path, tmp_path_factory.mktemp("built") / "bundle")
    build(path, "onnxruntime", "fp32")
    return Bundle.open(path)


@pytest.fixture
def runtime(built: Bundle) -> Iterator[Runtime]:
    with Runtime.open(built) as opened:
        yield opened


def test_rows_come_back_in_order_and_equal_the_model(runtime: Runtime, backbone: Backbone) -> None:
    result = runtime.infer(TEXTS, ratio=1)
    for row, text in enumerate(TEXTS):
        batch = backbone.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            expected = backbone.model(batch["input_ids"], batch["attention_mask"])[0][0]
        np.testing.assert_allclose(result.outputs["embedding"][row], expected.numpy(), atol=1e-5)
    assert (result.ratio, result.engine, result.precision) == (1, "onnxruntime", "fp32")
    assert result.lengths == [5, 11, 3, 72]
    assert result.compute_ms > 0 and result.queue_ms >= 0


def test_ids_and_texts_are_the_same_request(runtime: Runtime, backbone: Backbone) -> None:
    ids = [backbone.tokenizer(text)["input_ids"] for text in TEXTS]
    texts, tokens = runtime.infer(TEXTS, ratio=2), runtime.infer(ids, ratio=2)
    np.testing.assert_array_equal(texts.outputs["embedding"], tokens.outputs["embedding"])


@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_a_rows_result_does_not_depend_on_its_batch(runtime: Runtime, ratio: int) -> None:
    together = runtime.infer(TEXTS * 3, ratio=ratio).outputs["embedding"]
    for row, text in enumerate(TEXTS):
        alone = runtime.infer([text], ratio=ratio).outputs["embedding"][0]
        for repeat in range(3):
            np.testing.assert_allclose(together[row + repeat * len(TEXTS)], alone, atol=1e-6)


def test_no_ratio_is_loaded_before_it_is_needed(built: Bundle) -> None:
    with Runtime.open(built) as runtime:
        assert runtime.loaded == []
        runtime.infer(["w1"], ratio=4)
        assert runtime.loaded == [4]


def test_the_longest_input_works_and_a_longer_one_only_with_truncation(runtime: Runtime) -> None:
    limit = runtime.bundle.manifest.max_length
    assert limit not in BUCKETS
    assert runtime.infer([[7] * limit], ratio=4).lengths == [limit]
    for request in ([7] * (limit + 1), " ".join(["w1"] * limit)):
        with pytest.raises(InputError, match=f"1 to {limit}"):
            runtime.infer(["w1", request], ratio=4)
        assert runtime.infer(["w1", request], ratio=4, truncate=True).lengths == [3, limit]


def test_truncation_keeps_the_special_tokens(runtime: Runtime, backbone: Backbone) -> None:
    text = " ".join(["w1"] * 200)
    row = runtime.tokenise([text], truncate=True)[0]
    assert list(row.ids) == backbone.tokenizer(text, truncation=True, max_length=150)["input_ids"]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "empty"),
        ([""], "input 0 is an empty text"),
        (["w1", "  \n"], "input 1 is an empty text"),
        ("a text", "not a list"),
        ([[]], "input 0"),
        ([[1, "x"]], "input 0"),
        ([[1.5]], "input 0"),
        ([[1, -1]], "token id -1"),
        ([[1, 120]], "token id 120"),
        ([("", " ")], "empty text"),
        ([b"w1"], "input 0"),
        ([5], "input 0"),
        ([None], "input 0"),
        (["\udcff"], "Unicode"),
    ],
)
def test_a_bad_request_is_refused(runtime: Runtime, inputs: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        runtime.infer(inputs, ratio=1)


@pytest.mark.parametrize("ratio", [0, 3, 8, 1000, 3.5, True, "fast"])
def test_a_ratio_that_is_not_there_is_refused(runtime: Runtime, ratio: Any) -> None:
    with pytest.raises(InputError, match="1, 2, 4"):
        runtime.infer(["w1"], ratio=ratio)


def test_many_threads_get_their_own_answers(runtime: Runtime) -> None:
    texts = [f"w{i} w{i + 1} a b" + " c" * (i % 13) for i in range(24)]
    alone = {
        (i, k): runtime.infer([text], ratio=k).outputs["embedding"] for i, text in enumerate(texts) for k in (1, 2, 4)
    }
    with ThreadPoolExecutor(8) as pool:
        jobs = {pool.submit(runtime.infer, [texts[i]], ratio=k): (i, k) for i, k in list(alone) * 4}
        for job, key in jobs.items():
            assert job.result().ratio == key[1]
            np.testing.assert_array_equal(job.result().outputs["embedding"], alone[key])


def test_a_waiting_request_reports_its_queue(runtime: Runtime) -> None:
    runtime.infer(["w1"], ratio=1)
    results = []
    with runtime._compute_lock:
        thread = threading.Thread(target=lambda: results.append(runtime.infer(["w1"], ratio=1)))
        thread.start()
        thread.join(0.15)
    thread.join()
    assert results[0].queue_ms > 100 and results[0].compute_ms < 100


def test_an_export_over_a_served_bundle_is_noticed(built: Bundle, backbone: Backbone, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    path = shutil.copytree(built.path, tmp_path / "copy")
    build(path, "openvino", "fp32")
    write_checkpoint("electra", tmp_path / "model")
    with Runtime.open(path, "openvino", "fp32") as runtime:
        runtime.infer(["w1"], ratio=1)
        export(str(tmp_path / "model"), path, ExportSettings((4,), untrained=True, overwrite=True))
        with pytest.raises(BundleError, match="sha256"):
            runtime.infer(["w1"], ratio=4)


def test_a_closed_runtime_says_so(built: Bundle) -> None:
    with Runtime.open(built) as runtime:
        runtime.infer(["w1"], ratio=1)
    with pytest.raises(EngineError, match="closed"):
        runtime.infer(["w1"], ratio=1)


def test_a_damaged_tokenizer_is_refused(built: Bundle, tmp_path: Path) -> None:
    path = shutil.copytree(built.path, tmp_path / "copy")
    data = (path / "tokenizer.json").read_bytes()
    (path / "tokenizer.json").write_bytes(data[:-1] + b" ")
    with pytest.raises(BundleError, match="sha256"):
        Runtime.open(path)


def test_pairs_and_token_outputs(tmp_path: Path) -> None:
    write_checkpoint("bert", tmp_path / "model", "AutoModelForQuestionAnswering")
    loaded = load_backbone(str(tmp_path / "model"))
    export(loaded, tmp_path / "bundle", ExportSettings((2,), untrained=True, rank=4))
    build(tmp_path / "bundle", "onnxruntime", "fp32")
    pairs = [("w1 w2", "a b c d e f g h i j"), ("w3", "w4 w5")]
    with Runtime.open(tmp_path / "bundle") as runtime:
        result = runtime.infer(pairs, ratio=1)
    assert result.outputs["start_logits"].shape == (2, max(result.lengths))
    for row, pair in enumerate(pairs):
        expected = loaded.original(
            **loaded.tokenizer(*pair, return_tensors="pt", return_token_type_ids=True)
        ).start_logits[0]
        np.testing.assert_allclose(result.outputs["start_logits"][row, : len(expected)], expected.detach(), atol=1e-4)
        assert (result.outputs["start_logits"][row, len(expected) :] < -1e4).all()


def test_openvino_gives_the_same_answers(built: Bundle, tmp_path: Path, runtime: Runtime) -> None:
    pytest.importorskip("openvino")
    path = shutil.copytree(built.path, tmp_path / "copy")
    build(path, "openvino", "fp32")
    with Runtime.open(path, "openvino", "fp32") as other, ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(other.infer, TEXTS, ratio=ratio) for ratio in (1, 2, 4) * 3]
        for job in jobs:
            expected = runtime.infer(TEXTS, ratio=job.result().ratio)
            np.testing.assert_allclose(job.result().outputs["embedding"], expected.outputs["embedding"], atol=1e-5)


def test_an_encoder_has_nothing_to_write_with(calibrated: Path) -> None:
    with Runtime.open(calibrated) as runtime:
        for call in (runtime.generate, lambda texts, ratio: runtime.score(texts, ["w2"], ratio=ratio)):
            with pytest.raises(InputError, match="no decoder"):
                call(["w1"], ratio=1)
