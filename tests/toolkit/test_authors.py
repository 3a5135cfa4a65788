"""Checkpoints of the paper's authors: theirs become ours, and nothing but tensors is read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tools.scale import parameters_of
from variator.cli import app
from variator.errors import InputError, PluginError
from variator.toolkit.authors import read_authors_checkpoint
from variator.toolkit.bundle import Bundle
from variator.toolkit.checkpoint import Backbone
from variator.toolkit.plugin import compressed_ffn
from variator.toolkit.plugin_file import find_plugin, load_plugin, save_plugin
from variator.toolkit.plugin_format import layer_operands


def released(layers: int = 2, d: int = 32, k: int = 4, prefix: str = "") -> dict[str, torch.Tensor]:
    """A state dict of the layout they released, with a LoRA matrix beside."""
    torch.manual_seed(0)
    tensors = {"project_q_lora.0.lora_A": torch.randn(16, d)}
    for i in range(layers):
        tensors |= {
            f"{prefix}mux_layer.{i}.mux_layer.weight": torch.randn(k, k * d) / 8,
            f"{prefix}mux_layer.{i}.mux_layer.bias": torch.randn(k),
            f"{prefix}mux_layer.{i}.demux_adapter.w_in.weight": torch.randn(64, 2 * d) / 8,
            f"{prefix}mux_layer.{i}.demux_adapter.w_in.bias": torch.randn(64),
            f"{prefix}mux_layer.{i}.demux_adapter.w_out.weight": torch.randn(d, 64) / 8,
            f"{prefix}mux_layer.{i}.demux_adapter.w_out.bias": torch.randn(d),
        }
    return tensors


def theirs(tensors: dict[str, torch.Tensor], x: torch.Tensor, k: int) -> torch.Tensor:
    """Layer 0 by the equations of their code: concatenate, softmax, FFN (here: 2x), repeat, adapter."""
    batch, length, d = x.shape
    scores = x.reshape(batch, -1, k * d) @ tensors["mux_layer.0.mux_layer.weight"].T
    weights = torch.softmax(scores + tensors["mux_layer.0.mux_layer.bias"], dim=-1)
    merged = (weights.unsqueeze(2) @ x.reshape(batch, -1, k, d)).squeeze(2)
    y = (2 * merged).unsqueeze(2).repeat(1, 1, k, 1).reshape(batch, length, d)
    both = torch.cat((y, x), dim=-1)
    inner = torch.tanh(
        both @ tensors["mux_layer.0.demux_adapter.w_in.weight"].T + tensors["mux_layer.0.demux_adapter.w_in.bias"]
    )
    update = inner @ tensors["mux_layer.0.demux_adapter.w_out.weight"].T
    return y + update + tensors["mux_layer.0.demux_adapter.w_out.bias"]


@pytest.mark.parametrize("form", ["plain", "nested", "prefixed"])
def test_an_imported_plugin_computes_what_theirs_does(tmp_path: Path, form: str) -> None:
    tensors = released()
    content = {"plain": tensors, "nested": {"state_dict": tensors}, "prefixed": released(prefix="module.")}[form]
    torch.save(content, tmp_path / "checkpoint.pkl")
    plugin = read_authors_checkpoint(tmp_path / "checkpoint.pkl")
    assert (plugin.config.ratio, plugin.config.rank, plugin.config.activation) == (4, 64, "tanh")
    assert (plugin.layers, plugin.hidden_size, plugin.family) == (2, 32, "t5")
    x = torch.randn(3, 12, 32)
    site = layer_operands({name: torch.tensor(value) for name, value in plugin.tensors.items()}, 0)["ffn"]
    ours = compressed_ffn(x, torch.ones(3, 12), lambda c: 2 * c, site, "tanh")
    torch.testing.assert_close(ours, theirs(tensors, x, 4), atol=1e-5, rtol=1e-5)


def test_the_size_is_the_papers(tmp_path: Path) -> None:
    torch.save(released(12, 768), tmp_path / "checkpoint.pkl")
    plugin = read_authors_checkpoint(tmp_path / "checkpoint.pkl")
    assert round(plugin.parameters / 1e6, 2) == 1.93 and (plugin.layers, plugin.hidden_size) == (12, 768)


@pytest.mark.slow
def test_a_plugin_of_theirs_attaches_to_a_t5_base_and_runs(tmp_path: Path) -> None:
    """Of the shape of T5-base, with random weights: imported, exported, built and run, by the command line."""
    torch.save(released(12, 768), tmp_path / "checkpoint.pkl")
    place = str(tmp_path / "bundle")
    for arguments in (
        ["import", str(tmp_path / "checkpoint.pkl"), "-o", str(tmp_path / "plugins")],
        [
            "export",
            "random:t5-base",
            "--task",
            "hidden",
            "--ratio",
            "4",
            "--plugin",
            str(tmp_path / "plugins"),
            "-o",
            place,
        ],
        ["build", place, "--engine", "onnxruntime", "--no-calibrate"],
        ["run", place, "--ratio", "4", "--text", "the boat was late again", "--json"],
    ):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["ratio"] == 4 and np.isfinite(answer["outputs"]["last_hidden_state"]).all()
    entry = Bundle.open(place).manifest.ratios[4]
    whole = parameters_of("t5-base")
    assert round(entry.plugin_parameters / 1e6, 2) == 1.93 and round(100 * entry.plugin_parameters / whole, 2) == 0.86
    assert entry.flops["saved"] > 0.46


def test_it_is_saved_and_fits_every_backbone_of_its_family_and_sizes(backbone: Backbone, tmp_path: Path) -> None:
    torch.save(released(), tmp_path / "checkpoint.pkl")
    save_plugin(read_authors_checkpoint(tmp_path / "checkpoint.pkl", "bert"), tmp_path)
    assert load_plugin(tmp_path / "ratio-4.safetensors").training["stage"] == "imported"
    plugin = find_plugin(backbone, 4, tmp_path)
    assert plugin is not None and np.isfinite(plugin.tensors["layers.1.ffn.up.weight"]).all()
    with pytest.raises(PluginError, match="another backbone"):
        find_plugin(replace(backbone, family="roberta"), 4, tmp_path)
    torch.save(released(layers=3), tmp_path / "checkpoint.pkl")
    save_plugin(read_authors_checkpoint(tmp_path / "checkpoint.pkl", "bert"), tmp_path)
    with pytest.raises(PluginError, match="another backbone"):
        find_plugin(backbone, 4, tmp_path)


class Code:
    """Unpickled without care, this runs a command."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch pwned",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({**released(), "extra": Code()}, tmp_path / "evil.pkl")
    with pytest.raises(PluginError, match="refused"):
        read_authors_checkpoint(tmp_path / "evil.pkl")
    done = subprocess.run(
        [sys.executable, "-m", "variator", "import", "evil.pkl", "-o", "out"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "refused" in done.stderr and "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.pkl"]


@pytest.mark.parametrize("broken", ["empty", "text", "list", "no plugin", "hole", "other shape"])
def test_other_files_are_refused(tmp_path: Path, broken: str) -> None:
    path, tensors = tmp_path / "checkpoint.pkl", released()
    if broken == "hole":
        del tensors["mux_layer.1.demux_adapter.w_in.bias"]
    if broken == "other shape":
        tensors["mux_layer.1.mux_layer.weight"] = torch.randn(4, 64)
    if broken in ("empty", "text"):
        path.write_bytes(b"" if broken == "empty" else b"hello")
    else:
        torch.save({"list": [1], "no plugin": {"a": torch.ones(1)}}.get(broken, tensors), path)
    with pytest.raises(PluginError):
        read_authors_checkpoint(path)
    with pytest.raises(InputError, match="no file"):
        read_authors_checkpoint(tmp_path / "none.pkl")
