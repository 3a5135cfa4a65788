"""How the records of these tools begin, and how they are written."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from variator.bench.record import package_versions, this_machine
from variator.engines.runtime import Runtime
from variator.files import write_atomically


def begun(schema: str, runtime: Runtime | None = None) -> dict[str, Any]:
    """What was measured, where, and with what: the model and the engine are the opened runtime's own."""
    record: dict[str, Any] = {
        "schema": schema,
        "machine": asdict(this_machine()),
        "versions": package_versions(),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "load_average": round(os.getloadavg()[0], 2),
    }
    if runtime is not None:
        built = runtime.built.record
        record |= {
            "model": runtime.bundle.manifest.model,
            "engine": built.backend,
            "precision": built.precision,
        }
    return record


def save(record: Mapping[str, Any], path: Path) -> None:
    """Write a record."""
    write_atomically(path, json.dumps(record, indent=1) + "\n")
