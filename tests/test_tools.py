"""The scripts beside the package."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

from variator.engines.build import build
from variator.toolkit.bundle import Bundle

ROOT = Path(__file__).parents[1]


def test_the_ways_to_serve_a_shared_bundle_all_give_the_right_answers(
    bundle: Bundle, shared_bundle: Bundle, tmp_path: Path
) -> None:
    own = shutil.copytree(bundle.path, tmp_path / "own")
    build(own, "onnxruntime", "fp32")
    script = [sys.executable, str(ROOT / "tools" / "shared_choices.py"), str(own), str(shared_bundle.path)]
    subprocess.run([*script, "4", "2x13", str(tmp_path / "out.json")], check=True, cwd=ROOT)  # it compares the answers
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    ways = {"per-ratio", "own graph beside", "neutral plugin", "If around sites", "If around graphs"}
    assert {row["way"] for row in rows if row["ratio"] == 1} == ways
    assert {row["way"] for row in rows if row["ratio"] == 4} == ways | {"adapter file"}


def test_the_table_of_choices_in_the_docs_is_that_of_the_record() -> None:
    script = [sys.executable, str(ROOT / "tools" / "shared_choices.py"), "table", "results/shared-choices.json"]
    printed = subprocess.run(script, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert printed.count("\n") == 7 and printed in (ROOT / "docs" / "layouts.md").read_text(encoding="utf-8")


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
