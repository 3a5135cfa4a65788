"""Running a plan: an execution context per profile, buffers that stay, captured graphs for shapes that come again.

One run at a time per plan. The contexts of all plans of a process take their working memory from one place, as large as
the largest needs; so another ratio costs its weights and its buffers, not its activations.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from threading import Lock, RLock
from types import ModuleType
from typing import Any

import numpy as np

from variator.engines.base import TOKENS, Arrays, Feed, check_held
from variator.engines.cuda import Buffer, CapturedGraph, Pinned, Stream
from variator.engines.profiles import Shape, ShapeProfile, tightest
from variator.errors import EngineError
from variator.toolkit.rows import Outputs

MAX_GRAPHS = 32
"""Captured graphs that a profile keeps; the one that was not used for longest goes."""

Sizes = tuple[int, ...]


class Workspace:
    """Working memory of all execution contexts of this process; whoever runs holds the lock."""

    def __init__(self) -> None:
        self.lock = RLock()
        self.buffer = Buffer()


WORKSPACE = Workspace()


class Held:
    """Inputs that stay on the device: a plugin, a head."""

    numbers = count()

    def __init__(self, arrays: Arrays, stream: Stream) -> None:
        self.number = next(self.numbers)
        self.arrays = dict(arrays)
        self.shapes = {name: array.shape for name, array in arrays.items()}
        self.buffers = {name: Buffer() for name in arrays}
        for name, array in arrays.items():
            self.buffers[name].ensure(array.nbytes, f"the plugin's {name}")
            stream.to_device(self.buffers[name].address, np.ascontiguousarray(array).ctypes.data, array.nbytes)
            stream.wait()  # before the copy of the array goes

    def __del__(self) -> None:
        for buffer in getattr(self, "buffers", {}).values():
            buffer.close()


class Plan:
    """A plan on the device, with what every engine made of it shares."""

    def __init__(self, library: ModuleType, path: Path, logger: Any) -> None:
        self._runtime = library.Runtime(logger)
        self.native = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self.native is None:
            raise EngineError(f"{path} cannot be loaded: {logger.words() or 'the library does not say why'}")
        self.library, self.logger = library, logger
        names = [self.native.get_tensor_name(index) for index in range(self.native.num_io_tensors)]
        taken = library.TensorIOMode.INPUT
        self.inputs = [name for name in names if self.native.get_tensor_mode(name) == taken]
        self.outputs = [name for name in names if name not in self.inputs]
        self.dtypes = {name: np.dtype(library.nptype(self.native.get_tensor_dtype(name))) for name in names}
        self.ranges = [
            {name: self.native.get_tensor_profile_shape(name, index) for name in self.inputs}
            for index in range(self.native.num_optimization_profiles)
        ]
        self.stream, self.lock = Stream(), Lock()
        self._lanes: dict[int, Lane] = {}

    @property
    def precision(self) -> str:
        """That of its matrix products, which the builder read from the network and wrote into the plan."""
        return str(self.native.name).rsplit(":", 1)[-1]

    def profiles(self, held: Mapping[str, Sizes]) -> dict[int, ShapeProfile]:
        """The profiles that hold these inputs, by their index in the plan."""
        return {
            index: ShapeProfile(*(Shape(*map(int, shape)) for shape in ranges[TOKENS[0]]))
            for index, ranges in enumerate(self.ranges)
            if all(_inside(shape, ranges[name]) for name, shape in held.items())
        }

    def lane(self, index: int) -> Lane:
        """The execution context of a profile, made when it is first needed."""
        if index not in self._lanes:
            self._lanes[index] = Lane(self, index)
        return self._lanes[index]

    def close(self) -> None:
        """Give all memory back."""
        with self.lock:
            while self._lanes:
                self._lanes.popitem()[1].close()
            self.stream.close()
            del self.native, self._runtime


def _inside(shape: Sizes, limits: Sequence[Any]) -> bool:
    low, _, high = (tuple(limit) for limit in limits)
    return len(shape) == len(low) and all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))


class Lane:
    """One profile of a plan: its context, its buffers and what was captured on them."""

    def __init__(self, plan: Plan, index: int) -> None:
        self._plan, self._index = plan, index
        strategy = plan.library.ExecutionContextAllocationStrategy.USER_MANAGED
        self._context = plan.native.create_execution_context(strategy)
        if self._context is None:
            raise EngineError(f"no execution context could be made: {plan.logger.words()}", fix="load fewer ratios")
        self._context.set_optimization_profile_async(index, plan.stream.handle)
        self._device = {name: Buffer() for name in (*TOKENS, *plan.outputs)}
        self._host = {name: Pinned() for name in self._device}
        self._graphs: OrderedDict[tuple[Shape, int], CapturedGraph] = OrderedDict()
        self._working_bytes = int(plan.native.get_device_memory_size_for_profile_v2(index))
        self._set: tuple[Shape, int] | None = None
        self._known = self._addresses()

    def run(self, feed: Feed, held: Held) -> Outputs:
        """One run, start to end."""
        stream = self._plan.stream
        shape = Shape(*next(iter(feed.values())).shape)
        key = (shape, held.number)
        with WORKSPACE.lock:
            shapes = self._ready(shape, feed, held, key)
            for name, array in feed.items():
                self._host[name].array(array.shape, self._plan.dtypes[name])[...] = array
            if key in self._graphs:
                self._graphs.move_to_end(key)
                self._graphs[key].launch(stream)
                stream.wait()
            else:
                self._enqueue(feed, shapes)
                stream.wait()  # the first run of a shape prepares what a capture must not do
                self._capture(key, feed, shapes)
            return {
                name: self._host[name].array(shapes[name], self._plan.dtypes[name]).astype(np.float32, copy=True)
                for name in self._plan.outputs
            }

    def _ready(self, shape: Shape, feed: Feed, held: Held, key: tuple[Shape, int]) -> dict[str, Sizes]:
        """Shapes set, memory there, addresses told. What was captured on other addresses is thrown away."""
        plan, context = self._plan, self._context
        if self._set != key:
            given = {name: array.shape for name, array in feed.items()} | held.shapes
            for name, size in given.items():
                if not context.set_input_shape(name, size):
                    raise EngineError(f"the plan refuses shape {size} of {name}: {plan.logger.words()}")
        shapes = {name: tuple(context.get_tensor_shape(name)) for name in plan.outputs}
        need = {name: (array.shape, f"input {name}") for name, array in feed.items()}
        need |= {name: (size, f"output {name}") for name, size in shapes.items()}
        try:
            for name, (size, what) in need.items():
                wanted = math.prod(size) * plan.dtypes[name].itemsize
                self._device[name].ensure(wanted, what)
                self._host[name].ensure(wanted)
            WORKSPACE.buffer.ensure(self._working_bytes, f"working memory for {shape}")
        finally:  # if there was no room, too: some buffers are elsewhere then; and others move the working memory
            if self._addresses() != self._known:
                self._drop()
                self._known, self._set = self._addresses(), None
        if self._set != key:
            context.set_device_memory(WORKSPACE.buffer.address, WORKSPACE.buffer.bytes)
            for name in (*feed, *plan.outputs):
                context.set_tensor_address(name, self._device[name].address)
            for name, buffer in held.buffers.items():
                context.set_tensor_address(name, buffer.address)
            self._set = key
        return shapes

    def _addresses(self) -> list[int]:
        """What captured graphs and the context rely on."""
        device = [buffer.address for buffer in self._device.values()]
        return [*device, *(buffer.address for buffer in self._host.values()), WORKSPACE.buffer.address]

    def _enqueue(self, feed: Feed, shapes: Mapping[str, Sizes]) -> None:
        """Inputs in, computation, outputs out: onto the stream."""
        stream, dtypes = self._plan.stream, self._plan.dtypes
        for name, array in feed.items():
            stream.to_device(self._device[name].address, self._host[name].address, array.size * dtypes[name].itemsize)
        if not self._context.execute_async_v3(stream.handle):
            raise EngineError(f"the plan could not be run: {self._plan.logger.words()}")
        for name, size in shapes.items():
            stream.to_host(
                self._host[name].address, self._device[name].address, math.prod(size) * dtypes[name].itemsize
            )

    def _capture(self, key: tuple[Shape, int], feed: Feed, shapes: Mapping[str, Sizes]) -> None:
        """Record a run of this shape for the next time."""
        while len(self._graphs) >= MAX_GRAPHS:
            self._graphs.popitem(last=False)[1].close()
        self._graphs[key] = self._plan.stream.capture(lambda: self._enqueue(feed, shapes))

    def _drop(self) -> None:
        while self._graphs:
            self._graphs.popitem()[1].close()

    def close(self) -> None:
        """Give its memory back."""
        self._drop()
        for name in self._device:
            self._device[name].close()
            self._host[name].close()
        del self._context


class TensorRtEngine:
    """See `Engine`: a plan and the inputs it holds."""

    def __init__(self, plan: Plan, held: Held | None = None) -> None:
        self.precision = plan.precision
        self._plan = plan
        self._held = held or Held({}, plan.stream)
        self._profiles = plan.profiles(self._held.shapes)

    @property
    def profiles(self) -> Sequence[ShapeProfile]:
        """See `Engine.profiles`."""
        return list(self._profiles.values())

    def run(self, feed: Feed) -> Outputs:
        """See `Engine.run`.

        Raises:
            EngineError: If no profile holds the shape, or the device has no room.
        """
        indices = list(self._profiles)
        index = indices[tightest(self.profiles, *next(iter(feed.values())).shape)]
        with self._plan.lock:
            return self._plan.lane(index).run(feed, self._held)

    def hold(self, inputs: Arrays) -> TensorRtEngine:
        """See `Engine.hold`."""
        names = self._plan.inputs
        given = {name: array.astype(self._plan.dtypes[name]) for name, array in inputs.items() if name in names}
        arrays = {**self._held.arrays, **given}
        check_held(names, arrays)
        if not arrays:
            return self
        engine = TensorRtEngine(self._plan, Held(arrays, self._plan.stream))
        if not engine.profiles:
            sizes = ", ".join(f"{name} {list(array.shape)}" for name, array in given.items())
            raise EngineError(
                f"no profile of the plan holds this plugin ({sizes})",
                fix="build again from a bundle that was exported with a plugin of that ratio",
            )
        return engine

    def close(self) -> None:
        """See `Engine.close`."""
        self._plan.close()
