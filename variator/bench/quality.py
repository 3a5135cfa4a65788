"""Quality: what a ratio, an engine or a precision costs, on text.

Embeddings: the cosine to the uncompressed fp32 backbone, and Spearman's correlation on STS-B where its file is
at hand. Classifiers: how often the predicted class stays the same. `bench.evaluate` has the scores of tasks.
"""

from __future__ import annotations

from pathlib import Path

from variator.bench.record import Quality
from variator.tasks.read import Split
from variator.tasks.score import correlations, cosines, similarities
from variator.toolkit.plugin_format import Key
from variator.toolkit.rows import Encode

SENTENCES = Path(__file__).parent / "sentences.txt"
"""The package's own sentences, so that every bundle can be judged without any data."""


def sentences() -> list[str]:
    """The package's sentences."""
    return SENTENCES.read_text(encoding="utf-8").splitlines()


class Judge:
    """Scores runners against the uncompressed backbone's outputs on the same texts; `pairs` is a split of STS-B."""

    def __init__(self, task: str, reference: Encode, pairs: Split | None) -> None:
        self._task, self._pairs = task, pairs if task == "embed" else None
        self._texts = sentences()
        self._expected = reference(self._texts)
        self._reference = _spearman(reference, self._pairs) if self._pairs else 0.0

    @staticmethod
    def judges(task: str) -> bool:
        """Whether this task has a score here."""
        return task in ("embed", "classify")

    def score(self, encode: Encode, ratio: Key, engine: str, precision: str) -> list[Quality]:
        """All scores of one runner."""
        found = encode(self._texts)
        if self._task == "classify":
            same = found["logits"].argmax(axis=-1) == self._expected["logits"].argmax(axis=-1)
            return [Quality(ratio, engine, precision, "agreement", "sentences", float(same.mean()), 1.0)]
        cosine = float(cosines(found["embedding"], self._expected["embedding"]).mean())
        scores = [Quality(ratio, engine, precision, "cosine", "sentences", cosine, 1.0)]
        if self._pairs:
            value = _spearman(encode, self._pairs)
            scores.append(Quality(ratio, engine, precision, "spearman", self._pairs.label, value, self._reference))
        return scores


def _spearman(encode: Encode, pairs: Split) -> float:
    gold = [example.label for example in pairs.examples]
    return correlations(similarities(encode, pairs.examples), gold)["spearman"]
