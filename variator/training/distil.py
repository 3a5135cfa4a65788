"""Second stage: distil the backbone into its compressed self, end to end, all ratios from one teacher pass.

The backbone is frozen and is its own teacher at ratio 1; gradients pass through it and end in the plugins. With labels
in the batches (`training.labelled`) the same step is the paper's plugin adaptation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from variator.toolkit.checkpoint import Model
from variator.toolkit.plugin import compression
from variator.toolkit.plugin_format import Key, PluginConfig
from variator.training.batch import Batch
from variator.training.objective import Losses, Weights, label_loss, normalised_error, output_terms


def distil_step(
    model: Model,
    task: str,
    weights: Weights,
    configs: Sequence[PluginConfig],
    tensors: Mapping[Key, Mapping[str, Tensor]],
    batch: Batch,
) -> dict[Key, Losses]:
    """One pass of the teacher, then forward and backward of each student; the gradients are left in the tensors.

    Args:
        task: Of the model, a key of `toolkit.heads.OUTPUTS`.
        tensors: By setting, by name.
    """
    mask = batch.mask.float()
    with torch.no_grad():
        targets: list[Tensor] = []
        hidden = model.encoder(batch.ids, batch.mask, batch.types, states=targets)
        wanted = model.head(hidden, mask)
    return {
        config.key: _student(model, task, weights, config, tensors[config.key], batch, targets, wanted)
        for config in configs
    }


def _student(
    model: Model,
    task: str,
    weights: Weights,
    config: PluginConfig,
    tensors: Mapping[str, Tensor],
    batch: Batch,
    targets: Sequence[Tensor],
    wanted: Sequence[Tensor],
) -> Losses:
    mask = batch.mask.float()
    states: list[Tensor] = []
    hidden = model.encoder(batch.ids, batch.mask, batch.types, compression(config, tensors), states)
    outputs = model.head(hidden, mask)
    layers = torch.stack([normalised_error(ours, theirs, mask) for ours, theirs in zip(states, targets, strict=True)])
    terms = output_terms(task, outputs, wanted, mask)
    if batch.labels:
        terms["task"] = label_loss(task, outputs, batch.labels, mask)
    total = weights.hidden * layers.mean() + sum(getattr(weights, name) * term for name, term in terms.items())
    total.backward()
    return Losses(total.detach(), layers.detach(), {name: term.detach() for name, term in terms.items()})
