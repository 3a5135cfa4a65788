"""A graph run layer by layer, with the weights of one layer in memory: for models that are larger than it.

The same operators, weights and order as in one go; only the values between layers are handed over. `exporters.export`
gates and counts a low-memory export with it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from variator import machine
from variator.exporters.flops import PART_KEY, counted_flops
from variator.exporters.gate import Array, Feed
from variator.exporters.precision import widened

LAYER_KEY = "variator.layer"
"""Key of a node's metadata that says which layer it belongs to."""

WEIGHTS = "piece.data"

Values = dict[str, Array]


def run_in_pieces(
    graph: Path,
    precision: str,
    feeds: Sequence[Feed],
    counted: Sequence[Feed] = (),
    on_piece: Callable[[int, int], None] = lambda done, of: None,
    scratch: Path | None = None,
) -> tuple[list[dict[str, Array]], list[dict[str, int]]]:
    """Run a graph on several inputs.

    Args:
        precision: That it is written in; bf16 is computed in fp32 and rounded, as `precision.widened` says.
        counted: Inputs that are run for their FLOPs alone.
        on_piece: Told how many pieces are done, and of how many.
        scratch: Where a piece lies while it runs, a layer in fp32 large.

    Returns:
        The outputs of each feed, and the FLOPs of each of `counted`, by part and in total.
    """
    model = ir.load(graph)
    if precision == "bf16":
        widened(model)
    outputs = [str(value.name) for value in model.graph.outputs]
    states: list[Values] = [dict(feed) for feed in feeds]
    beside: list[Values] = [dict(feed) for feed in counted]
    flops: list[dict[str, int]] = [{} for _ in counted]
    pieces = split(model)
    total = len(pieces)
    for done in range(total):
        piece = pieces.pop(0)
        with tempfile.TemporaryDirectory(dir=scratch) as place:
            path = Path(place) / "piece.onnx"
            ir.save(piece, path, external_data=WEIGHTS)
            names = [str(value.name) for value in piece.graph.inputs]
            for found, state in zip(flops, beside, strict=True):
                for part, value in counted_flops(path, {name: state[name] for name in names}).items():
                    found[part] = found.get(part, 0) + value
            later = {str(value.name) for other in pieces for value in other.graph.inputs}
            if not later:  # let go of what was only counted before the last piece puts every layer's outputs together
                for state in beside:
                    state.clear()
                beside = []
                machine.release_memory()
            run = _session(path)
            for state, kept in [(one, later) for one in beside] + [(one, later.union(outputs)) for one in states]:
                state |= run({name: state[name] for name in names})
                for name in state.keys() - kept:
                    del state[name]
            del run
            machine.release_memory()
        on_piece(done + 1, total)
    return [{name: state[name] for name in outputs} for state in states], flops


def _session(path: Path) -> Callable[[Mapping[str, Array]], Values]:
    """Runs a piece without copying its weights."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False  # an output that is kept would keep its session's whole arena
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda feed: dict(zip(names, session.run(None, dict(feed)), strict=True))


def split(model: ir.Model) -> list[ir.Model]:
    """A graph as models that run one after another: what comes before the layers, each layer, what comes behind.

    Takes the graph apart: `model` is of no use afterwards.
    """
    graph = model.graph
    groups = _groups(graph)
    members: dict[int, list[ir.Node]] = {}
    for node in graph:
        members.setdefault(groups[node], []).append(node)
    wanted = set(graph.outputs)
    leaving: dict[int, list[ir.Value]] = {}
    for group, nodes in members.items():
        for node in nodes:
            for value in node.outputs:
                if value in wanted or any(groups[use.node] != group for use in value.uses()):
                    leaving.setdefault(group, []).append(value)
    versions = dict(graph.opset_imports)
    graph.outputs.clear()
    graph.inputs.clear()
    for node in list(graph):
        graph.remove(node)
    return [
        _piece(members[group], leaving.get(group, []), versions, model.ir_version)
        for group in sorted(members)
        if leaving.get(group)
    ]


def _groups(graph: ir.Graph) -> dict[ir.Node, int]:
    """0 before the layers, 1, 2, … for them, and one more behind; never before what a node needs."""
    found: dict[ir.Node, int] = {}
    last = 1 + max(
        (int(node.metadata_props[LAYER_KEY]) for node in graph if LAYER_KEY in node.metadata_props), default=0
    )
    for node in graph:
        makers = [maker for value in node.inputs if value is not None and (maker := value.producer()) is not None]
        least = max((found[maker] for maker in makers), default=0)
        if LAYER_KEY in node.metadata_props:
            least = max(least, 1 + int(node.metadata_props[LAYER_KEY]))
        elif least == last and node.metadata_props.get(PART_KEY) == "head":
            least = last + 1
        found[node] = least
    for node in reversed(graph):  # what is only moved about (a table transposed, a layer's share) is not kept waiting
        users = [found[use.node] for value in node.outputs for use in value.uses()]
        leaves = any(value.is_graph_output() for value in node.outputs)
        looks_up = node.op_type == "Gather" and node.inputs[0] is not None and node.inputs[0].is_initializer()
        if LAYER_KEY not in node.metadata_props and users and not leaves and not looks_up:
            found[node] = max(found[node], min(users))
    return found


def _piece(
    nodes: Sequence[ir.Node], leaving: Sequence[ir.Value], versions: Mapping[str, int], ir_version: int
) -> ir.Model:
    """Some nodes as a model of their own, which takes what others make by name."""
    ours = {value for node in nodes for value in node.outputs}
    inputs: dict[ir.Value, ir.Value] = {}
    initializers: dict[ir.Value, ir.Value] = {}
    for node in nodes:
        for index, value in enumerate(node.inputs):
            if value is None or value in ours:
                continue
            home = initializers if value.const_value is not None and value.producer() is None else inputs
            if value not in home:
                home[value] = ir.Value(
                    name=value.name, type=value.type, shape=value.shape, const_value=value.const_value
                )
            node.replace_input_with(index, home[value])
    graph = ir.Graph(
        list(inputs.values()),
        list(leaving),
        nodes=list(nodes),
        initializers=list(initializers.values()),
        opset_imports=dict(versions),
        name="piece",
    )
    return ir.Model(graph, ir_version=ir_version)
