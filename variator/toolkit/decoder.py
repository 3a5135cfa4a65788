"""The canonical decoder: T5's, as one graph that starts a text and goes on with it.

It is not compressed, and the same for all ratios. What it has computed comes back in with the next token: `past` for
the text, `cross` for what the encoder read. Both lie as [batch, tokens, layers x (keys, values)], so that rows are
taken, repeated and reordered as wholes. The first step brings the encoder's hidden states and empty memories, later
ones the memories and no hidden states: what has no rows costs nothing, and what is known is not handed out again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from variator.toolkit.encoder import EncoderConfig, FeedForward, Linear, norm
from variator.toolkit.plugin import MASKED
from variator.toolkit.positions import RelativeBias, masked_scores

INPUTS = ("input_ids", "lengths", "hidden", "cross", "past")
"""Of the decoder's graph: the next tokens int64 [batch, T]; how many tokens of the encoder each row has, int64 [batch];
the encoder's hidden states that are new [batch, N, d]; what is known of those that came before [batch, M, width]; and
what is known of the text so far [batch, P, width]. At the start M = P = 0, afterwards N = 0."""

OUTPUTS = ("logits", "present", "crossed")
"""Scores of the token that follows [batch, vocabulary]; `past` [batch, P + T, width] for the next step; and what is to
come behind `cross` then [batch, N, width]."""


def cache_width(config: EncoderConfig) -> int:
    """Numbers per token that `cross` and `past` hold: keys and values of all layers of the decoder."""
    return 2 * config.layers * config.attention_size


def attend(query: Tensor, keys: Tensor, values: Tensor, scores: Tensor, heads: int) -> Tensor:
    """[batch, T, size], twice [batch, n, size], and what is added to the scores -> [batch, T, size]."""
    batch, _, size = query.shape

    def split(t: Tensor) -> Tensor:
        return t.reshape(batch, -1, heads, size // heads)

    found = torch.matmul(split(query).permute(0, 2, 1, 3), split(keys).permute(0, 2, 3, 1)) + scores
    joined = torch.matmul(torch.softmax(found, dim=-1), split(values).permute(0, 2, 1, 3))
    return joined.permute(0, 2, 1, 3).reshape(batch, -1, size)


class TextAttention(nn.Module):
    """Attention to the text so far."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        d, size = config.hidden_size, config.attention_size
        self.heads = config.heads
        self.query, self.key, self.value = (Linear(d, size, bias=False) for _ in range(3))
        self.output = Linear(size, d, bias=False)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: [batch, T, d], past keys and values [batch, P, size] -> [batch, T, d], and keys and values of x."""
        key, value = self.key(x), self.value(x)
        keys, values = key, value
        if past is not None:
            keys, values = torch.cat([past[0], key], dim=1), torch.cat([past[1], value], dim=1)
        return self.output(attend(self.query(x), keys, values, scores, self.heads)), key, value


class CrossAttention(nn.Module):
    """Attention to the encoder: to what is known of it, keys beside values, and to hidden states that are new."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        d, self.size = config.hidden_size, config.attention_size
        self.heads = config.heads
        self.query = Linear(d, self.size, bias=False)
        self.memory = Linear(d, 2 * self.size, bias=False)
        self.output = Linear(self.size, d, bias=False)

    def forward(self, x: Tensor, known: Tensor | None, hidden: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """x [batch, T, d], known [batch, M, 2 size], hidden [batch, N, d] -> [batch, T, d] and [batch, N, 2 size]."""
        new = self.memory(hidden)
        cross = new if known is None else torch.cat([known, new], dim=1)
        keys, values = cross[..., : self.size], cross[..., self.size :]
        return self.output(attend(self.query(x), keys, values, scores, self.heads)), new


class DecoderLayer(nn.Module):
    """Attention to the text so far, to the encoder, and the FFN, each behind its norm."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.attention, self.attention_cross, self.ffn = (
            TextAttention(config),
            CrossAttention(config),
            FeedForward(config),
        )
        self.attention_norm, self.cross_norm, self.ffn_norm = norm(config), norm(config), norm(config)

    def forward(
        self,
        x: Tensor,
        past: tuple[Tensor, Tensor] | None,
        known: Tensor | None,
        hidden: Tensor,
        scores: Tensor,
        cross_scores: Tensor,
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """x: [batch, T, d] -> the same; for later tokens its keys and values, and those of the encoder."""
        y, key, value = self.attention(self.attention_norm(x), past, scores)
        x = x + y
        y, memory = self.attention_cross(self.cross_norm(x), known, hidden, cross_scores)
        x = x + y
        return x + self.ffn(self.ffn_norm(x)), [key, value], memory


class Decoder(nn.Module):
    """Tokens in, scores of the next one out.

    Args:
        config: Sizes of the decoder, as of an encoder with relative biases.
        token: The embedding table, which the encoder shares.
        output: What hidden states are multiplied with, [d, vocabulary]; None is the embedding table itself.
        scale: Of the hidden states in front of it.
    """

    def __init__(self, config: EncoderConfig, token: nn.Embedding, output: nn.Parameter | None, scale: float) -> None:
        super().__init__()
        self.config, self.scale = config, scale
        self.token = token
        self.relation = RelativeBias(config.reach, config.heads)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.final_norm = norm(config)
        self.vocabulary = output

    def forward(
        self, input_ids: Tensor, lengths: Tensor, hidden: Tensor, cross: Tensor, past: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `INPUTS` and `OUTPUTS`."""
        states, present, crossed = self.states(input_ids, lengths, hidden, cross, past)
        return self.logits(states), present, crossed

    def start(self, input_ids: Tensor, lengths: Tensor, hidden: Tensor) -> Tensor:
        """Last hidden states [batch, T, d] of a text from its beginning, nothing kept."""
        states: Tensor = self.final_norm(self._through(self.begin(input_ids, lengths, hidden)).x)
        return states

    def states(
        self, input_ids: Tensor, lengths: Tensor, hidden: Tensor, cross: Tensor, past: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments as `INPUTS` -> last hidden states [batch, T, d], and the memories for the next step."""
        return self.end(self._through(self.begin(input_ids, lengths, hidden, cross, past)))

    def _through(self, walk: DecoderWalk) -> DecoderWalk:
        for index, layer in enumerate(cast("Iterable[DecoderLayer]", self.layers)):
            walk.through(index, layer)
        return walk

    def begin(
        self,
        input_ids: Tensor,
        lengths: Tensor,
        hidden: Tensor,
        cross: Tensor | None = None,
        past: Tensor | None = None,
    ) -> DecoderWalk:
        """Everything in front of the layers; arguments as `INPUTS`."""
        batch, count = input_ids.shape
        before = 0 if past is None else past.shape[1]
        layers, size = self.config.layers, self.config.attention_size
        x = self.token(input_ids)
        places = torch.arange(before + count, device=x.device)
        between = places[None, :] - (before + torch.arange(count, device=x.device))[:, None]
        scores = self.relation(between) + (between > 0).to(x.dtype) * MASKED
        source = hidden.shape[1] + (0 if cross is None else cross.shape[1])
        read = torch.arange(source, device=x.device)[None, :] < lengths[:, None]
        cached = None if past is None else past.reshape(batch, before, layers, 2, size)
        known = None if cross is None else cross.reshape(batch, cross.shape[1], layers, 2 * size)
        return DecoderWalk(x, past, cached, known, hidden, scores, masked_scores(read.to(x.dtype)), [], [])

    def end(self, walk: DecoderWalk) -> tuple[Tensor, Tensor, Tensor]:
        """Everything behind the layers: see `states`."""
        states: Tensor = self.final_norm(walk.x)
        made = torch.cat(walk.made, dim=-1)
        present = made if walk.past is None else torch.cat([walk.past, made], dim=1)
        return states, present, torch.cat(walk.crossed, dim=-1)

    def logits(self, states: Tensor) -> Tensor:
        """Last hidden states [batch, T, d] -> scores of what follows the last of them, [batch, vocabulary]."""
        return self.scores(states[:, -1])

    def scores(self, states: Tensor) -> Tensor:
        """[..., d] -> [..., vocabulary]."""
        table = self.token.weight.t() if self.vocabulary is None else self.vocabulary
        return torch.matmul(states * self.scale, table)


@dataclass
class DecoderWalk:
    """Tokens on their way through the layers, with what these attend to."""

    x: Tensor
    past: Tensor | None
    cached: Tensor | None
    known: Tensor | None
    hidden: Tensor
    scores: Tensor
    cross_scores: Tensor
    made: list[Tensor]
    crossed: list[Tensor]

    def through(self, index: int, layer: DecoderLayer) -> None:
        """The next layer."""
        past = None if self.cached is None else (self.cached[:, :, index, 0], self.cached[:, :, index, 1])
        known = None if self.known is None else self.known[:, :, index]
        self.x, made, memory = layer(self.x, past, known, self.hidden, self.scores, self.cross_scores)
        self.made += made
        self.crossed.append(memory)
