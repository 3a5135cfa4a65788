"""OpenVINO on CPUs: fp32, bf16 where the processor has it, and int8.

fp32 and bf16 are compiled from the bundle's own graphs at load: that takes 0.2 s for MiniLM, hardly more than
importing a compiled blob (0.16 s), and saves a copy of the backbone per ratio on disk.
"""

from __future__ import annotations

from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from variator.engines.base import Feed, Outputs
from variator.errors import EngineError
from variator.toolkit.bundle import Bundle
from variator.toolkit.weights import check_external_data

if TYPE_CHECKING:
    import openvino

HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
"""Our precision -> OpenVINO's INFERENCE_PRECISION_HINT."""

READ_BACK = {"f32": "fp32", "bf16": "bf16", "i8": "int8", "u8": "int8", "f16": "fp16"}
MATRIX_LAYERS = ("FullyConnected", "MatMul", "Gemm")


class OpenVinoEngine:
    """One compiled model with an infer request per thread that is running it."""

    def __init__(self, compiled: openvino.CompiledModel, precision: str) -> None:
        self.precision = precision
        self._compiled = compiled
        self._outputs = [output.get_any_name() for output in compiled.outputs]
        self._idle: list[openvino.InferRequest] = []
        self._lock = Lock()

    def run(self, feed: Feed) -> Outputs:
        """See `Engine.run`."""
        with self._lock:
            request = self._idle.pop() if self._idle else self._compiled.create_infer_request()
        try:
            results = request.infer(dict(feed), share_inputs=True)
            return {name: results[index].copy() for index, name in enumerate(self._outputs)}
        finally:
            with self._lock:
                self._idle.append(request)

    def close(self) -> None:
        """See `Engine.close`."""
        self._idle.clear()
        del self._compiled


class OpenVinoBackend:
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
        capabilities = _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return [*(["bf16"] if "BF16" in capabilities else []), "fp32", "int8"]

    def options(self, precision: str) -> dict[str, str]:
        """See `Backend.options`."""
        return {key: str(value) for key, value in _settings(precision, 0).items()}

    def compile(self, bundle: Bundle, precision: str, directory: Path) -> None:
        """See `Backend.compile`."""

    def load(self, bundle: Bundle, precision: str, directory: Path, ratio: int, threads: int) -> OpenVinoEngine:
        """See `Backend.load`."""
        graph = bundle.graph(ratio)
        check_external_data(graph)
        try:
            compiled = _core().compile_model(_core().read_model(graph), "CPU", _settings(precision, threads))
        except RuntimeError as error:
            raise EngineError(f"OpenVINO cannot compile {graph.name}: {error}", fix="export the bundle again") from error
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


def _settings(precision: str, threads: int) -> dict[str, Any]:
    return {
        "INFERENCE_PRECISION_HINT": HINTS[precision],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }


def read_precision(compiled: openvino.CompiledModel) -> str:
    """The precision that most matrix layers of a compiled model run in, from its execution graph."""
    counts: dict[str, int] = {}
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        if "layerType" in info and info["layerType"].astype(str) in MATRIX_LAYERS:
            found = info["runtimePrecision"].astype(str)
            counts[found] = counts.get(found, 0) + 1
    if not counts:
        raise EngineError("OpenVINO's execution graph shows no matrix product", fix="use another engine")
    found = max(counts, key=lambda name: counts[name])
    return READ_BACK.get(found, found)
