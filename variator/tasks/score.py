"""The official scores of whatever answers a task's inputs: PyTorch, an engine or a runtime, all the same way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from variator.errors import InputError
from variator.tasks import squad
from variator.tasks.catalogue import Task
from variator.tasks.read import Example, Split
from variator.toolkit.rows import Encode, Write

Scores = dict[str, float]
"""By metric, all in [0, 1] (correlations in [-1, 1])."""


def score(split: Split, encode: Encode, tokenizer: Tokenizer, limit: int, write: Write | None = None) -> Scores:
    """Score a split.

    Args:
        encode: Answers texts with the outputs of the task's head.
        tokenizer, limit: Of the model, for SQuAD's windows.
        write: Of a model that writes, which answers questions in words.

    Returns:
        The task's metrics, the one that counts first.
    """
    examples = split.examples
    if split.task.head == "embed":
        return correlations(similarities(encode, examples), [example.label for example in examples])
    if split.task.head == "qa" and write is not None:
        return _answered(write([squad.question_of(example) for example in examples]), examples)
    if split.task.head == "qa":
        cut = squad.windows(tokenizer, examples, limit)
        given = squad.answers(cut, encode([window.row for window in cut]), examples)
        return _answered(given, examples)
    logits = encode([example.input for example in examples])["logits"]
    if logits.shape[-1] != split.task.classes:
        raise InputError(
            f"the model tells {logits.shape[-1]} classes apart, {split.task.name} has {split.task.classes}"
        )
    return _classified(split, logits.argmax(axis=-1))


def check_head(task: Task, head: str, model: str) -> None:
    """Raise `InputError` unless a model's head is the one that a task needs, or writes answers."""
    if head == task.head or (task.head, head) == ("qa", "seq2seq"):
        return
    tuned = f"fine-tune one first: variator finetune MODEL --task {task.name} -o DIR"
    raise InputError(
        f"{model} is a model for task {head!r}, {task.name} needs {task.head!r}",
        fix="take a sentence-transformers checkpoint, or --kind embed" if task.head == "embed" else tuned,
    )


def check_labels(task: Task, labels: Sequence[str], model: str) -> None:
    """Raise `InputError` if a classifier's classes are not the task's, or are so in another order.

    Args:
        labels: Of its classes, in order; names that are none of the task's say nothing.
    """
    if labels and task.classes and len(labels) != task.classes:
        raise InputError(f"{model} has {len(labels)} classes, {task.name} has {task.classes}")
    found = [label.lower().replace("-", "_") for label in labels]
    if sorted(found) == sorted(task.labels) and found != list(task.labels):
        raise InputError(
            f"{model} has its labels in the order {', '.join(found)}", valid=f"{task.name}: {', '.join(task.labels)}"
        )


def similarities(encode: Encode, examples: Sequence[Example]) -> npt.NDArray[np.float32]:
    """Cosine of the two embeddings of every pair: [examples]."""
    first, second = (encode([example.texts[side] for example in examples])["embedding"] for side in (0, 1))
    return cosines(first, second)


def cosines(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Cosine of each row of `a` with the same row of `b`: [rows, d] each -> [rows]."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    result: npt.NDArray[np.float32] = (a * b).sum(axis=1) / np.maximum(norms, 1e-12)
    return result


def correlations(values: npt.NDArray[np.float32], gold: Sequence[float]) -> Scores:
    """Spearman's and Pearson's correlation."""
    from scipy.stats import pearsonr, spearmanr

    return {
        "spearman": float(spearmanr(values, gold).statistic),
        "pearson": float(pearsonr(values, gold).statistic),
    }


def _classified(split: Split, found: npt.NDArray[np.int64]) -> Scores:
    from sklearn.metrics import accuracy_score, f1_score

    gold = [int(example.label) for example in split.examples]
    measured = {"accuracy": float(accuracy_score(gold, found))}
    if "f1" in split.task.metrics:
        measured["f1"] = float(f1_score(gold, found))
    return measured


def _answered(given: Sequence[str], examples: Sequence[Example]) -> Scores:
    return {"f1": _best(squad.f1, given, examples), "exact_match": _best(squad.exact_match, given, examples)}


def _best(metric: Callable[[str, str], float], given: Sequence[str], examples: Sequence[Example]) -> float:
    pairs = zip(given, examples, strict=True)
    return float(np.mean([max(metric(answer, gold) for gold, _ in example.answers) for answer, example in pairs]))
