"""Tasks for a model that writes: a word in a gap per class, and answers in words."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from typer.testing import CliRunner

from tests.conftest import lively, untie, write_checkpoint
from tests.tasks.toys import write_tasks
from variator.bench.evaluate import EvalSettings, evaluate
from variator.cli import app
from variator.engines.build import build
from variator.engines.runtime import Runtime
from variator.errors import BackboneError, BundleError, InputError
from variator.exporters.export import ExportSettings, export
from variator.tasks.catalogue import TASKS
from variator.tasks.read import read_split
from variator.toolkit.bundle import Bundle
from variator.toolkit.checkpoint import load_backbone, stream_backbone
from variator.toolkit.plugin import initial_tensors
from variator.toolkit.plugin_file import save_plugin
from variator.toolkit.plugin_format import PluginConfig
from variator.toolkit.prompt import FILE, GAP, Prompt
from variator.training.distil import Teacher, distil_step
from variator.training.finetune import FinetuneSettings, finetune
from variator.training.labelled import Labelled, adaptation, development
from variator.training.objective import Weights
from variator.training.settings import TrainSettings
from variator.training.train import train

SEQ2SEQ = "AutoModelForSeq2SeqLM"
IDS = {"decoder_start_token_id": 0, "eos_token_id": 3, "pad_token_id": 0, "vocab_size": 128}


def write_writer(directory: Path, kind: str = "t5") -> Path:
    """A tiny T5 whose tokenizer knows the gap."""
    write_checkpoint(kind, directory, SEQ2SEQ, **IDS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": [GAP]})
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def tuned(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The toy, fine-tuned for single texts, pairs and questions."""
    place = tmp_path_factory.mktemp("tuned")
    writer, settings = write_writer(place / "t5"), FinetuneSettings(epochs=20, learning_rate=1e-2, precision="fp32")
    return {
        task: finetune(str(writer), read_split(TASKS[task], "train", data), place / task, settings)
        for task in ("sst2", "rte", "squad")
    }


@pytest.mark.parametrize("task", ["sst2", "rte", "squad"])
def test_a_writer_learns_a_task_and_its_plugins_adapt_to_it(
    tuned: dict[str, Path], data: Path, tmp_path: Path, task: str
) -> None:
    (whole,) = evaluate(tuned[task], read_split(TASKS[task], "dev", data), EvalSettings())
    assert whole.scores[TASKS[task].metrics[0]] > 0.85
    backbone = load_backbone(str(tuned[task]))
    assert backbone.task == ("seq2seq" if task == "squad" else "classify")
    settings = TrainSettings(
        (PluginConfig(4, 8),), 0, 40, tokens=512, learning_rate=5e-3, precision="fp32", evaluate_every=20
    )
    start = [replace(lively(backbone, 4), backbone="another")]
    judge = development(backbone, task, data)
    assert judge is not None
    plugins = train(backbone, adaptation(backbone, task, data), settings, tmp_path, judge=judge, start=start)
    log = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    losses = [entry["loss"]["4"] for entry in log if "loss" in entry]
    assert set(losses[0]) == {"total", "hidden", "decoder", "task", *(() if task == "squad" else ("logits",))}
    for term in ("total", "hidden", "decoder"):
        assert losses[-1][term] < losses[0][term], (term, losses)
    assert [entry["step"] for entry in log if "score" in entry] == [20, 40]
    assert plugins[0].backbone == backbone.fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("task", ["rte", "squad"])
def test_a_bundle_and_its_checkpoint_score_alike(tuned: dict[str, Path], data: Path, tmp_path: Path, task: str) -> None:
    backbone, split = load_backbone(str(tuned[task])), read_split(TASKS[task], "dev", data)
    save_plugin(lively(backbone, 4), tmp_path / "plugins")
    build(export(backbone, tmp_path / "bundle", ExportSettings((4,), tmp_path / "plugins")), "onnxruntime", "fp32")
    engine = evaluate(tmp_path / "bundle", split, EvalSettings())
    checkpoint = evaluate(tuned[task], split, EvalSettings((4,), tmp_path / "plugins"))
    for ours, theirs in zip(engine, checkpoint, strict=True):
        assert ours.scores == pytest.approx(theirs.scores, abs=0.013) and ours.engine != theirs.engine


@pytest.mark.parametrize("own", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["tied", "untied"])
def test_the_class_scores_are_transformers_own(tuned: dict[str, Path], tmp_path: Path, own: bool) -> None:
    """At ratio 1, by transformers' model of the checkpoint; the prompt is filled by the runtime."""
    checkpoint = untie(shutil.copytree(tuned["rte"], tmp_path / "untied")) if own else tuned["rte"]
    exported = export(str(checkpoint), tmp_path / "bundle", ExportSettings((4,), untrained=True))
    assert (exported.manifest.prompt, exported.manifest.decoder) == (TASKS["rte"].prompt, None)
    assert exported.manifest.labels == list(TASKS["rte"].labels)
    assert 0 < exported.manifest.ratios[1].flops["head"] < exported.manifest.ratios[1].flops["total"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(checkpoint).eval()
    assert own != torch.equal(model.lm_head.weight, model.shared.weight)
    pairs = [("w5 w1 w9", "w5"), ("w2 w8 {1} w7 w4 w30", "w8 {0}")]
    words = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("yes", "no")]
    gap = tokenizer.convert_tokens_to_ids(GAP)
    for engine in ("onnxruntime",) if own else ("onnxruntime", "openvino"):
        build(exported, engine, "fp32")
        with Runtime.open(exported, engine, "fp32") as runtime:
            found = runtime.infer(pairs, ratio=1).outputs["logits"]
            for row, (first, second) in enumerate(pairs):
                text = f"Does the second follow from the first? {GAP}. first: {first} second: {second}"
                given = tokenizer(text, return_tensors="pt")
                with torch.no_grad():
                    logits = model(
                        input_ids=given["input_ids"],
                        attention_mask=given["attention_mask"],
                        decoder_input_ids=torch.tensor([[0, gap]]),
                    ).logits
                np.testing.assert_allclose(found[row], logits[0, -1, words].numpy(), atol=1e-3, rtol=1e-3)
            with pytest.raises(InputError, match="1 text"):
                runtime.infer(["w5"], ratio=1)


@pytest.mark.slow
def test_narrow_and_on_the_command_line(tuned: dict[str, Path], tmp_path: Path) -> None:
    place = str(tmp_path / "bundle")
    arguments = ["export", str(tuned["sst2"]), "--ratio", "4", "--untrained", "-o", place]
    export(str(tuned["sst2"]), tmp_path / "narrow", ExportSettings((), precision="bf16"))
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert CliRunner().invoke(app, ["build", place, "--engine", "onnxruntime", "--no-calibrate"]).exit_code == 0
    done = CliRunner().invoke(
        app, ["run", place, "--ratio", "1", "--text", "w5 w9 w2 w7", "--text", "w1 w30 w8", "--json"]
    )
    assert done.exit_code == 0, done.output
    outputs = json.loads(done.stdout)["outputs"]["logits"]
    assert [int(np.argmax(row)) for row in outputs] == [1, 0]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"template": "no place", "words": ["yes", "no"]}, "template"),
        ({"template": "{0} without a gap", "words": ["yes", "no"]}, "template"),
        ({"template": f"{{0}} {GAP} {GAP}", "words": ["yes", "no"]}, "template"),
        ({"template": f"{{0}} {GAP}", "words": ["yes"]}, "two or more"),
        ({"template": f"{{0}} {GAP}", "words": ["yes", "yes"]}, "all different"),
        ({"template": f"{{0}} {GAP}", "words": "yes"}, "texts"),
        ({"template": f"{{0}} {GAP}", "words": ["yes", 3]}, "texts"),
        ({"template": f"{{0}} {GAP}", "words": ["yes", "no"], "labels": ["a"]}, "1 labels for 2"),
        ({"template": f"{{0}} {GAP}"}, "no prompt"),
        ({"template": f"{{0}} {GAP}", "words": ["yes", "yet"]}, "same token"),
        ({"template": "{0} <gap>", "words": ["yes", "no"], "gap": "<gap>"}, "no token of this model"),
        (["a list"], "no prompt"),
    ],
)
def test_a_damaged_prompt_is_told(tmp_path: Path, settings: object, reason: str) -> None:
    write_writer(tmp_path / "model")
    (tmp_path / "model" / FILE).write_text(json.dumps(settings))
    with pytest.raises(BackboneError, match=reason):
        load_backbone(str(tmp_path / "model"))
    assert load_backbone(str(tmp_path / "model"), "hidden").prompt is None


def test_what_a_prompt_cannot_do_is_told(tuned: dict[str, Path], data: Path, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"low memory(.|\n)*seq2seq"):
        stream_backbone(str(tuned["sst2"]))
    assert stream_backbone(str(tuned["sst2"]), "seq2seq").decoder is not None
    with pytest.raises(BackboneError, match=r"prompt\.json"):
        load_backbone(str(write_writer(tmp_path / "plain")), "classify")
    with pytest.raises(InputError, match="needs 'classify'"):
        evaluate(tmp_path / "plain", read_split(TASKS["sst2"], "dev", data), EvalSettings())
    backbone = load_backbone(str(tuned["sst2"]))
    with pytest.raises(InputError, match="2 classes, mnli has 3"):
        (tmp_path / "mnli").mkdir()
        (tmp_path / "mnli" / "dev.jsonl").write_text('{"premise": "w1", "hypothesis": "w2", "label": 2}')
        development(backbone, "mnli", tmp_path)
    exported = export(backbone, tmp_path / "bundle", ExportSettings((), untrained=True))
    manifest = json.loads((exported.path / "manifest.json").read_text())
    manifest["prompt"]["words"] = ["yes"]
    (exported.path / "manifest.json").write_text(json.dumps(manifest))

    with pytest.raises(BundleError, match="words"):
        Bundle.open(exported.path)


def test_a_text_whose_gap_is_cut_off_is_refused(tuned: dict[str, Path], tmp_path: Path) -> None:
    backbone = load_backbone(str(tuned["sst2"]))
    behind = replace(backbone, prompt=Prompt(f"{{0}} {GAP}", ["terrible", "great"]), max_length=64)
    build(export(behind, tmp_path / "bundle", ExportSettings((), untrained=True)), "onnxruntime", "fp32")
    with Runtime.open(tmp_path / "bundle") as runtime:
        assert runtime.infer(["w5 " * 20], ratio=1).outputs["logits"].shape == (1, 2)
        with pytest.raises(InputError, match="cut off"):
            runtime.infer(["w5 " * 100], ratio=1, truncate=True)
        with pytest.raises(InputError, match="103 tokens"):
            runtime.infer(["w5 " * 100], ratio=1)


def test_the_templates_of_the_tasks_fit_their_fields() -> None:
    for task in TASKS.values():
        assert (task.prompt is not None) == (task.head == "classify")
        if task.prompt is not None:
            filled = task.prompt.fill(tuple(f"text {place}" for place in range(len(task.fields))))
            assert filled.count(GAP) == 1 and "text 0" in filled and "{" not in filled
            assert (len(task.prompt.words), task.prompt.names) == (task.classes, list(task.labels))


def test_a_longer_answer_counts_token_by_token(tuned: dict[str, Path], data: Path) -> None:
    """The loss of a batch of answers is the mean over their tokens, not over padding."""
    backbone = load_backbone(str(tuned["squad"]))
    batch = Labelled(read_split(TASKS["squad"], "train", data), backbone).batch(backbone, "s", 0, 256)
    text = batch.labels["answer"]
    longer = torch.cat([text, torch.full((len(text), 3), -100)], dim=1)
    config = PluginConfig(4, 8)
    teacher = Teacher(backbone.model, "seq2seq", Weights(), backbone.decoder, 0)
    losses = []
    for answer in (text, longer):
        tensors = {4: {name: one.requires_grad_() for name, one in initial_tensors(config, 32, 2).items()}}
        found = distil_step(teacher, [config], tensors, replace(batch, labels={"answer": answer}))
        losses.append(found[4])
    for name in ("task", "decoder"):
        torch.testing.assert_close(losses[0].terms[name], losses[1].terms[name])
    assert backbone.original is not None and backbone.decoder is not None
    hidden = backbone.model.encoder(batch.ids, batch.mask, None)
    ids = torch.cat([torch.zeros(len(text), 1, dtype=torch.int64), text[:, :-1].clamp(min=0)], dim=1)
    (read,) = backbone.model.head(hidden, batch.mask.float())
    ours = backbone.decoder.scores(backbone.decoder.start(ids, batch.mask.sum(dim=1), read))
    theirs = backbone.original(input_ids=batch.ids, attention_mask=batch.mask, decoder_input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
