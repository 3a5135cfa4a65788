"""Copy .jsonl.gz corpora without the rows that hold a sentence of an evaluation set, so that no score is flattered.

    python tools/corpus_without.py EVALUATION.jsonl.gz OUT_DIR FILE.jsonl.gz ...

Sentences are compared in lower case, without punctuation. STS-B's own training split shares 468 single sentences
with its dev split (in other pairs), MRPC's 272.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from pathlib import Path

from variator.training.corpus import TEXT_FIELDS


def sentences(row: dict[str, object]) -> set[str]:
    """The texts of a row, normalised."""
    texts = (row[name] for name in TEXT_FIELDS if isinstance(row.get(name), str))
    return {re.sub(r"\W+", " ", str(text).lower()).strip() for text in texts}


def rows(path: Path) -> list[dict[str, object]]:
    """All rows of a .jsonl.gz file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def main(evaluation: Path, out: Path, corpora: list[Path]) -> None:
    """Write `out/<task>-<file>` for each corpus `<task>/<file>`, the same bytes every time."""
    held_out = {text for row in rows(evaluation) for text in sentences(row)}
    out.mkdir(parents=True, exist_ok=True)
    for path in corpora:
        found = rows(path)
        kept = [row for row in found if not sentences(row) & held_out]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        (out / f"{path.parent.name}-{path.name}").write_bytes(gzip.compress(text.encode(), mtime=0))
        print(f"{path}: {len(found) - len(kept)} of {len(found)} rows left out")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [Path(name) for name in sys.argv[3:]])
