"""The shared layout: one graph for every ratio above 1, with its plugin as inputs, checked like every other."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from tests.conftest import lively, write_checkpoint
from variator.engines.backends import BACKENDS
from variator.engines.build import build
from variator.engines.runtime import Runtime
from variator.errors import GateError, InputError, PluginError
from variator.exporters.export import ExportSettings, export
from variator.exporters.flops import count_flops
from variator.exporters.gate import full_feed, gate_head, load_cases, plain_runner
from variator.exporters.graph import Compressed
from variator.toolkit import stack as stack_module
from variator.toolkit.bundle import GATE_FILE, SHARED_GRAPH, Bundle
from variator.toolkit.checkpoint import Backbone
from variator.toolkit.plugin_file import load_plugin, save_plugin
from variator.toolkit.stack import HEAD_INPUTS, PLUGIN_INPUTS, head_inputs, inputs_of, neutral
from variator.toolkit.weights import external_tensors


def test_the_bundle_holds_two_graphs_one_backbone_and_the_plugins(shared_bundle: Bundle, bundle: Bundle) -> None:
    files = set(shared_bundle.manifest.files)
    assert {name for name in files if name.endswith((".onnx", ".data", ".safetensors"))} == {
        "ratio-1.onnx", SHARED_GRAPH, "backbone.data", "ratio-2.safetensors", "ratio-4.safetensors", GATE_FILE,
    }  # fmt: skip
    assert [path.name for path in shared_bundle.graphs] == ["ratio-1.onnx", SHARED_GRAPH]
    assert shared_bundle.manifest.layout == "shared" and bundle.manifest.layout == "per-ratio"
    assert shared_bundle.manifest.files["backbone.data"].bytes == bundle.manifest.files["backbone.data"].bytes
    for ratio in (2, 4):
        plugin = load_plugin(shared_bundle.path / f"ratio-{ratio}.safetensors")
        assert plugin.digest == shared_bundle.ratio(ratio).plugin_sha256 == bundle.ratio(ratio).plugin_sha256


def test_the_graph_is_standard_and_takes_ratio_and_rank_from_shapes(shared_bundle: Bundle) -> None:
    model = onnx.load(shared_bundle.graph(4), load_external_data=False)
    assert {opset.domain for opset in model.opset_import} == {""} == {node.domain for node in model.graph.node}
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in model.graph.input
    }
    assert set(shapes) == {"input_ids", "attention_mask", *PLUGIN_INPUTS, *HEAD_INPUTS}
    assert shapes["input_ids"] == ["batch", "sequence"]
    assert shapes["plugin.ffn.score.weight"] == [2, "32*ratio", "ratio"]
    assert shapes["plugin.ffn.up.weight"] == [2, "rank", 32]
    assert {entries["location"] for _, entries in external_tensors(model)} == {"backbone.data"}
    for node in model.graph.node:  # TensorRT's parser insists
        assert node.op_type != "Slice" or (len(node.input) >= 4 and node.input[3])


def test_both_graphs_use_the_same_weights(shared_bundle: Bundle) -> None:
    places = []
    for graph in shared_bundle.graphs:
        model = onnx.load(graph, load_external_data=False)
        places.append({(entries["offset"], entries["length"]) for _, entries in external_tensors(model)})
    assert places[0] == places[1] and len(places[0]) > 10


def test_ratio_1_through_the_shared_graph_is_the_backbone(shared_bundle: Bundle) -> None:
    head = head_inputs(gate_head(32), 32)
    one, shared = (plain_runner(graph) for graph in shared_bundle.graphs)
    for case in load_cases(shared_bundle.path / GATE_FILE):
        expected = one({**head, **case.feed})
        found = shared({**head, **neutral(2, 32), **case.feed})
        for name in ("embedding", "logits"):
            np.testing.assert_allclose(found[name], expected[name], atol=2e-6)


def test_both_layouts_answer_alike_and_count_alike(shared_bundle: Bundle, bundle: Bundle) -> None:
    feed = full_feed(bundle.manifest, (3, 13))
    for ratio in (1, 2, 4):
        beside = inputs_of(shared_bundle, ratio)
        found = plain_runner(shared_bundle.graph(ratio))({**beside, **feed})["embedding"]
        np.testing.assert_allclose(found, plain_runner(bundle.graph(ratio))(feed)["embedding"], atol=1e-6)
        counted = count_flops(shared_bundle.graph(ratio), 64, beside)
        plain = count_flops(bundle.graph(ratio), 64)
        assert {part: counted[part] - plain[part] for part in ("attention", "ffn", "plugin")} == {
            "attention": 0, "ffn": 0, "plugin": 0,
        }  # fmt: skip
        assert counted["head"] - plain["head"] == 2 * 32  # one class


@pytest.mark.parametrize(
    ("kind", "auto"),
    [
        ("bert", "AutoModelForSequenceClassification"),
        pytest.param("roberta", "AutoModel", marks=pytest.mark.slow),
        ("distilbert", "AutoModelForQuestionAnswering"),
        pytest.param("electra", "AutoModelForSequenceClassification", marks=pytest.mark.slow),
    ],
)
def test_every_family_and_task_passes_the_gate(kind: str, auto: str, tmp_path: Path) -> None:
    write_checkpoint(kind, tmp_path / "model", auto)
    settings = ExportSettings((2, 4), untrained=True, rank=4, layout="shared")
    exported = export(str(tmp_path / "model"), tmp_path / "bundle", settings)
    assert all(entry.max_abs_error < 1e-4 for entry in exported.manifest.ratios.values())
    assert exported.manifest.shared is not None and not exported.manifest.shared.head  # for embeddings only


@pytest.fixture(scope="module")
def plain(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Of ratio 1 alone."""
    return export(backbone, tmp_path_factory.mktemp("plain") / "bundle", ExportSettings((), layout="shared"))


@pytest.mark.parametrize(("engine", "precision"), [("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "int8")])
def test_a_bundle_of_ratio_1_alone_is_ready_for_plugins(
    plain: Bundle, backbone: Backbone, tmp_path: Path, engine: str, precision: str
) -> None:
    if BACKENDS[engine].missing():
        pytest.skip(f"{engine} is not installed")
    assert plain.ratios == [1]
    exported = Bundle.open(shutil.copytree(plain.path, tmp_path / "bundle"))
    build(exported, engine, precision)
    plugin = lively(backbone, 4)
    with Runtime.open(exported, engine, precision) as runtime:
        runtime.plug("task", plugin)
        found = runtime.infer(["a b c w1 w2"], ratio=4, plugin="task").outputs["embedding"]
    batch = backbone.tokenizer(["a b c w1 w2"], return_tensors="pt")
    with torch.no_grad():
        expected = Compressed(backbone.model, plugin).eval()(batch["input_ids"], batch["attention_mask"])[0]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5 if precision == "fp32" else 0.1)


def test_the_gate_finds_a_plugin_in_another_ones_place(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for ratio in (2, 4):
        save_plugin(lively(backbone, ratio), tmp_path / "plugins")
    wrong = stack_module.stack(lively(backbone, 4, seed=1))
    monkeypatch.setattr(stack_module, "stack", lambda plugin: wrong)
    with pytest.raises(GateError, match=r"shared\.onnx"):
        export(backbone, tmp_path / "bundle", ExportSettings((2, 4), tmp_path / "plugins", layout="shared"))
    assert not (tmp_path / "bundle").exists()


def test_what_one_graph_cannot_hold_is_refused(backbone: Backbone, tmp_path: Path) -> None:
    plugins = tmp_path / "plugins"
    save_plugin(lively(backbone, 2, classes=3), plugins)
    with pytest.raises(PluginError, match=r"task head(.|\n)*--layout shared"):
        export(backbone, tmp_path / "bundle", ExportSettings((2,), plugins))
    with pytest.raises(InputError, match=r"layout 'split'(.|\n)*per-ratio, shared"):
        export(backbone, tmp_path / "bundle", ExportSettings((2,), plugins, layout="split"))
    gelu = lively(backbone, 4)
    save_plugin(type(gelu)(**{**gelu.__dict__, "config": type(gelu.config)(4, 8, "gelu")}), plugins)
    with pytest.raises(PluginError, match=r"activations: gelu, tanh(.|\n)*per-ratio"):
        export(backbone, tmp_path / "bundle", ExportSettings((2, 4), plugins, layout="shared"))
    assert not (tmp_path / "bundle").exists()


@pytest.mark.slow
def test_a_wide_plugin_of_many_classes_widens_the_profile_and_counts_as_flops(
    backbone: Backbone, tmp_path: Path
) -> None:
    save_plugin(lively(backbone, 4, rank=300, classes=1500), tmp_path / "plugins")
    exported = export(backbone, tmp_path / "bundle", ExportSettings((4,), tmp_path / "plugins", layout="shared"))
    assert exported.manifest.shared is not None and exported.manifest.shared.max_rank == 300
    assert exported.manifest.shared.max_classes == 1500
    assert exported.ratio(4).head and exported.ratio(1).head
    assert exported.ratio(4).flops["head"] - exported.ratio(1).flops["head"] == 2 * 32 * (1500 - 1)
