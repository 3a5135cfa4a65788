"""The verb `eval`: a task's official scores at every ratio, of a checkpoint in PyTorch or of a bundle's engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Tokenizer

from variator.errors import PluginError
from variator.tasks.read import Split
from variator.tasks.score import Scores, check_head, score
from variator.toolkit.plugin_file import find_plugin, load_named, save_plugin
from variator.toolkit.plugin_format import Key, file_name, in_order
from variator.toolkit.rows import Encode


@dataclass(frozen=True)
class EvalSettings:
    """What to score.

    Args:
        ratios: Beside 1; none takes all that a bundle has.
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
        drop: Relative loss of that metric against ratio 1 of the same engine, 0.01 is 1 %.
    """

    model: str
    split: str
    ratio: Key
    engine: str
    precision: str
    scores: Scores
    drop: float


@dataclass(frozen=True)
class Subject:
    """What is scored: a model at several ratios."""

    model: str
    task: str
    engine: str
    precision: str
    tokenizer: Tokenizer
    limit: int
    encoders: dict[Key, Encode]


def evaluate(
    place: str | Path, split: Split, settings: EvalSettings, on_stage: Callable[[str], None] = lambda stage: None
) -> list[Evaluation]:
    """Score a bundle or a checkpoint at ratio 1 and the ratios asked for.

    Args:
        place: A bundle's directory, a checkpoint's directory or a hub id.
        split: Of a task whose head the model has.

    Raises:
        InputError: If the model is for another task.
        PluginError: If there is no plugin of a ratio.
    """
    with _opened(place, settings) as subject:
        check_head(split.task, subject.task, subject.model)
        found: list[Evaluation] = []
        for ratio, encode in subject.encoders.items():
            on_stage(f"{split.label} at ratio {ratio}")
            scores = score(split, encode, subject.tokenizer, subject.limit)
            whole = found[0].scores if found else scores
            metric = split.task.metrics[0]
            drop = 1 - scores[metric] / whole[metric] if whole[metric] else 0.0
            found.append(Evaluation(subject.model, split.label, ratio, subject.engine, subject.precision, scores, drop))
        return found


@contextmanager
def _opened(place: str | Path, settings: EvalSettings) -> Iterator[Subject]:
    if (Path(place) / "manifest.json").exists():
        with _bundle(Path(place), settings) as subject:
            yield subject
    else:
        yield _checkpoint(str(place), settings)


@contextmanager
def _bundle(path: Path, settings: EvalSettings) -> Iterator[Subject]:
    from variator.engines.runtime import DEFAULT, Runtime

    with Runtime.open(path, settings.engine, settings.precision, settings.threads) as runtime:
        if settings.plugins is not None:
            runtime.plug(DEFAULT, settings.plugins)
        ratios = in_order({1, *(settings.ratios or runtime.plugins[DEFAULT])})

        def encoder(ratio: Key) -> Encode:
            return lambda inputs: runtime.infer(inputs, ratio=ratio, truncate=True).outputs

        manifest = runtime.bundle.manifest
        yield Subject(
            manifest.model,
            manifest.task,
            runtime.engine,
            runtime.load(1).precision,
            runtime.tokenizer,
            manifest.max_length,
            {ratio: encoder(ratio) for ratio in ratios},
        )


def _checkpoint(model: str, settings: EvalSettings) -> Subject:
    from variator.toolkit.checkpoint import load_backbone
    from variator.training.student import answering

    backbone = load_backbone(model, settings.kind)
    encoders: dict[Key, Encode] = {}
    for ratio in in_order({1, *settings.ratios}):
        plugin = find_plugin(backbone, ratio, settings.plugins) if ratio != 1 else None
        if ratio != 1 and plugin is None:
            raise PluginError(
                f"there is no plugin of ratio {ratio} for {backbone.id}", fix="--plugin DIR, or train one first"
            )
        encoders[ratio] = answering(backbone, plugin)
    tokenizer = backbone.tokenizer.backend_tokenizer
    return Subject(backbone.id, backbone.task, "torch", "fp32", tokenizer, backbone.max_length, encoders)


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
            "-" if one.ratio == 1 else f"{-one.drop:+.2%}",
        ]
        for one in found
    ]
