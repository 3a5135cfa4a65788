"""The verb `train`: a frozen backbone and data -> plugin files, in two stages, to be interrupted at any time.

The layer-local stage (`training.local`) gives a start in minutes; distillation end to end (`training.distil`) makes
it good. All ratios train side by side on one teacher pass. The same command runs in one process or in several
(`training.processes`): n processes of one batch each take the same step as one process that accumulates n batches.
"""

from __future__ import annotations

import contextlib
import copy
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from variator import machine
from variator.errors import InputError, VariatorError
from variator.files import sha256_of_json
from variator.toolkit.checkpoint import Backbone, Model
from variator.toolkit.encoder import Linear
from variator.toolkit.plugin import initial_tensors
from variator.toolkit.plugin_file import Plugin, save_plugin
from variator.toolkit.plugin_format import Key, file_name
from variator.training.batch import Data
from variator.training.distil import Teacher, distil_step
from variator.training.journal import Summary, last_scores, note, plugin_of, summarise, write_line
from variator.training.local import local_step
from variator.training.objective import Losses
from variator.training.processes import Processes, average_gradients, sharding_asked_for
from variator.training.run import Judge, Progress, Run, Stage
from variator.training.settings import TrainSettings
from variator.training.state import (
    LOG_FILE,
    STATE_FILE,
    Best,
    State,
    load_state,
    new_optimizer,
    save_state,
)
from variator.training.student import student

SAVE_EVERY_S = 60.0

RELEASE_EVERY = 50
"""Steps between two returns of freed memory; a return takes some hundredths of a second."""


class InterruptedTrainingError(VariatorError):
    """Training was stopped by the user and saved."""


class DivergedError(VariatorError):
    """A loss or gradient that is not finite; what was saved before is still there."""


def train(
    backbone: Backbone,
    data: Data,
    settings: TrainSettings,
    directory: Path,
    on_step: Callable[[Progress], None] = lambda progress: None,
    judge: Judge | None = None,
    start: Sequence[Plugin] = (),
    overwrite: bool = False,
) -> list[Plugin]:
    """Train plugins and write them to `directory`; resumes an interrupted run of the same settings.

    Args:
        on_step: Called after every step.
        judge: Development set: the tensors with a ratio's best score are the ones that are written.
        start: Plugins to go on from, one per configuration, for a backbone of the same sizes.
        overwrite: Start anew, whatever finished plugins or interrupted run `directory` holds.

    Returns:
        The plugins, in the order of `settings.plugins`.

    Raises:
        InputError: If `directory` holds finished plugins or the state of a run with other settings, or is in use.
        InterruptedTrainingError: After Ctrl-C, when the state has been saved.
        DivergedError: If a loss is not finite, naming the layer; the last good state stays.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    run = _prepare(backbone, data, settings, directory, judge, start)
    with run.processes.alone(directory):
        return _train(run, on_step, overwrite)


def _train(run: Run, on_step: Callable[[Progress], None], overwrite: bool) -> list[Plugin]:
    """All steps that are left, and the plugins written."""
    directory = run.directory
    state = _resume(run, overwrite)
    saved_at = time.monotonic()
    while True:
        try:
            _score(run, state)  # of the step before, even if that was before an interruption
            stage = _current(run, state)
            if stage is None:
                break
            with interrupt_deferred():
                progress = _step(run, stage, state)
            on_step(progress)
            if time.monotonic() - saved_at > SAVE_EVERY_S:
                _save(run, state)
                saved_at = time.monotonic()
        except KeyboardInterrupt as interrupt:
            _save(run, state)
            stage = run.stages[min(state.stage, len(run.stages) - 1)]
            raise InterruptedTrainingError(
                f"stopped after step {state.step} of the {stage.name} stage's {stage.steps}; "
                + (f"the state is saved in {directory}" if state.step or state.stage else "there was nothing to save"),
                fix="run the same command again to go on (without --overwrite)",
            ) from interrupt
    plugins = [plugin_of(run, state, config) for config in run.settings.plugins]
    if run.processes.main:
        for plugin in plugins:
            save_plugin(plugin, directory)
        (directory / STATE_FILE).unlink(missing_ok=True)
    run.processes.wait()
    return plugins


def _prepare(
    backbone: Backbone,
    data: Data,
    settings: TrainSettings,
    directory: Path,
    judge: Judge | None,
    start: Sequence[Plugin],
) -> Run:
    check_start(backbone, settings, start)
    for config in settings.plugins:
        backbone.config.check(config)
    processes = Processes()
    bf16 = processes.bf16(settings.precision)
    shard = settings.shard or sharding_asked_for()
    # Sharding changes a model in place, and a device moves it: the caller's own stays as it is.
    apart = shard or bf16 or processes.device.type != "cpu"
    model = copy.deepcopy(backbone.model) if apart else backbone.model
    if bf16 and not shard:
        halve_weights(model)
    model = processes.place(model, shard)
    local = partial(local_step, model, settings.plugins)
    decoder, first = None, 0
    if backbone.decoder is not None:
        decoder = copy.deepcopy(backbone.decoder) if apart else backbone.decoder
        decoder = processes.place_decoder(decoder, shard)
        first = backbone.special.start
    teacher = Teacher(model, backbone.task, settings.weights, decoder, first)
    distil = partial(distil_step, teacher, settings.plugins)
    stages = [
        Stage("layer-local", settings.local_steps, settings.local_rate, local),
        Stage("distillation", settings.steps, settings.learning_rate, distil),
    ]
    what = {
        **asdict(settings),
        "plugins": [config.header() for config in settings.plugins],
        # What may differ between two parts of a run, or is the same in another form.
        "threads": 0,
        "shard": False,
        "precision": bf16,
        "accumulate": settings.accumulate * processes.count,
    }
    judged = [judge.metric, *judge.origin] if judge else []
    before = [plugin.digest for plugin in start]
    key = sha256_of_json([what, backbone.fingerprint, backbone.task, data.record(), judged, before])
    used = [stage for stage in stages if stage.steps]
    return Run(backbone, data, settings, directory, judge, start, processes, bf16, model, used, key)


def check_start(backbone: Backbone, settings: TrainSettings, start: Sequence[Plugin]) -> None:
    """Raise `InputError` unless plugins to go on from are what the settings train, of the backbone's sizes."""
    if not start:
        return
    if (found := tuple(plugin.config for plugin in start)) != settings.plugins:
        raise InputError(f"the plugins to go on from are {found}", valid=f"{settings.plugins}")
    sizes = (backbone.config.layers, backbone.config.hidden_size)
    for plugin in start:
        if (plugin.layers, plugin.hidden_size) != sizes:
            raise InputError(
                f"the ratio-{plugin.config.key} plugin is for {plugin.layers} layers of {plugin.hidden_size}",
                valid=f"{sizes[0]} layers of {sizes[1]}, as {backbone.id} has",
            )


def _current(run: Run, state: State) -> Stage | None:
    """The stage that the next step belongs to, begun with a fresh optimiser; None when all are done."""
    if state.stage < len(run.stages) and state.step >= run.stages[state.stage].steps:
        state.stage, state.step = state.stage + 1, 0
        state.optimizers = {r: new_optimizer(tensors, run.processes.device) for r, tensors in state.tensors.items()}
    return run.stages[state.stage] if state.stage < len(run.stages) else None


def _step(run: Run, stage: Stage, state: State) -> Progress:
    """One optimiser step on all ratios, with its line in the log where one is due."""
    started = time.perf_counter()
    settings, processes = run.settings, run.processes
    tokens = 0
    found: list[dict[Key, Losses]] = []
    for index in range(settings.accumulate):
        place = (state.step * settings.accumulate + index) * processes.count + processes.rank
        batch = run.data.batch(run.backbone, f"{settings.seed}:{stage.name}", place, settings.tokens)
        tokens += batch.tokens
        with processes.autocast(run.bf16):
            found.append(stage.step(state.tensors, batch.to(processes.device)))
    rate = one_cycle(state.step, stage.steps, stage.rate, settings.warmup)
    summaries: dict[Key, Summary] = {}
    for ratio, tensors in state.tensors.items():
        summaries[ratio] = summarise(processes, [losses[ratio] for losses in found])
        average_gradients(processes, tensors.values(), 1 / settings.accumulate)
        norm = torch.nn.utils.clip_grad_norm_(tensors.values(), settings.clip)
        _check_finite(run, stage, state.step, ratio, summaries[ratio], float(norm))
        state.optimizers[ratio].param_groups[0]["lr"] = rate
        state.optimizers[ratio].step()
        state.optimizers[ratio].zero_grad(set_to_none=True)
        _smooth(state, ratio, summaries[ratio].layers)
    state.step += 1
    speed = processes.count * tokens / (time.perf_counter() - started)
    note(run, stage, state, summaries, rate, speed)
    if state.step % RELEASE_EVERY == 0:
        machine.release_memory()
    losses = {ratio: summary.total for ratio, summary in summaries.items()}
    return Progress(stage.name, state.step, stage.steps, losses, last_scores(state), speed)


def _check_finite(run: Run, stage: Stage, step: int, ratio: Key, summary: Summary, norm: float) -> None:
    """Stop before a step that is not finite is taken."""
    if math.isfinite(summary.total) and math.isfinite(norm):
        return
    place = next((index for index, value in enumerate(summary.layers) if not math.isfinite(value)), None)
    where = f"in layer {place}" if place is not None else "behind the last layer"
    where = "in its gradient" if math.isfinite(summary.total) else where
    kept = f"the state saved last is in {run.directory}" if (run.directory / STATE_FILE).exists() else "nothing is kept"
    raise DivergedError(
        f"the loss of ratio {ratio} is no finite number at step {step + 1} of the {stage.name} stage, first {where}; "
        f"no plugin was written, {kept}",
        fix="train with a lower --learning-rate (--local-rate in the layer-local stage), and --overwrite",
    )


def _smooth(state: State, ratio: Key, errors: Sequence[float]) -> None:
    before = state.layer_errors.get(ratio, errors)
    state.layer_errors[ratio] = [0.98 * old + 0.02 * new for old, new in zip(before, errors, strict=True)]


def _score(run: Run, state: State) -> None:
    """Score on the development set where it is due and not done yet; keep the best tensors."""
    settings, last = run.settings, len(run.stages) - 1
    if run.judge is None or state.stage != last or state.step in (0, state.scored):
        return
    if state.step % settings.evaluate_every and state.step != run.stages[last].steps:
        return
    scores: dict[Key, float] = {}
    for config in settings.plugins:
        answers = student(run.backbone, run.model, config, state.tensors[config.key], run.processes.device)
        with run.processes.autocast(run.bf16):
            scores[config.key] = run.judge(answers)
    for key, score in scores.items():
        # A correlation of constants is no number: worse than any that is one.
        if key not in state.best or (math.isfinite(score) and not score <= state.best[key].score):
            kept = {name: tensor.detach().cpu().clone() for name, tensor in state.tensors[key].items()}
            state.best[key] = Best(score if math.isfinite(score) else -math.inf, state.step, kept)
    state.scored = state.step
    if run.processes.main:
        shown = {str(key): score if math.isfinite(score) else None for key, score in scores.items()}
        entry = {"stage": run.stages[last].name, "step": state.step, "metric": run.judge.metric, "score": shown}
        write_line(run, state, entry)


@contextlib.contextmanager
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


def halve_weights(model: Model) -> None:
    """Make the encoder's linear maps bf16: autocast would cast frozen weights anew at every use."""
    for module in model.encoder.modules():
        if isinstance(module, Linear):
            module.to(torch.bfloat16)


def one_cycle(step: int, steps: int, peak: float, warmup: float) -> float:
    """Learning rate of a step from 0: linear rise over the warm-up, then a cosine down to 0."""
    position = (step + 1) / steps
    if position < warmup:
        return peak * position / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (position - warmup) / (1 - warmup)))


def _resume(run: Run, overwrite: bool) -> State:
    state = _new_state(run)
    finished = [c.key for c in run.settings.plugins if (run.directory / file_name(c.key)).exists()]
    path = run.directory / STATE_FILE
    if not overwrite and finished and not path.exists():
        raise InputError(
            f"{run.directory} already holds plugins for ratios {finished}", fix="another -o, or --overwrite"
        )
    if not overwrite and path.exists():
        load_state(state, run.directory, run.key)
    elif run.processes.main:
        path.unlink(missing_ok=True)
        (run.directory / LOG_FILE).unlink(missing_ok=True)
    run.processes.wait()
    return state


def _new_state(run: Run) -> State:
    sizes, device = run.backbone.config, run.processes.device
    given = {plugin.config: plugin for plugin in run.start}
    tensors = {}
    for config in run.settings.plugins:
        values = initial_tensors(config, sizes.hidden_size, sizes.layers, run.settings.seed)
        if config in given:
            values = {name: torch.tensor(given[config].tensors[name], dtype=torch.float32) for name in values}
        tensors[config.key] = {name: value.to(device).requires_grad_() for name, value in values.items()}
    return State(tensors, {ratio: new_optimizer(values, device) for ratio, values in tensors.items()})


def _save(run: Run, state: State) -> None:
    if run.processes.main:
        save_state(state, run.directory, run.key)
