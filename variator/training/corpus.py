"""Text files as training batches: read, cut into pieces, drawn by step number alone.

A batch depends on the seed and the step, not on what was drawn before, so a resumed run sees what an
uninterrupted one would have seen. Called by `training.train`.
"""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from variator.errors import CorpusError
from variator.files import sha256_of
from variator.toolkit.checkpoint import Backbone
from variator.toolkit.rows import Row
from variator.training.batch import Batch, batch_of, fitting

TEXT_FIELDS = (
    "text", "sentence", "sentence1", "sentence2", "question", "question1", "question2",
    "premise", "hypothesis", "query", "passage", "document", "content",
)  # fmt: skip
"""Fields of a .jsonl row that hold text; every one that is present is used."""

SHORTEST_SPAN, LONGEST_SPAN = 32, 128
"""Tokens that a long text is cut into (roughly: cut by characters, at white space)."""

CHARACTERS_PER_TOKEN = 4.5


@dataclass(frozen=True)
class Source:
    """One file's pieces, sorted by length so that neighbours make a batch with little padding."""

    name: str
    sha256: str
    pieces: Sequence[str]


@dataclass(frozen=True)
class Corpus:
    """All files; every file is drawn equally often, whatever its size."""

    sources: tuple[Source, ...]

    def batch(self, backbone: Backbone, seed: str, index: int, tokens: int) -> Batch:
        """The batch of one index: neighbours in length from one file, cut to `LONGEST_SPAN` and the model's limit.

        Args:
            backbone: Whose tokenizer cuts the texts up.
            seed: Of the run and stage.
            index: From 0.
            tokens: Upper bound of rows x length, padding included.
        """
        rng = random.Random(f"{seed}:{index}")
        pieces = rng.choice(self.sources).pieces
        start = rng.randrange(len(pieces))
        drawn: list[str] = []
        # Twice the characters that the budget needs: tokens per character vary, and the surplus is cut below.
        while len(drawn) < tokens // 4 and sum(map(len, drawn)) < 2 * CHARACTERS_PER_TOKEN * tokens:
            drawn.append(pieces[(start + len(drawn)) % len(pieces)])
        limit = min(LONGEST_SPAN, backbone.max_length)
        rows = backbone.tokenizer(drawn, truncation=True, max_length=limit, padding=False)["input_ids"]
        rows = rows[: fitting(map(len, rows), tokens)]
        return batch_of([Row(row, [0] * len(row)) for row in rows], token_types=False)

    def record(self) -> list[dict[str, Any]]:
        """What a plugin's training record says about its data."""
        return [{"file": s.name, "sha256": s.sha256, "pieces": len(s.pieces)} for s in self.sources]


def read_corpus(paths: Sequence[Path], seed: int = 0) -> Corpus:
    """Read .txt (one text per line) and .jsonl files, each also as .gz, as UTF-8.

    Raises:
        CorpusError: For a file that is missing, empty, of another kind or not UTF-8, with the line number.
    """
    if not paths:
        raise CorpusError("no corpus file given", valid=".txt or .jsonl files, also .gz")
    return Corpus(tuple(_read_source(path, seed) for path in paths))


def _read_source(path: Path, seed: int) -> Source:
    rng = random.Random(f"{seed}:{path.name}")
    pieces = [piece for text in _texts(path) for piece in _cut(text, rng)]
    if not pieces:
        raise CorpusError(f"{path} holds no text", valid="at least one non-empty line")
    return Source(path.name, sha256_of(path), sorted(pieces, key=len))


def _texts(path: Path) -> Iterator[str]:
    suffixes = [suffix for suffix in path.suffixes if suffix in (".txt", ".jsonl", ".gz")]
    kind = suffixes[0] if suffixes else ""
    if kind not in (".txt", ".jsonl"):
        raise CorpusError(f"{path} is not a known kind of corpus", valid=".txt, .jsonl, .txt.gz, .jsonl.gz")
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if "\0" in text:
                    raise CorpusError(f"{path}, line {number}: binary data", valid="UTF-8 text")
                if text:
                    yield from [text] if kind == ".txt" else _fields(path, number, text)
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path}, line {number}: not UTF-8 ({error.reason})",
            valid="UTF-8 text",
            fix=f"iconv -f latin1 -t utf-8 {path.name}, if it is Latin-1",
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise CorpusError(f"cannot read {path}: {error}", valid="a readable, undamaged file") from error


def _fields(path: Path, number: int, text: str) -> list[str]:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise CorpusError(f"{path}, line {number}: not JSON ({error})", valid="one JSON object per line") from error
    found = [row[name] for name in TEXT_FIELDS if isinstance(row, dict) and isinstance(row.get(name), str)]
    if not found:
        raise CorpusError(f"{path}, line {number}: no text field", valid=f"one of {', '.join(TEXT_FIELDS)}")
    return [value.strip() for value in found if value.strip()]


def _cut(text: str, rng: random.Random) -> Iterator[str]:
    """Cut a long text into spans of random length at white space; a short one stays whole."""
    longest = int(LONGEST_SPAN * CHARACTERS_PER_TOKEN)
    start = 0
    while len(text) - start > longest:
        wanted = start + int(rng.randint(SHORTEST_SPAN, LONGEST_SPAN) * CHARACTERS_PER_TOKEN)
        end = text.rfind(" ", start + 1, wanted)
        end = wanted if end < 0 else end
        if piece := text[start:end].strip():
            yield piece
        start = end
    rest = text[start:].strip()
    if rest:
        yield rest
