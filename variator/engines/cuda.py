"""Device memory, streams and captured graphs over NVIDIA's own bindings: all that engines need of CUDA."""

from __future__ import annotations

import ctypes
import importlib
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from variator.errors import EngineError

GRAIN = 1 << 20
"""Device and pinned memory is taken in multiples of this many bytes, so that buffers seldom grow."""


def runtime() -> ModuleType:
    """`cuda.bindings.runtime`; imported here alone."""
    return importlib.import_module("cuda.bindings.runtime")


def call(function: str, *arguments: object) -> Any:
    """A function of CUDA's runtime by name: its result, a tuple if there are several.

    Raises:
        EngineError: With CUDA's own name of what went wrong.
    """
    module = runtime()
    status, *results = getattr(module, function)(*arguments)
    if status != module.cudaError_t.cudaSuccess:
        raise EngineError(f"{function} failed: {status.name}")
    return results[0] if len(results) == 1 else tuple(results)


def free_bytes() -> int:
    """Device memory that is free now."""
    free, _ = call("cudaMemGetInfo")
    return int(free)


class Buffer:
    """Device memory that grows. `address` changes when it does."""

    def __init__(self) -> None:
        self.address, self.bytes = 0, 0

    def ensure(self, count: int, what: str) -> bool:
        """Have at least `count` bytes; the contents are lost if it grows.

        Args:
            what: It is for, for the error.

        Returns:
            Whether `address` has changed.

        Raises:
            EngineError: If the device has no room; the buffer is then empty, everything else as it was.
        """
        if count <= self.bytes:
            return False
        self.close()
        count = -(-count // GRAIN) * GRAIN
        try:
            self.address = int(call("cudaMalloc", count))
        except EngineError as error:
            raise EngineError(
                f"the GPU has no room for {count / 1e6:.0f} MB of {what} ({free_bytes() / 1e6:.0f} MB are free)",
                fix="send fewer or shorter rows at once, load fewer ratios, or use a shared bundle",
            ) from error
        self.bytes = count
        return True

    def close(self) -> None:
        """Give the memory back."""
        if self.address:
            call("cudaFree", self.address)
        self.address, self.bytes = 0, 0


class Lent:
    """Device memory that goes back to its pool when nobody has it any more."""

    def __init__(self, buffer: Buffer, pool: Pool) -> None:
        self.buffer, self._pool = buffer, pool

    def __del__(self) -> None:
        self._pool.take_back(self.buffer)


class Pool:
    """Device memory for results that others keep as long as they like; addresses come again."""

    def __init__(self) -> None:
        self._spare: list[Buffer] = []
        self._closed = False

    def lend(self, count: int, what: str) -> Lent:
        """At least `count` bytes; errors as `Buffer.ensure`."""
        if self._spare:
            # Whoever let go of it may have work on a stream of his own that still reads it.
            call("cudaDeviceSynchronize")
        fitting = [buffer for buffer in self._spare if buffer.bytes >= count]
        buffer = min(fitting, key=lambda one: one.bytes) if fitting else Buffer()
        if fitting:
            self._spare.remove(buffer)
        else:  # larger than ever: what is too small goes
            while self._spare:
                self._spare.pop().close()
        lent = Lent(buffer, self)
        buffer.ensure(count, what)
        return lent

    def take_back(self, buffer: Buffer) -> None:
        """Memory that its user is done with."""
        if self._closed:
            buffer.close()
        else:
            self._spare.append(buffer)

    def close(self) -> None:
        """Give back what nobody has; what is still lent is given back when it is let go of."""
        self._closed = True
        while self._spare:
            self._spare.pop().close()


class Pinned:
    """Host memory that the device copies from and to by itself; grows like `Buffer`."""

    def __init__(self) -> None:
        self.address, self.bytes = 0, 0

    def ensure(self, count: int, what: str) -> bool:
        """Have at least `count` bytes, else as `Buffer.ensure`."""
        if count <= self.bytes:
            return False
        self.close()
        count = -(-count // GRAIN) * GRAIN
        try:
            self.address = int(call("cudaMallocHost", count))
        except EngineError as error:
            raise EngineError(
                f"the host has no room for {count / 1e6:.0f} MB of page-locked memory for {what}",
                fix="send fewer or shorter rows at once, or raise the limit on locked memory",
            ) from error
        self.bytes = count
        return True

    def array(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """The first bytes as an array over the same memory."""
        kind: np.dtype[Any] = np.dtype(dtype)
        count = math.prod(shape) * kind.itemsize
        memory = (ctypes.c_byte * count).from_address(self.address)
        return np.ctypeslib.as_array(memory).view(kind).reshape(shape)

    def close(self) -> None:
        """Give the memory back."""
        if self.address:
            call("cudaFreeHost", self.address)
        self.address, self.bytes = 0, 0


class Stream:
    """Work for the device, in order."""

    def __init__(self) -> None:
        self.handle = call("cudaStreamCreateWithFlags", runtime().cudaStreamNonBlocking)

    def to_device(self, target: int, source: int, count: int) -> None:
        """Copy host memory to the device when its turn comes."""
        call("cudaMemcpyAsync", target, source, count, runtime().cudaMemcpyKind.cudaMemcpyHostToDevice, self.handle)

    def to_host(self, target: int, source: int, count: int) -> None:
        """Copy device memory to the host when its turn comes."""
        call("cudaMemcpyAsync", target, source, count, runtime().cudaMemcpyKind.cudaMemcpyDeviceToHost, self.handle)

    def wait(self) -> None:
        """Until everything is done."""
        call("cudaStreamSynchronize", self.handle)

    def capture(self, work: Callable[[], None]) -> CapturedGraph:
        """Record what `work` puts on this stream, without doing it."""
        module = runtime()
        call("cudaStreamBeginCapture", self.handle, module.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            work()
        except EngineError:  # that is the reason; ending the capture would only say that it is broken
            module.cudaStreamEndCapture(self.handle)
            raise
        graph = call("cudaStreamEndCapture", self.handle)
        try:
            return CapturedGraph(call("cudaGraphInstantiate", graph, 0))
        finally:
            call("cudaGraphDestroy", graph)

    def close(self) -> None:
        """Give it back."""
        call("cudaStreamDestroy", self.handle)


class Timer:
    """Time on the device between two places in a stream, by CUDA's events."""

    def __init__(self) -> None:
        self._start, self._end = call("cudaEventCreate"), call("cudaEventCreate")

    def time(self, stream: Stream, work: Callable[[], None]) -> float:
        """Do work on a stream and wait for it: ms from its start to its end on the device."""
        call("cudaEventRecord", self._start, stream.handle)
        work()
        call("cudaEventRecord", self._end, stream.handle)
        stream.wait()
        return float(call("cudaEventElapsedTime", self._start, self._end))

    def close(self) -> None:
        """Give the events back."""
        call("cudaEventDestroy", self._start)
        call("cudaEventDestroy", self._end)


class CapturedGraph:
    """Recorded work: one call to the driver does it all."""

    def __init__(self, handle: object) -> None:
        self._handle = handle

    def launch(self, stream: Stream) -> None:
        """Put it on a stream."""
        call("cudaGraphLaunch", self._handle, stream.handle)

    def close(self) -> None:
        """Give it back."""
        call("cudaGraphExecDestroy", self._handle)
