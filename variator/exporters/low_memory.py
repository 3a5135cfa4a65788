"""Export of a model that is larger than memory: weights that are read when they are written, checks layer by layer.

`toolkit.stream` has the tensors. The backbone's modules hold placeholders, zeros without memory, in their place: they
are traced like any others, and `fill` gives the graph the real ones.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from variator.errors import GateError
from variator.exporters.gate import FIRST_ORDINARY, Case, Feed, compare, decoder_shapes
from variator.exporters.pieces import run_in_pieces
from variator.toolkit.decoder import Decoder, DecoderLayer, DecoderWalk, cache_width
from variator.toolkit.encoder import Embeddings, Layer, Walk
from variator.toolkit.plugin import Compression, compression
from variator.toolkit.plugin_file import Plugin
from variator.toolkit.plugin_format import Key
from variator.toolkit.rows import PER_TOKEN
from variator.toolkit.stream import Stream, is_placeholder

if TYPE_CHECKING:
    from variator.toolkit.checkpoint import Backbone

ENCODER = "model.encoder."
"""What names of the encoder's tensors begin with in a graph."""

OnPiece = Callable[[int, int], None]


def stream_of(backbone: Backbone) -> Stream:
    """Where a low-memory backbone's tensors come from."""
    if backbone.stream is None:
        raise GateError(f"{backbone.id} was not loaded for low memory")
    return backbone.stream


def fill(model: ir.Model, backbone: Backbone) -> None:
    """Give a graph that was traced with placeholders its weights, to be read when they are written.

    Raises:
        GateError: If the exporter has renamed one.
    """
    for value in model.graph.initializers.values():
        raw = getattr(value.const_value, "raw", None)
        if value.const_value is None or not isinstance(raw, Tensor) or not is_placeholder(raw):
            continue
        source = _source(backbone, str(value.name))
        shape = ir.Shape(value.const_value.shape.numpy())
        value.const_value = ir.LazyTensor(
            partial(_tensor, source, str(value.name)), ir.DataType.FLOAT, shape, name=value.name
        )


def _source(backbone: Backbone, name: str) -> Callable[[], Tensor]:
    stream, decoder = stream_of(backbone), backbone.decoder
    if name.startswith(ENCODER) and name.removeprefix(ENCODER) in backbone.model.encoder.state_dict():
        return partial(stream.encoder, name.removeprefix(ENCODER))
    if decoder is not None and name in decoder.state_dict():
        if name == "token.weight":
            return partial(stream.encoder, "embeddings.token.weight")
        return partial(stream.decoder, name)
    raise GateError(f"the exporter calls a weight {name!r}", fix="report this model, or export without --low-memory")


def _tensor(source: Callable[[], Tensor], name: str) -> ir.TensorProtocol:
    return ir.tensor(source().contiguous().numpy(), name=name)


def expect(backbone: Backbone, plugins: Mapping[Key, Plugin | None], cases: Sequence[Case], on_piece: OnPiece) -> None:
    """What PyTorch makes of the gate's cases at every ratio, each row alone and unpadded; put into the cases.

    All ratios go through a layer together, so that it is read once.
    """
    stream, encoder = stream_of(backbone), backbone.model.encoder
    kinds: dict[Key, Compression | None] = {key: _compression(plugin) for key, plugin in plugins.items()}
    walks: list[tuple[Key, Case, int, int, Walk]] = []
    with torch.device("meta"):
        embeddings = Embeddings(encoder.config)
    _load(embeddings, lambda name: stream.encoder(f"embeddings.{name}"))
    held, encoder.embeddings = encoder.embeddings, embeddings
    try:
        with torch.no_grad():
            for case in cases:
                for row, length in enumerate(case.lengths):
                    tokens = [
                        torch.from_numpy(np.ascontiguousarray(case.feed[name][[row], :length]))
                        if name in case.feed
                        else None
                        for name in ("input_ids", "attention_mask", "token_type_ids")
                    ]
                    for key, kind in kinds.items():
                        walk = encoder.begin(tokens[0], tokens[1], tokens[2], kind)  # type: ignore[arg-type]
                        walks.append((key, case, row, length, walk))
    finally:
        encoder.embeddings = held
    del embeddings
    for index in range(encoder.config.layers):
        layer = _layer(encoder.config, stream, index)
        with torch.no_grad():
            for *_, walk in walks:
                walk.through(index, layer)
        del layer
        on_piece(index + 1, encoder.config.layers)
    stream.release()
    for key, case, row, length, walk in walks:
        with torch.no_grad():
            results = backbone.model.head(encoder.end(walk), torch.ones(1, length))
        for name, result in zip(backbone.outputs, results, strict=True):
            _place(case, key, name, row, result[0].numpy())


def _compression(plugin: Plugin | None) -> Compression | None:
    if plugin is None:
        return None
    return compression(plugin.config, {name: torch.from_numpy(tensor) for name, tensor in plugin.tensors.items()})


def _layer(config: Any, stream: Stream, index: int) -> Layer:
    with torch.device("meta"):
        layer = Layer(config, first=index == 0)
    _load(layer, lambda name: stream.encoder(f"layers.{index}.{name}"))
    return layer


def _load(module: nn.Module, tensor: Callable[[str], Tensor]) -> None:
    module.load_state_dict({name: tensor(name) for name in module.state_dict()}, assign=True)
    module.eval().requires_grad_(False)


def _place(case: Case, key: Key, name: str, row: int, values: np.ndarray[Any, Any]) -> None:
    """A row's outputs, in the shape of the padded batch."""
    outputs = case.expected.setdefault(key, {})
    batch, length = case.feed["input_ids"].shape
    if name not in outputs:
        shape = (length, *values.shape[1:]) if name in PER_TOKEN else values.shape
        outputs[name] = np.zeros((batch, *shape), np.float32)
    if name in PER_TOKEN:
        outputs[name][row, : len(values)] = values
    else:
        outputs[name][row] = values


def expect_of_decoder(backbone: Backbone, decoder: Decoder, on_piece: OnPiece, seed: int = 0) -> list[Case]:
    """The decoder's cases, of random hidden states and memories, and what PyTorch makes of them."""
    stream, rng = stream_of(backbone), np.random.default_rng(seed)
    width, d = cache_width(decoder.config), decoder.config.hidden_size
    cases, walks = list[Case](), list[DecoderWalk]()
    with torch.no_grad(), _real(decoder.token, "weight", stream.encoder("embeddings.token.weight")):
        for batch, source, before, count in decoder_shapes(width):
            first = 0 if before else source
            sizes = ((first, d), (source - first, width), (before, width))
            hidden, cross, past = (rng.standard_normal((batch, count, size), np.float32) for count, size in sizes)
            feed: Feed = {
                "input_ids": rng.integers(FIRST_ORDINARY, backbone.config.vocabulary, (batch, count)),
                "lengths": np.maximum(1, (source * np.arange(batch, 0, -1)) // batch),
                "hidden": hidden,
                "cross": cross,
                "past": past,
            }
            cases.append(Case(feed, {}))
            walks.append(decoder.begin(*(torch.from_numpy(value) for value in feed.values())))
    for index in range(decoder.config.layers):
        with torch.device("meta"):
            layer = DecoderLayer(decoder.config)
        _load(layer, lambda name, index=index: stream.decoder(f"layers.{index}.{name}"))  # type: ignore[misc]
        with torch.no_grad():
            for walk in walks:
                walk.through(index, layer)
        del layer
        on_piece(index + 1, decoder.config.layers)
    stream.release()
    if decoder.vocabulary is None:
        table = _real(decoder.token, "weight", stream.encoder("embeddings.token.weight"))
    else:
        table = _real(decoder, "vocabulary", stream.decoder("vocabulary"))
    with torch.no_grad(), table:
        for case, walk in zip(cases, walks, strict=True):
            states, present, crossed = decoder.end(walk)
            found = {"logits": decoder.logits(states), "present": present, "crossed": crossed}
            case.expected[1] = {name: value.numpy() for name, value in found.items()}
    return cases


@contextlib.contextmanager
def _real(module: nn.Module, name: str, tensor: Tensor) -> Iterator[None]:
    """A module's placeholder replaced while the block runs."""
    held = getattr(module, name)
    setattr(module, name, nn.Parameter(tensor, False))
    try:
        yield
    finally:
        setattr(module, name, held)


def check_in_pieces(
    graph: Path, precision: str, cases: Sequence[Case], ratio: Key, counted: Sequence[Feed], on_piece: OnPiece
) -> tuple[float, list[dict[str, int]]]:
    """The gate's verdict on a graph that is run layer by layer: its largest error; and FLOPs of what is counted."""
    gc.collect()
    beside = graph.parent.parent  # what is written lies in `result`
    outputs, flops = run_in_pieces(graph, precision, [case.feed for case in cases], counted, on_piece, beside)
    answers = {id(case.feed): found for case, found in zip(cases, outputs, strict=True)}
    return compare(graph.name, precision, cases, ratio, lambda feed: answers[id(feed)]), flops
