"""The verb `quality`: per task a fine-tuned backbone, adapted plugins, a bundle and its scores; one record of all.

Hours on a CPU, so every part is kept in the working directory as soon as it is done, and the same command goes on
where it stopped. What is scored is what is deployed: the exported graphs in an engine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from variator.bench.drawing import line_picture
from variator.bench.evaluate import EvalSettings, Evaluation, evaluate
from variator.bench.record import Machine, package_versions, this_machine
from variator.bench.wording import markdown_table
from variator.engines.backends import resolve
from variator.engines.build import build
from variator.errors import InputError, PluginError
from variator.exporters.export import ExportSettings, export
from variator.exporters.flops import count_flops
from variator.files import sha256_of_json, write_atomically
from variator.tasks.catalogue import TASKS
from variator.tasks.read import Split, read_split
from variator.toolkit.bundle import Bundle
from variator.toolkit.checkpoint import Backbone, load_backbone
from variator.toolkit.plugin_file import Plugin, find_plugin, load_named, save_plugin
from variator.toolkit.plugin_format import Key, file_name, in_order, parse_key
from variator.training.finetune import FinetuneSettings, finetune
from variator.training.labelled import Labelled, check_backbone, items
from variator.training.settings import TrainSettings
from variator.training.train import check_start
from variator.training.train import train as adapt

SCHEMA = "variator.quality/1"
LENGTHS = {"squad": 384}
"""Tokens at which a task's FLOPs are counted, where it is not the usual length."""

USUAL_LENGTH = 128


@dataclass(frozen=True)
class QualitySettings:
    """What to measure, and how plugins are adapted.

    Args:
        work: Directory that keeps all parts.
        tasks: Names of tasks; all by default.
        ratios: Beside 1.
        data: Directory of local files, as for `tasks.read`; None loads from the hub.
        plugins: Directory of pre-trained plugins to adapt; None takes those that ship for the backbone.
        steps, tokens, learning_rate: Of the adaptation; a split of more tokens than these gets about one pass.
        engine, precision: That scores.
        seed: Of everything.
    """

    work: Path
    tasks: tuple[str, ...] = tuple(TASKS)
    ratios: tuple[Key, ...] = (2, 4, 8)
    data: Path | None = None
    plugins: Path | None = None
    steps: int = 1000
    tokens: int = 1024
    learning_rate: float = 1e-3
    engine: str = "onnxruntime"
    precision: str = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [name for name in self.tasks if name not in TASKS]
        if unknown or not self.tasks:
            raise InputError(f"tasks {unknown}", valid=", ".join(TASKS))
        if not self.ratios or 1 in map(parse_key, self.ratios):
            raise InputError(f"ratios {self.ratios}", valid="2 or more; ratio 1 is always measured")


@dataclass(frozen=True)
class Row:
    """One task at one ratio.

    Args:
        split: What was scored; says so if it is a sample.
        trained: What backbone and plugins were trained on, likewise; STS-B takes both as they are.
        steps: Of the plugins' adaptation.
        scores: All metrics; `metric` is the one that counts, `value` its score and `reference` that of ratio 1.
        drop: Relative loss, 0.01 is 1 %.
        sequence: Tokens at which `flops_saved`, a share of the encoder's, was counted in the exported graph.
        parameters: Of the plugin; `share` of the backbone's.
        engine, precision: As read back.
    """

    task: str
    split: str
    trained: str
    steps: int
    ratio: Key
    metric: str
    value: float
    reference: float
    drop: float
    scores: dict[str, float]
    sequence: int
    flops_saved: float
    parameters: int
    share: float
    engine: str
    precision: str


@dataclass(frozen=True)
class QualityRecord:
    """Everything that the table and the plot are printed from; schema `variator.quality/1`."""

    machine: Machine
    model: str
    command: str
    versions: dict[str, str]
    settings: dict[str, Any]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    schema: str = SCHEMA

    def to_json(self) -> str:
        """JSON text of the record."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @staticmethod
    def load(path: Path) -> QualityRecord:
        """Read a record.

        Raises:
            InputError: If it is of another schema or damaged.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["schema"] != SCHEMA:
                raise InputError(f"{path} has schema {found['schema']!r}", valid=SCHEMA)
            rows = [Row(**row) for row in found["rows"]]
            return QualityRecord(**{**found, "machine": Machine(**found["machine"]), "rows": rows})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is no record of quality: {error!r}", valid=SCHEMA) from error


def quality(
    model: str,
    settings: QualitySettings,
    command: str,
    name: str | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> QualityRecord:
    """Measure what ratios cost on tasks; goes on where an interrupted call with the same settings stopped.

    Args:
        model: Checkpoint to fine-tune; for STS-B it is taken as it is.
        command: How this was called, for the record.
        name: What to call the model.
    """
    backbone = load_backbone(model, "hidden", name)
    chosen = asdict(settings) | {"work": "", "data": str(settings.data), "plugins": str(settings.plugins)}
    # All that can be wrong is found before hours are spent.
    resolve(settings.engine, settings.precision)
    start = _start(backbone, settings)
    check_start(backbone, _adaptation(start, settings, settings.steps), start)
    splits = {
        task: (read_split(TASKS[task], "train", settings.data), read_split(TASKS[task], "dev", settings.data))
        for task in settings.tasks
    }
    if "stsb" in settings.tasks:
        check_backbone(splits["stsb"][1], load_backbone(model))
    jobs = [_Job(model, backbone, *pair, start, settings, on_stage) for pair in splits.values()]
    rows = [row for job in jobs for row in job.rows()]
    notes = [
        "The last plugins of every adaptation, chosen by no score: the development split was read at the end.",
        "STS-B: backbone and plugins as they are, adapted to nothing.",
    ]
    plain = json.loads(json.dumps(chosen))  # as a record that is read back has it
    return QualityRecord(this_machine(), backbone.id, command, package_versions(), plain, rows, notes)


def _start(backbone: Backbone, settings: QualitySettings) -> list[Plugin]:
    """The pre-trained plugins, one per ratio."""
    if settings.plugins is not None:
        return [load_named(settings.plugins / file_name(ratio)) for ratio in settings.ratios]
    found = {ratio: find_plugin(backbone, ratio) for ratio in settings.ratios}
    if missing := [ratio for ratio, plugin in found.items() if plugin is None]:
        raise PluginError(f"no plugin of ratio {missing[0]} ships for {backbone.id}", fix="train some, and --from DIR")
    return [plugin for plugin in found.values() if plugin is not None]


def _adaptation(start: Sequence[Plugin], settings: QualitySettings, steps: int) -> TrainSettings:
    """How the pre-trained plugins are trained on."""
    return TrainSettings(
        tuple(plugin.config for plugin in start),
        local_steps=0,
        steps=steps,
        tokens=settings.tokens,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
    )


@dataclass(frozen=True)
class _Job:
    """One task. Its parts are kept in directories that are named by what they are made from, each used if it is there:
    `backbone-<hash>`, which other plugins find again, and `adapted-<hash>` with plugins, bundle and rows."""

    model: str
    backbone: Backbone
    train: Split
    dev: Split
    start: Sequence[Plugin]
    settings: QualitySettings
    on_stage: Callable[[str], None]

    def rows(self) -> list[Row]:
        """The task's rows, ratio by ratio."""
        settings, steps = self.settings, self._steps()
        place = self._place("adapted", self._adapted_from(steps))
        done = place / f"rows-{settings.engine}-{settings.precision}.json"
        if done.exists():
            return [Row(**row) for row in json.loads(done.read_text(encoding="utf-8"))]
        tuned = self._tuned()
        self._adapt(tuned, place / "plugins", steps)
        bundle = self._bundle(tuned, place)
        chosen = EvalSettings(engine=settings.engine, precision=settings.precision)
        found = evaluate(bundle.path, self.dev, chosen, lambda stage: self._say(f"scoring {stage}"))
        rows = [_row(one, found[0], bundle, self, steps) for one in found]
        write_atomically(done, json.dumps([asdict(row) for row in rows], indent=1))
        return rows

    def _place(self, part: str, made_from: Any) -> Path:
        return self.settings.work / self.dev.task.name / f"{part}-{sha256_of_json(made_from)[:12]}"

    def _tuned_from(self) -> list[Any]:
        return [self.backbone.fingerprint, self.train.origin, asdict(FinetuneSettings(seed=self.settings.seed))]

    def _steps(self) -> int:
        """Steps of the adaptation: what was asked for, or about one pass over a large split. None for embeddings, whose
        backbone is nothing but itself: what compression costs there is what the plugins lose as they are."""
        if self.dev.task.head == "embed":
            return 0
        return max(self.settings.steps, sum(i.length for i in items(self.train, self.backbone)) // self.settings.tokens)

    def _adapted_from(self, steps: int) -> list[Any]:
        settings = self.settings
        numbers = [steps, settings.tokens, settings.learning_rate, settings.seed]
        plugins = [[plugin.config.header(), plugin.digest] for plugin in self.start]
        return [*self._tuned_from(), self.dev.origin, numbers, plugins]

    def _tuned(self) -> str:
        """The checkpoint that knows the task."""
        if self.dev.task.head == "embed":
            return self.model
        output = self._place("backbone", self._tuned_from())
        if not output.exists():
            tell = _every(lambda step, steps: self._say(f"fine-tuning the backbone, step {step} of {steps}"))
            finetune(self.model, self.train, output, FinetuneSettings(seed=self.settings.seed), tell)
        return str(output)

    def _adapt(self, tuned: str, output: Path, steps: int) -> None:
        """The plugins, adapted to backbone and task; the last ones, since a split that chose cannot score."""
        settings = self.settings
        if all((output / file_name(ratio)).exists() for ratio in settings.ratios):
            return
        if not steps:
            for plugin in self.start:
                save_plugin(plugin, output)
            return
        backbone = load_backbone(tuned)
        data = Labelled(self.train, backbone)
        chosen = _adaptation(self.start, settings, steps)
        tell = _every(lambda step, steps: self._say(f"adapting, step {step} of {steps}"))
        adapt(backbone, data, chosen, output, lambda progress: tell(progress.step, progress.steps), start=self.start)

    def _bundle(self, tuned: str, place: Path) -> Bundle:
        """The exported bundle with its engine."""
        path, settings = place / "bundle", self.settings
        if not path.exists():
            self._say("exporting")
            name = f"{self.backbone.id}-{self.dev.task.name}"
            export(tuned, path, ExportSettings(settings.ratios, place / "plugins"), name=name)
        build(path, settings.engine, settings.precision, on_stage=self._say)
        return Bundle.open(path)

    def _say(self, what: str) -> None:
        self.on_stage(f"{self.dev.task.name}: {what}")


def _row(one: Evaluation, first: Evaluation, bundle: Bundle, job: _Job, steps: int) -> Row:
    """A ratio's scores, with those of ratio 1 and what the bundle says of the plugin."""
    ratio, dev, entry = one.ratio, job.dev, bundle.ratio(one.ratio)
    if one.drop is None:
        raise InputError(f"{first.model} scores 0 on {dev.label} at ratio 1: nothing can be compared with that")
    sequence = LENGTHS.get(dev.task.name, USUAL_LENGTH)
    whole, here = (count_flops(bundle.path / bundle.ratio(key).graph, sequence)["total"] for key in (1, ratio))
    metric = dev.task.metrics[0]
    return Row(
        task=dev.task.name,
        split=dev.label,
        trained=job.train.label if steps else "as pre-trained",
        steps=steps,
        ratio=ratio,
        metric=metric,
        value=round(one.scores[metric], 5),
        reference=round(first.scores[metric], 5),
        drop=round(one.drop, 5),
        scores={name: round(value, 5) for name, value in one.scores.items()},
        sequence=sequence,
        flops_saved=round(1 - here / whole, 4),
        parameters=entry.plugin_parameters,
        share=round(entry.plugin_parameters / bundle.manifest.parameters, 5),
        engine=one.engine,
        precision=one.precision,
    )


def _every(tell: Callable[[int, int], None], steps: int = 10) -> Callable[[int, int], None]:
    """Pass on every tenth step alone."""
    return lambda step, of: tell(step, of) if step % steps == 0 else None


def mean_drop(rows: Sequence[Row], ratio: Key) -> tuple[float, int]:
    """Mean relative drop over the paper's tasks (without STS-B) at a ratio, and how many tasks there are."""
    drops = [row.drop for row in rows if row.ratio == ratio and row.task != "stsb"]
    return (sum(drops) / len(drops) if drops else float("nan")), len(drops)


def markdown(record: QualityRecord) -> str:
    """The record as a Markdown table: a line per task, a column per ratio with the score and how it changed."""
    ratios = in_order({row.ratio for row in record.rows})
    lines = []
    for task in dict.fromkeys(row.task for row in record.rows):
        mine = {row.ratio: row for row in record.rows if row.task == task}
        first = mine[1]
        cells = [f"{mine[k].value:.4f}" + (f" ({-mine[k].drop:+.1%})" if k != 1 else "") for k in ratios]
        lines.append([first.split, first.metric, *cells, first.trained])
    means = [mean_drop(record.rows, ratio) for ratio in ratios]
    if count := means[0][1]:
        lines.append([f"mean of {count} without stsb", "", "", *(f"{-mean:+.1%}" for mean, _ in means[1:]), ""])
    for sequence in sorted({row.sequence for row in record.rows}):
        saved = {row.ratio: row.flops_saved for row in record.rows if row.sequence == sequence}
        lines.append([f"FLOPs saved at {sequence} tokens", "", *(f"{saved[ratio]:.1%}" for ratio in ratios), ""])
    share = {row.ratio: row.share for row in record.rows}
    lines.append(["parameters added", "", *(f"{share[ratio]:.1%}" for ratio in ratios), ""])
    columns = ["task", "metric", *(f"ratio {ratio}" for ratio in ratios), "trained on"]
    caption = f"{record.model} \\| {record.machine.cpu}, {record.machine.cores} cores \\| {record.machine.date}"
    return f"{caption}\n\n{markdown_table(columns, lines, 2)}"


def plot(record: QualityRecord) -> str:
    """The record as an SVG file: what is kept of each task's score, against the FLOPs saved."""
    lines = {}
    for task in dict.fromkeys(row.task for row in record.rows):
        mine = sorted((row for row in record.rows if row.task == task), key=lambda row: row.flops_saved)
        lines[task] = ([row.flops_saved for row in mine], [1 - row.drop for row in mine])
    return line_picture(lines, f"{record.model}: score kept, by task", "FLOPs saved", "share of ratio 1's score")


if __name__ == "__main__":  # python -m variator.bench.tasks RECORD.json: the table of the README again
    import sys

    print(markdown(QualityRecord.load(Path(sys.argv[1]))), end="")
