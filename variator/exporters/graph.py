"""One ratio of a model -> one ONNX graph, through torch's `torch.export`-based exporter."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from onnx_ir.passes.common import NameFixPass
from torch import Tensor, nn

from variator.errors import GateError
from variator.toolkit.checkpoint import Backbone, Model
from variator.toolkit.plugin_file import Plugin
from variator.toolkit.plugin_format import layer_operands

if TYPE_CHECKING:
    import onnx_ir

OPSET = 20
"""Operator set of the graphs: the oldest with Gelu as one operator, which every runtime here fuses."""

TRACE_SHAPE = (2, 12)
"""Batch and length used for tracing; the numeric gate uses others."""


class Compressed(nn.Module):
    """A model with one plugin built in: what is exported, and the PyTorch reference of that ratio."""

    def __init__(self, model: Model, plugin: Plugin | None) -> None:
        super().__init__()
        self.model = model
        self.plugin = nn.ParameterDict(
            {
                name.replace(".", "/"): nn.Parameter(torch.from_numpy(tensor), False)
                for name, tensor in plugin.tensors.items()
            }
            if plugin
            else {}
        )
        self.ratio = plugin.config.ratio if plugin else 1
        self.activation = plugin.config.activation if plugin else "tanh"

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """int64 [batch, S] each -> the task's outputs."""
        if self.ratio == 1:
            outputs: tuple[Tensor, ...] = self.model(input_ids, attention_mask, token_type_ids)
            return outputs
        tensors = {name.replace("/", "."): tensor for name, tensor in self.plugin.items()}
        outputs = self.model(
            input_ids,
            attention_mask,
            token_type_ids,
            lambda layer: layer_operands(tensors, layer),
            self.ratio,
            self.activation,
        )
        return outputs


def export_graph(backbone: Backbone, plugin: Plugin | None) -> onnx_ir.Model:
    """Export one ratio with batch and sequence dynamic.

    Args:
        plugin: None for ratio 1.

    Raises:
        GateError: If the exporter used an operator that is not standard or fixed a dimension.
    """
    model = trace(Compressed(backbone.model, plugin), backbone.inputs, backbone.outputs, OPSET)
    _check_structure(model)
    return model


def trace(module: nn.Module, inputs: Sequence[str], outputs: Sequence[str], opset: int | None = None) -> onnx_ir.Model:
    """Export a module of int64 [batch, sequence] inputs, both dimensions dynamic; `opset` None is torch's choice."""
    example = torch.ones(TRACE_SHAPE, dtype=torch.int64)
    dynamic = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    with torch.no_grad(), _quiet_exporter():
        program = torch.onnx.export(
            module.eval(),
            tuple(example.clone() for _ in inputs),
            dynamo=True,
            dynamic_shapes=dict.fromkeys(inputs, dynamic),
            input_names=list(inputs),
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
        fixed = [dim for dim in (value.shape or ()) if isinstance(dim, int)]
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
