"""Corpora: the kinds that are read, and the lines that are not."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from variator.errors import CorpusError
from variator.toolkit.checkpoint import Backbone
from variator.training.corpus import LONGEST_SPAN, read_corpus


def test_txt_jsonl_and_gz_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n two \n", encoding="utf-8-sig")
    rows = [{"sentence1": "three", "sentence2": "four", "label": 1, "src": "no text"}, {"text": "five"}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with gzip.open(tmp_path / "c.txt.gz", "wt") as file:
        file.write("six\n")
    corpus = read_corpus([tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.txt.gz"])
    assert [sorted(source.pieces) for source in corpus.sources] == [["one", "two"], ["five", "four", "three"], ["six"]]


def test_long_texts_are_cut_and_nothing_is_lost(tmp_path: Path) -> None:
    words = [f"word{i}" for i in range(5000)]
    (tmp_path / "a.txt").write_text(" ".join(words) + "\n" + "x" * 1_000_000)
    pieces = read_corpus([tmp_path / "a.txt"]).sources[0].pieces
    assert sorted(" ".join(pieces).replace("x", "").split()) == sorted(words)
    assert max(map(len, pieces)) <= LONGEST_SPAN * 4.5


def test_a_batch_depends_on_seed_and_step_alone(backbone: Backbone, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(f"w{i} " * (1 + i % 40) for i in range(200)))
    (tmp_path / "b.txt").write_text("\n".join(f"a b c w{i}" for i in range(50)))
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    first, second = read_corpus(paths, 1), read_corpus(paths, 1)
    later = first.batch(backbone, "1", 7, 256)
    second.batch(backbone, "1", 3, 256)
    again = second.batch(backbone, "1", 7, 256)
    assert torch.equal(later.ids, again.ids) and torch.equal(later.mask, again.mask)
    assert not torch.equal(later.ids, first.batch(backbone, "2", 7, 256).ids)
    for index in range(20):
        batch = first.batch(backbone, "1", index, 256)
        assert batch.ids.numel() <= 256 and batch.mask.sum(dim=1).min() >= 1 and batch.ids.shape[1] <= LONGEST_SPAN


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"x", "not a known kind"),
        ("a.txt", b"", "no text"),
        ("a.txt", b"\n \n", "no text"),
        ("a.txt", b"good\nna\xefve\n", "line 2: not UTF-8"),
        ("a.txt", bytes(range(256)), "line 1: binary"),
        ("a.txt", b"fine\n\0\0\x01ELF\n", "line 2: binary"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"label": 1}\n', "line 2: no text field"),
        ("a.jsonl", b"[1]\n", "line 1: no text field"),
        ("a.txt.gz", b"not gzip", "cannot read"),
        # mtime=0: the bytes are in the name of the test, which every process of a run must find the same.
        ("a.txt.gz", gzip.compress(b"some text\n" * 1000, mtime=0)[:-20], "cannot read"),
    ],
)
def test_a_corpus_that_cannot_be_read_says_where(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        read_corpus([tmp_path / name])


def test_no_file_and_a_missing_file_are_errors(tmp_path: Path) -> None:
    with pytest.raises(CorpusError):
        read_corpus([])
    with pytest.raises(CorpusError, match="cannot read"):
        read_corpus([tmp_path / "none.txt"])
