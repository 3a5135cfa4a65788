"""The record of one benchmark, schema `variator.bench/1`: what every table, plot and README figure is printed from.

Written by `bench.run`, read by `bench.table` and `bench.report`. Times are in ms, sizes in bytes, FLOPs are
2 x multiply-accumulates per forward pass.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from variator import machine
from variator.engines.gpu import gpu, no_gpu
from variator.errors import InputError
from variator.toolkit.bundle import PER_RATIO, Bundle
from variator.toolkit.plugin_format import Key

SCHEMA = "variator.bench/1"
PEER = "peer:"
STOCK = (f"{PEER}onnxruntime-stock", "fp32")
"""Engine and precision of the usual yardstick: ONNX Runtime with its own transformer optimiser, without us."""


PACKAGES = (
    "variator", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt-cu13", "tensorrt-rtx", "cuda-bindings", "torch",
    "transformers", "numpy",
)  # fmt: skip
"""Whose versions a record has, as far as they are installed."""


@dataclass(frozen=True)
class Machine:
    """Where the figures were measured.

    Args:
        gpu, cuda, gpu_memory_bytes: Its name, the newest CUDA of its driver, its memory; empty and 0 without one.
    """

    cpu: str
    cores: int
    memory_bytes: int
    features: list[str]
    system: str
    date: str
    gpu: str = ""
    cuda: str = ""
    gpu_memory_bytes: int = 0


def package_versions() -> dict[str, str]:
    """Versions of the installed packages that measurements depend on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def this_machine() -> Machine:
    """This machine, now."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    processor = (machine.cpu_name(), machine.cores(), machine.memory_bytes(), machine.cpu_features(), machine.system())
    if no_gpu():
        return Machine(*processor, now)
    here = gpu()
    return Machine(*processor, now, here.name, here.cuda, here.memory_bytes)


@dataclass(frozen=True)
class Model:
    """What was measured: a toy (random weights) or a real model is never left open."""

    id: str
    family: str
    task: str
    hidden_size: int
    layers: int
    parameters: int
    real: bool
    bundle: str


def model_of(bundle: Bundle) -> Model:
    """A bundle's."""
    m = bundle.manifest
    return Model(m.model, m.family, m.task, m.hidden_size, m.layers, m.parameters, m.real, str(bundle.path))


@dataclass(frozen=True)
class Plugin:
    """One ratio's plugin. `untrained` marks speed-only work: its quality means nothing."""

    ratio: Key
    rank: int
    activation: str
    parameters: int
    share: float
    untrained: bool
    training: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Flops:
    """FLOPs of one forward pass at one shape, counted from the exported graph."""

    ratio: Key
    batch: int
    sequence: int
    attention: int
    ffn: int
    plugin: int
    head: int
    total: int
    saved: float


@dataclass(frozen=True)
class Result:
    """Latency of one engine at one ratio and shape.

    Args:
        engine: `onnxruntime`, `openvino`, ... or `peer:<name>` for software without us.
        precision: As read back from the built engine.
        speedup: Over ratio 1 of the same engine and precision (a peer: over itself, 1.0).
        spread: (p90 - p10) / p50 of the timed runs.
        stable: Whether the spread and the drift between the halves of the run were small.
        efficiency: Measured speed-up / FLOPs-ideal speed-up.
        throughput_per_s: Sequences per second at p50.
    """

    engine: str
    precision: str
    ratio: Key
    batch: int
    sequence: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    runs: int
    spread: float
    stable: bool
    speedup: float
    flops: int
    flops_saved: float
    efficiency: float
    throughput_per_s: float


@dataclass(frozen=True)
class Quality:
    """One score: `reference` is the score of the uncompressed fp32 backbone on the same data (the notes say whose)."""

    ratio: Key
    engine: str
    precision: str
    metric: str
    split: str
    value: float
    reference: float


@dataclass(frozen=True)
class Memory:
    """Proportional set size added by holding these ratios resident in one process, over the empty process.

    Args:
        ratios: Of every plugin.
        layout: Of the bundle, `per-ratio` or `shared`.
        tasks: Number of plugins (each at all the ratios); with per-ratio graphs, of bundles.
        gpu_bytes: Memory of the GPU that went with it, of all processes there are; None for an engine on the processor.
    """

    engine: str
    precision: str
    ratios: list[Key]
    pss_bytes: int
    layout: str = PER_RATIO
    tasks: int = 1
    gpu_bytes: int | None = None


@dataclass(frozen=True)
class DeviceResult:
    """Time of one ratio and shape on a GPU alone, by CUDA's events, tensors on the device.

    Args:
        device_ms: Median.
        uncaptured_ms: Median without captured CUDA graphs; None where that was not measured.
        speedup: Over ratio 1 of the same engine and precision.
        clock_mhz: Of the GPU's multiprocessors right after; None where the driver does not tell.
    """

    engine: str
    precision: str
    ratio: Key
    batch: int
    sequence: int
    device_ms: float
    uncaptured_ms: float | None
    speedup: float
    runs: int
    spread: float
    stable: bool
    clock_mhz: int | None


@dataclass(frozen=True)
class LayoutResult:
    """Latency of the same ratio in both layouts, timed in turn.

    Args:
        per_ratio_ms, shared_ms: Medians.
        relative: Shared over per-ratio; 1.02 is 2 % slower.
        switched_ms: Median of the shared engine's first run after another ratio's.
        spread: The larger of both.
    """

    engine: str
    precision: str
    ratio: Key
    batch: int
    sequence: int
    per_ratio_ms: float
    shared_ms: float
    relative: float
    switched_ms: float
    runs: int
    spread: float
    stable: bool


@dataclass(frozen=True)
class Plugging:
    """Time to plug one plugin in from its file, and what requests notice of it; ms.

    Args:
        idle_p50_ms, idle_p99_ms: While nothing else runs.
        loaded_p50_ms, loaded_p99_ms: While a client sends request after request.
        request_p50_ms, request_p99_ms: Of the requests without any plugging.
        swapped_p50_ms, swapped_p99_ms: Of the requests during it.
    """

    engine: str
    precision: str
    ratio: Key
    file_bytes: int
    idle_p50_ms: float
    idle_p99_ms: float
    loaded_p50_ms: float
    loaded_p99_ms: float
    request_p50_ms: float
    request_p99_ms: float
    swapped_p50_ms: float
    swapped_p99_ms: float


@dataclass(frozen=True)
class Record:
    """Everything one `variator bench` measured."""

    machine: Machine
    model: Model
    command: str
    versions: dict[str, str]
    plugins: list[Plugin]
    flops: list[Flops]
    results: list[Result]
    quality: list[Quality]
    memory: list[Memory]
    disk: dict[str, int]
    notes: list[str] = field(default_factory=list)
    layout: str = PER_RATIO
    layouts: list[LayoutResult] = field(default_factory=list)
    plugging: list[Plugging] = field(default_factory=list)
    device: list[DeviceResult] = field(default_factory=list)
    schema: str = SCHEMA

    def to_json(self) -> str:
        """The record as JSON text, keys sorted as declared."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> Record:
        """Read a record back.

        Raises:
            InputError: If the text is not a record of this schema.
        """
        try:
            data = json.loads(text)
            if data["schema"] != SCHEMA:
                raise InputError(f"record of schema {data['schema']!r}", valid=SCHEMA, fix="run `variator bench` again")
            rows = {name: data[name] if name not in _LATER else data.get(name, []) for name in _LISTS}
            lists: dict[str, Any] = {name: [kind(**row) for row in rows[name]] for name, kind in _LISTS.items()}
            return Record(
                machine=Machine(**data["machine"]),
                model=Model(**data["model"]),
                command=data["command"],
                versions=data["versions"],
                disk=data["disk"],
                notes=data["notes"],
                layout=data.get("layout", PER_RATIO),
                **lists,
            )
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(f"not a benchmark record: {error}", valid=f"JSON of schema {SCHEMA}") from error

    @staticmethod
    def load(path: Path) -> Record:
        """Read a record from a file."""
        return Record.from_json(path.read_text(encoding="utf-8"))


_LISTS: dict[str, type] = {
    "plugins": Plugin,
    "flops": Flops,
    "results": Result,
    "quality": Quality,
    "memory": Memory,
    "layouts": LayoutResult,
    "plugging": Plugging,
    "device": DeviceResult,
}
_LATER = ("layouts", "plugging", "device")
"""Lists that older records of this schema do not have."""
