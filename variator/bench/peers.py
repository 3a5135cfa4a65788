"""Peers: the same checkpoint at ratio 1 through the plain library path, without us.

What a user would run otherwise: PyTorch (sentence-transformers or transformers), ONNX Runtime fp32 with its own
transformer optimiser, and ONNX Runtime int8 from its own dynamic quantiser.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import torch
from torch import Tensor, nn

from variator.bench.resident import Prepare
from variator.engines.base import Feed
from variator.engines.quantise import quiet_quantiser
from variator.exporters.gate import plain_runner
from variator.exporters.graph import trace
from variator.files import directory_written_whole, sha256_of_json
from variator.toolkit.checkpoint import Backbone
from variator.toolkit.rows import Outputs


@dataclass(frozen=True)
class Peer:
    """Somebody else's way to run ratio 1. `run` takes what an engine takes; `prepare` is for one on a GPU."""

    name: str
    precision: str
    run: Callable[[Feed], Outputs]
    prepare: Prepare | None = None


class Plain(nn.Module):
    """transformers' own model with the task's head, as a user would export it."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.original: Any = backbone.original
        self.head = backbone.model.head if backbone.task in ("embed", "hidden") else None
        self.outputs = backbone.outputs

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Any, ...]:
        """int64 [batch, S] each -> the task's outputs."""
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        result = self.original(input_ids=input_ids, attention_mask=attention_mask, **types)
        if self.head is None:
            return tuple(getattr(result, name) for name in self.outputs)
        outputs: tuple[Any, ...] = self.head(
            result.last_hidden_state, attention_mask.to(result.last_hidden_state.dtype)
        )
        return outputs


def load_peers(backbone: Backbone, cache: Path, threads: int, on_stage: Callable[[str], None]) -> list[Peer]:
    """The three peers; the ONNX ones are exported once into `cache`.

    Args:
        cache: A directory to keep the peers' graphs in, beside the bundle's engines.
        threads: For each peer.
    """
    packages = ("variator", "torch", "transformers", "onnxruntime")
    key = sha256_of_json([backbone.fingerprint, backbone.task, [importlib.metadata.version(p) for p in packages]])[:16]
    directory = cache / f"peer-{key}"
    if not directory.exists():
        on_stage("exporting the peers (stock ONNX Runtime fp32 and int8)")
        with directory_written_whole(directory) as partial:
            _export_stock(backbone, partial)
    torch.set_num_threads(threads)
    return [
        _torch_peer(backbone),
        Peer("onnxruntime-stock", "fp32", plain_runner(directory / "fp32.onnx", threads)),
        Peer("onnxruntime-stock", "int8", plain_runner(directory / "int8.onnx", threads)),
    ]


def _torch_peer(backbone: Backbone) -> Peer:
    """sentence-transformers for its own checkpoints where it is installed, else transformers (with our pooling)."""
    model: Callable[..., tuple[Any, ...]] = Plain(backbone).eval()
    name = "torch-transformers"
    if backbone.pooling.get("from") == "modules.json":
        with contextlib.suppress(ImportError):
            from sentence_transformers import SentenceTransformer

            loaded = SentenceTransformer(backbone.source, device="cpu")

            def model(**feed: Tensor) -> tuple[Any, ...]:
                return (loaded(feed)["sentence_embedding"],)

            name = "torch-sentence-transformers"

    def run(feed: Feed) -> Outputs:
        with torch.inference_mode():
            results = model(**{key: torch.from_numpy(np.ascontiguousarray(values)) for key, values in feed.items()})
        return {key: result.numpy() for key, result in zip(backbone.outputs, results, strict=True)}

    return Peer(name, "fp32", run)


def export_plain(backbone: Backbone, directory: Path, use_gpu: bool = False) -> Any:
    """ONNX Runtime's own optimiser over the plain export: its model, to be saved or converted."""
    from onnxruntime.transformers import optimizer

    plain = directory / "plain.onnx"
    onnx_ir.save(trace(Plain(backbone), backbone.inputs, backbone.outputs), plain, external_data=f"{plain.name}.data")
    with contextlib.redirect_stdout(io.StringIO()):  # the optimiser prints
        model = optimizer.optimize_model(
            str(plain),
            "bert",
            num_heads=backbone.config.heads,
            hidden_size=backbone.config.hidden_size,
            opt_level=0,
            use_gpu=use_gpu,
            only_onnxruntime=False,
        )
    for path in directory.glob("plain.onnx*"):
        path.unlink()
    return model


def _export_stock(backbone: Backbone, directory: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    export_plain(backbone, directory).save_model_to_file(str(directory / "fp32.onnx"), use_external_data_format=True)
    with quiet_quantiser():
        quantize_dynamic(
            directory / "fp32.onnx",
            directory / "int8.onnx",
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
        )
