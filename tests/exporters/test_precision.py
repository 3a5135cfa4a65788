"""Graphs written in fp16 and bf16: what becomes narrow, what stays fp32, and that the numbers hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.conftest import lively
from variator.engines.build import build
from variator.errors import GateError, InputError
from variator.exporters.export import ExportSettings, export
from variator.exporters.gate import compare, load_cases, plain_runner
from variator.exporters.precision import NARROW, narrow, precision_of, widened
from variator.toolkit.bundle import GATE_FILE, Bundle
from variator.toolkit.checkpoint import Backbone
from variator.toolkit.plugin_file import save_plugin


@pytest.fixture(scope="module")
def lively_bundle(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Ratios 1 and 4, with a plugin in which every tensor matters."""
    path = tmp_path_factory.mktemp("precision")
    save_plugin(lively(backbone, 4), path)
    return export(backbone, path / "bundle", ExportSettings((4,), plugins=path))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("ratio", [1, 4])
def test_what_is_narrow_and_what_is_not(lively_bundle: Bundle, precision: str, ratio: int, tmp_path: Path) -> None:
    model = narrow(ir.load(lively_bundle.graph(ratio)), precision)
    assert precision_of(model) == precision
    kinds: dict[str, set[object]] = {}
    for node in model.graph:
        kinds.setdefault(node.op_type, set()).update(value.dtype for value in node.outputs)
    assert kinds["Softmax"] == {ir.DataType.FLOAT} == kinds["ReduceL2"]
    assert kinds["LayerNormalization"] == {NARROW[precision]} == kinds["Gelu"]
    norms = [node for node in model.graph if node.op_type == "LayerNormalization"]
    assert all(node.attributes.get("stash_type", ir.AttrInt64("stash_type", 1)).as_int() == 1 for node in norms)
    masks = [node.inputs[0].producer() for node in model.graph if node.op_type == "Softmax"]
    assert all(node.op_type == "Add" and node.outputs[0].dtype == ir.DataType.FLOAT for node in masks)
    # Every weight that is multiplied with is narrow, and nothing that is not used is left in the graph.
    weights = [value for value in model.graph.initializers.values() if len(value.shape) > 1]
    assert {value.dtype for value in weights} == {NARROW[precision]}
    assert all(value.dtype == ir.DataType.FLOAT for value in model.graph.outputs)
    ir.save(model, tmp_path / "graph.onnx")
    onnx.checker.check_model(str(tmp_path / "graph.onnx"), full_check=True)


@pytest.mark.parametrize(
    ("layout", "precision"),
    [
        pytest.param("per-ratio", "bf16", marks=pytest.mark.slow),
        ("shared", "fp16"),
        pytest.param("per-ratio", "fp16", marks=pytest.mark.slow),
        pytest.param("shared", "bf16", marks=pytest.mark.slow),
    ],
)
def test_narrow_bundles_pass_the_gate_and_are_half_as_large(
    backbone: Backbone, bundle: Bundle, shared_bundle: Bundle, layout: str, precision: str, tmp_path: Path
) -> None:
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    for ratio in (2, 4):
        save_plugin(lively(backbone, ratio, rank=16), plugins)
    settings = ExportSettings((2, 4), plugins=plugins, layout=layout, precision=precision)
    found = export(backbone, tmp_path / "bundle", settings)
    assert found.manifest.precision == precision
    errors = [entry.max_abs_error for entry in found.manifest.ratios.values()]
    least = {"fp16": 1e-5, "bf16": 1e-4}[precision]  # rounding shows, or the graph was run in fp32
    assert all(least < error < 0.1 for error in errors)
    wide = (bundle if layout == "per-ratio" else shared_bundle).manifest
    assert found.manifest.files["backbone.data"].bytes < 0.75 * wide.files["backbone.data"].bytes  # rounded up to pages
    assert [entry.flops for entry in found.manifest.ratios.values()] == [e.flops for e in wide.ratios.values()]
    with pytest.raises(InputError, match=f"runs no {precision}"):
        build(found, "onnxruntime")
    assert not (found.path / "engines").exists()


def test_rounding_every_result_gives_what_a_kernel_gives(lively_bundle: Bundle, tmp_path: Path) -> None:
    cases = load_cases(lively_bundle.path / GATE_FILE)
    graphs = {"kernel": narrow(ir.load(lively_bundle.graph(4)), "fp16")}
    graphs["rounded"] = widened(narrow(ir.load(lively_bundle.graph(4)), "fp16"))
    found = {}
    for name, model in graphs.items():
        ir.save(model, tmp_path / f"{name}.onnx")
        run = plain_runner(tmp_path / f"{name}.onnx")
        compare(name, "fp16", cases, 4, run)
        found[name] = run(cases[-1].feed)["embedding"]
    assert np.abs(found["kernel"] - cases[-1].expected[4]["embedding"]).max() > 0
    np.testing.assert_allclose(found["kernel"], found["rounded"], atol=4e-3)


def test_a_weight_beyond_fp16_is_named(lively_bundle: Bundle) -> None:
    model = ir.load(lively_bundle.graph(1))
    name = next(name for name in model.graph.initializers if name.endswith("ffn.inner.weight"))
    value = model.graph.initializers[name]
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1e6), name=name)
    with pytest.raises(GateError, match=r"ffn\.inner\.weight.*does not fit fp16"):
        narrow(model, "fp16")


def test_an_unknown_precision_is_refused(lively_bundle: Bundle, backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="fp32, fp16, bf16"):
        narrow(ir.load(lively_bundle.graph(1)), "int8")
    with pytest.raises(InputError, match="fp32, fp16, bf16"):
        export(backbone, tmp_path / "bundle", ExportSettings((2,), untrained=True, precision="fp8"))
    assert not (tmp_path / "bundle").exists()
