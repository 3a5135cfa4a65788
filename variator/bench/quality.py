"""Quality: what a ratio, an engine or a precision costs, on text.

Embeddings: the cosine to the uncompressed fp32 backbone, and Spearman's correlation on STS-B where its file is
at hand. Classifiers: how often the predicted class stays the same.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from variator.bench.record import Quality
from variator.engines.base import Outputs
from variator.errors import CorpusError, VariatorError

SENTENCES = Path(__file__).parent / "sentences.txt"
"""The package's own sentences, so that every bundle can be judged without any data."""

Encode = Callable[[Sequence[str]], Outputs]
"""Texts -> a task's outputs."""


@dataclass(frozen=True)
class Pairs:
    """Sentence pairs with gold similarities, such as STS-B."""

    name: str
    first: list[str]
    second: list[str]
    gold: list[float]


def read_pairs(path: Path) -> Pairs:
    """Read STS-B: .jsonl or .jsonl.gz with `sentence1`, `sentence2` and a float `label`.

    Raises:
        CorpusError: With the row's number.
    """
    pairs = Pairs(f"{path.parent.name}-{path.name.split('.')[0]}", [], [], [])
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for line in file:
                number += 1
                row = json.loads(line)
                pairs.first.append(str(row["sentence1"]))
                pairs.second.append(str(row["sentence2"]))
                pairs.gold.append(float(row["label"]))
    except (OSError, EOFError, ValueError, KeyError, TypeError, zlib.error) as error:
        raise CorpusError(
            f"{path}, line {number}: {type(error).__name__} {error}",
            valid='rows like {"sentence1": "…", "sentence2": "…", "label": 3.5}',
        ) from error
    return pairs


def sentences() -> list[str]:
    """The package's sentences."""
    return SENTENCES.read_text(encoding="utf-8").splitlines()


class Judge:
    """Scores runners against the uncompressed backbone's outputs on the same texts."""

    def __init__(self, task: str, reference: Encode, pairs: Pairs | None) -> None:
        self._task, self._pairs = task, pairs
        self._texts = sentences()
        self._expected = reference(self._texts)
        self._reference_spearman = self._spearman(reference) if pairs and task == "embed" else None

    @staticmethod
    def judges(task: str) -> bool:
        """Whether this task has a score here."""
        return task in ("embed", "classify")

    def score(self, encode: Encode, ratio: int, engine: str, precision: str) -> list[Quality]:
        """All scores of one runner."""
        found = encode(self._texts)
        if self._task == "classify":
            same = found["logits"].argmax(axis=-1) == self._expected["logits"].argmax(axis=-1)
            return [Quality(ratio, engine, precision, "agreement", "sentences", float(same.mean()), 1.0)]
        cosine = float(cosines(found["embedding"], self._expected["embedding"]).mean())
        scores = [Quality(ratio, engine, precision, "cosine", "sentences", cosine, 1.0)]
        if self._pairs and self._reference_spearman is not None:
            value = self._spearman(encode)
            scores.append(
                Quality(ratio, engine, precision, "spearman", self._pairs.name, value, self._reference_spearman)
            )
        return scores

    def _spearman(self, encode: Encode) -> float:
        from scipy.stats import spearmanr

        if self._pairs is None:
            raise VariatorError("no sentence pairs to score")
        similarity = cosines(encode(self._pairs.first)["embedding"], encode(self._pairs.second)["embedding"])
        return float(spearmanr(similarity, self._pairs.gold).statistic)


def cosines(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Cosine of each row of `a` with the same row of `b`: [rows, d] each -> [rows]."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    result: npt.NDArray[np.float32] = (a * b).sum(axis=1) / np.maximum(norms, 1e-12)
    return result
