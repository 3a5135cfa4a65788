"""The canonical encoder: one post-norm Transformer that every BERT-like family is loaded into.

Families (`toolkit.families`) only rename tensors; training, export and the reference for the numeric gate all
run this module, so what is trained is what is exported. It is written the way CPU runtimes run it fastest:
weights lie as [in, out], the attention scale is folded into the query, the key bias (which a softmax over
keys cancels) and the value bias (which it passes through to the output bias) are gone, see `fold_attention`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from variator.toolkit.plugin import ACTIVATIONS, MASKED, Compression, LayerPlugin, compressed_ffn, compressed_memory


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of an encoder, in the field's usual names.

    Args:
        embedding_size: Width of the embedding tables; where it differs from `hidden_size` (ELECTRA) a
            projection follows.
        max_length: Longest sequence in tokens, the rows of the position table that tokens use.
        token_types: Rows of the token-type table, 0 without one.
        activation: Of the FFN, a key of `toolkit.plugin.ACTIVATIONS`.
    """

    vocabulary: int
    embedding_size: int
    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    activation: str
    max_length: int
    token_types: int
    norm_eps: float


class Linear(nn.Module):
    """x W + b with W stored as [in, out], the layout ONNX MatMul reads without a transpose."""

    bias: nn.Parameter | None

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.matmul(x, self.weight)
        return y if self.bias is None else y + self.bias


class FeedForward(nn.Module):
    """The FFN of one layer: [..., d] -> [..., d]."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.inner = Linear(config.hidden_size, config.intermediate_size)
        self.outer = Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.outer(self.activation(self.inner(x)))
        return y


class Attention(nn.Module):
    """Multi-head self-attention over the full sequence."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.heads = config.heads
        self.query = Linear(d, d)
        self.key = Linear(d, d, bias=False)
        self.value = Linear(d, d, bias=False)
        self.output = Linear(d, d)

    def forward(self, x: Tensor, scores_mask: Tensor, memory: Tensor | None = None) -> Tensor:
        """Queries are per token; keys and values are those of `memory`, of `x` itself without.

        Args:
            x: [batch, S, d].
            scores_mask: [batch, 1, 1, n] of the keys, 0 on tokens and very negative on padding.
            memory: [batch, n, d] compressed groups of the keys/values site.
        """
        source = x if memory is None else memory
        batch, _, d = x.shape

        def split(t: Tensor) -> Tensor:
            return t.reshape(batch, -1, self.heads, d // self.heads)

        query = split(self.query(x)).permute(0, 2, 1, 3)
        key = split(self.key(source)).permute(0, 2, 3, 1)
        value = split(self.value(source)).permute(0, 2, 1, 3)
        weights = torch.softmax(torch.matmul(query, key) + scores_mask, dim=-1)
        context = torch.matmul(weights, value).permute(0, 2, 1, 3).reshape(batch, -1, d)
        y: Tensor = self.output(context)
        return y


class Layer(nn.Module):
    """One post-norm layer; the plugin's sites sit where the method puts them."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.ffn = FeedForward(config)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)

    def attend(self, x: Tensor, scores_mask: Tensor, memory: Tensor | None = None) -> Tensor:
        """The part in front of the FFN site: [batch, S, d] -> [batch, S, d]; arguments as `Attention.forward`."""
        y: Tensor = self.attention_norm(x + self.attention(x, scores_mask, memory))
        return y

    def finish(self, x: Tensor, y: Tensor) -> Tensor:
        """Residual and norm behind the FFN site."""
        z: Tensor = self.ffn_norm(x + y)
        return z

    def forward(self, x: Tensor, mask: Tensor, scores_mask: Tensor, plugin: LayerPlugin, activation: str) -> Tensor:
        if "kv" in plugin:
            memory, memory_mask = compressed_memory(x, mask, plugin["kv"], activation)
            x = self.attend(x, memory_mask, memory)
        else:
            x = self.attend(x, scores_mask)
        y = compressed_ffn(x, mask, self.ffn, plugin["ffn"], activation) if "ffn" in plugin else self.ffn(x)
        return self.finish(x, y)


class Embeddings(nn.Module):
    """Token, position and token-type embeddings, norm, and ELECTRA's projection."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.token = nn.Embedding(config.vocabulary, config.embedding_size)
        self.position = nn.Embedding(config.max_length, config.embedding_size)
        self.token_type = nn.Embedding(config.token_types, config.embedding_size) if config.token_types else None
        self.norm = nn.LayerNorm(config.embedding_size, eps=config.norm_eps)
        wide = config.embedding_size != config.hidden_size
        self.project = Linear(config.embedding_size, config.hidden_size) if wide else None

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """input_ids, token_type_ids: int64 [batch, S] -> [batch, S, d]. Padding of S beyond the table is clamped."""
        length = input_ids.shape[1]
        positions = torch.arange(length, device=input_ids.device).clamp(max=self.position.num_embeddings - 1)
        x = self.token(input_ids) + self.position(positions)
        if self.token_type is not None:
            x = x + (self.token_type.weight[0] if token_type_ids is None else self.token_type(token_type_ids))
        y: Tensor = self.norm(x)
        if self.project is not None:
            y = self.project(y)
        return y


class Encoder(nn.Module):
    """Embeddings and layers. Its state dict, in this order, is what a backbone fingerprint hashes."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))

    @property
    def blocks(self) -> Iterable[Layer]:
        """The layers, typed."""
        return cast("Iterable[Layer]", self.layers)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        plugin: Compression | None = None,
        states: list[Tensor] | None = None,
    ) -> Tensor:
        """Run the encoder, with a plugin or without.

        Args:
            input_ids: int64 [batch, S], any S >= 1; padding on the right, of any token id.
            attention_mask: int64 [batch, S], 1 for tokens and 0 for padding.
            token_type_ids: int64 [batch, S], or None where all are 0.
            plugin: None is ratio 1. With one, S is padded up to its multiple once here and cut off at the end.
            states: If given, every layer's output is appended: [batch, S, d] each.

        Returns:
            [batch, S, d] last hidden states.
        """
        length = input_ids.shape[1]
        lead = plugin.lead if plugin else 0
        if plugin is not None:
            multiple = plugin.multiple
            extra = (length + lead + multiple - 1) // multiple * multiple - length - lead
            input_ids, attention_mask = F.pad(input_ids, (0, extra)), F.pad(attention_mask, (0, extra))
            token_type_ids = None if token_type_ids is None else F.pad(token_type_ids, (0, extra))
        x: Tensor = self.embeddings(input_ids, token_type_ids)
        mask = attention_mask.to(x.dtype)
        if lead:  # behind the embeddings: positions count from the first token
            x, mask = F.pad(x, (0, 0, lead, 0)), F.pad(mask, (lead, 0))
        scores_mask = masked_scores(mask)
        for index, layer in enumerate(self.blocks):
            sites, activation = (plugin.sites(index), plugin.activation) if plugin else ({}, "")
            x = layer(x, mask, scores_mask, sites, activation)
            if states is not None:
                states.append(x[:, lead : lead + length])
        return x if plugin is None else x[:, lead : lead + length]


def masked_scores(mask: Tensor) -> Tensor:
    """mask [batch, S] -> what attention scores get added [batch, 1, 1, S]: 0 on tokens, very negative on padding."""
    return ((1.0 - mask) * MASKED)[:, None, None, :]


def fold_attention(weights: Mapping[str, Tensor], heads: int) -> dict[str, Tensor]:
    """Turn the usual eight attention tensors into the six this module keeps; exact in real arithmetic.

    softmax_j((q + b_q)(k_j + b_k) / sqrt(h)): the term (q + b_q) b_k is the same for every key, so the softmax
    drops it; the weights sum to 1, so b_v reaches the output as W_o b_v; the scale goes into W_q and b_q.

    Args:
        weights: `query`, `key`, `value`, `output` with `.weight` [out, in] and `.bias` [out], as torch stores them.
        heads: Number of attention heads.
    """
    scale = (weights["query.weight"].shape[0] // heads) ** -0.5
    output = weights["output.weight"]
    return {
        "query.weight": (weights["query.weight"] * scale).t().contiguous(),
        "query.bias": weights["query.bias"] * scale,
        "key.weight": weights["key.weight"].t().contiguous(),
        "value.weight": weights["value.weight"].t().contiguous(),
        "output.weight": output.t().contiguous(),
        "output.bias": weights["output.bias"] + output @ weights["value.bias"],
    }
