"""Reading tasks: local files of GLUE's and SQuAD's form, the hub, and rows that are not right."""

from __future__ import annotations

import gzip
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from variator.errors import CorpusError, InputError
from variator.tasks.catalogue import TASKS, task_named
from variator.tasks.read import Example, read_split

SHARED = Path(__file__).parents[3] / "shared" / "data"


def row(task: str, **changes: Any) -> dict[str, Any]:
    fields = {field: f"some {field}" for field in TASKS[task].fields}
    return {**fields, "label": 1, "idx": 7, **changes}


def write(path: Path, rows: list[Any]) -> Path:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def squad(answers: list[dict[str, Any]], context: str = "The tower is in Paris.") -> dict[str, Any]:
    qas = [{"id": "a", "question": "Where is the tower?", "answers": answers}]
    return {"data": [{"title": "t", "paragraphs": [{"context": context, "qas": qas}]}]}


@pytest.mark.parametrize("task", [name for name in TASKS if name != "squad"])
@pytest.mark.parametrize("name", ["train.jsonl", "train-part.jsonl.gz", "train_matched.jsonl"])
def test_local_files_in_their_folder_are_read(tmp_path: Path, task: str, name: str) -> None:
    write(tmp_path / task / name, [row(task, label=0), "", row(task)])
    write(tmp_path / task / "tokenised_train.jsonl", [row(task)] * 9)
    split = read_split(TASKS[task], "train", tmp_path)
    texts = tuple(f"some {field}" for field in TASKS[task].fields)
    assert list(split.examples) == [Example(texts, 0), Example(texts, 1)]
    assert split.label == f"{task} train (sample: 2 of {TASKS[task].sizes['train']:,})"
    assert split.origin[0].startswith(name)


def test_several_files_and_a_single_file(tmp_path: Path) -> None:
    write(tmp_path / "sst2" / "dev-a.jsonl", [row("sst2")])
    path = write(tmp_path / "sst2" / "dev-b.jsonl", [row("sst2", sentence="b")])
    assert [e.texts for e in read_split(TASKS["sst2"], "dev", tmp_path).examples] == [("some sentence",), ("b",)]
    assert [e.texts for e in read_split(TASKS["sst2"], "dev", path).examples] == [("b",)]
    assert [e.texts for e in read_split(TASKS["sst2"], "dev", tmp_path / "sst2").examples][1] == ("b",)


def test_a_single_file_gives_the_split_its_own_name(tmp_path: Path) -> None:
    for name, label in (("test", "sst2 test (2 rows)"), ("dev", "sst2 dev (sample: 2 of 872)")):
        path = write(tmp_path / f"{name}.jsonl.gz", [row("sst2"), row("sst2")])
        assert read_split(TASKS["sst2"], "dev", path).label == label
    many = write(tmp_path / "more" / "dev.jsonl", [row("rte")] * 300)
    assert read_split(TASKS["rte"], "dev", many).label == "rte dev (300 rows, the official split has 277)"


def test_only_the_splits_own_files_are_taken(tmp_path: Path) -> None:
    write(tmp_path / "mnli" / "dev_matched.jsonl", [row("mnli")])
    write(tmp_path / "mnli" / "dev_mismatched.jsonl", [row("mnli")] * 5)
    write(tmp_path / "mnli" / "development.jsonl", [row("mnli")] * 5)
    assert len(read_split(TASKS["mnli"], "dev", tmp_path).examples) == 1
    write(tmp_path / "mnli" / "dev_matched.jsonl.gz", [row("mnli")])
    with pytest.raises(CorpusError, match="plain and as"):
        read_split(TASKS["mnli"], "dev", tmp_path)
    with pytest.raises(CorpusError, match="no directory"):
        read_split(TASKS["mnli"], "dev", tmp_path / "nowhere")


def test_squad_is_flattened_with_all_answers(tmp_path: Path) -> None:
    answers = [{"text": "Paris", "answer_start": 16}, {"text": "in Paris", "answer_start": 13}]
    write(tmp_path / "squad" / "dev-v1.1.json.gz", [squad(answers)])
    (example,) = read_split(TASKS["squad"], "dev", tmp_path).examples
    assert example.texts == ("Where is the tower?", "The tower is in Paris.")
    assert example.answers == (("Paris", 16), ("in Paris", 13))


@pytest.mark.parametrize(
    ("task", "bad", "message"),
    [
        ("sst2", {"label": 1}, "row 2: no text 'sentence'"),
        ("mnli", row("mnli", premise=None), "row 2: no text 'premise'"),
        ("mnli", row("mnli", label=3), "row 2: label 3(.|\n)*0 to 2"),
        ("mnli", row("mnli", label=-1), "row 2: label -1"),
        ("sst2", row("sst2", label=0.5), "row 2: label 0.5"),
        ("sst2", row("sst2", label=True), "row 2: label True"),
        ("sst2", row("sst2", label="1"), "row 2: label '1'"),
        ("stsb", row("stsb", label=5.1), "row 2: label 5.1"),
        ("stsb", row("stsb", label=float("nan")), "row 2: label nan"),
        ("rte", "{", "row 2: not JSON"),
        ("rte", [1], "row 2: no text"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, task: str, bad: Any, message: str) -> None:
    write(tmp_path / task / "dev.jsonl", [row(task), bad])
    with pytest.raises(CorpusError, match=message):
        read_split(TASKS[task], "dev", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (squad([{"text": "London", "answer_start": 16}]), "question 1: the answer 'London' is not at its place"),
        (squad([{"text": "Paris", "answer_start": -6}]), "question 1: the answer 'Paris' is not at its place"),
        (squad([]), "question 1: no answer"),
        (squad([{"text": "Paris"}]), "question 1: answers KeyError"),
        ({"version": 1}, "behind question 0"),
        ({"data": [{"paragraphs": [{"qas": [{"question": "x"}]}]}]}, "behind question"),
    ],
)
def test_a_bad_question_is_named(tmp_path: Path, content: Any, message: str) -> None:
    write(tmp_path / "squad" / "dev.json", [content])
    with pytest.raises(CorpusError, match=message):
        read_split(TASKS["squad"], "dev", tmp_path)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"no dev split of sst2(.|\n)*dev\*\.jsonl"):
        read_split(TASKS["sst2"], "dev", tmp_path)
    write(tmp_path / "sst2" / "dev.jsonl", [""])
    with pytest.raises(CorpusError, match="no rows"):
        read_split(TASKS["sst2"], "dev", tmp_path)
    (tmp_path / "sst2" / "dev.jsonl").unlink()
    (tmp_path / "sst2" / "dev.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(CorpusError, match="cannot read"):
        read_split(TASKS["sst2"], "dev", tmp_path)


def test_the_hub_is_asked_for_glues_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*arguments: object, split: str) -> list[dict[str, Any]]:
        asked.append((*arguments, split))
        if arguments[0] == "rajpurkar/squad":
            answers = {"text": ["Paris"], "answer_start": [16]}
            return [{"question": "Where?", "context": "The tower is in Paris.", "answers": answers}]
        return [row("mnli", label=2)]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert read_split(TASKS["mnli"], "dev").examples[0].label == 2
    assert read_split(TASKS["squad"], "train").examples[0].answers == (("Paris", 16),)
    assert asked == [("nyu-mll/glue", "mnli", "validation_matched"), ("rajpurkar/squad", None, "train")]


def test_without_a_network_the_error_says_what_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*arguments: object, split: str) -> None:
        raise ConnectionError("no route\nto anywhere")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(CorpusError, match=r"no route(.|\n)*--data DIR with DIR/sst2/dev.jsonl"):
        read_split(TASKS["sst2"], "dev")


def test_names_are_forgiving() -> None:
    assert [task_named(name).name for name in ("SST-2", "MNLI-m", "stsb", "SQuAD1.1")] == [
        "sst2",
        "mnli",
        "stsb",
        "squad",
    ]
    with pytest.raises(InputError, match=r"'cola'(.|\n)*mnli, qnli"):
        task_named("cola")


@pytest.mark.skipif(not SHARED.exists(), reason="the real data is not at hand")
def test_the_real_files_have_the_published_sizes() -> None:
    whole = {"mnli", "qnli", "rte", "sst2", "mrpc", "squad", "stsb"}
    assert {name for name in TASKS if read_split(TASKS[name], "dev", SHARED).label == f"{name} dev"} == whole
    assert len(read_split(TASKS["sst2"], "train", SHARED).examples) == 67_349
    assert "7,600 of 40,430" in read_split(TASKS["qqp"], "dev", SHARED).label
