"""Splits of a task, from local files or from the hub: checked row by row before anything is trained on them.

Local files lie in `DIR/<task>/` or in `DIR` itself: `train.jsonl`, `dev.jsonl` with GLUE's field names, one JSON object
per line; for SQuAD `train.json`, `dev.json` of the official form; each also as .gz. Further parts of a split have more
behind - or _ (`train-v1.1-part.json`, `dev_matched.jsonl`) and are read after it; mismatched MNLI is not.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from variator.errors import CorpusError
from variator.files import sha256_of
from variator.tasks.catalogue import Task

SPLITS = ("train", "dev")


@dataclass(frozen=True)
class Example:
    """One row: its texts and its label. For SQuAD the texts are question and context, the label is 0."""

    texts: tuple[str, ...]
    label: float
    answers: tuple[tuple[str, int], ...] = ()
    """Of a question: text and the character it starts at; several people answered."""

    @property
    def input(self) -> str | tuple[str, str]:
        """Its texts as a model is asked them."""
        return self.texts[0] if len(self.texts) == 1 else (self.texts[0], self.texts[1])


@dataclass(frozen=True)
class Split:
    """The examples of a split, and where they are from."""

    task: Task
    name: str
    examples: Sequence[Example]
    origin: tuple[str, ...]
    """Files with their hashes, or the hub's name."""

    @property
    def label(self) -> str:
        """What a score on it has to say: `qqp dev (sample: 7,600 of 40,430)`."""
        count, official = len(self.examples), self.task.sizes.get(self.name)
        if official is None:
            return f"{self.task.name} {self.name} ({count:,} rows)"
        part = "" if count == official else f" (sample: {count:,} of {official:,})"
        if count > official:
            part = f" ({count:,} rows, the official split has {official:,})"
        return f"{self.task.name} {self.name}{part}"

    @property
    def criterion(self) -> str:
        """The score that counts on it: `accuracy, sst2 dev`."""
        return f"{self.task.metrics[0]}, {self.label}"


def read_split(task: Task, name: str, data: Path | None = None) -> Split:
    """Read a split from files in `data`, or from the hub without it.

    Args:
        name: train or dev.
        data: A directory as this module describes it, or one file, which gives the split its own name.

    Raises:
        CorpusError: If there is none, or a row lacks a field or has a label out of range, with the row's number.
    """
    if data is None:
        return _from_hub(task, name)
    files = [data] if data.is_file() else _files(task, name, data)
    name = data.name.split(".")[0] if data.is_file() else name
    examples: list[Example] = []
    for file in files:
        rows = _squad_rows(file) if task.name == "squad" else json_lines(file)
        examples += [_example(task, row, f"{file}, {place}") for place, row in rows]
    return _checked(Split(task, name, examples, tuple(f"{file.name} {sha256_of(file)}" for file in files)))


def _checked(split: Split) -> Split:
    if not split.examples:
        raise CorpusError(f"{split.task.name} {split.name} has no rows", valid="at least one")
    return split


def _files(task: Task, name: str, data: Path) -> list[Path]:
    if not data.is_dir():
        raise CorpusError(f"there is no directory {data}", valid="--data DIR, or a file")
    kind = "json" if task.name == "squad" else "jsonl"
    folder = data / task.name if (data / task.name).is_dir() else data
    pattern = re.compile(rf"{name}([-_].*)?\.{kind}(\.gz)?")
    files = sorted(file for file in folder.iterdir() if pattern.fullmatch(file.name) and "mismatched" not in file.name)
    stems = [file.name.removesuffix(".gz") for file in files]
    if len(set(stems)) < len(stems):
        raise CorpusError(f"{folder} holds the same file plain and as .gz", fix="take one of them away")
    if not files:
        raise CorpusError(
            f"there is no {name} split of {task.name} in {data}",
            valid=f"{data / task.name}/{name}*.{kind} or .{kind}.gz with {', '.join(task.fields)}, label",
            fix="--data DIR with such files, or no --data to load it from the hub",
        )
    return files


def _from_hub(task: Task, name: str) -> Split:
    import datasets

    dataset, configuration, dev = task.hub
    origin = f"{dataset} {configuration or ''}".strip()
    try:
        found = datasets.load_dataset(dataset, configuration, split="train" if name == "train" else dev)
    except Exception as error:  # the library raises many kinds; all mean that it cannot be had
        raise CorpusError(
            f"cannot load {origin} from the hub: {str(error).strip().splitlines()[0] if str(error) else error!r}",
            fix=f"give local files: --data DIR with DIR/{task.name}/{name}.jsonl",
        ) from error
    if task.name == "squad":
        rows: Iterable[dict[str, Any]] = (_flat_squad(row) for row in found)
    else:
        rows = found
    examples = [_example(task, row, f"{origin}, row {index}") for index, row in enumerate(rows)]
    return _checked(Split(task, name, examples, (origin,)))


def _flat_squad(row: dict[str, Any]) -> dict[str, Any]:
    answers = row["answers"]
    pairs = zip(answers["text"], answers["answer_start"], strict=True)
    return {**row, "answers": [{"text": text, "answer_start": start} for text, start in pairs]}


def _bytes(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise CorpusError(f"cannot read {path}: {error}", valid="a readable, undamaged file") from error


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a .jsonl file, also .gz, each with its place. Raises `CorpusError` for what is no JSON."""
    for number, line in enumerate(_bytes(path).split(b"\n"), start=1):
        if line.strip():
            try:
                yield f"row {number}", json.loads(line)
            except ValueError as error:
                raise CorpusError(f"{path}, row {number}: not JSON ({error})", valid="one object per line") from error


def plain_texts(path: Path) -> list[str | tuple[str, str]]:
    """Every row's text, or its first two as a pair, of a .jsonl file: for measurements that need real texts, no labels.

    Raises:
        CorpusError: If there is none.
    """
    found: list[str | tuple[str, str]] = []
    for place, row in json_lines(path):
        texts = [value for value in row.values() if isinstance(value, str)] if isinstance(row, dict) else []
        if not any(text.strip() for text in texts):
            raise CorpusError(f"{path}, {place}: no text", valid='objects with texts, such as {"text": "…"}')
        found.append((texts[0], texts[1]) if len(texts) > 1 else texts[0])
    if not found:
        raise CorpusError(f"{path} holds no text", valid='objects with texts, such as {"text": "…"}')
    return found


def _squad_rows(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        for article in json.loads(_bytes(path))["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    number += 1
                    yield f"question {number}", {**question, "context": paragraph["context"]}
    except (ValueError, KeyError, TypeError) as error:
        raise CorpusError(
            f"{path}, behind question {number}: {type(error).__name__} {error}",
            valid="SQuAD 1.1: data, paragraphs, qas",
        ) from error


def _example(task: Task, row: Any, place: str) -> Example:
    missing = [field for field in task.fields if not isinstance(row, dict) or not isinstance(row.get(field), str)]
    if missing:
        raise CorpusError(f"{place}: no text {missing[0]!r}", valid=f"the fields {', '.join(task.fields)}")
    texts = tuple(row[field] for field in task.fields)
    full = [bool(text.strip()) for text in texts]
    if not any(full) or (task.head == "embed" and not all(full)):  # one side of a pair may be empty: QQP has such
        raise CorpusError(f"{place}: empty text", valid="a text with at least one character")
    if task.name == "squad":
        return Example(texts, 0, _answers(row, place))
    label = row.get("label")
    number = not isinstance(label, bool) and isinstance(label, int | float) and math.isfinite(label)
    if task.classes and (not number or label not in range(task.classes)):
        raise CorpusError(f"{place}: label {label!r}", valid=f"a whole number from 0 to {task.classes - 1}")
    if not number or not 0 <= label <= 5:
        raise CorpusError(f"{place}: label {label!r}", valid="a number from 0 to 5")
    return Example(texts, int(label) if task.classes else float(label))


def _answers(row: dict[str, Any], place: str) -> tuple[tuple[str, int], ...]:
    try:
        answers = tuple((str(answer["text"]), int(answer["answer_start"])) for answer in row["answers"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorpusError(f"{place}: answers {error!r}", valid='[{"text": "…", "answer_start": 17}]') from error
    context = row["context"]
    wrong = [text for text, start in answers if start < 0 or context[start : start + len(text)] != text]
    if wrong or not answers:
        raise CorpusError(
            f"{place}: " + (f"the answer {wrong[0][:40]!r} is not at its place" if wrong else "no answer"),
            valid="answers that lie in the context at answer_start",
        )
    return answers
