"""Training: both stages learn, a run is deterministic, and it can be stopped, killed or split at any step."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import lively, write_checkpoint
from variator.errors import InputError, VariatorError
from variator.toolkit.checkpoint import Backbone, load_backbone
from variator.toolkit.heads import GapHead
from variator.toolkit.plugin_file import find_plugin, load_plugin, save_plugin
from variator.toolkit.plugin_format import PluginConfig
from variator.toolkit.rows import Encode
from variator.training.batch import Batch
from variator.training.corpus import Corpus, read_corpus
from variator.training.processes import Processes
from variator.training.run import Progress
from variator.training.settings import TrainSettings
from variator.training.state import LOG_FILE, STATE_FILE
from variator.training.train import (
    DivergedError,
    InterruptedTrainingError,
    interrupt_deferred,
    one_cycle,
    train,
)

PLUGINS = (PluginConfig(2, 8), PluginConfig(4, 8))


def write_words(path: Path) -> Path:
    """Made-up sentences of words the toy tokenizer knows."""
    generator = torch.Generator().manual_seed(0)
    lines = [
        " ".join(f"w{int(i)}" for i in torch.randint(0, 60, (3 + n % 20,), generator=generator)) for n in range(300)
    ]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return read_corpus([write_words(tmp_path_factory.mktemp("corpus") / "words.txt")])


def settings(steps: int = 6, precision: str = "fp32", seed: int = 0) -> TrainSettings:
    """That many steps in each stage."""
    return TrainSettings(PLUGINS, steps, steps, tokens=256, learning_rate=5e-3, seed=seed, precision=precision)


def stop_at(stage: str, step: int) -> Callable[[Progress], None]:
    def on_step(progress: Progress) -> None:
        if (progress.stage, progress.step) == (stage, step):
            raise KeyboardInterrupt

    return on_step


class Clock:
    """A judge whose scores rise and fall with the number of calls, two ratios a time."""

    metric = "made up"
    origin = ()

    def __init__(self, scores: tuple[float, ...]) -> None:
        self.scores, self.calls = scores, 0

    def __call__(self, encode: Encode) -> float:
        assert encode(["w1 w2"])["embedding"].shape == (1, 32)
        self.calls += 1
        return self.scores[(self.calls - 1) // 2 % len(self.scores)]


def same(one: Path, other: Path, ratio: int = 4) -> bool:
    first, second = (load_plugin(path / f"ratio-{ratio}.safetensors").tensors for path in (one, other))
    return all(np.array_equal(first[name], second[name]) for name in first)


def entries(directory: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (directory / LOG_FILE).read_text().splitlines()]


@pytest.mark.parametrize("stage", ["layer-local", "distillation"])
def test_each_stage_lowers_its_loss(backbone: Backbone, corpus: Corpus, tmp_path: Path, stage: str) -> None:
    steps = {"local_steps": 60, "steps": 0} if stage == "layer-local" else {"local_steps": 0, "steps": 60}
    losses: list[dict[int, float]] = []
    train(backbone, corpus, replace(settings(), **steps), tmp_path, lambda p: losses.append(p.loss))  # type: ignore[arg-type]
    for ratio in (2, 4):
        assert sum(loss[ratio] for loss in losses[-5:]) < 0.9 * sum(loss[ratio] for loss in losses[:5])


def test_the_same_seed_gives_the_same_file_and_another_seed_another(
    backbone: Backbone, corpus: Corpus, tmp_path: Path
) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(backbone, corpus, settings(seed=seed), tmp_path / name)
    files = [(tmp_path / name / "ratio-4.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]


def test_ratios_that_share_a_teacher_do_not_change_each_other(
    backbone: Backbone, corpus: Corpus, tmp_path: Path
) -> None:
    together = replace(settings(), local_steps=0)
    train(backbone, corpus, together, tmp_path / "both")
    train(backbone, corpus, replace(together, plugins=PLUGINS[1:]), tmp_path / "one")
    assert same(tmp_path / "both", tmp_path / "one")


@pytest.mark.parametrize(
    ("stage", "step"), [("layer-local", 1), ("layer-local", 6), ("distillation", 1), ("distillation", 5)]
)
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    backbone: Backbone, corpus: Corpus, tmp_path: Path, stage: str, step: int
) -> None:
    chosen = replace(settings(), evaluate_every=2)
    scores = (0.5, 0.7, 0.6)  # the second of three is the best
    train(backbone, corpus, chosen, tmp_path / "whole", judge=Clock(scores))
    judge = Clock(scores)
    with pytest.raises(InterruptedTrainingError, match=f"step {step} of the {stage}"):
        train(backbone, corpus, chosen, tmp_path / "parts", stop_at(stage, step), judge)
    steps: list[tuple[str, int]] = []
    train(backbone, corpus, chosen, tmp_path / "parts", lambda p: steps.append((p.stage, p.step)), judge)
    assert steps[0] == (("distillation", 1) if (stage, step) == ("layer-local", 6) else (stage, step + 1))
    assert same(tmp_path / "whole", tmp_path / "parts", 2) and same(tmp_path / "whole", tmp_path / "parts", 4)

    def no_speed(log: list[dict[str, object]]) -> list[dict[str, object]]:
        varies = ("tokens_per_s", "memory_mb")
        return [{key: value for key, value in entry.items() if key not in varies} for entry in log]

    assert no_speed(entries(tmp_path / "whole")) == no_speed(entries(tmp_path / "parts"))
    assert not (tmp_path / "parts" / STATE_FILE).exists()


def test_the_best_scores_tensors_are_written_not_the_last(backbone: Backbone, corpus: Corpus, tmp_path: Path) -> None:
    chosen = replace(settings(), evaluate_every=2)
    (best, _) = train(backbone, corpus, chosen, tmp_path / "judged", judge=Clock((0.5, 0.7, 0.6)))
    (last, _) = train(backbone, corpus, chosen, tmp_path / "unjudged")
    assert best.training["score"] == {
        "metric": "made up",
        "value": 0.7,
        "step": 4,
        "all": [[2, 0.5], [4, 0.7], [6, 0.6]],
    }
    assert "score" not in last.training and not same(tmp_path / "judged", tmp_path / "unjudged")
    (ends_best, _) = train(backbone, corpus, chosen, tmp_path / "rising", judge=Clock((0.5, 0.6, 0.7)))
    assert ends_best.training["score"]["step"] == 6 and same(tmp_path / "rising", tmp_path / "unjudged")


class Impatient(Clock):
    """A judge that is interrupted once in the middle of its third score."""

    def __call__(self, encode: Encode) -> float:
        if self.calls == 3:
            self.calls = 2  # both of this step's scores are made anew
            raise KeyboardInterrupt
        return super().__call__(encode)


def test_ctrl_c_while_scoring_takes_effect_at_once_and_loses_no_score(
    backbone: Backbone, corpus: Corpus, tmp_path: Path
) -> None:
    chosen, scores = replace(settings(), evaluate_every=2), (0.5, 0.7, 0.6)
    train(backbone, corpus, chosen, tmp_path / "whole", judge=Clock(scores))
    with pytest.raises(InterruptedTrainingError, match="step 4 of the distillation"):
        train(backbone, corpus, chosen, tmp_path / "parts", judge=Impatient(scores))
    judge = Clock(scores)
    judge.calls = 2
    train(backbone, corpus, chosen, tmp_path / "parts", judge=judge)
    assert same(tmp_path / "whole", tmp_path / "parts")
    told = [[e["step"] for e in entries(tmp_path / name) if "score" in e] for name in ("whole", "parts")]
    assert told == [[2, 4, 6], [2, 4, 6]]


def test_a_score_that_is_no_number_is_worse_than_any(backbone: Backbone, corpus: Corpus, tmp_path: Path) -> None:
    chosen = replace(settings(), evaluate_every=2)
    (plugin, _) = train(backbone, corpus, chosen, tmp_path, judge=Clock((math.nan, 0.1, math.nan)))
    assert plugin.training["score"]["step"] == 4 and plugin.training["score"]["all"] == [[2, None], [4, 0.1], [6, None]]
    (plugin, _) = train(backbone, corpus, chosen, tmp_path, judge=Clock((math.nan,)), overwrite=True)
    assert plugin.training["score"]["value"] is None


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
        train(backbone, corpus, settings(), tmp_path, stop_at("layer-local", 3))
    for other in (settings(seed=9), replace(settings(), plugins=(PluginConfig(2, 8), PluginConfig(8, 8)))):
        with pytest.raises(InputError, match="another model, data or settings"):
            train(backbone, corpus, other, tmp_path)
    (tmp_path / STATE_FILE).write_bytes(b"garbage")
    with pytest.raises(InputError, match="damaged"):
        train(backbone, corpus, settings(), tmp_path)
    train(backbone, corpus, settings(2), tmp_path, overwrite=True)
    with pytest.raises(InputError, match="already holds"):
        train(backbone, corpus, settings(2), tmp_path)


def test_a_state_of_another_backbone_is_refused(backbone: Backbone, corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(InterruptedTrainingError):
        train(backbone, corpus, settings(), tmp_path, stop_at("layer-local", 3))
    with pytest.raises(InputError, match="another model"):
        train(replace(backbone, fingerprint="0" * 64), corpus, settings(), tmp_path)


def test_a_full_disk_while_saving_keeps_the_state_before(
    backbone: Backbone, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InterruptedTrainingError):
        train(backbone, corpus, settings(), tmp_path, stop_at("layer-local", 3))
    before = (tmp_path / STATE_FILE).read_bytes()

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("variator.training.train.SAVE_EVERY_S", 0.0)
    monkeypatch.setattr("variator.files.os.fsync", full)
    with pytest.raises(VariatorError, match="No space left"):
        train(backbone, corpus, settings(), tmp_path, stop_at("layer-local", 5))
    assert (tmp_path / STATE_FILE).read_bytes() == before
    assert not list(tmp_path.glob(".*.part"))
    monkeypatch.undo()
    train(backbone, corpus, settings(), tmp_path)
    train(backbone, corpus, settings(), tmp_path / "whole")
    assert same(tmp_path, tmp_path / "whole")


KILLED = """
import os, sys, time, pathlib, torch
torch.set_num_threads(1)
from variator.toolkit.checkpoint import load_backbone
from variator.toolkit.plugin_format import PluginConfig
from variator.training import train as module
from variator.training.corpus import read_corpus
from variator.training.run import Progress
from variator.training.settings import TrainSettings
module.SAVE_EVERY_S = 0.0  # nearly any moment is in a save
backbone, corpus = load_backbone(sys.argv[1]), read_corpus([pathlib.Path(sys.argv[2])])
settings = TrainSettings((PluginConfig(2, 8), PluginConfig(4, 8)), 40, 40, tokens=256, precision="fp32")
out = pathlib.Path(sys.argv[3])
state = out / "killed" / module.STATE_FILE
kills = 0
while not (out / "killed" / "ratio-4.safetensors").exists():
    before = state.stat().st_mtime_ns if state.exists() else 0
    child = os.fork()
    if child == 0:
        module.train(backbone, corpus, settings, out / "killed")
        os._exit(0)
    while kills < 3:
        if state.exists() and state.stat().st_mtime_ns > before:
            time.sleep(0.02 + 0.013 * kills)
            os.kill(child, 9)
            kills += 1
            break
        time.sleep(0.005)
    os.waitpid(child, 0)
print(kills)
module.train(backbone, corpus, settings, out / "whole")
"""


def test_kill_9_in_the_middle_of_saves_loses_nothing(checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(checkpoint), str(write_words(tmp_path / "words.txt")), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.strip() == "3"
    assert same(tmp_path / "killed", tmp_path / "whole", 2) and same(tmp_path / "killed", tmp_path / "whole", 4)


def launched(
    processes: int, checkpoint: Path, words: Path, out: Path, *options: str
) -> subprocess.CompletedProcess[str]:
    """`variator train` in that many processes, as `torchrun` starts them."""
    meet = ["--nproc-per-node", str(processes), "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    run = ["-m", "torch.distributed.run", *meet] if processes > 1 else []
    command = [sys.executable, *run, "-m", "variator", "train", str(checkpoint), "--corpus", str(words)]
    command += ["--ratio", "2", "--ratio", "4", "--tokens", "128", "--local-steps", "5", "--steps", "5"]
    command += ["--precision", "fp32", "--threads", "1", "-o", str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def write_t5(directory: Path, asked: bool = False) -> Path:
    """A T5 that writes, or one that is asked for a class."""
    ids = {"decoder_start_token_id": 0, "eos_token_id": 3, "pad_token_id": 0}
    write_checkpoint("t5", directory, "AutoModelForSeq2SeqLM", **ids)
    if asked:
        prompt = {"template": "{0} w5", "words": ["w7", "w9"], "gap": "w5"}
        (directory / "prompt.json").write_text(json.dumps(prompt))
    return directory


@pytest.mark.parametrize(
    ("kind", "sharded"),
    [
        ("bert", False),
        pytest.param("bert", True, marks=pytest.mark.slow),
        pytest.param("t5", True, marks=pytest.mark.slow),
        pytest.param("t5, asked", True, marks=pytest.mark.slow),
    ],
)
def test_two_processes_take_the_same_steps_as_one_that_accumulates(
    checkpoint: Path, backbone: Backbone, tmp_path: Path, kind: str, sharded: bool
) -> None:
    if kind != "bert":  # with its decoder in the loss
        checkpoint = write_t5(tmp_path / "t5", asked=kind == "t5, asked")
        backbone = load_backbone(str(checkpoint))
    words, start = write_words(tmp_path / "words.txt"), tmp_path / "start"
    for ratio in (2, 4):  # not from zeros: Adam makes whole steps of the rounding in gradients that are nearly zero
        save_plugin(lively(backbone, ratio), start)
    one = launched(1, checkpoint, words, tmp_path / "one", "--from", str(start), "--accumulate", "2")
    two = launched(2, checkpoint, words, tmp_path / "two", "--from", str(start), *(["--shard"] if sharded else []))
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    for ratio in (2, 4):
        places = (tmp_path / name / f"ratio-{ratio}.safetensors" for name in ("one", "two", "start"))
        ours, theirs, before = (load_plugin(place) for place in places)
        for name, tensor in ours.tensors.items():
            np.testing.assert_allclose(theirs.tensors[name], tensor, atol=1e-3, err_msg=name)
        assert max(np.abs(tensor - before.tensors[name]).max() for name, tensor in ours.tensors.items()) > 0.01
        assert theirs.training["tokens_per_step"] == ours.training["tokens_per_step"] == 2 * 128
    for mine, other in zip(entries(tmp_path / "one"), entries(tmp_path / "two"), strict=True):
        assert other["loss"]["4"] == pytest.approx(mine["loss"]["4"], rel=1e-3)  # type: ignore[index]


def test_a_decoder_in_the_head_is_shared_out_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, shared = load_backbone(str(write_t5(tmp_path / "t5", asked=True))).model, list[object]()
    processes = Processes()
    processes.count = 2
    monkeypatch.setattr("variator.training.processes.fully_shard", lambda part, **_: shared.append(part))
    processes.place(model, True)
    assert isinstance(model.head, GapHead)
    assert shared == [model.encoder.embeddings, *model.encoder.blocks, *model.head.decoder.layers]


def test_one_process_cannot_share_a_backbone_with_itself(backbone: Backbone, corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nobody to share(.|\n)*accelerate launch"):
        train(backbone, corpus, replace(settings(), shard=True), tmp_path)


def test_going_on_from_plugins_begins_where_they_ended(backbone: Backbone, corpus: Corpus, tmp_path: Path) -> None:
    before = [lively(backbone, 2), lively(backbone, 4)]
    still = replace(settings(), local_steps=0, steps=1, learning_rate=1e-12)
    after = train(backbone, corpus, still, tmp_path, start=before)
    for one, other in zip(before, after, strict=True):
        assert all(np.allclose(one.tensors[name], other.tensors[name], atol=1e-6) for name in one.tensors)
        assert other.training["from"]["sha256"] == one.digest
    with pytest.raises(InputError, match="go on from"):
        train(backbone, corpus, still, tmp_path / "x", start=before[:1])
    with pytest.raises(InputError, match="3 layers of 32"):
        train(backbone, corpus, still, tmp_path / "x", start=[replace(plugin, layers=3) for plugin in before])


def test_the_file_carries_its_record_and_fits_its_backbone(backbone: Backbone, corpus: Corpus, tmp_path: Path) -> None:
    train(backbone, corpus, settings(3), tmp_path)
    plugin = find_plugin(backbone, 4, tmp_path)
    assert plugin is not None and not plugin.untrained
    record = plugin.training
    assert [(stage["name"], stage["steps"]) for stage in record["stages"]] == [("layer-local", 3), ("distillation", 3)]
    assert record["data"][0]["file"] == "words.txt" and len(record["layer_errors"]) == backbone.config.layers
    assert [loss[:2] for loss in record["losses"]] == [
        ["layer-local", 1],
        ["layer-local", 3],
        ["distillation", 1],
        ["distillation", 3],
    ]
    log = entries(tmp_path)
    assert set(log[-1]["loss"]["4"]) == {"total", "hidden", "pooled", "relational"}  # type: ignore[index]


class Poisoned:
    """A corpus whose third batch makes the loss NaN from layer 1 on."""

    def __init__(self, corpus: Corpus, backbone: Backbone) -> None:
        self.corpus, self.backbone = corpus, backbone

    def batch(self, backbone: Backbone, seed: str, index: int, tokens: int) -> Batch:
        if index == 2:
            with torch.no_grad():
                next(iter(list(self.backbone.model.encoder.blocks)[1:])).ffn_norm.bias.fill_(math.nan)
        return self.corpus.batch(backbone, seed, index, tokens)

    def record(self) -> list[dict[str, object]]:
        return self.corpus.record()


@pytest.mark.parametrize("stage", ["layer-local", "distillation"])
def test_a_loss_that_is_no_number_stops_the_run_and_names_the_layer(
    checkpoint: Path, corpus: Corpus, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from variator.toolkit.checkpoint import load_backbone

    broken = load_backbone(str(checkpoint))
    monkeypatch.setattr("variator.training.train.SAVE_EVERY_S", 0.0)
    steps = {"local_steps": 6, "steps": 0} if stage == "layer-local" else {"local_steps": 0, "steps": 6}
    chosen = replace(settings(), **steps)  # type: ignore[arg-type]
    with pytest.raises(DivergedError, match=r"step 3 of the(.|\n)*in layer 1(.|\n)*lower --learning-rate"):
        train(broken, Poisoned(corpus, broken), chosen, tmp_path)
    assert not (tmp_path / "ratio-4.safetensors").exists()
    healthy = load_backbone(str(checkpoint))
    steps_seen: list[int] = []
    train(healthy, corpus, chosen, tmp_path, lambda progress: steps_seen.append(progress.step))
    assert steps_seen == [3, 4, 5, 6]  # the last good state was kept


def test_a_diverged_run_writes_no_plugin(backbone: Backbone, corpus: Corpus, tmp_path: Path) -> None:
    wild = replace(settings(50), local_rate=1e30)
    with pytest.raises(DivergedError, match=r"no plugin was written"):
        train(backbone, corpus, wild, tmp_path)
    assert not list(tmp_path.glob("ratio-*"))


def test_bf16_training_comes_out_close_to_fp32(backbone: Backbone, corpus: Corpus, tmp_path: Path) -> None:
    errors = {}
    for precision in ("fp32", "bf16"):
        plugins = train(backbone, corpus, settings(20, precision), tmp_path / precision)
        assert plugins[0].training["precision"] == precision
        errors[precision] = plugins[1].training["layer_errors"]
    assert errors["bf16"] == pytest.approx(errors["fp32"], rel=0.1)
    assert next(backbone.model.parameters()).dtype == torch.float32  # the caller's model is left alone


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    rates = [one_cycle(step, 100, 5e-3, 0.05) for step in range(100)]
    peak = rates.index(max(rates))
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert max(rates) == pytest.approx(5e-3) and rates[-1] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    "wrong",
    [
        {"plugins": ()},
        {"plugins": PLUGINS[:1] * 2},
        {"steps": 0, "local_steps": 0},
        {"steps": -1},
        {"accumulate": 0},
        {"precision": "fp8"},
        {"learning_rate": float("nan")},
        {"local_rate": 0.0},
    ],
)
def test_settings_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError):
        TrainSettings(**{"plugins": PLUGINS, **wrong})  # type: ignore[arg-type]
