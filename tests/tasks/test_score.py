"""Scores: the official metrics, SQuAD's windows, and the one contract that everything is scored through."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from tokenizers import Tokenizer

from variator.tasks import squad
from variator.tasks.catalogue import TASKS
from variator.tasks.read import Example, Split
from variator.tasks.score import cosines, score
from variator.toolkit.checkpoint import Backbone
from variator.toolkit.rows import Input, Outputs, Row


@pytest.fixture
def tokenizer(backbone: Backbone) -> Tokenizer:
    return backbone.tokenizer.backend_tokenizer


def split(task: str, examples: list[Example]) -> Split:
    return Split(TASKS[task], "dev", examples, ())


def test_accuracy_and_f1(tokenizer: Tokenizer) -> None:
    gold, found = [1, 1, 1, 0, 0], [1, 1, 0, 1, 0]

    def encode(inputs: Sequence[Input]) -> Outputs:
        assert list(inputs) == [(f"a{i}", f"b{i}") for i in range(5)]
        return {"logits": np.eye(2, dtype=np.float32)[found]}

    examples = [Example((f"a{i}", f"b{i}"), label) for i, label in enumerate(gold)]
    scores = score(split("mrpc", examples), encode, tokenizer, 64)
    assert list(scores) == ["accuracy", "f1"]
    assert scores == pytest.approx({"accuracy": 0.6, "f1": 2 / 3})
    assert list(score(split("qnli", examples), encode, tokenizer, 64)) == ["accuracy"]


def test_similarity_is_scored_by_rank_and_by_value(tokenizer: Tokenizer) -> None:
    angles = {"a": 0.0, "b": 0.1, "c": 0.5, "d": 1.5}

    def encode(inputs: Sequence[Input]) -> Outputs:
        return {"embedding": np.array([[np.cos(angles[str(i)]), np.sin(angles[str(i)])] for i in inputs], np.float32)}

    examples = [Example(("a", other), gold) for other, gold in (("b", 5.0), ("c", 3.0), ("d", 1.0), ("a", 4.9))]
    scores = score(split("stsb", examples), encode, tokenizer, 64)
    assert scores["spearman"] == pytest.approx(0.8) and 0.9 < scores["pearson"] < 1


def test_cosines_of_rows() -> None:
    a, b = np.array([[1.0, 0.0], [1.0, 1.0]], np.float32), np.array([[0.0, 2.0], [3.0, 3.0]], np.float32)
    np.testing.assert_allclose(cosines(a, b), [0.0, 1.0], atol=1e-6)


@pytest.mark.parametrize(
    ("answer", "gold", "exact", "f1"),
    [
        ("the Eiffel Tower!", "Eiffel tower", 1, 1),
        ("Paris", "in Paris, France", 0, 0.5),
        ("Paris", "London", 0, 0),
        ("a an the", "", 1, 0),
        ("", "Paris", 0, 0),
        ("New  York\nNew York", "New York", 0, 2 / 3),
    ],
)
def test_answers_are_compared_like_the_official_script(answer: str, gold: str, exact: float, f1: float) -> None:
    assert squad.exact_match(answer, gold) == exact
    assert squad.f1(answer, gold) == pytest.approx(f1)


CONTEXT = " ".join(f"w{i}" for i in range(60))


def question(text: str, start: int | None = None) -> Example:
    start = CONTEXT.index(text) if start is None else start
    return Example(("w1 w2 w3", CONTEXT), 0, ((text, start),))


@pytest.mark.parametrize("limit", [24, 40, 150])
def test_windows_cover_the_context_and_fit_the_limit(tokenizer: Tokenizer, limit: int) -> None:
    found = squad.windows(tokenizer, [question("w30 w31"), question("w59")], limit)
    for index in (0, 1):
        mine = [window for window in found if window.question == index]
        assert (len(mine) == 1) == (limit == 150)
        assert all(len(window.row.ids) == len(window.row.types) == len(window.spans) <= limit for window in mine)
        covered = {span for window in mine for span in window.spans if span}
        assert {(m, m + len(word)) for word, m in _places()} == covered


def _places() -> list[tuple[str, int]]:
    at, places = 0, []
    for word in CONTEXT.split():
        places.append((word, at))
        at += len(word) + 1
    return places


def test_an_answers_tokens_are_found_in_the_window_that_has_them_all(tokenizer: Tokenizer) -> None:
    start = CONTEXT.index("w30 w31 w32")
    end = start + len("w30 w31 w32")
    places = []
    for window in squad.windows(tokenizer, [question("w30 w31 w32")], 24):
        first, last = window.answer(start, end)
        spans = [window.spans[i] for i in (first, last)]
        if (first, last) != (0, 0):
            assert spans[0] is not None and spans[1] is not None
            assert (spans[0][0], spans[1][1]) == (start, end) and last - first == 2
        places.append((first, last) != (0, 0))
    assert any(places) and not all(places)


def test_a_long_question_leaves_room_for_the_context(tokenizer: Tokenizer) -> None:
    long = Example((CONTEXT * 3, CONTEXT), 0, (("w5", CONTEXT.index("w5")),))
    found = squad.windows(tokenizer, [long], 40)
    assert {span for window in found for span in window.spans if span} == {(m, m + len(w)) for w, m in _places()}


def test_a_tokenizer_that_pads_changes_nothing(tokenizer: Tokenizer) -> None:
    padding = Tokenizer.from_str(tokenizer.to_str())
    padding.enable_padding(length=128)
    found, expected = (squad.windows(one, [question("w30 w31")], 24) for one in (padding, tokenizer))
    assert found == expected
    asked = [tokenizer.token_to_id(word) for word in ("w1", "w2", "w3")]
    assert all(list(window.row.ids[1:4]) == asked for window in found)


def test_squad_takes_the_best_span_over_all_windows(tokenizer: Tokenizer) -> None:
    examples = [question("w45 w46"), question("w7")]
    wanted = {0: ("w45", "w46"), 1: ("w7", "w7")}

    def encode(inputs: Sequence[Input]) -> Outputs:
        rows = [row for row in inputs if isinstance(row, Row)]
        assert len(rows) == len(inputs)
        shape = (len(rows), max(len(row.ids) for row in rows))
        starts, ends = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        starts[:, 0] = ends[:, 0] = 50.0  # [CLS]: not in the context, so never an answer
        asked = [window.question for window in squad.windows(tokenizer, examples, 24)]
        for index, (row, number) in enumerate(zip(rows, asked, strict=True)):
            first, last = (tokenizer.token_to_id(word) for word in wanted[number])
            for at, token in enumerate(row.ids):
                if at > 4 and token == first:
                    starts[index, at] = 9.0
                if at > 4 and token == last:
                    ends[index, at] = 9.0
        return {"start_logits": starts, "end_logits": ends}

    assert score(split("squad", examples), encode, tokenizer, 24) == {"f1": 1.0, "exact_match": 1.0}


def test_an_end_before_its_start_or_far_behind_is_no_answer(tokenizer: Tokenizer) -> None:
    (window,) = squad.windows(tokenizer, [question("w1")], 150)
    length = len(window.spans)
    starts, ends = np.zeros((1, length), np.float32), np.zeros((1, length), np.float32)
    starts[0, 20], ends[0, 10], ends[0, 60], ends[0, 22] = 9.0, 9.0, 8.0, 3.0
    (text,) = squad.answers([window], {"start_logits": starts, "end_logits": ends}, [question("w1")])
    span = (window.spans[20], window.spans[22])
    assert span[0] is not None and span[1] is not None and text == CONTEXT[span[0][0] : span[1][1]]


def test_a_window_without_context_gives_no_answer() -> None:
    window = squad.Window(0, Row([2, 3], [0, 0]), [None, None])
    zeros = np.zeros((1, 2), np.float32)
    assert squad.answers([window], {"start_logits": zeros, "end_logits": zeros}, [question("w1")]) == [""]
