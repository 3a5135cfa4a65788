"""SQuAD 1.1: long contexts as overlapping windows, answers out of logits, and the official scores.

Windows and the choice of the answer follow Devlin et al. (2019); exact match and F1 the official evaluation script
(articles, punctuation and case do not count).
"""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from variator.tasks.read import Example
from variator.toolkit.rows import Outputs, Row

LONGEST_WINDOW, STRIDE = 384, 128
"""Tokens of a window, and by how many two windows overlap."""

LONGEST_QUESTION = 64
LONGEST_ANSWER = 30
BEST = 20
"""Starts and ends looked at per window."""


@dataclass(frozen=True)
class Window:
    """A question with a part of its context.

    Args:
        question: Index of its example.
        row: The tokens.
        spans: Characters of the context each token covers; None for tokens of the question and special ones.
    """

    question: int
    row: Row
    spans: Sequence[tuple[int, int] | None]

    def answer(self, start: int, end: int) -> tuple[int, int]:
        """First and last token of the characters start to end, or (0, 0) if they are not all in this window."""
        inside = [i for i, span in enumerate(self.spans) if span and span[0] < end and span[1] > start]
        if not inside:
            return 0, 0
        first, last = self.spans[inside[0]], self.spans[inside[-1]]
        whole = first is not None and last is not None and first[0] <= start and last[1] >= end
        return (inside[0], inside[-1]) if whole else (0, 0)


def question_of(example: Example) -> str:
    """What a model that writes is asked (Raffel et al., JMLR 2020)."""
    question, context = example.texts
    return f"question: {question.strip()} context: {context.strip()}"


def windows(tokenizer: Tokenizer, examples: Sequence[Example], limit: int) -> list[Window]:
    """Cut every example into windows of at most `limit` (and `LONGEST_WINDOW`) tokens."""
    length = min(limit, LONGEST_WINDOW)
    cutting = Tokenizer.from_str(tokenizer.to_str())
    cutting.no_padding()
    stride = min(STRIDE, length // 4)
    cutting.enable_truncation(length, stride=stride, strategy="only_second")
    asking = Tokenizer.from_str(tokenizer.to_str())
    asking.no_padding()  # some tokenizer files pad to a fixed length
    asking.enable_truncation(min(LONGEST_QUESTION, length // 2))
    found = []
    for index, example in enumerate(examples):
        question, context = example.texts
        ends = [end for _, end in asking.encode(question, add_special_tokens=False).offsets]
        encoding = cutting.encode(question[: ends[-1] if ends else 0], context)
        for part in (encoding, *encoding.overflowing):
            spans = [
                offsets if sequence == 1 else None
                for offsets, sequence in zip(part.offsets, part.sequence_ids, strict=True)
            ]
            found.append(Window(index, Row(part.ids, part.type_ids), spans))
    return found


def answers(found: Sequence[Window], outputs: Outputs, examples: Sequence[Example]) -> list[str]:
    """The best-scored span of every example over all its windows; an empty text where there is none."""
    best: dict[int, tuple[float, tuple[int, int]]] = {}
    for window, starts, ends in zip(found, outputs["start_logits"], outputs["end_logits"], strict=True):
        inside = np.array([span is not None for span in window.spans])
        start, end = (np.where(inside, logits[: len(inside)], -np.inf) for logits in (starts, ends))
        firsts, lasts = (np.argsort(logits)[::-1][:BEST] for logits in (start, end))
        total = start[firsts][:, None] + end[lasts][None, :]
        length = lasts[None, :] - firsts[:, None]
        total = np.where((length >= 0) & (length < LONGEST_ANSWER), total, -np.inf)
        row, column = np.unravel_index(int(total.argmax()), total.shape)
        score = float(total[row, column])
        if np.isfinite(score) and score > best.get(window.question, (-np.inf, (0, 0)))[0]:
            first, last = window.spans[firsts[row]], window.spans[lasts[column]]
            if first is not None and last is not None:
                best[window.question] = score, (first[0], last[1])
    places = (best.get(index, (0.0, (0, 0)))[1] for index in range(len(examples)))
    return [example.texts[1][start:end] for example, (start, end) in zip(examples, places, strict=True)]


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous white space, as the official script has it."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer: str, gold: str) -> float:
    """1.0 if both are the same after `normalise`."""
    return float(normalise(answer) == normalise(gold))


def f1(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall over words."""
    ours, theirs = normalise(answer).split(), normalise(gold).split()
    common = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    if not common:
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall)
