"""A training run on disk: everything it needs to go on exactly, in one safetensors file, and its log in JSON lines.

Written and read by `training.train`. The tensors are the file's tensors, everything else is one JSON text in its
header; it appears under its name when it is complete, so a kill in the middle of a save leaves the one before.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from variator.errors import InputError
from variator.files import write_atomically
from variator.toolkit.plugin_format import Key, parse_key

STATE_FILE = "training-state.safetensors"
LOG_FILE = "training.jsonl"
FORMAT = 2
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Best:
    """A ratio's best scores on the development set so far, and the tensors that had them."""

    score: float
    step: int
    tensors: dict[str, Tensor]


@dataclass
class State:
    """Tensors and Adam moments by ratio, how far the run is, and what it has seen."""

    tensors: dict[Key, dict[str, Tensor]]
    optimizers: dict[Key, torch.optim.AdamW]
    stage: int = 0
    step: int = 0
    """Of the stage."""
    scored: int = 0
    """Step of the last stage that was scored last."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Every tenth step's losses, and all scores, as the log has them."""
    layer_errors: dict[Key, list[float]] = field(default_factory=dict)
    """By ratio, smoothed over steps."""
    best: dict[Key, Best] = field(default_factory=dict)


def new_optimizer(tensors: dict[str, Tensor], device: torch.device) -> torch.optim.AdamW:
    """Adam without weight decay; a stage begins with a new one."""
    fused = device.type in ("cpu", "cuda")
    return torch.optim.AdamW(list(tensors.values()), lr=0.0, weight_decay=0.0, fused=fused)


def save_state(state: State, directory: Path, key: str) -> None:
    """Write the state; a run that has not begun has none.

    Raises:
        VariatorError: If the disk refuses; the state that was there before stays.
    """
    if state.stage == state.step == 0:
        return
    tensors: dict[str, Tensor] = {}
    for ratio, values in state.tensors.items():
        for name, tensor in values.items():
            tensors[f"{ratio}/value/{name}"] = tensor.detach()
            moments = state.optimizers[ratio].state.get(tensor, {})
            tensors |= {f"{ratio}/{part}/{name}": moments[part] for part in MOMENTS if moments}
    for ratio, best in state.best.items():
        tensors |= {f"{ratio}/best/{name}": tensor for name, tensor in best.tensors.items()}
    saved = {
        "format": FORMAT,
        "key": key,
        "stage": state.stage,
        "step": state.step,
        "scored": state.scored,
        "history": state.history,
        "layer_errors": state.layer_errors,
        "best": {ratio: [best.score, best.step] for ratio, best in state.best.items()},
    }
    directory.mkdir(parents=True, exist_ok=True)
    data = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, {"state": json.dumps(saved)})
    write_atomically(directory / STATE_FILE, data)


def load_state(state: State, directory: Path, key: str) -> None:
    """Fill a new state with the saved one, and cut the log off where it was saved.

    Raises:
        InputError: If the file is damaged, or of a run with another model, data or settings.
    """
    path = directory / STATE_FILE
    try:
        with safe_open(path, framework="pt") as file:
            saved = json.loads((file.metadata() or {})["state"])
            fits = saved["format"] == FORMAT and saved["key"] == key
            if fits:
                _fill(state, saved, file.get_tensor)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(
            f"the interrupted run in {path} is damaged: {error}", fix="start anew with --overwrite"
        ) from error
    if not fits:
        raise InputError(
            f"{directory} holds an interrupted run with another model, data or settings",
            fix="repeat that command to finish it, or start anew with --overwrite",
        )
    write_atomically(directory / LOG_FILE, "".join(json.dumps(entry) + "\n" for entry in state.history))


def _fill(state: State, saved: dict[str, Any], tensor_of: Callable[[str], Tensor]) -> None:
    state.stage, state.step, state.history = int(saved["stage"]), int(saved["step"]), list(saved["history"])
    state.scored = int(saved["scored"])
    state.layer_errors = {parse_key(ratio): errors for ratio, errors in saved["layer_errors"].items()}
    for ratio, tensors in state.tensors.items():
        for name, tensor in tensors.items():
            if state.step:
                step_tensor = torch.tensor(float(state.step), device=tensor.device)  # fused Adam reads it there
                moments = {part: tensor_of(f"{ratio}/{part}/{name}").to(tensor.device) for part in MOMENTS}
                state.optimizers[ratio].state[tensor] = {"step": step_tensor, **moments}
            with torch.no_grad():
                tensor.copy_(tensor_of(f"{ratio}/value/{name}"))
    for ratio, (score, step) in saved["best"].items():
        kept = {name: tensor_of(f"{ratio}/best/{name}") for name in state.tensors[parse_key(ratio)]}
        state.best[parse_key(ratio)] = Best(score, step, kept)
