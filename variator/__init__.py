"""variator: compression plugins that make frozen Transformer encoders faster, compiled for deployment.

The verbs are `export`, `build`, `bench`, `replay`, `train` and `Runtime`; they are imported on first use, so that
serving a bundle loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Runtime": "variator.engines.runtime",
    "build": "variator.engines.build",
    "bench": "variator.bench.run",
    "export": "variator.exporters.export",
    "ExportSettings": "variator.exporters.export",
    "train": "variator.training.train",
    "TrainSettings": "variator.training.settings",
    "load_backbone": "variator.toolkit.checkpoint",
    "read_corpus": "variator.training.corpus",
    "PluginConfig": "variator.toolkit.plugin_format",
    "Plugin": "variator.toolkit.plugin_file",
    "Head": "variator.toolkit.plugin_file",
    "load_plugin": "variator.toolkit.plugin_file",
    "save_plugin": "variator.toolkit.plugin_file",
    "Bundle": "variator.toolkit.bundle",
    "ServeSettings": "variator.engines.serving",
    "GenerateSettings": "variator.engines.generation",
    "replay": "variator.bench.replay",
    "ReplaySettings": "variator.bench.replay",
    "VariatorError": "variator.errors",
    "DeadlineExceeded": "variator.errors",
    "Overloaded": "variator.errors",
}
__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'variator' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
