"""What an engine is: the contract between `engines.build`, `engines.runtime` and the backends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from variator.errors import EngineError
from variator.toolkit.bundle import Bundle
from variator.toolkit.rows import Outputs

Feed = Mapping[str, npt.NDArray[np.int64]]
Arrays = Mapping[str, npt.NDArray[Any]]

TOKENS = ("input_ids", "attention_mask", "token_type_ids")
"""What comes with every run; all other inputs are held."""


def check_held(inputs: Iterable[str], held: Iterable[str]) -> None:
    """Raise `EngineError` unless all of a graph's inputs but the tokens are held: some libraries crash without."""
    missing = [name for name in inputs if name not in TOKENS and name not in held]
    if missing:
        raise EngineError(f"nothing is given for the inputs {', '.join(missing)} of the graph", fix="export again")


class Engine(Protocol):
    """One graph, compiled and loaded, with what it takes beside the tokens. Threads may share it."""

    precision: str
    """As read back from the loaded engine."""

    def run(self, feed: Feed) -> Outputs:
        """int64 [batch, S] inputs -> fp32 outputs by name."""

    def hold(self, inputs: Arrays) -> Engine:
        """This engine with inputs that stay on its device and go along with every run: a plugin, a task head.

        Cheap, and shares everything else; its memory goes when the last reference does. Inputs that the graph does
        not have are left out.

        Raises:
            EngineError: If something that the graph takes beside the tokens would still be missing.
        """

    def close(self) -> None:
        """Give its memory back. For an engine that was loaded; those made by `hold` end with it."""


class Backend(Protocol):
    """A library that compiles and runs graphs. Each is one module of this package, imported lazily."""

    name: str
    distribution: str
    """Its package, whose version is part of the build key."""

    def missing(self) -> str | None:
        """None if it can be used here, else why not."""

    def precisions(self) -> list[str]:
        """What it can build on this machine, best default first."""

    def options(self, precision: str) -> dict[str, str]:
        """Everything that shapes an artefact beside the graph; part of the build key."""

    def compile(self, bundle: Bundle, precision: str, directory: Path) -> None:
        """Write the artefacts of all graphs into `directory`."""

    def load(self, bundle: Bundle, precision: str, directory: Path, graph: str, threads: int) -> Engine:
        """Load the artefact of one of the bundle's graphs; its precision is read back from what was loaded."""
