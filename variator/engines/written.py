"""A bundle's graphs in the precision that an engine for GPUs is asked for."""

from __future__ import annotations

from pathlib import Path

from variator.engines.quantise import in_fp8, quantise_static
from variator.errors import InputError
from variator.exporters.gate import load_cases
from variator.files import inside
from variator.toolkit.bundle import GATE_FILE, Bundle
from variator.toolkit.stack import inputs_of, neutral_inputs

QUANTISED = ("int8", "fp8")


def check_precision(bundle: Bundle, precision: str) -> None:
    """Raise `InputError` if the graphs are written in another precision already."""
    if bundle.manifest.precision not in ("fp32", precision):
        raise InputError(
            f"the graphs of {bundle.path} are written in {bundle.manifest.precision}, not in {precision}",
            fix=f"--precision {bundle.manifest.precision}, or variator export --precision fp32",
        )


def written_in(bundle: Bundle, graph: Path, precision: str, directory: Path) -> Path:
    """A graph of the bundle in a precision: itself if it is that already, else rewritten in `directory`.

    int8 and fp8 are fp16 with the products of the backbone's weights between QuantizeLinear and DequantizeLinear, with
    ranges from the gate's texts.
    """
    if precision == bundle.manifest.precision:
        return graph
    import onnx_ir
    from onnx_ir.passes.common import ShapeInferencePass

    from variator.exporters.precision import narrow

    target = directory / graph.name
    source = graph
    if precision in QUANTISED:
        cases = load_cases(inside(bundle.path, GATE_FILE))
        beside = [inputs_of(bundle, ratio) for ratio in bundle.ratios if bundle.graph(ratio) == graph]
        feeds = [{**inputs, **case.feed} for inputs in beside or [neutral_inputs(bundle)] for case in cases]
        source = quantise_static(graph, directory / f"int8-{graph.name}", feeds, symmetric=True)
        if precision == "fp8":
            source = in_fp8(graph, source, directory / f"fp8-{graph.name}")
    model = onnx_ir.load(source)
    if precision in QUANTISED:
        ShapeInferencePass()(model)  # the quantiser names no types
    narrow(model, "fp16" if precision in QUANTISED else precision)
    onnx_ir.save(model, target, external_data=f"{target.stem}.data")
    return target
