"""TensorRT's two flavours as backends: what they build, what a plan is bound to, loading one."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from variator.engines.base import BuildOptions, OnProgress, check_encoder_of_tokens
from variator.engines.gpu import gpu, no_gpu
from variator.engines.profiles import ShapeProfile, default_profiles, parse_profiles
from variator.engines.quantise import RECIPE
from variator.engines.tensorrt.builder import compile_bundle, plan_name
from variator.engines.tensorrt.engine import Plan, TensorRtEngine
from variator.engines.tensorrt.flavours import Flavour
from variator.engines.written import QUANTISED, check_precision
from variator.errors import EngineError, InputError
from variator.files import inside
from variator.toolkit.bundle import Bundle

PRECISIONS = ("fp16", "bf16", "fp32", "int8", "fp8")
"""What is written into a graph before it is compiled, best default first."""

CAPABILITIES = "compute_capabilities"
"""Key of an engine's target: GPUs by compute capability, apart by commas."""

FP8_FROM = "8.9"
"""First compute capability with fp8."""

WORDS = 3
"""Of what a library last complained about, those that go into an error."""


class TensorRtBackend:
    """See `Backend`; one per flavour."""

    def __init__(self, flavour: Flavour) -> None:
        self.flavour = flavour
        self.name = flavour.name
        self.distribution = flavour.distribution

    def missing(self) -> str | None:
        """See `Backend.missing`."""
        return self.flavour.missing() or (no_gpu() if self.flavour.device_code else None)

    def cannot_run(self) -> str | None:
        """See `Backend.cannot_run`."""
        return no_gpu()

    def precisions(self) -> list[str]:
        """See `Backend.precisions`."""
        return list(PRECISIONS)

    def options(self, precision: str) -> dict[str, str]:
        """See `Backend.options`."""
        return {"quantised": RECIPE} if precision in QUANTISED else {}

    def choices(self, bundle: Bundle, options: BuildOptions) -> dict[str, str]:
        """See `Backend.choices`."""
        check_encoder_of_tokens(bundle, self.name)
        return {"profiles": ",".join(map(str, self._profiles(bundle, options)))}

    def target(self, options: BuildOptions, precision: str) -> dict[str, str]:
        """See `Backend.target`."""
        known = self.flavour.compute_capabilities
        asked = tuple(dict.fromkeys(options.compute_capabilities))
        unknown = [capability for capability in asked if capability not in known]
        if asked and not known:
            raise InputError(
                f"{self.name} compiles for the GPU that is here alone", fix="leave --compute-capability out"
            )
        if unknown:
            raise InputError(
                f"{self.name} does not compile for compute capability {unknown[0]} ahead of time",
                valid=", ".join(known),
            )
        least = float(FP8_FROM) if precision == "fp8" else 0.0
        if not asked and no_gpu():
            asked = tuple(capability for capability in known if float(capability) >= least)
        if any(float(capability) < least for capability in asked):
            raise InputError(f"fp8 for compute capability {asked[0]}", valid=f"{FP8_FROM} or later")
        if asked:
            return {CAPABILITIES: ",".join(sorted(asked, key=float))}
        here = gpu()
        if float(here.compute_capability) < least:
            raise InputError(
                f"{here.name} has compute capability {here.compute_capability}", valid=f"{FP8_FROM} for fp8"
            )
        bound = {CAPABILITIES: here.compute_capability}
        return {**bound, "gpu": here.name, "cuda": here.cuda} if self.flavour.device_code else bound

    def device(self) -> str:
        """See `Backend.device`."""
        return gpu().name

    def misfit(self, target: Mapping[str, str]) -> str:
        """See `Backend.misfit`."""
        if no_gpu():
            return ""  # `cannot_run` says so
        here = gpu()
        capabilities = target.get(CAPABILITIES, "")
        if here.compute_capability not in capabilities.split(","):
            return f"it was built for compute capability {capabilities}, {here.name} has {here.compute_capability}"
        found = {"gpu": here.name, "cuda": here.cuda}
        for part in found.keys() & target.keys():
            if target[part] != found[part]:
                return f"it was built for {part} {target[part]}, here is {found[part]}"
        return ""

    def compile(
        self, bundle: Bundle, precision: str, directory: Path, options: BuildOptions, on_progress: OnProgress
    ) -> None:
        """See `Backend.compile`."""
        check_precision(bundle, precision)
        capabilities = self.target(options, precision)[CAPABILITIES].split(",")
        ahead = bool(options.compute_capabilities or no_gpu())
        profiles = self._profiles(bundle, options)
        compile_bundle(self.flavour, bundle, precision, directory, profiles, capabilities if ahead else (), on_progress)

    def describe(self, bundle: Bundle, precision: str, directory: Path, graph: str) -> list[str]:
        """See `Backend.describe`: what a GPU's library tells of a plan."""
        engine = self.load(bundle, precision, directory, graph, 0)
        try:
            return engine.describe()
        finally:
            engine.close()

    def artefacts(self, graph: str, files: Collection[str]) -> list[str]:
        """See `Backend.artefacts`."""
        return [plan_name(graph)]

    def load(self, bundle: Bundle, precision: str, directory: Path, graph: str, threads: int) -> TensorRtEngine:
        """See `Backend.load`."""
        lacking = self.missing() or self.cannot_run()
        if lacking:
            raise EngineError(lacking)
        library = self.flavour.load()
        plan = inside(directory, plan_name(graph))
        made = directory.parent / f".{directory.name.lstrip('.')}-{plan.stem}.kernels"
        return TensorRtEngine(Plan(self.flavour, library, plan, logger_of(library), made))

    def _profiles(self, bundle: Bundle, options: BuildOptions) -> tuple[ShapeProfile, ...]:
        limit = bundle.manifest.max_length
        return parse_profiles(options.profiles, limit) or default_profiles(limit)


@functools.cache  # a library takes one logger per process
def logger_of(library: Any) -> Any:
    """A logger of the library that keeps what went wrong, for our errors, and prints nothing."""

    class Listening(library.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self.said: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (library.ILogger.INTERNAL_ERROR, library.ILogger.ERROR):
                self.said = [*self.said, message][-WORDS:]

        def words(self) -> str:
            said, self.said = self.said, []
            return "; ".join(said)

    return Listening()
