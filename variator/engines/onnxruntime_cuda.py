"""ONNX Runtime's CUDA provider: graphs in fp16, bf16 or fp32 on an NVIDIA GPU, and never on the CPU instead.

ONNX Runtime falls back to the processor without an error when a library of CUDA is missing; what a session really got
is asked after it was made. Weights of all ratios lie in one file, but each session copies its own to the device.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from variator.engines.base import (
    NO_PROFILES,
    TOKENS,
    Arrays,
    BuildOptions,
    Feed,
    OnProgress,
    check_encoder_of_tokens,
    check_held,
)
from variator.engines.cuda import Stream, Timer
from variator.engines.device import DeviceArray, DeviceResult, on_device
from variator.engines.gpu import gpu, no_gpu
from variator.engines.onnxruntime import WEIGHTS
from variator.engines.written import check_precision, written_in
from variator.errors import EngineError, InputError
from variator.exporters.gate import full_feed
from variator.files import inside
from variator.toolkit.bundle import SHARED_GRAPH, Bundle
from variator.toolkit.rows import Outputs
from variator.toolkit.stack import inputs_of, neutral_inputs
from variator.toolkit.weights import check_external_data, gather

if TYPE_CHECKING:
    import onnxruntime

REAL = {"float", "float16", "bfloat16", "double"}
PROVIDER = "CUDAExecutionProvider"
OPTIONS = {"arena_extend_strategy": "kSameAsRequested", "use_tf32": "0"}
"""fp32 means fp32: by default its products are rounded to TF32."""


class OnnxRuntimeCudaEngine:
    """One session and the values it holds on the device."""

    profiles = NO_PROFILES
    captures = False

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        precision: str,
        held: Mapping[str, onnxruntime.OrtValue] | None = None,
    ) -> None:
        self.precision = precision
        self._session, self._held = session, held or {}
        self._outputs = [output.name for output in session.get_outputs()]

    def run(self, feed: Feed) -> Outputs:
        """See `Engine.run`."""
        binding = self._session.io_binding()
        for name, array in feed.items():
            binding.bind_cpu_input(name, array)
        for name, value in self._held.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        return dict(zip(self._outputs, binding.copy_outputs_to_cpu(), strict=True))

    def run_on_device(self, tensors: Mapping[str, Any], captured: bool = True) -> DeviceResult:
        """See `DeviceEngine.run_on_device`. The time is that from before the call until the session is done."""
        stream, timer = Stream(), Timer()
        try:
            names = [value.name for value in self._session.get_inputs() if value.name in TOKENS]
            given = on_device(tensors, dict.fromkeys(names, np.int64), int(stream.handle))
            stream.wait()  # the session has a stream of its own
            binding = self._session.io_binding()
            for name, array in given.items():
                binding.bind_input(name, "cuda", 0, np.int64, array.shape, array.address)
            for name, value in self._held.items():
                binding.bind_ortvalue_input(name, value)
            for name in self._outputs:
                binding.bind_output(name, "cuda")
            device_ms = timer.time(stream, lambda: self._session.run_with_iobinding(binding))
        finally:
            timer.close()
            stream.close()
        values = dict(zip(self._outputs, binding.get_outputs(), strict=True))
        return DeviceResult({name: _lent(value) for name, value in values.items()}, device_ms)

    def hold(self, inputs: Arrays) -> OnnxRuntimeCudaEngine:
        """See `Engine.hold`."""
        import onnxruntime

        names = [value.name for value in self._session.get_inputs()]
        values = onnxruntime.OrtValue.ortvalue_from_numpy
        given = {name: values(inputs[name], "cuda", 0) for name in names if name in inputs}
        held = {**self._held, **given}
        check_held(names, held)
        return OnnxRuntimeCudaEngine(self._session, self.precision, held) if held else self

    def close(self) -> None:
        """See `Engine.close`."""
        del self._session


def _lent(value: onnxruntime.OrtValue) -> DeviceArray:
    kind = value.data_type().removeprefix("tensor(").removesuffix(")")
    dtype = np.dtype({"float": "float32", "bfloat16": "uint16"}.get(kind, kind))
    return DeviceArray(value.data_ptr(), tuple(value.shape()), dtype, value)


class OnnxRuntimeCudaBackend:
    """See `Backend`."""

    name = "onnxruntime-cuda"
    distribution = "onnxruntime-gpu"

    def missing(self) -> str | None:
        """See `Backend.missing`."""
        import onnxruntime

        if PROVIDER not in onnxruntime.get_available_providers():
            return (
                f"the onnxruntime that is installed has no {PROVIDER}; pip uninstall onnxruntime, then "
                "pip install onnxruntime-gpu"
            )
        return no_gpu()

    def cannot_run(self) -> str | None:
        """See `Backend.cannot_run`."""
        return no_gpu()

    def precisions(self) -> list[str]:
        """See `Backend.precisions`."""
        return ["fp16", "bf16", "fp32"]

    def options(self, precision: str) -> dict[str, str]:
        """See `Backend.options`."""
        return dict(OPTIONS)

    def choices(self, bundle: Bundle, options: BuildOptions) -> dict[str, str]:
        """See `Backend.choices`."""
        check_encoder_of_tokens(bundle, self.name)
        if options != BuildOptions():
            raise InputError(
                f"{self.name} takes every shape and runs on the GPU that is here",
                fix="leave --profile and --compute-capability out",
            )
        return {}

    def target(self, options: BuildOptions, precision: str) -> dict[str, str]:
        """See `Backend.target`: graphs as they are fit every GPU."""
        return {}

    def device(self) -> str:
        """See `Backend.device`."""
        return gpu().name

    def misfit(self, target: Mapping[str, str]) -> str:
        """See `Backend.misfit`."""
        return ""

    def compile(
        self, bundle: Bundle, precision: str, directory: Path, options: BuildOptions, on_progress: OnProgress
    ) -> None:
        """See `Backend.compile`: the graphs in that precision, optimised by each session when it is made."""
        check_precision(bundle, precision)
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            for graph in bundle.graphs:
                check_external_data(graph)
            gather([written_in(bundle, graph, precision, Path(scratch)) for graph in bundle.graphs], directory, WEIGHTS)
        for graph in bundle.graphs:
            inputs = inputs_of(bundle, next((k for k in bundle.ratios if bundle.graph(k) == graph), 1))
            if graph.name == SHARED_GRAPH and all(bundle.graph(ratio) != graph for ratio in bundle.ratios):
                inputs = neutral_inputs(bundle)
            tokens = full_feed(bundle.manifest, (1, min(8, bundle.manifest.max_length)))
            check_placement(directory / graph.name, {**inputs, **tokens})

    def describe(self, bundle: Bundle, precision: str, directory: Path, graph: str) -> list[str]:
        """See `Backend.describe`."""
        return []

    def artefacts(self, graph: str, files: Collection[str]) -> list[str]:
        """See `Backend.artefacts`."""
        return [graph, WEIGHTS]

    def load(self, bundle: Bundle, precision: str, directory: Path, graph: str, threads: int) -> OnnxRuntimeCudaEngine:
        """See `Backend.load`."""
        import onnx_ir
        import onnxruntime

        from variator.exporters.precision import precision_of

        path = inside(directory, graph)
        check_external_data(path)
        session = session_on_gpu(path, onnxruntime.SessionOptions())
        return OnnxRuntimeCudaEngine(session, precision_of(onnx_ir.load(path)))


def session_on_gpu(path: Path, settings: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    """A session on the GPU."""
    import onnxruntime

    settings.log_severity_level = 3
    onnxruntime.preload_dlls()  # CUDA's libraries from their own packages
    try:
        session = onnxruntime.InferenceSession(path, settings, providers=[(PROVIDER, dict(OPTIONS))])
    except Exception as error:  # pybind gives each status its own class without a common base
        raise EngineError(f"ONNX Runtime cannot load {path.name} on the GPU: {error}") from error
    check_provider(session, path.name)
    return session


def check_placement(path: Path, feed: Arrays) -> None:
    """Run a graph once and see where its operators ran.

    Raises:
        EngineError: If one that computes with real numbers ran elsewhere than on the GPU. Sizes of shapes may.
    """
    import onnxruntime

    with tempfile.TemporaryDirectory() as place:
        settings = onnxruntime.SessionOptions()
        settings.enable_profiling = True
        settings.profile_file_prefix = str(Path(place) / "profile")
        session = session_on_gpu(path, settings)
        session.run(None, dict(feed))
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    for event in events:
        told = event.get("args", {})
        types = {kind for entry in told.get("input_type_shape", []) for kind in entry}
        if told.get("provider", PROVIDER) != PROVIDER and types & REAL:
            raise EngineError(
                f"ONNX Runtime ran {event['name']} of {path.name} on {told['provider']} instead of the GPU",
                fix="use another precision, or a version of onnxruntime-gpu that has this operator",
            )


def check_provider(session: Any, graph: str) -> None:
    """Raise `EngineError` unless a session runs on the GPU."""
    found = session.get_providers()
    if not found or found[0] != PROVIDER:
        raise EngineError(
            f"ONNX Runtime made a session for {graph} on {', '.join(found) or 'nothing'} instead of the GPU",
            fix="see which library of CUDA or cuDNN is missing: "
            'python -c "import onnxruntime; onnxruntime.print_debug_info()"',
        )
