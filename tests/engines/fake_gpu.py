"""A GPU that is none: CUDA's calls over host memory, and a library of plans that ONNX Runtime computes.

Only what `engines.cuda` and `engines.tensorrt.engine` call. Work on a stream is done when the stream is waited for, so
what is read or freed too early shows; a captured graph copies and computes on the addresses it was made with.
"""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

KINDS = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(float16)": np.float16}


class Status:
    def __init__(self, name: str) -> None:
        self.name = name


OK, NO_MEMORY = Status("cudaSuccess"), Status("cudaErrorMemoryAllocation")


class FakeCuda:
    """`cuda.bindings.runtime`, with `room` bytes of device memory."""

    cudaError_t = SimpleNamespace(cudaSuccess=OK)  # noqa: N815
    cudaStreamNonBlocking = 1  # noqa: N815
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815

    def __init__(self, room: int = 1 << 40) -> None:
        self.room = room
        self.memory: dict[int, Any] = {}
        self.pinned: dict[int, Any] = {}
        self.queues: dict[int, list[Callable[[], None]]] = {}
        self.captures: dict[int, list[Callable[[], None]]] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.events: dict[int, float] = {}
        self.launched = 0
        self.last = 0

    @property
    def used(self) -> int:
        return sum(len(block) for block in self.memory.values())

    def number(self) -> int:
        self.last += 1
        return self.last

    def put(self, stream: int, work: Callable[[], None]) -> None:
        (self.captures if stream in self.captures else self.queues)[stream].append(work)

    def block(self, address: int, count: int, where: dict[int, Any]) -> None:
        """Raise unless the bytes are inside of one block."""
        assert any(start <= address and address + count <= start + len(block) for start, block in where.items()), (
            "outside of every block of memory"
        )

    def cudaMalloc(self, count: int) -> tuple[Status, int | None]:  # noqa: N802
        if self.used + count > self.room:
            return NO_MEMORY, None
        block = (ctypes.c_byte * count)()
        self.memory[ctypes.addressof(block)] = block
        return OK, ctypes.addressof(block)

    def cudaFree(self, address: int) -> tuple[Status]:  # noqa: N802
        ctypes.memset(address, 0x7F, len(self.memory[address]))
        del self.memory[address]
        return (OK,)

    def cudaMallocHost(self, count: int) -> tuple[Status, int]:  # noqa: N802
        block = (ctypes.c_byte * count)()
        self.pinned[ctypes.addressof(block)] = block
        return OK, ctypes.addressof(block)

    def cudaFreeHost(self, address: int) -> tuple[Status]:  # noqa: N802
        del self.pinned[address]
        return (OK,)

    def cudaMemGetInfo(self) -> tuple[Status, int, int]:  # noqa: N802
        return OK, self.room - self.used, self.room

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Status, int]:  # noqa: N802
        stream = self.number()
        self.queues[stream] = []
        return OK, stream

    def cudaStreamDestroy(self, stream: int) -> tuple[Status]:  # noqa: N802
        del self.queues[stream]
        return (OK,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Status]:  # noqa: N802
        assert stream not in self.captures, "a wait would break the capture"
        while self.queues[stream]:
            self.queues[stream].pop(0)()
        return (OK,)

    def cudaMemcpyAsync(self, target: int, source: int, count: int, kind: int, stream: int) -> tuple[Status]:  # noqa: N802
        def copy() -> None:
            self.block(target if kind == 1 else source, count, self.memory)
            ctypes.memmove(target, source, count)

        self.put(stream, copy)
        return (OK,)

    def cudaDeviceSynchronize(self) -> tuple[Status]:  # noqa: N802
        for stream in self.queues:
            self.cudaStreamSynchronize(stream)
        return (OK,)

    def cudaEventCreate(self) -> tuple[Status, int]:  # noqa: N802
        event = self.number()
        self.events[event] = 0.0
        return OK, event

    def cudaEventRecord(self, event: int, stream: int) -> tuple[Status]:  # noqa: N802
        self.put(stream, lambda: self.events.__setitem__(event, time.perf_counter()))
        return (OK,)

    def cudaEventElapsedTime(self, start: int, end: int) -> tuple[Status, float]:  # noqa: N802
        return OK, (self.events[end] - self.events[start]) * 1e3

    def cudaEventDestroy(self, event: int) -> tuple[Status]:  # noqa: N802
        del self.events[event]
        return (OK,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[Status]:  # noqa: N802
        self.captures[stream] = []
        return (OK,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Status, list[Callable[[], None]]]:  # noqa: N802
        return OK, self.captures.pop(stream)

    def cudaGraphInstantiate(self, graph: list[Callable[[], None]], flags: int) -> tuple[Status, int]:  # noqa: N802
        number = self.number()
        self.graphs[number] = graph
        return OK, number

    def cudaGraphDestroy(self, graph: object) -> tuple[Status]:  # noqa: N802
        return (OK,)

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[Status]:  # noqa: N802
        self.launched += 1
        for work in self.graphs[graph]:
            self.put(stream, work)
        return (OK,)

    def cudaGraphExecDestroy(self, graph: int) -> tuple[Status]:  # noqa: N802
        del self.graphs[graph]
        return (OK,)


class FakeContext:
    """An execution context: computes on the addresses it was told, when the stream gets there."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.workspace = (0, 0)
        self.profile = -1

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.get_tensor_profile_shape(name, self.profile)
        self.shapes[name] = tuple(shape)
        return all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.engine.output_shape(name, self.shapes)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def set_device_memory(self, address: int, count: int) -> None:
        self.workspace = (address, count)

    def execute_async_v3(self, stream: int) -> bool:
        shapes, addresses, (workspace, count) = dict(self.shapes), dict(self.addresses), self.workspace
        engine, cuda = self.engine, self.engine.cuda
        assert count >= engine.get_device_memory_size_for_profile_v2(self.profile)

        def work() -> None:
            cuda.block(workspace, count, cuda.memory)
            feed = {}
            for value in engine.session.get_inputs():
                array = np.empty(shapes[value.name], KINDS[value.type])
                cuda.block(addresses[value.name], array.nbytes, cuda.memory)
                ctypes.memmove(array.ctypes.data, addresses[value.name], array.nbytes)
                feed[value.name] = array
            names = [value.name for value in engine.session.get_outputs()]
            for name, array in zip(names, engine.session.run(names, feed), strict=True):
                cuda.block(addresses[name], array.nbytes, cuda.memory)
                ctypes.memmove(addresses[name], np.ascontiguousarray(array).ctypes.data, array.nbytes)

        cuda.put(stream, work)
        return True


class FakeEngine:
    """A deserialised plan: JSON with a graph and its profiles."""

    workspace = 1000

    def __init__(self, plan: dict[str, Any], cuda: FakeCuda) -> None:
        self.plan, self.cuda, self.name, self.workspace = plan, cuda, plan["name"], type(self).workspace
        self.session = onnxruntime.InferenceSession(plan["graph"], providers=["CPUExecutionProvider"])
        self.values = {value.name: value for value in (*self.session.get_inputs(), *self.session.get_outputs())}
        self.num_io_tensors = len(self.values)
        self.num_optimization_profiles = len(plan["profiles"])

    def get_tensor_name(self, index: int) -> str:
        return list(self.values)[index]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name in {value.name for value in self.session.get_inputs()} else "out"

    def get_tensor_dtype(self, name: str) -> str:
        return str(self.values[name].type)

    def get_tensor_profile_shape(self, name: str, index: int) -> list[list[int]]:
        return list(self.plan["profiles"][index][name])

    def get_device_memory_size_for_profile_v2(self, index: int) -> int:
        return self.workspace * (index + 1)

    def output_shape(self, name: str, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
        batch, length = shapes["input_ids"]
        found = {"embedding": (batch, 32), "last_hidden_state": (batch, length, 32)}
        return found[name] if name in found else (batch, shapes["head.bias"][0])

    def create_engine_inspector(self) -> Any:
        layers = [{"LayerType": "Myelin"}, {"LayerType": "Reformat"}, {"LayerType": "Myelin"}]
        return SimpleNamespace(get_engine_information=lambda form: json.dumps({"Layers": layers}))

    def create_execution_context(self, strategy: str) -> FakeContext:
        assert strategy == "user managed"
        return FakeContext(self)


class FakeJustInTime:
    """`rtx.JustInTime`: what it does needs the library."""

    config = "user managed"

    def __init__(self, library: object, engine: object, file: Path) -> None: ...

    def save(self) -> None: ...


class FakeLibrary:
    """`tensorrt`, as far as it is run."""

    TensorIOMode = SimpleNamespace(INPUT="in")
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")

    LayerInformationFormat = SimpleNamespace(JSON="json")

    class ILogger:
        INTERNAL_ERROR, ERROR = "internal", "error"

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def nptype(self, kind: str) -> type:
        return KINDS[kind]

    def Runtime(self, logger: Any) -> Any:  # noqa: N802
        def deserialize_cuda_engine(data: bytes) -> FakeEngine | None:
            try:
                return FakeEngine(json.loads(data), self.cuda)
            except ValueError:
                logger.log(self.ILogger.ERROR, "magic tag does not match")
                return None

        return SimpleNamespace(deserialize_cuda_engine=deserialize_cuda_engine)


def write_plan(path: Path, graph: Path, profiles: list[dict[str, Any]], precision: str = "fp32") -> Path:
    """A plan that `FakeLibrary` loads."""
    plan = {"graph": str(graph), "profiles": profiles, "name": f"variator:{graph.stem}:{precision}"}
    path.write_text(json.dumps(plan))
    return path
