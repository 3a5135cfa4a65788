"""Texts token by token: greedy and beam search over a decoder's steps, those of transformers' `generate`.

numpy only, and no clock or engine in sight: `engines.runtime` gives the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from variator.errors import EngineError, InputError
from variator.toolkit.rows import Special

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

Step = Callable[[Ids, Floats], tuple[Floats, Floats]]
"""Tokens [rows, T] and what is known of those before [rows, P, width] -> scores of the next [rows, vocabulary], and
what is known then. Rows of one input lie beside each other."""

NEVER = np.float32(-1.0e9)
"""Added to a score that must not win."""


@dataclass(frozen=True)
class GenerateSettings:
    """How texts are generated.

    Args:
        max_new_tokens: Limit of each; what reaches it is cut there and is not `finished`.
        beams: 1 takes the best token each time, more keep so many texts in the race.
        length_penalty: Power of a text's length that its score is divided by, with beams: above 0 favours long ones.
    """

    max_new_tokens: int = 64
    beams: int = 1
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "beams"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name} is {value!r}", valid="a whole number, 1 or more")
        if not np.isfinite(self.length_penalty):
            raise InputError(f"a length penalty of {self.length_penalty!r}", valid="a finite number")


def generate(
    step: Step, rows: int, width: int, special: Special, settings: GenerateSettings
) -> tuple[list[list[int]], list[bool]]:
    """Generate a text for each of `rows` inputs.

    Args:
        step: With beams it is given `rows * beams` rows.
        width: Of what is known of a token.

    Returns:
        Token ids, and whether each text has ended by itself.
    """
    count = rows * settings.beams
    ids, past = np.full((count, 1), special.start, np.int64), np.zeros((count, 0, width), np.float32)
    search = _beams if settings.beams > 1 else _greedy
    found = search(step, ids, past, special, settings)
    texts, finished = [], []
    for row in found:
        end = next((place for place, token in enumerate(row) if token in special.ends), None)
        texts.append([int(token) for token in (row if end is None else row[: end + 1])])
        finished.append(end is not None)
    return texts, finished


def _greedy(step: Step, ids: Ids, past: Floats, special: Special, settings: GenerateSettings) -> Ids:
    """The best token each time: [rows, tokens]."""
    ended = np.zeros(len(ids), bool)
    made = []
    for _ in range(settings.max_new_tokens):
        logits, past = _checked(step(ids, past))
        token = np.where(ended, special.pad, logits.argmax(axis=1))
        made.append(token)
        ended |= np.isin(token, special.ends)
        if ended.all():
            break
        ids = token[:, None]
    return np.stack(made, axis=1)


def _beams(step: Step, ids: Ids, past: Floats, special: Special, settings: GenerateSettings) -> Ids:
    """The best of several: [rows, tokens].

    As transformers' `generate` with `early_stopping=False`: it ends when the best text that still grows could not pass
    the worst finished one at its present length.
    """
    beams, limit, penalty = settings.beams, settings.max_new_tokens, settings.length_penalty
    rows = len(ids) // beams
    kept = max(2, 1 + len(special.ends)) * beams
    among_first = np.arange(kept) < beams
    running = np.full((rows, beams, limit), special.pad, np.int64)
    finished, is_finished = running.copy(), np.zeros((rows, beams), bool)
    running_scores = np.zeros((rows, beams), np.float32)
    running_scores[:, 1:] = NEVER  # all beams begin alike: the first continues for all
    scores = np.full((rows, beams), NEVER, np.float32)
    improvable = np.ones((rows, 1), bool)
    for length in range(1, limit + 1):
        logits, past = _checked(step(ids, past))
        vocabulary = logits.shape[1]
        totals = _log_softmax(logits).reshape(rows, beams, vocabulary) + running_scores[:, :, None]
        places, best = _top(totals.reshape(rows, -1), kept)
        parent, token = places // vocabulary, places % vocabulary
        texts = _taken(running, parent)
        texts[:, :, length - 1] = token
        stops = np.isin(token, special.ends) | (length == limit)

        open_scores = best + np.where(stops, NEVER, np.float32(0))
        chosen, running_scores = _top(open_scores, beams)
        running, parent, token = _taken(texts, chosen), _taken(parent, chosen), _taken(token, chosen)

        ending = best / np.float32(length**penalty)
        ending = ending + np.where(improvable, np.float32(0), NEVER)
        ending = ending + np.where(stops & among_first, np.float32(0), NEVER)
        merged, scores = _top(np.concatenate([scores, ending], axis=1), beams)
        finished = _taken(np.concatenate([finished, texts], axis=1), merged)
        is_finished = _taken(np.concatenate([is_finished, stops & among_first], axis=1), merged)

        possible = running_scores[:, :1] / np.float32(length**penalty)
        worst = np.where(is_finished, scores.min(axis=1, keepdims=True), NEVER)
        improvable = improvable & (possible > worst).any(axis=1, keepdims=True)
        if stops.all() or not improvable.any():
            break
        ids = token.reshape(-1, 1)
        past = past[(np.arange(rows)[:, None] * beams + parent).ravel()]
    best_texts: Ids = finished[:, 0]
    return best_texts


def _checked(result: tuple[Floats, Floats]) -> tuple[Floats, Floats]:
    if not np.isfinite(result[0]).all():
        raise EngineError("the decoder's scores are not finite", fix="use another ratio or precision")
    return result


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(axis=1, keepdims=True)
    found: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return found


def _top(scores: Floats, count: int) -> tuple[npt.NDArray[np.intp], Floats]:
    """Places and values of the largest of each row, in order."""
    places = np.argpartition(-scores, min(count, scores.shape[1]) - 1, axis=1)[:, :count]
    order = np.argsort(-np.take_along_axis(scores, places, axis=1), axis=1, kind="stable")
    places = np.take_along_axis(places, order, axis=1)
    return places, np.take_along_axis(scores, places, axis=1)


def _taken(values: npt.NDArray[Any], beams: npt.NDArray[np.intp]) -> npt.NDArray[Any]:
    """Beams of each row: [rows, n, …] by [rows, m] -> [rows, m, …]."""
    return values[np.arange(len(values))[:, None], beams]


def scores_at(step: Step, rows: int, width: int, prefix: Sequence[int]) -> Floats:
    """Scores of what follows a text that is given: [rows, vocabulary]."""
    ids = np.tile(np.array(prefix, np.int64), (rows, 1))
    return _checked(step(ids, np.zeros((rows, 0, width), np.float32)))[0]
