"""More than a ratio: keys and values, schedules over layers, and names, through the whole chain."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import SETTINGS, made
from variator.bench.run import BenchSettings, bench
from variator.bench.table import grids, markdown
from variator.engines.build import build
from variator.engines.runtime import Runtime
from variator.errors import InputError, PluginError, VariatorError
from variator.exporters.export import ExportSettings, export
from variator.exporters.flops import count_flops
from variator.toolkit.bundle import Bundle
from variator.toolkit.checkpoint import Backbone
from variator.toolkit.plugin import MASKED, compressed_memory, compression, initial_tensors
from variator.toolkit.plugin_file import find_plugin, load_plugin, save_plugin
from variator.toolkit.plugin_format import (
    PluginConfig,
    SiteSize,
    in_order,
    parse_key,
    scheduled,
    tensor_shapes,
)
from variator.toolkit.positions import Context
from variator.training.corpus import read_corpus
from variator.training.distil import Teacher, distil_step
from variator.training.objective import Weights
from variator.training.settings import TrainSettings
from variator.training.student import answering
from variator.training.train import train

FIRST, LONG, ONLY_KV, UNEVEN, PARTLY = SETTINGS


def test_the_keys_values_site_computes_its_equations() -> None:
    rng = np.random.default_rng(0)
    k, d, r, batch, length = 4, 6, 3, 2, 12
    x = rng.normal(size=(batch, length, d))
    mask = (np.arange(length)[None] < np.array([[12], [6]])).astype(float)
    site = {
        "score.weight": rng.normal(size=(k * d, k)),
        "score.bias": rng.normal(size=k),
        "down.weight": rng.normal(size=(k * d, r)),
        "down.bias": rng.normal(size=r),
        "up.weight": rng.normal(size=(r, d)),
        "up.bias": rng.normal(size=d),
    }
    found, scores = compressed_memory(
        torch.tensor(x), torch.tensor(mask), {n: torch.tensor(t) for n, t in site.items()}, "tanh"
    )
    assert found.shape == (batch, 3, d) and scores.shape == (batch, 1, 1, 3)
    for row in range(batch):
        for group in range(3):
            here = slice(group * k, group * k + k)
            tokens = mask[row, here]
            whole = (x[row, here] * tokens[:, None]).reshape(-1)
            if not tokens.sum():
                assert scores[row, 0, 0, group] <= MASKED / 2
                continue
            logits = np.where(tokens > 0, whole @ site["score.weight"] + site["score.bias"], -np.inf)
            weights = np.exp(logits - logits.max())
            merged = (weights / weights.sum()) @ x[row, here]
            inner = np.tanh(whole @ site["down.weight"] + site["down.bias"])
            expected = merged + inner @ site["up.weight"] + site["up.bias"]
            np.testing.assert_allclose(found[row, group], expected, atol=1e-9)
            assert scores[row, 0, 0, group] == pytest.approx(np.log(tokens.sum()))


def test_groups_of_equal_tokens_are_attended_to_as_the_tokens_are(backbone: Backbone) -> None:
    layer = next(iter(backbone.model.encoder.blocks))
    x = torch.randn(2, 5, 32).repeat_interleave(4, dim=1)
    mask = torch.ones(2, 20)
    mask[1, 14:] = 0  # the fourth group has two tokens, the fifth none
    whole, _ = layer.attend(x, Context(((1 - mask) * MASKED)[:, None, None, :]))
    site = {"score.weight": torch.zeros(4 * 32, 4), "score.bias": torch.zeros(4)}
    memory, scores = compressed_memory(x, mask, site, "tanh")
    found, _ = layer.attend(x, Context(scores), memory)
    torch.testing.assert_close(found[mask > 0], whole[mask > 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", SETTINGS, ids=lambda config: config.name)
def test_padding_and_neighbours_do_not_change_a_result(backbone: Backbone, config: PluginConfig) -> None:
    answer = answering(backbone, made(backbone, config))
    texts = ["w1", "w2 w3 w4", " ".join(f"w{i}" for i in range(30)), " ".join(f"w{i}" for i in range(8))]
    together = answer(texts)["embedding"]
    np.testing.assert_allclose(together, np.concatenate([answer([t])["embedding"] for t in texts]), atol=2e-5)
    assert np.abs(together - answering(backbone, None)(texts)["embedding"]).max() > 1e-2


def test_an_untrained_schedule_leaves_layers_of_ratio_1_alone() -> None:
    shapes = tensor_shapes(PARTLY, 32, 2)
    sites = {tuple(name.split(".")[1:3]) for name in shapes}
    assert sites == {("0", "kv"), ("1", "ffn"), ("1", "kv")}
    assert not any("down" in name for name in shapes if ".kv." in name)
    assert set(initial_tensors(LONG, 32, 2)) == set(tensor_shapes(LONG, 32, 2))
    assert LONG.sites(1) == {"ffn": (4, 8), "kv": (2, 4)} and PARTLY.multiple == 4 and UNEVEN.multiple == 8


def test_a_first_token_that_is_alone_goes_through_the_ffn_as_at_ratio_1(backbone: Backbone) -> None:
    """With plugins that only merge, the first layer changes every token but the first."""
    alone, merged = PluginConfig(4, 8, first_alone=True, name="x"), PluginConfig(4, 8)
    ids = torch.randint(5, 60, (2, 11))
    mask = torch.ones_like(ids)
    states: dict[str, list[torch.Tensor]] = {"whole": [], "alone": [], "merged": []}
    with torch.no_grad():
        backbone.model.encoder(ids, mask, states=states["whole"])
        for name, config in (("alone", alone), ("merged", merged)):
            plugin = compression(config, initial_tensors(config, 32, 2))
            backbone.model.encoder(ids, mask, None, plugin, states[name])
    whole, one, other = (states[name][0] for name in ("whole", "alone", "merged"))
    assert whole.shape == one.shape == other.shape == (2, 11, 32)
    torch.testing.assert_close(one[:, 0], whole[:, 0], atol=1e-5, rtol=1e-5)
    assert (other[:, 0] - whole[:, 0]).abs().max() > 1e-2 < (one[:, 1] - whole[:, 1]).abs().max()


def test_settings_are_files_with_their_name(backbone: Backbone, named_plugins: Path) -> None:
    assert sorted(path.name for path in named_plugins.iterdir()) == [
        "ratio-4.safetensors",
        *(f"setting-{name}.safetensors" for name in ("first", "long", "only-kv", "partly", "s50")),
    ]
    for config in SETTINGS:
        plugin = find_plugin(backbone, config.name, named_plugins)
        assert plugin is not None and plugin.config == config and plugin.config.key == config.name
        assert isinstance(plugin.config.schedule, tuple) and all(
            isinstance(s, SiteSize) for s in plugin.config.schedule
        )


def test_an_old_reader_would_be_told_its_age(named_plugins: Path) -> None:
    from safetensors import safe_open

    versions = {}
    for path in named_plugins.iterdir():
        with safe_open(path, framework="np") as file:
            versions[path.name] = '"format_version": 1' in file.metadata()["variator.plugin"]
    assert versions == {name: name == "ratio-4.safetensors" for name in versions}


def test_every_setting_is_a_graph_that_costs_what_it_says(named: Bundle) -> None:
    assert named.ratios == [1, 4, "first", "long", "only-kv", "partly", "s50"]
    assert {entry.graph for entry in named.manifest.ratios.values()} == {
        "ratio-1.onnx",
        "ratio-4.onnx",
        *(f"setting-{config.name}.onnx" for config in SETTINGS),
    }
    d, inner, length = 32, 64, 64
    flops = {ratio: count_flops(named.graph(ratio), length) for ratio in named.ratios}
    assert flops["only-kv"]["ffn"] == flops[1]["ffn"] and flops["s50"]["attention"] == flops[1]["attention"]
    # Per layer: Q and output per token, K and V and both products over a quarter.
    assert flops["only-kv"]["attention"] == 2 * 2 * (2 * length * d * d + 2 * length // 4 * (d * d + length * d))
    assert flops["s50"]["ffn"] == 2 * 2 * (length // 8 + length // 2) * d * inner
    assert flops["partly"]["ffn"] == 2 * 2 * (length + length // 4) * d * inner
    assert all(named.ratio(ratio).flops["saved"] != 0 for ratio in named.ratios[1:])
    said = {ratio: named.ratio(ratio).summary for ratio in named.ratios[1:]}
    assert said == {4: "ratio 4, rank 8, tanh", **{config.name: config.summary for config in SETTINGS}}


def test_a_setting_says_what_it_is() -> None:
    wide = PluginConfig(8, 192, "gelu", keys_values=4, keys_values_rank=64, first_alone=True, name="x")
    assert wide.summary == "ratio 8, rank 192, gelu, keys and values 4 (rank 64), first token alone"
    assert scheduled("s", [(1, 1), (4, 64)]).summary == "layers 1 4/64, tanh"


def test_a_bundle_has_the_scores_of_its_plugins(backbone: Backbone, tmp_path: Path) -> None:
    scores = [{"split": "stsb dev", "value": {"spearman": 0.5}, "ratio_1": {"spearman": 0.6}, "precision": "fp32"}]
    plugin = made(backbone, PluginConfig(2, 8))
    save_plugin(replace(plugin, training={**plugin.training, "scores": scores}), tmp_path / "plugins")
    bundle = export(backbone, tmp_path / "bundle", ExportSettings((2,), tmp_path / "plugins"))
    assert Bundle.open(bundle.path).ratio(2).quality == {"stsb dev spearman": 0.5}


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_engines_and_runtime_serve_settings_by_name(
    backbone: Backbone, named: Bundle, engine: str, named_plugins: Path
) -> None:
    if engine == "openvino":
        pytest.importorskip("openvino")
    build(named.path, engine, "fp32")
    texts = ["w1 w2 w3 w4 w5", "w7", " ".join(f"w{i}" for i in range(40))]
    with Runtime.open(named.path, engine, "fp32") as runtime:
        for ratio in named.ratios:
            result = runtime.infer(texts, ratio=ratio)
            plugin = find_plugin(backbone, ratio, named_plugins) if ratio != 1 else None
            np.testing.assert_allclose(
                result.outputs["embedding"], answering(backbone, plugin)(texts)["embedding"], atol=1e-4
            )
            assert result.ratio == ratio
        with pytest.raises(InputError, match=r"'longer'(.|\n)*1, 4, first, long, only-kv"):
            runtime.infer(texts, ratio="longer")
        assert runtime.plugins["default"] == named.ratios and runtime.loaded == named.ratios


def test_bench_treats_a_setting_like_a_ratio(named: Bundle) -> None:
    build(named.path, "onnxruntime", "fp32")
    record = bench(
        named,
        BenchSettings(shapes=((1, 8), (2, 16)), ratios=("long", 4), engines=("onnxruntime",), runs=5),
        "variator bench …",
    )
    assert [row.ratio for row in record.results if row.batch == 1] == [1, 4, "long"]
    assert type(record).from_json(record.to_json()) == record
    assert any(
        line.split("|")[3].strip() == "long" for line in markdown(record).splitlines() if line.startswith("| onnx")
    )
    assert all(grid.rows for grid in grids(record)) and {row.ratio for row in record.quality} == {1, 4, "long"}


def test_a_shared_graph_takes_plain_ratios_only(
    backbone: Backbone, shared_bundle: Bundle, named_plugins: Path, tmp_path: Path
) -> None:
    with pytest.raises(PluginError, match=r"'long' is more than a ratio(.|\n)*per-ratio"):
        export(backbone, tmp_path / "b", ExportSettings(("long",), named_plugins, layout="shared"))
    with (
        Runtime.open(shared_bundle.path, "onnxruntime") as runtime,
        pytest.raises(PluginError, match="more than a ratio"),
    ):
        runtime.plug("x", named_plugins / "setting-long.safetensors")
    with pytest.raises(PluginError, match="no plugin of ratio unknown"):
        export(backbone, tmp_path / "b", ExportSettings(("unknown",), named_plugins, untrained=True))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("config", [LONG, ONLY_KV, PARTLY, FIRST], ids=lambda config: config.name)
def test_settings_train_in_both_stages(backbone: Backbone, tmp_path: Path, config: PluginConfig) -> None:
    words = tmp_path / "words.txt"
    words.write_text("\n".join(" ".join(f"w{(i * j) % 59}" for j in range(3 + i % 20)) for i in range(200)))
    settings = TrainSettings(
        (config, replace(PluginConfig(2, 8), first_alone=config.first_alone, name="other")),
        30,
        30,
        tokens=256,
        precision="fp32",
    )
    corpus = read_corpus([words])
    (plugin, _) = train(backbone, corpus, settings, tmp_path / "out")
    first = json.loads((tmp_path / "out" / "training.jsonl").read_text().splitlines()[0])["loss"]
    assert set(first[config.name]) == {"total", "hidden", "keys_values"} and set(first["other"]) == {"total", "hidden"}
    start = initial_tensors(config, 32, 2)

    def loss(tensors: dict[str, torch.Tensor]) -> float:
        """On batches that training did not see in this order."""
        found = {config.key: {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}}
        batches = (corpus.batch(backbone, "held out", index, 256) for index in range(8))
        losses = (distil_step(Teacher(backbone.model, "embed", Weights()), [config], found, batch) for batch in batches)
        return sum(float(one[config.key].total) for one in losses)

    assert loss({name: torch.tensor(tensor) for name, tensor in plugin.tensors.items()}) < 0.98 * loss(start)
    assert load_plugin(tmp_path / "out" / f"setting-{config.name}.safetensors").config == config
    for name, tensor in plugin.tensors.items():
        assert not np.array_equal(tensor, start[name].numpy()), name


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"keys_values": 4}, "needs a name"),
        ({"schedule": ((4, 64), (4, 64))}, "needs a name"),
        ({"schedule": ((2, 64), (4, 32)), "name": "x", "rank": 32}, "largest of the schedule"),
        ({"keys_values": 3, "ratio": 8, "name": "x"}, "multiple of 24"),
        ({"keys_values": 17, "name": "x"}, "ratio 17"),
        ({"keys_values_rank": -1, "keys_values": 2, "name": "x"}, "rank -1"),
        ({"first_alone": True}, "needs a name"),
        ({"name": "Long"}, "name 'Long'"),
        ({"name": "../x"}, "name"),
    ],
)
def test_a_wrong_setting_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PluginConfig(**{"ratio": 4, **wrong})  # type: ignore[arg-type]


def test_a_schedule_for_another_number_of_layers_is_refused(backbone: Backbone) -> None:
    with pytest.raises(InputError, match="3 layers for 2"):
        tensor_shapes(scheduled("x", [(2, 4)] * 3), 32, 2)
    wrong = replace(made(backbone, UNEVEN), config=scheduled("x", [(2, 4)] * 3))
    with pytest.raises(PluginError, match="3 layers for 2"):
        wrong.check_tensors("it")


def test_keys_are_ratios_or_names() -> None:
    assert [parse_key(key) for key in ("4", 4, "long", "s50")] == [4, 4, "long", "s50"]
    assert in_order(["s50", 8, "long", 2]) == [2, 8, "long", "s50"]
    for wrong in ("0", "17", "-1", "", "4x", "A", "a/b", True, 3.5):
        with pytest.raises(VariatorError):
            parse_key(wrong)  # type: ignore[arg-type]
