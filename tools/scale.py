"""How cost grows with the model: FLOPs saved, plugin share, time and memory of an export, and speed where it runs.

    python -m tools.scale measure OUT.json WORK [SIZE …]
    python -m tools.scale table OUT.json
    python -m tools.scale picture OUT.json PICTURE.svg

Random weights of the usual sizes (`toolkit.random_models`). Sizes in `RUN` are exported as usual, in fp32, T5 with its
encoder alone, and timed at 8 x 128; those in `STREAMED` are exported whole with low memory, in bf16, from bf16 shards;
those in `TRACED` are traced with placeholders, because this disk would not hold them. FLOPs and parameters are counted
from the sizes, as `training.budget` does; the tests compare that with the graphs. What is in OUT.json is kept.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tools.record import begun, save
from variator.bench.drawing import MARKERS, SERIES, draw_rows, standalone, style
from variator.bench.wording import markdown_table
from variator.exporters.graph import OPSET, Compressed, trace
from variator.files import write_atomically
from variator.toolkit.checkpoint import Model
from variator.toolkit.encoder import Encoder, EncoderConfig
from variator.toolkit.families import family_of
from variator.toolkit.heads import HiddenHead
from variator.toolkit.plugin import initial_tensors
from variator.toolkit.plugin_file import Plugin
from variator.toolkit.plugin_format import PluginConfig, tensor_shapes
from variator.toolkit.random_models import random_config, write_random_shards
from variator.toolkit.stream import placeholders
from variator.training.budget import layer_flops

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RUN = ("minilm", "bert-base", "bert-large", "t5-base", "t5-large")
STREAMED = ("t5-3b",)
TRACED = ("t5-11b",)
RATIOS = (2, 4, 8)
SEQUENCE = 128
SHAPE = "8x128"
SCHEMA = "variator.scale/1"


def sizes_of(size: str) -> EncoderConfig:
    """Of the encoder."""
    config = random_config(size)
    return family_of(config.model_type).encoder_config(config)


def parameters_of(size: str) -> int:
    """Of the whole model, a decoder and a table of the vocabulary once included."""
    import transformers

    config = random_config(size)
    auto = transformers.AutoModelForSeq2SeqLM if size.startswith("t5") else transformers.AutoModel
    with torch.device("meta"):
        return sum(one.numel() for one in auto.from_config(config).parameters())


def counted(size: str) -> dict[str, Any]:
    """What the sizes alone say."""
    sizes = sizes_of(size)
    whole = layer_flops(sizes, SEQUENCE, {})
    plugins = {ratio: PluginConfig(ratio) for ratio in RATIOS}
    added = {
        ratio: sum(_product(shape) for shape in tensor_shapes(plugin, sizes.hidden_size, sizes.layers).values())
        for ratio, plugin in plugins.items()
    }
    total = parameters_of(size)
    return {
        "parameters": total,
        "layers": sizes.layers,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "encoder_gflops": round(sizes.layers * whole / 1e9, 3),
        "saved": {
            ratio: round(1 - layer_flops(sizes, SEQUENCE, plugin.sites(0)) / whole, 4)
            for ratio, plugin in plugins.items()
        },
        "plugin_parameters": added,
        "plugin_share": {ratio: round(count / total, 5) for ratio, count in added.items()},
    }


def _product(shape: Sequence[int]) -> int:
    found = 1
    for one in shape:
        found *= one
    return found


def watched(command: list[str]) -> dict[str, Any]:
    """Run a command: its seconds, and the most memory that it held at once."""
    print(" ".join(command), file=sys.stderr, flush=True)
    started = time.perf_counter()
    process = os.posix_spawn(command[0], command, dict(os.environ))
    _, status, usage = os.wait4(process, 0)
    if status:
        sys.exit(f"failed: {' '.join(command)}")
    return {"seconds": round(time.perf_counter() - started, 1), "peak_bytes": usage.ru_maxrss * 1024}


def variator(*arguments: str) -> list[str]:
    """A command line."""
    return [sys.executable, "-m", "variator", *arguments]


def bytes_in(directory: Path, suffix: str = "") -> int:
    """Of the files in a flat directory."""
    return sum(path.stat().st_size for path in directory.iterdir() if path.is_file() and path.name.endswith(suffix))


def run(size: str, work: Path, options: Sequence[str] = ()) -> dict[str, Any]:
    """Export as usual, build and time."""
    bundle, record = work / size, work / f"{size}.json"
    ratios = [part for ratio in RATIOS for part in ("--ratio", str(ratio))]
    task = ["--task", "hidden"] if size.startswith("t5") else []
    export = watched(
        variator("export", f"random:{size}", *ratios, *task, "--untrained", "-o", str(bundle), "--overwrite")
    )
    speed = {}
    for engine, precision in (("onnxruntime", "fp32"), ("openvino", "bf16")):
        watched(variator("build", str(bundle), "--engine", engine, "--precision", precision, "--no-calibrate"))
    watched(
        variator(
            "bench", str(bundle), "--shapes", SHAPE, "--ratio", "4", "--no-memory", "--no-quality", *options,
            "--json", str(record),
        )
    )  # fmt: skip
    for row in json.loads(record.read_text(encoding="utf-8"))["results"]:
        if row["ratio"] == 4:
            speed[f"{row['engine']} {row['precision']}"] = {
                name: row[name] for name in ("speedup", "p50_ms", "runs", "stable", "batch", "sequence")
            }
    found = {"mode": "as usual, fp32" + (", encoder alone" if task else ""), **export, "bundle_bytes": bytes_in(bundle)}
    shutil.rmtree(bundle)
    return {"export": found, "speed_up_at_4": speed}


def streamed(size: str, work: Path) -> dict[str, Any]:
    """Export with low memory, from shards."""
    model, bundle = work / f"{size}-model", work / size
    if not (model / "tokenizer.json").exists():
        write_random_shards(size, model)
    ratios = [part for ratio in RATIOS for part in ("--ratio", str(ratio))]
    export = watched(
        variator("export", str(model), "--name", f"random-{size}", *ratios, "--untrained", "--low-memory",
                 "--precision", "bf16", "-o", str(bundle), "--overwrite")
    )  # fmt: skip
    found = {
        "mode": "low memory, bf16, with decoder",
        **export,
        "checkpoint_bytes": bytes_in(model, ".safetensors"),
        "bundle_bytes": bytes_in(bundle),
    }
    shutil.rmtree(bundle)
    shutil.rmtree(model)
    return {"export": found}


def traced(size: str) -> dict[str, Any]:
    """Trace the encoder at ratio 4 with placeholders."""
    sizes, config = sizes_of(size), PluginConfig(4)
    with torch.device("meta"):
        encoder = Encoder(sizes)
    placeholders(encoder, lambda name: torch.zeros(encoder.state_dict()[name].shape))
    tensors = {name: one.numpy() for name, one in initial_tensors(config, sizes.hidden_size, sizes.layers).items()}
    plugin = Plugin(config, tensors, "t5", sizes.layers, sizes.hidden_size, "")
    started = time.perf_counter()
    model = Model(encoder, HiddenHead()).eval().requires_grad_(False)
    graph = trace(Compressed(model, plugin), ("input_ids", "attention_mask"), ("last_hidden_state",), OPSET)
    return {
        "export": {
            "mode": "traced alone, one ratio",
            "seconds": round(time.perf_counter() - started, 1),
            "nodes": len(list(graph.graph)),
        }
    }


def measure(out: Path, work: Path, sizes: Sequence[str]) -> None:
    """All sizes, or those named; what is there already is kept."""
    work.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"rows": {}}
    record |= begun(SCHEMA)
    for size in sizes or (*RUN, *STREAMED, *TRACED):
        row = counted(size)
        row |= run(size, work) if size in RUN else streamed(size, work) if size in STREAMED else traced(size)
        record["rows"][size] = row
        save(record, out)


def table(record: dict[str, Any]) -> str:
    """In Markdown."""
    rows = []
    for size, row in sorted(record["rows"].items(), key=lambda item: item[1]["parameters"]):
        export, speed = row["export"], row.get("speed_up_at_4", {})
        peak = f"{export['peak_bytes'] / 1e9:.2f}" if "peak_bytes" in export else "–"
        saved = [f"{100 * row['saved'][ratio]:.1f} %" for ratio in ("2", "4", "8")]
        speeds = [
            f"{speed[one]['speedup']:.2f}" if one in speed else "–" for one in ("onnxruntime fp32", "openvino bf16")
        ]
        share = f"{100 * row['plugin_share']['4']:.2f} %"
        parameters = f"{row['parameters'] / 1e6:,.0f} M"
        rows.append([size, parameters, *saved, share, export["mode"], f"{export['seconds']:.0f}", peak, *speeds])
    head = ("size", "parameters", "saved k=2", "k=4", "k=8", "plugin k=4", "export", "s", "peak GB", "ORT fp32 k=4",
            "OpenVINO bf16 k=4")  # fmt: skip
    return markdown_table(head, rows, 1)


def picture(record: dict[str, Any]) -> str:
    """What is saved, and what an export takes, over the number of parameters."""
    rows = sorted(record["rows"].items(), key=lambda item: item[1]["parameters"])
    millions = [row["parameters"] / 1e6 for _, row in rows]

    def saved(axes: Axes) -> None:
        for index, ratio in enumerate(RATIOS):
            share = [100 * row["saved"][str(ratio)] for _, row in rows]
            axes.plot(millions, share, color=SERIES[index], marker=MARKERS[index], label=f"k = {ratio}")
        axes.set(xscale="log", ylabel="encoder FLOPs saved, %", title=f"rows of {SEQUENCE} tokens, rank 64")
        axes.legend(loc="best")

    def memory(axes: Axes) -> None:
        known = [
            (at, row["export"]) for at, (_, row) in zip(millions, rows, strict=True) if "peak_bytes" in row["export"]
        ]
        peaks = [export["peak_bytes"] / 1e9 for _, export in known]
        axes.plot(
            [at for at, _ in known], peaks, color=SERIES[3], marker="o", linestyle="none", label="peak of an export"
        )
        low = [index for index, (_, export) in enumerate(known) if "low memory" in export["mode"]]
        for index in low:
            axes.annotate("low memory", (known[index][0], peaks[index]), textcoords="offset points", xytext=(-8, 8),
                          ha="right")  # fmt: skip
        axes.set(xscale="log", xlabel="parameters, millions", ylabel="peak memory of an export, GB")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_ylim(bottom=0)

    with style():
        return standalone(draw_rows((9.4, 6.0), "How cost grows with the model", [saved, memory]))


def main() -> None:
    """See the module."""
    verb, out, *rest = sys.argv[1:]
    if verb == "measure":
        measure(Path(out), Path(rest[0]), rest[1:])
        return
    record = json.loads(Path(out).read_text(encoding="utf-8"))
    if verb == "table":
        print(table(record))
    else:
        write_atomically(Path(rest[0]), picture(record))


if __name__ == "__main__":
    main()
