"""FLOPs of a graph as exported: its own matrix products at the shapes that really occur.

The graph is run once at batch 1 with ONNX Runtime's profiler on and every optimisation off, and the shapes of
each MatMul and Gemm are read from the profile. Everything in these graphs is per row, so a batch multiplies.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from variator.errors import GateError
from variator.toolkit.stack import Inputs

PARTS = ("attention", "ffn", "plugin", "head")
PART_KEY = "variator.part"
"""Key of a node's metadata that says which part of the model it belongs to."""


def part_of(scopes: Sequence[str]) -> str:
    """The part a node belongs to, from the module scopes that torch's exporter records.

    What sits in a layer but in none of its modules is the plugin (of matrix products at least).
    """
    path = ".".join(scopes)
    if ".layers." not in path:
        return "head"
    if ".attention" in path:
        return "attention"
    return "ffn" if ".ffn" in path else "plugin"


def count_flops(graph: Path, sequence: int, beside: Inputs | None = None) -> dict[str, int]:
    """FLOPs (2 x multiply-accumulates) of one row of `sequence` tokens, or one picture, by part, with `total`.

    Embedding tables cost nothing; a projection behind them, or of patches, counts as head.

    Args:
        beside: What a shared graph takes beside the tokens, see `toolkit.stack`.

    Raises:
        GateError: If the profile misses a matrix product of the graph.
    """
    beside = beside or {}
    feed: dict[str, npt.NDArray[Any]] = dict(beside)
    for value in onnx.load(graph, load_external_data=False).graph.input:
        if value.name == "pixel_values":
            feed[value.name] = np.zeros(
                (1, *(dim.dim_value for dim in value.type.tensor_type.shape.dim[1:])), np.float32
            )
        elif value.name not in beside:
            feed[value.name] = np.full((1, sequence), value.name == "attention_mask", np.int64)
    return counted_flops(graph, feed)


def counted_flops(graph: Path, feed: Mapping[str, npt.NDArray[Any]]) -> dict[str, int]:
    """FLOPs of a graph at what it is fed with, by part, with `total`. Errors as `count_flops`."""
    model = onnx.load(graph, load_external_data=False)
    parts = {
        node.name: next((entry.value for entry in node.metadata_props if entry.key == PART_KEY), "head")
        for node in model.graph.node
        if node.op_type in ("MatMul", "Gemm")
    }
    counted = dict.fromkeys(PARTS, 0)
    seen = set()
    for name, shapes in _profiled_shapes(graph, feed):
        if name in parts and name not in seen:
            seen.add(name)
            left, right = shapes[0], shapes[1]
            batch = math.prod(np.broadcast_shapes(tuple(left[:-2]), tuple(right[:-2])))
            counted[parts[name]] += 2 * batch * left[-2] * left[-1] * right[-1]
    if seen != parts.keys():
        raise GateError(f"{graph.name}: no shape was profiled for {sorted(parts.keys() - seen)[0]!r}")
    return counted | {"total": sum(counted.values())}


def _profiled_shapes(graph: Path, feed: Mapping[str, npt.NDArray[Any]]) -> list[tuple[str, list[list[int]]]]:
    import onnxruntime

    with tempfile.TemporaryDirectory() as directory:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.disable_prepacking", "1")  # the profile omits packed inputs
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(directory) / "profile")
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        session.run(None, dict(feed))
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    found = []
    for event in events:
        arguments = event.get("args", {})
        if event["name"].endswith("_kernel_time") and "input_type_shape" in arguments:
            shapes = [next(iter(entry.values())) for entry in arguments["input_type_shape"]]
            found.append((event["name"].removesuffix("_kernel_time"), shapes))
    return found
