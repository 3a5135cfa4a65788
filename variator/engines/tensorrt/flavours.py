"""The two libraries of NVIDIA that this package drives, and all that differs between them."""

from __future__ import annotations

import importlib
import importlib.metadata
from dataclasses import dataclass
from types import ModuleType

from variator.engines.base import installed
from variator.errors import EngineError


@dataclass(frozen=True)
class Flavour:
    """One library: same code, other names.

    Args:
        name: Of the engine, `--engine NAME`.
        module: What is imported.
        distributions: Packages that bring it, whichever is installed; the first is what a user installs.
        versions: Those that this code was written for: from the first, before the second.
        compute_capabilities: GPUs that it compiles for without one at hand; none if it needs the GPU itself.
        device_code: Whether a plan holds code for one GPU. Else the driver makes it when the plan is loaded, and a plan
            fits every GPU of `compute_capabilities` that it was made for.
        timing_cache: Whether it measures kernels and keeps the times.
    """

    name: str
    module: str
    distributions: tuple[str, ...]
    versions: tuple[str, str]
    compute_capabilities: tuple[str, ...]
    device_code: bool
    timing_cache: bool

    @property
    def distribution(self) -> str:
        """The package that is installed, or the one to install."""
        return installed(*self.distributions)

    def missing(self) -> str | None:
        """None if it can be imported in a version that this code was written for, else why not."""
        try:
            version = importlib.metadata.version(self.distribution)
            importlib.import_module(self.module)
            importlib.import_module("polygraphy")
        except ImportError as error:
            return f"{self.name} cannot be imported ({error}); pip install 'variator[{self.name}]'"
        low, high = self.versions
        if not _number(low) <= _number(version) < _number(high):
            return f"{self.name} {version} is here, not {low} ≤ version < {high}; pip install 'variator[{self.name}]'"
        return None

    def load(self) -> ModuleType:
        """The module. `missing` says whether it is there.

        Raises:
            EngineError: If not.
        """
        missing = self.missing()
        if missing:
            raise EngineError(missing)
        return importlib.import_module(self.module)


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


TENSORRT = Flavour(
    name="tensorrt",
    module="tensorrt",
    distributions=("tensorrt-cu13", "tensorrt", "tensorrt-cu12"),
    versions=("10.16", "12"),
    compute_capabilities=(),
    device_code=True,
    timing_cache=True,
)
TENSORRT_RTX = Flavour(
    name="tensorrt-rtx",
    module="tensorrt_rtx",
    distributions=("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
    versions=("1.7", "2"),
    # Not 7.5 (Turing), which has no fp32 matrix product there; alone it could do without.
    compute_capabilities=("8.0", "8.6", "8.9", "12.0", "12.1"),
    device_code=False,
    timing_cache=False,
)
FLAVOURS = (TENSORRT, TENSORRT_RTX)
