"""Plugins that come and go while requests run: every answer is one plugin's, whole; what does not fit is refused."""

from __future__ import annotations

import gc
import json
import shutil
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import lively, random_head
from variator.engines import runtime as runtime_module
from variator.engines.backends import BACKENDS
from variator.engines.build import build
from variator.engines.built import find_built, load_engine
from variator.engines.runtime import DEFAULT, Runtime
from variator.errors import BundleError, EngineError, InputError, PluginError
from variator.exporters.graph import Compressed
from variator.toolkit.bundle import MANIFEST, Bundle
from variator.toolkit.checkpoint import Backbone
from variator.toolkit.plugin_file import Plugin, plugin_bytes, save_plugin
from variator.toolkit.plugin_format import PluginConfig

TEXTS = ["w1 w2 w3", "a b c d e f g h i", "w4"]


@pytest.fixture(params=["onnxruntime", "openvino"])
def runtime(request: pytest.FixtureRequest, shared_bundle: Bundle) -> Iterator[Runtime]:
    if BACKENDS[request.param].missing():
        pytest.skip(f"{request.param} is not installed")
    with Runtime.open(shared_bundle, request.param, "fp32", threads=1) as opened:
        yield opened


def expected(backbone: Backbone, plugin: Plugin | None) -> np.ndarray:
    """PyTorch's embeddings of `TEXTS`."""
    batch = backbone.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        output: torch.Tensor = Compressed(backbone.model, plugin).eval()(batch["input_ids"], batch["attention_mask"])[0]
    return output.numpy()


def embed(runtime: Runtime, ratio: int, plugin: str = DEFAULT) -> np.ndarray:
    return runtime.infer(TEXTS, ratio=ratio, plugin=plugin).outputs["embedding"]


@pytest.mark.parametrize("ratio", [2, 3, 4, 16])
def test_a_plugged_plugin_answers_like_pytorch_at_any_ratio_and_rank(
    runtime: Runtime, backbone: Backbone, ratio: int
) -> None:
    for rank in (1, 8, 50):
        plugin = lively(backbone, ratio, rank=rank)
        runtime.plug("mine", plugin)
        np.testing.assert_allclose(embed(runtime, ratio, "mine"), expected(backbone, plugin), atol=2e-6)
    assert runtime.plugins == {"default": [1, 2, 4], "mine": [1, ratio]}
    assert runtime.infer(TEXTS, ratio=ratio, plugin="mine").plugin == "mine"


def test_names_do_not_mix(runtime: Runtime, backbone: Backbone) -> None:
    before = {ratio: embed(runtime, ratio) for ratio in (1, 2, 4)}
    plugins = {name: [lively(backbone, ratio, seed) for ratio in (2, 4)] for seed, name in enumerate(("a", "b"))}
    for name, both in plugins.items():
        runtime.plug(name, both)
    for name, both in plugins.items():
        for plugin in both:
            found = embed(runtime, plugin.config.ratio, name)
            np.testing.assert_allclose(found, expected(backbone, plugin), atol=2e-6)
    for ratio in (1, 2, 4):
        np.testing.assert_array_equal(embed(runtime, ratio), before[ratio])
        np.testing.assert_array_equal(embed(runtime, 1, "a"), before[1])


def test_files_and_directories_are_plugged_in(runtime: Runtime, backbone: Backbone, tmp_path: Path) -> None:
    plugins = {ratio: lively(backbone, ratio) for ratio in (2, 8)}
    files = [save_plugin(plugin, tmp_path) for plugin in plugins.values()]
    runtime.plug("directory", tmp_path)
    runtime.plug("file", str(files[1]))
    assert runtime.plugins["directory"] == [1, 2, 8] and runtime.plugins["file"] == [1, 8]
    np.testing.assert_allclose(embed(runtime, 8, "file"), expected(backbone, plugins[8]), atol=2e-6)
    np.testing.assert_array_equal(embed(runtime, 8, "file"), embed(runtime, 8, "directory"))


def test_several_classifiers_share_one_backbone(runtime: Runtime, backbone: Backbone) -> None:
    plain = lively(backbone, 4)
    topic, mood = (lively(backbone, 4, classes=3), lively(backbone, 4, seed=1, classes=7))
    for name, plugin in (("plain", plain), ("topic", topic), ("mood", mood)):
        runtime.plug(name, plugin)
    assert set(runtime.infer(TEXTS, ratio=4, plugin="plain").outputs) == {"embedding"}
    for name, plugin in (("topic", topic), ("mood", mood)):
        for ratio in (1, 4):
            outputs = runtime.infer(TEXTS, ratio=ratio, plugin=name).outputs
            embedding = expected(backbone, plugin if ratio == 4 else None)
            np.testing.assert_allclose(outputs["embedding"], embedding, atol=2e-6)
            assert plugin.head is not None
            logits = embedding @ plugin.head.weight.T + plugin.head.bias
            np.testing.assert_allclose(outputs["logits"], logits, atol=1e-5)
    assert set(runtime.infer(TEXTS, ratio=4).outputs) == {"embedding"}


def test_a_head_travels_in_its_plugin_file(runtime: Runtime, backbone: Backbone, tmp_path: Path) -> None:
    plugin = lively(backbone, 4, classes=5)
    runtime.plug("object", plugin)
    runtime.plug("file", save_plugin(plugin, tmp_path))
    found = [runtime.infer(TEXTS, ratio=4, plugin=name).outputs["logits"] for name in ("object", "file")]
    np.testing.assert_array_equal(*found)


def test_a_head_for_plugins_without_one(runtime: Runtime, shared_bundle: Bundle) -> None:
    head = random_head(32, 2)
    runtime.plug("task", shared_bundle.path, head=head)
    for ratio in (1, 2, 4):
        outputs = runtime.infer(TEXTS, ratio=ratio, plugin="task").outputs
        np.testing.assert_array_equal(outputs["embedding"], embed(runtime, ratio))
        logits = outputs["embedding"] @ head.weight.T + head.bias
        np.testing.assert_allclose(outputs["logits"], logits, atol=1e-5)


def test_heads_that_differ_leave_ratio_1_without_one(runtime: Runtime, backbone: Backbone) -> None:
    plugins = [lively(backbone, ratio, seed=ratio, classes=2) for ratio in (2, 4)]
    runtime.plug("task", plugins)
    with pytest.raises(InputError, match=r"'task' has no ratio 1: its heads differ(.|\n)*valid: 2, 4(.|\n)*head="):
        runtime.infer(TEXTS, ratio=1, plugin="task")
    runtime.plug("task", plugins, head=random_head(32, 2))
    assert runtime.infer(TEXTS, ratio=1, plugin="task").outputs["logits"].shape == (3, 2)


def test_the_default_can_be_replaced_and_brought_back(runtime: Runtime, backbone: Backbone) -> None:
    before, plugin = embed(runtime, 4), lively(backbone, 4)
    runtime.plug(DEFAULT, plugin)
    np.testing.assert_allclose(embed(runtime, 4), expected(backbone, plugin), atol=2e-6)
    with pytest.raises(InputError, match="'default' has no ratio 2"):
        embed(runtime, 2)
    runtime.unplug(DEFAULT)
    np.testing.assert_array_equal(embed(runtime, 4), before)


def test_what_is_unplugged_is_gone_and_its_memory_too(runtime: Runtime, backbone: Backbone) -> None:
    runtime.plug("mine", lively(backbone, 4))
    embed(runtime, 4, "mine")
    engine = weakref.ref(runtime.load(4, "mine"))
    runtime.unplug("mine")
    gc.collect()
    assert engine() is None
    for call in (lambda: embed(runtime, 4, "mine"), lambda: runtime.unplug("mine")):
        with pytest.raises(InputError, match=r"no plugin 'mine'(.|\n)*valid: default(.|\n)*plug"):
            call()
    embed(runtime, 4)


def test_a_request_in_flight_keeps_what_it_began_with(runtime: Runtime, backbone: Backbone) -> None:
    old, new = lively(backbone, 4), lively(backbone, 4, seed=1)
    runtime.plug("task", old)
    answer = embed(runtime, 4, "task")
    begun, tokenise = threading.Event(), runtime.tokenise

    def signalling(*arguments: object) -> object:
        begun.set()
        return tokenise(*arguments)  # type: ignore[arg-type]

    runtime.tokenise = signalling  # type: ignore[method-assign, assignment]
    for change in (lambda: runtime.plug("task", new), lambda: runtime.unplug("task")):
        begun.clear()
        runtime.plug("task", old)
        with ThreadPoolExecutor(1) as pool:
            with runtime._compute_lock:  # as if another request were computing
                request = pool.submit(embed, runtime, 4, "task")
                assert begun.wait(10)
                change()
            np.testing.assert_array_equal(request.result(10), answer)


def test_a_thousand_swaps_under_load_show_no_request_half_a_plugin(runtime: Runtime, backbone: Backbone) -> None:
    sides = [lively(backbone, 4, seed, classes=3) for seed in (0, 1)]
    answers = []
    for side in sides:
        runtime.plug("task", side)
        answers.append(runtime.infer(TEXTS, ratio=4, plugin="task").outputs)
    assert not np.allclose(answers[0]["embedding"], answers[1]["embedding"], atol=1e-3)
    done = threading.Event()

    def load() -> list[int]:
        seen = []
        while not done.is_set():
            outputs = runtime.infer(TEXTS, ratio=4, plugin="task").outputs
            matches = [all(np.array_equal(outputs[name], side[name]) for name in side) for side in answers]
            assert sum(matches) == 1, "an answer of neither plugin"
            seen.append(matches.index(True))
        return seen

    with ThreadPoolExecutor(3) as pool:
        clients = [pool.submit(load) for _ in range(3)]
        try:
            for swap in range(1000):
                runtime.plug("task", sides[swap % 2])
        finally:
            done.set()
        seen = [side for client in clients for side in client.result(60)]
    assert set(seen) == {0, 1}


def test_two_plugs_of_one_name_at_once_leave_one_of_them_whole(runtime: Runtime, backbone: Backbone) -> None:
    sides = [[lively(backbone, ratio, seed) for ratio in (2, 4)] for seed in (0, 1)]
    for _ in range(20):
        start = threading.Barrier(2)

        def plug(side: list[Plugin], start: threading.Barrier = start) -> None:
            start.wait(10)
            runtime.plug("task", side)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(plug, sides))
        won = [
            next(i for i, side in enumerate(sides) if np.allclose(found, expected(backbone, side[position]), atol=1e-5))
            for position, found in enumerate((embed(runtime, 2, "task"), embed(runtime, 4, "task")))
        ]
        assert won[0] == won[1]


def changed(plugin: Plugin, name: str, value: float | None) -> Plugin:
    """The plugin with a tensor set to a value, or without it."""
    tensors = {key: tensor.copy() for key, tensor in plugin.tensors.items()}
    if value is None:
        del tensors[name]
    else:
        tensors[name].flat[0] = value
    return replace(plugin, tensors=tensors)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: replace(p, backbone="0" * 64), r"another backbone(.|\n)*fingerprint"),
        (lambda p: replace(p, layers=1), r"another backbone(.|\n)*1 layers of 32(.|\n)*2 layers of 32"),
        (lambda p: replace(p, hidden_size=16), r"another backbone(.|\n)*2 layers of 16"),
        (lambda p: changed(p, "layers.1.ffn.up.bias", None), "'layers.1.ffn.up.bias' is missing"),
        (lambda p: changed(p, "layers.0.ffn.score.weight", float("nan")), r"layers.0.ffn.score.weight.*NaN"),
        (lambda p: changed(p, "layers.0.ffn.up.weight", float("inf")), "infinity"),
        (lambda p: changed(p, "layers.0.ffn.up.weight", 1e6), "fp16"),
        (lambda p: replace(p, config=PluginConfig(4, 9)), r"shape(.|\n)*valid: \(9"),
        (lambda p: replace(p, config=PluginConfig(4, 8, "gelu")), r"activation gelu(.|\n)*tanh(.|\n)*--activation"),
        (lambda p: replace(p, head=random_head(33, 2)), "head reads 33"),
        (lambda p: replace(p, head=random_head(32, 1025)), r"1025 is beyond(.|\n)*1 to 1024"),
    ],
)
def test_a_plugin_that_does_not_fit_is_refused_and_the_name_keeps_its_meaning(
    runtime: Runtime, backbone: Backbone, damage: object, message: str
) -> None:
    good = lively(backbone, 4)
    runtime.plug("task", good)
    before = embed(runtime, 4, "task")
    with pytest.raises(PluginError, match=message):
        runtime.plug("task", damage(good))  # type: ignore[operator]
    np.testing.assert_array_equal(embed(runtime, 4, "task"), before)


def test_a_rank_beyond_the_profile_is_refused(runtime: Runtime, backbone: Backbone) -> None:
    with pytest.raises(PluginError, match=r"rank 257 is beyond the profile(.|\n)*valid: 1 to 256"):
        runtime.plug("wide", lively(backbone, 4, rank=257))
    runtime.plug("wide", lively(backbone, 4, rank=256))


def test_files_that_are_no_plugins_are_refused(runtime: Runtime, backbone: Backbone, tmp_path: Path) -> None:
    data = plugin_bytes(lively(backbone, 4))
    (tmp_path / "cut.safetensors").write_bytes(data[:-7])
    (tmp_path / "new.safetensors").write_bytes(data.replace(b'format_version\\": 1', b'format_version\\": 3'))
    for name, message in (("cut", "cannot read"), ("new", "format version 3"), ("none", "cannot read")):
        with pytest.raises(PluginError, match=message):
            runtime.plug("task", tmp_path / f"{name}.safetensors")
    with pytest.raises(InputError, match="no plugin file"):
        runtime.plug("task", tmp_path)
    with pytest.raises(InputError, match=r"several plugins of one ratio: \[4, 4\]"):
        runtime.plug("task", [lively(backbone, 4), lively(backbone, 4, seed=1)])
    for name in ("", "  ", 3):
        with pytest.raises(InputError, match="is no name"):
            runtime.plug(name, lively(backbone, 4))  # type: ignore[arg-type]
    assert runtime.plugins == {"default": [1, 2, 4]}


def test_a_ratio_that_the_plugin_does_not_have_is_not_served_by_another(runtime: Runtime, backbone: Backbone) -> None:
    runtime.plug("task", lively(backbone, 4))
    with pytest.raises(InputError, match=r"'task' has no ratio 2(.|\n)*valid: 1, 4"):
        embed(runtime, 2, "task")
    with pytest.raises(InputError, match=r"ratio 8 is not in(.|\n)*1, 2, 4"):
        embed(runtime, 8)


def test_per_ratio_bundles_take_no_plugins_and_say_what_would(
    bundle: Bundle, backbone: Backbone, tmp_path: Path
) -> None:
    copy = shutil.copytree(bundle.path, tmp_path / "copy")
    build(copy, "onnxruntime", "fp32")
    with Runtime.open(copy, "onnxruntime") as runtime:
        with pytest.raises(PluginError, match=r"compiled into its graphs(.|\n)*--layout shared"):
            runtime.plug("task", lively(backbone, 4))
        with pytest.raises(InputError, match="no plugin 'task'"):
            runtime.infer(TEXTS, ratio=4, plugin="task")


def test_a_graph_for_plugins_of_another_format_is_refused(shared_bundle: Bundle, tmp_path: Path) -> None:
    copy = shutil.copytree(shared_bundle.path, tmp_path / "copy")
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["shared"]["plugin_format"] = 99
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"plugins of format version 99(.|\n)*valid: 1"):
        Runtime.open(copy)


def test_a_changed_plugin_of_the_bundle_is_refused(shared_bundle: Bundle, backbone: Backbone, tmp_path: Path) -> None:
    copy = shutil.copytree(shared_bundle.path, tmp_path / "copy")
    other = plugin_bytes(lively(backbone, 4, rank=16))
    path = copy / "ratio-4.safetensors"
    size = path.stat().st_size
    path.write_bytes(other[:size].ljust(size, b" "))
    with Runtime.open(copy, "onnxruntime") as runtime, pytest.raises(BundleError, match="has changed"):
        runtime.infer(TEXTS, ratio=4)


def test_a_closed_runtime_plugs_nothing(shared_bundle: Bundle, backbone: Backbone) -> None:
    with Runtime.open(shared_bundle, "onnxruntime") as runtime:
        pass
    for call in (
        lambda: runtime.plug("a", lively(backbone, 4)),
        lambda: runtime.unplug("a"),
        lambda: embed(runtime, 1),
    ):
        with pytest.raises(EngineError, match="closed"):
            call()


def test_what_a_plugin_holds_is_set_once_and_not_per_request(
    runtime: Runtime, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime
    import openvino

    runtime.plug("task", lively(backbone, 4, classes=3))
    embed(runtime, 4, "task")
    moved: list[str] = []
    real = onnxruntime.OrtValue.ortvalue_from_numpy
    monkeypatch.setattr(
        onnxruntime.OrtValue, "ortvalue_from_numpy", lambda array: (moved.append(array.dtype.name), real(array))[1]
    )
    monkeypatch.setattr(openvino, "Tensor", lambda *_: pytest.fail("a tensor was made"))
    for _ in range(3):
        embed(runtime, 4, "task")
    assert set(moved) <= {"int64"}  # the tokens


def test_a_head_is_copied_when_it_is_plugged_in(runtime: Runtime, shared_bundle: Bundle) -> None:
    head = random_head(32, 1)
    runtime.plug("task", shared_bundle.path, head=head)
    before = runtime.infer(TEXTS, ratio=4, plugin="task").outputs["logits"]
    head.weight[:], head.bias[:] = 7, 7
    np.testing.assert_array_equal(runtime.infer(TEXTS, ratio=4, plugin="task").outputs["logits"], before)


def test_closing_while_a_ratio_is_made_ready_is_an_ordinary_error(
    shared_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, closed = threading.Event(), threading.Event()
    real = runtime_module.inputs_of

    def slow(*arguments: object) -> object:
        reading.set()
        assert closed.wait(10)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(runtime_module, "inputs_of", slow)
    with ThreadPoolExecutor(1) as pool:
        with Runtime.open(shared_bundle, "onnxruntime") as runtime:
            request = pool.submit(embed, runtime, 4)
            assert reading.wait(10)
        closed.set()
        with pytest.raises(EngineError, match="closed"):
            request.result(10)


def test_after_the_default_is_replaced_errors_list_what_it_has_now(runtime: Runtime, backbone: Backbone) -> None:
    runtime.plug(DEFAULT, lively(backbone, 16))
    with pytest.raises(InputError, match=r"'default' has no ratio 8(.|\n)*valid: 1, 16"):
        embed(runtime, 8)


def test_a_file_under_another_ratios_name_is_refused(runtime: Runtime, backbone: Backbone, tmp_path: Path) -> None:
    save_plugin(lively(backbone, 4), tmp_path).rename(tmp_path / "ratio-2.safetensors")
    with pytest.raises(PluginError, match=r"holds a plugin of ratio 4(.|\n)*ratio-4.safetensors"):
        runtime.plug("task", tmp_path)


def test_the_bundles_own_plugins_are_checked_like_others(shared_bundle: Bundle, tmp_path: Path) -> None:
    copy = shutil.copytree(shared_bundle.path, tmp_path / "copy")
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["ratios"]["4"]["plugin"] = "ratio-2.safetensors"
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with Runtime.open(copy, "onnxruntime") as runtime, pytest.raises(PluginError, match="holds ratio 2"):
        embed(runtime, 4)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_graph_without_its_plugin_is_an_error_and_not_a_crash(shared_bundle: Bundle, engine: str) -> None:
    if BACKENDS[engine].missing():
        pytest.skip(f"{engine} is not installed")
    built, _ = find_built(shared_bundle, engine, "fp32")
    loaded = load_engine(shared_bundle, built, "shared.onnx")
    with pytest.raises(EngineError, match=r"nothing is given for the inputs plugin\.ffn"):
        loaded.hold({})


@pytest.mark.parametrize("ratio", [1, 4])
def test_a_head_that_the_manifest_claims_and_no_plugin_brings_is_refused(
    shared_bundle: Bundle, tmp_path: Path, ratio: int
) -> None:
    copy = shutil.copytree(shared_bundle.path, tmp_path / "copy")
    manifest = json.loads((copy / MANIFEST).read_text())
    for name in ("1", "4"):
        manifest["ratios"][name]["head"] = True
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with Runtime.open(copy, "onnxruntime") as runtime, pytest.raises(PluginError, match="head"):
        embed(runtime, ratio)
