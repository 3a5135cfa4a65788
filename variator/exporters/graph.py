"""A model -> ONNX graphs, through torch's `torch.export`-based exporter.

`export_graph` makes one ratio's graph with its plugin in it, `export_shared` a graph whose plugin comes as inputs,
`export_decoder` the one decoder of all ratios.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from onnx_ir.passes.common import NameFixPass
from torch import Tensor, nn

from variator.errors import GateError
from variator.toolkit.bundle import SharedProfile
from variator.toolkit.checkpoint import Backbone, Model
from variator.toolkit.decoder import OUTPUTS as DECODED
from variator.toolkit.decoder import Decoder, cache_width
from variator.toolkit.encoder import EncoderConfig
from variator.toolkit.plugin import Compression, compression
from variator.toolkit.plugin_file import Plugin
from variator.toolkit.plugin_format import MAX_RATIO
from variator.toolkit.stack import HEAD_INPUTS, LOGITS, PLUGIN_INPUTS, RATIO_INPUT, shapes

if TYPE_CHECKING:
    import onnx_ir

OPSET = 20
"""Operator set of the graphs: the oldest with Gelu as one operator, which every runtime here fuses."""

TRACE_SHAPE = (2, 12)
"""Batch and length used for tracing; the numeric gate uses others."""

TRACE_RATIO, TRACE_RANK, TRACE_CLASSES = 3, 5, 7
"""Likewise for the inputs of a shared graph."""


class Compressed(nn.Module):
    """A model with one plugin built in: what is exported, and the PyTorch reference of that ratio."""

    def __init__(self, model: Model, plugin: Plugin | None) -> None:
        super().__init__()
        if plugin is not None:
            model.encoder.config.check(plugin.config)
        self.model = model
        self.plugin = nn.ParameterDict(
            {
                name.replace(".", "/"): nn.Parameter(torch.from_numpy(tensor), False)
                for name, tensor in plugin.tensors.items()
            }
            if plugin
            else {}
        )
        self.config = plugin.config if plugin else None

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """int64 [batch, S] each -> the task's outputs."""
        outputs: tuple[Tensor, ...] = self.model(input_ids, attention_mask, token_type_ids, self.compression())
        return outputs

    def compression(self) -> Compression | None:
        """The plugin, as the encoder runs it."""
        tensors = {name.replace("/", "."): tensor for name, tensor in self.plugin.items()}
        return compression(self.config, tensors) if self.config else None


class Pictures(nn.Module):
    """The same for a model that reads pictures.

    Args:
        compressed: The model with its plugin.
    """

    def __init__(self, compressed: Compressed) -> None:
        super().__init__()
        self.compressed = compressed

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """[batch, channels, size, size] -> the task's outputs."""
        return self.compressed.model.look(pixel_values, self.compressed.compression())


class Shared(nn.Module):
    """A model that takes its plugin and its head as inputs; what is exported in a shared layout.

    Args:
        inputs: Names in the order of `forward`: the backbone's, then those of `toolkit.stack`. Without plugin inputs
            it is ratio 1.
        activation: Of the plugins' bottleneck.
    """

    def __init__(self, model: Model, inputs: Sequence[str], activation: str = "tanh") -> None:
        super().__init__()
        self.model, self.inputs, self.activation = model, tuple(inputs), activation

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The inputs by position -> the task's outputs and, if there is a head, `logits` [batch, classes]."""
        given = dict(zip(self.inputs, tensors, strict=True))
        head = [given.pop(name) for name in HEAD_INPUTS if name in given]
        stacks = {name: given.pop(name) for name in PLUGIN_INPUTS if name in given}

        def plugin(layer: int) -> dict[str, dict[str, Tensor]]:
            sites: dict[str, dict[str, Tensor]] = {}
            for name, tensor in stacks.items():
                _, site, operand = name.split(".", 2)
                sites.setdefault(site, {})[operand] = tensor[layer].float()
            return sites

        ids = (given.get(name) for name in ("input_ids", "attention_mask", "token_type_ids"))
        compressed = Compression(plugin, stacks[RATIO_INPUT].shape[1], self.activation) if stacks else None
        outputs: tuple[Tensor, ...] = self.model(*ids, compressed)
        return (*outputs, torch.matmul(outputs[0], head[0]) + head[1]) if head else outputs


def export_graph(backbone: Backbone, plugin: Plugin | None) -> onnx_ir.Model:
    """Export one ratio with batch and sequence dynamic.

    Args:
        plugin: None for ratio 1.

    Raises:
        GateError: If the exporter used an operator that is not standard or fixed a dimension.
    """
    compressed, picture = Compressed(backbone.model, plugin), backbone.config.picture
    if picture is None:
        model = trace(compressed, backbone.inputs, backbone.outputs, OPSET)
    else:
        example = torch.ones(2, picture.channels, picture.size, picture.size)
        batch: dict[int, Any] = {0: torch.export.Dim("batch")}
        examples = {"pixel_values": (example, batch)}
        model = _exported(Pictures(compressed), examples, {"pixel_values": batch}, backbone.outputs, OPSET)
    _check_structure(model)
    return model


def export_shared(backbone: Backbone, profile: SharedProfile, compressed: bool) -> onnx_ir.Model:
    """Export a graph of a shared layout: for every ratio above 1, its plugin as inputs; or for ratio 1.

    Args:
        profile: What the inputs may be.
        compressed: False leaves the plugin inputs out: ratio 1, of which only the head is an input.

    Raises:
        GateError: As `export_graph`.
    """
    beside = _beside(backbone.config, profile.head, compressed)
    if not beside:
        return export_graph(backbone, None)
    module = Shared(backbone.model, [*backbone.inputs, *beside], profile.activation)
    outputs = [*backbone.outputs, *([LOGITS] if profile.head else [])]
    model = trace(module, backbone.inputs, outputs, OPSET, beside)
    _check_structure(model)
    return model


def export_decoder(decoder: Decoder) -> onnx_ir.Model:
    """Export a decoder, to start texts and to go on with them: batch and all lengths dynamic.

    Raises:
        GateError: As `export_graph`.
    """
    width, batch = cache_width(decoder.config), torch.export.Dim("batch")
    examples: dict[str, Example] = {
        "input_ids": (torch.ones(2, 3, dtype=torch.int64), {0: batch, 1: torch.export.Dim("tokens")}),
        "lengths": (torch.ones(2, dtype=torch.int64), {0: batch}),
        "hidden": (torch.ones(2, 7, decoder.config.hidden_size), {0: batch, 1: torch.export.Dim("new")}),
        "cross": (torch.ones(2, 4, width), {0: batch, 1: torch.export.Dim("known")}),
        "past": (torch.ones(2, 5, width), {0: batch, 1: torch.export.Dim("before")}),
    }
    model = _exported(decoder, examples, {name: axes for name, (_, axes) in examples.items()}, DECODED, OPSET)
    _check_structure(model)
    return model


Example = tuple[Tensor, dict[int, Any]]
"""An input to trace with, and its dynamic dimensions by axis."""


def _beside(sizes: EncoderConfig, head: bool, compressed: bool) -> dict[str, Example]:
    """The inputs of `toolkit.stack` that a shared graph takes."""
    ratio = torch.export.Dim("ratio", min=1, max=MAX_RATIO)
    rank, classes = torch.export.Dim("rank", min=1), torch.export.Dim("classes", min=1)
    dynamic = {"ratio": ratio, "group": sizes.hidden_size * ratio, "rank": rank}
    found: dict[str, Example] = {}
    if compressed:
        for name, shape in shapes(sizes.layers, sizes.hidden_size, TRACE_RATIO, TRACE_RANK).items():
            axes = {axis: dynamic[dim] for axis, dim in enumerate(PLUGIN_INPUTS[name]) if dim in dynamic}
            found[name] = torch.ones(shape, dtype=torch.float16), axes
    if head:
        weight, bias = HEAD_INPUTS
        found[weight] = torch.ones(sizes.hidden_size, TRACE_CLASSES), {1: classes}
        found[bias] = torch.ones(TRACE_CLASSES), {0: classes}
    return found


def trace(
    module: nn.Module,
    inputs: Sequence[str],
    outputs: Sequence[str],
    opset: int | None = None,
    beside: Mapping[str, Example] | None = None,
) -> onnx_ir.Model:
    """Export a module of int64 [batch, sequence] inputs, both dimensions dynamic.

    Args:
        opset: None is torch's choice.
        beside: Further inputs; with them the module takes all inputs by position.
    """
    example = torch.ones(TRACE_SHAPE, dtype=torch.int64)
    tokens = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    examples: dict[str, Example] = {name: (example.clone(), tokens) for name in inputs}
    axes: dict[str, Any] | tuple[Any, ...] = dict.fromkeys(inputs, tokens)
    if beside:
        examples |= beside
        axes = (tuple(dynamic for _, dynamic in examples.values()),)
    return _exported(module, examples, axes, outputs, opset)


def _exported(
    module: nn.Module,
    examples: Mapping[str, Example],
    dynamic: dict[str, Any] | tuple[Any, ...],
    outputs: Sequence[str],
    opset: int | None,
) -> onnx_ir.Model:
    with torch.no_grad(), _quiet_exporter():
        program = torch.onnx.export(
            module.eval(),
            tuple(value for value, _ in examples.values()),
            dynamo=True,
            dynamic_shapes=dynamic,
            input_names=list(examples),
            output_names=list(outputs),
            opset_version=opset,
            verbose=False,
        )
    if program is None:
        raise GateError("torch's exporter returned no graph")
    # The exporter may give an inner value the name of an output (`embedding`), which no runtime loads.
    NameFixPass()(program.model)
    return program.model


def _check_structure(model: onnx_ir.Model) -> None:
    foreign = sorted({f"{node.domain}::{node.op_type}" for node in model.graph if node.domain not in ("", "ai.onnx")})
    if foreign:
        raise GateError(f"the exporter used operators that are not standard ONNX: {', '.join(foreign)}")
    for value in model.graph.inputs:
        if value.name in PLUGIN_INPUTS or value.name in HEAD_INPUTS:
            continue
        free = 1 if value.name == "pixel_values" else 2
        fixed = [dim for dim in (value.shape or ())[:free] if isinstance(dim, int)]
        if value.shape is None or fixed:
            raise GateError(
                f"the exporter fixed a dimension of input {value.name!r}: {value.shape}", valid="[batch, sequence]"
            )


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter's warnings are about its own insides; ours is the gate's verdict."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
