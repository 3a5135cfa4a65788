"""Latency tables: smoothed, interpolated, and refused where they were not measured."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.engines.tables import made_up
from variator.engines.build import build
from variator.engines.built import LATENCY_FILE
from variator.engines.latency import LatencyTable, Point, calibrate, calibrated, load_table
from variator.engines.runtime import Runtime
from variator.errors import EngineError
from variator.toolkit.bundle import Bundle


def table(*points: Point) -> LatencyTable:
    return LatencyTable("e", "fp32", "key", {}, points)


def test_measured_points_come_back_and_between_them_it_is_linear() -> None:
    found = made_up()
    assert found.ratios == (1, 2, 4, 8)
    assert found.ms(1, 4, 64) == pytest.approx(1 + 0.02 * 256)
    assert found.ms(1, 10, 64) == pytest.approx(1 + 0.02 * 640)
    assert found.ms(1, 4, 288) == pytest.approx((found.ms(1, 4, 64) + found.ms(1, 4, 512)) / 2)


def test_below_the_first_point_it_is_that_beyond_the_last_in_proportion() -> None:
    found = made_up()
    assert found.ms(4, 1, 3) == found.ms(4, 1, 8)
    assert found.ms(4, 128, 64) == pytest.approx(2 * found.ms(4, 64, 64))
    assert found.ms(4, 64, 1024) == pytest.approx(2 * found.ms(4, 64, 512))
    assert found.line(1, 64)[0] == 0.0


def test_noise_is_smoothed_away_and_what_is_monotone_stays() -> None:
    times = {(1, 8): 2.0, (1, 64): 3.0, (4, 8): 5.0, (4, 64): 4.0, (16, 8): 4.5, (16, 64): 9.0}
    noisy = table(*(Point(1, b, n, ms, ms, 5) for (b, n), ms in times.items()))
    grid = np.array([[noisy.ms(1, b, n) for n in (8, 64)] for b in (1, 4, 16)])
    assert (np.diff(grid, axis=0) >= 0).all() and (np.diff(grid, axis=1) >= 0).all()
    assert grid[0].tolist() == [2.0, 3.0] and grid[2, 1] == 9.0
    assert 4.0 <= grid[1, 0] <= 5.0


def test_shapes_that_took_too_long_to_measure_go_on_in_proportion() -> None:
    found = table(Point(1, 1, 8, 1.0, 1.0, 5), Point(1, 4, 8, 3.0, 3.0, 5), Point(1, 1, 64, 10.0, 10.0, 5))
    assert found.ms(1, 4, 64) == pytest.approx(40.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a latency table"),
        ("[]", "not a latency table"),
        ('{"schema": "other/1"}', "another schema"),
        (None, "no ratio 1"),
        (json.dumps({**json.loads(made_up().to_json()), "points": []}), "no point"),
    ],
)
def test_what_is_no_table_is_refused(text: str | None, message: str) -> None:
    if text is None:
        data = json.loads(made_up().to_json())
        data["points"] = [point for point in data["points"] if point["ratio"] != 1]
        text = json.dumps(data)
    with pytest.raises(EngineError, match=message):
        LatencyTable.from_json(text)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_times_that_cannot_be_are_refused(value: float) -> None:
    with pytest.raises(EngineError, match="positive times"):
        table(Point(1, 1, 8, value, 1.0, 5))


def test_a_table_reads_back_as_it_was() -> None:
    assert LatencyTable.from_json(made_up().to_json()) == made_up()


@pytest.fixture
def built(bundle: Bundle, tmp_path: Path) -> Bundle:
    path = shutil.copytree(bundle.path, tmp_path / "copy", ignore=shutil.ignore_patterns("engines"))
    build(path, "onnxruntime", "fp32")
    return Bundle.open(path)


def test_an_engine_is_measured_once_and_its_table_belongs_to_it_and_this_machine(built: Bundle) -> None:
    with Runtime.open(built, "onnxruntime", threads=1) as runtime:
        with pytest.raises(EngineError, match=r"no latency was measured(.|\n)*bench .* --calibrate"):
            runtime.infer(["w1"], ratio="auto")
        found = calibrate(runtime, runs=2, batches=(1, 2), lengths=(8, 32))
        assert load_table(runtime.built, 1) == found
        assert {(point.batch, point.length) for point in found.points} == {(1, 8), (1, 32), (2, 8), (2, 32)}
        path = runtime.built.directory / LATENCY_FILE
        before = path.read_text()
        assert calibrated(built.path, runtime.built, 1) == found and path.read_text() == before
        with pytest.raises(EngineError, match=r"measured with threads '1', here it is '2'"):
            load_table(runtime.built, 2)
        path.write_text(dataclasses.replace(found, key="other").to_json())
        with pytest.raises(EngineError, match=r"another engine(.|\n)*--calibrate"):
            load_table(runtime.built, 1)
        elsewhere = {**found.machine, "cpu": "Another CPU"}
        path.write_text(dataclasses.replace(found, machine=elsewhere).to_json())
        with pytest.raises(EngineError, match=r"cpu 'Another CPU'"):
            load_table(runtime.built, 1)
        path.write_text("{")
        with pytest.raises(EngineError, match=r"latency\.json: not a latency table(.|\n)*--calibrate"):
            load_table(runtime.built, 1)
        runtime.built.verify()  # a table is no part of what was built


def test_building_again_takes_the_table_away(built: Bundle) -> None:
    with Runtime.open(built, "onnxruntime") as runtime:
        calibrate(runtime, runs=1, batches=(1,), lengths=(8,))
        path = runtime.built.directory / LATENCY_FILE
    build(built, "onnxruntime", "fp32")
    assert path.exists()
    build(built, "onnxruntime", "fp32", rebuild=True)
    assert not path.exists()
