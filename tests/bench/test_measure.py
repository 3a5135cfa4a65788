"""Measuring: statistics that say what they should, and a whole benchmark of the tiny model."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from variator.bench.latency import race, race_twice, summarise
from variator.bench.memory import measure
from variator.bench.quality import Judge, sentences
from variator.bench.record import Record
from variator.bench.run import BenchSettings, bench
from variator.bench.table import grids, layouts_markdown
from variator.engines.base import Outputs
from variator.engines.build import build
from variator.errors import EngineError, InputError
from variator.exporters.export import ExportSettings, export
from variator.exporters.flops import count_flops
from variator.tasks.catalogue import TASKS
from variator.tasks.read import Example, Split
from variator.toolkit.bundle import Bundle
from variator.toolkit.checkpoint import Backbone


@pytest.fixture(scope="module")
def built(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A copy with an ONNX Runtime fp32 engine."""
    path = shutil.copytree(bundle.path, tmp_path_factory.mktemp("bench") / "bundle")
    build(path, "onnxruntime", "fp32")
    return Bundle.open(path)


def test_runners_take_turns() -> None:
    order: list[str] = []
    race({name: (lambda name=name: order.append(name)) for name in "abc"}, runs=5, warmup=1)  # type: ignore[misc]
    assert "".join(order) == "abc" * 6


def test_runners_take_turns_of_two_and_the_first_round_does_not_count() -> None:
    order: list[str] = []
    first, second = race_twice({name: (lambda name=name: order.append(name)) for name in "abc"}, runs=6)  # type: ignore[misc]
    turns = ["".join(order[at : at + 2]) for at in range(0, len(order), 2)]
    assert set(turns) == {"aa", "bb", "cc"} and len(turns) == 3 * 7
    assert all("".join(sorted(turns[at : at + 3])) == "aabbcc" for at in range(0, len(turns), 3))
    assert {timing.runs for timing in (*first.values(), *second.values())} == {6}


def test_the_budget_ends_a_race_but_not_before_five_rounds() -> None:
    assert race({"a": lambda: None}, runs=50, budget_s=0.0)["a"].runs == 5


def test_percentiles_and_verdicts() -> None:
    steady = summarise([10.0] * 20)
    assert (steady.p50_ms, steady.p90_ms, steady.spread, steady.stable) == (10.0, 10.0, 0.0, True)
    assert summarise(list(np.arange(1.0, 101.0))).p90_ms == pytest.approx(90.1)
    drifting = summarise([10.0] * 10 + [12.0] * 10)
    assert drifting.drift > 0.1 and not drifting.stable
    assert not summarise([10.0, 20.0] * 10).stable


def fake(vectors: dict[str, list[float]]) -> object:
    return lambda texts: {"embedding": np.array([vectors[text] for text in texts], np.float32)}


def test_quality_is_cosine_and_spearman(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    texts = [*sentences(), "a", "b", "c", "d"]
    exact = {text: list(rng.normal(size=8)) for text in texts}
    halved = {text: [v / 2 for v in vector] for text, vector in exact.items()}
    examples = [Example(("a", other), gold) for other, gold in (("b", 1.0), ("c", 2.0), ("d", 3.0))]
    pairs = Split(TASKS["stsb"], "dev", examples, ())
    judge = Judge("embed", fake(exact), pairs)  # type: ignore[arg-type]
    cosine, spearman = judge.score(fake(halved), 4, "x", "fp32")  # type: ignore[arg-type]
    assert (cosine.metric, spearman.metric, spearman.split) == ("cosine", "spearman", "stsb dev (sample: 3 of 1,500)")
    assert cosine.value == pytest.approx(1.0) and spearman.value == pytest.approx(spearman.reference)
    noise = {text: list(np.array(vector) + rng.normal(size=8)) for text, vector in exact.items()}
    assert judge.score(fake(noise), 4, "x", "fp32")[0].value < 0.95  # type: ignore[arg-type]


def test_classifiers_are_judged_by_agreement() -> None:
    def classes(flip: int) -> object:
        def run(texts: list[str]) -> Outputs:
            logits = np.zeros((len(texts), 3), np.float32)
            logits[:, 1] = 1
            logits[:flip, 2] = 5
            return {"logits": logits}

        return run

    judge = Judge("classify", classes(0), None)  # type: ignore[arg-type]
    score = judge.score(classes(21), 4, "x", "int8")[0]  # type: ignore[arg-type]
    assert (score.metric, score.value) == ("agreement", pytest.approx(1 - 21 / len(sentences())))


def test_a_whole_benchmark_with_peers(built: Bundle, checkpoint: Path, tmp_path: Path) -> None:
    settings = BenchSettings(shapes=((1, 8), (2, 16)), runs=5, model=str(checkpoint))
    record = bench(built, settings, "variator bench …")
    assert Record.from_json(record.to_json()) == record
    engines = {(row.engine, row.precision, row.ratio) for row in record.results}
    ours = {("onnxruntime", "fp32", ratio) for ratio in (1, 2, 4)}
    peers = {
        ("peer:torch-sentence-transformers", "fp32", 1),
        ("peer:onnxruntime-stock", "fp32", 1),
        ("peer:onnxruntime-stock", "int8", 1),
    }
    assert engines == ours | peers and len(record.results) == 12
    for row in record.results:
        counted = count_flops(built.graph(row.ratio), row.sequence)["total"] * row.batch
        whole = count_flops(built.graph(1), row.sequence)["total"] * row.batch
        first = next(
            r
            for r in record.results
            if (r.engine, r.precision, r.ratio, r.batch) == (row.engine, row.precision, 1, row.batch)
        )
        assert row.flops == counted and row.flops_saved == pytest.approx(1 - counted / whole, abs=1e-4)
        assert row.speedup == pytest.approx(first.p50_ms / row.p50_ms, rel=0.01)
        assert row.efficiency == pytest.approx(row.speedup * counted / whole, rel=0.01)
        assert row.throughput_per_s == pytest.approx(row.batch / row.p50_ms * 1e3, rel=0.01)
    cosine = {(q.engine, q.precision, q.ratio): q.value for q in record.quality if q.metric == "cosine"}
    assert (
        cosine["onnxruntime", "fp32", 1] == pytest.approx(1.0, abs=1e-5) and cosine["onnxruntime", "fp32", 4] < 0.9999
    )
    assert cosine["peer:onnxruntime-stock", "fp32", 1] == pytest.approx(1.0, abs=1e-5)
    assert [entry.ratios for entry in record.memory] == [[1], [1, 2], [1, 2, 4]]
    assert record.disk["backbone.data"] == built.manifest.files["backbone.data"].bytes
    assert any("untrained" in note.lower() for note in record.notes) and all(
        plugin.untrained for plugin in record.plugins
    )


def test_memory_is_measured_in_a_process_of_its_own(built: Bundle) -> None:
    entries = measure(built.path, "onnxruntime", "fp32", (2, 16))
    assert [entry.ratios for entry in entries] == [[1], [1, 2], [1, 2, 4]] and all(
        entry.pss_bytes > 0 for entry in entries
    )
    with pytest.raises(EngineError, match="measuring memory failed"):
        measure(built.path, "onnxruntime", "int8", (2, 16))


def test_the_checkpoint_of_the_peers_must_be_the_bundles(built: Bundle, toy: Path) -> None:
    with pytest.raises(InputError, match="not the checkpoint"):
        bench(built, BenchSettings(shapes=((1, 8),), model=str(toy)))


@pytest.mark.parametrize("shape", [(0, 8), (1, 0), (1, 151)])
def test_an_impossible_shape_is_refused(built: Bundle, shape: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="cannot be measured"):
        bench(built, BenchSettings(shapes=(shape,)))


def test_nothing_built_is_an_error_with_its_fix(bundle: Bundle, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle.path, tmp_path / "copy", ignore=shutil.ignore_patterns("engines"))
    with pytest.raises(EngineError, match="variator build"):
        bench(copy, BenchSettings(shapes=((1, 8),)))


@pytest.fixture(scope="module")
def record_of_both(built: Bundle, shared_bundle: Bundle) -> Record:
    """Both layouts of the tiny model measured against each other."""
    settings = BenchSettings(
        engines=("onnxruntime",), shapes=((1, 8), (2, 16)), runs=5, quality=False, against=shared_bundle.path
    )
    return bench(built, settings, "variator bench …")


def test_both_layouts_are_timed_at_every_ratio(record_of_both: Record) -> None:
    rows = {(row.engine, row.precision, row.ratio, row.batch, row.sequence) for row in record_of_both.layouts}
    assert rows == {("onnxruntime", "fp32", ratio, *shape) for ratio in (1, 2, 4) for shape in ((1, 8), (2, 16))}
    for row in record_of_both.layouts:
        assert row.relative == pytest.approx(row.shared_ms / row.per_ratio_ms, abs=0.02) and row.runs >= 5
        assert row.switched_ms > 0
    assert Record.from_json(record_of_both.to_json()) == record_of_both


def test_a_further_task_is_a_plugin_in_one_layout_and_a_bundle_in_the_other(record_of_both: Record) -> None:
    held = {(row.layout, tuple(row.ratios), row.tasks) for row in record_of_both.memory}
    counts = [(1,), (1, 2), (1, 2, 4)]
    assert held >= {(layout, ratios, 1) for layout in ("per-ratio", "shared") for ratios in counts}
    assert ("per-ratio", (1, 2, 4), 2) in held and ("shared", (1, 2, 4), 10) in held


def test_plugging_is_timed_idle_and_under_load(record_of_both: Record) -> None:
    (row,) = record_of_both.plugging
    assert (row.engine, row.ratio) == ("onnxruntime", 4) and row.file_bytes > 1000
    assert 0 < row.idle_p50_ms <= row.idle_p99_ms and 0 < row.loaded_p50_ms <= row.loaded_p99_ms
    assert 0 < row.request_p50_ms <= row.request_p99_ms and row.swapped_p99_ms > 0


def test_layouts_are_printed_for_terminal_and_readme(record_of_both: Record) -> None:
    text = layouts_markdown(record_of_both)
    assert text.count("\n| onnxruntime | fp32 | ") == 6 + 1 + 2
    titles = {grid.title.split(":")[0].split(" [")[0] for grid in grids(record_of_both)}
    assert {"Layouts", "Plugging in", "Memory"} <= titles


def test_only_the_two_layouts_of_one_model_are_compared(
    built: Bundle, shared_bundle: Bundle, toy: Path, tmp_path: Path
) -> None:
    settings = BenchSettings(shapes=((1, 8),), runs=5)
    with pytest.raises(InputError, match=r"both have layout per-ratio(.|\n)*--layout"):
        bench(built, dataclasses.replace(settings, against=built.path))
    other = export(str(toy), tmp_path / "other", ExportSettings((), layout="shared"))
    with pytest.raises(InputError, match="another model"):
        bench(built, dataclasses.replace(settings, against=other.path))


@pytest.mark.slow
def test_bundles_with_other_plugins_or_engines_are_not_compared(
    built: Bundle, shared_bundle: Bundle, backbone: Backbone, tmp_path: Path
) -> None:
    settings = BenchSettings(shapes=((1, 8),), runs=5, memory=False)
    wide = export(backbone, tmp_path / "wide", ExportSettings((4,), untrained=True, rank=32, layout="shared"))
    with pytest.raises(InputError, match=r"plugins of ratio 4 in .* differ"):
        bench(built, dataclasses.replace(settings, against=wide.path))
    copy = shutil.copytree(shared_bundle.path, tmp_path / "copy", ignore=shutil.ignore_patterns("engines"))
    build(copy, "onnxruntime", "int8")
    with pytest.raises(InputError, match=r"no engine is built in both(.|\n)*--engine onnxruntime --precision fp32"):
        bench(built, dataclasses.replace(settings, against=copy))


def test_a_shared_bundle_alone_is_benchmarked_like_any(shared_bundle: Bundle) -> None:
    settings = BenchSettings(engines=("onnxruntime",), shapes=((1, 8),), runs=5, memory=False)
    record = bench(shared_bundle, settings)
    assert record.layout == "shared" and {row.ratio for row in record.results} == {1, 2, 4}
    assert [row.value for row in record.quality if row.ratio == 1] == [pytest.approx(1.0)]
    assert record.layouts == [] and len(record.plugging) == 1


def test_what_measures_speed_runs_without_the_settings_of_training() -> None:
    import subprocess
    import sys

    rooms = "import sys, variator.bench.run, variator.bench.peers, variator.engines.runtime"
    code = f"{rooms}; sys.exit(any(name.startswith('variator.training') for name in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)
