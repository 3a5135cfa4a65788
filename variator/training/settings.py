"""What a training run is asked to do. Made by `variator.cli` and callers of `training.train`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from variator.errors import InputError
from variator.toolkit.plugin_format import PluginConfig
from variator.training.objective import Weights


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a run.

    Args:
        plugins: One configuration per ratio, trained side by side.
        local_steps: Optimiser steps of the layer-local stage, 0 without it.
        steps: Optimiser steps of the distillation, 0 without it.
        tokens: Tokens per batch, padding included.
        accumulate: Batches per step and process.
        local_rate, learning_rate: Peak of the one-cycle schedule of either stage.
        warmup: Share of a stage's steps that the rate rises.
        clip: Largest gradient norm per ratio.
        weights: Of the distillation's terms.
        seed: Of the initial tensors and the batches.
        precision: Of the matrix products, fp32 or bf16; `auto` takes bf16 where the device has it. Plugins,
            losses and the optimiser are fp32 in any case.
        evaluate_every: Steps between scores on the development set during distillation, if there is one.
        shard: Spread the frozen backbone over the processes.
        threads: torch threads; 0 leaves torch's choice.
    """

    plugins: tuple[PluginConfig, ...]
    local_steps: int = 800
    steps: int = 3000
    tokens: int = 1024
    accumulate: int = 1
    local_rate: float = 3e-3
    learning_rate: float = 2e-3
    warmup: float = 0.05
    clip: float = 1.0
    weights: Weights = field(default_factory=Weights)
    seed: int = 0
    precision: str = "auto"
    evaluate_every: int = 250
    shard: bool = False
    threads: int = 0

    def __post_init__(self) -> None:
        ratios = [plugin.key for plugin in self.plugins]
        if not ratios or len(set(ratios)) != len(ratios):
            raise InputError(f"ratios {ratios} to train", valid="at least one ratio, each once")
        if len({plugin.first_alone for plugin in self.plugins}) > 1:
            raise InputError(
                "some of the plugins keep the first token alone and some do not", fix="train them one after the other"
            )
        if min(self.steps, self.local_steps) < 0 or self.steps + self.local_steps < 1:
            raise InputError(f"{self.local_steps} and {self.steps} steps", valid="1 or more in at least one stage")
        if self.tokens < 16 or self.accumulate < 1 or self.evaluate_every < 1:
            raise InputError(
                f"{self.tokens} tokens per batch, {self.accumulate} batches per step, scores every "
                f"{self.evaluate_every} steps",
                valid="16 or more tokens, 1 or more batches, 1 or more steps",
            )
        for rate in (self.local_rate, self.learning_rate):
            if not 0.0 < rate < math.inf:
                raise InputError(f"learning rate {rate}", valid="a positive number; 2e-3 is the default")
        check_precision(self.precision)


def check_precision(precision: str) -> None:
    """Raise `InputError` unless training can run in it."""
    if precision not in ("auto", "fp32", "bf16"):
        raise InputError(f"unknown training precision {precision!r}", valid="auto, fp32, bf16")
