"""Schedules under a budget: costs as the graphs have them, the best choice, and a run from choice to plugin."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import SETTINGS, lively
from variator.errors import InputError
from variator.exporters.flops import count_flops
from variator.toolkit.bundle import Bundle
from variator.toolkit.checkpoint import Backbone
from variator.toolkit.plugin_file import load_plugin
from variator.toolkit.plugin_format import PluginConfig, SiteSize
from variator.training.budget import cheapest, layer_flops, sensitivity, within_budget
from variator.training.corpus import Corpus, read_corpus
from variator.training.run import Progress
from variator.training.settings import TrainSettings
from variator.training.train import InterruptedTrainingError, train

CONFIG = PluginConfig(2, 8, "gelu")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps, and candidates that pay on a toy."""
    monkeypatch.setattr("variator.training.budget.FIT_STEPS", 20)
    monkeypatch.setattr("variator.training.budget.CANDIDATES", (SiteSize(2, 2), SiteSize(4, 2), SiteSize(8, 4)))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    path = tmp_path_factory.mktemp("corpus") / "words.txt"
    path.write_text("\n".join(" ".join(f"w{(i * j) % 59}" for j in range(3 + i % 20)) for i in range(200)))
    return read_corpus([path])


def test_the_cheapest_choice_is_the_one_that_trying_all_finds() -> None:
    rng = np.random.default_rng(0)
    sizes = [SiteSize(k, r) for k, r in ((1, 1), (2, 64), (4, 64), (8, 192))]
    for _ in range(20):
        costs = dict(zip(sizes, rng.uniform(0.1, 1, 4), strict=True))
        errors = [dict(zip(sizes, rng.uniform(0, 1, 4), strict=True)) for _ in range(5)]
        limit = float(rng.uniform(5 * min(costs.values()) + 0.05, 5))
        found = cheapest(errors, costs, limit)
        assert sum(costs[size] for size in found) <= limit + 1e-9
        tried = [
            sum(layer[size] for layer, size in zip(errors, chosen, strict=True))
            for chosen in itertools.product(sizes, repeat=5)
            if sum(costs[size] for size in chosen) <= limit * 0.998  # costs are rounded up to a part of the whole
        ]
        assert sum(layer[size] for layer, size in zip(errors, found, strict=True)) <= min(tried, default=5) + 1e-9
    with pytest.raises(InputError, match="budget"):
        cheapest(errors, costs, min(costs.values()))


@pytest.mark.parametrize("length", [64, 37])
def test_costs_are_those_of_the_exported_graph(backbone: Backbone, named: Bundle, length: int) -> None:
    for config in SETTINGS:
        counted = count_flops(named.graph(config.name), length)
        lead = config.multiple - 1 if config.first_alone else 0
        padded = lead + length + -(lead + length) % config.multiple
        found = sum(layer_flops(backbone.config, padded, config.sites(layer)) for layer in range(2))
        assert found == pytest.approx(counted["total"] - counted["head"], rel=1e-9), config.name


def test_a_schedule_is_chosen_trained_and_resumed(backbone: Backbone, corpus: Corpus, tmp_path: Path) -> None:
    settings = TrainSettings((CONFIG,), 800, 10, tokens=256, precision="fp32")
    chosen, first = within_budget(backbone, corpus, 0.1, "", settings, tmp_path)
    (config,) = chosen.plugins
    assert config.name == "s10" and config.activation == "gelu" and chosen.local_steps == 0
    record = json.loads((tmp_path / "s10.choice" / "choice.json").read_text())
    assert record["saved"] >= 0.1 and len(record["errors"]) == 2
    assert [tuple(size) for size in record["schedule"]] == list(config.schedule)
    assert all(layer["1/1"] == 0 for layer in record["errors"])
    again, same = within_budget(backbone, corpus, 0.1, "", settings, tmp_path)
    assert again == chosen and same[0].digest == load_plugin(tmp_path / "s10.choice" / "setting-s10.safetensors").digest
    with pytest.raises(InterruptedTrainingError):
        train(backbone, corpus, chosen, tmp_path, stop, start=first)
    steps: list[int] = []
    train(backbone, corpus, again, tmp_path, lambda progress: steps.append(progress.step), start=same)
    assert steps[0] == 5
    assert load_plugin(tmp_path / "setting-s10.safetensors").config == config
    assert sorted(path.name for path in (tmp_path / "s10.choice").iterdir()) == [
        "choice.json",
        "made-from.sha256",
        "setting-s10.safetensors",
    ]


def stop(progress: Progress) -> None:
    if progress.step == 4:
        raise KeyboardInterrupt


def test_an_interrupted_choice_goes_on(backbone: Backbone, corpus: Corpus, tmp_path: Path) -> None:
    settings = TrainSettings((CONFIG,), 800, 10, tokens=256, precision="fp32")
    with pytest.raises(InterruptedTrainingError):
        within_budget(backbone, corpus, 0.1, "", settings, tmp_path, stop)
    steps: list[int] = []
    within_budget(backbone, corpus, 0.1, "", settings, tmp_path, lambda progress: steps.append(progress.step))
    assert steps[0] == 5


def test_a_choice_of_something_else_is_refused(backbone: Backbone, corpus: Corpus, tmp_path: Path) -> None:
    from dataclasses import replace

    settings = TrainSettings((CONFIG,), 800, 10, tokens=256, precision="fp32")
    within_budget(backbone, corpus, 0.1, "half", settings, tmp_path)
    tanh = replace(settings, plugins=(PluginConfig(2, 8),))
    for other in (
        (replace(backbone, fingerprint="0" * 64), 0.1, settings),
        (backbone, 0.11, settings),
        (backbone, 0.1, tanh),
    ):
        with pytest.raises(InputError, match="another model, data or settings"):
            within_budget(other[0], corpus, other[1], "half", other[2], tmp_path)
    chosen, _ = within_budget(backbone, corpus, 0.1, "half", tanh, tmp_path, overwrite=True)
    assert chosen.plugins[0].activation == "tanh"


@pytest.mark.parametrize("budget", [0.0, 1.0, -1, 0.9, float("nan")])
def test_an_impossible_budget_is_refused(backbone: Backbone, corpus: Corpus, tmp_path: Path, budget: float) -> None:
    with pytest.raises(InputError, match="budget"):
        within_budget(backbone, corpus, budget, "x", TrainSettings((CONFIG,)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_layer_that_is_hurt_more_has_the_larger_error(backbone: Backbone, corpus: Corpus) -> None:
    import torch

    batches = [corpus.batch(backbone, "0", index, 256) for index in range(2)]
    good, bad = (
        {name: torch.tensor(value) * scale for name, value in lively(backbone, 2).tensors.items()} for scale in (0.1, 3)
    )
    found = sensitivity(backbone, {PluginConfig(2, 8): good, PluginConfig(2, 8, "gelu"): bad}, batches)
    assert len(found) == 2 and all(layer[0] < layer[1] for layer in found)
