"""Triton's model configurations, as messages of its own protobuf. Pure: what is known comes in, nothing is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from variator.engines.policies import policy_named
from variator.engines.profiles import Shape, ShapeProfile
from variator.engines.scheduler import check_slo
from variator.errors import EngineError, InputError
from variator.serving.triton_request import IDS, MASK, PAIR, RATIO, TEXT, TYPES
from variator.toolkit.bundle import Manifest
from variator.toolkit.plugin_format import Key

MARK = "variator_version"
"""Parameter of every configuration that is written here: what has it may be replaced."""

URGENT, USUAL = 1, 2
"""Levels of priority; a request that names none is a usual one."""

WARM_TEXT, WARM_TEXT_FILE = "a text to warm up with", "text"
WARM_LENGTH = 16
ORT_OPTIMISED = 2
"""Triton's number for: leave the graph as it is. ONNX Runtime has optimised it when it was built."""


@dataclass(frozen=True)
class TritonSettings:
    """How a repository's models serve.

    Args:
        ratio: Of requests that name none.
        slo_ms: Of requests at ratio `auto` that bring none.
        patience_ms: How long any other request may wait.
        max_queue: Requests that may wait; one more is refused.
        max_rows: Most rows of a request, and of a batch.
        threads: Processor threads of the runtime; 0 means all.
        policy: Of the ratio.
    """

    ratio: Key = "auto"
    slo_ms: float = 100.0
    patience_ms: float = 10_000.0
    max_queue: int = 1_000
    max_rows: int = 64
    threads: int = 0
    policy: str = "drain"

    def __post_init__(self) -> None:
        check_slo(self.slo_ms)
        check_slo(self.patience_ms)
        for name, least in (("max_queue", 1), ("max_rows", 1), ("threads", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)!r}", valid=f"a whole number, {least} or more")

    def check(self, ratios: Sequence[Key]) -> None:
        """Raise `InputError` unless a bundle with these ratios can be served so."""
        policy_named(self.policy, ratios)
        if self.ratio not in ("auto", *ratios):
            raise InputError(f"ratio {self.ratio!r}", valid=", ".join(["auto", *map(str, ratios)]))


@dataclass(frozen=True)
class Tensor:
    """An input or output of a graph.

    Args:
        kind: `INT64`, `FP32` or `STRING`, as Triton calls them.
        dims: Without the rows; -1 for any.
    """

    name: str
    kind: str
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """A model of the repository.

    Args:
        platform: `tensorrt_plan`, `onnxruntime_onnx` or `ensemble`; empty for Python.
        inputs: Those whose name is in `optional` may be left out.
        warm_up: Shapes that are run before the model is ready; for a Python model one text is.
        parameters: Texts for the backend.
    """

    name: str
    platform: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    max_batch: int
    gpu: bool
    profiles: tuple[ShapeProfile, ...] = ()
    warm_up: tuple[Shape, ...] = ()
    optional: tuple[str, ...] = ()
    parameters: tuple[tuple[str, str], ...] = ()
    optimised: bool = False


def protobuf() -> Any:
    """The module of Triton's own messages.

    Raises:
        EngineError: If it is not installed.
    """
    try:
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        raise EngineError(
            f"Triton's configurations cannot be written: {error}", fix="pip install 'variator[triton]'"
        ) from error
    return model_config_pb2


def text_of(config: Any) -> str:
    """As `config.pbtxt` has it."""
    from google.protobuf import text_format

    return str(text_format.MessageToString(config))


def read_config(text: str, place: str) -> Any:
    """Parse a `config.pbtxt`.

    Raises:
        InputError: If it is none.
    """
    from google.protobuf import text_format

    try:
        return text_format.Parse(text, protobuf().ModelConfig())
    except text_format.ParseError as error:
        raise InputError(f"{place} is no configuration of a Triton model: {error}") from error


def text_inputs() -> tuple[Tensor, ...]:
    """Of a model that tokenises itself."""
    return Tensor(TEXT, "STRING", (1,)), Tensor(PAIR, "STRING", (1,))


def runtime_inputs() -> tuple[Tensor, ...]:
    """Of the model that embeds the runtime: either texts or token ids."""
    return *text_inputs(), *(Tensor(name, "INT64", (-1,)) for name in (IDS, MASK, TYPES))


def ratio_output() -> Tensor:
    """Which ratio has served a row."""
    return Tensor(RATIO, "STRING", (1,))


def output_of(name: str, manifest: Manifest) -> Tensor:
    """An output by its task."""
    sizes = {
        "embedding": (manifest.hidden_size,),
        "logits": (len(manifest.labels) or -1,),
        "last_hidden_state": (-1, manifest.hidden_size),
    }
    return Tensor(name, "FP32", sizes.get(name, (-1,)))


def most_rows_of_all(profiles: Sequence[ShapeProfile]) -> int:
    """The most rows that every length that a plan takes can have, and all fewer too: Triton makes any batch up to it.

    Raises:
        EngineError: If there is a length that a single row cannot have.
    """
    edges = {edge for p in profiles for edge in (p.minimum.length, p.maximum.length, p.maximum.length + 1)}
    lengths = [n for n in edges if any(p.minimum.length <= n <= p.maximum.length for p in profiles)]
    most = min(_rows_held(profiles, length) for length in lengths)
    if most < 1:
        raise EngineError(
            f"no single row fits the plan's profiles {', '.join(map(str, profiles))}",
            fix="variator build BUNDLE --engine tensorrt --profile 1x1:8x64:32x128",
        )
    return most


def _rows_held(profiles: Sequence[ShapeProfile], length: int) -> int:
    """The most rows of a length such that all fewer are held, too."""
    rows = 0
    while any(profile.holds(Shape(rows + 1, length)) for profile in profiles):
        rows += 1
    return rows


def config_of(model: Model, settings: TritonSettings, version: int) -> Any:
    """The configuration of a model that has one version in service."""
    messages = protobuf()
    config = messages.ModelConfig(
        name=model.name,
        platform=model.platform,
        max_batch_size=model.max_batch,
        backend="" if model.platform else "python",
    )
    config.version_policy.specific.versions.append(version)
    _add_tensors(config, model)
    _add_batching(config.dynamic_batching, model, settings)
    group = config.instance_group.add(count=1, kind="KIND_GPU" if model.gpu else "KIND_CPU")
    group.profile.extend(map(str, range(len(model.profiles))))
    if model.optimised:
        config.optimization.graph.level = ORT_OPTIMISED
    for name, value in (*model.parameters, (MARK, str(version))):
        config.parameters[name].string_value = value
    _add_warm_up(config, model)
    return config


def ensemble_of(name: str, front: Model, engine: Model, version: int) -> Any:
    """Texts through the front into an engine, in one call; both decide themselves what they batch."""
    config = protobuf().ModelConfig(
        name=name, platform="ensemble", max_batch_size=min(front.max_batch, engine.max_batch)
    )
    config.version_policy.specific.versions.append(version)
    for tensor in front.inputs:
        config.input.add(
            name=tensor.name, data_type=f"TYPE_{tensor.kind}", dims=tensor.dims, optional=tensor.name == PAIR
        )
    for tensor in engine.outputs:
        config.output.add(name=tensor.name, data_type=f"TYPE_{tensor.kind}", dims=tensor.dims)
    steps: list[tuple[Model, Mapping[str, str], Mapping[str, str]]] = [
        (front, {t.name: t.name for t in front.inputs}, {t.name: t.name for t in engine.inputs}),
        (engine, {t.name: t.name for t in engine.inputs}, {t.name: t.name for t in engine.outputs}),
    ]
    for model, inputs, outputs in steps:
        step = config.ensemble_scheduling.step.add(model_name=model.name, model_version=-1)
        step.input_map.update(inputs)
        step.output_map.update(outputs)
    config.parameters[MARK].string_value = str(version)
    return config


def _add_tensors(config: Any, model: Model) -> None:
    ragged = not model.platform
    for tensor in model.inputs:
        config.input.add(
            name=tensor.name,
            data_type=f"TYPE_{tensor.kind}",
            dims=tensor.dims,
            optional=tensor.name in model.optional,
            allow_ragged_batch=ragged and -1 in tensor.dims,
        )
    for tensor in model.outputs:
        config.output.add(name=tensor.name, data_type=f"TYPE_{tensor.kind}", dims=tensor.dims)


def _add_batching(batching: Any, model: Model, settings: TritonSettings) -> None:
    batching.priority_levels, batching.default_priority_level = USUAL, USUAL
    best = sorted({profile.optimum.batch for profile in model.profiles})
    batching.preferred_batch_size.extend(rows for rows in best if 1 < rows <= model.max_batch)
    policy = batching.default_queue_policy
    policy.timeout_action = protobuf().ModelQueuePolicy.REJECT
    policy.default_timeout_microseconds = int(settings.patience_ms * 1e3)
    policy.allow_timeout_override = True
    policy.max_queue_size = settings.max_queue


def _add_warm_up(config: Any, model: Model) -> None:
    """Requests that are run before the model is ready; `warm_up_files` are their data."""
    if not model.platform:
        value = config.model_warmup.add(name="a text", batch_size=1, count=1).inputs[TEXT]
        value.data_type, value.input_data_file = protobuf().TYPE_STRING, WARM_TEXT_FILE
        value.dims.append(1)
    for shape in model.warm_up:
        warm = config.model_warmup.add(name=str(shape), batch_size=shape.batch, count=1)
        for tensor in model.inputs:
            value = warm.inputs[tensor.name]
            value.data_type, value.input_data_file = protobuf().TYPE_INT64, f"ones-{shape}"
            value.dims.append(shape.length)


def warm_up_files(model: Model) -> dict[str, bytes]:
    """What lies in a model's `warmup` directory. Ones: a token of every vocabulary, a mask without padding."""
    if not model.platform:
        text = WARM_TEXT.encode()
        return {WARM_TEXT_FILE: len(text).to_bytes(4, "little") + text}
    one = (1).to_bytes(8, "little")
    return {f"ones-{shape}": one * (shape.batch * shape.length) for shape in model.warm_up}
