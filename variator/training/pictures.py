"""Pictures as training batches: arrays of pixel values as the model's image processor makes them.

numpy's own files, mapped and never unpickled. As with texts a batch depends on the seed and the step alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from variator.errors import CorpusError
from variator.files import sha256_of
from variator.toolkit.checkpoint import Backbone
from variator.training.batch import Batch


@dataclass(frozen=True)
class Pictures:
    """Files of pictures; every file is drawn equally often, whatever its size."""

    files: tuple[tuple[str, str, npt.NDArray[np.floating[Any]]], ...]
    """Name, sha256 and pixels [pictures, channels, size, size]."""

    def batch(self, backbone: Backbone, seed: str, index: int, tokens: int) -> Batch:
        """The batch of one index: as many pictures of one file as have `tokens` patches, at least one."""
        rng = random.Random(f"{seed}:{index}")
        pixels, patches = rng.choice(self.files)[2], backbone.max_length
        chosen = rng.sample(range(len(pixels)), min(len(pixels), max(1, tokens // patches)))
        values = np.ascontiguousarray(pixels[sorted(chosen)], np.float32)
        if not np.isfinite(values).all():
            raise CorpusError("pixel values that are not finite", valid="finite numbers")
        mask = torch.ones(len(chosen), patches, dtype=torch.int64)
        return Batch(torch.zeros_like(mask), mask, pixels=torch.from_numpy(values))

    def record(self) -> list[dict[str, Any]]:
        """What a plugin's training record says about its data."""
        return [{"file": name, "sha256": digest, "pictures": len(pixels)} for name, digest, pixels in self.files]


def read_pictures(paths: Sequence[Path], backbone: Backbone) -> Pictures:
    """Read .npy files of pixel values for a model.

    Raises:
        CorpusError: For a file that is missing, of another kind, or of pictures that the model does not read.
    """
    if not paths:
        raise CorpusError("no file of pictures given", valid=".npy files")
    return Pictures(tuple((path.name, *_read(path, backbone)) for path in paths))


def _read(path: Path, backbone: Backbone) -> tuple[str, npt.NDArray[np.floating[Any]]]:
    picture = backbone.config.picture
    assert picture is not None
    shape = (picture.channels, picture.size, picture.size)
    try:
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CorpusError(f"cannot read {path}: {error}", valid="a .npy file, as numpy.save writes it") from error
    if not isinstance(pixels, np.ndarray) or not np.issubdtype(pixels.dtype, np.floating):
        raise CorpusError(f"{path} holds no floats", valid="pixel values as the model's image processor scales them")
    if pixels.ndim != 4 or not len(pixels) or pixels.shape[1:] != shape:
        raise CorpusError(f"{path} holds an array {pixels.shape}", valid=f"[pictures, {', '.join(map(str, shape))}]")
    return sha256_of(path), pixels
