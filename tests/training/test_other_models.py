"""Training on other families than BERT: both stages learn, and a decoder takes part in the loss."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import made, write_checkpoint
from tests.training.test_train import write_words
from variator.errors import InputError
from variator.toolkit.checkpoint import load_backbone
from variator.toolkit.plugin import initial_tensors
from variator.toolkit.plugin_format import PluginConfig
from variator.training.corpus import read_corpus
from variator.training.distil import Teacher, distil_step
from variator.training.objective import Weights
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


def test_keys_and_values_of_a_model_with_relative_positions_are_not_trained(tmp_path: Path) -> None:
    backbone = load_backbone(str(write_checkpoint("t5", tmp_path / "model")))
    corpus = read_corpus([write_words(tmp_path / "words.txt")])
    config = made(backbone, PluginConfig(4, 8, keys_values=2, name="long")).config
    with pytest.raises(InputError, match="positions"):
        train(backbone, corpus, TrainSettings((config,), 1, 1), tmp_path / "out")
