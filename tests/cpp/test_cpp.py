"""The C++ runtime against Python's: the same outputs, decisions and refusals; threads, the C interface, sanitizers."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from filelock import FileLock

from tests.conftest import write_checkpoint
from tests.engines.tables import made_up
from tools.build_cpp import SOURCE, CannotBuildError, build, compiled, configure, dependencies
from tools.policy_vectors import vectors
from variator import VariatorError
from variator.engines import build as building
from variator.engines.built import ENGINE_FILE, LATENCY_FILE, key_of
from variator.engines.policies import Costs, Drain, Fixed, SlackFit, Thresholds
from variator.engines.runtime import Runtime
from variator.engines.scheduler import Request, Scheduler, buckets_up_to
from variator.exporters.export import ExportSettings, export
from variator.toolkit.checkpoint import load_backbone
from variator.toolkit.rows import Row

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "variator-tests"
TOLERANCE = 1e-5

Drive = Callable[..., Any]


def sources() -> str:
    """Hash of everything that a build depends on."""
    files = sorted(path for path in SOURCE.rglob("*") if path.is_file())
    files += [SOURCE.parent / "variator" / "__init__.py", SOURCE.parent / "tools" / "build_cpp.py"]
    # CMake builds for the place that the sources lie at: another checkout of the same has a build of its own.
    hashed = hashlib.sha256(f"{SOURCE} {importlib.metadata.version('onnxruntime')}".encode())
    for path in files:
        hashed.update(str(path.relative_to(SOURCE.parent)).encode() + path.read_bytes())
    return hashed.hexdigest()[:16]


def built(sanitize: str = "") -> Path:
    """The build of the present sources, made if it is not there."""
    name = "-".join(["cpp", *([sanitize.replace(",", "-")] if sanitize else []), sources()])
    place = CACHE / name
    try:
        needed = dependencies(CACHE / "onnxruntime")
        with FileLock(CACHE / f".{name}.lock"):
            return build(place, needed, sanitize)
    except CannotBuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def cpp() -> Path:
    """The build directory."""
    return built()


def driver(place: Path, directory: Path, environment: dict[str, str] | None = None) -> Drive:
    def drive(command: str, /, **given: Any) -> Any:
        file = directory / "given.json"
        file.write_text(json.dumps(given, default=str))
        done = subprocess.run(
            [place / "tests" / "variator_driver", command, file],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, **(environment or {})},
        )
        assert done.returncode in (0, 1), done.stdout[-500:] + done.stderr[-3000:]
        assert not done.stderr, done.stderr[-3000:]
        return json.loads(done.stdout)

    return drive


@pytest.fixture
def drive(cpp: Path, tmp_path: Path) -> Drive:
    """Run a command of the test driver: what it printed."""
    return driver(cpp, tmp_path)


@pytest.fixture
def copied(calibrated: Path, tmp_path: Path) -> Path:
    """A bundle with an engine, to be damaged."""
    return shutil.copytree(calibrated, tmp_path / "copied")


def ids(length: int, seed: int = 0) -> list[int]:
    return [random.Random(seed + 1000 * length).randrange(120) for _ in range(length)]


REQUESTS = [
    [ids(1)],
    [ids(5)],
    [ids(33), ids(2), ids(33, 1), ids(150)],
    [ids(length) for length in range(1, 41)],
    [ids(128, seed) for seed in range(140)],  # more than run at once
]


def arrays(answer: dict[str, Any]) -> dict[str, Any]:
    assert "error" not in answer, answer
    return {
        name: np.array(output["values"], np.float32).reshape(output["shape"])
        for name, output in answer["outputs"].items()
    }


def same(answer: dict[str, Any], expected: dict[str, Any]) -> None:
    found = arrays(answer)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].shape == values.shape
        assert np.abs(found[name] - values).max() <= TOLERANCE


def test_answers_are_pythons_at_every_ratio_and_shape(drive: Drive, calibrated: Path) -> None:
    requests = [{"rows": rows, "ratio": ratio} for ratio in (1, 2, "4") for rows in REQUESTS]
    found = drive("infer", bundle=calibrated, requests=requests)
    with Runtime.open(calibrated, "onnxruntime", "fp32") as runtime:
        for request, answer in zip(requests, found["answers"], strict=True):
            expected = runtime.infer(request["rows"], ratio=int(request["ratio"]))
            same(answer, expected.outputs)
            assert answer["lengths"] == expected.lengths
            assert (answer["ratio"], answer["engine"], answer["precision"]) == (
                str(expected.ratio),
                "onnxruntime",
                "fp32",
            )
    first = arrays(found["answers"][2])["embedding"]
    other = arrays(found["answers"][12])["embedding"]
    assert np.abs(first - other).max() > 1e-3  # ratios do differ


PLACED: dict[str, tuple[str, list[tuple[list[int], list[int]]]]] = {
    "short tokens": ("last_hidden_state", [([2, 8, 4], [0, 2])]),
    "short tokens of a later part": ("start_logits", [([2, 9], [0, 2]), ([1, 4], [1])]),
    "another width": ("last_hidden_state", [([2, 9, 4], [0, 2]), ([1, 5, 6], [1])]),
    "another number of dimensions": ("embedding", [([2, 4], [0, 2]), ([1], [1])]),
    "another number of rows": ("embedding", [([3, 4], [0, 2])]),
}


def check_placed(drive: Drive, wrong: str) -> None:
    name, parts = PLACED[wrong]
    given = [{"shape": shape, "places": places} for shape, places in parts]
    found = drive("place", name=name, lengths=[9, 5, 3], parts=given)
    assert (found["error"], "another shape" in found["what"]) == ("EngineError", True)


@pytest.mark.parametrize("wrong", PLACED)
def test_outputs_of_another_shape_than_their_inputs_are_refused(drive: Drive, wrong: str) -> None:
    check_placed(drive, wrong)


def test_outputs_that_are_padded_further_fit(drive: Drive) -> None:
    parts = [{"shape": [2, 16, 4], "places": [0, 2]}, {"shape": [1, 5, 4], "places": [1]}]
    assert drive("place", name="last_hidden_state", lengths=[9, 5, 3], parts=parts) == [3, 9, 4]


def test_long_rows_are_cut_if_that_is_asked_for(drive: Drive, calibrated: Path) -> None:
    asked = [{"rows": [ids(400)], "ratio": 2, "truncate": True}]
    (answer,) = drive("infer", bundle=calibrated, requests=asked)["answers"]
    assert answer["lengths"] == [150]
    with Runtime.open(calibrated, "onnxruntime", "fp32") as runtime:
        same(answer, runtime.infer([ids(400)], ratio=2, truncate=True).outputs)


def test_token_types_count_and_token_outputs_are_padded_as_in_python(drive: Drive, tmp_path: Path) -> None:
    checkpoint = write_checkpoint("bert", tmp_path / "model", "AutoModelForQuestionAnswering")
    settings = ExportSettings((4,), untrained=True, rank=8)
    bundle = export(load_backbone(str(checkpoint), task="qa"), tmp_path / "bundle", settings)
    building.build(bundle, "onnxruntime", "fp32")
    rows = [ids(9), ids(3), ids(40)]
    types = [[int(place > 2) for place in range(len(row))] for row in rows]
    asked = [{"rows": rows, "ratio": ratio, **more} for ratio in (1, 4) for more in ({}, {"types": types})]
    found = drive("infer", bundle=bundle.path, requests=asked)["answers"]
    with Runtime.open(bundle, "onnxruntime", "fp32") as runtime:
        for request, answer in zip(asked, found, strict=True):
            given = [Row(*both) for both in zip(rows, types, strict=True)] if "types" in request else rows
            same(answer, runtime.infer(given, ratio=request["ratio"]).outputs)
    without, with_types = (arrays(answer)["start_logits"] for answer in found[:2])
    assert without.shape == (3, 40)
    assert (without[1, 3:] == -3.0e4).all()
    assert np.abs(without[0, :9] - with_types[0, :9]).max() > 1e-3


def test_scores_of_plugins_come_with_the_answers(drive: Drive, copied: Path) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    scores = [{"value": {"spearman": 0.8, "pearson": 0.1}, "ratio_1": {"spearman": 0.9, "pearson": 0.9}}]
    manifest["ratios"]["2"]["training"] = {"scores": scores}
    changed(copied / "manifest.json", ratios=manifest["ratios"])
    asked = [{"rows": [ids(5)], "ratio": ratio} for ratio in (1, 2, 4)]
    found = [answer["expected_quality"] for answer in drive("infer", bundle=copied, requests=asked)["answers"]]
    assert found == [1.0, 0.8889, 0.0]
    with Runtime.open(copied, "onnxruntime", "fp32") as runtime:
        assert runtime.quality == {1: 1.0, 2: found[1]}


BAD_REQUESTS = [
    ({"rows": [ids(5)], "ratio": 3}, "ratio '3' is not in"),
    ({"rows": [ids(5)], "ratio": "long"}, "valid: 1, 2, 4"),
    ({"rows": [], "ratio": 2}, "the request is empty"),
    ({"rows": [[]], "ratio": 2}, "input 0 is empty"),
    ({"rows": [ids(3), [5, 120]], "ratio": 2}, "input 1 holds token id 120"),
    ({"rows": [[-1]], "ratio": 2}, "token id -1"),
    ({"rows": [ids(151)], "ratio": 2}, "input 0 has 151 tokens"),
    ({"rows": [ids(3)], "types": [[0, 1]], "ratio": 2}, "token types of input 0"),
    ({"rows": [ids(3)], "types": [[0, 1, 2]], "ratio": 2}, "token types of input 0"),
    ({"rows": [ids(3)], "ratio": 2, "slo_ms": 10}, "slo_ms with ratio '2'"),
    ({"rows": [ids(3)], "ratio": "auto", "slo_ms": -1}, "an SLO of -1"),
    ({"texts": ["ab"], "ratio": 2}, "without a tokenizer"),
]


def test_bad_requests_are_told_and_good_ones_go_on(drive: Drive, calibrated: Path) -> None:
    good = {"rows": [ids(5)], "ratio": 2}
    requests = [one for bad, _ in BAD_REQUESTS for one in (bad, good)]
    answers = drive("infer", bundle=calibrated, requests=requests)["answers"]
    for (_, words), answer in zip(BAD_REQUESTS, answers[::2], strict=True):
        assert (answer["error"], words in answer["what"]) == ("InputError", True), answer
    assert all("outputs" in answer for answer in answers[1::2])


def test_texts_go_through_the_tokenizer_that_is_given(drive: Drive, calibrated: Path) -> None:
    requests = [{"texts": ["abc", "z"], "ratio": 4}, {"rows": [[0, 1, 2], [25]], "ratio": 4}]
    texts, rows = drive("infer", bundle=calibrated, tokenizer="letters", requests=requests)["answers"]
    same(texts, arrays(rows))


def test_long_texts_are_truncated_as_in_python_or_refused(drive: Drive, calibrated: Path) -> None:
    texts = [
        " ".join(f"w{random.Random(seed).randrange(60)}" for _ in range(words))
        for seed, words in enumerate((3, 148, 149, 400))
    ]
    asked = [{"texts": texts, "ratio": 2, "truncate": truncate} for truncate in (True, False)]
    cut, refused = drive("infer", bundle=calibrated, tokenizer="words", requests=asked)["answers"]
    assert cut["lengths"] == [5, 150, 150, 150]
    with Runtime.open(calibrated, "onnxruntime", "fp32") as runtime:
        same(cut, runtime.infer(texts, ratio=2, truncate=True).outputs)
    assert (refused["error"], "input 2 has 151 tokens" in refused["what"]) == ("InputError", True)
    asked = [{"texts": ["a" * length], "ratio": 2, "truncate": True} for length in (151, 150)]
    unable, short = drive("infer", bundle=calibrated, tokenizer="letters", requests=asked)["answers"]
    assert (unable["error"], "cannot truncate" in unable["what"]) == ("InputError", True)
    assert short["lengths"] == [150]


def changed(path: Path, **fields: Any) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **fields}))


def files(bundle: Path, **more: Any) -> dict[str, Any]:
    return {**json.loads((bundle / "manifest.json").read_text())["files"], **more}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def link_out(bundle: Path) -> None:
    outside = bundle.parent / "outside"
    shutil.move(bundle / "backbone.data", outside)
    (bundle / "backbone.data").symlink_to(outside)


ENTRY = {"bytes": 1, "sha256": ""}
BAD_BUNDLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte": (lambda place: flip(place / "backbone.data"), "sha256 differs"),
    "a missing file": (lambda place: (place / "ratio-2.onnx").unlink(), "ratio-2.onnx is missing"),
    "a cut file": (lambda place: os.truncate(place / "plugin-2.data", 10), "10 bytes long"),
    "a path that leaves": (
        lambda place: changed(place / "manifest.json", files=files(place, **{"../x": ENTRY})),
        "is a path outside",
    ),
    "an absolute path": (
        lambda place: changed(place / "manifest.json", files=files(place, **{"/etc/passwd": ENTRY})),
        "is a path outside",
    ),
    "a link that leaves": (link_out, "is a path outside"),
    "another version": (lambda place: changed(place / "manifest.json", format_version=5), "format version 5"),
    "a version that is none": (lambda place: changed(place / "manifest.json", format_version=True), "version true"),
    "no manifest": (lambda place: (place / "manifest.json").unlink(), "is not a bundle"),
    "no JSON": (lambda place: (place / "manifest.json").write_text("{"), "not JSON"),
    "no object": (lambda place: (place / "manifest.json").write_text("[1]"), "not a JSON object"),
    "deep JSON": (lambda place: (place / "manifest.json").write_text("[" * 200_000), "not JSON"),
    "deep JSON that ends": (
        lambda place: (place / "manifest.json").write_text(f'{{"x": {"[" * 200_000}{"]" * 200_000}}}'),
        "levels deep",
    ),
    "no ratio 1": (lambda place: changed(place / "manifest.json", ratios={}), "ratio 1 is not listed"),
    "a field of another kind": (
        lambda place: changed(place / "manifest.json", max_length="150"),
        'max_length is "150"',
    ),
    "a size below 1": (lambda place: changed(place / "manifest.json", vocabulary=0), "is 0"),
    "a length beyond all models": (
        lambda place: changed(place / "manifest.json", max_length=(1 << 32) + 8),
        "max_length is 4294967304",
    ),
    "files that are none": (lambda place: changed(place / "manifest.json", files=[1]), "files is [1]"),
    "one graph for all": (lambda place: changed(place / "manifest.json", layout="shared"), "--layout per-ratio"),
    "a decoder": (lambda place: changed(place / "manifest.json", decoder={}), "has a decoder"),
    "a template": (
        lambda place: changed(place / "manifest.json", prompt={"template": "{0} <extra_id_0>", "words": ["a", "b"]}),
        "with a template",
    ),
}


@pytest.mark.parametrize("damage", BAD_BUNDLES)
def test_a_damaged_bundle_is_refused(drive: Drive, copied: Path, damage: str) -> None:
    do, words = BAD_BUNDLES[damage]
    do(copied)
    found = drive("infer", bundle=copied, requests=[])
    assert (found["error"], words in found["what"]) == ("BundleError", True), found


def test_a_bundle_without_a_path_is_refused(drive: Drive, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copied)
    assert "is not a bundle" in drive("infer", bundle="", requests=[])["what"]
    assert "picked" in drive("infer", bundle=".", requests=[])


def test_only_files_that_the_manifest_lists_can_be_verified(drive: Drive, copied: Path) -> None:
    assert drive("verify", bundle=copied, names=[]) == "verified"
    assert drive("verify", bundle=copied, names=["ratio-2.onnx"]) == "verified"
    (copied / "other").write_text("")
    found = drive("verify", bundle=copied, names=["ratio-2.onnx", "other"])
    assert (found["error"], "'other' is not listed" in found["what"]) == ("BundleError", True)


def engine_of(bundle: Path) -> Path:
    (found,) = (bundle / "engines").glob("onnxruntime-fp32-*")
    return found


def remade(bundle: Path, **parts: str) -> None:
    """Give an engine other parts, with the key and name that belong to them."""
    place = engine_of(bundle)
    data = json.loads((place / ENGINE_FILE).read_text())
    target = {**data["target"], **{name: parts.pop(name) for name in list(parts) if name in data["target"]}}
    all_parts = {**data["parts"], **parts}
    key = key_of(all_parts, target, data["choices"])
    changed(place / ENGINE_FILE, parts=all_parts, target=target, key=key)
    place.rename(place.with_name(f"onnxruntime-fp32-{key}"))


BAD_ENGINES: dict[str, tuple[Callable[[Path], object], str]] = {
    "none": (lambda place: shutil.rmtree(place / "engines"), "no engine is built"),
    "another name": (
        lambda place: engine_of(place).rename(engine_of(place).with_name("onnxruntime-fp32-0")),
        "named for",
    ),
    "other parts": (
        lambda place: changed(engine_of(place) / ENGINE_FILE, target={"cpu": "abacus"}),
        "does not hold the engine it is named for",
    ),
    "an unchecked one": (lambda place: changed(engine_of(place) / ENGINE_FILE, gated=False), "not yet checked"),
    "another library": (lambda place: remade(place, version="1.2.3"), "built with ONNX Runtime 1.2.3"),
    "another variator": (lambda place: remade(place, variator="0.0.9"), "built with variator 0.0.9"),
    "another export": (lambda place: remade(place, graphs="0"), "other graphs"),
    "another processor": (lambda place: remade(place, cpu="abacus"), "another kind of processor"),
    "no record": (lambda place: (engine_of(place) / ENGINE_FILE).write_text("{}"), "is damaged"),
}


@pytest.mark.parametrize("damage", BAD_ENGINES)
def test_an_engine_that_does_not_belong_here_is_refused(drive: Drive, copied: Path, damage: str) -> None:
    do, words = BAD_ENGINES[damage]
    do(copied)
    found = drive("infer", bundle=copied, requests=[])
    assert (found["error"], words in found["what"]) == ("EngineError", True), found
    assert "fix: variator build" in found["what"]


def test_an_engine_whose_files_have_changed_is_refused_with_its_first_request(drive: Drive, copied: Path) -> None:
    flip(engine_of(copied) / "ratio-2.onnx")
    bad, good = drive("infer", bundle=copied, requests=[{"rows": [ids(5)], "ratio": ratio} for ratio in (2, 1)])[
        "answers"
    ]
    assert (bad["error"], "changed since it was built" in bad["what"]) == ("EngineError", True)
    assert "outputs" in good


def rewritten(bundle: Path, graph: str, change: Callable[[onnx.ModelProto], object]) -> None:
    """Change a graph of an engine, and its hash with it: an attacker would."""
    place = engine_of(bundle)
    model = onnx.load(place / graph, load_external_data=False)
    change(model)
    data = model.SerializeToString()
    (place / graph).write_bytes(data)
    listed = json.loads((place / ENGINE_FILE).read_text())["files"]
    listed[graph] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    changed(place / ENGINE_FILE, files=listed)


def point(model: onnx.ModelProto, key: str, value: str) -> None:
    """Give the first external tensor's entry another value."""
    tensor = next(one for one in model.graph.initializer if one.external_data)
    next(entry for entry in tensor.external_data if entry.key == key).value = value


def add(model: onnx.ModelProto, key: str, value: str, external: bool = True) -> None:
    """Give a tensor one entry more."""
    tensor = next(one for one in model.graph.initializer if bool(one.external_data) == external)
    tensor.external_data.add(key=key, value=value)


BAD_GRAPHS: dict[str, tuple[Callable[[onnx.ModelProto], object], str]] = {
    "weights outside": (lambda model: point(model, "location", "../../backbone.data"), "is a path outside"),
    "weights beyond the end": (lambda model: point(model, "offset", str(1 << 40)), "is missing from weights.data"),
    "an offset that is none": (lambda model: point(model, "offset", "-1"), "has offset '-1'"),
    "an offset that overflows": (lambda model: point(model, "offset", str(1 << 64)), "has offset"),
    "weights in two places": (lambda model: add(model, "location", "../../backbone.data"), "has location twice"),
    "weights both inside and outside": (
        lambda model: add(model, "location", "../../backbone.data", external=False),
        "is a path outside",
    ),
    "no node": (lambda model: model.graph.Clear(), "holds no node"),
}


@pytest.mark.parametrize("damage", BAD_GRAPHS)
def test_a_graph_that_reads_elsewhere_is_refused(drive: Drive, copied: Path, damage: str) -> None:
    do, words = BAD_GRAPHS[damage]
    rewritten(copied, "ratio-2.onnx", do)
    (found,) = drive("infer", bundle=copied, requests=[{"rows": [ids(5)], "ratio": 2}])["answers"]
    assert (found["error"], words in found["what"]) == ("BundleError", True), found


def test_int8_runs_only_if_it_is_asked_for_and_its_precision_is_read_back(drive: Drive, copied: Path) -> None:
    building.build(copied, "onnxruntime", "int8")
    asked = [{"rows": [ids(5)], "ratio": 2}]
    assert drive("infer", bundle=copied, requests=asked)["answers"][0]["precision"] == "fp32"
    assert drive("infer", bundle=copied, engine="onnxruntime", requests=asked)["answers"][0]["precision"] == "fp32"
    answer = drive("infer", bundle=copied, precision="int8", requests=asked)["answers"][0]
    assert answer["precision"] == "int8"
    with Runtime.open(copied, "onnxruntime", "int8") as runtime:
        same(answer, runtime.infer([ids(5)], ratio=2).outputs)
    assert drive("infer", bundle=copied, engine="abacus", requests=[])["error"] == "InputError"


def check_threads(drive: Drive, bundle: Path, count: int) -> None:
    requests = [{"rows": rows, "ratio": ratio} for ratio in (1, 2, 4) for rows in REQUESTS[:4]]
    alone = drive("infer", bundle=bundle, requests=requests)["answers"]
    for answers in drive("threads", bundle=bundle, count=count, requests=requests):
        assert len(answers) == len(requests)
        for answer in answers:
            same(answer, arrays(alone[answer["request"]]))


def test_many_threads_get_what_one_gets(drive: Drive, calibrated: Path) -> None:
    check_threads(drive, calibrated, 8)


def test_a_ratio_that_is_loaded_does_not_wait_for_another_ones_load(drive: Drive) -> None:
    assert drive("loads") == {"same": True, "begun": 2, "failed": 1}


def check_auto(drive: Drive, bundle: Path, count: int) -> None:
    requests = [
        {"rows": [ids(length, seed)], "ratio": "auto", "slo_ms": 20_000} for length in (3, 17, 90) for seed in range(6)
    ]
    found = drive("threads", bundle=bundle, count=count, requests=requests)
    with Runtime.open(bundle, "onnxruntime", "fp32") as runtime:
        for answer in (one for answers in found for one in answers):
            expected = runtime.infer(requests[answer["request"]]["rows"], ratio=int(answer["ratio"]))
            same(answer, expected.outputs)


def test_auto_answers_threads_in_common_batches_as_python_would_at_that_ratio(drive: Drive, calibrated: Path) -> None:
    check_auto(drive, calibrated, 8)


def test_auto_without_load_takes_ratio_1_and_with_a_fixed_policy_that_one(drive: Drive, calibrated: Path) -> None:
    asked = [{"rows": [ids(5), ids(9)], "ratio": "auto", "slo_ms": 5000}]
    assert drive("infer", bundle=calibrated, requests=asked)["answers"][0]["ratio"] == "1"
    answer = drive("infer", bundle=calibrated, policy="fixed(2)", requests=asked)["answers"][0]
    assert answer["ratio"] == "2"
    with Runtime.open(calibrated, "onnxruntime", "fp32") as runtime:
        same(answer, runtime.infer(asked[0]["rows"], ratio=2).outputs)
    found = drive("infer", bundle=calibrated, policy="fixed(3)", requests=[])
    assert (found["error"], "fixed(4)" in found["what"]) == ("InputError", True)


def test_auto_refuses_what_cannot_be_in_time(drive: Drive, calibrated: Path) -> None:
    asked = [{"rows": [ids(5)], "ratio": "auto", "slo_ms": slo} for slo in (0.01, 5000)]
    late, fine = drive("infer", bundle=calibrated, requests=asked)["answers"]
    assert (late["error"], "cannot be met" in late["what"]) == ("DeadlineExceeded", True)
    assert "outputs" in fine


def shared(drive: Drive, calls: list[dict[str, Any]], max_queue: int = 10, **given: Any) -> list[dict[str, Any]]:
    """Calls with ratio `auto` that come while the first one's batch runs, in an engine that is made up."""
    points = [
        {"ratio": ratio, "batch": batch, "length": 8, "p50_ms": (1 + 0.001 * batch) / ratio, "p95_ms": 2.0}
        for ratio in (1, 2)
        for batch in (1, 16)
    ]
    table = {"schema": "variator.latency/1", "key": "", "machine": {}, "points": points}
    given = {"throws": [], "nan": [], "expire": 0, "max_queue": max_queue, **given}
    costs = {"table": table, "ratios": [1, 2], "buckets": [8, 64], "max_rows": 64, "slo_ms": 60_000}
    policy = {"name": "drain", "alpha": 0.4, "margin": 1.1}
    return list(drive("auto", **costs, **given, policy=policy, calls=calls))


def call(*given: int, length: int = 8, slo_ms: float = 60_000) -> dict[str, Any]:
    return {"ids": given, "length": length, "slo_ms": slo_ms}


def batches(answers: list[dict[str, Any]], calls: list[dict[str, Any]]) -> list[Any]:
    """Which batch each call was answered by, once its outputs are its own; or the kind of error."""
    found = []
    for answer, asked in zip(answers, calls, strict=True):
        if "error" not in answer:
            made = arrays(answer)["made"]
            assert made[:, 0].tolist() == list(asked["ids"])
            assert answer["ratio"] == "1"
            assert len(set(made[:, 1])) == 1
        found.append(answer.get("error") or int(made[0, 1]))
    return found


def check_shared(drive: Drive) -> None:
    calls = [call(1), call(2, 3), call(4), call(5, 6, 7), call(8, length=40), call(9)]
    assert batches(shared(drive, calls), calls) == [0, 1, 1, 1, 2, 1]
    assert batches(shared(drive, calls, max_queue=3), calls) == [0, 1, 1, 1, "Overloaded", "Overloaded"]
    hurried = [*calls[:3], call(10, slo_ms=300)]
    answers = shared(drive, hurried, expire=1)
    assert batches(answers, hurried) == [0, 1, 1, "DeadlineExceeded"]
    assert "the request waited" in answers[3]["what"]
    answers = shared(drive, calls, nan=[6])
    assert batches(answers, calls) == [0, 1, 1, "EngineError", 2, 1]
    assert "made at ratio 1 is not finite" in answers[3]["what"]
    assert batches(shared(drive, calls, throws=[4]), calls) == [0, *["EngineError"] * 3, 2, "EngineError"]


def test_calls_with_auto_share_batches_and_none_takes_another_with_it(drive: Drive) -> None:
    check_shared(drive)


BAD_TABLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "none": (lambda table: table.unlink(), "no latency was measured"),
    "of another engine": (lambda table: changed(table, key="0"), "with another engine (0)"),
    "of another machine": (lambda table: changed(table, machine={}), "with another cores"),
    "of another schema": (lambda table: changed(table, schema="x/1"), "another schema"),
    "without points": (lambda table: changed(table, points=[]), "holds no point"),
    "no JSON": (lambda table: table.write_text("nothing"), "not JSON"),
}


@pytest.mark.parametrize("damage", BAD_TABLES)
def test_auto_needs_a_table_of_this_engine_and_machine(drive: Drive, copied: Path, damage: str) -> None:
    do, words = BAD_TABLES[damage]
    do(engine_of(copied) / LATENCY_FILE)
    asked = [{"rows": [ids(5)], "ratio": ratio} for ratio in ("auto", 2)]
    bad, good = drive("infer", bundle=copied, requests=asked)["answers"]
    assert (bad["error"], words in bad["what"], "--calibrate" in bad["what"]) == ("EngineError", True, True), bad
    assert "outputs" in good


def check_policies(drive: Drive) -> None:
    given = vectors()
    expected = [state.pop("decision") for state in given["states"]]
    found = drive("policies", **given)
    assert len(found) == len(expected) == 10_000
    wrong = [
        (state, ours, theirs)
        for state, ours, theirs in zip(given["states"], expected, found, strict=True)
        if ours != theirs
    ]
    assert not wrong, f"{len(wrong)} decisions differ, the first: {wrong[0]}"


def test_policies_decide_as_pythons_in_ten_thousand_states(drive: Drive) -> None:
    check_policies(drive)


@pytest.mark.parametrize("seed", range(4))
def test_the_queue_does_what_pythons_does(drive: Drive, seed: int) -> None:
    rng = random.Random(seed)
    policy, named = [
        (Drain(), {"name": "drain", "alpha": 0.4, "margin": 1.1}),
        (SlackFit(), {"name": "slackfit", "bins": 12}),
        (Thresholds(), {"name": "thresholds", "shares": [0.25, 0.5, 1.0]}),
        (Fixed(1), {"name": "fixed", "level": 1}),
    ][seed]
    table, buckets, slo = made_up(), buckets_up_to(512), 100.0
    queue = Scheduler(Costs(table, (1, 2, 4, 8), buckets), policy, slo, 60)
    events, expected, requests, batch, now = [], [], [], None, 0.0
    for _ in range(3000):
        now += rng.expovariate(0.5)
        what = (
            rng.choices(("submit", "next"), (4, 1))[0] if batch is None else rng.choices(("submit", "done"), (4, 1))[0]
        )
        event: dict[str, Any] = {"what": what, "now": now}
        if what == "submit":
            rows, length, deadline = rng.choice((1, 1, 2, 9)), rng.randint(0, 520), now + slo * rng.uniform(0.2, 3)
            event |= {"rows": rows, "length": length, "arrival": now, "deadline": deadline}
            request = Request(rows, length, now, deadline)
            requests.append(request)
            try:
                queue.submit(request, now)
                expected.append("waits")
            except VariatorError as error:
                expected.append(type(error).__name__)
        elif what == "next":
            batch, hopeless = queue.next_batch(now)
            told = batch and {
                "requests": [requests.index(one) for one in batch.requests],
                "level": batch.level,
                "rows": batch.rows,
                "expected_ms": batch.expected_ms,
            }
            expected.append({"batch": told, "hopeless": [requests.index(one) for one in hopeless]})
        else:
            assert batch is not None
            event["took_ms"] = batch.expected_ms * rng.uniform(0.3, 2)
            queue.done(now, batch, event["took_ms"])
            expected.append("done")
            batch = None
        events.append(event)
    given = {"table": json.loads(table.to_json()), "ratios": [1, 2, 4, 8], "buckets": list(buckets), "max_rows": 64}
    found = drive("schedule", **given, policy=named, slo_ms=slo, max_queue=60, events=events)
    for index, (ours, theirs) in enumerate(zip(expected, found, strict=True)):
        assert ours == theirs, f"event {index}: {events[index]}"
    kinds = {one for one in expected if isinstance(one, str)}
    assert {"waits", "done", "DeadlineExceeded", "InputError"} <= kinds
    assert any(one["hopeless"] for one in expected if isinstance(one, dict))


def test_hashes_are_sha256(drive: Drive) -> None:
    for length in (0, 1, 55, 56, 63, 64, 65, 119, 120, 1000):
        text = "a" * length
        assert drive("hash", text=text) == hashlib.sha256(text.encode()).hexdigest()


class OpenOptions(ctypes.Structure):
    _fields_ = [
        ("engine", ctypes.c_char_p),
        ("precision", ctypes.c_char_p),
        ("threads", ctypes.c_int),
        ("verify", ctypes.c_int),
        ("policy", ctypes.c_char_p),
        ("slo_ms", ctypes.c_double),
        ("max_queue", ctypes.c_int),
    ]


class Tensor(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("values", ctypes.POINTER(ctypes.c_float)),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("dimensions", ctypes.c_size_t),
    ]


class About(ctypes.Structure):
    _fields_ = [
        ("ratio", ctypes.c_char_p),
        ("engine", ctypes.c_char_p),
        ("precision", ctypes.c_char_p),
        ("outputs", ctypes.c_size_t),
        ("load_ms", ctypes.c_double),
        ("queue_ms", ctypes.c_double),
        ("compute_ms", ctypes.c_double),
        ("expected_quality", ctypes.c_double),
    ]


@pytest.fixture(scope="session")
def library(cpp: Path) -> ctypes.CDLL:
    """The shared library, through its C interface."""
    found = ctypes.CDLL(str(cpp / "libvariator.so"))
    found.variator_last_error.restype = ctypes.c_char_p
    found.variator_version.restype = ctypes.c_char_p
    found.variator_ratios.restype = ctypes.c_char_p
    return found


@pytest.fixture
def opened(library: ctypes.CDLL, calibrated: Path) -> Iterator[ctypes.c_void_p]:
    runtime = ctypes.c_void_p()
    status = library.variator_open(str(calibrated).encode(), None, ctypes.byref(runtime))
    assert status == 0, library.variator_last_error()
    yield runtime
    library.variator_close(runtime)


def called(
    library: ctypes.CDLL, runtime: ctypes.c_void_p, rows: list[list[int]], ratio: str, slo_ms: float = 0.0
) -> tuple[int, ctypes.c_void_p]:
    flat = [token for row in rows for token in row]
    result = ctypes.c_void_p()
    status = library.variator_infer(
        runtime,
        (ctypes.c_int64 * max(1, len(flat)))(*flat),
        None,
        (ctypes.c_size_t * max(1, len(rows)))(*map(len, rows)),
        ctypes.c_size_t(len(rows)),
        ratio.encode(),
        ctypes.c_double(slo_ms),
        ctypes.byref(result),
    )
    return status, result


def test_c_gives_what_python_gives(library: ctypes.CDLL, opened: ctypes.c_void_p, calibrated: Path) -> None:
    from variator import __version__

    assert library.variator_abi() == 1
    assert library.variator_version().decode() == __version__
    assert library.variator_ratios(opened) == b"1 2 4"
    rows = [ids(5), ids(40)]
    for ratio, slo_ms in (("4", 0.0), ("auto", 5000.0)):
        status, result = called(library, opened, rows, ratio, slo_ms)
        assert status == 0, library.variator_last_error()
        about, tensor = About(), Tensor()
        library.variator_about_result(result, ctypes.byref(about))
        assert (about.engine, about.precision, about.outputs) == (b"onnxruntime", b"fp32", 1)
        assert library.variator_output(result, ctypes.c_size_t(0), ctypes.byref(tensor)) == 0
        assert library.variator_output(result, ctypes.c_size_t(1), ctypes.byref(Tensor())) == 1
        found = np.ctypeslib.as_array(tensor.values, tensor.shape[: tensor.dimensions]).copy()
        with Runtime.open(calibrated, "onnxruntime", "fp32") as runtime:
            expected = runtime.infer(rows, ratio=int(about.ratio)).outputs[tensor.name.decode()]
        assert np.abs(found - expected).max() <= TOLERANCE
        library.variator_result_close(result)


def test_c_gives_a_status_and_words_for_every_error(
    library: ctypes.CDLL, opened: ctypes.c_void_p, tmp_path: Path, copied: Path
) -> None:
    for rows, ratio, slo_ms, status, words in (
        ([[1]], "3", 0.0, 1, b"valid: 1, 2, 4"),
        ([], "2", 0.0, 1, b"empty"),
        ([[999]], "2", 0.0, 1, b"token id 999"),
        ([[1]], "auto", 0.01, 4, b"cannot be met"),
    ):
        found, result = called(library, opened, rows, ratio, slo_ms)
        assert (found, result.value) == (status, None)
        assert words in library.variator_last_error()
    runtime = ctypes.c_void_p()
    assert library.variator_open(str(tmp_path / "none").encode(), None, ctypes.byref(runtime)) == 2
    assert b"is not a bundle" in library.variator_last_error()
    options = OpenOptions()
    library.variator_open_defaults(ctypes.byref(options))
    options.engine = b"abacus"
    assert library.variator_open(str(copied).encode(), ctypes.byref(options), ctypes.byref(runtime)) == 1
    options.engine, options.precision = b"onnxruntime", b"fp64"
    assert library.variator_open(str(copied).encode(), ctypes.byref(options), ctypes.byref(runtime)) == 3
    assert library.variator_open(None, None, ctypes.byref(runtime)) == 1
    library.variator_close(None)
    library.variator_result_close(None)


def test_the_c_header_is_c(cpp: Path, tmp_path: Path) -> None:
    source = tmp_path / "use.c"
    source.write_text(
        "#include <variator/variator.h>\nint main(void) { return variator_abi() == VARIATOR_ABI ? 0 : 1; }\n"
    )
    paths = [f"-I{SOURCE / 'include'}", f"-I{cpp / 'include'}"]
    flags = ["-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror"]
    subprocess.run(["cc", *flags, *paths, source, "-fsyntax-only"], check=True)


def test_the_example_builds_against_an_installed_library_and_runs(cpp: Path, calibrated: Path, tmp_path: Path) -> None:
    subprocess.run(["cmake", "--install", cpp, "--prefix", tmp_path / "prefix"], check=True, capture_output=True)
    configure(SOURCE / "examples", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={tmp_path / 'prefix'}")
    embed = compiled(tmp_path / "build") / "embed"
    done = subprocess.run([embed, calibrated, "2"], capture_output=True, text=True, check=True)
    with Runtime.open(calibrated, "onnxruntime", "fp32") as runtime:
        values = runtime.infer([[101, 102, 103, 104], [101, 105, 106, 107, 108, 102]], ratio=2).outputs["embedding"]
    assert "ratio 2, onnxruntime fp32" in done.stdout
    for row in range(2):
        assert f"embedding {row}: {values[row, 0]:.4f} {values[row, 1]:.4f}" in done.stdout
    failed = subprocess.run([embed, tmp_path], capture_output=True, text=True)
    assert failed.returncode == 1
    assert "is not a bundle" in failed.stderr


STAND_INS = Path(__file__).parent / "stand_ins"
TRT_SHAPES = [(1, 3), (2, 20), (5, 60)]


@pytest.fixture(scope="session")
def stand_in() -> Path:
    """The test driver with the TensorRT backend, over stand-ins for TensorRT and CUDA that compute on the processor."""
    place = CACHE / f"cpp-stand-in-{sources()}"
    root = place / "tensorrt"
    options = ("-DVARIATOR_TENSORRT=ON", f"-DTENSORRT_ROOT={root}", f"-DCMAKE_MODULE_PATH={STAND_INS}")
    try:
        needed = dependencies(CACHE / "onnxruntime")
        with FileLock(CACHE / f".{place.name}.lock"):
            (root / "lib").mkdir(parents=True, exist_ok=True)
            shutil.copytree(STAND_INS, root / "include", dirs_exist_ok=True)
            for name in ("nvinfer", "cudart"):
                source, library = root / "include" / f"{name}.cpp", root / "lib" / f"lib{name}.so"
                flags = ["-shared", "-fPIC", f"-Wl,-soname,{library.name}"]
                subprocess.run(["c++", *flags, source, "-o", library], check=True)
            build(place, needed, "", *options, "-DCMAKE_CXX_FLAGS=-Werror", "-DCMAKE_BUILD_TYPE=Debug")
    except CannotBuildError as error:
        pytest.skip(str(error))
    return place / "tests" / "variator_driver"


def with_plans(bundle: Path, version: str = "10.16.1.11", capability: str = "9.0") -> None:
    """An engine of plans that only the stand-in can run, named and hashed as `build` would."""
    record = json.loads((engine_of(bundle) / ENGINE_FILE).read_text())
    parts = {**record["parts"], "backend": "tensorrt", "version": version, "precision": "fp16"}
    target = {"compute_capabilities": capability, "gpu": "Stand-in", "cuda": "13.1"} if capability else {}
    choices = {"profiles": "two"}
    key = key_of(parts, target, choices)
    place = bundle / "engines" / f"tensorrt-fp16-{key}"
    place.mkdir()
    listed = {}
    for ratio in (1, 2, 4):
        data = f"variator:ratio-{ratio}:fp16 {ratio} 1 4 1 32 1 2 1 150".encode()
        (place / f"ratio-{ratio}.plan").write_bytes(data)
        listed[f"ratio-{ratio}.plan"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    own = {"backend": "tensorrt", "precision": "fp16", "key": key, "parts": parts, "target": target}
    (place / ENGINE_FILE).write_text(json.dumps({**record, **own, "choices": choices, "files": listed}))


def tensorrt(program: Path, bundle: Path, gpus: int, requests: list[dict[str, Any]], **more: Any) -> Any:
    file = bundle / "given.json"
    file.write_text(json.dumps({"bundle": str(bundle), "engine": "tensorrt", "requests": requests, **more}))
    environment = {**os.environ, "STAND_IN_GPUS": str(gpus)}
    done = subprocess.run([program, "infer", file], capture_output=True, text=True, env=environment)
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_plans_run_in_the_tightest_profile_in_parts_and_come_back_as_fp32(stand_in: Path, copied: Path) -> None:
    with_plans(copied)
    requests = [{"rows": [ids(length, row) for row in range(rows)], "ratio": 2} for rows, length in TRT_SHAPES]
    for request, answer in zip(requests, tensorrt(stand_in, copied, 1, requests)["answers"], strict=True):
        assert (answer["engine"], answer["precision"]) == ("tensorrt", "fp16")
        longest = max(map(len, request["rows"]))
        padded = next(bucket for bucket in (8, 24, 64) if bucket >= longest)
        # As the stand-in says: ratio x sum of a row's ids / 1024, the profile, the length, in half precision.
        sums = [2 * sum(row) / 1024 for row in request["rows"]]
        expected = [[np.float16(one), 0 if longest <= 32 else 1, padded] for one in sums]
        assert np.array_equal(arrays(answer)["embedding"], np.array(expected, np.float32))


@pytest.mark.slow
def test_plans_are_on_the_first_gpu_whichever_the_caller_uses(stand_in: Path, copied: Path) -> None:
    with_plans(copied)
    (answer,) = tensorrt(stand_in, copied, 2, [{"rows": [ids(5)], "ratio": 2}])["answers"]  # its threads use the second
    assert arrays(answer)["embedding"].shape == (1, 3)


@pytest.mark.slow
def test_plans_are_refused_without_a_gpu_or_on_another(stand_in: Path, copied: Path) -> None:
    with_plans(copied)
    told = tensorrt(stand_in, copied, 0, [])
    assert (told["error"], "no NVIDIA GPU" in told["what"]) == ("EngineError", True)
    shutil.rmtree(next((copied / "engines").glob("tensorrt-*")))
    with_plans(copied, version="10.15.0.1")
    assert "built with TensorRT 10.15.0.1, 10.16.1 is here" in tensorrt(stand_in, copied, 1, [])["what"]
    shutil.rmtree(next((copied / "engines").glob("tensorrt-*")))
    with_plans(copied, capability="8.9")
    assert "built for compute_capabilities 8.9" in tensorrt(stand_in, copied, 1, [])["what"]
    shutil.rmtree(next((copied / "engines").glob("tensorrt-*")))
    with_plans(copied, capability="")
    assert "does not say which compute_capabilities" in tensorrt(stand_in, copied, 1, [])["what"]


@pytest.mark.slow
@pytest.mark.parametrize("sanitize", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(sanitize: str, calibrated: Path, tmp_path: Path) -> None:
    # ONNX Runtime was not built with the sanitizer: what its threads agree on among themselves cannot be seen.
    # Nor can how the standard library counts who holds an exception: all calls of a batch that fails get the same one.
    (tmp_path / "known").write_text("race:variator::Error::~Error\n")
    thread = f"ignore_noninstrumented_modules=1:suppressions={tmp_path / 'known'}:print_suppressions=0"
    options = {"TSAN_OPTIONS": thread, "ASAN_OPTIONS": "detect_leaks=1"}
    drive = driver(built(sanitize), tmp_path, options)
    check_threads(drive, calibrated, 4)
    check_auto(drive, calibrated, 4)
    check_policies(drive)
    check_shared(drive)
    drive("loads")
    for wrong in PLACED:
        check_placed(drive, wrong)
    answers = drive("infer", bundle=calibrated, requests=[bad for bad, _ in BAD_REQUESTS])["answers"]
    assert {answer["error"] for answer in answers} == {"InputError"}
    for damage, (do, words) in BAD_BUNDLES.items():
        copied = shutil.copytree(calibrated, tmp_path / "damaged")
        do(copied)
        assert words in drive("infer", bundle=copied, requests=[])["what"], damage
        shutil.rmtree(copied)
        (tmp_path / "outside").unlink(missing_ok=True)
    for damage, (change, words) in BAD_GRAPHS.items():
        copied = shutil.copytree(calibrated, tmp_path / "damaged")
        rewritten(copied, "ratio-2.onnx", change)
        asked = [{"rows": [ids(5)], "ratio": 2}]
        assert words in drive("infer", bundle=copied, requests=asked)["answers"][0]["what"], damage
        shutil.rmtree(copied)
