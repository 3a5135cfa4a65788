"""What a training run writes down: the lines of its log, and the record that travels in a plugin's file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
from torch import Tensor

from variator.files import disk_errors
from variator.toolkit.plugin_file import Plugin
from variator.toolkit.plugin_format import Key, PluginConfig, parse_key
from variator.training.objective import Losses
from variator.training.processes import Processes
from variator.training.run import Run, Stage
from variator.training.state import LOG_FILE, State

LOG_EVERY = 10
"""Steps."""


@dataclass(frozen=True)
class Summary:
    """A step's `Losses` as numbers, mean over batches and processes."""

    total: float
    layers: list[float]
    terms: dict[str, float]


def summarise(processes: Processes, found: Sequence[Losses]) -> Summary:
    """The mean of a ratio's losses in all batches of a step, in all processes."""

    def flat(losses: Losses) -> Tensor:
        return torch.cat([losses.total.reshape(1), losses.layers, *(t.reshape(1) for t in losses.terms.values())])

    total, *rest = processes.mean(torch.stack([flat(losses) for losses in found]).mean(dim=0)).tolist()
    layers = len(found[0].layers)
    return Summary(total, rest[:layers], dict(zip(found[0].terms, rest[layers:], strict=True)))


def note(run: Run, stage: Stage, state: State, summaries: Mapping[Key, Summary], rate: float, speed: float) -> None:
    """Log a step, every tenth of them, with the memory that the process holds.

    Args:
        rate: Learning rate.
        speed: Tokens per second.
    """
    if not run.processes.main or (state.step % LOG_EVERY and state.step not in (1, stage.steps)):
        return
    loss = {}
    for ratio, summary in summaries.items():
        parts = {"total": summary.total, "hidden": sum(summary.layers) / len(summary.layers), **summary.terms}
        loss[str(ratio)] = {name: float(f"{value:.5g}") for name, value in parts.items()}
    memory = round(psutil.Process().memory_info().rss / 1e6)
    speeds = {"rate": rate, "tokens_per_s": round(speed), "memory_mb": memory}
    write_line(run, state, {"stage": stage.name, "step": state.step, "loss": loss, **speeds})


def write_line(run: Run, state: State, entry: dict[str, Any]) -> None:
    """Append a line to the log, and to the history that a resumed run restores it from."""
    state.history.append(entry)
    path = run.directory / LOG_FILE
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def last_scores(state: State) -> dict[Key, float]:
    """The scores on the development set that were measured last, by ratio."""
    last: dict[str, float] = next((entry["score"] for entry in reversed(state.history) if "score" in entry), {})
    return {parse_key(ratio): score for ratio, score in last.items() if score is not None}


def plugin_of(run: Run, state: State, config: PluginConfig) -> Plugin:
    """A setting's plugin at the end of a run: the best tensors if there was a development set, with their record."""
    settings, ratio = run.settings, config.key
    best = state.best.get(ratio)
    record: dict[str, Any] = {
        "stages": [{"name": s.name, "steps": s.steps, "learning_rate": s.rate} for s in run.stages],
        "backbone": run.backbone.id,
        "data": run.data.record(),
        "tokens_per_step": settings.tokens * settings.accumulate * run.processes.count,
        "weights": asdict(settings.weights),
        "seed": settings.seed,
        "device": run.processes.device.type,
        "precision": "bf16" if run.bf16 else "fp32",
        "torch": torch.__version__,
        "layer_errors": [round(error, 5) for error in state.layer_errors[ratio]],
        "losses": _curve(state, ratio),
    }
    if run.start:
        record["from"] = next({"sha256": p.digest, **p.training} for p in run.start if p.config == config)
        record["from"].pop("losses", None)
    if best is not None and run.judge:
        scores = [[entry["step"], entry["score"][str(ratio)]] for entry in state.history if "score" in entry]
        value = best.score if math.isfinite(best.score) else None
        record["score"] = {"metric": run.judge.metric, "value": value, "step": best.step, "all": scores}
    values = best.tensors if best is not None else state.tensors[ratio]
    tensors = {name: tensor.detach().cpu().numpy() for name, tensor in values.items()}
    sizes = run.backbone.config
    return Plugin(
        config, tensors, run.backbone.family, sizes.layers, sizes.hidden_size, run.backbone.fingerprint, record
    )


def _curve(state: State, ratio: Key, most: int = 60) -> list[list[Any]]:
    """The loss of the hidden states over the run: [stage, step, mean over layers], thinned."""
    entries = [entry for entry in state.history if "loss" in entry]
    chosen = entries[:: max(1, len(entries) // most)]
    return [[entry["stage"], entry["step"], entry["loss"][str(ratio)]["hidden"]] for entry in chosen]
