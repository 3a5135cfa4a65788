"""A task's training split as batches with labels, and its development split as a judge."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from variator.errors import InputError
from variator.tasks.catalogue import task_named
from variator.tasks.read import Split, read_split
from variator.tasks.score import Scores, check_head, check_labels, score
from variator.tasks.squad import LONGEST_ANSWER, question_of, windows
from variator.toolkit.checkpoint import Backbone
from variator.toolkit.rows import Encode, Row
from variator.training.batch import Batch, batch_of, fitting
from variator.training.objective import IGNORED
from variator.training.student import tokenise, writing


@dataclass(frozen=True)
class Item:
    """One example, tokenised: one row, or two for a pair of embeddings; and its label values, by name."""

    rows: tuple[Row, ...]
    labels: dict[str, float | list[int]]

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(len(row.ids) for row in self.rows)


class Labelled:
    """A split as training data: `training.batch.Data`. Neighbours in length make a batch, drawn by index alone."""

    def __init__(self, split: Split, backbone: Backbone) -> None:
        check_backbone(split, backbone)
        self._split = split
        self._items = sorted(items(split, backbone), key=lambda item: item.length)

    def batch(self, backbone: Backbone, seed: str, index: int, tokens: int) -> Batch:
        """The batch of one index: see `training.batch.Data`."""
        start = random.Random(f"{seed}:{index}").randrange(len(self._items))
        most = min(tokens, len(self._items))
        following = [self._items[(start + step) % len(self._items)] for step in range(most)]
        chosen = following[: fitting((item.length for item in following), tokens // len(following[0].rows))]
        return together(chosen, backbone.token_types)

    def record(self) -> list[dict[str, Any]]:
        """What a plugin's training record says about the data."""
        return [{"task": self._split.label, "files": list(self._split.origin)}]


def items(split: Split, backbone: Backbone) -> list[Item]:
    """Every example (every window of SQuAD) of a split, tokenised."""
    examples = split.examples
    if split.task.head == "qa" and backbone.decoder is not None:
        rows = tokenise(backbone, [question_of(example) for example in examples])
        texts = [example.answers[0][0].strip() for example in examples]
        answers = [ids[:LONGEST_ANSWER] for ids in backbone.tokenizer(texts)["input_ids"]]
        return [Item((row,), {"answer": ids}) for row, ids in zip(rows, answers, strict=True)]
    if split.task.head == "qa":
        found = []
        for window in windows(backbone.tokenizer.backend_tokenizer, examples, backbone.max_length):
            text, start = examples[window.question].answers[0]
            first, last = window.answer(start, start + len(text))
            found.append(Item((window.row,), {"start": first, "end": last}))
        return found
    if split.task.head == "embed":
        # 0 to 5 as a cosine: 5 means the same, 0 nothing in common.
        return [Item(tuple(tokenise(backbone, e.texts)), {"similarity": e.label / 5}) for e in examples]
    rows = tokenise(backbone, [example.input for example in examples])
    return [Item((row,), {"label": example.label}) for row, example in zip(rows, examples, strict=True)]


def together(chosen: Sequence[Item], token_types: bool) -> Batch:
    """Items as one batch: first rows first, then second rows where there are two."""
    rows = [item.rows[side] for side in range(len(chosen[0].rows)) for item in chosen]
    labels = {name: _stacked([item.labels[name] for item in chosen]) for name in chosen[0].labels}
    return batch_of(rows, token_types, labels)


def _stacked(values: Sequence[float | list[int]]) -> Tensor:
    """Labels as a tensor [rows]; texts' tokens as [rows, longest], filled up with `IGNORED`."""
    texts = [value for value in values if isinstance(value, list)]
    if not texts:
        return torch.tensor(values)
    longest = max(map(len, texts))
    return torch.tensor([text + [IGNORED] * (longest - len(text)) for text in texts])


def check_backbone(split: Split, backbone: Backbone) -> None:
    """Raise `InputError` unless the backbone has the head that the task needs, with its labels in its order."""
    check_head(split.task, backbone.task, backbone.id)
    check_labels(split.task, backbone.labels, backbone.id)


class TaskJudge:
    """A split as the development set of training."""

    def __init__(self, split: Split, backbone: Backbone) -> None:
        check_backbone(split, backbone)
        self._split, self._backbone = split, backbone
        self.metric = split.criterion
        self.origin = split.origin

    def scores(self, encode: Encode) -> Scores:
        """All metrics of whatever answers the split's texts."""
        backbone = self._backbone
        write = writing(backbone, encode) if backbone.decoder is not None else None
        return score(self._split, encode, backbone.tokenizer.backend_tokenizer, backbone.max_length, write)

    def __call__(self, encode: Encode) -> float:
        """The metric that counts."""
        return self.scores(encode)[self._split.task.metrics[0]]


def adaptation(backbone: Backbone, task: str, data: Path | None) -> Labelled:
    """What plugins are adapted on: a task's training split, by its name."""
    if data is not None and data.is_file():
        raise InputError(f"{data} is one file", valid="a directory with a train and a dev split of the task")
    return Labelled(read_split(task_named(task), "train", data), backbone)


def development(backbone: Backbone, task: str | None, data: Path | None) -> TaskJudge | None:
    """What chooses the best of them: the task's development split; without a task, STS-B if its file is given."""
    if task is None and data is None:
        return None
    return TaskJudge(read_split(task_named(task or "stsb"), "dev", data), backbone)
