"""Plans on a real GPU, with whichever of the two libraries is there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from variator.engines.backends import BACKENDS
from variator.engines.base import BuildOptions
from variator.engines.build import build
from variator.engines.built import load_engine, read_record
from variator.engines.tensorrt.engine import TensorRtEngine
from variator.toolkit.bundle import Bundle

PROFILES = "1x1:2x16:4x32,1x1:2x64:4x64,1x1:2x128:4x150"


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "fp8"])
@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_plans_are_built_checked_at_every_corner_and_run_on_this_gpu(
    bundle: Bundle, shared_bundle: Bundle, tmp_path: Path, name: str, precision: str
) -> None:
    backend = BACKENDS[name]
    lacking = backend.missing() or backend.cannot_run()
    if lacking:
        pytest.skip(lacking)
    for source in (bundle, shared_bundle):
        place = tmp_path / source.path.name
        copied = Bundle.open(shutil.copytree(source.path, place, ignore=shutil.ignore_patterns("engines")))
        built = build(copied, name, precision, options=BuildOptions((PROFILES,)))
        assert built.record.gated and built.record.precision == precision
        assert read_record(built.directory) == built.record
        engine = load_engine(copied, built, "ratio-1.onnx")
        assert isinstance(engine, TensorRtEngine) and not engine.plan.uncaptured
        engine.close()
