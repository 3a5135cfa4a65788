"""The verb `eval`: a task's official scores at every ratio, of a checkpoint in PyTorch or of a bundle's engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from variator.errors import InputError, PluginError
from variator.tasks.read import Split
from variator.tasks.score import Scores, check_head, check_labels, score
from variator.toolkit.bundle import MANIFEST
from variator.toolkit.plugin_file import Plugin, find_plugin, keys_in, load_named, load_plain, save_plugin
from variator.toolkit.plugin_format import Key, file_name, in_order
from variator.toolkit.rows import LONGEST_WRITTEN, Encode, Write

CHOSEN = "*"
"""Behind a change that was measured on the split that chose the plugin."""


@dataclass(frozen=True)
class EvalSettings:
    """What to score.

    Args:
        ratios: Beside 1; none takes all that the bundle or `plugins` has.
        plugins: Directory of plugin files, instead of those that ship or are in the bundle.
        engine, precision, threads: Of a bundle, as for `Runtime.open`.
        kind: What a checkpoint is a model for; detected by default.
    """

    ratios: tuple[Key, ...] = ()
    plugins: Path | None = None
    engine: str = "auto"
    precision: str | None = None
    threads: int = 0
    kind: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """One ratio's scores.

    Args:
        split: What they were measured on; says so if it is a sample.
        scores: By metric, the one that counts first.
        drop: Relative loss of that metric against ratio 1 of the same engine, 0.01 is 1 %; None if that scored 0.
        chosen: Whether this very split chose the plugin while it was trained, which flatters the scores.
    """

    model: str
    split: str
    ratio: Key
    engine: str
    precision: str
    scores: Scores
    drop: float | None
    chosen: bool = False


@dataclass(frozen=True)
class Subject:
    """What is scored: a model at several ratios, with writers if it is one that writes."""

    model: str
    task: str
    labels: Sequence[str]
    engine: str
    precision: str
    tokenizer: Tokenizer
    limit: int
    encoders: dict[Key, Encode]
    writers: dict[Key, Write]
    training: Mapping[Key, Mapping[str, Any]]


def check_options(place: str | Path, settings: EvalSettings) -> None:
    """Raise `InputError` for a setting that would have no effect."""
    if (Path(place) / MANIFEST).exists():
        if settings.kind:
            raise InputError(f"a bundle knows what it is for, not --kind {settings.kind}", fix="leave --kind out")
    elif settings.engine != "auto" or settings.precision or settings.threads:
        raise InputError(
            "a checkpoint is scored in PyTorch, in fp32",
            valid="--engine, --precision and --threads for a bundle",
            fix="variator export and build it first, or leave them out",
        )


def evaluate(
    place: str | Path, split: Split, settings: EvalSettings, on_stage: Callable[[str], None] = lambda stage: None
) -> list[Evaluation]:
    """Score a bundle or a checkpoint at ratio 1 and the ratios asked for.

    Args:
        place: A bundle's directory, a checkpoint's directory or a hub id.
        split: Of a task whose head the model has.

    Raises:
        InputError: If the model is for another task, or a setting would have no effect.
        PluginError: If there is no plugin of a ratio.
    """
    check_options(place, settings)
    with _opened(place, settings) as subject:
        check_head(split.task, subject.task, subject.model)
        check_labels(split.task, subject.labels, subject.model)
        found: list[Evaluation] = []
        for ratio, encode in subject.encoders.items():
            on_stage(f"{split.label} at ratio {ratio}")
            scores = score(split, encode, subject.tokenizer, subject.limit, subject.writers.get(ratio))
            whole = found[0].scores if found else scores
            metric = split.task.metrics[0]
            drop = 1 - scores[metric] / whole[metric] if whole[metric] else None
            judged = subject.training.get(ratio, {}).get("score", {}).get("metric")
            how = (subject.engine, subject.precision)
            found.append(Evaluation(subject.model, split.label, ratio, *how, scores, drop, judged == split.criterion))
        return found


@contextmanager
def _opened(place: str | Path, settings: EvalSettings) -> Iterator[Subject]:
    if (Path(place) / MANIFEST).exists():
        with _bundle(Path(place), settings) as subject:
            yield subject
    else:
        yield _checkpoint(str(place), settings)


@contextmanager
def _bundle(path: Path, settings: EvalSettings) -> Iterator[Subject]:
    from variator.engines.generation import GenerateSettings
    from variator.engines.runtime import DEFAULT, Runtime

    with Runtime.open(path, settings.engine, settings.precision, settings.threads) as runtime:
        manifest = runtime.bundle.manifest
        training = {ratio: entry.training for ratio, entry in manifest.ratios.items()}
        if settings.plugins is not None:
            plugins = load_plain(settings.plugins)
            runtime.plug(DEFAULT, plugins)
            training = {plugin.config.key: plugin.training for plugin in plugins}
        ratios = in_order({1, *(settings.ratios or runtime.plugins[DEFAULT])})

        def encoder(ratio: Key) -> Encode:
            return lambda inputs: runtime.infer(inputs, ratio=ratio, truncate=True).outputs

        def writer(ratio: Key) -> Write:
            settings = GenerateSettings(LONGEST_WRITTEN)
            return lambda inputs: runtime.generate(inputs, ratio=ratio, truncate=True, settings=settings).texts

        yield Subject(
            manifest.model,
            manifest.task,
            manifest.labels,
            runtime.engine,
            runtime.load(1).precision,
            runtime.tokenizer,
            manifest.max_length,
            {ratio: encoder(ratio) for ratio in ratios},
            {ratio: writer(ratio) for ratio in ratios if manifest.decoder is not None},
            training,
        )


def _checkpoint(model: str, settings: EvalSettings) -> Subject:
    from variator.toolkit.checkpoint import load_backbone
    from variator.training.student import answering, writing

    backbone = load_backbone(model, settings.kind)
    plugins: dict[Key, Plugin] = {}
    encoders: dict[Key, Encode] = {1: answering(backbone, None)}
    for ratio in in_order({*settings.ratios} or (keys_in(settings.plugins) if settings.plugins else ())):
        plugin = find_plugin(backbone, ratio, settings.plugins) if ratio != 1 else None
        if plugin is not None:
            plugins[ratio], encoders[ratio] = plugin, answering(backbone, plugin)
        elif ratio != 1:
            raise PluginError(
                f"there is no plugin of ratio {ratio} for {backbone.id}", fix="--plugin DIR, or train one first"
            )
    if settings.plugins is not None and not plugins:
        raise PluginError(f"there is no plugin in {settings.plugins}", valid="ratio-<k>.safetensors, as train writes")
    return Subject(
        backbone.id,
        backbone.task,
        backbone.labels,
        "torch",
        "fp32",
        backbone.tokenizer.backend_tokenizer,
        backbone.max_length,
        encoders,
        {key: writing(backbone, encode) for key, encode in encoders.items() if backbone.decoder is not None},
        {key: plugin.training for key, plugin in plugins.items()},
    )


def record_scores(found: Sequence[Evaluation], directory: Path) -> None:
    """Write scores into the records of the plugin files that they are of; a newer score of the same split replaces one.

    Args:
        found: Of a checkpoint in PyTorch, with the plugins of `directory`.

    Raises:
        PluginError: If a plugin is missing or damaged; files are written one by one, each whole.
    """
    whole = found[0]
    for one in found[1:]:
        plugin = load_named(directory / file_name(one.ratio))
        if plugin.untrained:
            raise PluginError(f"{directory / file_name(one.ratio)} was never trained: its scores say nothing")
        kept = [entry for entry in plugin.training.get("scores", []) if entry["split"] != one.split]
        values = {name: round(value, 5) for name, value in one.scores.items()}
        teacher = {name: round(value, 5) for name, value in whole.scores.items()}
        entry = {"split": one.split, "value": values, "ratio_1": teacher, "precision": one.precision}
        save_plugin(replace(plugin, training={**plugin.training, "scores": [*kept, entry]}), directory)


def as_rows(found: Sequence[Evaluation]) -> list[list[str]]:
    """The evaluations as cells: ratio, engine, precision, every metric, and how the first changed."""
    return [
        [
            str(one.ratio),
            one.engine,
            one.precision,
            *(f"{value:.4f}" for value in one.scores.values()),
            "-" if one.ratio == 1 or one.drop is None else f"{-one.drop:+.2%}{CHOSEN if one.chosen else ''}",
        ]
        for one in found
    ]
