"""What a student is pulled to: its teacher's hidden states, the teacher's outputs, a task's labels.

Pure functions over tensors, used by `training.local` and `training.distil`. The hidden-state loss is the paper's
(Variator, section 3.3) for every layer instead of the last; the relational term is that of relational knowledge
distillation (Park et al., CVPR 2019) on cosines; logits are distilled as in Hinton et al. (2015) at temperature 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from variator.errors import InputError
from variator.toolkit.plugin import MASKED

IGNORED = -100
"""In the place of a token that no loss is taken of, as transformers has it."""


@dataclass(frozen=True)
class Weights:
    """Weight of each term of the loss; a term that a model has no output for is left out.

    Args:
        hidden: Error of the hidden states, mean over layers (1.0 is as bad as the mean).
        pooled: 1 - cosine between the student's embedding and the teacher's.
        relational: Mean squared error between the cosines of all pairs in a batch.
        logits: Divergence of the class probabilities, or of the answer positions.
        task: The task's own loss on labels.
        decoder: Error of the decoder's last hidden states, of a model that has one (1.0 is as bad as the mean).
    """

    hidden: float = 1.0
    pooled: float = 5.0
    relational: float = 5.0
    logits: float = 1.0
    task: float = 1.0
    decoder: float = 1.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0.0 <= value < math.inf:
                raise InputError(f"weight {value} of the {name} loss", valid="0 or more")


def normalised_error(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over real tokens, over the target's variance there: 1.0 is as bad as the mean.

    Args:
        output, target: [batch, S, d].
        mask: [batch, S], 1 for tokens and 0 for padding.
    """
    output, target = output.float(), target.float()
    wide, count = mask.unsqueeze(-1), mask.sum()
    mean = (target * wide).sum(dim=(0, 1)) / count
    variance = ((target - mean).square() * wide).sum()
    return ((output - target).square() * wide).sum() / variance.clamp(min=1e-12)


def output_terms(task: str, student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> dict[str, Tensor]:
    """What the outputs of a task are pulled to, by the names of `Weights`.

    Args:
        task: A key of `toolkit.heads.OUTPUTS`.
        student, teacher: Outputs in its order.
        mask: [batch, S], 1 for tokens and 0 for padding.
    """
    if task == "embed":
        ours, theirs = (F.normalize(outputs[0].float(), dim=-1) for outputs in (student, teacher))
        relations = (ours @ ours.T - theirs @ theirs.T).square().mean()
        return {"pooled": 1.0 - (ours * theirs).sum(dim=-1).mean(), "relational": relations}
    if task == "classify" and student[0].shape[-1] == 1:
        return {"logits": F.mse_loss(student[0].float(), teacher[0].float())}
    if task == "classify":
        return {"logits": divergence(student[0], teacher[0])}
    if task == "qa":
        padding = (1.0 - mask) * MASKED
        pairs = zip(student, teacher, strict=True)
        return {"logits": sum((divergence(s + padding, t + padding) for s, t in pairs), torch.zeros(())) / 2}
    return {}


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Kullback-Leibler divergence of softmax(student) from softmax(teacher), mean over rows: [rows, n] each."""
    ours, theirs = F.log_softmax(student.float(), dim=-1), F.log_softmax(teacher.float(), dim=-1)
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def label_loss(task: str, student: Sequence[Tensor], labels: Mapping[str, Tensor], mask: Tensor) -> Tensor:
    """A task's own loss.

    Args:
        task: A key of `toolkit.heads.OUTPUTS`.
        student: Its outputs.
        labels: `label` [batch] (classes, or a number for one logit); `start` and `end` [batch] (token positions);
            for embeddings `similarity` [batch / 2] in [-1, 1] between row i and row i + batch / 2.
    """
    if task == "embed":
        first, second = F.normalize(student[0].float(), dim=-1).chunk(2)
        return F.mse_loss((first * second).sum(dim=-1), labels["similarity"].float())
    if task == "qa":
        padding = (1.0 - mask) * MASKED
        places = zip(student, (labels["start"], labels["end"]), strict=True)
        return sum((F.cross_entropy((s + padding).float(), at) for s, at in places), torch.zeros(())) / 2
    logits = student[0].float()
    if logits.shape[-1] == 1:
        return F.mse_loss(logits[:, 0], labels["label"].float())
    return F.cross_entropy(logits, labels["label"])


def text_loss(scores: Tensor, text: Tensor) -> Tensor:
    """A written answer's own loss: scores [batch, T, vocabulary], its tokens [batch, T], `IGNORED` behind its end."""
    return F.cross_entropy(scores.float().flatten(0, 1), text.flatten(), ignore_index=IGNORED)


@dataclass(frozen=True)
class Losses:
    """What one student's step cost.

    Args:
        total: What the gradient was taken of, a scalar without gradient.
        layers: [layers] errors of the hidden states, as `normalised_error`.
        terms: The other terms before their weights, scalars, by the names of `Weights`.
    """

    total: Tensor
    layers: Tensor
    terms: Mapping[str, Tensor] = field(default_factory=dict)
