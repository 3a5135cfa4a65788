"""The NVIDIA GPU of this machine, if there is one: what it is called in keys and records, and why there is none."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from variator.errors import EngineError

DRIVER_LIBRARY = "libcuda.so.1"


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Args:
        compute_capability: Such as 8.9.
        cuda: The newest CUDA that the driver runs, such as 13.0.
    """

    name: str
    compute_capability: str
    cuda: str
    memory_bytes: int


def no_gpu() -> str | None:
    """None if there is a GPU that can be used from here, else why not and what to do."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        return f"CUDA's Python bindings cannot be imported ({error}); pip install cuda-bindings"
    try:
        ctypes.CDLL(DRIVER_LIBRARY)
    except OSError:
        return (
            f"there is no NVIDIA driver here ({DRIVER_LIBRARY} is not found); install it, or run on a machine with one"
        )
    status, count = runtime.cudaGetDeviceCount()
    if status != runtime.cudaError_t.cudaSuccess:
        return f"the NVIDIA driver does not answer ({status.name}); update it, or see `nvidia-smi`"
    if not count:
        return "the NVIDIA driver shows no GPU; see `nvidia-smi` and CUDA_VISIBLE_DEVICES"
    return None


def gpu() -> Gpu:
    """The first GPU.

    Raises:
        EngineError: If there is none.
    """
    lacking = no_gpu()
    if lacking:
        raise EngineError(lacking)
    from cuda.bindings import runtime

    _, properties = runtime.cudaGetDeviceProperties(0)
    _, version = runtime.cudaDriverGetVersion()
    return Gpu(
        properties.name.decode().rstrip("\0"),
        f"{properties.major}.{properties.minor}",
        f"{version // 1000}.{version % 1000 // 10}",
        int(properties.totalGlobalMem),
    )
