"""Training, first stage: fit every layer's plugin to the teacher's layer, all ratios from one teacher pass.

Nothing is propagated back through the stack, so minutes on a CPU are enough. A later stage that distils end to end
starts from these files.

Each plugin is fitted on the inputs it will meet, those of the compressed stream, not on the teacher's: measured on
the real MiniLM (k=4, 600 steps, Spearman on 400 pairs of STS-B dev; uncompressed 0.922) 0.893 against 0.874.
"""

from __future__ import annotations

import copy
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from variator import machine
from variator.errors import InputError, VariatorError
from variator.files import sha256_of_json, write_atomically
from variator.toolkit.checkpoint import Backbone
from variator.toolkit.corpus import Corpus
from variator.toolkit.encoder import Encoder, Linear
from variator.toolkit.plugin import MASKED, compressed_ffn, initial_tensors
from variator.toolkit.plugin_file import Plugin, save_plugin
from variator.toolkit.plugin_format import PluginConfig, layer_operands

STATE_FILE = "training-state.safetensors"
SAVE_EVERY_S = 60.0


@dataclass(frozen=True)
class TrainSettings:
    """Settings of the layer-local stage.

    Args:
        plugins: One configuration per ratio, trained side by side.
        steps: Optimiser steps.
        tokens: Tokens per step, padding included.
        learning_rate: Peak of the one-cycle schedule.
        warmup: Share of the steps that the rate rises.
        clip: Largest gradient norm per ratio.
        seed: Of the initial tensors and the batches.
        precision: Of the matrix products, fp32 or bf16; `auto` takes bf16 where the processor has it. Plugins,
            losses and the optimiser are fp32 in any case.
        threads: torch threads; 0 leaves torch's choice.
    """

    plugins: tuple[PluginConfig, ...]
    steps: int = 800
    tokens: int = 1024
    learning_rate: float = 3e-3
    warmup: float = 0.05
    clip: float = 1.0
    seed: int = 0
    precision: str = "auto"
    threads: int = 0

    def __post_init__(self) -> None:
        ratios = [plugin.ratio for plugin in self.plugins]
        if not ratios or len(set(ratios)) != len(ratios):
            raise InputError(f"ratios {ratios} to train", valid="at least one ratio, each once")
        if self.steps < 1 or self.tokens < 16:
            raise InputError(f"{self.steps} steps of {self.tokens} tokens", valid="1 or more steps, 16 or more tokens")
        if not 0.0 < self.learning_rate < math.inf:
            raise InputError(f"learning rate {self.learning_rate}", valid="a positive number; 3e-3 is the default")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise InputError(f"unknown training precision {self.precision!r}", valid="auto, fp32, bf16")

    @property
    def bf16(self) -> bool:
        """Whether matrix products run in bf16 on this machine."""
        native = bool({"avx512_bf16", "amx_bf16"} & set(machine.cpu_features()))
        return self.precision == "bf16" or (self.precision == "auto" and native)


@dataclass(frozen=True)
class Progress:
    """What a progress callback sees after each step: losses are MSE over the teacher's variance, mean over layers."""

    step: int
    steps: int
    loss: dict[int, float]
    tokens_per_s: float


@dataclass
class State:
    """All that a run needs to go on: tensors and Adam moments by ratio, the step, and the losses so far."""

    tensors: dict[int, dict[str, Tensor]]
    optimizers: dict[int, torch.optim.AdamW]
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    layer_errors: dict[int, list[float]] = field(default_factory=dict)


class InterruptedTrainingError(VariatorError):
    """Training was stopped by the user and saved."""


def train(
    backbone: Backbone,
    corpus: Corpus,
    settings: TrainSettings,
    directory: Path,
    on_step: Callable[[Progress], None] = lambda progress: None,
    overwrite: bool = False,
) -> list[Plugin]:
    """Fit plugins layer by layer and write them to `directory`; resumes an interrupted run of the same settings.

    Args:
        on_step: Called after every step.
        overwrite: Start anew, whatever finished plugins or interrupted run `directory` holds.

    Returns:
        The plugins, in the order of `settings.plugins`.

    Raises:
        InputError: If `directory` holds finished plugins or the state of a run with other settings.
        InterruptedTrainingError: After Ctrl-C, when the state has been saved.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    key = sha256_of_json(
        [asdict(settings) | {"threads": 0, "precision": settings.bf16}, backbone.fingerprint, corpus.record()]
    )
    state = _resume(backbone, settings, directory, key, overwrite)
    encoder = half_weights(backbone.model.encoder) if settings.bf16 else backbone.model.encoder
    saved_at = time.monotonic()
    while state.step < settings.steps:
        try:
            started = time.perf_counter()
            ids, mask = corpus.batch(
                backbone.tokenizer, settings.seed, state.step, settings.tokens, backbone.max_length
            )
            with interrupt_deferred(), torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16):
                losses = train_step(encoder, settings, state, ids, mask)
            if not all(math.isfinite(loss) for loss in losses.values()):
                raise VariatorError(
                    f"the loss is {losses} at step {state.step}; no plugin was written",
                    fix="train with a lower --learning-rate, and --overwrite",
                )
            speed = int(mask.sum()) / (time.perf_counter() - started)
            on_step(Progress(state.step, settings.steps, losses, speed))
            if time.monotonic() - saved_at > SAVE_EVERY_S:
                _save_state(state, directory, key)
                saved_at = time.monotonic()
        except KeyboardInterrupt as interrupt:
            _save_state(state, directory, key)
            raise InterruptedTrainingError(
                f"stopped after step {state.step} of {settings.steps}; "
                + (f"the state is saved in {directory}" if state.step else "there was nothing to save yet"),
                fix="run the same command again to go on (without --overwrite)",
            ) from interrupt
    plugins = [_finished(backbone, corpus, settings, state, config) for config in settings.plugins]
    for plugin in plugins:
        save_plugin(plugin, directory)
    (directory / STATE_FILE).unlink(missing_ok=True)
    return plugins


def train_step(encoder: Encoder, settings: TrainSettings, state: State, ids: Tensor, mask: Tensor) -> dict[int, float]:
    """One pass of the teacher and of one student per ratio, and one optimiser step per ratio.

    Layer by layer, each student reads its own stream (what its compressed layers made so far) and is pulled back to
    the teacher's: the error is taken behind the layer's residual and norm, where the next layer reads, because a few
    outlier dimensions carry nearly all of the FFN output's variance (98 % in MiniLM's first layer). No gradient
    crosses a layer.

    Args:
        ids, mask: int64 [batch, S].

    Returns:
        The loss by ratio.
    """
    extra = -ids.shape[1] % math.lcm(*(config.ratio for config in settings.plugins))
    ids, mask = F.pad(ids, (0, extra)), F.pad(mask, (0, extra))
    errors: dict[int, list[float]] = {config.ratio: [] for config in settings.plugins}
    with torch.no_grad():
        teacher = encoder.embeddings(ids, None)
        float_mask = mask.to(teacher.dtype)
        scores_mask = ((1.0 - float_mask) * MASKED)[:, None, None, :].repeat(1 + len(settings.plugins), 1, 1, 1)
        students = [teacher] * len(settings.plugins)
    for index, layer in enumerate(encoder.blocks):
        with torch.no_grad():
            teacher, *students = torch.split(layer.attend(torch.cat([teacher, *students]), scores_mask), len(ids))
            teacher = layer.finish(teacher, layer.ffn(teacher))
        for position, config in enumerate(settings.plugins):
            x = students[position]
            site = layer_operands(state.tensors[config.ratio], index)["ffn"]
            output = layer.finish(x, compressed_ffn(x, float_mask, layer.ffn, site, config.activation))
            error = normalised_error(output, teacher, float_mask)
            error.backward()  # type: ignore[no-untyped-call]
            errors[config.ratio].append(float(error.detach()))
            students[position] = output.detach()
    rate = one_cycle(state.step, settings)
    for ratio, optimizer in state.optimizers.items():
        torch.nn.utils.clip_grad_norm_(state.tensors[ratio].values(), settings.clip)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    losses = {ratio: sum(values) / len(values) for ratio, values in errors.items()}
    for ratio, values in errors.items():
        smooth = state.layer_errors.get(ratio, values)
        state.layer_errors[ratio] = [0.98 * old + 0.02 * new for old, new in zip(smooth, values, strict=True)]
    state.step += 1
    if state.step % 10 == 0 or state.step in (1, settings.steps):
        state.history.append({"step": state.step, **{str(ratio): loss for ratio, loss in losses.items()}})
    return losses


@contextmanager
def interrupt_deferred() -> Iterator[None]:
    """Ctrl-C inside the block takes effect behind it, so that no step is half done when the state is saved."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals
        return
    pressed = threading.Event()
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed.is_set():
        raise KeyboardInterrupt


def half_weights(encoder: Encoder) -> Encoder:
    """A copy whose linear maps are bf16: autocast would cast frozen weights anew at every use."""
    copied = copy.deepcopy(encoder)
    for module in copied.modules():
        if isinstance(module, Linear):
            module.to(torch.bfloat16)
    return copied


def normalised_error(output: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over real tokens, over the target's variance there: 1.0 is as bad as the mean.

    Args:
        output, target: [batch, S, d].
        mask: [batch, S] in their type.
    """
    wide, count = mask.unsqueeze(-1), mask.sum()
    mean = (target * wide).sum(dim=(0, 1)) / count
    variance = ((target - mean).square() * wide).sum()
    return ((output - target).square() * wide).sum() / variance.clamp(min=1e-12)


def one_cycle(step: int, settings: TrainSettings) -> float:
    """Learning rate of a step: linear rise over the warm-up, then a cosine down to 0."""
    position = (step + 1) / settings.steps
    if position < settings.warmup:
        return settings.learning_rate * position / settings.warmup
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (position - settings.warmup) / (1 - settings.warmup)))


def _new_state(backbone: Backbone, settings: TrainSettings) -> State:
    sizes = backbone.config
    tensors = {
        config.ratio: {
            name: tensor.requires_grad_()
            for name, tensor in initial_tensors(config, sizes.hidden_size, sizes.layers, settings.seed).items()
        }
        for config in settings.plugins
    }
    optimizers = {
        ratio: torch.optim.AdamW(list(values.values()), lr=settings.learning_rate, weight_decay=0.0, fused=True)
        for ratio, values in tensors.items()
    }
    return State(tensors, optimizers)


def _resume(backbone: Backbone, settings: TrainSettings, directory: Path, key: str, overwrite: bool) -> State:
    state = _new_state(backbone, settings)
    finished = [c.ratio for c in settings.plugins if (directory / f"ratio-{c.ratio}.safetensors").exists()]
    path = directory / STATE_FILE
    if not overwrite and finished and not path.exists():
        raise InputError(f"{directory} already holds plugins for ratios {finished}", fix="another -o, or --overwrite")
    if overwrite or not path.exists():
        return state
    try:
        with safe_open(path, framework="pt") as file:
            saved = json.loads((file.metadata() or {})["state"])
            if saved["key"] == key:
                _restore(state, saved, file.get_tensor)
                return state
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise InputError(
            f"the interrupted run in {path} is damaged: {error}", fix="start anew with --overwrite"
        ) from error
    raise InputError(
        f"{directory} holds an interrupted run with another model, corpus or settings",
        fix="repeat that command to finish it, or start anew with --overwrite",
    )


def _restore(state: State, saved: dict[str, Any], tensor_of: Callable[[str], Tensor]) -> None:
    for ratio, tensors in state.tensors.items():
        for name, tensor in tensors.items():
            moments = {part: tensor_of(f"{ratio}/{part}/{name}") for part in ("exp_avg", "exp_avg_sq")}
            state.optimizers[ratio].state[tensor] = {"step": torch.tensor(float(saved["step"])), **moments}
            with torch.no_grad():
                tensor.copy_(tensor_of(f"{ratio}/value/{name}"))
    state.step, state.history = int(saved["step"]), saved["history"]
    state.layer_errors = {int(ratio): errors for ratio, errors in saved["layer_errors"].items()}


def _save_state(state: State, directory: Path, key: str) -> None:
    if state.step == 0:
        return
    tensors = {}
    for ratio, values in state.tensors.items():
        for name, tensor in values.items():
            moments = state.optimizers[ratio].state[tensor]
            tensors[f"{ratio}/value/{name}"] = tensor.detach()
            tensors |= {f"{ratio}/{part}/{name}": moments[part] for part in ("exp_avg", "exp_avg_sq")}
    saved = {"key": key, "step": state.step, "history": state.history, "layer_errors": state.layer_errors}
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / STATE_FILE, save(tensors, {"state": json.dumps(saved)}))


def _finished(
    backbone: Backbone, corpus: Corpus, settings: TrainSettings, state: State, config: PluginConfig
) -> Plugin:
    record = {
        "stage": "layer-local",
        "backbone": backbone.id,
        "corpus": corpus.record(),
        "steps": settings.steps,
        "tokens_per_step": settings.tokens,
        "learning_rate": settings.learning_rate,
        "seed": settings.seed,
        "precision": "bf16" if settings.bf16 else "fp32",
        "torch": torch.__version__,
        "layer_errors": [round(error, 5) for error in state.layer_errors[config.ratio]],
        "losses": [[entry["step"], round(entry[str(config.ratio)], 5)] for entry in _thinned(state.history)],
    }
    tensors = {name: tensor.detach().numpy() for name, tensor in state.tensors[config.ratio].items()}
    sizes = backbone.config
    return Plugin(config, tensors, backbone.family, sizes.layers, sizes.hidden_size, backbone.fingerprint, record)


def _thinned(history: Sequence[dict[str, float]], most: int = 50) -> Sequence[dict[str, float]]:
    return history[:: max(1, len(history) // most)]
