"""The backends there are, and the choice of one for this machine."""

from __future__ import annotations

from variator.engines.base import Backend
from variator.engines.onnxruntime import OnnxRuntimeBackend
from variator.engines.onnxruntime_cuda import OnnxRuntimeCudaBackend
from variator.engines.openvino import OpenVinoBackend
from variator.engines.tensorrt.backend import TensorRtBackend
from variator.engines.tensorrt.flavours import FLAVOURS
from variator.errors import EngineError, InputError

_ALL: tuple[Backend, ...] = (
    *map(TensorRtBackend, FLAVOURS),
    OnnxRuntimeCudaBackend(),
    OpenVinoBackend(),
    OnnxRuntimeBackend(),
)

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in _ALL}
"""By name, best default first."""


def check_name(engine: str) -> None:
    """Raise `InputError` unless it is `auto` or the name of a backend."""
    if engine != "auto" and engine not in BACKENDS:
        raise InputError(f"unknown engine {engine!r}", valid=", ".join(["auto", *BACKENDS]))


def resolve(engine: str, precision: str | None) -> tuple[Backend, str, str]:
    """Choose a backend and a precision for this machine.

    Returns:
        The backend, the precision, and the reason for the choice.

    Raises:
        InputError: For an unknown name or a precision this machine cannot build.
        EngineError: If the asked backend is not installed.
    """
    check_name(engine)
    reasons = []
    for backend in BACKENDS.values() if engine == "auto" else [BACKENDS[engine]]:
        missing = backend.missing() or (backend.cannot_run() if engine == "auto" else None)
        if missing and engine != "auto":
            raise EngineError(f"engine {engine} cannot be used: {missing}")
        if missing or (engine == "auto" and precision and precision not in backend.precisions()):
            reasons.append(missing or f"{backend.name} has no {precision} here")
            continue
        available = backend.precisions()
        if precision and precision not in available:
            raise InputError(f"{backend.name} cannot build {precision!r} on this machine", valid=", ".join(available))
        choice = precision or available[0]
        why = "asked for" if precision else "the usual best of those without int8's loss"
        return backend, choice, "; ".join([*reasons, f"{backend.name} {choice}: {why}"])
    raise InputError(f"no engine can build precision {precision!r} here: {'; '.join(reasons)}")
