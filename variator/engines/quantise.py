"""int8 graphs from fp32 ones, by ONNX Runtime's quantisers: dynamic for itself, static (Q/DQ) for OpenVINO.

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
            nodes_to_exclude=_excluded(source, narrowing=True),
            use_external_data_format=True,
            extra_options={"MatMulConstBOnly": True, "WeightSymmetric": True, "ActivationSymmetric": symmetric},
        )
    return target


def _excluded(graph: Path, narrowing: bool = False) -> list[str]:
    """Names of the products to leave alone; with `narrowing` also the FFN's with fewer outputs than inputs."""
    model = onnx.load(graph, load_external_data=False)
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    excluded = []
    for node in model.graph.node:
        if node.op_type == "MatMul":
            part = next((entry.value for entry in node.metadata_props if entry.key == PART_KEY), "")
            inputs, outputs = shapes.get(node.input[1], [0, 0])
            if part not in ("attention", "ffn") or (narrowing and part == "ffn" and outputs < inputs):
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
