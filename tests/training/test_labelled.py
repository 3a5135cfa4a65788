"""Adapting plugins to a task, choosing the best by its development split, and fine-tuning the backbone before."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.conftest import lively, write_checkpoint
from tests.tasks.toys import write_tasks
from variator.bench.evaluate import CHOSEN, EvalSettings, as_rows, evaluate
from variator.engines.build import build
from variator.errors import InputError, PluginError, VariatorError
from variator.exporters.export import ExportSettings, export
from variator.files import alone
from variator.tasks.catalogue import TASKS
from variator.tasks.read import read_split
from variator.toolkit.checkpoint import Backbone, load_backbone
from variator.toolkit.plugin_file import load_plugin, save_plugin
from variator.toolkit.plugin_format import PluginConfig
from variator.training.finetune import FinetuneSettings, finetune
from variator.training.labelled import Labelled, TaskJudge, adaptation, development
from variator.training.objective import Weights, label_loss, output_terms
from variator.training.settings import TrainSettings
from variator.training.student import answering
from variator.training.train import train

PLUGINS = (PluginConfig(2, 8), PluginConfig(4, 8))
SETTINGS = TrainSettings(PLUGINS, 0, 40, tokens=512, precision="fp32", evaluate_every=20)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("bert", tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def tuned(bert: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The toy, fine-tuned for a classification task of single texts and one of pairs, and for questions."""
    place = tmp_path_factory.mktemp("tuned")
    settings = FinetuneSettings(epochs=6, learning_rate=3e-3, precision="fp32")
    return {
        task: finetune(str(bert), read_split(TASKS[task], "train", data), place / task, settings)
        for task in ("sst2", "rte", "squad")
    }


@pytest.mark.parametrize(("task", "least"), [("sst2", 0.9), ("rte", 0.9), ("squad", 0.6)])
def test_a_fine_tuned_backbone_knows_its_task(tuned: dict[str, Path], data: Path, task: str, least: float) -> None:
    (whole,) = evaluate(tuned[task], read_split(TASKS[task], "dev", data), EvalSettings())
    assert whole.scores[TASKS[task].metrics[0]] > least and whole.ratio == 1 and whole.drop == 0
    assert "sample" in whole.split


@pytest.mark.parametrize("task", ["sst2", "rte", "squad", "stsb"])
def test_adaptation_lowers_the_loss_and_keeps_the_best(
    tuned: dict[str, Path], checkpoint: Path, data: Path, tmp_path: Path, task: str
) -> None:
    backbone = load_backbone(str(tuned.get(task, checkpoint)))
    start = [replace(lively(backbone, ratio, rank=8), backbone="another") for ratio in (2, 4)]
    judge = development(backbone, task, data)
    assert judge is not None
    train(backbone, adaptation(backbone, task, data), SETTINGS, tmp_path, judge=judge, start=start)
    log = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    losses = [entry["loss"]["4"] for entry in log if "loss" in entry]
    expected = {"total", "hidden", "task", *(("pooled", "relational") if task == "stsb" else ("logits",))}
    assert set(losses[0]) == expected and losses[-1]["total"] < losses[0]["total"]
    scores = {entry["step"]: entry["score"]["4"] for entry in log if "score" in entry}
    assert sorted(scores) == [20, 40] and all(entry.get("metric", judge.metric) == judge.metric for entry in log)
    found = evaluate(tuned.get(task, checkpoint), read_split(TASKS[task], "dev", data), EvalSettings((2, 4), tmp_path))
    assert found[2].scores[TASKS[task].metrics[0]] == pytest.approx(max(scores.values()), abs=0.02)  # fp16 in the file


@pytest.mark.slow
def test_scores_are_recorded_in_the_plugin_files(checkpoint: Path, backbone: Backbone, tmp_path: Path) -> None:
    write_tasks(tmp_path / "data", 20, 20)
    plugin = lively(backbone, 2)
    path = save_plugin(plugin, tmp_path / "plugins")
    command = [sys.executable, "-m", "variator", "eval", str(checkpoint), "--task", "stsb", "--ratio", "2", "--record"]
    command += ["--data", str(tmp_path / "data"), "--json"]
    for _ in range(2):  # the second replaces the first
        done = subprocess.run([*command, "--plugin", str(path.parent)], capture_output=True, text=True, check=True)
    whole, two = json.loads(done.stdout)
    (entry,) = load_plugin(path).training["scores"]
    assert entry["split"] == two["split"] == "stsb dev (sample: 20 of 1,500)" and entry["precision"] == "fp32"
    assert entry["value"] == pytest.approx(two["scores"], abs=1e-5)
    assert entry["ratio_1"] == pytest.approx(whole["scores"], abs=1e-5)
    assert load_plugin(path).digest == plugin.digest
    assert subprocess.run(command, capture_output=True, text=True, check=False).returncode == 1
    save_plugin(replace(plugin, training={}), path.parent)
    refused = subprocess.run([*command, "--plugin", str(path.parent)], capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and "never trained" in refused.stderr


@pytest.mark.slow
def test_a_bundle_and_its_checkpoint_score_alike(tuned: dict[str, Path], data: Path, tmp_path: Path) -> None:

    for task in ("rte", "squad"):
        backbone = load_backbone(str(tuned[task]))
        plugins, bundle = tmp_path / task / "plugins", tmp_path / task / "bundle"
        save_plugin(lively(backbone, 4), plugins)
        export(backbone, bundle, ExportSettings((4,), plugins))
        build(bundle, "onnxruntime", "fp32")
        split = read_split(TASKS[task], "dev", data)
        engine, torch_ = (
            evaluate(bundle, split, EvalSettings()),
            evaluate(tuned[task], split, EvalSettings((4,), plugins)),
        )
        assert [one.ratio for one in engine] == [one.ratio for one in torch_] == [1, 4]
        assert [one.engine for one in (*engine, *torch_)] == ["onnxruntime"] * 2 + ["torch"] * 2
        for ours, theirs in zip(engine, torch_, strict=True):
            assert ours.scores == pytest.approx(theirs.scores, abs=0.013)  # one of 80 examples on the edge
        whole, compressed = (one.scores[TASKS[task].metrics[0]] for one in engine)
        assert engine[1].drop == pytest.approx(1 - compressed / whole)


def test_what_does_not_fit_is_said(tuned: dict[str, Path], backbone: Backbone, data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"task 'embed', sst2 needs 'classify'(.|\n)*variator finetune"):
        adaptation(backbone, "sst2", data)
    with pytest.raises(InputError, match="needs 'classify'"):
        evaluate(backbone.source, read_split(TASKS["sst2"], "dev", data), EvalSettings())
    with pytest.raises(PluginError, match="no plugin of ratio 8"):
        evaluate(tuned["sst2"], read_split(TASKS["sst2"], "dev", data), EvalSettings((8,)))
    two = load_backbone(str(tuned["sst2"]))
    row = {"premise": "w1", "hypothesis": "w2", "label": 2}
    (tmp_path / "mnli").mkdir()
    (tmp_path / "mnli" / "dev.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match="2 classes, mnli has 3"):
        TaskJudge(read_split(TASKS["mnli"], "dev", tmp_path), two)
    with pytest.raises(InputError, match="has 2 classes, mnli has 3"):
        evaluate(tuned["sst2"], read_split(TASKS["mnli"], "dev", tmp_path), EvalSettings())
    with pytest.raises(InputError, match="one file"):
        adaptation(backbone, "stsb", data / "stsb" / "train.jsonl")
    with pytest.raises(InputError, match="embeddings as they are"):
        finetune(str(tuned["sst2"]), read_split(TASKS["stsb"], "train", data), tmp_path / "x", FinetuneSettings())
    with pytest.raises(InputError, match="exists already"):
        finetune(str(tuned["sst2"]), read_split(TASKS["sst2"], "train", data), tuned["sst2"], FinetuneSettings())
    assert development(backbone, None, None) is None
    for wrong in ({"epochs": 0}, {"learning_rate": math.nan}, {"batch": 0}, {"precision": "fp8"}):
        with pytest.raises(InputError):
            FinetuneSettings(**wrong)  # type: ignore[arg-type]


def test_an_interrupted_fine_tuning_goes_on_from_its_epoch(bert: Path, data: Path, tmp_path: Path) -> None:
    split = read_split(TASKS["sst2"], "train", data)
    settings = FinetuneSettings(epochs=2, precision="fp32")
    steps: list[int] = []

    def stop(step: int, of: int) -> None:
        steps.append(step)
        if len(steps) == 20:  # of 13 in an epoch
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(str(bert), split, tmp_path / "out", settings, stop)
    assert not (tmp_path / "out").exists()
    finetune(str(bert), split, tmp_path / "out", settings, stop)
    assert steps == [*range(1, 21), *range(14, 27)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_fine_tuning_that_diverges_writes_nothing_and_leaves_nothing(bert: Path, data: Path, tmp_path: Path) -> None:
    split = read_split(TASKS["sst2"], "train", data)
    wild = FinetuneSettings(epochs=1, learning_rate=1e30, precision="fp32")
    with pytest.raises(VariatorError, match="lower --learning-rate"):
        finetune(str(bert), split, tmp_path / "out", wild)
    assert not list(tmp_path.iterdir())
    finetune(str(bert), split, tmp_path / "out", replace(wild, learning_rate=1e-3))
    (whole,) = evaluate(tmp_path / "out", read_split(TASKS["sst2"], "dev", data), EvalSettings())
    assert whole.scores["accuracy"] > 0


def test_an_interrupted_fine_tuning_of_something_else_is_refused(bert: Path, data: Path, tmp_path: Path) -> None:
    settings = FinetuneSettings(epochs=2, precision="fp32")

    def stop(step: int, of: int) -> None:
        if step == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(str(bert), read_split(TASKS["sst2"], "train", data), tmp_path / "out", settings, stop)
    rte = read_split(TASKS["rte"], "train", data)
    with pytest.raises(InputError, match="another model, data or settings"):
        finetune(str(bert), rte, tmp_path / "out", settings)
    steps: list[int] = []
    finetune(str(bert), rte, tmp_path / "out", replace(settings, overwrite=True), lambda step, of: steps.append(step))
    assert steps[0] == 1


def test_the_seed_is_also_the_heads(bert: Path, data: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    split = read_split(TASKS["sst2"], "train", data)
    heads = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(heads))
        place = finetune(str(bert), split, tmp_path / name, FinetuneSettings(0.05, 1e-12, seed=seed, precision="fp32"))
        heads.append(load_file(place / "model.safetensors")["classifier.weight"])
    assert torch.allclose(heads[0], heads[1], atol=1e-6) and not torch.allclose(heads[0], heads[2], atol=1e-3)


def test_labels_in_another_order_are_refused(tuned: dict[str, Path], data: Path, tmp_path: Path) -> None:
    import shutil

    split = read_split(TASKS["rte"], "dev", data)
    TaskJudge(split, load_backbone(str(tuned["rte"])))
    place = shutil.copytree(tuned["rte"], tmp_path / "swapped")
    config = json.loads((place / "config.json").read_text())
    assert config["id2label"] == {"0": "entailment", "1": "not_entailment"}
    config |= {"id2label": {"0": "NOT_ENTAILMENT", "1": "entailment"}}
    config["label2id"] = {"NOT_ENTAILMENT": 0, "entailment": 1}
    (place / "config.json").write_text(json.dumps(config))
    wrong = "in the order not_entailment, entailment"
    with pytest.raises(InputError, match=wrong):
        TaskJudge(split, load_backbone(str(place)))
    with pytest.raises(InputError, match=wrong):
        evaluate(place, split, EvalSettings())
    bundle = export(str(place), tmp_path / "bundle", ExportSettings((1,)))
    build(bundle.path, "onnxruntime", "fp32")
    with pytest.raises(InputError, match=wrong):
        evaluate(bundle.path, split, EvalSettings())


def test_only_a_checkpoint_is_overwritten_by_fine_tuning(bert: Path, data: Path, tmp_path: Path) -> None:
    split, settings = read_split(TASKS["rte"], "train", data), FinetuneSettings(overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("years of work")
    with pytest.raises(InputError, match="is no checkpoint"):
        finetune(str(bert), split, tmp_path / "mine", settings)
    with pytest.raises(InputError, match="what is to be fine-tuned"):
        finetune(str(bert), split, bert, settings)
    assert (tmp_path / "mine" / "notes.txt").exists() and (bert / "config.json").exists()


def test_an_epoch_that_was_killed_while_it_was_saved_is_passed_over(bert: Path, data: Path, tmp_path: Path) -> None:
    split, settings = read_split(TASKS["sst2"], "train", data), FinetuneSettings(epochs=3, precision="fp32")

    def stop(step: int, of: int) -> None:
        if step == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(str(bert), split, tmp_path / "out", settings, stop)
    scratch = tmp_path / ".out.training"
    (whole,) = scratch.glob("checkpoint-*")
    assert whole.name == "checkpoint-26"  # 13 steps in an epoch
    (scratch / "checkpoint-39").mkdir()
    (scratch / "checkpoint-39" / "model.safetensors").write_bytes(b"half")
    steps: list[int] = []
    finetune(str(bert), split, tmp_path / "out", settings, lambda step, of: steps.append(step))
    assert steps == [*range(27, 40)]


def test_two_processes_do_not_make_one_thing(bert: Path, data: Path, tmp_path: Path) -> None:
    split, settings = read_split(TASKS["rte"], "train", data), FinetuneSettings(epochs=1, precision="fp32")
    with alone(tmp_path / "out"), pytest.raises(InputError, match="another process is making"):
        finetune(str(bert), split, tmp_path / "out", settings)
    assert not list(tmp_path.iterdir())


def test_eval_takes_the_plugins_of_a_directory_and_says_if_the_split_chose_them(
    tuned: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    backbone, split = load_backbone(str(tuned["sst2"])), read_split(TASKS["sst2"], "dev", data)
    chosen = replace(SETTINGS, steps=20)
    train(backbone, Labelled(read_split(TASKS["sst2"], "train", data), backbone), chosen, tmp_path / "plain")
    judge = TaskJudge(split, backbone)
    train(
        backbone, Labelled(read_split(TASKS["sst2"], "train", data), backbone), chosen, tmp_path / "judged", judge=judge
    )
    for name, flattered in (("plain", False), ("judged", True)):
        found = evaluate(tuned["sst2"], split, EvalSettings(plugins=tmp_path / name))
        assert [one.ratio for one in found] == [1, 2, 4]
        assert [one.chosen for one in found] == [False, flattered, flattered]
        assert [CHOSEN in row[-1] for row in as_rows(found)] == [one.chosen and one.drop is not None for one in found]
    (tmp_path / "none").mkdir()
    with pytest.raises(PluginError, match="no plugin in"):
        evaluate(tuned["sst2"], split, EvalSettings(plugins=tmp_path / "none"))


def test_batches_have_labels_and_depend_on_their_index_alone(tuned: dict[str, Path], data: Path) -> None:
    backbone = load_backbone(str(tuned["squad"]))
    found = Labelled(read_split(TASKS["squad"], "train", data), backbone)
    batch, again = (found.batch(backbone, "0", 3, 256) for _ in range(2))
    assert torch.equal(batch.ids, again.ids) and not torch.equal(batch.ids, found.batch(backbone, "0", 4, 256).ids)
    assert batch.ids.numel() <= 256 and batch.types is not None and set(batch.labels) == {"start", "end"}
    tokens = backbone.tokenizer.convert_ids_to_tokens(batch.ids[torch.arange(len(batch.ids)), batch.labels["start"]])
    assert set(tokens) <= {"w60", "w61"} and tokens


def test_embeddings_come_in_pairs(backbone: Backbone, data: Path) -> None:
    found = Labelled(read_split(TASKS["stsb"], "train", data), backbone)
    batch = found.batch(backbone, "0", 1, 256)
    assert batch.ids.numel() <= 256 and len(batch.ids) == 2 * len(batch.labels["similarity"])
    assert float(batch.labels["similarity"].min()) >= 0 and float(batch.labels["similarity"].max()) <= 1


def test_a_student_is_the_module_that_is_exported(backbone: Backbone) -> None:
    plugin = lively(backbone, 4)
    texts = ["w1 w2 w3", "w4", " ".join(f"w{i}" for i in range(50))]
    together = answering(backbone, plugin)(texts)["embedding"]
    alone = np.concatenate([answering(backbone, plugin)([text])["embedding"] for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert not np.allclose(together, answering(backbone, None)(texts)["embedding"], atol=1e-2)


def test_a_student_that_answers_as_its_teacher_costs_nothing_and_padding_does_not_count() -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[1.0, 1, 1, 0], [1, 1, 1, 1]])
    for task, shapes in (("embed", [(2, 8)]), ("classify", [(2, 3)]), ("classify", [(2, 1)]), ("qa", [(2, 4), (2, 4)])):
        teacher = [torch.randn(shape) for shape in shapes]
        other = [torch.randn(shape) for shape in shapes]
        assert all(float(t) == pytest.approx(0, abs=1e-6) for t in output_terms(task, teacher, teacher, mask).values())
        assert all(float(t) > 1e-3 for t in output_terms(task, other, teacher, mask).values())
    starts, ends = teacher
    moved = starts + torch.tensor([[0, 0, 0, 7.0], [0, 0, 0, 0]])
    assert float(output_terms("qa", [moved, ends], teacher, mask)["logits"]) == pytest.approx(0, abs=1e-6)
    assert output_terms("hidden", [torch.randn(2, 4, 8)], [torch.randn(2, 4, 8)], mask) == {}


def test_label_losses_are_the_tasks_own() -> None:
    torch.manual_seed(0)
    mask = torch.ones(4, 5)
    logits, classes = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    assert label_loss("classify", [logits], {"label": classes}, mask) == F.cross_entropy(logits, classes)
    starts, ends, at = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 4, 2, 2])
    expected = (F.cross_entropy(starts, at) + F.cross_entropy(ends, at)) / 2
    torch.testing.assert_close(label_loss("qa", [starts, ends], {"start": at, "end": at}, mask), expected)
    same = torch.randn(2, 8)
    pairs = [torch.cat([same, same * 3])]
    assert float(label_loss("embed", pairs, {"similarity": torch.ones(2)}, mask)) == pytest.approx(0, abs=1e-6)
    assert float(label_loss("embed", pairs, {"similarity": torch.zeros(2)}, mask)) == pytest.approx(1, abs=1e-6)


def test_weights_are_checked() -> None:
    with pytest.raises(InputError, match="pooled"):
        Weights(pooled=-1)
    with pytest.raises(InputError, match="task"):
        Weights(task=math.inf)
