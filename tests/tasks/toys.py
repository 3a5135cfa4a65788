"""Toy tasks in the form of local files, which a toy model can learn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


def write_tasks(directory: Path, train: int = 400, dev: int = 80) -> Path:
    """sst2, rte, stsb and squad of made-up words: the label is whether `w1` or `w2` is said; answers follow `w3`."""
    rng = np.random.default_rng(0)
    for name, count in (("train", train), ("dev", dev)):
        rows: dict[str, list[dict[str, object]]] = {"sst2": [], "rte": [], "stsb": []}
        questions = []
        for _ in range(count):
            words = [f"w{i}" for i in rng.integers(4, 60, rng.integers(3, 12))]
            label = int(rng.integers(2))
            said = [*words, f"w{1 + label}"]
            rng.shuffle(said)
            rows["sst2"].append({"sentence": " ".join(said), "label": label})
            rows["rte"].append({"sentence1": " ".join(said), "sentence2": " ".join(words[:3]), "label": label})
            other = [f"w{i}" for i in rng.integers(4, 60, 6)]
            shared = int(rng.integers(6))
            mixed = " ".join(other[:shared] + words[: 6 - shared])
            rows["stsb"].append({"sentence1": " ".join(other), "sentence2": mixed, "label": shared})
            context = " ".join([*words, "w3", f"w{60 + label}", *words[::-1]])
            answer = {"text": f"w{60 + label}", "answer_start": context.index(f"w{60 + label}")}
            questions.append({"context": context, "qas": [{"question": "w3 w3", "answers": [answer]}]})
        for task, lines in rows.items():
            (directory / task).mkdir(parents=True, exist_ok=True)
            (directory / task / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (directory / "squad").mkdir(exist_ok=True)
        (directory / "squad" / f"{name}.json").write_text(json.dumps({"data": [{"paragraphs": questions}]}))
    return directory
