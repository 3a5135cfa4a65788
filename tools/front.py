"""Map what ratio, rank and activation cost and keep: error of the layer-local stage over the FLOPs left of the FFN.

    python tools/front.py MODEL NAME OUT.json CORPUS ...
    python tools/front.py picture OUT.json PICTURE.svg
    python tools/front.py table OUT.json

All settings are fitted side by side on the same batches, from one teacher pass, and so compare at equal data. The
error is that of each layer's own stream, all compressed layers before it included (mean squared error over the
teacher's variance, mean over layers, smoothed over the last steps). Costs count matrix products, rows of 128 tokens.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from variator.bench.drawing import line_picture
from variator.bench.plots import Point, pareto
from variator.bench.record import this_machine
from variator.bench.wording import markdown_table
from variator.files import write_atomically
from variator.toolkit.checkpoint import load_backbone
from variator.toolkit.plugin_format import PluginConfig, SiteSize
from variator.training.budget import layer_flops
from variator.training.corpus import read_corpus
from variator.training.settings import TrainSettings
from variator.training.train import train

STEPS = 400
SEQUENCE = 128
RANKS = {2: (32, 64, 128), 4: (32, 64, 128, 192), 8: (32, 64, 128, 192, 256), 16: (64, 128, 192, 256, 384)}
GRID = [
    *((ratio, 64, "tanh") for ratio in RANKS),
    *((ratio, rank, "gelu") for ratio, ranks in RANKS.items() for rank in ranks),
]


def measure(model: str, name: str, corpora: list[Path], place: Path, steps: int = STEPS) -> dict[str, Any]:
    """The record of a model that is called `name`: a row per setting. An interrupted call goes on from `place`."""
    backbone, corpus = load_backbone(model, None, name), read_corpus(corpora)
    configs = tuple(PluginConfig(k, rank, kind, name=f"front-{kind}-{k}-{rank}") for k, rank, kind in GRID)
    plugins = train(backbone, corpus, TrainSettings(configs, local_steps=steps, steps=0), place)
    whole = layer_flops(backbone.config, SEQUENCE, {})
    ffn = 4.0 * SEQUENCE * backbone.config.hidden_size * backbone.config.intermediate_size
    parameters = sum(tensor.numel() for tensor in backbone.model.parameters())
    rows = []
    for plugin in plugins:
        k, rank, kind = plugin.config.ratio, plugin.config.rank, plugin.config.activation
        saved = whole - layer_flops(backbone.config, SEQUENCE, {"ffn": SiteSize(k, rank)})
        error = sum(plugin.training["layer_errors"]) / backbone.config.layers
        rows.append(
            {
                "ratio": k,
                "rank": rank,
                "activation": kind,
                "ffn_flops_left": round(1 - saved / ffn, 4),
                "flops_saved": round(saved / whole, 4),
                "error": round(error, 5),
                "parameters_added": round(plugin.parameters / parameters, 5),
            }
        )
    return {
        "schema": "variator.front/1",
        "model": backbone.id,
        "machine": asdict(this_machine()),
        "steps": steps,
        "tokens_per_step": TrainSettings(configs).tokens,
        "sequence": SEQUENCE,
        "rows": rows,
    }


def on_front(row: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    """Whether no other setting is at once cheaper and better."""
    return _point(row) in pareto(map(_point, rows))


def _point(row: dict[str, Any]) -> Point:
    return Point(-row["ffn_flops_left"], -row["error"], "")


def table(record: dict[str, Any]) -> str:
    """The record as a Markdown table, cheapest first."""
    rows = sorted(record["rows"], key=lambda row: row["ffn_flops_left"])
    lines = [
        [
            f"{row['ratio']}, {row['rank']}, {row['activation']}",
            f"{row['ffn_flops_left']:.1%}",
            f"{row['flops_saved']:.1%}",
            f"{row['error']:.4f}",
            f"{row['parameters_added']:.1%}",
            "front" if on_front(row, rows) else "",
        ]
        for row in rows
    ]
    return markdown_table(
        ["ratio, rank, activation", "FFN FLOPs left", "FLOPs saved", "error", "parameters added", ""], lines, 1
    )


def picture(record: dict[str, Any]) -> str:
    """The record as an SVG file: a line per rank and activation, its points the ratios."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(record["rows"], key=lambda row: row["ffn_flops_left"]):
        lines.setdefault(f"rank {row['rank']}, {row['activation']}", []).append((row["ffn_flops_left"], row["error"]))
    drawn = {label: ([x for x, _ in points], [y for _, y in points]) for label, points in lines.items()}
    return line_picture(
        drawn, f"{record['model']}: ratio 16, 8, 4, 2", "FFN FLOPs left", "error, share of the variance"
    )


if __name__ == "__main__":
    if sys.argv[1] == "table":
        print(table(json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))), end="")
    elif sys.argv[1] == "picture":
        write_atomically(Path(sys.argv[3]), picture(json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))))
    else:
        output = Path(sys.argv[3])
        fits = output.with_suffix(".fits")
        found = measure(sys.argv[1], sys.argv[2], [Path(name) for name in sys.argv[4:]], fits)
        write_atomically(output, json.dumps(found, indent=1) + "\n")
        shutil.rmtree(fits)
