"""The scripts beside the package."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tools import front, policies, serving_limits
from variator.bench.record import Record
from variator.engines.backends import BACKENDS
from variator.engines.build import build
from variator.engines.gpu import no_gpu
from variator.engines.runtime import Runtime
from variator.toolkit.bundle import Bundle
from variator.toolkit.plugin_format import Key
from variator.toolkit.rows import Outputs, Row

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


def test_the_front_has_a_row_per_setting(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = [(2, 4, "gelu"), (4, 4, "gelu"), (4, 8, "gelu"), (4, 8, "tanh")]
    monkeypatch.setattr(front, "GRID", grid)
    (tmp_path / "corpus.txt").write_text("\n".join(f"w{i} a b w{i % 7} c" for i in range(200)))
    record = front.measure(str(checkpoint), "toy", [tmp_path / "corpus.txt"], tmp_path / "fits", 3)
    rows = record["rows"]
    assert [(row["ratio"], row["rank"], row["activation"]) for row in rows] == grid
    left = [row["ffn_flops_left"] for row in rows]
    assert 1 > left[0] > left[2] > left[1] > 0 and left[2] == left[3]
    assert rows[2]["parameters_added"] > rows[1]["parameters_added"] and all(row["error"] > 0 for row in rows)
    assert front.table(record).count("\n") == 2 + len(grid) and "front" in front.table(record)
    assert "rank 8, tanh" in front.picture(record)
    better = {"ffn_flops_left": 0.1, "error": 0.0}
    assert front.on_front(better, [*rows, better]) and not any(front.on_front(row, [*rows, better]) for row in rows)


def test_the_front_in_the_docs_is_that_of_the_record() -> None:
    record = json.loads((ROOT / "results" / "front.json").read_text(encoding="utf-8"))
    assert front.table(record) in (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert record["model"] in (ROOT / "docs" / "front.svg").read_text(encoding="utf-8")


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


@pytest.mark.slow
def test_the_gpu_bench_is_rehearsed_step_by_step_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "tools.gpu_bench", str(out), "--work", str(tmp_path / "work")]
    if no_gpu():
        refused = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert refused.returncode == 1 and "--rehearse" in refused.stderr and not out.exists()
    command.append("--rehearse")
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert record["rehearsal"] and record["schema"] == "variator.gpu-bench/1"
    assert set(record["engines"]) == set(BACKENDS) and record["engines"]["onnxruntime"] == "here"
    built = {name for name in record["steps"] if "build" in name}
    assert {"tiny: build onnxruntime fp32", "tiny-shared: build onnxruntime fp32"} <= built
    measured = Record.from_json(json.dumps(record["steps"]["tiny: bench"]["done"]))
    assert {(row.batch, row.sequence) for row in measured.results} == {(1, 8), (2, 16)} and measured.layouts
    assert not measured.model.real and any(row.engine.startswith("peer:") for row in measured.results)
    del record["steps"]["tests"]  # as if it had been stopped there
    out.write_text(json.dumps(record))
    again = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert "tests: done" in again.stderr and "bench" not in again.stderr


@pytest.mark.parametrize("scenario", ["single-stream", "server"])
def test_loadgen_judges_a_server(calibrated: Path, tmp_path: Path, scenario: str) -> None:
    pytest.importorskip("mlperf_loadgen")
    out = tmp_path / "out.json"
    options = ["--scenario", scenario, "--seconds", "1", "--qps", "100", "--slo-ms", "2000", "--policy", "fixed(4)"]
    command = [sys.executable, "-m", "tools.loadgen", str(calibrated), str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert (
        record["loadgen"]["Result is"] in ("VALID", "INVALID") and "99.00 percentile latency (ns)" in record["loadgen"]
    )
    assert set(record["ratios"]) == {"4"} and record["ratios"]["4"] >= 100


def test_a_soak_compares_every_answer_and_limits_are_measured(
    calibrated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Runtime.open(calibrated, "onnxruntime", "fp32") as runtime:
        rows = runtime.tokenise(["w1 w2", "w3 w4 w5", "w6"])
        found = serving_limits.soak(runtime, rows, 2000.0, 1.5, 100.0, lambda step: None)
        assert found["sent"] == found["answered"] > 50 and found["lost"] == found["wrong"] == found["failed"] == 0
        real = runtime.run_together

        def swapped(ratio: Key, rows: Sequence[Row], on_start: Callable[[], None]) -> tuple[Outputs, float]:
            outputs, took = real(ratio, rows, on_start)
            return {name: values * 1.01 for name, values in outputs.items()}, took

        monkeypatch.setattr(runtime, "run_together", swapped)
        assert serving_limits.soak(runtime, rows, 2000.0, 0.5, 100.0, lambda step: None)["wrong"] > 10
        monkeypatch.undo()
        assert 0.01 < serving_limits.throughput(runtime, rounds=2, batches=2)["relative"] < 2


def test_policies_are_compared_at_equal_pace_and_over_replicas(
    calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policies, "WORKLOADS", (("poisson", 1.2), ("step", 0.5)))
    monkeypatch.setattr(policies, "PACES", (0.9, 1.1))
    monkeypatch.setattr(policies, "SEEDS", (0,))
    monkeypatch.setattr(policies, "SECONDS", 1.0)
    monkeypatch.setattr(policies, "FLEETS", ((1, 0.5), (4, 0.5)))
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["policies", str(calibrated), str(out), "--slo-ms", "50"])
    policies.main()
    record = json.loads(out.read_text())
    assert len(record["beside"]) == 2 * 2 * len(policies.POLICIES)
    assert {(row["replicas"], row["failing"]) for row in record["fleets"]} == {(1, 0), (4, 0), (4, 1)}
    failing = [row for row in record["fleets"] if row["failing"]]
    assert all(row["failed"] > 0 for row in failing) and all(0 < row["attainment"] <= 1 for row in record["fleets"])
    assert policies.table(record).count("\n") == 2 + 4 + 1 + 2 + 6
    rows = [
        {"workload": "w", "pace": 1, "policy": name, "attainment": share, "quality": quality}
        for name, share, quality in (("drain", 0.99, 0.98), ("a", 0.995, 0.98), ("b", 0.99, 0.99), ("c", 1.0, 0.97))
    ]
    assert policies.better(rows) == ["a on w at pace 1", "b on w at pace 1"]
