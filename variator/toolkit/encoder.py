"""The canonical encoder: one Transformer that every family is loaded into.

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

from variator.errors import InputError
from variator.toolkit.bundle import Picture
from variator.toolkit.plugin import ACTIVATIONS, Compression, LayerPlugin, compressed_ffn, compressed_memory
from variator.toolkit.plugin_format import MAX_RATIO, PluginConfig
from variator.toolkit.positions import (
    Context,
    RelativeBias,
    RelativePairs,
    Rotary,
    distances,
    local_scores,
    masked_scores,
    turned,
)

RELATIONS = ("", "bias", "pairs", "rotary")
"""What attention is told about pairs of tokens: nothing, a bias per distance, embeddings of distances, a rotation."""


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes and kind of an encoder, in the field's usual names. The defaults of the kind are BERT's.

    Args:
        embedding_size: Width of the embedding tables; where it differs from `hidden_size` (ELECTRA) a
            projection follows.
        activation: Of the FFN, a key of `toolkit.plugin.ACTIVATIONS`.
        max_length: Longest sequence in tokens: the rows of the position table that tokens use, where there is one.
        token_types: Rows of the token-type table, 0 without one.
        head_size: Of the attention; 0 for the hidden size over the heads.
        norm_first: Whether norms stand in front of attention and FFN, one more behind the last, instead of behind.
        rms: Whether norms only scale (RMSNorm).
        attention_bias, ffn_bias, norm_bias: Whether these have biases.
        gated: Whether the FFN is outer(activation(gate(x)) inner(x)) instead of outer(activation(inner(x))).
        positions: Whether there is a table of positions, added to the embeddings.
        embedding_norm: Whether a norm follows the embeddings.
        first_norm: Whether the first layer has a norm in front of its attention (`norm_first`).
        relation: One of `RELATIONS`.
        reach: Largest distance that `bias` and `pairs` tell apart.
        relative_rows: Embeddings of distances, for `pairs`.
        thetas: Base of the frequencies by layer, for `rotary`.
        windows: How far a token sees on either side, by layer, 0 for everywhere; empty for all.
        picture: For models that read pictures: patches are the sequence, and there is no vocabulary.
        final_norm: Whether a norm follows the last layer (`norm_first`).
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
    head_size: int = 0
    norm_first: bool = False
    rms: bool = False
    attention_bias: bool = True
    ffn_bias: bool = True
    norm_bias: bool = True
    gated: bool = False
    positions: bool = True
    embedding_norm: bool = True
    first_norm: bool = True
    relation: str = ""
    reach: int = 0
    relative_rows: int = 0
    thetas: tuple[float, ...] = ()
    windows: tuple[int, ...] = ()
    picture: Picture | None = None
    final_norm: bool = True

    @property
    def attention_size(self) -> int:
        """Width of queries, keys and values, all heads together."""
        return self.heads * self.head_size if self.head_size else self.hidden_size

    @property
    def key_bias(self) -> bool:
        """Whether the key bias matters: where a position meets the key, it is not the same for every key."""
        return self.attention_bias and self.relation in ("pairs", "rotary")

    def check(self, plugin: PluginConfig) -> None:
        """Raise `InputError` unless a plugin can be put into this encoder."""
        if plugin.keys_values > 1 and (self.relation or any(self.windows)):
            raise InputError(
                f"setting {plugin.key!r} merges keys and values, whose positions this encoder's attention needs",
                valid="plugins on the FFN alone for models with relative or rotary positions, or local attention",
            )


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


class RmsNorm(nn.Module):
    """x / rms(x) w (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(dim=-1, keepdim=True) + self.eps) * self.weight


def norm(config: EncoderConfig, size: int = 0) -> nn.Module:
    """A norm of the encoder's kind over the hidden size, or another."""
    size = size or config.hidden_size
    return RmsNorm(size, config.norm_eps) if config.rms else nn.LayerNorm(size, config.norm_eps, bias=config.norm_bias)


class FeedForward(nn.Module):
    """The FFN of one layer: [..., d] -> [..., d]."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.inner = Linear(config.hidden_size, config.intermediate_size, config.ffn_bias)
        self.gate = Linear(config.hidden_size, config.intermediate_size, config.ffn_bias) if config.gated else None
        self.outer = Linear(config.intermediate_size, config.hidden_size, config.ffn_bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        inner = self.inner(x)
        y: Tensor = self.outer(self.activation(inner) if self.gate is None else self.activation(self.gate(x)) * inner)
        return y


class Attention(nn.Module):
    """Multi-head self-attention over the full sequence."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        d, size = config.hidden_size, config.attention_size
        self.heads = config.heads
        self.query = Linear(d, size, config.attention_bias)
        self.key = Linear(d, size, config.key_bias)
        self.value = Linear(d, size, bias=False)
        self.output = Linear(size, d, config.attention_bias)
        if config.relation == "pairs":
            shape = (config.heads, size // config.heads, config.relative_rows)
            self.relative_key = nn.Parameter(torch.empty(shape))
            self.relative_query = nn.Parameter(torch.empty(shape).transpose(1, 2))

    def forward(self, x: Tensor, context: Context, memory: Tensor | None = None) -> Tensor:
        """Queries are per token; keys and values are those of `memory`, of `x` itself without.

        Args:
            x: [batch, S, d].
            context: Of the keys.
            memory: [batch, n, d] compressed groups of the keys/values site.
        """
        source = x if memory is None else memory
        batch = x.shape[0]

        def split(t: Tensor) -> Tensor:
            return t.reshape(batch, -1, self.heads, t.shape[-1] // self.heads)

        query = split(self.query(x)).permute(0, 2, 1, 3)
        key = split(self.key(source)).permute(0, 2, 3, 1)
        if context.rotary is not None:
            query = turned(query, context.rotary)
            key = turned(key.transpose(2, 3), context.rotary).transpose(2, 3)
        value = split(self.value(source)).permute(0, 2, 1, 3)
        scores = torch.matmul(query, key) + context.scores
        if context.pairs is not None:
            scores = scores + self.disentangled(query, key, context.pairs)
        joined = torch.matmul(torch.softmax(scores, dim=-1), value).permute(0, 2, 1, 3)
        y: Tensor = self.output(joined.reshape(batch, -1, joined.shape[2] * joined.shape[3]))
        return y

    def disentangled(self, query: Tensor, key: Tensor, pairs: Tensor) -> Tensor:
        """Content to position and position to content (He et al., DeBERTa, arXiv 2006.03654, equation 4).

        Args:
            query, key: [batch, heads, S, h] and [batch, heads, h, S].
            pairs: [S, S] row of the relative embeddings by (query, key).

        Returns:
            [batch, heads, S, S].
        """
        rows = pairs.expand(query.shape[0], self.heads, -1, -1)
        to_position = torch.gather(torch.matmul(query, self.relative_key), 3, rows)
        to_content = torch.gather(torch.matmul(self.relative_query, key), 2, rows)
        return to_position + to_content


class Layer(nn.Module):
    """One layer; the plugin's sites sit where the method puts them."""

    def __init__(self, config: EncoderConfig, first: bool = False) -> None:
        super().__init__()
        self.norm_first = config.norm_first
        self.attention = Attention(config)
        self.attention_norm = nn.Identity() if first and not config.first_norm else norm(config)
        self.ffn = FeedForward(config)
        self.ffn_norm = norm(config)

    def read(self, x: Tensor) -> Tensor:
        """What the attention, and its keys/values site, reads: [batch, S, d] -> the same."""
        y: Tensor = self.attention_norm(x) if self.norm_first else x
        return y

    def attend(self, x: Tensor, context: Context, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The part in front of the FFN site: [batch, S, d] -> what goes past it, and what it reads.

        Other arguments as `Attention.forward`.
        """
        if self.norm_first:
            x = x + self.attention(self.read(x), context, memory)
            return x, self.ffn_norm(x)
        x = self.attention_norm(x + self.attention(x, context, memory))
        return x, x

    def finish(self, x: Tensor, y: Tensor) -> Tensor:
        """Residual, and norm where it is behind, with what the FFN site gave."""
        z: Tensor = x + y if self.norm_first else self.ffn_norm(x + y)
        return z

    def forward(self, x: Tensor, mask: Tensor, context: Context, plugin: LayerPlugin, activation: str) -> Tensor:
        if "kv" in plugin:
            memory, memory_mask = compressed_memory(self.read(x), mask, plugin["kv"], activation)
            x, read = self.attend(x, Context(memory_mask), memory)
        else:
            x, read = self.attend(x, context)
        y = compressed_ffn(read, mask, self.ffn, plugin["ffn"], activation) if "ffn" in plugin else self.ffn(read)
        return self.finish(x, y)


class Embeddings(nn.Module):
    """Token embeddings with those of positions and token types, norm and projection where the model has them."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        size = config.embedding_size
        self.token = nn.Embedding(config.vocabulary, size)
        self.position = nn.Embedding(config.max_length, size) if config.positions else None
        self.token_type = nn.Embedding(config.token_types, size) if config.token_types else None
        self.norm = norm(config, size) if config.embedding_norm else None
        self.project = Linear(size, config.hidden_size) if size != config.hidden_size else None

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """input_ids, token_type_ids: int64 [batch, S] -> [batch, S, d]. Padding of S beyond the table is clamped."""
        x: Tensor = self.token(input_ids)
        if self.position is not None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)
            x = x + self.position(positions.clamp(max=self.position.num_embeddings - 1))
        if self.token_type is not None:
            x = x + (self.token_type.weight[0] if token_type_ids is None else self.token_type(token_type_ids))
        if self.norm is not None:
            x = self.norm(x)
        if self.project is not None:
            x = self.project(x)
        return x


class PictureEmbeddings(nn.Module):
    """Patches of a picture as vectors, each with its place; a class token first where the model has one."""

    def __init__(self, config: EncoderConfig, picture: Picture) -> None:
        super().__init__()
        self.picture = picture
        self.project = Linear(picture.channels * picture.patch**2, config.hidden_size, bias=False)
        self.place = nn.Parameter(torch.empty(picture.patches, config.hidden_size))
        self.first = nn.Parameter(torch.empty(1, config.hidden_size)) if picture.token else None
        self.norm = norm(config) if config.embedding_norm else None

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[batch, channels, size, size] -> [batch, S, d]."""
        patch, side = self.picture.patch, self.picture.size // self.picture.patch
        cut = pixel_values.reshape(-1, self.picture.channels, side, patch, side, patch)
        flat = cut.permute(0, 2, 4, 1, 3, 5).reshape(-1, side * side, self.picture.channels * patch * patch)
        x: Tensor = self.project(flat) + self.place
        if self.first is not None:
            x = torch.cat([self.first.expand(x.shape[0], 1, -1), x], dim=1)
        if self.norm is not None:
            x = self.norm(x)
        return x


class Encoder(nn.Module):
    """Embeddings and layers."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = PictureEmbeddings(config, config.picture) if config.picture else Embeddings(config)
        self.layers = nn.ModuleList(Layer(config, first=index == 0) for index in range(config.layers))
        self.final_norm = norm(config) if config.norm_first and config.final_norm else None
        self.relation: RelativeBias | RelativePairs | None = None
        if config.relation == "bias":
            self.relation = RelativeBias(config.reach, config.heads)
        elif config.relation == "pairs":
            self.relation = RelativePairs(config.reach)
        self.rotary = rotary_tables(config)

    @property
    def blocks(self) -> Iterable[Layer]:
        """The layers, typed."""
        return cast("Iterable[Layer]", self.layers)

    @property
    def table(self) -> nn.Embedding:
        """The embeddings of tokens."""
        return cast("nn.Embedding", self.embeddings.token)

    def contexts(self, mask: Tensor) -> list[Context]:
        """What each layer's attention knows, from the mask [batch, S]."""
        config, length, device = self.config, mask.shape[1], mask.device
        scores = masked_scores(mask)
        if not config.relation and not any(config.windows):
            return [Context(scores)] * config.layers
        between = distances(length, device)
        pairs = None
        if isinstance(self.relation, RelativeBias):
            scores = scores + self.relation(between)
        elif isinstance(self.relation, RelativePairs):
            pairs = self.relation(between)
        thetas = sorted(set(config.thetas))
        turns = {theta: table(length, device) for theta, table in zip(thetas, self.rotary, strict=True)}
        windows = {0: scores} | {size: scores + local_scores(between, size) for size in set(config.windows) if size}
        return [
            Context(
                windows[config.windows[layer] if config.windows else 0],
                turns[config.thetas[layer]] if config.thetas else None,
                pairs,
            )
            for layer in range(config.layers)
        ]

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
        return self.walked(self.begin(input_ids, attention_mask, token_type_ids, plugin), states)

    def look(
        self, pixel_values: Tensor, plugin: Compression | None = None, states: list[Tensor] | None = None
    ) -> Tensor:
        """Run the encoder on pictures: [batch, channels, size, size] -> [batch, S, d]; the rest as `forward`."""
        x: Tensor = self.embeddings(pixel_values)
        length = x.shape[1]
        mask = torch.ones_like(x[:, :, 0])
        if plugin is not None:
            extra = _extra(length, plugin)
            x, mask = F.pad(x, (0, 0, 0, extra)), F.pad(mask, (0, extra))
        return self.walked(self._walk(x, mask, length, plugin), states)

    def begin(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None, plugin: Compression | None
    ) -> Walk:
        """Everything in front of the layers; arguments as `forward`."""
        length = input_ids.shape[1]
        if plugin is not None:
            extra = _extra(length, plugin)
            input_ids, attention_mask = F.pad(input_ids, (0, extra)), F.pad(attention_mask, (0, extra))
            token_type_ids = None if token_type_ids is None else F.pad(token_type_ids, (0, extra))
        x: Tensor = self.embeddings(input_ids, token_type_ids)
        return self._walk(x, attention_mask.to(x.dtype), length, plugin)

    def _walk(self, x: Tensor, mask: Tensor, length: int, plugin: Compression | None) -> Walk:
        lead = plugin.lead if plugin else 0
        if lead:  # behind the embeddings: positions count from the first token
            x, mask = F.pad(x, (0, 0, lead, 0)), F.pad(mask, (lead, 0))
        return Walk(x, mask, self.contexts(mask), slice(lead, lead + length), plugin)

    def walked(self, walk: Walk, states: list[Tensor] | None) -> Tensor:
        """All layers, and what is behind them."""
        for index, layer in enumerate(self.blocks):
            walk.through(index, layer)
            if states is not None:
                states.append(walk.x[:, walk.real])
        return self.end(walk)

    def end(self, walk: Walk) -> Tensor:
        """Everything behind the layers: [batch, S, d]."""
        x = walk.x if self.final_norm is None else self.final_norm(walk.x)
        return x if walk.plugin is None else x[:, walk.real]


@dataclass
class Walk:
    """A sequence on its way through the layers.

    Args:
        x: [batch, padded S, d].
        mask: [batch, padded S].
        contexts: Of every layer.
        real: Where in it the sequence is that came in.
    """

    x: Tensor
    mask: Tensor
    contexts: list[Context]
    real: slice
    plugin: Compression | None

    def through(self, index: int, layer: Layer) -> None:
        """The next layer."""
        plugin = self.plugin
        sites, activation = (plugin.sites(index), plugin.activation) if plugin else ({}, "")
        self.x = layer(self.x, self.mask, self.contexts[index], sites, activation)


def rotary_tables(config: EncoderConfig) -> nn.ModuleList:
    """One table for each base of the frequencies, ascending; with room for what a plugin puts in front."""
    head_size, length = config.attention_size // config.heads, config.max_length + MAX_RATIO
    return nn.ModuleList(Rotary(theta, head_size, length) for theta in sorted(set(config.thetas)))


def _extra(length: int, plugin: Compression | None) -> int:
    """Positions that a sequence is padded by, so that a plugin's groups are full."""
    if plugin is None:
        return 0
    whole = length + plugin.lead
    return (whole + plugin.multiple - 1) // plugin.multiple * plugin.multiple - whole


def fold_attention(
    weights: Mapping[str, Tensor], heads: int, scaled: float | None = None, key_bias: bool = False
) -> dict[str, Tensor]:
    """Turn the usual attention tensors into those this module keeps; exact in real arithmetic.

    softmax_j((q + b_q)(k_j + b_k) / sqrt(h)): the term (q + b_q) b_k is the same for every key, so the softmax
    drops it; the weights sum to 1, so b_v reaches the output as W_o b_v; the scale goes into W_q and b_q.

    Args:
        weights: `query`, `key`, `value`, `output` with `.weight` [out, in] and, where there are biases, `.bias` [out],
            as torch stores them.
        heads: Number of attention heads.
        scaled: What scores are multiplied by; None is 1 / sqrt(h).
        key_bias: Keep the key bias, where positions meet the key.
    """
    scale = (weights["query.weight"].shape[0] // heads) ** -0.5 if scaled is None else scaled
    output = weights["output.weight"]
    found = {"query.weight": (weights["query.weight"] * scale).t().contiguous()}
    if "query.bias" in weights:
        found["query.bias"] = weights["query.bias"] * scale
    found["key.weight"] = weights["key.weight"].t().contiguous()
    if key_bias:
        found["key.bias"] = weights["key.bias"]
    found["value.weight"] = weights["value.weight"].t().contiguous()
    found["output.weight"] = output.t().contiguous()
    if "output.bias" in weights:
        found["output.bias"] = weights["output.bias"] + output @ weights["value.bias"]
    return found
