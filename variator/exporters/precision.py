"""Precision written into a graph: fp32 -> fp16 or bf16 with fp32 islands, for engines that take types as they stand.

Engines of strongly typed networks (TensorRT from 11, TensorRT-RTX) and ONNX Runtime's GPU kernels run what the graph
says. Matrix products, what is added to them and the stream between the layers become narrow; every softmax with its
mask, every division, power and reduction, and the pooling stay fp32, as do inputs and outputs. `LayerNormalization`
takes narrow values and computes its statistics in fp32 (`stash_type` 1, the standard's default).
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir

from variator.errors import GateError, InputError
from variator.exporters.flops import PART_KEY

NARROW = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
PRECISIONS = ("fp32", *NARROW)
"""That a graph can be written in."""

WIDE_OPERATORS = {
    "Softmax", "LogSoftmax", "Log", "Exp", "Div", "Pow", "Sqrt", "Reciprocal", "Clip",
    "ReduceSum", "ReduceMean", "ReduceL2", "ReduceMax",
}  # fmt: skip
"""Computed in fp32: their results are ruined by a narrow mantissa or range."""

SEEDS = {"MatMul", "Gemm", "LayerNormalization", "RMSNormalization", "Gather", "DequantizeLinear"}
"""What makes a value narrow, with everything that is computed from it elementwise or moved."""

WIDENING = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
"""Inputs of these types (a shared graph's plugin) are used as they come instead of being widened."""


def narrow(model: ir.Model, precision: str) -> ir.Model:
    """Rewrite a graph of fp32 values into one of `precision`; names, inputs and outputs stay. Returns `model`.

    Args:
        model: As `exporters.graph` makes it. Changed in place.
        precision: fp16, bf16, or fp32, which changes nothing.

    Raises:
        InputError: For another precision.
        GateError: If a weight does not fit; names it.
    """
    check_precision(precision)
    if precision != "fp32":
        _Narrowing(model.graph, NARROW[precision], precision).run()
    return model


def check_precision(precision: str) -> None:
    """Raise `InputError` unless a graph can be written in it."""
    if precision not in PRECISIONS:
        raise InputError(f"a graph cannot be written in {precision!r}", valid=", ".join(PRECISIONS))


def precision_of(model: ir.Model) -> str:
    """The precision of most weights that a graph multiplies with, read from its types.

    A weight behind a DequantizeLinear counts as what it is stored in: int8 or fp8.
    """
    names = {ir.DataType.FLOAT: "fp32", ir.DataType.INT8: "int8", ir.DataType.FLOAT8E4M3FN: "fp8"}
    names |= {dtype: name for name, dtype in NARROW.items()}
    weights: dict[str, int] = {}
    for node in model.graph:
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        for value in node.inputs[:2]:
            maker = value.producer() if value is not None else None
            stored = maker.inputs[0] if maker is not None and maker.op_type == "DequantizeLinear" else value
            if stored is not None and stored.is_initializer() and stored.const_value is not None:
                name = names.get(stored.const_value.dtype, str(stored.const_value.dtype))
                weights[name] = weights.get(name, 0) + stored.const_value.size
    if not weights:  # a shared graph of a model without weights of its own does not exist
        raise GateError("the graph multiplies with no weight", fix="export it again")
    return max(weights, key=lambda name: weights[name])


class _Narrowing:
    """One graph's rewriting."""

    def __init__(self, graph: ir.Graph, dtype: ir.DataType, precision: str) -> None:
        self.graph, self.dtype, self.precision = graph, dtype, precision
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        untyped = next((value.name for node in self.graph for value in node.outputs if value.dtype is None), None)
        if untyped:
            raise GateError(f"the graph does not say what type {untyped!r} has", fix="export it again")
        narrow_nodes = self._narrow_nodes(self._wide_nodes())
        self._drop_widening(narrow_nodes)
        for node in list(self.graph):
            if any(output.dtype in WIDENING for output in node.outputs):
                continue  # a plugin's input on its way to the cast behind it
            wanted = self.dtype if node in narrow_nodes else ir.DataType.FLOAT
            for index, value in enumerate(node.inputs):
                if value is not None and _floating(value) and value.dtype != wanted and not _takes_any(node):
                    node.replace_input_with(index, self._as(value, wanted, node))
            if node in narrow_nodes:
                for output in node.outputs:
                    if output.dtype == ir.DataType.FLOAT:
                        output.dtype = self.dtype
        for index, output in enumerate(self.graph.outputs):
            if output.dtype == self.dtype:
                self.graph.outputs[index] = self._widened_output(output)
        for name in [name for name, value in self.graph.initializers.items() if not value.uses()]:
            del self.graph.initializers[name]

    def _wide_nodes(self) -> set[ir.Node]:
        """Nodes to keep in fp32: `WIDE_OPERATORS`, pooling, and what only prepares their inputs."""
        wide: set[ir.Node] = set()
        for node in reversed(self.graph):
            if node.op_type in WIDE_OPERATORS or (node.op_type == "MatMul" and _pools(node)):
                wide.add(node)
            elif node.op_type not in SEEDS and not any(output.is_graph_output() for output in node.outputs):
                users = {use.node for output in node.outputs for use in output.uses()}
                if users and users <= wide:
                    wide.add(node)
        return wide

    def _narrow_nodes(self, wide: set[ir.Node]) -> set[ir.Node]:
        """Nodes that compute narrow: the seeds, and whatever takes a narrow value."""
        found: set[ir.Node] = set()
        for node in self.graph:
            quantises = node.op_type == "QuantizeLinear"
            if node in wide or not (quantises or any(output.dtype == ir.DataType.FLOAT for output in node.outputs)):
                continue
            widens = node.op_type == "Cast" and node.inputs[0] is not None and node.inputs[0].dtype in WIDENING
            makers = {value.producer() for value in node.inputs if value is not None}
            # Moving a weight about (a slice of a plugin's matrix) is the weight.
            moved = bool(node.inputs) and all(value is None or value.is_initializer() for value in node.inputs)
            if node.op_type in SEEDS or widens or moved or makers & found:
                found.add(node)
        return found

    def _drop_widening(self, narrow_nodes: set[ir.Node]) -> None:
        """Casts of narrow inputs to fp32 become casts to this precision, or go."""
        for node in [node for node in narrow_nodes if node.op_type == "Cast"]:
            source, target = node.inputs[0], node.outputs[0]
            if source is not None and source.dtype == self.dtype:
                target.replace_all_uses_with(source)
                narrow_nodes.discard(node)
                self.graph.remove(node, safe=True)
            else:
                node.attributes["to"] = ir.AttrInt64("to", int(self.dtype))

    def _as(self, value: ir.Value, wanted: ir.DataType, user: ir.Node) -> ir.Value:
        """A value in another precision: a converted weight, or a cast in front of the first node that needs it."""
        if (value, wanted) not in self.casts:
            if value.is_initializer():
                self.casts[value, wanted] = self._weight(value, wanted)
            else:
                cast = ir.node("Cast", [value], {"to": int(wanted)}, name=f"{value.name}/{wanted.name.lower()}/cast")
                cast.metadata_props[PART_KEY] = user.metadata_props.get(PART_KEY, "")
                output = cast.outputs[0]
                output.name, output.dtype, output.shape = f"{value.name}/{wanted.name.lower()}", wanted, value.shape
                self.graph.insert_before(user, cast)
                self.casts[value, wanted] = output
        return self.casts[value, wanted]

    def _weight(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        tensor = value.const_value
        if tensor is None:
            raise GateError(f"weight {value.name!r} of the graph has no value", fix="export it again")
        name = f"{value.name}/{wanted.name.lower()}"
        convert = partial(_converted, tensor, wanted, name, f"weight {value.name!r} does not fit {self.precision}")
        if isinstance(tensor, ir.LazyTensor):  # of a model that is larger than memory: converted when it is written
            lazy = ir.LazyTensor(convert, wanted, ir.Shape(tensor.shape.numpy()), name=name)
            new = ir.Value(name=name, shape=value.shape, type=ir.TensorType(wanted), const_value=lazy)
            self.graph.register_initializer(new)
            return new
        array = convert().numpy()
        scales = any(
            use.node.op_type in ("QuantizeLinear", "DequantizeLinear") and use.idx == 1 for use in value.uses()
        )
        if scales and not array.all():
            raise GateError(f"a scale in {value.name!r} is 0 in {self.precision}", fix="use fp16 or bf16 without int8")
        new = ir.Value(
            name=name, shape=value.shape, type=ir.TensorType(wanted), const_value=ir.tensor(array, name=name)
        )
        self.graph.register_initializer(new)
        return new

    def _widened_output(self, output: ir.Value) -> ir.Value:
        """An output of the graph in fp32 again, under its name."""
        cast = ir.node("Cast", [output], {"to": int(ir.DataType.FLOAT)}, name=f"{output.name}/cast")
        maker = output.producer()
        cast.metadata_props[PART_KEY] = maker.metadata_props.get(PART_KEY, "") if maker is not None else ""
        wide = cast.outputs[0]
        wide.dtype, wide.shape = ir.DataType.FLOAT, output.shape
        wide.name, output.name = output.name, f"{output.name}/{self.precision}"
        self.graph.append(cast)
        return wide


def _converted(tensor: ir.TensorProtocol, wanted: ir.DataType, name: str, misfit: str) -> ir.TensorProtocol:
    """A weight in another precision, or `GateError`."""
    with np.errstate(over="ignore"):
        array = tensor.numpy().astype(wanted.numpy())
    if not np.isfinite(array.astype(np.float32)).all():
        raise GateError(misfit, fix="use bf16 or fp32")
    return ir.tensor(array, name=name)


def _floating(value: ir.Value) -> bool:
    return value.dtype in (ir.DataType.FLOAT, *WIDENING)


def _takes_any(node: ir.Node) -> bool:
    """Whether a node's result does not depend on the type of what it takes."""
    return node.op_type in ("Cast", "Shape", "Size")


def _pools(node: ir.Node) -> bool:
    """Whether a product is the pooling's: of the head, and not with a weight."""
    in_head = node.metadata_props.get(PART_KEY) == "head"
    return in_head and not any(value is not None and _is_weight(value) for value in node.inputs)


def _is_weight(value: ir.Value) -> bool:
    """Whether a value is a weight, or one moved about (a table of the vocabulary transposed)."""
    maker = value.producer()
    if maker is None:
        return value.is_initializer()
    return maker.op_type == "Transpose" and maker.inputs[0] is not None and maker.inputs[0].is_initializer()


def widened(model: ir.Model) -> ir.Model:
    """A narrow graph for an engine without such types: every operator in fp32, its result rounded. Returns `model`.

    What an operator with fp32 accumulation gives, so that a bf16 graph can be checked where no kernel runs one.
    """
    for value in list(model.graph.initializers.values()):
        if value.dtype in WIDENING and value.const_value is not None:
            narrow_one = value.const_value
            value.const_value = ir.LazyTensor(
                partial(_widened_tensor, narrow_one),
                ir.DataType.FLOAT,
                ir.Shape(narrow_one.shape.numpy()),
                name=value.name,
            )
            value.dtype = ir.DataType.FLOAT
    for node in list(model.graph):
        if node.op_type != "Cast" and any(value is not None and value.dtype in WIDENING for value in node.inputs):
            continue  # moves an input of the graph that is narrow and stays so
        for output in node.outputs:
            if output.dtype in WIDENING and output.dtype is not None:
                _round(model.graph, node, output, output.dtype)
    return model


def _widened_tensor(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    wide = ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()  # else its file stays mapped, and counts as memory
    return wide


def _round(graph: ir.Graph, node: ir.Node, output: ir.Value, dtype: ir.DataType) -> None:
    """Let what uses `output` get it as fp32, rounded to `dtype`."""
    uses = list(output.uses())
    there = ir.node("Cast", [output], {"to": int(dtype)})
    back = ir.node("Cast", [there.outputs[0]], {"to": int(ir.DataType.FLOAT)})
    for cast, kind, name in ((there, dtype, "rounded"), (back, ir.DataType.FLOAT, "wide")):
        cast.outputs[0].name, cast.outputs[0].dtype = f"{output.name}/{name}", kind
        cast.outputs[0].shape = output.shape
    if node.op_type == "Cast":
        node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
    output.dtype = ir.DataType.FLOAT
    graph.insert_after(node, [there, back])
    for user, index in uses:
        user.replace_input_with(index, back.outputs[0])
