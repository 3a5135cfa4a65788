"""ONNX Runtime on CPUs: fp32 and int8 (dynamic), every ratio's weights mapped from one common file.

Sessions share nothing by themselves: each packs its matrices on the heap. So ONNX Runtime writes its optimised
graphs with the packed matrices beside the weights, and `gather` points the graphs of all ratios at one
content-addressed file, which every session maps. On load ONNX Runtime packs again, looks for the result's hash
among the entries of the graph, and on a hit drops its copy for the mapped one: a file made on another kind of
CPU only loses the sharing.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from variator import machine
from variator.engines.base import NO_PROFILES, Arrays, BuildOptions, CpuBackend, Feed, OnProgress, check_held, installed
from variator.engines.quantise import RECIPE, quantise_dynamic, reduce_range
from variator.errors import EngineError
from variator.files import inside
from variator.toolkit.bundle import Bundle
from variator.toolkit.rows import Outputs
from variator.toolkit.weights import INLINE_BYTES, check_external_data, gather

if TYPE_CHECKING:
    import onnx
    import onnxruntime

WEIGHTS = "weights.data"
SLOW_FUSIONS = ("SkipLayerNormFusion", "BiasGeluFusion")
"""Fusions that lose 10 to 18 % on CPUs: the fused kernels are slower than the operators they replace."""

INT8_OPERATORS = {"DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulInteger"}
FLOAT_OPERATORS = {"MatMul", "Gemm", "FusedMatMul", "FusedGemm"}

_arena_lock = Lock()
_arena_shared = False


class OnnxRuntimeEngine:
    """One session and the values it holds. All sessions of the process share one memory arena."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        precision: str,
        held: Mapping[str, onnxruntime.OrtValue] | None = None,
    ) -> None:
        self.precision, self.profiles = precision, NO_PROFILES
        self._session, self._held = session, held or {}
        self._outputs = [output.name for output in session.get_outputs()]

    def run(self, feed: Feed) -> Outputs:
        """See `Engine.run`."""
        results = self._session.run_with_ort_values(self._outputs, {**self._held, **_values(feed)})
        return {name: value.numpy() for name, value in zip(self._outputs, results, strict=True)}

    def hold(self, inputs: Arrays) -> OnnxRuntimeEngine:
        """See `Engine.hold`."""
        names = [value.name for value in self._session.get_inputs()]
        held = {**self._held, **_values({name: inputs[name] for name in names if name in inputs})}
        check_held(names, held)
        return OnnxRuntimeEngine(self._session, self.precision, held) if held else self

    def close(self) -> None:
        """See `Engine.close`."""
        del self._session


def _values(inputs: Arrays) -> dict[str, onnxruntime.OrtValue]:
    """Values over the arrays' own memory."""
    import onnxruntime

    return {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in inputs.items()}


class OnnxRuntimeBackend(CpuBackend):
    """See `Backend`."""

    name = "onnxruntime"
    distribution = installed("onnxruntime", "onnxruntime-gpu")

    def missing(self) -> str | None:
        """See `Backend.missing`."""
        return None  # a dependency of the package

    def precisions(self) -> list[str]:
        """See `Backend.precisions`."""
        return ["fp32", "int8"]

    def options(self, precision: str) -> dict[str, str]:
        """See `Backend.options`."""
        options = {"disabled": ",".join(SLOW_FUSIONS), "inline": str(INLINE_BYTES)}
        if precision == "int8":
            options |= {"int8": RECIPE, "reduce_range": str(reduce_range())}
        return options

    def compile(
        self, bundle: Bundle, precision: str, directory: Path, options: BuildOptions, on_progress: OnProgress
    ) -> None:
        """See `Backend.compile`."""
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            graphs = []
            for graph in bundle.graphs:
                check_external_data(graph)
                source = quantise_dynamic(graph, Path(scratch) / f"int8-{graph.name}") if precision == "int8" else graph
                graphs.append(_optimise(source, Path(scratch) / graph.name))
            gather(graphs, directory, WEIGHTS)

    def load(self, bundle: Bundle, precision: str, directory: Path, graph: str, threads: int) -> OnnxRuntimeEngine:
        """See `Backend.load`."""
        import onnxruntime

        path = inside(directory, graph)
        check_external_data(path)
        found = read_precision(path)
        options = _options(threads)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # done at build
        options.enable_mem_pattern = False  # one block per shape: much memory, 0 to 6 % of speed at 8 x 128
        options.enable_mem_reuse = False  # each result the block freed last, still in the cache: 3 to 10 % at 8 x 128
        _share_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return OnnxRuntimeEngine(session, found)


def _options(threads: int) -> onnxruntime.SessionOptions:
    """Options common to all sessions. A pool that does not spin costs nothing while another session runs;
    the process-wide pool would be one pool, but cannot be kept from spinning through Python (5 times the CPU).
    All cores are asked for as 0: only then does ONNX Runtime pin its threads to them (1 x 32: 14 to 20 % faster)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 0 if threads == machine.cores() == os.cpu_count() else threads
    options.log_severity_level = 3  # it warns that an optimised graph belongs to this machine: the build key says so
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _share_arena() -> None:
    """One arena for all sessions, instead of one per session as large as its largest batch."""
    import onnxruntime

    global _arena_shared
    with _arena_lock:
        if not _arena_shared:
            memory = onnxruntime.OrtMemoryInfo(
                "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
            )
            onnxruntime.create_and_register_allocator(memory, None)
            _arena_shared = True


def _optimise(source: Path, target: Path) -> Path:
    """Let ONNX Runtime write its optimised graph, with packed matrices, to `target` and `target`.data."""
    import onnxruntime

    options = _options(1)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(target)
    for key, value in {
        "session.save_external_prepacked_constant_initializers": "1",
        "session.optimized_model_external_initializers_file_name": f"{target.name}.data",
        "session.optimized_model_external_initializers_min_size_in_bytes": str(INLINE_BYTES),
    }.items():
        options.add_session_config_entry(key, value)
    try:
        onnxruntime.InferenceSession(
            source, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(SLOW_FUSIONS)
        )
    except Exception as error:  # pybind gives each status its own class without a common base
        raise EngineError(f"ONNX Runtime cannot build {source.name}: {error}", fix="export the bundle again") from error
    return target


def read_precision(graph: Path) -> str:
    """The precision of most weights that a graph multiplies with, read from its operators."""
    import onnx

    model = onnx.load(graph, load_external_data=False)
    sizes = {tensor.name: _elements(tensor) for tensor in model.graph.initializer}
    weights = {"int8": 0, "fp32": 0}
    for node in model.graph.node:
        kind = "int8" if node.op_type in INT8_OPERATORS else "fp32" if node.op_type in FLOAT_OPERATORS else None
        if kind:
            weights[kind] += max((sizes.get(name, 0) for name in node.input), default=0)
    return max(weights, key=lambda kind: weights[kind])


def _elements(tensor: onnx.TensorProto) -> int:
    count = 1
    for dimension in tensor.dims:
        count *= dimension
    return count
