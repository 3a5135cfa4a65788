"""Layer-local training: it learns, it is deterministic, it can be stopped at any step."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from variator.errors import InputError, VariatorError
from variator.toolkit.checkpoint import Backbone
from variator.toolkit.corpus import Corpus, read_corpus
from variator.toolkit.plugin_file import find_plugin, load_plugin
from variator.toolkit.plugin_format import PluginConfig
from variator.toolkit.train import (
    STATE_FILE,
    InterruptedTrainingError,
    Progress,
    TrainSettings,
    interrupt_deferred,
    normalised_error,
    one_cycle,
    train,
)

PLUGINS = (PluginConfig(2, 8), PluginConfig(4, 8))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Made-up sentences of words the toy tokenizer knows."""
    path = tmp_path_factory.mktemp("corpus") / "words.txt"
    generator = torch.Generator().manual_seed(0)
    lines = [
        " ".join(f"w{int(i)}" for i in torch.randint(0, 60, (3 + n % 20,), generator=generator)) for n in range(300)
    ]
    path.write_text("\n".join(lines))
    return read_corpus([path])


def settings(steps: int = 12, precision: str = "fp32", seed: int = 0) -> TrainSettings:
    return TrainSettings(PLUGINS, steps, tokens=256, learning_rate=5e-3, seed=seed, precision=precision)


def stop_at(step: int) -> Callable[[Progress], None]:
    def on_step(progress: Progress) -> None:
        if progress.step == step:
            raise KeyboardInterrupt

    return on_step


def test_training_lowers_the_error(backbone: Backbone, corpus: Corpus, tmp_path: Path) -> None:
    losses: list[dict[int, float]] = []
    train(backbone, corpus, settings(60), tmp_path, lambda progress: losses.append(progress.loss))
    for ratio in (2, 4):
        assert sum(loss[ratio] for loss in losses[-5:]) < 0.9 * sum(loss[ratio] for loss in losses[:5])


def test_the_same_seed_gives_the_same_file_and_another_seed_another(
    backbone: Backbone, corpus: Corpus, tmp_path: Path
) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(backbone, corpus, settings(seed=seed), tmp_path / name)
    files = [(tmp_path / name / "ratio-4.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize("step", [1, 5, 11])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    backbone: Backbone, corpus: Corpus, tmp_path: Path, step: int
) -> None:
    train(backbone, corpus, settings(), tmp_path / "whole")
    with pytest.raises(InterruptedTrainingError, match=f"step {step} of 12"):
        train(backbone, corpus, settings(), tmp_path / "parts", stop_at(step))
    steps: list[int] = []
    train(backbone, corpus, settings(), tmp_path / "parts", lambda progress: steps.append(progress.step))
    assert steps[0] == step + 1
    for ratio in (2, 4):
        whole, parts = (load_plugin(tmp_path / name / f"ratio-{ratio}.safetensors") for name in ("whole", "parts"))
        assert all(np.array_equal(whole.tensors[name], parts.tensors[name]) for name in whole.tensors)
    assert not (tmp_path / "parts" / STATE_FILE).exists()


def test_ctrl_c_in_the_middle_of_a_step_takes_effect_behind_it() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupt_deferred():
        signal.raise_signal(signal.SIGINT)
        done.append("the rest of the step")
    assert done


def test_another_run_or_finished_plugins_are_not_overwritten(
    backbone: Backbone, corpus: Corpus, tmp_path: Path
) -> None:
    with pytest.raises(InterruptedTrainingError):
        train(backbone, corpus, settings(), tmp_path, stop_at(3))
    with pytest.raises(InputError, match="another model, corpus or settings"):
        train(backbone, corpus, settings(seed=9), tmp_path)
    (tmp_path / STATE_FILE).write_bytes(b"garbage")
    with pytest.raises(InputError, match="damaged"):
        train(backbone, corpus, settings(), tmp_path)
    train(backbone, corpus, settings(2), tmp_path, overwrite=True)
    with pytest.raises(InputError, match="already holds"):
        train(backbone, corpus, settings(2), tmp_path)


def test_the_file_carries_its_record_and_fits_its_backbone(backbone: Backbone, corpus: Corpus, tmp_path: Path) -> None:
    train(backbone, corpus, settings(3), tmp_path)
    plugin = find_plugin(backbone, 4, tmp_path)
    assert plugin is not None and not plugin.untrained
    record = plugin.training
    assert record["stage"] == "layer-local" and record["steps"] == 3 and record["corpus"][0]["file"] == "words.txt"
    assert len(record["layer_errors"]) == backbone.config.layers and record["losses"]


def test_a_diverged_run_stops_and_writes_no_plugin(backbone: Backbone, corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(VariatorError, match=r"loss(.|\n)*lower --learning-rate"):
        train(backbone, corpus, replace(settings(50), learning_rate=1e30), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_bf16_training_comes_out_close_to_fp32(backbone: Backbone, corpus: Corpus, tmp_path: Path) -> None:
    errors = {}
    for precision in ("fp32", "bf16"):
        plugins = train(backbone, corpus, settings(20, precision), tmp_path / precision)
        assert plugins[0].training["precision"] == precision
        errors[precision] = plugins[1].training["layer_errors"]
    assert errors["bf16"] == pytest.approx(errors["fp32"], rel=0.1)


def test_the_error_ignores_padding_and_is_one_for_the_mean() -> None:
    target = torch.randn(2, 5, 3)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).float()
    mean = target[mask.bool()].mean(dim=0).expand(2, 5, 3).clone()
    mean[0, 3:] = 1e6
    assert float(normalised_error(mean, target, mask)) == pytest.approx(1.0, rel=1e-4)


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    rates = [one_cycle(step, settings(100)) for step in range(100)]
    peak = rates.index(max(rates))
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert max(rates) == pytest.approx(5e-3) and rates[-1] == pytest.approx(0.0, abs=1e-9)


def test_settings_are_checked() -> None:
    for wrong in (
        {"plugins": ()},
        {"plugins": PLUGINS[:1] * 2},
        {"steps": 0},
        {"precision": "fp8"},
        {"learning_rate": float("nan")},
    ):
        with pytest.raises(InputError):
            TrainSettings(**{"plugins": PLUGINS, **wrong})  # type: ignore[arg-type]
