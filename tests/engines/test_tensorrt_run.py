"""Running plans, rehearsed without a GPU: profiles, buffers, captured graphs, held plugins, memory that runs out."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.bench.records import make_record
from tests.conftest import lively
from tests.engines.fake_gpu import FakeCuda, FakeEngine, FakeLibrary, write_plan
from variator.bench.record import Record
from variator.bench.resident import measure, resident
from variator.bench.table import grids
from variator.engines import cuda as cuda_module
from variator.engines import device as device_module
from variator.engines.base import DeviceEngine
from variator.engines.cuda import GRAIN, Buffer
from variator.engines.device import DeviceArray
from variator.engines.profiles import ShapeProfile, parse_profiles
from variator.engines.tensorrt import engine as engine_module
from variator.engines.tensorrt.backend import logger_of
from variator.engines.tensorrt.builder import input_ranges
from variator.engines.tensorrt.engine import MAX_GRAPHS, Plan, TensorRtEngine, Workspace
from variator.engines.tensorrt.flavours import TENSORRT
from variator.errors import EngineError, InputError
from variator.exporters.gate import Feed, full_feed, load_cases, plain_runner
from variator.toolkit.bundle import GATE_FILE, Bundle
from variator.toolkit.checkpoint import Backbone
from variator.toolkit.stack import neutral, stack

PROFILES = parse_profiles(["1x1:2x8:4x16,1x1:2x32:4x64,1x1:8x128:16x150"], 150)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    fake = FakeCuda()
    monkeypatch.setattr(cuda_module, "runtime", lambda: fake)
    monkeypatch.setattr(engine_module, "WORKSPACE", Workspace())
    yield fake
    assert (
        not fake.memory and not fake.pinned and not fake.graphs and not fake.queues and not fake.events
    )  # everything was given back


def load(
    bundle: Bundle, graph: str, cuda: FakeCuda, path: Path, profiles: tuple[ShapeProfile, ...] = PROFILES
) -> TensorRtEngine:
    library = FakeLibrary(cuda)
    ranges = input_ranges(bundle, bundle.path / graph, profiles)
    plan = write_plan(path / graph.replace(".onnx", ".plan"), bundle.path / graph, ranges)
    return TensorRtEngine(Plan(TENSORRT, library, plan, logger_of(library), path / "kernels"))  # type: ignore[arg-type]


def feed_of(bundle: Bundle, batch: int, length: int, seed: int = 0) -> Feed:
    feed = full_feed(bundle.manifest, (batch, length))
    feed["input_ids"] = np.random.default_rng(seed).integers(0, bundle.manifest.vocabulary, (batch, length))
    return feed


def test_every_shape_is_answered_right_the_first_time_and_from_a_captured_graph(
    bundle: Bundle, cuda: FakeCuda, tmp_path: Path
) -> None:
    engine = load(bundle, "ratio-4.onnx", cuda, tmp_path)
    reference = plain_runner(bundle.graph(4))
    assert engine.precision == "fp32" and list(engine.profiles) == list(PROFILES)
    shapes = [(1, 1), (3, 16), (2, 33), (16, 150), (3, 16), (1, 1)]
    for round_ in range(3):
        for batch, length in shapes:
            feed = feed_of(bundle, batch, length, seed=round_ * 100 + batch + length)
            np.testing.assert_allclose(engine.run(feed)["embedding"], reference(feed)["embedding"], atol=1e-6)
    assert cuda.launched == 4 + 4 + 1 + 1  # of each shape all but the first two runs
    engine.close()


def on_fake_device(cuda: FakeCuda, feed: Feed) -> dict[str, DeviceArray]:
    """A feed's tensors in the fake's memory; they belong to the one who asked."""
    found = {}
    for name, array in feed.items():
        buffer = Buffer()
        buffer.ensure(array.nbytes, name)
        ctypes.memmove(buffer.address, np.ascontiguousarray(array).ctypes.data, array.nbytes)
        weakref.finalize(buffer, lambda address=buffer.address: cuda.cudaFree(address))
        found[name] = DeviceArray(buffer.address, array.shape, array.dtype, buffer)
    return found


class Foreign:
    """A tensor as a library on the GPU has it: it is told on which stream it will be read."""

    def __init__(self, lender: object) -> None:
        self.lender = lender
        self.streams: list[int] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)

    def __dlpack__(self, *, stream: int) -> object:
        self.streams.append(stream)
        return self.lender.__dlpack__()  # type: ignore[attr-defined]


@pytest.fixture
def readable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake's device memory is this machine's: let numpy read and lend it as if it were the device."""
    monkeypatch.setattr(device_module, "CUDA", 1)


@pytest.mark.usefixtures("readable")
def test_tensors_on_the_device_are_taken_and_given_through_dlpack(
    bundle: Bundle, cuda: FakeCuda, tmp_path: Path
) -> None:
    engine = load(bundle, "ratio-4.onnx", cuda, tmp_path)
    assert isinstance(engine, DeviceEngine)
    reference = plain_runner(bundle.graph(4))
    kept = []
    for seed in range(6):
        feed = feed_of(bundle, 3, 16, seed)
        given = {name: Foreign(array) for name, array in on_fake_device(cuda, feed).items()}
        result = engine.run_on_device(given)
        assert all(tensor.streams == [engine.plan.stream.handle] for tensor in given.values())
        assert result.device_ms > 0
        found = np.from_dlpack(result.outputs["embedding"])
        np.testing.assert_allclose(found, reference(feed)["embedding"], atol=1e-6)
        kept.append((found, reference(feed)["embedding"]))
        del result
    for found, expected in kept:  # none was written over while somebody had it
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert len({found.ctypes.data for found, _ in kept}) == 6
    engine.close()
    np.testing.assert_allclose(kept[0][0], kept[0][1], atol=1e-6)  # and it outlives the engine
    kept.clear()
    del found, given


@pytest.mark.usefixtures("readable")
def test_a_run_on_the_same_tensors_is_captured_and_sees_what_is_in_them_now(
    bundle: Bundle, cuda: FakeCuda, tmp_path: Path
) -> None:
    engine = load(bundle, "ratio-4.onnx", cuda, tmp_path)
    reference = plain_runner(bundle.graph(4))
    tensors = on_fake_device(cuda, feed_of(bundle, 3, 16))
    for seed in range(5):
        feed = feed_of(bundle, 3, 16, seed)
        for name, array in feed.items():
            ctypes.memmove(tensors[name].address, np.ascontiguousarray(array).ctypes.data, array.nbytes)
        found = np.from_dlpack(engine.run_on_device(tensors).outputs["embedding"]).copy()
        np.testing.assert_allclose(found, reference(feed)["embedding"], atol=1e-6)
        np.testing.assert_allclose(engine.run(feed)["embedding"], reference(feed)["embedding"], atol=1e-6)
    assert cuda.launched == 3 + 3
    engine.close()
    assert not cuda.graphs
    del tensors


def test_times_on_the_device_are_measured_with_and_without_captured_graphs(
    bundle: Bundle, cuda: FakeCuda, tmp_path: Path
) -> None:
    engines = {ratio: load(bundle, f"ratio-{ratio}.onnx", cuda, tmp_path) for ratio in (1, 4)}
    rows = [resident("tensorrt", ratio, engine, "fp32") for ratio, engine in engines.items()]
    one = measure(rows, feed_of(bundle, 1, 16), runs=6, budget_s=5.0)
    assert cuda.launched == 2 * (4 + 6 - 2)  # four to warm up; the first two of each are not captured
    many = measure(rows, feed_of(bundle, 4, 16), runs=6, budget_s=5.0)
    assert [row.ratio for row in one] == [1, 4] and one[0].speedup == 1.0
    assert all(row.device_ms > 0 and row.uncaptured_ms and row.runs == 6 for row in one)
    assert all(row.uncaptured_ms is None and (row.batch, row.sequence) == (4, 16) for row in many)
    record = make_record(device=[*one, *many])
    assert Record.from_json(record.to_json()) == record
    grid = next(grid for grid in grids(record) if "GPU alone" in grid.title)
    assert len(grid.rows) == 4
    del rows
    for engine in engines.values():
        engine.close()


@pytest.mark.usefixtures("readable")
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda feed: {**feed, "input_ids": feed["input_ids"].astype(np.int32)}, "input_ids is int32"),
        (lambda feed: {**feed, "input_ids": feed["input_ids"][:, ::2]}, "input_ids is not dense"),
        (lambda feed: {**feed, "input_ids": feed["input_ids"][:, :4].copy()}, r"shapes are(.|\n)*\[3, 4\]"),
        (lambda feed: {**feed, "input_ids": [[1]]}, "input_ids is a list"),
        (lambda feed: {"input_ids": feed["input_ids"]}, r"the tensors are input_ids(.|\n)*attention_mask"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    bundle: Bundle, cuda: FakeCuda, tmp_path: Path, spoil: Callable[[Feed], dict[str, object]], message: str
) -> None:
    engine = load(bundle, "ratio-4.onnx", cuda, tmp_path)
    with pytest.raises(InputError, match=message):
        engine.run_on_device(
            {
                name: Foreign(tensor) if isinstance(tensor, np.ndarray) else tensor
                for name, tensor in spoil(feed_of(bundle, 3, 16)).items()
            }
        )
    engine.close()


def test_a_tensor_in_host_memory_is_not_taken_for_one_on_the_device(
    bundle: Bundle, cuda: FakeCuda, tmp_path: Path
) -> None:
    engine = load(bundle, "ratio-4.onnx", cuda, tmp_path)
    with pytest.raises(InputError, match=r"lies on DLPack's device 1:0(.|\n)*first GPU"):
        engine.run_on_device(feed_of(bundle, 3, 16))
    engine.close()


@pytest.mark.usefixtures("readable")
def test_what_is_lent_is_given_back_when_nobody_takes_it() -> None:
    class Owner:
        gone = False

        def __del__(self) -> None:
            Owner.gone = True

    values = np.arange(6, dtype=np.float32)
    array = DeviceArray(values.ctypes.data, (2, 3), values.dtype, Owner())
    capsule = array.__dlpack__()
    taken = np.from_dlpack(array)
    np.testing.assert_array_equal(taken, values.reshape(2, 3))
    del array, capsule
    assert not Owner.gone
    del taken
    assert Owner.gone


def test_a_result_is_the_callers_to_keep(bundle: Bundle, cuda: FakeCuda, tmp_path: Path) -> None:
    engine = load(bundle, "ratio-4.onnx", cuda, tmp_path)
    first = engine.run(feed_of(bundle, 2, 8, seed=1))["embedding"]
    kept = first.copy()
    engine.run(feed_of(bundle, 2, 8, seed=2))
    np.testing.assert_array_equal(first, kept)
    engine.close()


def test_captured_graphs_are_bounded_and_thrown_away_when_buffers_move(
    bundle: Bundle, cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(bundle, "ratio-2.onnx", cuda, tmp_path)
    reference = plain_runner(bundle.graph(2))
    for length in range(17, 65):
        for _ in range(2):
            engine.run(feed_of(bundle, 1, length))
    assert len(cuda.graphs) == MAX_GRAPHS
    engine.run(
        feed_of(bundle, 4, 16)
    )  # another profile: more working memory than the first needs, less than the second
    before = dict(cuda.graphs)
    engine.run(feed_of(bundle, 8, 150))  # the largest profile: the common working memory moves if it has to
    monkeypatch.setattr(FakeEngine, "workspace", 3 * GRAIN)
    other = load(bundle, "ratio-4.onnx", cuda, tmp_path)
    other.run(feed_of(bundle, 4, 16))  # now it does
    for length in (20, 64):  # graphs on the old memory must not be launched: the fake's blocks would not be found
        feed = feed_of(bundle, 1, length, seed=length)
        np.testing.assert_allclose(engine.run(feed)["embedding"], reference(feed)["embedding"], atol=1e-6)
    assert not before.keys() & cuda.graphs.keys() or len(cuda.graphs) < len(before)
    engine.close()
    other.close()


def test_a_shape_that_no_profile_holds_is_refused_before_anything_runs(
    bundle: Bundle, cuda: FakeCuda, tmp_path: Path
) -> None:
    engine = load(bundle, "ratio-4.onnx", cuda, tmp_path, parse_profiles(["1x4:2x8:4x16"], 150))
    for batch, length in ((5, 16), (1, 17), (1, 3)):
        with pytest.raises(EngineError, match=rf"{batch}x{length}(.|\n)*1x4:2x8:4x16"):
            engine.run(feed_of(bundle, batch, length))
    assert not cuda.memory
    engine.close()


def test_a_full_device_is_an_error_with_sizes_and_smaller_batches_go_on(
    bundle: Bundle, cuda: FakeCuda, tmp_path: Path
) -> None:
    profiles = parse_profiles(["1x1:64x150:100000x150"], 150)
    engine = load(bundle, "ratio-4.onnx", cuda, tmp_path, profiles)
    reference = plain_runner(bundle.graph(4))
    small = feed_of(bundle, 2, 8)
    engine.run(small)
    engine.run(small)
    cuda.room = cuda.used + 2 * GRAIN
    with pytest.raises(EngineError, match=r"no room for \d+ MB of input(.|\n)*MB are free(.|\n)*fewer or shorter rows"):
        engine.run(feed_of(bundle, 5000, 150))
    for seed in range(3):
        feed = feed_of(bundle, 2, 8, seed)
        np.testing.assert_allclose(engine.run(feed)["embedding"], reference(feed)["embedding"], atol=1e-6)
    engine.close()


def test_plugins_are_held_and_swapped_and_each_answers_as_itself(
    shared_bundle: Bundle, backbone: Backbone, cuda: FakeCuda, tmp_path: Path
) -> None:
    engine = load(shared_bundle, "shared.onnx", cuda, tmp_path)
    reference = plain_runner(shared_bundle.graph(4))
    head = {"head.weight": np.ones((32, 2), np.float32), "head.bias": np.zeros(2, np.float32)}
    sizes = (shared_bundle.manifest.layers, shared_bundle.manifest.hidden_size)
    held = {
        "two": {**stack(lively(backbone, 2)), **head},
        "four": {**stack(lively(backbone, 4)), **head},
        "other": {**stack(lively(backbone, 4, seed=1, rank=5)), **head},
        "one": {**neutral(*sizes), **head},
    }
    engines = {name: engine.hold(inputs) for name, inputs in held.items()}
    for round_ in range(3):
        for name, one in engines.items():
            feed = feed_of(shared_bundle, 3, 16, seed=round_)
            expected = reference({**held[name], **feed})
            found = one.run(feed)
            for output in ("embedding", "logits"):
                np.testing.assert_allclose(found[output], expected[output], atol=1e-5)
    with pytest.raises(EngineError, match=r"no profile of the plan holds this plugin"):
        engine.hold({**stack(lively(backbone, 3)), **head})
    with pytest.raises(EngineError, match=r"nothing is given for the inputs head\.weight"):
        engine.hold(stack(lively(backbone, 4)))
    used = cuda.used
    del engines["other"], one
    assert cuda.used < used  # a plugin's memory goes with it
    engines.clear()
    engine.close()


def test_the_common_working_memory_is_as_large_as_the_largest_need_not_the_sum(
    bundle: Bundle, cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeEngine, "workspace", 10 * GRAIN)
    engines = [load(bundle, f"ratio-{ratio}.onnx", cuda, tmp_path) for ratio in (1, 2, 4)]
    for engine in engines:
        engine.run(feed_of(bundle, 2, 8))
    assert engine_module.WORKSPACE.buffer.bytes == 10 * GRAIN and cuda.used < 20 * GRAIN
    for engine in engines:
        engine.close()


def test_what_cannot_be_loaded_is_told_in_the_librarys_words(cuda: FakeCuda, tmp_path: Path) -> None:
    (tmp_path / "ratio-1.plan").write_text("{ truncated")
    library = FakeLibrary(cuda)
    with pytest.raises(EngineError, match=r"ratio-1\.plan cannot be loaded: magic tag does not match"):
        Plan(TENSORRT, library, tmp_path / "ratio-1.plan", logger_of(library), tmp_path)  # type: ignore[arg-type]


def test_cudas_own_name_of_an_error_is_told(cuda: FakeCuda) -> None:
    cuda.room = 0
    with pytest.raises(EngineError, match="no room") as found:
        Buffer().ensure(1, "nothing")
    assert "cudaErrorMemoryAllocation" in str(found.value.__cause__)


def test_the_gate_runs_at_every_corner(bundle: Bundle, cuda: FakeCuda, tmp_path: Path) -> None:
    from variator.engines.build import _fitting
    from variator.exporters.gate import compare

    engine = load(bundle, "ratio-4.onnx", cuda, tmp_path)
    cases = load_cases(bundle.path / GATE_FILE)
    fitting = _fitting(cases, engine)
    corners = {
        (1, 1),
        (1, 16),
        (4, 1),
        (4, 16),
        (2, 8),
        (1, 64),
        (4, 64),
        (2, 32),
        (1, 150),
        (16, 1),
        (16, 150),
        (8, 128),
    }
    assert {case.feed["input_ids"].shape for case in fitting} == corners
    assert compare("fake", "fp32", fitting, 4, engine.run) < 1e-4
    longest = next(case for case in fitting if case.feed["input_ids"].shape == (16, 150))
    assert longest.lengths[0] == 128 and len({tuple(row) for row in longest.feed["input_ids"]}) > 4
    engine.close()
