"""A student as something that answers texts: PyTorch under an engine's contract, for scores while training."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from variator.errors import InputError
from variator.toolkit.checkpoint import Backbone, Model
from variator.toolkit.heads import OUTPUTS
from variator.toolkit.plugin import compression
from variator.toolkit.plugin_file import Plugin
from variator.toolkit.plugin_format import PluginConfig
from variator.toolkit.rows import LONGEST_WRITTEN, Encode, Input, Outputs, Row, Write, place
from variator.training.batch import batch_of, fitting

TOKENS_PER_RUN = 8192

ROWS_WRITTEN = 32
"""Rows that answers are written to at once."""


def student(
    backbone: Backbone,
    model: Model,
    config: PluginConfig | None,
    tensors: Mapping[str, Tensor],
    device: torch.device,
) -> Encode:
    """What answers inputs with the outputs of a plugin's tensors, or of ratio 1 for config None.

    Args:
        backbone: Whose tokenizer and limit hold.
        model: Its weights, on `device`.
    """
    plugin = None if config is None else compression(config, tensors)

    def run(rows: Sequence[Row]) -> dict[str, Tensor]:
        batch = batch_of(rows, backbone.token_types).to(device)
        hidden = model.encoder(batch.ids, batch.mask, batch.types, plugin)
        return dict(zip(OUTPUTS[backbone.task], model.head(hidden, batch.mask.float()), strict=True))

    def encode(inputs: Sequence[Input]) -> Outputs:
        rows = tokenise(backbone, inputs)
        lengths = [len(row.ids) for row in rows]
        order = sorted(range(len(rows)), key=lengths.__getitem__)
        outputs: Outputs = {}
        while order:
            part = order[: fitting((lengths[index] for index in order), TOKENS_PER_RUN)]
            order = order[len(part) :]
            with torch.no_grad():
                found = run([rows[index] for index in part])
            for name, values in found.items():
                place(outputs, name, values.float().cpu().numpy(), part, lengths)
        return outputs

    return encode


def writing(backbone: Backbone, encode: Encode) -> Write:
    """What writes answers with transformers' own decoder, greedily, to what `encode` makes of the inputs."""
    from transformers import GenerationConfig
    from transformers.modeling_outputs import BaseModelOutput

    special, original = backbone.special, copy.copy(backbone.original)
    assert original is not None
    original.generation_config = GenerationConfig(  # no penalties and the like, which a bundle does not have either
        decoder_start_token_id=special.start, eos_token_id=list(special.ends), pad_token_id=special.pad
    )

    def write(inputs: Sequence[Input]) -> list[str]:
        rows, texts = tokenise(backbone, inputs), list[str]()
        for start in range(0, len(rows), ROWS_WRITTEN):
            part = rows[start : start + ROWS_WRITTEN]
            hidden = torch.from_numpy(encode(part)["last_hidden_state"])
            found = original.generate(
                encoder_outputs=BaseModelOutput(hidden),
                attention_mask=batch_of(part, False).mask,
                max_new_tokens=LONGEST_WRITTEN,
                num_beams=1,
                do_sample=False,
            )
            texts += backbone.tokenizer.batch_decode(found, skip_special_tokens=True)
        return texts

    return write


def answering(backbone: Backbone, plugin: Plugin | None) -> Encode:
    """What answers inputs with a plugin file's tensors in fp32, or with ratio 1 for None."""
    tensors = {name: torch.tensor(value) for name, value in plugin.tensors.items()} if plugin else {}
    config = plugin.config if plugin else None
    return student(backbone, backbone.model, config, tensors, torch.device("cpu"))


def tokenise(backbone: Backbone, inputs: Sequence[Input]) -> list[Row]:
    """Inputs as token ids, cut at the model's limit."""
    return [value if isinstance(value, Row) else _tokenised(backbone, value) for value in inputs]


def _tokenised(backbone: Backbone, value: Input) -> Row:
    if isinstance(value, Row | np.ndarray):
        raise InputError("a picture for a model that reads texts", valid="texts, or token ids")
    texts = (value,) if isinstance(value, str) else value
    if isinstance(texts, tuple) and backbone.prompt is not None:
        texts = (backbone.prompt.fill(texts),)
    if not isinstance(texts, tuple):
        ids = [int(str(i)) for i in texts][: backbone.max_length]
        return Row(ids, [0] * len(ids))
    encoding = backbone.tokenizer(*texts, truncation=True, max_length=backbone.max_length, return_token_type_ids=True)
    return Row(encoding["input_ids"], encoding["token_type_ids"])
