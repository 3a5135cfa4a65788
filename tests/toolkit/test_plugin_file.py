"""Plugin files: a round trip, and every way in which one can be wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from variator.errors import PluginError
from variator.toolkit.checkpoint import Backbone
from variator.toolkit.plugin_file import (
    HEADER,
    Head,
    Plugin,
    find_plugin,
    load_plugin,
    plugin_bytes,
    save_plugin,
    untrained_plugin,
)
from variator.toolkit.plugin_format import PluginConfig


@pytest.fixture
def plugin(backbone: Backbone) -> Plugin:
    """A plugin that calls itself trained."""
    return replace(untrained_plugin(backbone, PluginConfig(4, 8)), training={"stage": "layer-local", "steps": 3})


def test_a_plugin_survives_the_round_trip(plugin: Plugin, tmp_path: Path) -> None:
    found = load_plugin(save_plugin(plugin, tmp_path))
    assert (found.config, found.backbone, found.training) == (plugin.config, plugin.backbone, plugin.training)
    for name, tensor in plugin.tensors.items():
        np.testing.assert_allclose(found.tensors[name], tensor, rtol=1e-3, atol=1e-6)


def test_a_plugin_of_another_backbone_is_refused(plugin: Plugin, backbone: Backbone, tmp_path: Path) -> None:
    save_plugin(replace(plugin, backbone="0" * 64), tmp_path)
    with pytest.raises(PluginError, match="another backbone"):
        find_plugin(backbone, 4, tmp_path)


def test_a_file_under_another_ratios_name_is_refused(plugin: Plugin, backbone: Backbone, tmp_path: Path) -> None:
    save_plugin(plugin, tmp_path).rename(tmp_path / "ratio-2.safetensors")
    with pytest.raises(PluginError, match="ratio 4"):
        find_plugin(backbone, 2, tmp_path)


def test_a_plugin_that_is_not_there_is_none(backbone: Backbone, tmp_path: Path) -> None:
    assert find_plugin(backbone, 4, tmp_path) is None
    assert find_plugin(backbone, 4) is None  # nothing ships for a random model


@pytest.mark.parametrize("cut", [0, 5, 8, 200, 0.5, 0.99])
def test_a_truncated_file_is_refused(plugin: Plugin, tmp_path: Path, cut: float) -> None:
    data = plugin_bytes(plugin)
    (tmp_path / "p.safetensors").write_bytes(data[: int(cut * len(data)) if isinstance(cut, float) else cut])
    with pytest.raises(PluginError, match="cannot read"):
        load_plugin(tmp_path / "p.safetensors")


def rewrite(
    plugin: Plugin, path: Path, changes: dict[str, object], tensors: dict[str, torch.Tensor] | None = None
) -> Path:
    """The plugin's file with some of its header or tensors exchanged."""
    path.write_bytes(plugin_bytes(plugin))
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[HEADER])
    save_file(load_file(path) | (tensors or {}), path, {HEADER: json.dumps(header | changes)})
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 99}, "format version 99"),
        ({"config": "{"}, "header"),
        ({"config": {"ratio": 1000}}, "header"),
        ({"config": {"ratio": 4, "rank": 8, "color": 1}}, "header"),
        ({"layers": "x"}, "header"),
        ({"layers": 3}, "layers.2"),
        ({"config": {"ratio": 2, "rank": 8}}, "shape"),
    ],
)
def test_a_damaged_header_is_refused(plugin: Plugin, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(PluginError, match=message):
        load_plugin(rewrite(plugin, tmp_path / "p.safetensors", changes))


def test_other_safetensors_files_are_no_plugins(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(PluginError, match="not a plugin"):
        load_plugin(tmp_path / "model.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors", {HEADER: "{"})
    with pytest.raises(PluginError, match="header"):
        load_plugin(tmp_path / "model.safetensors")


def test_values_beyond_fp16_are_not_saved(plugin: Plugin, tmp_path: Path) -> None:
    tensors = {**plugin.tensors, "layers.0.ffn.up.bias": np.full(32, 1e6, np.float32)}
    with pytest.raises(PluginError, match="not finite"):
        save_plugin(replace(plugin, tensors=tensors), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nan_and_tensors_too_many_are_refused(plugin: Plugin, tmp_path: Path) -> None:
    nan = {"layers.1.ffn.up.bias": torch.full((32,), float("nan"))}
    with pytest.raises(PluginError, match=r"layers\.1\.ffn\.up\.bias.*NaN"):
        load_plugin(rewrite(plugin, tmp_path / "a.safetensors", {}, nan))
    with pytest.raises(PluginError, match="extra"):
        load_plugin(rewrite(plugin, tmp_path / "b.safetensors", {}, {"extra": torch.zeros(1)}))


def test_half_a_head_and_a_head_that_is_not_finite_are_named(plugin: Plugin, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    weight, bias = torch.ones(3, 32), torch.ones(3)
    for tensors, message in (
        ({"head.bias": bias}, "head.weight"),
        ({"head.weight": weight}, "head.bias"),
        ({"head.weight": weight * float("nan"), "head.bias": bias}, r"p\.safetensors.*head\.weight holds NaN"),
        ({"head.weight": weight, "head.bias": torch.ones(2)}, "no classifier"),
        ({"head.weight": torch.ones(3, 31), "head.bias": bias}, "reads 31"),
    ):
        with pytest.raises(PluginError, match=message):
            load_plugin(rewrite(plugin, path, {}, tensors))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"layers": 0}, "is for 0 layers of 32"),
        ({"hidden_size": -1}, "is for 2 layers of -1"),
        ({"layers": 10**9}, "is for 1000000000 layers"),
        ({"layers": float("inf")}, "header"),
    ],
)
def test_impossible_sizes_are_refused(plugin: Plugin, tmp_path: Path, sizes: dict[str, object], message: str) -> None:
    with pytest.raises(PluginError, match=message):
        load_plugin(rewrite(plugin, tmp_path / "p.safetensors", sizes))


def test_a_head_takes_any_numbers_and_refuses_the_rest() -> None:
    head = Head([[1, 2], [3, 4]], [0.5, 1e-3])  # type: ignore[arg-type]
    assert head.weight.dtype == head.bias.dtype == np.float32 and head.weight.shape == (2, 2)
    for weight, bias in (
        ([[1, 2], [3]], [0, 0]),
        ("ab", [0]),
        ([[1, 2]], [0, 0]),
        ([[1e300, 0]], [0]),
        ([1, 2], [0, 0]),
        ([[10**400]], [0]),
        (torch.nn.Parameter(torch.ones(1, 2)), [0]),
    ):
        with pytest.raises(PluginError, match=r"head|fp32"):
            Head(weight, bias)  # type: ignore[arg-type]
