"""Export: graphs that are dynamic, shared, standard, and right; failures that leave nothing behind."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import write_checkpoint
from variator.errors import GateError, InputError, PluginError, VariatorError
from variator.exporters import export as export_module
from variator.exporters.export import ExportSettings, export
from variator.exporters.flops import count_flops
from variator.exporters.gate import Case, compare, load_cases, save_cases
from variator.exporters.graph import Compressed
from variator.toolkit.bundle import GATE_FILE, Bundle
from variator.toolkit.checkpoint import Backbone, load_backbone
from variator.toolkit.plugin_file import untrained_plugin
from variator.toolkit.plugin_format import PluginConfig
from variator.toolkit.weights import INLINE_BYTES, check_external_data, external_tensors


@pytest.mark.parametrize(
    ("kind", "auto"),
    [
        ("bert", "AutoModelForSequenceClassification"),
        pytest.param("roberta", "AutoModelForSequenceClassification", marks=pytest.mark.slow),
        pytest.param("xlm-roberta", "AutoModel", marks=pytest.mark.slow),
        ("distilbert", "AutoModelForQuestionAnswering"),
        pytest.param("electra", "AutoModelForSequenceClassification", marks=pytest.mark.slow),
    ],
)
def test_every_family_and_task_passes_the_gate(kind: str, auto: str, tmp_path: Path) -> None:
    write_checkpoint(kind, tmp_path / "model", auto)
    bundle = export(str(tmp_path / "model"), tmp_path / "bundle", ExportSettings((4,), untrained=True, rank=4))
    assert all(entry.max_abs_error < 1e-4 for entry in bundle.manifest.ratios.values())


def test_graphs_are_standard_dynamic_and_share_their_weights(bundle: Bundle) -> None:
    places: dict[int, dict[str, tuple[str, str]]] = {}
    for ratio in bundle.ratios:
        model = onnx.load(bundle.graph(ratio), load_external_data=False)
        assert {opset.domain for opset in model.opset_import} == {""}
        assert {node.domain for node in model.graph.node} == {""}
        for value in model.graph.input:
            assert all(dim.dim_param for dim in value.type.tensor_type.shape.dim)
        for tensor in model.graph.initializer:
            assert tensor.data_location == onnx.TensorProto.EXTERNAL or len(tensor.raw_data) <= INLINE_BYTES
        places[ratio] = {t.name: (e["location"], e["offset"]) for t, e in external_tensors(model)}
    for ratio in (2, 4):
        shared = {name: place for name, place in places[ratio].items() if place[0] == "backbone.data"}
        assert shared == {name: places[1][name] for name in shared} and len(shared) == len(places[1])
        assert {place[0] for place in places[ratio].values()} <= {
            "backbone.data",
            "plugin-2.data",
            f"plugin-{ratio}.data",
        }


def test_a_further_ratio_costs_only_its_plugin_on_disk(bundle: Bundle) -> None:
    files = bundle.manifest.files
    parameters = bundle.manifest.ratios[2].plugin_parameters
    assert files["plugin-2.data"].bytes < 4 * parameters + 40 * 4096


@pytest.mark.parametrize("ratio", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 7, 64])
def test_flops_are_those_that_torch_counts(backbone: Backbone, bundle: Bundle, ratio: int, length: int) -> None:
    plugin = None if ratio == 1 else untrained_plugin(backbone, PluginConfig(ratio, 16))
    ids = torch.randint(5, 120, (3, length))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        Compressed(backbone.model, plugin).eval()(ids, torch.ones_like(ids))
    counted = count_flops(bundle.graph(ratio), length)
    assert 3 * counted["total"] == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert counted["total"] == sum(counted[part] for part in ("attention", "ffn", "plugin", "head"))
    assert (counted["plugin"] > 0) == (ratio > 1)


def test_the_parts_of_the_flops_are_the_structures_own(bundle: Bundle) -> None:
    d, inner, layers, length, rank = 32, 64, 2, 64, 16
    whole, compressed = count_flops(bundle.graph(1), length), count_flops(bundle.graph(4), length)
    assert whole["ffn"] == 2 * layers * length * 2 * d * inner == 4 * compressed["ffn"]
    assert whole["attention"] == compressed["attention"] == 2 * layers * (4 * length * d * d + 2 * length * length * d)
    groups = length // 4
    plugin = groups * (4 * 4 * d + 4 * d + d * rank) + length * (d * rank + rank * d)
    assert compressed["plugin"] == 2 * layers * plugin


def test_the_gate_names_tensor_shape_and_error(bundle: Bundle) -> None:
    cases = load_cases(bundle.path / GATE_FILE)

    def off(feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        case = next(case for case in cases if case.feed is feed)
        return {"embedding": case.expected[4]["embedding"] * 1.1}

    with pytest.raises(GateError, match=r"my engine, tensor 'embedding', shape 1x1: off by 0\.1"):
        compare("my engine", "fp32", cases, 4, off)
    assert compare("my engine", "int8", cases, 4, off) > 0


def test_the_gate_knows_another_ratios_answers_but_not_rounding_between_close_ones() -> None:
    rng = np.random.default_rng(0)
    feed = {"input_ids": np.zeros((1, 4), np.int64), "attention_mask": np.ones((1, 4), np.int64)}
    own = rng.normal(size=(1, 2)).astype(np.float32)
    far, close = own * 0.7, own * 0.99
    cases = [Case(feed, {1: {"logits": own}, 2: {"logits": far}, 4: {"logits": close}})]
    with pytest.raises(GateError, match="like ratio 2, not like ratio 1"):
        compare("it", "int8", cases, 1, lambda _: {"logits": far})
    assert compare("it", "int8", cases, 1, lambda _: {"logits": own * 0.994}) > 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda expected: np.full_like(expected, np.nan), "NaN"),
        (lambda expected: expected[..., :-1], "shape"),
        (lambda expected: expected[:1], "shape"),
        (lambda expected: 1 / 0, "cannot run"),
    ],
)
def test_the_gate_stops_nan_fixed_dimensions_and_crashes(bundle: Bundle, wrong: object, message: str) -> None:
    cases = load_cases(bundle.path / GATE_FILE)

    def run(feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        case = next(case for case in cases if case.feed is feed)
        return {"embedding": wrong(case.expected[1]["embedding"])}  # type: ignore[operator]

    with pytest.raises(GateError, match=message):
        compare("it", "int8", cases, 1, run)


def test_the_gate_has_padding_other_lengths_than_tracing_and_real_variety(bundle: Bundle) -> None:
    cases = load_cases(bundle.path / GATE_FILE)
    shapes = {case.feed["input_ids"].shape for case in cases}
    assert {(1, 1), (1, 5), (1, 33), (3, 33), (1, 128), (3, 128)} <= shapes and (2, 12) not in shapes
    assert any(0 in case.feed["attention_mask"] for case in cases)
    assert all(isinstance(case, Case) and set(case.expected) == {1, 2, 4} for case in cases)


def test_a_dimension_that_the_exporter_fixed_is_caught(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = export_module.export_graph

    def fixed(*arguments: object) -> object:
        model = real(*arguments)  # type: ignore[arg-type]
        for node in model.graph:
            if node.op_type == "Shape":
                import onnx_ir as ir

                constant = ir.tensor(np.array([2] if node.attributes.get_int("start", 0) == 0 else [12], np.int64))
                value = ir.Value(name=f"fixed_{node.name}", const_value=constant)
                model.graph.register_initializer(value)
                ir.convenience.replace_all_uses_with(node.outputs[0], value)
        return model

    monkeypatch.setattr(export_module, "export_graph", fixed)
    with pytest.raises(GateError):
        export(backbone, tmp_path / "bundle", ExportSettings((4,), untrained=True))
    assert list(tmp_path.iterdir()) == []


def test_nan_in_the_weights_is_caught(tmp_path: Path) -> None:
    write_checkpoint("bert", tmp_path / "model")
    loaded = load_backbone(str(tmp_path / "model"))
    next(iter(loaded.model.encoder.blocks)).ffn.inner.weight.data[0, 0] = float("nan")
    with pytest.raises(GateError, match="NaN"):
        export(loaded, tmp_path / "bundle", ExportSettings((2,), untrained=True))
    assert not (tmp_path / "bundle").exists()


def test_weights_that_differ_from_the_checkpoints_are_caught(tmp_path: Path) -> None:
    write_checkpoint("bert", tmp_path / "model")
    loaded = load_backbone(str(tmp_path / "model"))
    next(iter(loaded.model.encoder.blocks)).ffn.inner.weight.data[0] += 1.0
    with pytest.raises(GateError, match=r"ratio-1\.onnx"):
        export(loaded, tmp_path / "bundle", ExportSettings((2,), untrained=True))


def test_without_a_plugin_export_says_how_to_train_one(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=r"no plugin of ratio 4(.|\n)*variator train(.|\n)*--untrained"):
        export(backbone, tmp_path / "bundle", ExportSettings((4,)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ratio", [0, 1000, -2, 3.5])
def test_an_impossible_ratio_is_refused(backbone: Backbone, tmp_path: Path, ratio: int) -> None:
    with pytest.raises(InputError, match="ratio"):
        export(backbone, tmp_path / "bundle", ExportSettings((ratio,), untrained=True))


def test_an_existing_place_is_not_overwritten(backbone: Backbone, bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists already"):
        export(backbone, bundle.path, ExportSettings((4,), untrained=True))
    (tmp_path / "thesis").mkdir()
    with pytest.raises(InputError, match="not a bundle"):
        export(backbone, tmp_path / "thesis", ExportSettings((4,), untrained=True, overwrite=True))


@pytest.mark.slow
def test_a_killed_export_leaves_nothing_and_a_rerun_finishes(checkpoint: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "variator",
        "export",
        str(checkpoint),
        "--ratio",
        "2",
        "--untrained",
        "--rank",
        "4",
    ]
    process = subprocess.Popen([*command, "-o", str(tmp_path / "bundle")], stdout=subprocess.DEVNULL)
    for _ in range(600):  # kill it once a graph is being written
        if list(tmp_path.glob(".bundle.part-*/ratio-1.onnx")) or process.poll() is not None:
            break
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not (tmp_path / "bundle").exists() and list(tmp_path.glob(".bundle.part-*"))
    subprocess.run([*command, "-o", str(tmp_path / "bundle")], check=True, stdout=subprocess.DEVNULL)
    assert Bundle.open(tmp_path / "bundle").ratios == [1, 2] and [path.name for path in tmp_path.iterdir()] == [
        "bundle"
    ]


def test_a_full_disk_is_told_as_one(backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        export_module._save_tokenizer(backbone.tokenizer, tmp_path)
    assert caught.value.errno == errno.ENOSPC

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(VariatorError, match=r"No space left(.|\n)*free disk space"):
        save_cases([Case({"input_ids": np.zeros((1, 2), np.int64)}, {})], tmp_path / GATE_FILE)
    assert not (tmp_path / GATE_FILE).exists()


def test_external_data_that_points_outside_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    from variator.errors import BundleError

    for location, offset, message in (
        ("../backbone.data", "0", "outside"),
        ("/etc/passwd", "0", "outside"),
        ("backbone.data", "999999999", "missing"),
    ):
        model = onnx.load(bundle.graph(1), load_external_data=False)
        tensor, _ = next(external_tensors(model))
        for entry in tensor.external_data:
            entry.value = {"location": location, "offset": offset}.get(entry.key, entry.value)
        (tmp_path / "backbone.data").write_bytes((bundle.path / "backbone.data").read_bytes())
        onnx.save(model, tmp_path / "graph.onnx")
        with pytest.raises(BundleError, match=message):
            check_external_data(tmp_path / "graph.onnx")
    (tmp_path / "graph.onnx").write_bytes(b"\x08\x96garbage")
    with pytest.raises(BundleError, match="not an ONNX graph"):
        check_external_data(tmp_path / "graph.onnx")
