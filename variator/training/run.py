"""One training run: what stays the same from step to step, and what is told of each. Made by `training.train`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from variator.toolkit.checkpoint import Backbone, Model
from variator.toolkit.plugin_file import Plugin
from variator.toolkit.plugin_format import Key
from variator.toolkit.rows import Encode
from variator.training.batch import Batch, Data
from variator.training.objective import Losses
from variator.training.processes import Processes
from variator.training.settings import TrainSettings


class Judge(Protocol):
    """A development set."""

    metric: str
    """Name of the metric and the split."""

    origin: tuple[str, ...]
    """Where the split is from, with hashes."""

    def __call__(self, encode: Encode) -> float:
        """The score of whatever answers its inputs; higher is better."""
        ...


@dataclass(frozen=True)
class Stage:
    """A stage: its name, and the step that leaves gradients in the tensors."""

    name: str
    steps: int
    rate: float
    step: Callable[[Mapping[Key, Mapping[str, Tensor]], Batch], dict[Key, Losses]]


@dataclass(frozen=True)
class Progress:
    """What a progress callback sees after each step: the loss by ratio, and the last scores by ratio."""

    stage: str
    step: int
    steps: int
    loss: dict[Key, float]
    scores: dict[Key, float]
    tokens_per_s: float


@dataclass
class Run:
    """One run in one process: what stays the same from step to step."""

    backbone: Backbone
    data: Data
    settings: TrainSettings
    directory: Path
    judge: Judge | None
    start: Sequence[Plugin]
    processes: Processes
    bf16: bool
    model: Model
    stages: Sequence[Stage]
    key: str
