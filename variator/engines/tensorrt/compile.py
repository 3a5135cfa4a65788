"""The builder's own process: one graph -> one plan. Run by `engines.tensorrt.builder`, never imported by it.

Reads a `Job` as JSON from standard input, writes a line of JSON to standard output for every step, the last of them
with what was built. What the library has to say goes to standard error. A crash ends this process alone.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Range = tuple[list[int], ...]
"""Smallest, best and largest shape of one input."""


@dataclass(frozen=True)
class Job:
    """What to build.

    Args:
        module: The library's.
        graph: ONNX, strongly typed: what precision a layer has is what the graph says.
        profiles: One after the other: the range of every input.
        compute_capabilities: For a GPU that is not here, as (major, minor); empty for the one that is.
        timing_cache: File of measured kernels, read and written; empty for none.
    """

    module: str
    graph: str
    plan: str
    profiles: list[dict[str, Range]]
    compute_capabilities: list[tuple[int, int]]
    timing_cache: str


def main() -> None:
    """Build."""
    job = Job(**json.loads(sys.stdin.read()))
    # Libraries print to standard output, too: ours is kept apart.
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = str(int(job.module == "tensorrt_rtx"))
    from polygraphy.backend.trt import PostprocessConfig, Profile, engine_bytes_from_network, network_from_onnx_path
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.ERROR
    builder, network, parser = network_from_onnx_path(job.graph, strongly_typed=True)
    precision = network_precision(network)
    network.name = f"variator:{Path(job.graph).stem}:{precision}"  # comes back with the plan
    profiles = []
    for ranges in job.profiles:
        profile = Profile()
        for name, (low, best, high) in ranges.items():
            profile.add(name, tuple(low), tuple(best), tuple(high))
        profiles.append(profile)
    settings: dict[str, Any] = {"profiles": profiles, "progress_monitor": _monitor(job.module, lines)}
    library = importlib.import_module(job.module)
    settings["profiling_verbosity"] = library.ProfilingVerbosity.DETAILED  # else `variator inspect` finds names alone
    if job.timing_cache:
        settings["load_timing_cache"] = job.timing_cache
    if job.module == "tensorrt_rtx":
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX as CreateConfig

        settings |= {"compute_capabilities": job.compute_capabilities or None, "use_gpu": not job.compute_capabilities}
    else:
        from polygraphy.backend.trt import CreateConfig

    def exact(builder: Any, network: Any, config: Any) -> None:
        """fp32 means fp32: by default the library rounds its products to TF32."""
        config.clear_flag(library.BuilderFlag.TF32)

    plan = engine_bytes_from_network(
        (builder, network, parser),
        config=PostprocessConfig(CreateConfig(**settings), exact),
        save_timing_cache=job.timing_cache or None,
    )
    Path(job.plan).write_bytes(plan)
    lines.write(json.dumps({"precision": precision}) + "\n")


def network_precision(network: Any) -> str:
    """The precision that most weights of a parsed network are multiplied in, behind a DequantizeLinear what that reads.

    Strongly typed: what the network says is what the plan does.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    makers = {layer.get_output(place).name: layer for layer in layers for place in range(layer.num_outputs)}
    weights: dict[str, int] = {}
    for layer in layers:
        if layer.type.name == "MATRIX_MULTIPLY":
            for tensor in (layer.get_input(0), layer.get_input(1)):
                dtype, volume = _stored(tensor, makers)
                weights[dtype] = weights.get(dtype, 0) + volume
    names = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16", "INT8": "int8", "FP8": "fp8"}
    most = max(weights, key=lambda dtype: weights[dtype])
    return names.get(most, most)


def _stored(tensor: Any, makers: Mapping[str, Any]) -> tuple[str, int]:
    """The type that a weight is stored in where it is multiplied, and its size; 0 for what is computed."""
    dtype, quantised = tensor.dtype.name, False
    maker = makers.get(tensor.name)
    while maker is not None and maker.type.name in ("SHUFFLE", "DEQUANTIZE", "QUANTIZE", "IDENTITY", "CAST", "SLICE"):
        before = maker.get_input(0)
        if maker.type.name == "DEQUANTIZE" and not quantised:
            dtype, quantised = before.dtype.name, True
        maker = makers.get(before.name)
    if maker is None or maker.type.name != "CONSTANT":
        return dtype, 0
    return dtype, math.prod(maker.get_output(0).shape)


def _monitor(module: str, lines: Any) -> Any:
    """TensorRT's progress as lines: which phase, and how far it is, in whole per cent."""
    library = importlib.import_module(module)

    class Monitor(library.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            library.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.said = ("", -1)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = max(1, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            now = (phase_name, 100 * step // self.steps.get(phase_name, 1))
            if now != self.said:
                self.said = now
                lines.write(json.dumps({"phase": phase_name, "percent": now[1]}) + "\n")
            return True

    return Monitor()


if __name__ == "__main__":
    main()
