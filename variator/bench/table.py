"""The tables of a benchmark record: for the terminal (`show`), for the README (`markdown`) and for `bench.report`.

Every table is first a `Grid` of finished strings, so that terminal, README and HTML print the same figures. Selections
that tables and plots must agree on (which shape is the largest, which peer is the one to beat, which quality metric
is the main one) live here too. Times are in ms, sizes in bytes, FLOPs are 2 x multiply-accumulates.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from variator.bench.record import PEER, STOCK, Memory, Quality, Record, Result
from variator.bench.wording import (
    MISSING,
    clean,
    count,
    decimal,
    markdown_escape,
    markdown_table,
    percent,
    significant,
    size,
    times,
)
from variator.toolkit.plugin_format import Key, order

UNTRAINED = "UNTRAINED PLUGIN: speed only"
PREFERRED_METRICS = ("spearman", "cosine")
STYLES = {"unstable": "yellow", "untrained": "red", "peer": "dim", "": ""}

Shape = tuple[int, int]
RowKey = tuple[str, str, Key]


@dataclass(frozen=True)
class Row:
    """One line of a table; `mark` is `unstable`, `untrained`, `peer` or empty."""

    cells: tuple[str, ...]
    mark: str = ""


@dataclass(frozen=True)
class Grid:
    """A table of finished strings. The first `labels` columns hold names, all others figures."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    labels: int
    note: str = ""


@dataclass(frozen=True)
class Footprint:
    """Memory of one engine, precision and layout, bytes.

    Args:
        first: Its first ratio alone.
        all: All its ratios, of one task.
        further: Each ratio after the first.
        tasks: Number of tasks that were held, each at all ratios.
        everything: All of them.
        further_task: Each task after the first.
    """

    engine: str
    precision: str
    layout: str
    ratios: tuple[Key, ...]
    first: int | None
    all: int
    further: float | None
    tasks: int
    everything: int
    further_task: float | None


def show(record: Record, console: Console) -> None:
    """Print the record's tables on a console."""
    console.print(render(record))


def render(record: Record) -> RenderableType:
    """The record's tables for the terminal, under one header line."""
    parts: list[RenderableType] = [Text(header(record), style="bold")]
    for grid in grids(record):
        table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
        for index, column in enumerate(grid.columns):
            table.add_column(Text(column), justify="left" if index < grid.labels else "right", overflow="fold")
        for row in grid.rows:
            table.add_row(*map(Text, row.cells), style=STYLES[row.mark])
        # Not rich's own title and caption: those are folded to the width of the table.
        parts += [Text(), Text(grid.title, style="bold"), table, *([Text(grid.note, style="dim")] if grid.note else [])]
    remarks = [clean(note) for note in record.notes]
    if absent := not_measured(record):
        remarks.append(f"Not measured: {', '.join(absent)}.")
    if remarks:
        parts += [Text(), *(Text(remark, style="italic") for remark in remarks)]
    return Group(*parts)


def header(record: Record) -> str:
    """One line: model, real or toy, machine, date."""
    model, machine = record.model, record.machine
    weights = "real weights" if model.real else "TOY: random weights"
    computer = f"{machine.cpu}, {count(machine.cores, 'core')}, {size(machine.memory_bytes)}"
    if machine.gpu:
        computer += f", {machine.gpu} with {size(machine.gpu_memory_bytes)} and CUDA {machine.cuda}"
    return clean(f"{model.id} ({weights}) | {computer}, {machine.system} | {machine.date}")


def grids(record: Record) -> list[Grid]:
    """All tables of the record that have a row; every title is marked where a plugin is untrained."""
    latency = [_latency(record, shape) for shape in shapes(record)]
    layouts = [_layouts(record), _plugging(record)]
    memory = [_memory(record), _gpu_memory(record)]
    latency.append(_on_device(record))
    tables = [*latency, _quality(record), _flops(record), *layouts, *memory, _disk(record), _plugins(record)]
    return [grid for grid in tables if grid.rows]


def markdown(record: Record, chosen: Sequence[Shape] = ()) -> str:
    """The README's table: one row per engine, precision and ratio at the chosen shapes, by default the largest."""
    chosen = list(chosen) or ([largest(shapes(record))] if record.results else [])
    scores = main_quality(record)
    metric = next(iter(scores.values())).metric if scores else ""
    columns = ["engine", "precision", "ratio"]
    for shape in chosen:
        columns += [f"{tokens(shape)} p50 ms", "over ratio 1", "efficiency", "over stock fp32", "over best peer"]
    rows: dict[RowKey, dict[Shape, Result]] = {}
    for row in sorted(record.results, key=_order):
        rows.setdefault(key(row), {})[row.batch, row.sequence] = row
    lines = []
    for found, by_shape in rows.items():
        line = [name(found[0]), found[1], str(found[2])]
        for shape in chosen:
            line += _markdown_cells(record, by_shape.get(shape))
        score = decimal(scores[found].value, 4) if found in scores else MISSING
        lines.append(line + [score] * bool(metric))
    caption = marked(record, markdown_escape(header(record)))
    return f"{caption}\n\n{markdown_table(columns + [metric] * bool(metric), lines, 3)}"


# Selections that tables and plots share -------------------------------------------------------------------------------


def shapes(record: Record) -> list[Shape]:
    """The (batch, sequence) shapes of the results, in the order of measurement."""
    return list(dict.fromkeys((row.batch, row.sequence) for row in record.results))


def largest(candidates: Iterable[Shape]) -> Shape:
    """The shape with most tokens; of equals the one with the longest sequences."""
    return max(candidates, key=lambda shape: (shape[0] * shape[1], shape[1]))


def at(record: Record, shape: Shape) -> list[Result]:
    """The results of one shape, peers last."""
    return sorted((row for row in record.results if (row.batch, row.sequence) == shape), key=_order)


def peer_to_beat(record: Record, shape: Shape) -> Result | None:
    """The fastest peer of a shape, whatever its precision."""
    return min((row for row in at(record, shape) if is_peer(row)), key=lambda row: row.p50_ms, default=None)


def main_quality(record: Record) -> dict[RowKey, Quality]:
    """The scores of one metric on one split: Spearman if there is one, else cosine, else the first metric measured.

    Of several splits the one with most scores is taken, and of equals `test`: it is the one nothing was chosen on.
    """
    metrics = list(dict.fromkeys(row.metric for row in record.quality))
    if not metrics:
        return {}
    metric = next((wanted for wanted in PREFERRED_METRICS if wanted in metrics), metrics[0])
    splits: dict[str, dict[RowKey, Quality]] = {}
    for row in record.quality:
        if row.metric == metric:
            splits.setdefault(row.split, {}).setdefault(key(row), row)
    return max(splits.items(), key=lambda item: (len(item[1]), item[0] == "test"))[1]


def footprints(record: Record) -> list[Footprint]:
    """Memory per engine, precision and layout, from the smallest and the largest sets that were held resident."""
    groups: dict[tuple[str, str, str], list[Memory]] = {}
    for row in record.memory:
        groups.setdefault((row.engine, row.precision, row.layout), []).append(row)
    found = []
    for (engine, precision, layout), rows in groups.items():
        one = [row for row in rows if row.tasks == 1]
        most = max(one, key=lambda row: len(row.ratios))
        first = next((row.pss_bytes for row in one if len(row.ratios) == 1 and row.ratios[0] in most.ratios), None)
        others = len(most.ratios) - 1
        further = (most.pss_bytes - first) / others if first is not None and others > 0 else None
        last = max(rows, key=lambda row: (row.tasks, len(row.ratios)))
        task = (last.pss_bytes - most.pss_bytes) / (last.tasks - 1) if last.tasks > 1 else None
        found.append(
            Footprint(
                engine,
                precision,
                layout,
                tuple(most.ratios),
                first,
                most.pss_bytes,
                further,
                last.tasks,
                last.pss_bytes,
                task,
            )
        )
    return found


def untrained_ratios(record: Record) -> set[Key]:
    """The ratios whose quality means nothing."""
    return {plugin.ratio for plugin in record.plugins if plugin.untrained}


def not_measured(record: Record) -> list[str]:
    """What the record holds nothing about, so that a missing table is not taken for an oversight."""
    peers = [row for row in record.results if is_peer(row)]
    parts = {
        "latency": record.results,
        "peers": peers,
        "quality": record.quality,
        "FLOPs": record.flops,
        "memory": record.memory,
        "disk": record.disk,
    }
    return [part for part, rows in parts.items() if not rows]


def relative_drop(row: Quality) -> float:
    """Share of the reference score that was lost; negative for a gain, NaN without a reference."""
    return (row.reference - row.value) / abs(row.reference) if row.reference else math.nan


def is_peer(row: Result | Quality) -> bool:
    """Whether the row belongs to software without us."""
    return row.engine.startswith(PEER)


def key(row: Result | Quality) -> RowKey:
    """What results and scores are joined by."""
    return row.engine, row.precision, row.ratio


# How things are written -----------------------------------------------------------------------------------------------


def marked(record: Record, title: str) -> str:
    """A title that says so if any plugin of the record is untrained."""
    return f"{title} [{UNTRAINED}]" if untrained_ratios(record) else title


def name(engine: str) -> str:
    """An engine's name; a peer's with a space, where a narrow column can break it."""
    return clean(f"{PEER} {engine.removeprefix(PEER)}" if engine.startswith(PEER) else engine)


def tokens(shape: Shape) -> str:
    """A shape as batch x sequence."""
    return f"{shape[0]}\N{MULTIPLICATION SIGN}{shape[1]}"


def over_peer(row: Result, peer: Result | None) -> float:
    """Speed-up of a row over a peer at the same shape, NaN without one."""
    return peer.p50_ms / row.p50_ms if peer and row.p50_ms > 0 else math.nan


# One function per table -----------------------------------------------------------------------------------------------


def _latency(record: Record, shape: Shape) -> Grid:
    peer = peer_to_beat(record, shape)
    rows = [
        Row(
            (
                name(row.engine),
                clean(row.precision),
                str(row.ratio),
                significant(row.p50_ms),
                significant(row.p90_ms),
                *_gains(row, peer, significant(row.throughput_per_s)),
                MISSING if is_peer(row) else percent(row.efficiency, 0),
                "stable" if row.stable else "unstable",
            ),
            "unstable" if not row.stable else "peer" if is_peer(row) else "",
        )
        for row in at(record, shape)
    ]
    columns = (
        "engine",
        "precision",
        "ratio",
        "p50\nms",
        "p90\nms",
        "over\nratio 1",
        "over\npeer",
        "per\nsecond",
        "FLOPs\nsaved",
        "effi-\nciency",
        "timing",
    )
    note = ""
    if peer:
        note = f"Peer to beat: {name(peer.engine).removeprefix(PEER).strip()} {clean(peer.precision)}"
        note += "." if peer.stable else " (unstable)."
    return Grid(marked(record, f"Latency, batch {shape[0]} of {shape[1]} tokens"), columns, tuple(rows), 2, note)


def _quality(record: Record) -> Grid:
    doubtful = untrained_ratios(record)
    rows = [
        Row(
            (
                name(row.engine),
                clean(row.precision),
                clean(row.metric),
                clean(row.split),
                str(row.ratio),
                decimal(row.value, 4),
                decimal(row.reference, 4),
                percent(relative_drop(row), 2),
            ),
            "untrained" if row.ratio in doubtful else "peer" if is_peer(row) else "",
        )
        for row in record.quality
    ]
    columns = ("engine", "precision", "metric", "split", "ratio", "value", "reference", "relative\ndrop")
    note = "Reference: the uncompressed fp32 backbone on the same data."
    return Grid(marked(record, "Quality"), columns, tuple(rows), 4, note)


def _flops(record: Record) -> Grid:
    rows = [
        Row(
            (
                tokens((row.batch, row.sequence)),
                str(row.ratio),
                *(size(part, "FLOP") for part in (row.attention, row.ffn, row.plugin, row.head, row.total)),
                percent(row.saved),
            )
        )
        for row in sorted(record.flops, key=lambda row: (row.batch * row.sequence, row.sequence, order(row.ratio)))
    ]
    columns = ("shape", "ratio", "attention", "FFN", "plugin", "head", "total", "saved")
    return Grid(marked(record, "FLOPs of one forward pass"), columns, tuple(rows), 1)


def _memory(record: Record) -> Grid:
    rows = [
        Row(
            (
                name(row.engine),
                clean(row.precision),
                clean(row.layout),
                ", ".join(map(str, row.ratios)),
                *(_bytes(figure) for figure in (row.first, row.further, row.all, row.further_task)),
                f"{row.tasks}: {size(row.everything)}" if row.tasks > 1 else MISSING,
            )
        )
        for row in footprints(record)
    ]
    columns = ("engine", "precision", "layout", "ratios", "first\nratio", "per further\nratio", "all\nratios",
               "per further\ntask", "tasks held")  # fmt: skip
    note = "Proportional set size over the empty process. A task is a plugin at every ratio, or a per-ratio bundle."
    return Grid(marked(record, "Memory"), columns, tuple(rows), 4, note)


def _gpu_memory(record: Record) -> Grid:
    rows = [
        Row(
            (
                name(row.engine),
                clean(row.precision),
                clean(row.layout),
                ", ".join(map(str, row.ratios)),
                str(row.tasks),
                size(row.gpu_bytes),
            )
        )
        for row in record.memory
        if row.gpu_bytes is not None
    ]
    columns = ("engine", "precision", "layout", "ratios", "tasks", "GPU memory")
    note = "Free before, less free after all had been loaded and had run: weights, buffers, working memory."
    return Grid(marked(record, "Memory of the GPU"), columns, tuple(rows), 4, note)


def _on_device(record: Record) -> Grid:
    rows = [
        Row(
            (
                name(row.engine),
                clean(row.precision),
                tokens((row.batch, row.sequence)),
                str(row.ratio),
                significant(row.device_ms),
                times(row.speedup),
                MISSING if row.uncaptured_ms is None else significant(row.uncaptured_ms),
                MISSING if row.clock_mhz is None else str(row.clock_mhz),
                "stable" if row.stable else "unstable",
            ),
            "" if row.stable else "unstable",
        )
        for row in record.device
    ]
    columns = ("engine", "precision", "shape", "ratio", "p50 ms", "over\nratio 1", "without captured\ngraphs ms",
               "clock\nMHz", "timing")  # fmt: skip
    note = "CUDA events, tensors on the device from before until after."
    return Grid(marked(record, "On the GPU alone"), columns, tuple(rows), 3, note)


def _bytes(figure: float | None) -> str:
    return MISSING if figure is None else size(figure)


def _layouts(record: Record) -> Grid:
    rows = [
        Row(
            (
                name(row.engine),
                clean(row.precision),
                tokens((row.batch, row.sequence)),
                str(row.ratio),
                significant(row.per_ratio_ms),
                significant(row.shared_ms),
                decimal(row.relative, 3),
                significant(row.switched_ms),
                "stable" if row.stable else "unstable",
            ),
            "" if row.stable else "unstable",
        )
        for row in record.layouts
    ]
    columns = ("engine", "precision", "shape", "ratio", "per-ratio\np50 ms", "shared\np50 ms", "shared /\nper-ratio",
               "shared, after\na switch ms", "timing")  # fmt: skip
    note = "Second run of each turn; after a switch: the first, another ratio having run before."
    return Grid(marked(record, "Layouts: one graph per ratio, or one for all"), columns, tuple(rows), 3, note)


def _plugging(record: Record) -> Grid:
    rows = [
        Row(
            (
                name(row.engine),
                clean(row.precision),
                str(row.ratio),
                size(row.file_bytes),
                *map(significant, (row.idle_p50_ms, row.idle_p99_ms, row.loaded_p50_ms, row.loaded_p99_ms)),
                *map(significant, (row.request_p50_ms, row.request_p99_ms, row.swapped_p50_ms, row.swapped_p99_ms)),
            )
        )
        for row in record.plugging
    ]
    columns = ("engine", "precision", "ratio", "file", "plug\np50 ms", "p99", "under load\np50 ms", "p99",
               "request\np50 ms", "p99", "during plugs\np50 ms", "p99")  # fmt: skip
    note = "From the file to being published. Requests: one client without pause; during plugs another thread plugs."
    return Grid(marked(record, "Plugging in"), columns, tuple(rows), 2, note)


def _disk(record: Record) -> Grid:
    rows = [Row((clean(file), f"{number:,}", size(number))) for file, number in record.disk.items()]
    if rows:
        total = sum(record.disk.values())
        rows.append(Row(("total", f"{total:,}", size(total))))
    return Grid(marked(record, "Disk"), ("file", "bytes", ""), tuple(rows), 1)


def _plugins(record: Record) -> Grid:
    rows = [
        Row(
            (
                str(plugin.ratio),
                str(plugin.rank),
                clean(plugin.activation),
                f"{plugin.parameters:,}",
                percent(plugin.share, 2),
                "UNTRAINED" if plugin.untrained else "trained",
            ),
            "untrained" if plugin.untrained else "",
        )
        for plugin in record.plugins
    ]
    columns = ("ratio", "rank", "activation", "parameters", "share of\nbackbone", "state")
    return Grid(marked(record, "Plugins"), columns, tuple(rows), 0)


def _order(row: Result) -> tuple[bool, str, str, tuple[bool, int, str]]:
    return is_peer(row), row.engine, row.precision, order(row.ratio)


def _markdown_cells(record: Record, row: Result | None) -> list[str]:
    if row is None:
        return [MISSING] * 5
    shape = (row.batch, row.sequence)
    stock = next((r for r in at(record, shape) if (r.engine, r.precision) == STOCK), None)
    own = [MISSING, MISSING] if is_peer(row) else [times(row.speedup), percent(row.efficiency, 0)]
    over = [times(over_peer(row, peer)) for peer in (stock, peer_to_beat(record, shape))]
    return [significant(row.p50_ms) + ("" if row.stable else " (unstable)"), *own, *over]


def _gains(row: Result, peer: Result | None, *between: str) -> list[str]:
    """Speed-up over ratio 1 and over the peer, FLOPs saved; a peer has no ratios to compare and saves nothing."""
    own = [MISSING, MISSING] if is_peer(row) else [times(row.speedup), percent(row.flops_saved)]
    return [own[0], times(over_peer(row, peer)), *between, own[1]]


def layouts_markdown(record: Record) -> str:
    """The README's tables of both layouts: speed, plugging in, and memory; empty without a comparison."""
    grids = [_layouts(record), _plugging(record), _memory(record)] if record.layouts else []
    parts = []
    for grid in grids:
        columns = [column.replace("\n", " ") for column in grid.columns]
        text = markdown_table(columns, [row.cells for row in grid.rows], grid.labels)
        parts.append(f"{markdown_escape(grid.title)}:\n\n{text}\n{markdown_escape(grid.note)}\n")
    return "\n".join(parts)


if __name__ == "__main__":  # python -m variator.bench.table RECORD.json: the tables as the README has them
    from pathlib import Path

    loaded = Record.load(Path(sys.argv[1]))
    print(markdown(loaded), layouts_markdown(loaded), sep="\n", end="")
