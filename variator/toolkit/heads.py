"""Task heads: from last hidden states to what a request gets back.

Read from the checkpoint by `toolkit.checkpoint`; run behind the encoder in `toolkit.checkpoint.Model`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from variator.errors import BackboneError
from variator.toolkit.encoder import Linear
from variator.toolkit.plugin import ACTIVATIONS, MASKED

OUTPUTS: dict[str, tuple[str, ...]] = {
    "embed": ("embedding",),
    "classify": ("logits",),
    "qa": ("start_logits", "end_logits"),
    "hidden": ("last_hidden_state",),
}
"""Task -> names of its outputs, in order."""

POOLINGS = ("cls", "mean", "max", "mean_sqrt_length")


def linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """A `Linear` from torch's [out, in] weight."""
    outputs, inputs = weight.shape
    module = Linear(inputs, outputs, bias=bias is not None)
    module.weight = nn.Parameter(weight.t().contiguous())
    if bias is not None:
        module.bias = nn.Parameter(bias)
    return module


class EmbedHead(nn.Module):
    """sentence-transformers' pooling, optional dense map and optional normalisation."""

    def __init__(self, pooling: str, normalise: bool, dense: Linear | None = None, activation: str = "") -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise BackboneError(f"pooling {pooling!r} is not supported", valid=", ".join(POOLINGS))
        self.pooling, self.normalise, self.dense, self.activation = pooling, normalise, dense, activation

    def forward(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """hidden: [batch, S, d], mask: [batch, S] in its type -> ([batch, d],)."""
        wide = mask.unsqueeze(-1)
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        elif self.pooling == "max":
            pooled = (hidden * wide + (1.0 - wide) * MASKED).amax(dim=1)
        else:
            length = mask.sum(dim=1, keepdim=True).clamp(min=1e-9)
            total = torch.matmul(mask.unsqueeze(1), hidden * wide).squeeze(1)
            pooled = total / (length.sqrt() if self.pooling == "mean_sqrt_length" else length)
        if self.dense is not None:
            pooled = self.dense(pooled)
            pooled = ACTIVATIONS[self.activation](pooled) if self.activation else pooled
        return (F.normalize(pooled, dim=-1),) if self.normalise else (pooled,)


class ClassifyHead(nn.Module):
    """out(activation(dense(first token)))."""

    def __init__(self, dense: Linear, activation: str, output: Linear) -> None:
        super().__init__()
        self.dense, self.activation, self.output = dense, activation, output

    def forward(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """hidden: [batch, S, d] -> ([batch, classes],)."""
        return (self.output(ACTIVATIONS[self.activation](self.dense(hidden[:, 0]))),)


class QaHead(nn.Module):
    """Start and end scores of an answer span."""

    def __init__(self, output: Linear) -> None:
        super().__init__()
        self.output = output

    def forward(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """hidden: [batch, S, d], mask: [batch, S] -> ([batch, S], [batch, S]), very negative on padding."""
        scores = self.output(hidden) + ((1.0 - mask) * MASKED).unsqueeze(-1)
        return scores[..., 0], scores[..., 1]


class HiddenHead(nn.Module):
    """No head: the last hidden states themselves, zero on padding."""

    def forward(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """hidden: [batch, S, d] -> ([batch, S, d],)."""
        return (hidden * mask.unsqueeze(-1),)
