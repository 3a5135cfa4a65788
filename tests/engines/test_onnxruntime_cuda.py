"""ONNX Runtime on a GPU: what it is built from, and that it never runs on the processor instead without saying so."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx_ir
import onnxruntime
import pytest

from variator.bench.peers_cuda import _export_stock
from variator.engines import onnxruntime_cuda as module
from variator.engines.backends import BACKENDS
from variator.engines.base import BuildOptions
from variator.engines.build import build
from variator.errors import EngineError, InputError
from variator.exporters.gate import full_feed, plain_runner
from variator.exporters.precision import precision_of
from variator.toolkit.bundle import Bundle
from variator.toolkit.checkpoint import Backbone

BACKEND = BACKENDS["onnxruntime-cuda"]


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Bundle:
    """A copy without engines."""
    return Bundle.open(shutil.copytree(bundle.path, tmp_path / "copy", ignore=shutil.ignore_patterns("engines")))


@pytest.fixture
def rehearsal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor in the GPU's place."""
    monkeypatch.setattr(module, "PROVIDER", "CPUExecutionProvider")
    monkeypatch.setattr(module, "OPTIONS", {})
    monkeypatch.setattr(module, "no_gpu", lambda: None)
    monkeypatch.setattr(module, "gpu", lambda: type("Gpu", (), {"name": "Rehearsal"}))
    monkeypatch.setattr(type(BACKEND), "distribution", "onnxruntime")


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="it is there")
def test_a_library_without_the_provider_is_named_with_the_fix(copy: Bundle) -> None:
    with pytest.raises(EngineError, match=r"no CUDAExecutionProvider(.|\n)*pip install onnxruntime-gpu"):
        build(copy, "onnxruntime-cuda")
    assert not (copy.path / "engines").exists()


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_graphs_are_written_in_the_precision_checked_and_read_back(
    copy: Bundle, rehearsal: None, precision: str
) -> None:
    record = build(copy, "onnxruntime-cuda", precision).record
    assert (record.precision, record.device, record.gated) == (precision, "Rehearsal", True)
    assert set(record.files) == {"ratio-1.onnx", "ratio-2.onnx", "ratio-4.onnx", "weights.data"}
    least = {"fp16": 1e-5, "fp32": 0.0}[precision]
    assert all(least < error < 0.05 for error in record.max_abs_error.values())


def test_a_session_that_fell_back_is_refused(copy: Bundle, rehearsal: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime.InferenceSession, "get_providers", lambda self: ["OtherExecutionProvider"])
    with pytest.raises(EngineError, match=r"on OtherExecutionProvider instead of the GPU(.|\n)*print_debug_info"):
        build(copy, "onnxruntime-cuda", "fp32")
    assert not list((copy.path / "engines").glob("o*-*-*"))


def test_choices_of_plans_are_refused(copy: Bundle, rehearsal: None) -> None:
    with pytest.raises(InputError, match="takes every shape"):
        build(copy, "onnxruntime-cuda", options=BuildOptions((), ("8.9",)))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_it_runs_on_this_gpu(bundle: Bundle, shared_bundle: Bundle, tmp_path: Path, precision: str) -> None:
    lacking = BACKEND.missing()
    if lacking:
        pytest.skip(lacking)
    for source in (bundle, shared_bundle):
        ignored = shutil.ignore_patterns("engines")
        copied = Bundle.open(shutil.copytree(source.path, tmp_path / source.path.name, ignore=ignored))
        assert build(copied, "onnxruntime-cuda", precision).record.gated


def test_the_stock_peer_for_gpus_is_the_same_model_in_fp16(backbone: Backbone, bundle: Bundle, tmp_path: Path) -> None:
    _export_stock(backbone, tmp_path)
    assert precision_of(onnx_ir.load(tmp_path / "fp16.onnx")) == "fp16"
    feed = full_feed(bundle.manifest, (3, 16))
    found = plain_runner(tmp_path / "fp16.onnx")(feed)["embedding"]
    np.testing.assert_allclose(found, plain_runner(bundle.graph(1))(feed)["embedding"], atol=5e-3)
