"""Plans built without a GPU: TensorRT-RTX compiles ahead of time. What needs one is rehearsed or marked `gpu`."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.conftest import hear_ctrl_c
from tests.engines.fake_gpu import FakeCuda, FakeJustInTime, FakeLibrary, write_plan
from variator.engines import cuda as cuda_module
from variator.engines import gpu as gpu_module
from variator.engines import tensorrt as tensorrt_package
from variator.engines.backends import BACKENDS, resolve
from variator.engines.base import BuildOptions
from variator.engines.build import build
from variator.engines.built import built_summary, find_built, load_engine
from variator.engines.gpu import Gpu, no_gpu
from variator.engines.profiles import parse_profiles
from variator.engines.runtime import Runtime
from variator.engines.tensorrt import backend as backend_module
from variator.engines.tensorrt import builder as builder_module
from variator.engines.tensorrt import engine as engine_module
from variator.engines.tensorrt.builder import compile_bundle, input_ranges
from variator.engines.tensorrt.engine import Workspace
from variator.engines.tensorrt.flavours import TENSORRT, TENSORRT_RTX
from variator.errors import EngineError, GateError, InputError
from variator.toolkit.bundle import Bundle

RTX = BACKENDS["tensorrt-rtx"]
PROFILES = "1x1:2x16:4x32,1x1:2x64:4x64,1x1:2x128:4x150"
pytestmark = pytest.mark.skipif(RTX.missing() is not None, reason=str(RTX.missing()))
ahead = pytest.mark.skipif(no_gpu() is None, reason="there is a GPU here")


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Bundle:
    """A copy without engines."""
    return Bundle.open(shutil.copytree(bundle.path, tmp_path / "copy", ignore=shutil.ignore_patterns("engines")))


SELDOM = [pytest.param(precision, marks=pytest.mark.slow) for precision in ("fp32", "bf16", "fp8")]


@ahead
@pytest.mark.parametrize("precision", ["fp16", "int8", *SELDOM])
def test_every_precision_is_built_ahead_of_time_and_said_to_be_unchecked(copy: Bundle, precision: str) -> None:
    told: list[tuple[str, float]] = []
    options = BuildOptions((PROFILES,), ("8.9", "12.0"))
    built = build(
        copy, "tensorrt-rtx", precision, options=options, on_progress=lambda what, share: told.append((what, share))
    )
    record = built.record
    assert (record.backend, record.precision, record.gated) == ("tensorrt-rtx", precision, False)
    assert record.target == {"compute_capabilities": "8.9,12.0"} and record.choices == {"profiles": PROFILES}
    assert record.parts["version"] == importlib.metadata.version("tensorrt-rtx")
    assert set(record.files) == {"ratio-1.plan", "ratio-2.plan", "ratio-4.plan"}
    assert record.max_abs_error == record.probe_ms == {}  # nothing was measured, so nothing is claimed
    graphs = ("ratio-1", "ratio-2", "ratio-4")
    assert all(any(what.startswith(f"tensorrt-rtx {name}.onnx") for what, _ in told) for name in graphs)
    assert all(0.0 <= share <= 1.0 for _, share in told)
    with pytest.raises(EngineError, match="no NVIDIA driver"):
        find_built(copy, "tensorrt-rtx")
    summary = built_summary(copy)[0]
    for part in ("no NVIDIA driver", "8.9, 12.0", "1x1:2x64:4x64", "ratio-4.plan", "not yet", record.parts["version"]):
        assert part in summary


@ahead
def test_a_second_build_is_reused_and_another_choice_is_another_engine(
    copy: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(copy, "tensorrt-rtx", "fp16", options=BuildOptions((PROFILES,), ("8.9",)))
    before = (first.directory / "ratio-4.plan").stat().st_mtime_ns
    monkeypatch.setattr(backend_module, "compile_bundle", lambda *_: pytest.fail("compiled again"))
    said: list[str] = []
    again = build(copy, "tensorrt-rtx", "fp16", on_stage=said.append, options=BuildOptions((PROFILES,), ("8.9",)))
    assert again == first and (first.directory / "ratio-4.plan").stat().st_mtime_ns == before
    assert said[-1].startswith("unchanged")
    for options in (BuildOptions((PROFILES,), ("8.6",)), BuildOptions((), ("8.9",))):
        with pytest.raises(pytest.fail.Exception):
            build(copy, "tensorrt-rtx", "fp16", options=options)


@ahead
def test_a_shared_bundle_is_one_plan_for_all_ratios(shared_bundle: Bundle, tmp_path: Path) -> None:
    profiles = parse_profiles(["1x1:2x16:4x32,1x1:2x64:4x150"], 150)
    compile_bundle(TENSORRT_RTX, shared_bundle, "fp16", tmp_path, profiles, ["8.9"], lambda what, share: None)
    assert {path.name for path in tmp_path.iterdir()} == {"ratio-1.plan", "shared.plan"}
    ranges = input_ranges(shared_bundle, shared_bundle.path / "shared.onnx", profiles)
    assert [entry["plugin.ffn.score.bias"] for entry in ranges] == [([2, k],) * 3 for k in (1, 1, 2, 2, 4, 4)]
    assert ranges[0]["plugin.ffn.up.weight"] == ([2, 1, 32], [2, 1, 32], [2, 256, 32])
    assert ranges[2]["plugin.ffn.up.weight"] == ([2, 1, 32], [2, 16, 32], [2, 256, 32])
    assert set(input_ranges(shared_bundle, shared_bundle.path / "ratio-1.onnx", profiles)[0]) == {
        "input_ids", "attention_mask", "head.weight", "head.bias",
    }  # fmt: skip


def test_fp8_is_for_gpus_that_have_it(copy: Bundle) -> None:
    with pytest.raises(InputError, match=r"8\.6(.|\n)*8\.9 or later"):
        build(copy, "tensorrt-rtx", "fp8", options=BuildOptions((PROFILES,), ("8.6",)))
    if no_gpu():
        assert RTX.target(BuildOptions(), "fp8") == {"compute_capabilities": "8.9,12.0,12.1"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BuildOptions(("1x1:8x64:4x128",)), "MIN ≤ OPT ≤ MAX"),
        (BuildOptions(("1x1:8x64:32x512",)), "up to 150"),
        (BuildOptions((), ("9.9",)), r"9\.9(.|\n)*8\.0, 8\.6, 8\.9"),
    ],
)
def test_bad_choices_are_refused_before_anything_is_built(copy: Bundle, options: BuildOptions, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(copy, "tensorrt-rtx", "fp16", options=options)
    assert not list((copy.path / "engines").glob("t*-*-*"))


def test_engines_for_this_processor_take_no_such_choices(copy: Bundle) -> None:
    for options in (BuildOptions((PROFILES,)), BuildOptions((), ("8.9",))):
        with pytest.raises(InputError, match="leave --profile and --compute-capability out"):
            build(copy, "onnxruntime", options=options)


def test_a_narrow_bundle_is_built_in_its_own_precision_alone(copy: Bundle) -> None:
    manifest = json.loads((copy.path / "manifest.json").read_text())
    (copy.path / "manifest.json").write_text(json.dumps({**manifest, "precision": "bf16"}))
    with pytest.raises(InputError, match=r"written in bf16, not in fp16(.|\n)*--precision bf16"):
        build(copy.path, "tensorrt-rtx", "fp16", options=BuildOptions((PROFILES,), ("8.9",)))


@ahead
def test_a_type_mismatch_is_told_in_the_librarys_words_with_a_command(copy: Bundle) -> None:
    graph = copy.path / "ratio-1.onnx"
    model = onnx.load(graph, load_external_data=False)
    add = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
    cast = onnx.helper.make_node("Cast", [add.input[0]], ["narrowed"], to=onnx.TensorProto.FLOAT16)
    model.graph.node.insert(list(model.graph.node).index(add), cast)
    add.input[0] = "narrowed"
    onnx.save(model, graph)
    with pytest.raises(
        EngineError, match=r"ratio-1\.onnx: the builder gave up(.|\n)*POLYGRAPHY_USE_TENSORRT_RTX=1 "
    ) as e:
        profiles = parse_profiles([PROFILES], 150)
        compile_bundle(TENSORRT_RTX, copy, "fp32", copy.path, profiles, ["8.9"], lambda what, share: None)
    assert "types" in e.value.what and "--trt-max-shapes input_ids:[4,32]" in e.value.fix


@pytest.mark.parametrize("ending", ["SIGSEGV", "SIGKILL"])
def test_a_crash_of_the_builder_is_an_error_of_ours(
    copy: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ending: str
) -> None:
    (tmp_path / "crashing.py").write_text(
        f"import os, signal, sys\nsys.stdin.read()\nos.kill(os.getpid(), signal.{ending})"
    )
    monkeypatch.setattr(builder_module, "CHILD", "crashing")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path.cwd()}")
    with pytest.raises(EngineError, match=f"builder's process ended with {ending}"):
        build(copy, "tensorrt-rtx", "fp32", options=BuildOptions((PROFILES,), ("8.9",)))
    assert not list((copy.path / "engines").glob("t*-*-*"))


def test_what_another_precision_was_built_than_asked_for_is_an_error(
    copy: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder_module, "written_in", lambda bundle, graph, precision, directory: graph)
    with pytest.raises(EngineError, match=r"made a plan in fp32 of ratio-1\.onnx, where fp16 was asked for"):
        build(copy, "tensorrt-rtx", "fp16", options=BuildOptions((PROFILES,), ("8.9",)))
    assert not list((copy.path / "engines").glob("t*-*-*"))


def command(bundle: Bundle) -> list[str]:
    options = ["--engine", "tensorrt-rtx", "--precision", "fp32", "--profile", PROFILES, "--compute-capability", "8.9"]
    return [sys.executable, "-m", "variator", "build", str(bundle.path), *options, "--json"]


@ahead
def test_two_processes_building_the_same_plan_both_get_it(copy: Bundle) -> None:
    processes = [subprocess.Popen(command(copy), stdout=subprocess.PIPE) for _ in range(2)]
    records = [json.loads(process.communicate()[0]) for process in processes]
    assert records[0] == records[1] and [process.returncode for process in processes] == [0, 0]
    assert len(list((copy.path / "engines").glob("tensorrt-rtx-*"))) == 1


@ahead
def test_ctrl_c_ends_the_builder_too_and_leaves_nothing(copy: Bundle) -> None:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command(copy), preexec_fn=hear_ctrl_c, **quiet)
    children: list[str] = []
    for _ in range(1000):
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if children or process.poll() is not None:
            break
        time.sleep(0.02)
    assert children
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) != 0
    for _ in range(100):
        if not any(Path(f"/proc/{child}").exists() for child in children):
            break
        time.sleep(0.02)
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert not list((copy.path / "engines").glob("t*-*-*")) and not list((copy.path / "engines").glob(".*.part-*"))


@pytest.fixture
def gpu_here(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A rehearsal of a GPU of compute capability 8.9."""
    fake = FakeCuda()
    library = FakeLibrary(fake)
    monkeypatch.setattr(engine_module, "JustInTime", FakeJustInTime)
    monkeypatch.setattr(cuda_module, "runtime", lambda: fake)
    monkeypatch.setattr(engine_module, "WORKSPACE", Workspace())
    monkeypatch.setattr(backend_module, "no_gpu", lambda: None)
    monkeypatch.setattr(backend_module, "gpu", lambda: Gpu("NVIDIA Rehearsal", "8.9", "13.0", 1 << 33))
    monkeypatch.setattr(TENSORRT_RTX.__class__, "load", lambda self: library)
    return fake


def fake_plans(bundle: Bundle, swap: bool = False) -> object:
    def write(flavour, bundle_, precision, directory, profiles, capabilities, on_progress):  # type: ignore[no-untyped-def]
        for ratio in (1, 2, 4):
            graph = bundle.path / f"ratio-{2 if swap and ratio == 4 else ratio}.onnx"
            write_plan(directory / f"ratio-{ratio}.plan", graph, input_ranges(bundle, graph, profiles), precision)

    return write


def test_what_was_built_ahead_of_time_is_checked_where_it_runs_without_being_compiled_again(
    copy: Bundle, gpu_here: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = BuildOptions((PROFILES,))
    monkeypatch.setattr(backend_module, "compile_bundle", fake_plans(copy))
    with monkeypatch.context() as without:
        without.setattr(backend_module, "no_gpu", lambda: "there is no GPU here")
        assert not build(copy, "tensorrt-rtx", "fp32", options=options).record.gated
    with pytest.raises(EngineError, match="not yet checked here"):
        find_built(copy, "tensorrt-rtx")
    monkeypatch.setattr(backend_module, "compile_bundle", lambda *_: pytest.fail("compiled again"))
    record = build(copy, "tensorrt-rtx", "fp32").record  # whatever it was built for, if that fits
    assert record.gated and record.device == "NVIDIA Rehearsal" and set(record.probe_ms) == {"1", "2", "4"}
    assert 0 < max(record.max_abs_error.values()) < 1e-4
    found, _ = find_built(copy, "tensorrt-rtx")
    with Runtime.open(copy, "tensorrt-rtx") as runtime:  # more rows than any profile has
        rows = [[5 + (7 * row + place) % 90 for place in range(1 + 5 * row)] for row in range(23)]
        together = runtime.infer(rows, ratio=4).outputs["embedding"]
        alone = [runtime.infer([row], ratio=4).outputs["embedding"][0] for row in rows]
        np.testing.assert_allclose(together, alone, atol=1e-5)
    engine = load_engine(copy, found, "ratio-4.onnx")
    assert [str(profile) for profile in engine.profiles] == PROFILES.split(",")
    engine.close()
    summary = built_summary(copy)[0]
    assert "ratio-4: layers: 2 Myelin, 1 Reformat" in summary and "ratio-4: inputs: input_ids int64" in summary


def test_plans_that_answer_as_another_ratio_do_not_pass_at_the_corners(
    copy: Bundle, gpu_here: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_module, "compile_bundle", fake_plans(copy, swap=True))
    with pytest.raises(GateError, match="ratio 4"):
        build(copy, "tensorrt-rtx", "fp32", options=BuildOptions((PROFILES,), ("8.9",)))
    assert not list((copy.path / "engines").glob("t*-*-*"))


@pytest.mark.parametrize("change", ["gpu", "version", "truncated", "record"])
def test_a_plan_for_another_gpu_or_version_or_a_damaged_one_is_refused_before_it_is_loaded(
    copy: Bundle, gpu_here: FakeCuda, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.setattr(backend_module, "compile_bundle", fake_plans(copy))
    built = build(copy, "tensorrt-rtx", "fp32", options=BuildOptions((PROFILES,), ("8.9",)))
    monkeypatch.setattr(FakeLibrary, "Runtime", lambda self, logger: pytest.fail("loaded"))
    message = ""
    if change == "gpu":
        monkeypatch.setattr(backend_module, "gpu", lambda: Gpu("NVIDIA Other", "12.0", "13.0", 1 << 33))
        message = r"built for compute capability 8\.9, NVIDIA Other has 12\.0(.|\n)*variator build"
    elif change == "version":
        real = importlib.metadata.version
        other = "1.7.2"
        monkeypatch.setattr(importlib.metadata, "version", lambda name: other if "rtx" in name else real(name))
        message = r"built with tensorrt-rtx 1\.7\.1\S*, 1\.7\.2 is here(.|\n)*variator build"
    elif change == "truncated":
        plan = built.directory / "ratio-4.plan"
        plan.write_bytes(plan.read_bytes()[:-1])
        message = r"ratio-4\.plan is missing or has changed(.|\n)*--rebuild"
    else:  # a record that claims another GPU than its name says
        file = built.directory / "engine.json"
        file.write_text(file.read_text().replace('"8.9"', '"12.0"'))
        message = "does not hold the engine it is named for"
    with pytest.raises(EngineError, match=message):
        found, _ = find_built(copy, "tensorrt-rtx")
        load_engine(copy, found, "ratio-4.onnx")


def test_a_tensorrt_plan_is_bound_to_gpu_and_driver(gpu_here: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backend_module.TensorRtBackend(TENSORRT)
    target = backend.target(BuildOptions(), "fp32")
    assert target == {"compute_capabilities": "8.9", "gpu": "NVIDIA Rehearsal", "cuda": "13.0"}
    assert backend.misfit(target) == ""
    monkeypatch.setattr(backend_module, "gpu", lambda: Gpu("NVIDIA Rehearsal", "8.9", "13.1", 1 << 33))
    assert backend.misfit(target) == "it was built for cuda 13.0, here is 13.1"
    with pytest.raises(InputError, match="leave --compute-capability out"):
        backend.target(BuildOptions((), ("8.9",)), "fp16")


def test_each_thing_that_can_be_missing_has_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    if TENSORRT.missing():
        with pytest.raises(EngineError, match=r"tensorrt cannot be imported(.|\n)*variator\[tensorrt\]"):
            resolve("tensorrt", None)
    with monkeypatch.context() as context:
        context.setattr(importlib.metadata, "version", lambda name: "9.0.1")
        assert "9.0.1 is here, not 1.7 ≤ version < 2" in str(TENSORRT_RTX.missing())
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "cuda.bindings", None)
        assert "pip install cuda-bindings" in str(no_gpu())
    with monkeypatch.context() as context:
        context.setattr(gpu_module, "DRIVER_LIBRARY", "libnosuchdriver.so.1")
        assert "no NVIDIA driver here (libnosuchdriver.so.1" in str(no_gpu())
    from cuda.bindings import runtime

    monkeypatch.setattr(gpu_module, "DRIVER_LIBRARY", "libc.so.6")
    ok = runtime.cudaError_t.cudaSuccess
    monkeypatch.setattr(runtime, "cudaGetDeviceCount", lambda: (ok, 0))
    assert "shows no GPU" in str(no_gpu())
    monkeypatch.setattr(runtime, "cudaGetDeviceCount", lambda: (runtime.cudaError_t.cudaErrorInsufficientDriver, None))
    assert "does not answer (cudaErrorInsufficientDriver)" in str(no_gpu())
    monkeypatch.setattr(runtime, "cudaGetDeviceCount", lambda: (ok, 1))
    assert no_gpu() is None


RECEIVERS = {
    "library": "", "native": "ICudaEngine|IExecutionContext", "_runtime": "Runtime", "network": "INetworkDefinition",
    "layer": "ILayer", "maker": "ILayer", "tensor": "ITensor", "config": "IBuilderConfig|IRuntimeConfig",
    "_cache": "IRuntimeCache",
}  # fmt: skip
"""Names that objects of the library have in our code, and the classes they may be of."""


def names_used(*without: str) -> list[tuple[str, str]]:
    """(classes, dotted name) of the library that this package uses; classes empty for the module itself."""
    used = set()
    for path in Path(tensorrt_package.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())) if path.name not in without else ():
            dotted, value = [], node
            while isinstance(value, ast.Attribute):
                receiver = value.value
                name = getattr(receiver, "id", getattr(receiver, "attr", ""))
                dotted.insert(0, value.attr)
                if name in RECEIVERS:
                    used.add((RECEIVERS[name], ".".join(dotted)))
                    break
                value = receiver
    return sorted(used)


STUB = """
import functools, json, sys
library = __import__(sys.argv[1])
def has(place, dotted):
    try:
        return functools.reduce(getattr, dotted.split("."), place) is not None
    except AttributeError:
        return False
def missing(classes, dotted):
    places = [getattr(library, name) for name in classes.split("|") if hasattr(library, name)] if classes else [library]
    return not any(has(place, dotted.split(".")[0] if classes else dotted) for place in places)
print(json.dumps([name for name in json.load(sys.stdin) if missing(*name)]))
"""


@pytest.mark.parametrize("version", ["10.16.1.11", "11.4.0.106"])
def test_every_name_that_is_used_exists_in_tensorrts_genuine_bindings(version: str, tmp_path: Path) -> None:
    """Their libraries cannot be had here: a stub of the few functions they import is enough to list their names."""
    names = names_used("rtx.py")
    wanted_too = {"Runtime", "BuilderFlag.TF32", "ILogger.ERROR", "TensorIOMode.INPUT", "create_execution_context"}
    assert wanted_too <= {name for _, name in names}
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "bindings")]
    if subprocess.run([*pip, f"tensorrt-cu13-bindings=={version}"], capture_output=True).returncode:
        pytest.skip(f"the bindings of TensorRT {version} could not be had")
    native = tmp_path / "bindings" / "tensorrt_bindings" / "tensorrt.so"
    listed = subprocess.run(["nm", "-D", "--undefined-only", native], check=True, capture_output=True, text=True).stdout
    missing = [line.split()[-1] for line in listed.splitlines() if "@" not in line and line.split()[0] == "U"]
    wanted = [name for name in missing if not name.startswith(("Py", "_Py"))]
    (tmp_path / "stub.c").write_text("".join(f"void {name}(void) {{}}\n" for name in wanted))
    for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        target = tmp_path / f"lib{name}.so.{version.split('.')[0]}"
        source = tmp_path / "stub.c" if name == "nvinfer" else Path(os.devnull)
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", target, "-x", "c", source], check=True)
    found = subprocess.run(
        [sys.executable, "-c", STUB, "tensorrt_bindings"],
        input=json.dumps(names),
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(tmp_path / "bindings")},
        check=True,
        capture_output=True,
        text=True,
    )
    assert json.loads(found.stdout) == []


def test_every_name_that_is_used_exists_in_tensorrt_rtx() -> None:
    found = subprocess.run(
        [sys.executable, "-c", STUB, "tensorrt_rtx"],
        input=json.dumps(names_used()),
        check=True,
        capture_output=True,
        text=True,
    )
    assert json.loads(found.stdout) == []


def test_every_name_of_cuda_that_is_used_exists() -> None:
    from cuda.bindings import runtime

    source = Path(cuda_module.__file__).read_text()
    called = set(re.findall(r'call\(\s*"(\w+)"', source)) | set(re.findall(r"(?:module|runtime\(\))\.(\w+)", source))
    assert {"cudaMalloc", "cudaGraphLaunch", "cudaStreamCaptureMode"} <= called
    assert [name for name in sorted(called) if not hasattr(runtime, name)] == []
