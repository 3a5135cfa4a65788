"""Second stage: distil the backbone into its compressed self, end to end, all ratios from one teacher pass.

The backbone is frozen and is its own teacher at ratio 1; gradients pass through it and end in the plugins. With labels
in the batches (`training.labelled`) the same step is the paper's plugin adaptation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from variator.toolkit.checkpoint import Model
from variator.toolkit.decoder import Decoder
from variator.toolkit.heads import GapHead
from variator.toolkit.plugin import compression
from variator.toolkit.plugin_format import Key, PluginConfig
from variator.training.batch import Batch
from variator.training.objective import (
    IGNORED,
    Losses,
    Weights,
    label_loss,
    normalised_error,
    output_terms,
    text_loss,
)

DECODED = 64
"""Most tokens of each text that a decoder writes again."""

ANSWER = "answer"
"""Label that is a text: its tokens [batch, T], `IGNORED` behind its end."""


@dataclass(frozen=True)
class Teacher:
    """What students are pulled to.

    Args:
        model: The frozen backbone, which computes the students, too.
        task: A key of `toolkit.heads.OUTPUTS`.
        weights: Of the loss's terms.
        decoder: Of task seq2seq: it writes the answer or, without labels, the text that the encoder read, and its
            hidden states count, too (the paper's section 3.3).
        start: Token that it starts with.
    """

    model: Model
    task: str
    weights: Weights
    decoder: Decoder | None = None
    start: int = 0

    def outputs(self, batch: Batch, hidden: Tensor) -> tuple[Sequence[Tensor], tuple[Tensor, Tensor] | None]:
        """The head's outputs by the encoder's last hidden states [batch, S, d]; of a model with a decoder its own, too.

        The latter are [batch, T, d], with which of them count [batch, T].
        """
        mask, head = batch.mask.float(), self.model.head
        if isinstance(head, GapHead):
            states = head.states(hidden, mask)
            return (head.decoder.logits(states),), (states, torch.ones_like(states[..., 0]))
        outputs: tuple[Tensor, ...] = head(hidden, mask)
        if self.decoder is None:
            return outputs, None
        text, counts = batch.ids[:, :DECODED], mask[:, :DECODED]
        if ANSWER in batch.labels:
            text = batch.labels[ANSWER]
            counts = (text != IGNORED).float()
        ids = torch.cat([text.new_full((len(text), 1), self.start), text[:, :-1].clamp(min=0)], dim=1)
        return outputs, (self.decoder.start(ids, batch.mask.sum(dim=1), outputs[0]), counts)


def distil_step(
    teacher: Teacher, configs: Sequence[PluginConfig], tensors: Mapping[Key, Mapping[str, Tensor]], batch: Batch
) -> dict[Key, Losses]:
    """One pass of the teacher, then forward and backward of each student; the gradients are left in the tensors.

    Args:
        tensors: By setting, by name.
    """
    model = teacher.model
    with torch.no_grad():
        targets: list[Tensor] = []
        hidden = batch.through(model.encoder, states=targets)
        wanted, written = teacher.outputs(batch, hidden)
    return {
        config.key: _student(teacher, config, tensors[config.key], batch, targets, wanted, written)
        for config in configs
    }


def _student(
    teacher: Teacher,
    config: PluginConfig,
    tensors: Mapping[str, Tensor],
    batch: Batch,
    targets: Sequence[Tensor],
    wanted: Sequence[Tensor],
    written: tuple[Tensor, Tensor] | None,
) -> Losses:
    model, weights, mask = teacher.model, teacher.weights, batch.mask.float()
    states: list[Tensor] = []
    hidden = batch.through(model.encoder, compression(config, tensors), states)
    outputs, ours = teacher.outputs(batch, hidden)
    layers = torch.stack([normalised_error(ours, theirs, mask) for ours, theirs in zip(states, targets, strict=True)])
    terms = output_terms(teacher.task, outputs, wanted, mask)
    if written is not None and ours is not None:
        terms["decoder"] = normalised_error(ours[0], *written)
    if ANSWER in batch.labels and ours is not None and teacher.decoder is not None:
        terms["task"] = text_loss(teacher.decoder.scores(ours[0]), batch.labels[ANSWER])
    elif batch.labels:
        terms["task"] = label_loss(teacher.task, outputs, batch.labels, mask)
    total = weights.hidden * layers.mean() + sum(getattr(weights, name) * term for name, term in terms.items())
    total.backward()
    return Losses(total.detach(), layers.detach(), {name: term.detach() for name, term in terms.items()})
