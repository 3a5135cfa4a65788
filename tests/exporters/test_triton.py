"""The files of a Triton model repository, against Triton's own messages and what its backends ask of shapes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from variator.engines.built import ENGINE_FILE, ENGINE_FORMAT, LATENCY_FILE, EngineRecord, graphs_hash, key_of
from variator.engines.profiles import ShapeProfile, parse_profiles
from variator.engines.runtime import Runtime
from variator.errors import BundleError, EngineError, InputError, VariatorError
from variator.exporters import triton as triton_module
from variator.exporters.triton import CONFIG, CPU_CONFIG, RUNTIME, TEXT_SUFFIX, TOKENS, TritonRepository, triton
from variator.exporters.triton_config import MARK, TritonSettings, most_rows_of_all, protobuf, read_config
from variator.toolkit.bundle import Bundle, list_files

PROFILES = "1x1:8x32:32x64,1x1:4x100:16x150"
DEFAULT = "1x1:8x32:32x32,1x1:8x64:32x64,1x1:8x150:32x150"
CUDA = {"compute_capability": "9.0", "gpu": "NVIDIA H200", "cuda": "13.0"}


def pretend_built(path: Path, backend: str, profiles: str = PROFILES, gated: bool = True, graphs: str = "") -> Path:
    """An engine for a GPU, recorded as `build` does it, with artefacts that nothing here can read."""
    bundle = Bundle.open(path)
    rtx = backend == "tensorrt-rtx"
    suffix = "onnx" if backend == "onnxruntime-cuda" else "plan"
    parts = {"format": str(ENGINE_FORMAT), "backend": backend, "precision": "fp16", "version": "10.16.1"}
    parts["graphs"] = graphs or graphs_hash(bundle)
    choices = {} if suffix == "onnx" else {"profiles": profiles}
    target = {"compute_capabilities": "8.9"} if rtx else CUDA
    key = key_of(parts, target, choices)
    directory = path / "engines" / f"{backend}-fp16-{key}"
    directory.mkdir(parents=True)
    for ratio in bundle.ratios:
        if suffix == "onnx":
            shutil.copy(bundle.graph(ratio), directory / bundle.graph(ratio).name)
        else:
            (directory / f"ratio-{ratio}.plan").write_bytes(b"plan %d" % int(ratio))
    if suffix == "onnx":
        (directory / "weights.data").write_bytes(b"weights")
    errors = {str(ratio): 1e-3 for ratio in bundle.ratios}
    files = list_files(directory)
    record = EngineRecord(backend, "fp16", key, CUDA["gpu"], parts, target, choices, gated, errors, errors, files)
    (directory / ENGINE_FILE).write_text(json.dumps(asdict(record)))
    return directory


def config(repository: TritonRepository, name: str, file: str = CONFIG) -> Any:
    """A model's configuration, parsed by Triton's own messages."""
    found = read_config((repository.path / name / file).read_text(), name)
    assert found.name == name and found.version_policy.specific.versions == [repository.version]
    return found


@pytest.fixture(scope="module")
def plain(calibrated: Path, tmp_path_factory: pytest.TempPathFactory) -> TritonRepository:
    """Of the tiny bundle with its ONNX Runtime engine. Not to be changed."""
    return triton(calibrated, tmp_path_factory.mktemp("plain") / "models")


@pytest.fixture
def copied(calibrated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(calibrated, tmp_path / "bundle"))


def test_every_model_has_a_configuration_and_the_version_it_names(plain: TritonRepository) -> None:
    ratios = [f"onnxruntime-fp32-ratio-{ratio}" for ratio in (1, 2, 4)]
    expected = {RUNTIME, TOKENS, *ratios, *(name + TEXT_SUFFIX for name in ratios)}
    assert set(plain.models) == expected == {path.name for path in plain.path.iterdir()}
    assert 0 < plain.version < 1 << 48 and not plain.left_out
    for name in plain.models:
        config(plain, name)
        assert (plain.path / name / str(plain.version)).is_dir()


def test_the_model_that_embeds_the_runtime(plain: TritonRepository) -> None:
    found, messages = config(plain, RUNTIME), protobuf()
    assert found.backend == "python" and not found.platform and not found.model_transaction_policy.decoupled
    assert {one.name: one.data_type for one in found.output} == {
        "embedding": messages.TYPE_FP32,
        "ratio": messages.TYPE_STRING,
    }
    assert all(one.optional for one in found.input) and found.input[0].data_type == messages.TYPE_STRING
    policy = found.dynamic_batching.default_queue_policy
    assert policy.max_queue_size == 1000 and policy.allow_timeout_override and policy.default_timeout_microseconds > 0
    assert found.dynamic_batching.priority_levels == found.dynamic_batching.default_priority_level == 2
    assert found.parameters["engine"].string_value == "onnxruntime"
    assert found.instance_group[0].kind == messages.ModelInstanceGroup.KIND_CPU
    assert config(plain, RUNTIME, CPU_CONFIG) == found
    code = (plain.path / RUNTIME / str(plain.version) / "model.py").read_text()
    assert "VariatorModel as TritonPythonModel" in code and len(code.splitlines()) < 5


def test_the_bundle_in_the_repository_serves_without_the_one_it_came_from(
    plain: TritonRepository, calibrated: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(plain.path, tmp_path / "moved")
    for path in moved.rglob("*"):
        assert not path.is_symlink()
        if path.is_file() and path.suffix in (".pbtxt", ".py"):
            assert str(calibrated) not in path.read_text()
    place = moved / RUNTIME / str(plain.version) / "bundle"
    Bundle.open(place).verify()
    with Runtime.open(place) as there, Runtime.open(calibrated, "onnxruntime") as here:
        for ratio in (1, 4):
            ours = here.infer(["a b"], ratio=ratio).outputs["embedding"]
            np.testing.assert_array_equal(there.infer(["a b"], ratio=ratio).outputs["embedding"], ours)
        assert there.serve().ratios


def test_graphs_of_onnxruntime_are_those_that_were_built(plain: TritonRepository, calibrated: Path) -> None:
    with Runtime.open(calibrated, "onnxruntime") as runtime:
        rows = runtime.tokenise(["a b c", "w1 w2"])
        feed = runtime.feed(rows, 8)
        for ratio in (1, 2, 4):
            name = f"onnxruntime-fp32-ratio-{ratio}"
            found = config(plain, name)
            assert found.platform == "onnxruntime_onnx" and found.optimization.graph.level == 2
            session = onnxruntime.InferenceSession(plain.path / name / str(plain.version) / "model.onnx")
            assert [one.name for one in session.get_inputs()] == [one.name for one in found.input]
            assert [one.name for one in session.get_outputs()] == [one.name for one in found.output]
            assert {tuple(one.dims) for one in found.input} == {(-1,)} and found.output[0].dims == [32]
            answer = session.run(None, feed)[0]
            expected = runtime.infer(["a b c", "w1 w2"], ratio=ratio).outputs["embedding"]
            np.testing.assert_allclose(answer, expected, atol=1e-5)
            check_warm_up(plain.path / name, found)


def check_warm_up(model: Path, found: Any) -> None:
    """Every file that a warm-up names is there, as long as its shape; together they are what the model takes."""
    assert found.model_warmup
    for warm in found.model_warmup:
        assert set(warm.inputs) == {one.name for one in found.input}
        assert 1 <= warm.batch_size <= found.max_batch_size
        for value in warm.inputs.values():
            size = (model / "warmup" / value.input_data_file).stat().st_size
            assert size == 8 * warm.batch_size * int(np.prod(value.dims))


def test_plans_of_tensorrt_are_served_in_all_their_profiles(copied: Path, tmp_path: Path) -> None:
    built = pretend_built(copied, "tensorrt")
    repository = triton(copied, tmp_path / "models")
    messages = protobuf()
    for ratio in (1, 2, 4):
        name = f"tensorrt-fp16-ratio-{ratio}"
        found = config(repository, name)
        assert found.platform == "tensorrt_plan" and not found.backend
        assert (repository.path / name / str(repository.version) / "model.plan").read_bytes() == (
            built / f"ratio-{ratio}.plan"
        ).read_bytes()
        group = found.instance_group[0]
        assert group.kind == messages.ModelInstanceGroup.KIND_GPU and list(group.profile) == ["0", "1"]
        check_within(found, parse_profiles([PROFILES], 150))
        assert found.max_batch_size == 16  # 32 rows would fit 64 tokens, but not 150
        assert list(found.dynamic_batching.preferred_batch_size) == [4, 8]
        assert {one.data_type for one in found.input} == {messages.TYPE_INT64}
        assert not (repository.path / name / CPU_CONFIG).exists()
        check_warm_up(repository.path / name, found)


def check_within(found: Any, profiles: Sequence[ShapeProfile]) -> None:
    """Any batch that Triton may make is one that a profile holds."""
    held = [length for length in range(1, 151) if any(p.minimum.length <= length <= p.maximum.length for p in profiles)]
    for length in held:
        for rows in range(1, found.max_batch_size + 1):
            assert any(
                p.minimum.batch <= rows <= p.maximum.batch and p.minimum.length <= length <= p.maximum.length
                for p in profiles
            ), (rows, length)


@pytest.mark.parametrize(
    ("profiles", "most"),
    [
        (DEFAULT, 32),
        (PROFILES, 16),
        ("1x1:1x8:4x16,5x1:8x8:9x16", 9),  # one after the other
        ("1x1:1x8:4x16,6x1:8x8:9x16", 4),  # no 5
        ("1x1:8x8:8x16,1x32:2x40:3x64", 3),  # no 17 to 31: these are refused anyway
    ],
)
def test_the_largest_batch_is_held_at_every_length(profiles: str, most: int) -> None:
    parsed = parse_profiles([profiles], 150)
    assert most_rows_of_all(parsed) == most
    check_within(protobuf().ModelConfig(max_batch_size=most), parsed)


def test_a_plan_that_takes_no_single_row_is_left_out_and_said(copied: Path, tmp_path: Path) -> None:
    pretend_built(copied, "tensorrt", "2x1:8x64:32x150")
    repository = triton(copied, tmp_path / "models")
    assert "no single row fits" in repository.left_out["tensorrt-fp16-ratio-1"]
    assert not any(name.startswith("tensorrt") for name in repository.models)


def test_graphs_on_a_gpu_are_left_to_triton_to_optimise(copied: Path, tmp_path: Path) -> None:
    pretend_built(copied, "onnxruntime-cuda")
    repository = triton(copied, tmp_path / "models")
    found = config(repository, "onnxruntime-cuda-fp16-ratio-4")
    assert found.platform == "onnxruntime_onnx" and not found.HasField("optimization")
    assert found.instance_group[0].kind == protobuf().ModelInstanceGroup.KIND_GPU
    names = {path.name for path in (repository.path / found.name / str(repository.version)).iterdir()}
    assert names == {"model.onnx", "weights.data"}


def test_with_a_gpu_engine_the_cpu_variant_of_the_directory_has_another(copied: Path, tmp_path: Path) -> None:
    built = pretend_built(copied, "tensorrt")
    table = json.loads(next(copied.glob(f"engines/onnxruntime-*/{LATENCY_FILE}")).read_text())
    key = json.loads((built / ENGINE_FILE).read_text())["key"]
    (built / LATENCY_FILE).write_text(json.dumps({**table, "engine": "tensorrt", "key": key}))
    repository = triton(copied, tmp_path / "models")
    kinds = protobuf().ModelInstanceGroup
    gpu, cpu = config(repository, RUNTIME), config(repository, RUNTIME, CPU_CONFIG)
    assert (gpu.parameters["engine"].string_value, gpu.instance_group[0].kind) == ("tensorrt", kinds.KIND_GPU)
    assert (cpu.parameters["engine"].string_value, cpu.instance_group[0].kind) == ("onnxruntime", kinds.KIND_CPU)
    engines = repository.path / RUNTIME / str(repository.version) / "bundle" / "engines"
    assert {path.name.split("-")[0] for path in engines.iterdir()} == {"tensorrt", "onnxruntime"}


def test_ensembles_put_the_front_before_an_engine(plain: TritonRepository) -> None:
    found = config(plain, f"onnxruntime-fp32-ratio-4{TEXT_SUFFIX}")
    front, engine = found.ensemble_scheduling.step
    assert (front.model_name, engine.model_name) == (TOKENS, "onnxruntime-fp32-ratio-4")
    made = {one.name for one in config(plain, TOKENS).output}
    assert set(front.output_map) == made == set(engine.input_map)
    assert set(front.output_map.values()) == set(engine.input_map.values())
    assert set(front.input_map.values()) == {one.name for one in found.input}
    assert set(engine.output_map.values()) == {one.name for one in found.output} == {"embedding"}


def test_what_cannot_be_a_model_is_left_out_with_its_reason(
    copied: Path, shared_bundle: Bundle, tmp_path: Path
) -> None:
    pretend_built(copied, "tensorrt-rtx")
    pretend_built(copied, "tensorrt", gated=False)
    pretend_built(copied, "onnxruntime-cuda", graphs="another")
    left = triton(copied, tmp_path / "models").left_out
    assert "Triton runs no tensorrt-rtx" in left["tensorrt-rtx-fp16-ratio-4"]
    assert "not checked" in left["tensorrt fp16"] and "another export" in left["onnxruntime-cuda fp16"]
    with pytest.raises(EngineError, match=r"no latency was measured.*--calibrate.*an input of the shared graph"):
        triton(shared_bundle, tmp_path / "shared", "onnxruntime")


def test_what_is_damaged_or_missing_is_refused_and_nothing_is_left(
    copied: Path, bundle: Bundle, tmp_path: Path
) -> None:
    output = tmp_path / "out" / "models"
    with pytest.raises(EngineError, match="no engine is built"):
        triton(bundle, output)
    with pytest.raises(EngineError, match="no engine is built"):
        triton(copied, output, "openvino")
    with pytest.raises(InputError, match="unknown engine"):
        triton(copied, output, "tensorrrt")
    with pytest.raises(InputError, match="ratio 7"):
        triton(copied, output, settings=TritonSettings(ratio=7))
    weights = next(copied.glob("engines/onnxruntime-*/weights.data"))
    good = weights.read_bytes()
    weights.unlink()  # not written through: it may be linked
    weights.write_bytes(good[:-1] + b"\0\0")
    with pytest.raises(EngineError, match="has changed since it was built"):
        triton(copied, output)
    backbone = copied / "backbone.data"
    data = backbone.read_bytes()
    backbone.unlink()
    backbone.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(BundleError, match="has changed"):
        triton(copied, output)
    assert not output.parent.exists() or not list(output.parent.iterdir())


def test_versions_follow_what_is_served(copied: Path, tmp_path: Path) -> None:
    output = tmp_path / "models"
    first = triton(copied, output)
    assert triton(copied, output).version == first.version
    versions = [first.version]
    for day in ("one", "two"):
        table = next(copied.glob(f"engines/onnxruntime-*/{LATENCY_FILE}"))
        told = {**json.loads(table.read_text()), "date": day}
        table.unlink()
        table.write_text(json.dumps(told))
        versions.append(triton(copied, output).version)
    assert len(set(versions)) == 3
    for model in (RUNTIME, TOKENS, "onnxruntime-fp32-ratio-2"):
        kept = {int(path.name) for path in (output / model).iterdir() if path.name.isdecimal()}
        assert kept == set(versions[1:])  # the served one, and the one to go back to
        assert config(replace(first, version=versions[2]), model)
    assert [path.name for path in output.parent.iterdir() if path.name.startswith(".models")] == []


def test_writing_a_version_again_keeps_the_one_before_and_mends_a_damaged_one(copied: Path, tmp_path: Path) -> None:
    output = tmp_path / "models"
    first = triton(copied, output)
    table = next(copied.glob(f"engines/onnxruntime-*/{LATENCY_FILE}"))
    told = {**json.loads(table.read_text()), "date": "later"}
    table.unlink()
    table.write_text(json.dumps(told))
    second = triton(copied, output)
    place = output / RUNTIME / str(second.version)
    whole = {path.relative_to(place): path.read_bytes() for path in place.rglob("*") if path.is_file()}
    (place / "bundle" / "ratio-4.onnx").unlink()  # as a kill leaves it
    (place / "bundle" / "ratio-2.onnx").unlink()
    (place / "bundle" / "ratio-2.onnx").write_bytes(b"x")
    assert triton(copied, output, settings=TritonSettings(slo_ms=77)).version == second.version
    assert {path.relative_to(place): path.read_bytes() for path in place.rglob("*") if path.is_file()} == whole
    kept = {path.name for path in (output / RUNTIME).iterdir() if path.is_dir() and not path.name.startswith("c")}
    assert kept >= {str(first.version), str(second.version)} and not any(name.startswith(".") for name in kept)


def test_a_write_that_fails_leaves_the_repository_as_it_was(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "models"
    first = triton(copied, output)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    pretend_built(copied, "tensorrt")

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(triton_module, "_link", full)
    with pytest.raises(VariatorError, match="No space left"):
        triton(copied, output)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    assert config(first, RUNTIME) and not list(tmp_path.glob(".models.next*"))


def test_models_of_others_are_left_alone(copied: Path, tmp_path: Path) -> None:
    output = tmp_path / "models"
    (output / "theirs" / "1").mkdir(parents=True)
    assert triton(copied, output).kept == ["theirs"]
    (output / RUNTIME / CONFIG).write_text('name: "variator" backend: "python"')
    with pytest.raises(InputError, match="not written by `variator triton`"):
        triton(copied, output)
    assert MARK not in (output / RUNTIME / CONFIG).read_text()


def test_a_link_that_leads_out_of_the_bundle_is_not_followed(copied: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    shutil.move(copied / "tokenizer.json", secret)
    (copied / "tokenizer.json").symlink_to(secret)
    with pytest.raises(BundleError, match="outside"):
        triton(copied, tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_the_command_prints_what_it_wrote(calibrated: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "variator", "triton", str(calibrated), "-o", str(tmp_path / "models"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["models"][RUNTIME]["engine"] == "onnxruntime"
    assert (tmp_path / "models" / RUNTIME / str(record["version"])).is_dir()
    done = subprocess.run([*command[:4], str(tmp_path), *command[5:]], capture_output=True, text=True, cwd=Path.cwd())
    assert done.returncode == 1 and "is not a bundle" in done.stderr


def test_graphs_are_valid_where_they_lie(plain: TritonRepository) -> None:
    place = plain.path / "onnxruntime-fp32-ratio-4" / str(plain.version)
    model = onnx.load(place / "model.onnx", load_external_data=False)
    places = {entry.value for one in model.graph.initializer for entry in one.external_data if entry.key == "location"}
    assert places and all((place / name).is_file() for name in places)
