"""The tasks: the paper's seven and STS-B, with their fields, labels, metrics and full sizes.

Sources: GLUE (Wang et al., ICLR 2019) and SQuAD 1.1 (Rajpurkar et al., EMNLP 2016). Metrics are the official ones;
the first is the one that plugins are chosen and compared by.
"""

from __future__ import annotations

from dataclasses import dataclass

from variator.errors import InputError
from variator.toolkit.prompt import Prompt


@dataclass(frozen=True)
class Task:
    """One task.

    Args:
        head: The model head it needs, a key of `toolkit.heads.OUTPUTS`.
        fields: Names of a row's texts, in order; `question` and `context` for SQuAD.
        labels: Names of the classes from 0; none where the label is a number from 0 to 5, or an answer.
        metrics: Names of its scores, the one that counts first.
        hub: Dataset and configuration on the hub, and its split for `dev`; that for `train` is `train`.
        prompt: How a model that writes is asked, of classification tasks.
        sizes: Rows (questions) of the full `train` and `dev` splits, to tell a sample.
    """

    name: str
    head: str
    fields: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    hub: tuple[str, str | None, str]
    sizes: dict[str, int]
    prompt: Prompt | None = None

    @property
    def classes(self) -> int:
        """Number of labels."""
        return len(self.labels)


def _glue(
    name: str,
    fields: tuple[str, ...],
    train: int,
    dev: int,
    labels: tuple[str, ...],
    template: str,
    words: tuple[str, ...],
    metrics: tuple[str, ...] = ("accuracy",),
    split: str = "validation",
) -> Task:
    hub, sizes = ("nyu-mll/glue", name, split), {"train": train, "dev": dev}
    return Task(name, "classify", fields, labels, metrics, hub, sizes, Prompt(template, list(words), list(labels)))


ENTAILMENT = ("entailment", "not_entailment")
ENTAILMENT_3 = ("entailment", "neutral", "contradiction")
PAIR = ("sentence1", "sentence2")
QUESTIONS = ("question1", "question2")
NO_YES, YES_NO = ("no", "yes"), ("yes", "no")
FOLLOWS = "Does the second follow from the first? <extra_id_0>. first: {0} second: {1}"
SAME = "Do both mean the same? <extra_id_0>. first: {0} second: {1}"
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _glue(
            "mnli",
            ("premise", "hypothesis"),
            392_702,
            9_815,
            ENTAILMENT_3,
            FOLLOWS,
            ("yes", "perhaps", "no"),
            split="validation_matched",
        ),
        _glue(
            "qnli",
            ("question", "sentence"),
            104_743,
            5_463,
            ENTAILMENT,
            "Is it answered? <extra_id_0>. question: {0} text: {1}",
            YES_NO,
        ),
        _glue("qqp", QUESTIONS, 363_846, 40_430, ("not_duplicate", "duplicate"), SAME, NO_YES, ("accuracy", "f1")),
        _glue("rte", PAIR, 2_490, 277, ENTAILMENT, FOLLOWS, YES_NO),
        _glue(
            "sst2",
            ("sentence",),
            67_349,
            872,
            ("negative", "positive"),
            "It was <extra_id_0>. {0}",
            ("terrible", "great"),
        ),
        _glue("mrpc", PAIR, 3_668, 408, ("not_equivalent", "equivalent"), SAME, NO_YES, ("accuracy", "f1")),
        Task(
            "squad",
            "qa",
            ("question", "context"),
            (),
            ("f1", "exact_match"),
            ("rajpurkar/squad", None, "validation"),
            {"train": 87_599, "dev": 10_570},
        ),
        Task(
            "stsb",
            "embed",
            PAIR,
            (),
            ("spearman", "pearson"),
            ("nyu-mll/glue", "stsb", "validation"),
            {"train": 5_749, "dev": 1_500},
        ),
    )
}
"""By name. STS-B is scored by the cosine of two embeddings, as its users use such models, not by a regression head."""


def task_named(name: str) -> Task:
    """The task of a name, in any case and with or without hyphens (`SST-2`), else `InputError`."""
    key = {"mnlim": "mnli", "squad1.1": "squad"}.get(name.lower().replace("-", ""), name.lower().replace("-", ""))
    if key not in TASKS:
        raise InputError(f"unknown task {name!r}", valid=", ".join(TASKS))
    return TASKS[key]
