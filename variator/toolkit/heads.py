"""Task heads: from last hidden states to what a request gets back.

Read from the checkpoint by `toolkit.checkpoint`; run behind the encoder in `toolkit.checkpoint.Model`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from variator.errors import BackboneError
from variator.toolkit.decoder import Decoder
from variator.toolkit.encoder import Linear
from variator.toolkit.plugin import ACTIVATIONS, MASKED

OUTPUTS: dict[str, tuple[str, ...]] = {
    "embed": ("embedding",),
    "classify": ("logits",),
    "qa": ("start_logits", "end_logits"),
    "hidden": ("last_hidden_state",),
    "seq2seq": ("last_hidden_state",),
}
"""Task -> names of its outputs, in order; of seq2seq those of the encoder, for `toolkit.decoder`."""

POOLINGS = ("cls", "mean", "max", "mean_sqrt_length")


def linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """A `Linear` from torch's [out, in] weight."""
    outputs, inputs = weight.shape
    module = Linear(inputs, outputs, bias=bias is not None)
    module.weight = nn.Parameter(weight.t().contiguous())
    if bias is not None:
        module.bias = nn.Parameter(bias)
    return module


def mean(hidden: Tensor, mask: Tensor, by_root: bool = False) -> Tensor:
    """The tokens' mean, or their sum over the root of their number: [batch, S, d], [batch, S] -> [batch, d]."""
    length = mask.sum(dim=1, keepdim=True).clamp(min=1e-9)
    total = torch.matmul(mask.unsqueeze(1), hidden * mask.unsqueeze(-1)).squeeze(1)
    return total / (length.sqrt() if by_root else length)


class EmbedHead(nn.Module):
    """sentence-transformers' pooling, optional dense map and optional normalisation."""

    def __init__(self, pooling: str, normalise: bool, dense: Linear | None = None, activation: str = "") -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise BackboneError(f"pooling {pooling!r} is not supported", valid=", ".join(POOLINGS))
        self.pooling, self.normalise, self.dense, self.activation = pooling, normalise, dense, activation

    def forward(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """hidden: [batch, S, d], mask: [batch, S] in its type -> ([batch, d],)."""
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        elif self.pooling == "max":
            wide = mask.unsqueeze(-1)
            pooled = (hidden * wide + (1.0 - wide) * MASKED).amax(dim=1)
        else:
            pooled = mean(hidden, mask, self.pooling == "mean_sqrt_length")
        if self.dense is not None:
            pooled = self.dense(pooled)
            pooled = ACTIVATIONS[self.activation](pooled) if self.activation else pooled
        return (F.normalize(pooled, dim=-1),) if self.normalise else (pooled,)


class ClassifyHead(nn.Module):
    """out(norm(activation(dense(first token)))), or of the mean of all; a norm only where the model has one."""

    def __init__(
        self, dense: Linear, activation: str, output: Linear, norm: nn.LayerNorm | None = None, pooling: str = "cls"
    ) -> None:
        super().__init__()
        self.dense, self.activation, self.output, self.norm, self.pooling = dense, activation, output, norm, pooling

    def forward(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """hidden: [batch, S, d], mask: [batch, S] in its type -> ([batch, classes],)."""
        pooled = hidden[:, 0] if self.pooling == "cls" else mean(hidden, mask)
        y = ACTIVATIONS[self.activation](self.dense(pooled))
        return (self.output(y if self.norm is None else self.norm(y)),)


class QaHead(nn.Module):
    """Start and end scores of an answer span."""

    def __init__(self, output: Linear) -> None:
        super().__init__()
        self.output = output

    def forward(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """hidden: [batch, S, d], mask: [batch, S] -> ([batch, S], [batch, S]), very negative on padding."""
        scores = self.output(hidden) + ((1.0 - mask) * MASKED).unsqueeze(-1)
        return scores[..., 0], scores[..., 1]


class GapHead(nn.Module):
    """A decoder that knows two tokens, the start and a gap's mark, and as many words as there are classes.

    Args:
        decoder: Whose embedding table holds the two, and whose vocabulary the words; see `toolkit.prompt`.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """hidden: [batch, S, d], mask: [batch, S] in its type -> ([batch, classes],)."""
        return (self.decoder.logits(self.states(hidden, mask)),)

    def states(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """The decoder's last hidden states at both tokens, [batch, 2, d]."""
        ids = torch.arange(2, device=hidden.device).expand(hidden.shape[0], 2)
        return self.decoder.start(ids, mask.sum(dim=1).to(torch.int64), hidden * mask.unsqueeze(-1))


class HiddenHead(nn.Module):
    """No head: the last hidden states themselves, zero on padding."""

    def forward(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """hidden: [batch, S, d] -> ([batch, S, d],)."""
        return (hidden * mask.unsqueeze(-1),)
