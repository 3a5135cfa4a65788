"""Building: keyed, reused, gated, read back; damage and staleness are found before anything runs."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.conftest import lively
from variator import machine
from variator.bench.run import built_engines
from variator.engines import build as build_module
from variator.engines import onnxruntime as onnxruntime_module
from variator.engines.backends import BACKENDS
from variator.engines.base import BuildOptions
from variator.engines.build import build
from variator.engines.built import built_summary, find_built, load_engine, made_from
from variator.errors import BundleError, EngineError, GateError, InputError
from variator.toolkit.bundle import Bundle
from variator.toolkit.checkpoint import Backbone
from variator.toolkit.stack import stack
from variator.toolkit.weights import external_tensors

KINDS = [("onnxruntime", "fp32"), ("onnxruntime", "int8"), ("openvino", "fp32"), ("openvino", "int8")]


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Bundle:
    """A copy without engines."""
    return Bundle.open(shutil.copytree(bundle.path, tmp_path / "copy", ignore=shutil.ignore_patterns("engines")))


def needs(engine: str) -> None:
    if BACKENDS[engine].missing():
        pytest.skip(f"{engine} is not installed")


@pytest.fixture
def shared_copy(shared_bundle: Bundle, tmp_path: Path) -> Bundle:
    """A copy of the shared layout, without engines."""
    return Bundle.open(shutil.copytree(shared_bundle.path, tmp_path / "s", ignore=shutil.ignore_patterns("engines")))


@pytest.mark.parametrize(("engine", "precision"), KINDS)
def test_a_shared_engine_is_built_gated_at_every_ratio_and_read_back(
    shared_copy: Bundle, engine: str, precision: str
) -> None:
    needs(engine)
    built = build(shared_copy, engine, precision)
    assert set(built.record.max_abs_error) == {"1", "2", "4"}
    if built.record.files:  # openvino compiles fp32 from the bundle's own graphs
        assert {name for name in built.record.files if name.endswith(".onnx")} == {"ratio-1.onnx", "shared.onnx"}
    assert bool(built.record.files) == ((engine, precision) != ("openvino", "fp32"))
    for graph in ("ratio-1.onnx", "shared.onnx"):
        loaded = load_engine(shared_copy, built, graph)
        assert loaded.precision == precision
        loaded.close()


def test_the_gate_finds_a_shared_engine_with_the_wrong_plugin(
    shared_copy: Bundle, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = build_module.inputs_of
    other = stack(lively(backbone, 4))
    monkeypatch.setattr(
        build_module, "inputs_of", lambda b, ratio, head: real(b, ratio, head) | (other if ratio == 4 else {})
    )
    with pytest.raises(GateError, match="ratio 4"):
        build(shared_copy, "onnxruntime", "fp32")
    assert not list((shared_copy.path / "engines").glob("*-*-*"))


@pytest.mark.parametrize(("engine", "precision"), KINDS)
def test_an_engine_is_built_gated_and_read_back(copy: Bundle, engine: str, precision: str) -> None:
    needs(engine)
    built = build(copy, engine, precision)
    assert (built.record.backend, built.record.precision) == (engine, precision)
    assert set(built.record.max_abs_error) == set(built.record.probe_ms) == {"1", "2", "4"}
    if precision == "fp32":
        assert max(built.record.max_abs_error.values()) < 1e-4
    loaded = load_engine(copy, built, "ratio-4.onnx")
    assert loaded.precision == precision
    loaded.close()


def test_bf16_is_built_where_the_processor_has_it_and_refused_elsewhere(
    copy: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("openvino")
    if "bf16" in BACKENDS["openvino"].precisions():
        assert build(copy, "openvino", "bf16").record.precision == "bf16"
    monkeypatch.setattr(BACKENDS["openvino"], "precisions", lambda: ["fp32", "int8"])
    with pytest.raises(InputError, match=r"bf16(.|\n)*fp32, int8"):
        build(copy, "openvino", "bf16")


def test_what_another_precision_was_built_than_asked_for_is_an_error(
    copy: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime_module, "quantise_dynamic", lambda source, target: source)
    with pytest.raises(EngineError, match="built fp32 where int8 was asked for"):
        build(copy, "onnxruntime", "int8")
    assert not list((copy.path / "engines").glob("onnxruntime*"))


def test_an_unchanged_engine_is_reused(copy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(copy, "onnxruntime")
    monkeypatch.setattr(BACKENDS["onnxruntime"], "compile", lambda *_: pytest.fail("compiled again"))
    assert build(copy, "onnxruntime") == first


@pytest.mark.parametrize("change", ["graph", "version", "cpu", "options"])
def test_the_key_follows_everything_an_engine_depends_on(
    copy: Bundle, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    backend = BACKENDS["onnxruntime"]
    built = build(copy, "onnxruntime", "fp32")
    before = made_from(copy, backend, "fp32"), backend.target(BuildOptions(), "fp32")
    if change == "graph":
        entry = copy.manifest.files["ratio-4.onnx"]
        copy.manifest.files["ratio-4.onnx"] = type(entry)(entry.bytes, "0" * 64)
    elif change == "version":
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1")
    elif change == "cpu":
        monkeypatch.setattr(machine, "cpu_features", lambda: ["avx2"])
    else:
        monkeypatch.setattr(backend, "options", lambda precision: {"other": "1"})
    assert (made_from(copy, backend, "fp32"), backend.target(BuildOptions(), "fp32")) != before
    assert "stale" in built_summary(copy)[0] and built.directory.name in built_summary(copy)[0]
    with pytest.raises(EngineError, match=r"stale(.|\n)*variator build"):
        find_built(copy, "onnxruntime")
    if change in ("version", "options"):  # the same machine and export: the old one is of no use to anybody
        rebuilt = build(copy, "onnxruntime", "fp32")
        assert rebuilt.directory != built.directory and not built.directory.exists()


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "record", "extra"])
def test_a_damaged_engine_is_refused_by_the_runtime_and_rebuilt_by_build(copy: Bundle, damage: str) -> None:
    built = build(copy, "onnxruntime", "fp32")
    weights, record = built.directory / "weights.data", built.directory / "engine.json"
    data = weights.read_bytes()
    if damage == "flip":
        weights.write_bytes(data[:-100] + bytes([data[-100] ^ 255]) + data[-99:])
    elif damage == "truncate":
        weights.write_bytes(data[: len(data) // 2])
    elif damage == "remove":
        weights.unlink()
    elif damage == "extra":
        (built.directory / "engine.json").write_text(record.read_text().replace("ratio-4.onnx", "ratio-8.onnx"))
    elif damage == "record":
        record.write_text(record.read_text()[:50])
    with pytest.raises(EngineError):
        found, _ = find_built(copy, "onnxruntime")
        load_engine(copy, found, "ratio-4.onnx")
    rebuilt = build(copy, "onnxruntime", "fp32")
    rebuilt.verify()
    assert weights.read_bytes() == data


def test_an_openvino_engine_is_refused_when_the_graphs_it_compiles_have_changed(copy: Bundle) -> None:
    needs("openvino")
    built = build(copy, "openvino", "fp32")
    graph = copy.path / "ratio-2.onnx"
    data = bytearray(graph.read_bytes())
    data[-1] ^= 1
    graph.write_bytes(bytes(data))
    with pytest.raises(BundleError, match="sha256"):
        load_engine(copy, built, "ratio-2.onnx")


def test_a_damaged_engine_does_not_stand_in_the_way_of_another(copy: Bundle) -> None:
    needs("openvino")
    build(copy, "openvino", "fp32")
    damaged = build(copy, "onnxruntime", "fp32")
    (damaged.directory / "engine.json").write_text("{")
    found, reason = find_built(copy, "auto")
    assert found.record.backend == "openvino" and "onnxruntime fp32" in reason and "damaged" in reason
    engines, notes = built_engines(copy, ())
    assert [engine.record.backend for engine in engines] == ["openvino"] and "onnxruntime fp32" in notes[0]


def test_a_graph_with_nan_weights_or_under_anothers_name_does_not_pass(copy: Bundle) -> None:
    """What a damaged exporter would leave: consistent hashes, wrong content."""

    def reseal(*names: str) -> Bundle:
        manifest = json.loads((copy.path / "manifest.json").read_text())
        for name in names:
            data = (copy.path / name).read_bytes()
            manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (copy.path / "manifest.json").write_text(json.dumps(manifest))
        return Bundle.open(copy.path)

    graph = copy.path / "ratio-4.onnx"
    original = graph.read_bytes()
    graph.write_bytes((copy.path / "ratio-2.onnx").read_bytes())
    with pytest.raises(GateError, match="ratio 4"):
        build(reseal("ratio-4.onnx"), "onnxruntime", "int8")
    graph.write_bytes(original)
    weights = np.fromfile(copy.path / "backbone.data", np.float32)
    weights[-200:] = np.nan
    weights.tofile(copy.path / "backbone.data")
    with pytest.raises(GateError, match="NaN"):
        build(reseal("ratio-4.onnx", "backbone.data"), "onnxruntime", "fp32")
    assert not list((copy.path / "engines").glob("*-*-*"))


def test_swapped_data_files_are_refused(copy: Bundle) -> None:
    for name, other in (("ratio-2.onnx", "ratio-4.onnx"), ("plugin-2.data", "backbone.data")):
        a, b = copy.path / name, copy.path / other
        first, second = a.read_bytes(), b.read_bytes()
        a.write_bytes(second)
        b.write_bytes(first)
        with pytest.raises(BundleError, match="bytes"):
            Bundle.open(copy.path)
        a.write_bytes(first)
        b.write_bytes(second)


def test_a_damaged_bundle_is_not_built(copy: Bundle) -> None:
    data = (copy.path / "backbone.data").read_bytes()
    (copy.path / "backbone.data").write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(BundleError, match="sha256"):
        build(copy, "onnxruntime")


def test_an_engine_with_wrong_numbers_is_not_kept(copy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def first_for_all(graphs: list[Path], directory: Path, file: str) -> None:
        real([graphs[0]] * len(graphs), directory, file)
        for graph in graphs[1:]:
            shutil.copy(directory / graphs[0].name, directory / graph.name)

    real = onnxruntime_module.gather
    monkeypatch.setattr(onnxruntime_module, "gather", first_for_all)
    with pytest.raises(GateError, match="onnxruntime fp32 ratio 2"):
        build(copy, "onnxruntime", "fp32")
    assert not list((copy.path / "engines").glob("*-*-*"))


def test_all_ratios_map_one_weight_file_packed_matrices_included(copy: Bundle) -> None:
    built = build(copy, "onnxruntime", "fp32")
    assert set(built.record.files) == {"ratio-1.onnx", "ratio-2.onnx", "ratio-4.onnx", "weights.data"}
    packed: dict[int, set[str]] = {}
    for ratio in (1, 2, 4):
        entries = [
            entries
            for _, entries in external_tensors(
                onnx.load(built.directory / f"ratio-{ratio}.onnx", load_external_data=False)
            )
        ]
        assert {entry["location"] for entry in entries} == {"weights.data"}
        packed[ratio] = {value for entry in entries for key, value in entry.items() if key.startswith("prepacked")}
        assert packed[ratio]
    # q, k, v, output and both of the FFN, in two layers, are the same bytes for every ratio.
    assert all(len(packed[1] & packed[ratio]) >= 12 for ratio in (2, 4))


def test_unknown_names_list_the_known(copy: Bundle) -> None:
    with pytest.raises(InputError, match="auto, tensorrt, tensorrt-rtx, onnxruntime-cuda, openvino, onnxruntime"):
        build(copy, "tensorflow")
    with pytest.raises(InputError, match="fp32, int8"):
        build(copy, "onnxruntime", "fp64")
    with pytest.raises(EngineError, match=r"no engine is built(.|\n)*variator build"):
        find_built(copy)


def test_a_missing_library_is_named_with_its_fix(copy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKENDS["openvino"], "missing", lambda: "openvino cannot be imported; pip install …")
    with pytest.raises(EngineError, match="cannot be imported"):
        build(copy, "openvino")
    stages: list[str] = []
    assert build(copy, "auto", on_stage=stages.append).record.backend == "onnxruntime"
    assert "openvino cannot be imported" in stages[0]


def test_auto_serves_the_fastest_lossless_engine_and_int8_only_when_asked(copy: Bundle) -> None:
    build(copy, "onnxruntime", "int8")
    with pytest.raises(EngineError):
        find_built(copy, "auto")
    assert find_built(copy, "onnxruntime")[0].record.precision == "int8"
    build(copy, "onnxruntime", "fp32")
    found, reason = find_built(copy, "auto")
    assert found.record.precision == "fp32" and "fp32" in reason
    assert find_built(copy, "onnxruntime")[0].record.precision == "fp32"
    assert find_built(copy, "auto", "int8")[0].record.precision == "int8"


def command(bundle: Bundle) -> list[str]:
    return [
        sys.executable,
        "-m",
        "variator",
        "build",
        str(bundle.path),
        "--engine",
        "onnxruntime",
        "--precision",
        "int8",
        "--no-calibrate",
        "--json",
    ]


def test_two_processes_building_the_same_engine_both_get_it(copy: Bundle) -> None:
    processes = [subprocess.Popen(command(copy), stdout=subprocess.PIPE) for _ in range(2)]
    records = [json.loads(process.communicate()[0]) for process in processes]
    assert [process.returncode for process in processes] == [0, 0] and records[0] == records[1]
    assert [path.name for path in (copy.path / "engines").glob("*") if path.is_dir()] == [
        Path(records[0]["directory"]).name
    ]


def test_a_killed_build_is_never_taken_for_complete_and_a_rerun_finishes(copy: Bundle) -> None:
    process = subprocess.Popen(command(copy), stdout=subprocess.DEVNULL)
    for _ in range(600):
        if list((copy.path / "engines").glob(".onnxruntime*.part-*")) or process.poll() is not None:
            break
        time.sleep(0.02)
    process.kill()
    process.wait()
    with pytest.raises(EngineError, match="no engine is built"):
        find_built(copy, "onnxruntime")
    subprocess.run(command(copy), check=True, stdout=subprocess.DEVNULL)
    assert find_built(copy, "onnxruntime")[0].record.precision == "int8"
    assert not list((copy.path / "engines").glob(".*.part-*"))


def test_a_full_disk_while_building_leaves_nothing(copy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from variator.errors import VariatorError

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnxruntime_module, "gather", full)
    with pytest.raises(VariatorError, match="No space left"):
        build(copy, "onnxruntime", "fp32")
    assert not [path for path in (copy.path / "engines").iterdir() if path.is_dir()]
