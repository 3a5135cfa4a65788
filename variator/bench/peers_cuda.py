"""Peers on a GPU: the same checkpoint at ratio 1 as PyTorch and ONNX Runtime run it there in fp16, without us."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from variator.bench.peers import Peer, Plain, export_plain
from variator.bench.resident import upload
from variator.engines.base import Feed
from variator.engines.onnxruntime_cuda import PROVIDER, OnnxRuntimeCudaEngine, session_on_gpu
from variator.errors import VariatorError
from variator.files import directory_written_whole
from variator.toolkit.checkpoint import Backbone
from variator.toolkit.rows import Outputs

if TYPE_CHECKING:
    import onnxruntime


def load_cuda_peers(backbone: Backbone, cache: Path, on_stage: Callable[[str], None]) -> tuple[list[Peer], list[str]]:
    """PyTorch eager with SDPA, `torch.compile`, and ONNX Runtime with its own optimiser for GPUs, all in fp16.

    Args:
        cache: A directory to keep graphs in, beside the bundle's engines.

    Returns:
        The peers, and a note for each that is not here.
    """
    peers: list[Peer] = []
    notes: list[str] = []
    if torch.cuda.is_available():
        model = copy.deepcopy(Plain(backbone)).eval().half().to("cuda")
        torch.backends.cuda.matmul.allow_tf32 = False
        peers.append(_torch_peer("torch-cuda", backbone, model))
        on_stage("torch.compile")
        peers.append(_torch_peer("torch-compile", backbone, torch.compile(model)))
    else:
        notes.append("Not measured: PyTorch on the GPU (torch.cuda is not available).")
    import onnxruntime

    if PROVIDER in onnxruntime.get_available_providers():
        try:
            peers.append(_onnxruntime_peer(backbone, cache, on_stage))
        except VariatorError as error:
            notes.append(f"Not measured: stock ONNX Runtime on the GPU: {error.what}")
    else:
        notes.append(
            f"Not measured: stock ONNX Runtime on the GPU (no {PROVIDER} in the onnxruntime that is installed)."
        )
    return peers, notes


def _torch_peer(name: str, backbone: Backbone, model: Callable[..., tuple[Any, ...]]) -> Peer:
    def on_gpu(feed: Feed) -> dict[str, torch.Tensor]:
        return {key: torch.from_numpy(np.ascontiguousarray(values)).to("cuda") for key, values in feed.items()}

    def run(feed: Feed) -> Outputs:
        with torch.inference_mode():
            results = model(**on_gpu(feed))
        return {key: one.float().cpu().numpy() for key, one in zip(backbone.outputs, results, strict=True)}

    def prepare(feed: Feed) -> Callable[[], float]:
        tensors = on_gpu(feed)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

        def once() -> float:
            with torch.inference_mode():
                start.record()
                model(**tensors)
                end.record()
            end.synchronize()
            return float(start.elapsed_time(end))

        return once

    return Peer(name, "fp16", run, prepare)


def _onnxruntime_peer(backbone: Backbone, cache: Path, on_stage: Callable[[str], None]) -> Peer:
    directory = cache / f"peer-cuda-{backbone.fingerprint[:16]}"
    if not directory.exists():
        on_stage("exporting the peer (stock ONNX Runtime fp16 for CUDA)")
        with directory_written_whole(directory) as partial:
            _export_stock(backbone, partial)
    import onnxruntime

    session: onnxruntime.InferenceSession = session_on_gpu(directory / "fp16.onnx", onnxruntime.SessionOptions())
    engine = OnnxRuntimeCudaEngine(session, "fp16")

    def prepare(feed: Feed) -> Callable[[], float]:
        tensors = upload(feed)
        return lambda: engine.run_on_device(tensors).device_ms

    return Peer("onnxruntime-cuda-stock", "fp16", engine.run, prepare)


def _export_stock(backbone: Backbone, directory: Path) -> None:
    """ONNX Runtime's own optimiser for GPUs, with its own conversion to fp16."""
    model = export_plain(backbone, directory, use_gpu=True)
    model.convert_float_to_float16(keep_io_types=True)
    model.save_model_to_file(str(directory / "fp16.onnx"), use_external_data_format=True)
