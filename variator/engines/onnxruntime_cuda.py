"""ONNX Runtime's CUDA provider: graphs in fp16, bf16 or fp32 on an NVIDIA GPU, and never on the CPU instead.

ONNX Runtime falls back to the processor without an error when a library of CUDA is missing; what a session really got
is asked after it was made. Weights of all ratios lie in one file, but each session copies its own to the device.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from variator.engines.base import NO_PROFILES, Arrays, BuildOptions, Feed, OnProgress, check_held
from variator.engines.gpu import gpu, no_gpu
from variator.engines.onnxruntime import WEIGHTS
from variator.engines.written import check_precision, written_in
from variator.errors import EngineError, InputError
from variator.files import inside
from variator.toolkit.bundle import Bundle
from variator.toolkit.rows import Outputs
from variator.toolkit.weights import check_external_data, gather

if TYPE_CHECKING:
    import onnxruntime

PROVIDER = "CUDAExecutionProvider"
OPTIONS = {"cudnn_conv_algo_search": "DEFAULT", "arena_extend_strategy": "kSameAsRequested"}


class OnnxRuntimeCudaEngine:
    """One session and the values it holds on the device."""

    profiles = NO_PROFILES

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
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        try:
            session = onnxruntime.InferenceSession(path, settings, providers=[(PROVIDER, dict(OPTIONS))])
        except Exception as error:  # pybind gives each status its own class without a common base
            raise EngineError(f"ONNX Runtime cannot load {graph} on the GPU: {error}") from error
        check_provider(session, graph)
        return OnnxRuntimeCudaEngine(session, precision_of(onnx_ir.load(path)))


def check_provider(session: Any, graph: str) -> None:
    """Raise `EngineError` unless a session runs on the GPU."""
    found = session.get_providers()
    if not found or found[0] != PROVIDER:
        raise EngineError(
            f"ONNX Runtime made a session for {graph} on {', '.join(found) or 'nothing'} instead of the GPU",
            fix="see its warnings for the library of CUDA or cuDNN that is missing: "
            'python -c "import onnxruntime; onnxruntime.preload_dlls(); onnxruntime.print_debug_info()"',
        )
