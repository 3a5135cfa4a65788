"""Training on other families than BERT: both stages learn, and a decoder takes part in the loss."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.conftest import made, write_checkpoint
from tests.training.test_train import write_words
from variator.cli import app
from variator.errors import CorpusError, InputError
from variator.files import sha256_of
from variator.toolkit.checkpoint import load_backbone
from variator.toolkit.plugin import compression, initial_tensors
from variator.toolkit.plugin_file import load_plain
from variator.toolkit.plugin_format import PluginConfig
from variator.training.corpus import read_corpus
from variator.training.distil import Teacher, distil_step
from variator.training.local import local_step
from variator.training.objective import Weights, normalised_error
from variator.training.pictures import read_pictures
from variator.training.settings import TrainSettings
from variator.training.train import train

PLUGIN = PluginConfig(4, 8)
T5 = {"decoder_start_token_id": 0, "eos_token_id": 3, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("kind", "auto"),
    [
        ("t5", "AutoModelForSeq2SeqLM"),
        ("t5, gated", "AutoModel"),
        ("modernbert", "AutoModel"),
        ("deberta-v2", "AutoModel"),
    ],
)
def test_both_stages_learn(kind: str, auto: str, tmp_path: Path) -> None:
    ids = T5 if kind.startswith("t5") else {}
    backbone = load_backbone(str(write_checkpoint(kind, tmp_path / "model", auto, **ids)))
    assert (backbone.decoder is not None) == (backbone.task == "seq2seq") == (auto != "AutoModel")
    corpus = read_corpus([write_words(tmp_path / "words.txt")])
    settings = TrainSettings((PLUGIN,), 40, 40, tokens=256, learning_rate=5e-3)
    (plugin,) = train(backbone, corpus, settings, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "training.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {"layer-local", "distillation"}
    assert ("decoder" in lines[-1]["loss"]["4"]) == (backbone.decoder is not None)
    start = initial_tensors(PLUGIN, 32, backbone.config.layers)
    first = backbone.special.start if backbone.decoder is not None else 0
    teacher = Teacher(backbone.model, backbone.task, Weights(), backbone.decoder, first)

    def loss(tensors: Mapping[str, torch.Tensor]) -> float:
        """On batches that training did not see in this order."""
        found = {4: {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}}
        batches = (corpus.batch(backbone, "held out", index, 256) for index in range(8))
        return sum(float(distil_step(teacher, [PLUGIN], found, batch)[4].total) for batch in batches)

    trained = {name: torch.tensor(tensor) for name, tensor in plugin.tensors.items()}
    assert loss(trained) < 0.98 * loss(start)
    for name, tensor in plugin.tensors.items():
        assert not np.array_equal(tensor, start[name].numpy()), name


def write_pictures(place: Path, count: int = 40) -> Path:
    """Noise with structure: each picture is a few waves."""
    rng = np.random.default_rng(0)
    axis = np.linspace(0, 6, 28)
    waves = np.sin(axis * rng.uniform(0.5, 3, (count, 3, 1, 1)) + axis[:, None] * rng.uniform(0.5, 3, (count, 3, 1, 1)))
    np.save(place, waves.astype(np.float16))
    return place


@pytest.mark.parametrize("kind", ["vit", "siglip_vision_model"])
def test_plugins_of_a_model_of_pictures_are_trained(kind: str, tmp_path: Path) -> None:
    model, pictures = write_checkpoint(kind, tmp_path / "model"), write_pictures(tmp_path / "waves.npy")
    command = ["train", str(model), "--ratio", "4", "--rank", "8", "--corpus", str(pictures), "--steps", "30"]
    command += ["--local-steps", "30", "--tokens", "400", "--learning-rate", "5e-3", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in (tmp_path / "out" / "training.jsonl").read_text().splitlines()]
    for stage in ("layer-local", "distillation"):
        losses = [line["loss"]["4"]["total"] for line in lines if line["stage"] == stage]
        assert losses[-1] < losses[0], stage
    (plugin,) = load_plain(tmp_path / "out")
    assert plugin.training["data"] == [{"file": "waves.npy", "sha256": sha256_of(pictures), "pictures": 40}]
    refused = CliRunner().invoke(
        app, ["train", str(model), "--ratio", "4", "--task", "sst2", "-o", str(tmp_path / "x")]
    )
    assert refused.exit_code == 1 and "reads pictures" in str(refused.exception)


def test_the_local_stage_sees_pictures_as_the_exported_encoder_does(tmp_path: Path) -> None:
    """With untrained plugins of ratio 2 over an odd number of patches: the first error is that of the whole model."""
    backbone = load_backbone(str(write_checkpoint("vit", tmp_path / "model")))
    batch = read_pictures([write_pictures(tmp_path / "waves.npy", 4)], backbone).batch(backbone, "s", 0, 10_000)
    assert batch.pixels is not None and batch.ids.shape == (4, 50)
    config = PluginConfig(4, 8)
    tensors = {name: one.requires_grad_() for name, one in initial_tensors(config, 32, 2).items()}
    losses = local_step(backbone.model, [config], {4: tensors}, batch)[4]
    states: list[torch.Tensor] = []
    wanted: list[torch.Tensor] = []
    with torch.no_grad():
        batch.through(backbone.model.encoder, compression(config, tensors), states)
        batch.through(backbone.model.encoder, None, wanted)
    expected = [normalised_error(one, other, torch.ones(4, 50)) for one, other in zip(states, wanted, strict=True)]
    torch.testing.assert_close(losses.layers[0], expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (np.zeros((3, 3, 27, 28), np.float32), "27, 28"),
        (np.zeros((0, 3, 28, 28), np.float32), "0, 3"),
        (np.zeros((3, 3, 28, 28), np.uint8), "no floats"),
        (np.array([{"a": 1}], dtype=object), "cannot read"),
        (None, "cannot read"),
        (np.full((3, 3, 28, 28), np.nan, np.float32), "not finite"),
    ],
)
def test_files_that_hold_no_pictures_are_told(content: np.ndarray | None, reason: str, tmp_path: Path) -> None:
    backbone = load_backbone(str(write_checkpoint("vit", tmp_path / "model")))
    path = tmp_path / "pictures.npy"
    if content is None:
        path.write_bytes(b"no array")
    else:
        np.save(path, content, allow_pickle=content.dtype == object)
    with pytest.raises(CorpusError, match=reason):
        read_pictures([path], backbone).batch(backbone, "s", 0, 400)


def test_keys_and_values_of_a_model_with_relative_positions_are_not_trained(tmp_path: Path) -> None:
    backbone = load_backbone(str(write_checkpoint("t5", tmp_path / "model")))
    corpus = read_corpus([write_words(tmp_path / "words.txt")])
    config = made(backbone, PluginConfig(4, 8, keys_values=2, name="long")).config
    with pytest.raises(InputError, match="positions"):
        train(backbone, corpus, TrainSettings((config,), 1, 1), tmp_path / "out")
