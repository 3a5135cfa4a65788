"""What the tables of a benchmark record say, in the terminal and in the README."""

from __future__ import annotations

import dataclasses
import io
import math
from typing import Any

import pytest
from rich.console import Console

from tests.bench.records import make_record, make_result, unstable, untrain
from variator.bench import record as record_module
from variator.bench import table, wording
from variator.bench.record import Memory, Quality, Record
from variator.engines.gpu import Gpu

EMPTY: dict[str, Any] = {"results": [], "quality": [], "flops": [], "memory": [], "plugins": [], "disk": {}}


def printed(record: Record, width: int = 120) -> str:
    stream = io.StringIO()
    table.show(record, Console(file=stream, width=width))
    return stream.getvalue()


def grid(record: Record, start: str) -> table.Grid:
    return next(found for found in table.grids(record) if found.title.startswith(start))


def test_header_names_model_machine_and_date() -> None:
    line = table.header(make_record())
    assert "test/fabricated-encoder (real weights)" in line
    assert "Fabricated CPU for tests, 2 cores, 16.0 GB" in line and "2026-01-01" in line


def test_toy_model_is_named_a_toy() -> None:
    record = make_record()
    toy = dataclasses.replace(record, model=dataclasses.replace(record.model, real=False))
    assert "TOY: random weights" in table.header(toy)


def test_every_shape_has_a_latency_table_with_every_row() -> None:
    record = make_record()
    latency = [found for found in table.grids(record) if found.title.startswith("Latency")]
    assert [found.title for found in latency] == [f"Latency, batch {b} of {s} tokens" for b, s in table.shapes(record)]
    assert sum(len(found.rows) for found in latency) == len(record.results)


def test_speed_is_compared_with_the_fastest_peer_of_the_same_shape() -> None:
    rows = [
        make_result("onnxruntime", "fp32", 4, 4.0),
        make_result("peer:slow", "fp32", 1, 1.0),
        make_result("peer:fast", "int8", 1, 2.0),
        make_result("peer:elsewhere", "int8", 1, 9.0, sequence=64),
    ]
    found = grid(make_record(results=rows), "Latency, batch 8 of 128")
    assert found.rows[0].cells[6] == wording.times(2.0)
    assert found.note == "Peer to beat: fast int8."


def test_without_a_peer_the_comparison_is_a_dash() -> None:
    found = grid(make_record(results=[make_result("onnxruntime", "fp32", 4, 4.0)]), "Latency")
    assert found.rows[0].cells[6] == "-" and not found.note


def test_unstable_rows_are_marked() -> None:
    record = unstable(make_record(), "openvino")
    for row in grid(record, "Latency").rows:
        assert (row.cells[-1] == "unstable") == (row.mark == "unstable") == (row.cells[0] == "openvino")
    assert "(unstable)" in table.markdown(record) and "(unstable)" not in table.markdown(make_record())


def test_unstable_peer_is_marked_where_it_is_compared_with() -> None:
    assert grid(unstable(make_record(), "peer:onnxruntime"), "Latency").note.endswith("(unstable).")


def test_untrained_plugin_marks_every_title() -> None:
    record = untrain(make_record())
    assert all(table.UNTRAINED in found.title for found in table.grids(record))
    assert table.UNTRAINED in table.markdown(record)
    assert printed(record).count(table.UNTRAINED) == len(table.grids(record))
    assert table.UNTRAINED not in printed(make_record())


def test_relative_drop_is_lost_share_of_the_reference() -> None:
    row = Quality(4, "onnxruntime", "fp32", "spearman", "dev", 0.76, 0.80)
    assert grid(make_record(quality=[row]), "Quality").rows[0].cells[-1] == "5.00 %"
    assert math.isnan(table.relative_drop(dataclasses.replace(row, reference=0.0)))


def test_memory_is_split_into_first_and_further_ratios() -> None:
    rows = [Memory("onnxruntime", "fp32", [1], 100_000_000), Memory("onnxruntime", "fp32", [1, 2, 4], 160_000_000)]
    (found,) = table.footprints(make_record(memory=rows))
    assert (found.first, found.further, found.all) == (100_000_000, 30_000_000, 160_000_000)


def test_memory_of_one_set_of_ratios_claims_nothing_per_ratio() -> None:
    (found,) = table.footprints(make_record(memory=[Memory("openvino", "bf16", [1, 4], 500_000_000)]))
    assert found.first is None and found.further is None


def test_spearman_is_the_main_metric_whatever_the_order() -> None:
    rows = [Quality(4, "onnxruntime", "fp32", metric, "dev", 0.8, 0.9) for metric in ("accuracy", "cosine", "spearman")]
    for quality, expected in ((rows, "spearman"), (rows[:2], "cosine"), (rows[:1], "accuracy")):
        assert {row.metric for row in table.main_quality(make_record(quality=quality)).values()} == {expected}


def test_markdown_has_a_row_per_configuration_at_the_chosen_shapes() -> None:
    record = make_record()
    lines = [line for line in table.markdown(record).splitlines() if line.startswith("| ")]
    configurations = {table.key(row) for row in record.results}
    assert len(lines) == 2 + len(configurations)
    assert [table.tokens(shape) in lines[0] for shape in ((1, 32), (8, 64), (8, 128))] == [False, False, True]
    both = table.markdown(record, [(1, 32), (8, 64)]).splitlines()[2]
    assert [table.tokens(shape) in both for shape in ((1, 32), (8, 64), (8, 128))] == [True, True, False]
    assert len({line.count("|") for line in lines}) == 1


def test_names_can_break_neither_terminal_nor_markdown() -> None:
    record = make_record(results=[make_result("a|b\x1b[31m\n[bold]", "fp32", 1, 1.0)])
    text = printed(record)
    assert "\x1b" not in text and "[bold]" in text
    row = table.markdown(record).splitlines()[-1]
    assert row.startswith("| a\\|b") and "\x1b" not in row


@pytest.mark.parametrize("field", EMPTY)
def test_an_empty_part_is_left_out(field: str) -> None:
    record = make_record(**{field: EMPTY[field]})
    assert printed(record) and table.markdown(record)


def test_the_header_names_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    record = make_record()
    assert "CUDA" not in table.header(record)
    machine = dataclasses.replace(record.machine, gpu="NVIDIA Rehearsal", cuda="13.0", gpu_memory_bytes=8_000_000_000)
    line = table.header(dataclasses.replace(record, machine=machine))
    assert "NVIDIA Rehearsal with 8.0 GB and CUDA 13.0" in line
    monkeypatch.setattr(record_module, "no_gpu", lambda: None)
    monkeypatch.setattr(record_module, "gpu", lambda: Gpu("NVIDIA Rehearsal", "8.9", "13.0", 8_000_000_000))
    here = record_module.this_machine()
    assert (here.gpu, here.cuda, here.gpu_memory_bytes) == ("NVIDIA Rehearsal", "13.0", 8_000_000_000)


def test_an_empty_record_prints_its_header() -> None:
    record = make_record(**EMPTY)
    assert table.grids(record) == []
    assert "Not measured: latency, peers, quality, FLOPs, memory, disk." in printed(record)


def test_latency_fits_eighty_columns() -> None:
    text = printed(make_record(notes=[]), width=80)
    assert "onnxruntime int8          8" in text and "stable" in text


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_figure_that_is_not_finite_is_a_dash(value: float) -> None:
    assert [wording.decimal(value, 2), wording.percent(value), wording.times(value)] == ["-"] * 3


def test_a_record_survives_json() -> None:
    record = make_record()
    assert Record.from_json(record.to_json()) == record
