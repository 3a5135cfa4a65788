"""A small benchmark record for the tests. EVERY FIGURE HERE IS FABRICATED: plausible, but measured nowhere."""

from __future__ import annotations

import dataclasses
from typing import Any

from variator.bench.record import Flops, Machine, Memory, Model, Plugin, Quality, Record, Result

SHAPES = ((1, 32), (8, 64), (8, 128))
SAVED = {1: 0.0, 2: 0.30, 4: 0.47, 8: 0.55}
SPEED = {("onnxruntime", "fp32"): 1.12, ("onnxruntime", "int8"): 3.04, ("openvino", "bf16"): 2.25}
SCORE = {1: 0.8672, 2: 0.8640, 4: 0.8551, 8: 0.8302}
EFFICIENCY = {"fp32": 0.92, "bf16": 0.78, "int8": 0.62}
LOSS = {"fp32": 0.0, "bf16": 0.0006, "int8": 0.0041}


def make_record(**changes: Any) -> Record:
    """A trained real model, two engines, four ratios, two peers and three shapes; `changes` replace fields."""
    features = ["avx512_vnni", "avx512_bf16"]
    machine = Machine("Fabricated CPU for tests", 2, 16_000_000_000, features, "Linux", "2026-01-01")
    model = Model("test/fabricated-encoder", "bert", "embed", 384, 6, 22_700_000, True, "bundle")
    record = Record(
        machine=machine,
        model=model,
        command="variator bench bundle --shapes 1x32,8x64,8x128",
        versions={"onnxruntime": "1.31", "openvino": "2026.4"},
        plugins=[Plugin(ratio, 64, "tanh", 480_000 + 1000 * ratio, 0.021, False) for ratio in (2, 4, 8)],
        flops=[_flops(ratio, *shape) for shape in SHAPES for ratio in SAVED],
        results=_results(),
        quality=_quality(),
        memory=[
            Memory("onnxruntime", "fp32", [1], 182_000_000),
            Memory("onnxruntime", "fp32", [1, 2, 4, 8], 263_000_000),
            Memory("openvino", "bf16", [1], 190_000_000),
            Memory("openvino", "bf16", [1, 2, 4, 8], 610_000_000),
        ],
        disk={"backbone.data": 90_300_000, "plugin-4.data": 1_900_000, "ratio-4.onnx": 260_000},
        notes=["Fabricated figures."],
    )
    return dataclasses.replace(record, **changes)


def make_result(engine: str, precision: str, ratio: int, speed: float, **changes: Any) -> Result:
    """One row at 8x128 whose p50 is 400 ms / speed."""
    p50 = 400 / speed
    row = Result(
        engine,
        precision,
        ratio,
        8,
        128,
        p50,
        p50 * 1.03,
        p50 * 1.08,
        40,
        0.04,
        True,
        1.0,
        0,
        SAVED[ratio],
        1.0,
        8000 / p50,
    )
    return dataclasses.replace(row, **changes)


def untrain(record: Record) -> Record:
    """The same record with every plugin marked as untrained."""
    plugins = [dataclasses.replace(plugin, untrained=True) for plugin in record.plugins]
    return dataclasses.replace(record, plugins=plugins)


def unstable(record: Record, engine: str) -> Record:
    """The same record with every timing of one engine marked as unstable."""
    rows = [dataclasses.replace(row, stable=row.stable and row.engine != engine) for row in record.results]
    return dataclasses.replace(record, results=rows)


def _flops(ratio: int, batch: int, sequence: int) -> Flops:
    count = batch * sequence
    attention, ffn = count * (7_000_000 + 9_000 * sequence), count * 14_200_000 // ratio
    plugin, head = 0 if ratio == 1 else count * 800_000, count * 1_000
    total, whole = attention + ffn + plugin + head, count * (21_201_000 + 9_000 * sequence)
    return Flops(ratio, batch, sequence, attention, ffn, plugin, head, total, 1 - total / whole)


def _results() -> list[Result]:
    rows = []
    for batch, sequence in SHAPES:
        scale = batch * sequence / 1024
        for (engine, precision), base in SPEED.items():
            for ratio, saved in SAVED.items():
                speedup = 1 + EFFICIENCY[precision] * (1 / (1 - saved) - 1)
                p50 = 400 * scale / base / speedup
                rows.append(
                    make_result(
                        engine,
                        precision,
                        ratio,
                        1.0,
                        batch=batch,
                        sequence=sequence,
                        speedup=speedup,
                        p50_ms=p50,
                        p90_ms=1.03 * p50,
                        efficiency=speedup * (1 - saved),
                        throughput_per_s=1000 * batch / p50,
                    )
                )
        for precision, base in (("fp32", 1.0), ("int8", 2.5)):
            p50 = 400 * scale / base
            rows.append(
                make_result(
                    "peer:onnxruntime",
                    precision,
                    1,
                    1.0,
                    batch=batch,
                    sequence=sequence,
                    p50_ms=p50,
                    p90_ms=1.04 * p50,
                    throughput_per_s=1000 * batch / p50,
                )
            )
    return rows


def _quality() -> list[Quality]:
    engines = [*SPEED, ("peer:onnxruntime", "fp32"), ("peer:onnxruntime", "int8")]
    return [
        Quality(ratio, engine, precision, "spearman", "stsb dev", SCORE[ratio] - LOSS[precision], SCORE[1])
        for engine, precision in engines
        for ratio in (SCORE if not engine.startswith("peer:") else (1,))
    ]
