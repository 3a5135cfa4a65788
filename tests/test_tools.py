"""The scripts beside the package."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def test_rows_with_a_held_out_sentence_are_left_out(tmp_path: Path) -> None:
    held_out = write(
        tmp_path / "stsb" / "dev.jsonl.gz", [{"sentence1": "A man, dancing.", "sentence2": "Two dogs run."}]
    )
    corpus = write(
        tmp_path / "mrpc" / "train.jsonl.gz",
        [
            {"sentence1": "a man dancing", "sentence2": "x"},
            {"text": "A man dancing alone"},
            {"premise": "TWO DOGS RUN"},
        ],
    )
    script = [
        sys.executable,
        str(ROOT / "tools" / "corpus_without.py"),
        str(held_out),
        str(tmp_path / "out"),
        str(corpus),
    ]
    assert "2 of 3 rows left out" in subprocess.run(script, capture_output=True, text=True, check=True).stdout
    with gzip.open(tmp_path / "out" / "mrpc-train.jsonl.gz", "rt") as file:
        assert [json.loads(line) for line in file] == [{"text": "A man dancing alone"}]
