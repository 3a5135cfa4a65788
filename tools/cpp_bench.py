"""What the C++ runtime adds to ONNX Runtime's own call, and how far its answers are from Python's.

`python -m tools.cpp_bench BUNDLE BUILD RECORD`: a bundle with an onnxruntime engine, and what `make cpp` has built. Raw
and whole are timed in the very same call: sessions over one graph differ by more than what is looked for.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tools.record import begun, save
from variator.engines.runtime import Runtime

SHAPES = (("1x8", 600), ("1x32", 400), ("1x128", 200), ("8x128", 15), ("32x64", 10))
"""Rows x tokens, and runs."""


def main() -> None:
    """Measure and write the record."""
    bundle, build, record = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    with Runtime.open(bundle, "onnxruntime", "fp32") as runtime:
        ratios, vocabulary = runtime.bundle.ratios, runtime.bundle.manifest.vocabulary
        results = [_measured(build, bundle, str(ratio), shape, runs) for shape, runs in SHAPES for ratio in ratios]
        differences = {str(ratio): _difference(build, bundle, runtime, ratio, vocabulary) for ratio in ratios}
        found = {"results": results, "max_abs_difference_from_python": differences}
        save(begun("variator.cpp/1", runtime) | found, record)
    for one in results:
        print(
            f"{one['shape']:>6} ratio {one['ratio']:>2}: raw {one['raw_ms']:8.3f} ms, infer {one['infer_ms']:8.3f} ms, "
            f"{one['overhead_us']:.1f} us (p90 {one['overhead_p90_us']:.1f}), {one['share']:.2%}"
        )
    print(f"largest difference from Python: {max(differences.values()):.1e}")


def _measured(build: Path, bundle: Path, ratio: str, shape: str, runs: int) -> dict[str, Any]:
    """One shape and ratio: medians, and what is added beside the engine's own call."""
    command = [str(build / "tests" / "variator_bench"), str(bundle), ratio, shape, str(runs)]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    raw, whole = np.array(told.pop("raw_us")), np.array(told.pop("infer_us"))
    added, p90 = (float(one) for one in np.percentile(whole - raw, (50, 90)))
    return {
        "shape": shape,
        "ratio": ratio,
        **told,
        "raw_ms": round(float(np.median(raw)) / 1e3, 4),
        "infer_ms": round(float(np.median(whole)) / 1e3, 4),
        "overhead_us": round(added, 1),
        "overhead_p90_us": round(p90, 1),
        "share": round(added / float(np.median(raw)), 5),
        "runs": runs,
    }


def _difference(build: Path, bundle: Path, runtime: Runtime, ratio: int | str, vocabulary: int) -> float:
    """The largest difference of any output, over rows of many lengths."""
    rng = random.Random(0)
    rows = [[rng.randrange(vocabulary) for _ in range(length)] for length in (1, 2, 5, 17, 33, 64, 100, 128)]
    with tempfile.TemporaryDirectory() as place:
        given = Path(place) / "given.json"
        given.write_text(json.dumps({"bundle": str(bundle), "requests": [{"rows": rows, "ratio": str(ratio)}]}))
        command = [str(build / "tests" / "variator_driver"), "infer", str(given)]
        (answer,) = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["answers"]
    expected = runtime.infer(rows, ratio=ratio).outputs
    return max(
        float(np.abs(np.array(answer["outputs"][name]["values"]).reshape(values.shape) - values).max())
        for name, values in expected.items()
    )


if __name__ == "__main__":
    main()
