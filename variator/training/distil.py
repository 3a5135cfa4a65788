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
from variator.toolkit.plugin import compression
from variator.toolkit.plugin_format import Key, PluginConfig
from variator.training.batch import Batch
from variator.training.objective import Losses, Weights, label_loss, normalised_error, output_terms

DECODED = 64
"""Most tokens of each text that a decoder writes again."""


@dataclass(frozen=True)
class Teacher:
    """What students are pulled to.

    Args:
        model: The frozen backbone, which computes the students, too.
        task: A key of `toolkit.heads.OUTPUTS`.
        weights: Of the loss's terms.
        decoder: Of task seq2seq: it writes the text that the encoder read, and its hidden states count, too (the
            paper's section 3.3).
        start: Token that it starts with.
    """

    model: Model
    task: str
    weights: Weights
    decoder: Decoder | None = None
    start: int = 0

    def decoded(self, batch: Batch, hidden: Tensor) -> Tensor:
        """The decoder's last hidden states [batch, T, d], T at most `DECODED`, by the encoder's [batch, S, d]."""
        assert self.decoder is not None
        (read,) = self.model.head(hidden, batch.mask.float())
        ids = batch.ids[:, : min(DECODED, batch.ids.shape[1]) - 1]
        ids = torch.cat([ids.new_full((len(batch.ids), 1), self.start), ids], dim=1)
        return self.decoder.start(ids, batch.mask.sum(dim=1), read)


def distil_step(
    teacher: Teacher, configs: Sequence[PluginConfig], tensors: Mapping[Key, Mapping[str, Tensor]], batch: Batch
) -> dict[Key, Losses]:
    """One pass of the teacher, then forward and backward of each student; the gradients are left in the tensors.

    Args:
        tensors: By setting, by name.
    """
    model, mask = teacher.model, batch.mask.float()
    with torch.no_grad():
        targets: list[Tensor] = []
        hidden = model.encoder(batch.ids, batch.mask, batch.types, states=targets)
        wanted = model.head(hidden, mask)
        written = teacher.decoded(batch, hidden) if teacher.decoder is not None else None
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
    written: Tensor | None,
) -> Losses:
    model, weights, mask = teacher.model, teacher.weights, batch.mask.float()
    states: list[Tensor] = []
    hidden = model.encoder(batch.ids, batch.mask, batch.types, compression(config, tensors), states)
    outputs = model.head(hidden, mask)
    layers = torch.stack([normalised_error(ours, theirs, mask) for ours, theirs in zip(states, targets, strict=True)])
    terms = output_terms(teacher.task, outputs, wanted, mask)
    if written is not None:
        ours = teacher.decoded(batch, hidden)
        terms["decoder"] = normalised_error(ours, written, mask[:, : ours.shape[1]])
    if batch.labels:
        terms["task"] = label_loss(teacher.task, outputs, batch.labels, mask)
    total = weights.hidden * layers.mean() + sum(getattr(weights, name) * term for name, term in terms.items())
    total.backward()
    return Losses(total.detach(), layers.detach(), {name: term.detach() for name, term in terms.items()})
