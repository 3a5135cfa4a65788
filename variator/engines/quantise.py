"""int8 and fp8 graphs from fp32 ones, by ONNX Runtime's quantisers: dynamic for itself, static (Q/DQ) for others.

Which products are quantised is decided here once: those with a weight of the backbone. The plugin's small maps
and the attention's products of activations stay as they are. With static ranges the FFN's second product stays,
too: its input has outliers that stretch the range. On the real MiniLM (first 500 pairs of STS-B dev, Spearman,
fp32 0.9257) everything quantised gives 0.9186, without that product 0.9255.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from variator import machine
from variator.engines.base import Arrays
from variator.exporters.flops import PART_KEY

RECIPE = "2"
"""Part of the build key: raise it with any change of this module."""


def reduce_range() -> bool:
    """Whether int8 products of this CPU saturate in 16 bits, so that weights must keep to 7 bits."""
    return not {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"} & set(machine.cpu_features())


def quantise_dynamic(source: Path, target: Path) -> Path:
    """Activations are quantised as they come, weights per channel; ONNX Runtime's fast way."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet_quantiser():
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            reduce_range=reduce_range(),
            weight_type=QuantType.QInt8,
            nodes_to_exclude=_excluded(source),
            use_external_data_format=True,
            extra_options={"MatMulConstBOnly": True},
        )
    return target


def quantise_static(source: Path, target: Path, feeds: Sequence[Arrays], symmetric: bool = False) -> Path:
    """Activation ranges from a calibration run over `feeds`, weights per channel; the form OpenVINO takes.

    Args:
        symmetric: Ranges around zero, the only ones that TensorRT takes, and weights of all 8 bits.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left: Iterator[Arrays] = iter(feeds)

        def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
            feed = next(self._left, None)
            return None if feed is None else dict(feed)

    with quiet_quantiser():
        quantize_static(
            source,
            target,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            reduce_range=reduce_range() and not symmetric,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
            nodes_to_exclude=_excluded(source, narrowing=True, weighted=symmetric),
            use_external_data_format=True,
            extra_options={"MatMulConstBOnly": True, "WeightSymmetric": True, "ActivationSymmetric": symmetric},
        )
    return target


FP8_RANGE = 127 / 448
"""Steps of int8 per step of fp8 (E4M3) at the same range: the largest values that each has."""


def in_fp8(source: Path, quantised: Path, target: Path) -> Path:
    """A graph as `quantise_static` made it symmetric, with fp8 (E4M3) in the place of int8 and the same ranges.

    Args:
        source: The graph it was made from, for the weights.
    """
    import ml_dtypes
    import onnx_ir as ir

    fp8 = ir.DataType.FLOAT8E4M3FN
    model, weights = ir.load(quantised), ir.load(source).graph.initializers
    done: set[str] = set()

    def put(value: ir.Value, array: npt.NDArray[Any]) -> None:
        value.const_value = ir.tensor(array, name=value.name)
        value.dtype = value.const_value.dtype
        done.add(value.name or "")

    for node in model.graph:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        value, scale, zero = (entry for entry in node.inputs[:3] if entry is not None and entry.name is not None)
        if scale.name not in done:
            put(scale, (_array(scale) * np.float32(FP8_RANGE)).astype(np.float32))
        if zero.name not in done:
            put(zero, np.zeros(_array(zero).shape, ml_dtypes.float8_e4m3fn))
        if value.is_initializer() and value.name not in done:
            whole = _array(weights[str(value.name).removesuffix("_quantized")])
            put(value, (whole / _array(scale)).astype(ml_dtypes.float8_e4m3fn))
        if node.op_type == "QuantizeLinear":
            node.outputs[0].dtype = fp8
    ir.save(model, target, external_data=f"{target.stem}.data")
    return target


def _array(value: Any) -> npt.NDArray[Any]:
    """The numbers of an initializer."""
    found: npt.NDArray[Any] = value.const_value.numpy()
    return found


def _excluded(graph: Path, narrowing: bool = False, weighted: bool = False) -> list[str]:
    """Names of the products to leave alone.

    Args:
        narrowing: Also the FFN's with fewer outputs than inputs.
        weighted: Also those of two activations, one side of which the static quantiser would convert there and back.
    """
    model = onnx.load(graph, load_external_data=False)
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    excluded = []
    for node in model.graph.node:
        if node.op_type == "MatMul":
            part = next((entry.value for entry in node.metadata_props if entry.key == PART_KEY), "")
            inputs, outputs = shapes.get(node.input[1], [0, 0])
            unweighted = weighted and node.input[1] not in shapes
            if part not in ("attention", "ffn") or (narrowing and part == "ffn" and outputs < inputs) or unweighted:
                excluded.append(node.name)
    return excluded


@contextmanager
def quiet_quantiser() -> Iterator[None]:
    """The quantiser advises preprocessing through the root logger; torch's exporter has done it."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
