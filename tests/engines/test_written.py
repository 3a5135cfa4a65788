"""Graphs written for GPUs: int8 and fp8 between Q and DQ, run here by ONNX Runtime without its own int8 kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from tests.conftest import lively
from variator.engines.written import written_in
from variator.exporters.export import ExportSettings, export
from variator.exporters.gate import compare, load_cases
from variator.exporters.precision import precision_of
from variator.toolkit.bundle import GATE_FILE, Bundle
from variator.toolkit.checkpoint import Backbone
from variator.toolkit.plugin_file import save_plugin


@pytest.fixture(scope="module")
def lively_bundle(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Ratios 1 and 4, with a plugin in which every tensor matters."""
    path = tmp_path_factory.mktemp("written")
    save_plugin(lively(backbone, 4), path)
    return export(backbone, path / "bundle", ExportSettings((4,), plugins=path))


@pytest.mark.parametrize(("precision", "stored"), [("int8", ir.DataType.INT8), ("fp8", ir.DataType.FLOAT8E4M3FN)])
@pytest.mark.parametrize("ratio", [1, 4])
def test_quantised_graphs_are_narrow_symmetric_and_near_the_reference(
    lively_bundle: Bundle, tmp_path: Path, precision: str, stored: ir.DataType, ratio: int
) -> None:
    graph = written_in(lively_bundle, lively_bundle.graph(ratio), precision, tmp_path)
    model = ir.load(graph)
    assert precision_of(model) == precision
    kinds = [node for node in model.graph if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    # Of two layers: query, key, value, output and the FFN's first; their inputs are Q and DQ, too.
    weights = [
        node.inputs[0] for node in kinds if node.op_type == "DequantizeLinear" and node.inputs[0].is_initializer()
    ]
    assert len(weights) == 2 * 5 and {value.dtype for value in weights} == {stored}
    for node in kinds:
        assert node.inputs[1].dtype == ir.DataType.FLOAT16 and node.inputs[2].dtype == stored
        assert not np.any(node.inputs[2].const_value.numpy().astype(np.float32))  # TensorRT takes no zero point
    onnx.checker.check_model(str(graph))
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    cases = load_cases(lively_bundle.path / GATE_FILE)
    run = lambda feed: {"embedding": session.run(["embedding"], dict(feed))[0]}  # noqa: E731
    assert 1e-3 < compare(precision, precision, cases, ratio, run) < 0.2


def test_a_graph_that_is_in_that_precision_is_taken_as_it_is(lively_bundle: Bundle, tmp_path: Path) -> None:
    assert written_in(lively_bundle, lively_bundle.graph(4), "fp32", tmp_path) == lively_bundle.graph(4)
