"""Running a plan: buffers that stay, an execution context per profile, captured graphs for shapes that come again.

One run at a time per plan. All contexts of a process take their working memory from one place, as large as the largest
needs; so another ratio costs its weights and its buffers, not its activations. A shape that comes for the second time
gets a context of its own, on which its run is captured: a captured graph holds only while its context's shapes stay.
"""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from threading import Lock, RLock
from types import ModuleType
from typing import Any

import numpy as np

from variator.engines.base import TOKENS, Arrays, Feed, check_held
from variator.engines.cuda import Buffer, CapturedGraph, Pinned, Pool, Stream, Timer
from variator.engines.device import DeviceArray, DeviceResult, on_device
from variator.engines.profiles import Shape, ShapeProfile, tightest
from variator.engines.tensorrt.flavours import Flavour
from variator.engines.tensorrt.rtx import JustInTime
from variator.errors import EngineError
from variator.toolkit.rows import Outputs

MAX_GRAPHS = 32
"""Captured graphs that a plan keeps; the one that was not used for longest goes."""

MAX_SEEN = 1024
"""Shapes that a plan remembers to have run once."""

Sizes = tuple[int, ...]
Run = tuple[int, Shape, int, Sizes]
"""What a captured graph is for: profile, shape, the number of what is held, and addresses of tensors of others."""
Given = Mapping[str, Any]
"""Inputs by name: whatever has a shape."""


class Workspace:
    """Working memory of all contexts of this process, until its last plan goes. Whoever runs holds the lock."""

    def __init__(self) -> None:
        self.lock = RLock()
        self.buffer = Buffer()
        self._plans = 0

    def join(self) -> None:
        """A plan begins to use it."""
        with self.lock:
            self._plans += 1

    def leave(self) -> None:
        """A plan is done with it."""
        with self.lock:
            self._plans -= 1
            if not self._plans:
                self.buffer.close()


WORKSPACE = Workspace()


class Held:
    """Inputs that stay on the device: a plugin, a head."""

    numbers = count()

    def __init__(self, arrays: Arrays) -> None:
        self.number = next(self.numbers)
        self.arrays = dict(arrays)
        self.shapes = {name: array.shape for name, array in arrays.items()}
        self.buffers = {name: Buffer() for name in arrays}
        if not arrays:
            return
        stream = Stream()  # its own: another thread may be capturing on the plan's
        try:
            for name, array in arrays.items():
                whole = np.ascontiguousarray(array)
                self.buffers[name].ensure(whole.nbytes, f"the plugin's {name}")
                stream.to_device(self.buffers[name].address, whole.ctypes.data, whole.nbytes)
                stream.wait()  # before `whole` goes
        finally:
            stream.close()

    def __del__(self) -> None:
        for buffer in getattr(self, "buffers", {}).values():
            buffer.close()


class Context:
    """One execution context of a plan, in one profile, set to one shape and plugin at a time."""

    def __init__(self, plan: Plan, index: int) -> None:
        self._plan = plan
        self.native = plan.new_context()
        if self.native is None:
            raise EngineError(f"no execution context could be made{plan.reasons()}", fix="load fewer ratios")
        plan.check(self.native.set_optimization_profile_async(index, plan.stream.handle), f"profile {index}")
        self._working_bytes = int(plan.native.get_device_memory_size_for_profile_v2(index))
        self.shapes: dict[str, Sizes] = {}
        self._ready: tuple[object, ...] = ()

    def shape(self, feed: Given, held: Held) -> dict[str, Sizes]:
        """Set the inputs' shapes; those of the outputs."""
        plan, given = self._plan, {name: array.shape for name, array in feed.items()} | held.shapes
        if given != self.shapes:
            self.shapes, self._ready = {}, ()
            for name, size in given.items():
                plan.check(self.native.set_input_shape(name, size), f"shape {size} of {name}")
            self.shapes = given
        outputs = {name: tuple(self.native.get_tensor_shape(name)) for name in plan.outputs}
        plan.check(all(size >= 0 for sizes in outputs.values() for size in sizes), f"these shapes: {given}")
        return outputs

    def place(self, held: Held, where: Mapping[str, int], what: str) -> None:
        """Tell it where everything lies, if that has changed.

        Args:
            where: Addresses of all that is not held.
        """
        plan = self._plan
        WORKSPACE.buffer.ensure(self._working_bytes, f"working memory for {what}")
        now = (held.number, WORKSPACE.buffer.address, *where.values())
        if self._ready != now:
            self.native.set_device_memory(WORKSPACE.buffer.address, WORKSPACE.buffer.bytes)
            addresses = {**where, **{name: buffer.address for name, buffer in held.buffers.items()}}
            for name in (*plan.inputs, *plan.outputs):
                plan.check(self.native.set_tensor_address(name, addresses[name]), f"the address of {name}")
            self._ready = now


class Plan:
    """A plan on the device, with what every engine made of it shares.

    Args:
        made: File for the kernels of a library that makes them when they are needed.
    """

    def __init__(self, flavour: Flavour, library: ModuleType, path: Path, logger: Any, made: Path) -> None:
        self._runtime = library.Runtime(logger)
        self.native = self._runtime.deserialize_cuda_engine(path.read_bytes())
        self._logger = logger
        if self.native is None:
            raise EngineError(f"{path} cannot be loaded{self.reasons() or ': the library does not say why'}")
        self.library = library
        names = [self.native.get_tensor_name(index) for index in range(self.native.num_io_tensors)]
        taken = library.TensorIOMode.INPUT
        self.inputs = [name for name in names if self.native.get_tensor_mode(name) == taken]
        self.outputs = [name for name in names if name not in self.inputs]
        self.dtypes = {name: np.dtype(library.nptype(self.native.get_tensor_dtype(name))) for name in names}
        self.ranges = [
            {name: self.native.get_tensor_profile_shape(name, index) for name in self.inputs}
            for index in range(self.native.num_optimization_profiles)
        ]
        self.device = {name: Buffer() for name in names if name in TOKENS or name in self.outputs}
        self._host = {name: Pinned() for name in self.device}
        self._jit = None if flavour.device_code else JustInTime(library, self.native, made)
        self.stream, self.lock = Stream(), Lock()
        self._timer = Timer()
        self._pools = {name: Pool() for name in self.outputs}
        self._contexts: dict[int, Context] = {}
        self._captured: OrderedDict[Run, tuple[Context, CapturedGraph]] = OrderedDict()
        self._seen: OrderedDict[Run, None] = OrderedDict()
        self._known = self.addresses()
        self.uncaptured = ""
        """Why nothing is captured any more; empty as long as that works."""
        WORKSPACE.join()

    @property
    def captures(self) -> bool:
        """Whether it captures runs itself, and still can; TensorRT-RTX does it unseen."""
        return self._jit is None and not self.uncaptured

    @property
    def precision(self) -> str:
        """That of most of its weights, as the builder read it from the library's network; it travels in the plan."""
        return str(self.native.name).rsplit(":", 1)[-1]

    def profiles(self, held: Mapping[str, Sizes]) -> dict[int, ShapeProfile]:
        """The profiles that hold these inputs, by their index in the plan."""
        return {
            index: ShapeProfile(*(Shape(*map(int, shape)) for shape in ranges[TOKENS[0]]))
            for index, ranges in enumerate(self.ranges)
            if all(_inside(shape, ranges[name]) for name, shape in held.items())
        }

    def new_context(self) -> Any:
        """An execution context of the library that brings no working memory of its own."""
        strategy = self.library.ExecutionContextAllocationStrategy.USER_MANAGED
        return self.native.create_execution_context(self._jit.config if self._jit else strategy)

    def reasons(self) -> str:
        """What the library said last, as the end of an error."""
        words = self._logger.words()
        return f": {words}" if words else ""

    def check(self, fine: object, what: str) -> None:
        """Raise `EngineError` if the library refused something."""
        if not fine:
            raise EngineError(f"the plan refuses {what}{self.reasons()}", fix="build it again with --rebuild")

    def addresses(self) -> list[int]:
        """Where the buffers lie that contexts and captured graphs rely on."""
        return [*self._own().values(), *(buffer.address for buffer in self._host.values())]

    def _own(self) -> dict[str, int]:
        return {name: buffer.address for name, buffer in self.device.items()}

    def run(self, index: int, feed: Feed, held: Held) -> Outputs:
        """One run, start to end: host memory in, host memory out.

        Args:
            index: Of a profile that holds the shape.
        """
        key = (index, Shape(*next(iter(feed.values())).shape), held.number, ())
        with self.lock, WORKSPACE.lock:
            context = self._captured[key][0] if key in self._captured else self._context(index)
            outputs = context.shape(feed, held)
            self._have_room(feed, outputs)

            def work(one: Context) -> None:
                self._copy_in(feed)
                self._compute(one)
                self._copy_out(outputs)

            context.place(held, self._own(), str(key[1]))
            for name, array in feed.items():
                self._host[name].array(array.shape, self.dtypes[name])[...] = array
            self._launch(key, context, work)
            self.stream.wait()
            results = {
                name: self._host[name].array(size, self.dtypes[name]).astype(np.float32, copy=True)
                for name, size in outputs.items()
            }
            self._capture(key, feed, held, self._own(), work)
            return results

    def run_on_device(
        self, index: int, tensors: Mapping[str, DeviceArray], held: Held, captured: bool = True
    ) -> DeviceResult:
        """One run between tensors on the device; complete when it returns. Arguments as `run`."""
        shape = Shape(*next(iter(tensors.values())).shape)
        with self.lock, WORKSPACE.lock:
            context = self._context(index)
            outputs = context.shape(tensors, held)
            lent = {name: self._lend(name, size) for name, size in outputs.items()}
            where = {name: one.address for name, one in (*tensors.items(), *lent.items())}
            key = (index, shape, held.number, tuple(where.values()))
            if captured and key in self._captured:
                context = self._captured[key][0]
            context.place(held, where, str(shape))
            if captured:
                device_ms = self._timer.time(self.stream, lambda: self._launch(key, context, self._compute))
                self._capture(key, tensors, held, where, self._compute)
            else:
                device_ms = self._timer.time(self.stream, lambda: self._compute(context))
            return DeviceResult(lent, device_ms)

    def _lend(self, name: str, size: Sizes) -> DeviceArray:
        """Memory for an output, its user's to keep. Addresses come again, so captured graphs are of use."""
        lent = self._pools[name].lend(math.prod(size) * self.dtypes[name].itemsize, f"output {name}")
        return DeviceArray(lent.buffer.address, size, self.dtypes[name], lent)

    def _context(self, index: int) -> Context:
        """That of a profile, made when it is first needed."""
        if index not in self._contexts:
            self._contexts[index] = Context(self, index)
        return self._contexts[index]

    def _have_room(self, feed: Feed, outputs: Mapping[str, Sizes]) -> None:
        need = {name: (array.shape, f"input {name}") for name, array in feed.items()}
        need |= {name: (size, f"output {name}") for name, size in outputs.items()}
        for name, (size, what) in need.items():
            wanted = math.prod(size) * self.dtypes[name].itemsize
            self.device[name].ensure(wanted, what)
            self._host[name].ensure(wanted, what)

    def _forget_moved(self) -> None:
        """Throw captured graphs away if something they rely on has moved, the common working memory, too."""
        now = [*self.addresses(), WORKSPACE.buffer.address]
        if now != self._known:
            self._drop()
            self._known = now

    def _launch(self, key: Run, context: Context, work: Callable[[Context], None]) -> None:
        """Put a run onto the stream: its captured graph if there still is one."""
        self._forget_moved()
        if key in self._captured:
            self._captured.move_to_end(key)
            self._captured[key][1].launch(self.stream)
        else:
            work(context)

    def _copy_in(self, feed: Feed) -> None:
        for name, array in feed.items():
            count_ = array.size * self.dtypes[name].itemsize
            self.stream.to_device(self.device[name].address, self._host[name].address, count_)

    def _compute(self, context: Context) -> None:
        self.check(context.native.execute_async_v3(self.stream.handle), "to run")

    def _copy_out(self, outputs: Mapping[str, Sizes]) -> None:
        for name, size in outputs.items():
            count_ = math.prod(size) * self.dtypes[name].itemsize
            self.stream.to_host(self._host[name].address, self.device[name].address, count_)

    def _again(self, key: Run) -> bool:
        """Whether this run has been asked for before, and should be captured."""
        if not self.captures:
            return False
        if key in self._seen:
            del self._seen[key]
            return True
        self._seen[key] = None
        while len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)
        return False

    def _capture(
        self, key: Run, given: Given, held: Held, where: Mapping[str, int], work: Callable[[Context], None]
    ) -> None:
        """Record a run that comes again, on a context of its own. If that fails, runs go on without: `uncaptured`."""
        if key in self._captured or not self._again(key):
            return
        while len(self._captured) >= MAX_GRAPHS:
            self._captured.popitem(last=False)[1][1].close()
        try:
            context = Context(self, key[0])
            context.shape(given, held)
            context.place(held, where, str(key[1]))
            work(context)  # what a first run prepares cannot be captured
            self.stream.wait()
            graph = self.stream.capture(lambda: work(context))
        except EngineError as error:
            self.uncaptured = error.what
        else:
            self._captured[key] = (context, graph)
        self._forget_moved()

    def _drop(self) -> None:
        while self._captured:
            self._captured.popitem()[1][1].close()

    def layers(self) -> dict[str, int]:
        """How many layers of each type it has, by the library's own inspector; most first."""
        inspector = self.native.create_engine_inspector()
        told = json.loads(inspector.get_engine_information(self.library.LayerInformationFormat.JSON))
        kinds = Counter(str(layer["LayerType"]) for layer in told.get("Layers", []) if isinstance(layer, dict))
        return dict(kinds.most_common())

    def close(self) -> None:
        """Give all memory back."""
        with self.lock, WORKSPACE.lock:
            self._drop()
            self._contexts.clear()
            for name in self.device:
                self.device[name].close()
                self._host[name].close()
            for pool in self._pools.values():
                pool.close()
            if self._jit is not None:
                self._jit.save()
            self._timer.close()
            self.stream.close()
            del self.native, self._runtime
            WORKSPACE.leave()


def _inside(shape: Sizes, limits: Sequence[Any]) -> bool:
    low, _, high = (tuple(limit) for limit in limits)
    return len(shape) == len(low) and all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))


class TensorRtEngine:
    """See `Engine`: a plan and the inputs it holds."""

    def __init__(self, plan: Plan, held: Held | None = None) -> None:
        self.precision = plan.precision
        self.plan = plan
        self._held = held or Held({})
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
        return self.plan.run(index, feed, self._held)

    @property
    def captures(self) -> bool:
        """See `DeviceEngine.captures`."""
        return self.plan.captures

    def run_on_device(self, tensors: Mapping[str, Any], captured: bool = True) -> DeviceResult:
        """See `DeviceEngine.run_on_device`.

        Raises:
            EngineError: If no profile holds the shape, or the device has no room.
        """
        names = [name for name in self.plan.inputs if name in TOKENS]
        given = on_device(tensors, {name: self.plan.dtypes[name] for name in names}, int(self.plan.stream.handle))
        indices = list(self._profiles)
        index = indices[tightest(self.profiles, *next(iter(given.values())).shape)]
        return self.plan.run_on_device(index, given, self._held, captured)

    def describe(self) -> list[str]:
        """Its inputs, outputs, memory and layers, a line each."""
        plan = self.plan
        sides = {"inputs": plan.inputs, "outputs": plan.outputs}
        lines = [
            f"{side}: {', '.join(f'{name} {plan.dtypes[name]}' for name in names)}" for side, names in sides.items()
        ]
        layers = ", ".join(f"{count} {kind}" for kind, count in plan.layers().items())
        working = max(plan.native.get_device_memory_size_for_profile_v2(index) for index in range(len(plan.ranges)))
        return [*lines, f"working memory: {working / 1e6:.1f} MB", f"layers: {layers or 'the plan does not say'}"]

    def hold(self, inputs: Arrays) -> TensorRtEngine:
        """See `Engine.hold`."""
        names = self.plan.inputs
        given = {name: array.astype(self.plan.dtypes[name]) for name, array in inputs.items() if name in names}
        arrays = {**self._held.arrays, **given}
        check_held(names, arrays)
        if not arrays:
            return self
        if not self.plan.profiles({name: array.shape for name, array in arrays.items()}):
            sizes = ", ".join(f"{name} {list(array.shape)}" for name, array in given.items())
            raise EngineError(
                f"no profile of the plan holds this plugin ({sizes})",
                fix="build again from a bundle that was exported with a plugin of that ratio",
            )
        return TensorRtEngine(self.plan, Held(arrays))

    def close(self) -> None:
        """See `Engine.close`."""
        self.plan.close()
