"""OpenVINO on CPUs: fp32, bf16 where the processor has it, and int8.

fp32 and bf16 are compiled from the bundle's own graphs at load: that takes 0.2 s for MiniLM, hardly more than
importing a compiled blob (0.16 s), and saves a copy of the backbone per ratio on disk. int8 graphs are made at
build, with activation ranges from the gate's texts.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from variator.engines.base import NO_PROFILES, Arrays, BuildOptions, CpuBackend, Feed, OnProgress, check_held
from variator.engines.quantise import RECIPE, quantise_static
from variator.errors import EngineError
from variator.exporters.gate import load_cases
from variator.files import inside
from variator.toolkit.bundle import DECODER_GATE_FILE, DECODER_GRAPH, GATE_FILE, Bundle
from variator.toolkit.rows import Outputs
from variator.toolkit.stack import PLUGIN_INPUTS, inputs_of, neutral_inputs
from variator.toolkit.weights import check_external_data, gather

if TYPE_CHECKING:
    import openvino

WEIGHTS = "weights.data"
HINTS = {"fp32": "f32", "bf16": "bf16"}
"""Our precision -> OpenVINO's INFERENCE_PRECISION_HINT."""

READ_BACK = {"f32": "fp32", "bf16": "bf16", "i8": "int8", "u8": "int8", "f16": "fp16"}


class OpenVinoEngine:
    """One compiled model, the tensors it holds, and an infer request per thread that is running it."""

    def __init__(
        self, compiled: openvino.CompiledModel, precision: str, held: Mapping[str, openvino.Tensor] | None = None
    ) -> None:
        self.precision, self.profiles = precision, NO_PROFILES
        self._compiled, self._held = compiled, held or {}
        self._outputs = [output.get_any_name() for output in compiled.outputs]
        self._idle: list[openvino.InferRequest] = []
        self._lock = Lock()

    def run(self, feed: Feed) -> Outputs:
        """See `Engine.run`."""
        with self._lock:
            request = self._idle.pop() if self._idle else self._new_request()
        try:
            results = request.infer(dict(feed), share_inputs=True)
            return {name: results[index].copy() for index, name in enumerate(self._outputs)}
        finally:
            with self._lock:
                self._idle.append(request)

    def _new_request(self) -> openvino.InferRequest:
        """A request that has the held tensors set, once for all its runs."""
        request = self._compiled.create_infer_request()
        for name, tensor in self._held.items():
            request.set_tensor(name, tensor)
        return request

    def hold(self, inputs: Arrays) -> OpenVinoEngine:
        """See `Engine.hold`."""
        ports = {port.get_any_name(): port.get_element_type() for port in self._compiled.inputs}
        given = {name: _tensor(array, ports[name]) for name, array in inputs.items() if name in ports}
        held = {**self._held, **given}
        check_held(ports, held)
        return OpenVinoEngine(self._compiled, self.precision, held) if held else self

    def close(self) -> None:
        """See `Engine.close`."""
        self._idle.clear()
        del self._compiled


class OpenVinoBackend(CpuBackend):
    """See `Backend`."""

    name = "openvino"
    distribution = "openvino"

    def missing(self) -> str | None:
        """See `Backend.missing`."""
        try:
            import openvino  # noqa: F401
        except ImportError as error:
            return f"openvino cannot be imported ({error}); pip install 'variator[openvino]'"
        return None

    def precisions(self) -> list[str]:
        """See `Backend.precisions`."""
        return [*(["bf16"] if _has_bf16() else []), "fp32", "int8"]

    def options(self, precision: str) -> dict[str, str]:
        """See `Backend.options`."""
        options = {key: str(value) for key, value in _settings(precision, 0).items()}
        if precision == "int8":
            options |= {"int8": RECIPE, "quantiser": importlib.metadata.version("onnxruntime")}
        return options

    def compile(
        self, bundle: Bundle, precision: str, directory: Path, options: BuildOptions, on_progress: OnProgress
    ) -> None:
        """See `Backend.compile`."""
        if precision != "int8":
            return
        cases = load_cases(inside(bundle.path, GATE_FILE))
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            graphs = []
            for graph in bundle.graphs:
                check_external_data(graph)
                beside = [inputs_of(bundle, ratio) for ratio in bundle.ratios if bundle.graph(ratio) == graph]
                beside = beside or [neutral_inputs(bundle)]  # a shared graph that no ratio uses yet
                if graph.name == DECODER_GRAPH:
                    feeds = [case.feed for case in load_cases(inside(bundle.path, DECODER_GATE_FILE))]
                else:
                    feeds = [{**inputs, **case.feed} for inputs in beside for case in cases]
                graphs.append(quantise_static(graph, Path(scratch) / graph.name, feeds))
            gather(graphs, directory, WEIGHTS)

    def load(self, bundle: Bundle, precision: str, directory: Path, graph: str, threads: int) -> OpenVinoEngine:
        """See `Backend.load`."""
        path = inside(directory if precision == "int8" else bundle.path, graph)
        check_external_data(path)
        settings = _settings(precision, threads)
        try:
            model = _core().read_model(path)
            _narrow(model, settings)
            compiled = _core().compile_model(model, "CPU", settings)
        except RuntimeError as error:
            raise EngineError(f"OpenVINO cannot compile {graph}: {error}", fix="export the bundle again") from error
        return OpenVinoEngine(compiled, read_precision(compiled))


_shared_core: openvino.Core | None = None
_core_lock = Lock()


def _core() -> openvino.Core:
    import openvino

    global _shared_core
    with _core_lock:
        if _shared_core is None:
            _shared_core = openvino.Core()
        return _shared_core


def _has_bf16() -> bool:
    return "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _settings(precision: str, threads: int) -> dict[str, Any]:
    return {
        # What int8 leaves unquantised runs in bf16 where the processor has it.
        "INFERENCE_PRECISION_HINT": HINTS.get(precision) or ("bf16" if _has_bf16() else "f32"),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }


def _narrow(model: openvino.Model, settings: Mapping[str, Any]) -> None:
    """Let plugin inputs be bf16 where the model runs in it, instead of casting them in every run."""
    import openvino

    if settings["INFERENCE_PRECISION_HINT"] == "bf16":
        for parameter in model.get_parameters():
            if parameter.output(0).get_any_name() in PLUGIN_INPUTS:
                parameter.set_element_type(openvino.Type.bf16)
        model.validate_nodes_and_infer_types()


def _tensor(array: npt.NDArray[Any], kind: openvino.Type) -> openvino.Tensor:
    """A tensor of the kind that an input takes, on the device."""
    import openvino

    if kind != openvino.Type.bf16:
        return openvino.Tensor(np.ascontiguousarray(array, kind.to_dtype()))
    tensor = openvino.Tensor(kind, array.shape)
    # numpy has no bf16: the upper half of a float32, rounded to nearest even.
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    tensor.data.view(np.uint16)[...] = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tensor


def read_precision(compiled: openvino.CompiledModel) -> str:
    """The precision a compiled model runs in, from its execution graph: int8 if at least a third of the layers
    with a weight are, else what most of them are in (what int8 leaves alone are mainly the plugin's small maps)."""
    counts: dict[str, int] = {}
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        if "layerType" in info and info["layerType"].astype(str) == "FullyConnected":
            found = info["runtimePrecision"].astype(str)
            precision = READ_BACK.get(found, found)
            counts[precision] = counts.get(precision, 0) + 1
    if not counts:
        raise EngineError("OpenVINO's execution graph shows no layer with a weight", fix="use another engine")
    if 3 * counts.get("int8", 0) >= sum(counts.values()):
        return "int8"
    return max(counts, key=lambda name: counts[name])
