"""What an engine is: the contract between `engines.build`, `engines.runtime` and the backends."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy.typing as npt

from variator import machine
from variator.engines.device import DeviceResult
from variator.engines.profiles import ShapeProfile
from variator.errors import EngineError, InputError
from variator.toolkit.bundle import Bundle
from variator.toolkit.rows import Outputs

Feed = Mapping[str, npt.NDArray[Any]]
Arrays = Mapping[str, npt.NDArray[Any]]

TOKENS = (
    "input_ids", "attention_mask", "token_type_ids", "pixel_values", "lengths", "hidden", "cross", "past",
)  # fmt: skip
"""What comes with every run, of pictures and a decoder, too; all other inputs are held."""


def check_held(inputs: Iterable[str], held: Iterable[str]) -> None:
    """Raise `EngineError` unless all of a graph's inputs but the tokens are held: some libraries crash without."""
    missing = [name for name in inputs if name not in TOKENS and name not in held]
    if missing:
        raise EngineError(f"nothing is given for the inputs {', '.join(missing)} of the graph", fix="export again")


def check_encoder_of_tokens(bundle: Bundle, backend: str) -> None:
    """Raise `InputError` for a bundle that writes texts or reads pictures: such run on CPUs so far."""
    manifest = bundle.manifest
    if manifest.decoder is not None or manifest.picture is not None:
        more = ", or export the encoder alone with --task hidden" if manifest.decoder else ""
        raise InputError(
            f"{backend} runs no {'decoders' if manifest.decoder else 'models that read pictures'}",
            valid="onnxruntime, openvino",
            fix=f"--engine onnxruntime{more}",
        )


def installed(*distributions: str) -> str:
    """The first of these packages that is installed; the first of all if none is."""
    for name in distributions:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return name
    return distributions[0]


class Engine(Protocol):
    """One graph, compiled and loaded, with what it takes beside the tokens. Threads may share it."""

    precision: str
    """As read back from the loaded engine."""

    @property
    def profiles(self) -> Sequence[ShapeProfile]:
        """Ranges of shapes that it takes; empty if it takes every one."""

    def run(self, feed: Feed) -> Outputs:
        """int64 [batch, S] inputs (a decoder's: `toolkit.decoder`), or pictures -> fp32 outputs by name."""

    def hold(self, inputs: Arrays) -> Engine:
        """This engine with inputs that stay on its device and go along with every run: a plugin, a task head.

        Cheap, and shares everything else; its memory goes when the last reference does. Inputs that the graph does
        not have are left out.

        Raises:
            EngineError: If something that the graph takes beside the tokens would still be missing.
        """

    def close(self) -> None:
        """Give its memory back. For an engine that was loaded; those made by `hold` end with it."""


@runtime_checkable
class DeviceEngine(Protocol):
    """An engine on a GPU, which takes what lies there as it is."""

    @property
    def captures(self) -> bool:
        """Whether runs that come again are captured as CUDA graphs."""

    def run_on_device(self, tensors: Mapping[str, Any], captured: bool = True) -> DeviceResult:
        """int64 [batch, S] tensors on the GPU, through DLPack -> outputs on the GPU, complete when this returns.

        Args:
            captured: False leaves captured graphs out, to measure what they gain.

        Raises:
            InputError: If a tensor is not on the first GPU, not int64 or not dense.
        """


@dataclass(frozen=True)
class BuildOptions:
    """What a user may say about an engine beside its precision; for backends that compile for a GPU.

    Args:
        profiles: Ranges of shapes, as `engines.profiles` reads them; none takes the backend's.
        compute_capabilities: GPUs to compile for without having one, 8.9; none takes the one that is here.
    """

    profiles: tuple[str, ...] = ()
    compute_capabilities: tuple[str, ...] = ()


NO_PROFILES: tuple[ShapeProfile, ...] = ()
"""Of an engine that takes every shape."""

OnProgress = Callable[[str, float], None]
"""Told what is being compiled, and the share of it that is done, 0 to 1."""


class Backend(Protocol):
    """A library that compiles and runs graphs. Each is one module of this package, imported lazily."""

    name: str
    distribution: str
    """Its package, whose version is part of the build key."""

    def missing(self) -> str | None:
        """None if it can build here, else why not."""

    def cannot_run(self) -> str | None:
        """None if it can run here what it built, else why not: it then builds ahead of time, unchecked."""

    def precisions(self) -> list[str]:
        """What it can build on this machine, best default first."""

    def options(self, precision: str) -> dict[str, str]:
        """Everything that shapes an artefact beside the graph; part of the build key."""

    def choices(self, bundle: Bundle, options: BuildOptions) -> dict[str, str]:
        """What the user chose, with the defaults for what is left open; part of the build key.

        Raises:
            InputError: For what this backend has no use for, or cannot do with this bundle.
        """

    def target(self, options: BuildOptions, precision: str) -> dict[str, str]:
        """The machine that an engine built now is bound to; part of the build key.

        Raises:
            EngineError, InputError: If there is none.
        """

    def device(self) -> str:
        """The processor or GPU that it runs on here, in words."""

    def misfit(self, target: Mapping[str, str]) -> str:
        """Why an engine that is bound to `target` cannot be run here; empty if it can."""

    def compile(
        self, bundle: Bundle, precision: str, directory: Path, options: BuildOptions, on_progress: OnProgress
    ) -> None:
        """Write the artefacts of all graphs into `directory`."""

    def artefacts(self, graph: str, files: Collection[str]) -> list[str]:
        """Those of a built engine's files that `load` reads for a graph; none if it reads the bundle's own."""

    def describe(self, bundle: Bundle, precision: str, directory: Path, graph: str) -> list[str]:
        """What there is to say about the artefact of a graph, for people; it is loaded for that where it has to be."""

    def load(self, bundle: Bundle, precision: str, directory: Path, graph: str, threads: int) -> Engine:
        """Load the artefact of one of the bundle's graphs; its precision is read back from what was loaded."""


class CpuBackend:
    """What backends for this processor have in common."""

    name: str

    def cannot_run(self) -> str | None:
        """See `Backend.cannot_run`."""
        return None

    def choices(self, bundle: Bundle, options: BuildOptions) -> dict[str, str]:
        """See `Backend.choices`."""
        if options != BuildOptions():
            raise InputError(
                f"{self.name} takes every shape and compiles for this machine",
                fix="leave --profile and --compute-capability out",
            )
        if bundle.manifest.precision != "fp32":
            raise InputError(
                f"{self.name} runs no {bundle.manifest.precision}, in which the graphs of {bundle.path} are written",
                fix="variator export --precision fp32",
            )
        return {}

    def target(self, options: BuildOptions, precision: str) -> dict[str, str]:
        """See `Backend.target`."""
        return {"cpu": " ".join(machine.cpu_features())}

    def device(self) -> str:
        """See `Backend.device`."""
        return machine.cpu_name()

    def misfit(self, target: Mapping[str, str]) -> str:
        """See `Backend.misfit`."""
        return "" if target == self.target(BuildOptions(), "") else "it was built on another kind of processor"

    def describe(self, bundle: Bundle, precision: str, directory: Path, graph: str) -> list[str]:
        """See `Backend.describe`."""
        return []

    def artefacts(self, graph: str, files: Collection[str]) -> list[str]:
        """See `Backend.artefacts`: one graph each, over common weights."""
        return [graph, *(name for name in files if not name.endswith(".onnx"))] if files else []
