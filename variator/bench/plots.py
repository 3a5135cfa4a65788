"""The plots of a benchmark record, as inline SVG for `bench.report`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from variator.bench import table, wording
from variator.bench.drawing import (
    INK,
    MARKERS,
    MUTED,
    NARROW,
    PAPER,
    SERIES,
    WIDE,
    draw,
    percent_tick,
    standalone,
    style,
)
from variator.bench.record import PEER, Record, Result
from variator.toolkit.plugin_format import in_order

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_FILES = 10
LONGEST_LABEL = 38

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Point:
    """One configuration in the quality-speed plane; more is better on both axes."""

    throughput: float
    quality: float
    label: str
    peer: bool = False
    stable: bool = True


@dataclass(frozen=True)
class Plot:
    """A titled group of drawings, each a complete SVG element."""

    title: str
    note: str
    drawings: list[str]
    wide: bool = False


def pareto(points: Iterable[Point]) -> list[Point]:
    """The points that no other point beats in throughput and quality at once, slowest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (-point.throughput, -point.quality)):
        if not front or point.quality > front[-1].quality:
            front.append(point)
    return front[::-1]


def quality_points(record: Record) -> list[Point]:
    """Scores of the main metric joined with the results of the largest shape."""
    scores, doubtful = table.main_quality(record), table.untrained_ratios(record)
    rows = table.at(record, table.largest(table.shapes(record))) if record.results else []
    return [
        Point(
            row.throughput_per_s,
            scores[table.key(row)].value,
            series_of(row) + f" k={row.ratio}" * (not table.is_peer(row)) + " (untrained)" * (row.ratio in doubtful),
            table.is_peer(row),
            row.stable,
        )
        for row in rows
        if table.key(row) in scores and math.isfinite(row.throughput_per_s * scores[table.key(row)].value)
    ]


def series_of(row: Result) -> str:
    return wording.clean(f"{row.engine.removeprefix(PEER)} {row.precision}")


def plots(record: Record) -> list[Plot]:
    """Every plot that the record has data for."""
    painters = (_quality_plot, _speedup_plot, _flops_plot, _length_plot, _training_plot, _size_plot)
    with style():
        return [plot for painter in painters if (plot := painter(record))]


def _speedup_plot(record: Record) -> Plot | None:
    rows = [row for row in record.results if not table.is_peer(row)]
    if not any(row.ratio != 1 for row in rows):
        return None
    shape = table.largest((row.batch, row.sequence) for row in rows)

    def paint(axes: Axes) -> None:
        most = min(0.95, max(row.flops_saved for row in rows) + 0.04)
        steps = [most * step / 60 for step in range(61)]
        axes.plot(steps, [1 / (1 - saved) for saved in steps], color=INK, linestyle="--", linewidth=1.2, label="ideal")
        main = [row for row in rows if (row.batch, row.sequence) == shape]
        ideal = {row.ratio: row.flops_saved for row in main if row.ratio != 1 and row.flops_saved < 1}
        for ratio, saved in ideal.items():
            axes.annotate(
                f"k={ratio}",
                (saved, 1 / (1 - saved)),
                (-4, 5),
                textcoords="offset points",
                ha="right",
                fontsize=9,
                color=MUTED,
            )
        for index, (label, group) in enumerate(_byseries_of(rows).items()):
            others = [row for row in group if row not in main]
            axes.scatter(
                [row.flops_saved for row in others],
                [row.speedup for row in others],
                s=12,
                alpha=0.45,
                color=SERIES[index % len(SERIES)],
                marker=MARKERS[index % len(MARKERS)],
                linewidth=0,
            )
            line = sorted((row for row in group if row in main), key=lambda row: row.flops_saved)
            _curve(axes, line, [row.flops_saved for row in line], [row.speedup for row in line], index, _short(label))
        axes.set(xlabel="FLOPs saved", ylabel="speed-up over ratio 1")
        axes.xaxis.set_major_formatter(percent_tick)
        axes.legend(loc="upper left")

    note = f"Lines: {table.tokens(shape)} tokens; small marks: other shapes. Ideal: 1 / (1 - FLOPs saved)."
    return Plot("Speed-up against FLOPs saved", note, [draw(NARROW, "Speed-up against FLOPs saved", paint)])


def _length_plot(record: Record) -> Plot | None:
    drawings = []
    for label, rows in _byseries_of(row for row in record.results if not table.is_peer(row)).items():
        lengths: dict[int, set[int]] = {}
        for row in rows:
            lengths.setdefault(row.batch, set()).add(row.sequence)
        batch = max(lengths, key=lambda size: (len(lengths[size]), size))
        if len(lengths[batch]) > 1:
            same = [row for row in rows if row.batch == batch]
            drawings.append(_length_panel(record, f"{label}, batch {batch}", same))
    return Plot("Latency against sequence length", "Both axes are logarithmic.", drawings, True) if drawings else None


def _length_panel(record: Record, title: str, rows: list[Result]) -> str:
    from matplotlib.ticker import LogLocator

    lengths = sorted({row.sequence for row in rows})

    def paint(axes: Axes) -> None:
        peers = [peer for length in lengths if (peer := table.peer_to_beat(record, (rows[0].batch, length)))]
        if peers:
            axes.plot(
                [row.sequence for row in peers],
                [row.p50_ms for row in peers],
                color=MUTED,
                linestyle="--",
                linewidth=1.2,
                label="fastest peer",
            )
        for index, ratio in enumerate(in_order({row.ratio for row in rows})):
            line = sorted((row for row in rows if row.ratio == ratio), key=lambda row: row.sequence)
            _curve(axes, line, [row.sequence for row in line], [row.p50_ms for row in line], index, f"k={ratio}")
        axes.set(xscale="log", yscale="log", xlabel="tokens per sequence", ylabel="p50, ms", title=_short(title))
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()
        axes.legend(loc="upper left")

    return draw(NARROW, f"Latency against sequence length: {title}", paint)


def _quality_plot(record: Record) -> Plot | None:
    points = quality_points(record)
    if not points:
        return None
    score = next(iter(table.main_quality(record).values()))
    shape = table.tokens(table.largest(table.shapes(record)))

    def paint(axes: Axes) -> None:
        front = pareto(points)
        axes.plot(
            [point.throughput for point in front],
            [point.quality for point in front],
            drawstyle="steps-pre",
            color=SERIES[2],
            linewidth=1.6,
            label="Pareto front",
            zorder=2,
        )
        for peer, colour, marker, label in ((False, SERIES[0], "o", "variator"), (True, SERIES[1], "D", "peer")):
            group = [point for point in points if point.peer == peer]
            if group:
                axes.scatter(
                    [point.throughput for point in group],
                    [point.quality for point in group],
                    s=36,
                    marker=marker,
                    edgecolor=colour,
                    linewidth=1.3,
                    label=label,
                    zorder=3,
                    color=[colour if point.stable else PAPER for point in group],
                )
        axes.set_xlabel(f"sequences per second at {shape} tokens")
        axes.set_ylabel(_short(wording.clean(f"{score.metric}, {score.split}")))
        axes.margins(0.1, 0.14)
        axes.legend(loc="upper right", ncols=3, bbox_to_anchor=(1, 1.1))
        _label(axes, points, front)

    title = table.marked(record, f"Quality against speed ({wording.clean(score.metric)})")
    note = "Up and to the right is better. The step line joins the configurations that no other one beats in both."
    return Plot(title, note, [draw(WIDE, title, paint)], True)


def _label(axes: Axes, points: Sequence[Point], front: Sequence[Point]) -> None:
    """Write each point's label where it covers least of the other labels, the points and the front."""
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]
    window, unit = axes.get_window_extent(), float(axes.figure.dpi) / 72
    centres = axes.transData.transform([(point.throughput, point.quality) for point in points])
    corners = axes.transData.transform([(point.throughput, point.quality) for point in front])
    taken: list[Box] = [(x - 5 * unit, y - 5 * unit, x + 5 * unit, y + 5 * unit) for x, y in centres]
    for (left, high), (right, low) in itertools.pairwise(corners):
        taken += [(left, low, left, high), (left, low, right, low)]

    def cost(box: Box) -> float:
        hits = [box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken]
        outside = box[0] < window.x0 or box[2] > window.x1 or box[1] < window.y0 or box[3] > window.y1
        return float(sum(hits) + 3 * bool(outside))

    for point, (x, y) in zip(points, centres, strict=True):
        label = _short(point.label)
        width, height = 4.9 * len(label) * unit, 9 * unit
        sides = [(side, up) for up in (0, 1, -1, 2, -2) for side in (0, -1, -0.5)]
        boxes = [
            (left, low, left + width, low + height)
            for side, up in sides
            for left, low in [(x + side * width + (7 + 14 * side) * unit, y + up * 11 * unit - height / 2)]
        ]
        best = min(boxes, key=cost)
        taken.append(best)
        offset = (best[0] - x) / unit, (best[1] - y) / unit + 1.5
        axes.annotate(
            label, (point.throughput, point.quality), offset, textcoords="offset points", fontsize=8.5, color=MUTED
        )


def _flops_plot(record: Record) -> Plot | None:
    if not record.flops:
        return None
    shape = table.largest((row.batch, row.sequence) for row in record.flops)
    rows = sorted((row for row in record.flops if (row.batch, row.sequence) == shape), key=lambda row: row.total)
    parts = ("attention", "ffn", "plugin", "head")

    def paint(axes: Axes) -> None:
        whole = max(row.total for row in rows) or 1
        left = [0.0] * len(rows)
        for index, part in enumerate(parts):
            widths = [getattr(row, part) / whole for row in rows]
            label = {"ffn": "FFN"}.get(part, part)
            axes.barh([f"k={row.ratio}" for row in rows], widths, 0.62, left, color=SERIES[index], label=label)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        for position, row in enumerate(rows):
            text = f"{wording.percent(row.saved, 0)} saved" if row.saved else ""
            axes.annotate(
                text,
                (left[position], position),
                (5, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                color=MUTED,
            )
        axes.set(xlabel="share of the largest total", xlim=(0, 1.02))
        axes.xaxis.set_major_formatter(percent_tick)
        axes.grid(False, axis="y")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, handlelength=1, columnspacing=1.2)

    note = f"{table.tokens(shape)} tokens, counted from the exported graphs."
    return Plot("Where the FLOPs go", note, [draw(NARROW, "FLOPs per ratio", paint)])


def _size_plot(record: Record) -> Plot | None:
    drawings = []
    held = table.footprints(record)
    several = len({row.layout for row in held}) > 1
    further = [
        (f"{row.engine} {row.precision}" + f" {row.layout}" * several, row.further)
        for row in held
        if row.further is not None
    ]
    if further:
        drawings.append(_bars("Memory per further ratio", further))
    if record.disk:
        files: list[tuple[str, float]] = sorted(record.disk.items(), key=lambda item: -item[1])
        rest = files[MOST_FILES:]
        if rest:
            files[MOST_FILES:] = [(wording.count(len(rest), "further file"), sum(number for _, number in rest))]
        drawings.append(_bars("Disk", files))
    return Plot("Memory and disk", "Memory is proportional set size.", drawings, True) if drawings else None


def _bars(title: str, values: Sequence[tuple[str, float]]) -> str:
    def paint(axes: Axes) -> None:
        axes.barh(range(len(values)), [number / 1e6 for _, number in values], 0.62, color=SERIES[0])
        for position, (_, number) in enumerate(values):
            axes.annotate(
                wording.size(number),
                (max(number, 0) / 1e6, position),
                (5, 0),
                va="center",
                textcoords="offset points",
                fontsize=9,
                color=MUTED,
            )
        axes.set(xlabel="MB", title=title)
        axes.set_yticks(range(len(values)), [_short(wording.clean(label)) for label, _ in values])
        axes.invert_yaxis()
        axes.margins(x=0.18)
        axes.grid(False, axis="y")

    return draw((NARROW[0], 1.3 + 0.34 * len(values)), title, paint)


def _training_plot(record: Record) -> Plot | None:
    """Loss curves of the plugins, stage by stage."""
    curves = {
        plugin.ratio: [point for point in plugin.training.get("losses", []) if len(point) == 3 and point[2] > 0]
        for plugin in record.plugins
    }
    curves = {ratio: points for ratio, points in curves.items() if len(points) > 1}
    if not curves:
        return None
    stages = list(dict.fromkeys(stage for points in curves.values() for stage, _, _ in points))

    def panel(stage: str) -> Callable[[Axes], None]:
        def paint(axes: Axes) -> None:
            for index, (ratio, points) in enumerate(curves.items()):
                steps = [step for at, step, _ in points if at == stage]
                losses = [loss for at, _, loss in points if at == stage]
                axes.plot(steps, losses, color=SERIES[index % len(SERIES)], linewidth=1.2, label=f"k={ratio}")
            axes.set(title=wording.clean(stage), xlabel="step", ylabel="error of the hidden states", yscale="log")
            axes.legend(loc="upper right")

        return paint

    note = "Mean over layers of the squared error over the teacher's variance, single steps of a noisy curve."
    drawings = [draw(NARROW, f"Loss of the {stage} stage", panel(stage)) for stage in stages]
    return Plot("How the plugins were trained", note, drawings, True)


def _curve(axes: Axes, rows: Sequence[Result], x: Sequence[float], y: Sequence[float], index: int, label: str) -> None:
    """A line with markers; the markers of unstable rows are hollow."""
    colour, marker = SERIES[index % len(SERIES)], MARKERS[index % len(MARKERS)]
    axes.plot(x, y, color=colour, marker=marker, linewidth=1.4, label=label)
    shaky = [position for position, row in enumerate(rows) if not row.stable]
    axes.plot(
        [x[position] for position in shaky],
        [y[position] for position in shaky],
        color=colour,
        marker=marker,
        linestyle="none",
        markerfacecolor=PAPER,
    )


def _byseries_of(rows: Iterable[Result]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for row in rows:
        groups.setdefault(series_of(row), []).append(row)
    return groups


def _short(text: str) -> str:
    """A label that leaves room for the drawing."""
    return text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL - 11]}\N{HORIZONTAL ELLIPSIS}{text[-10:]}"


if __name__ == "__main__":  # python -m variator.bench.plots RECORD.json PICTURE.svg: the picture of the README
    import sys
    from pathlib import Path

    found = plots(Record.load(Path(sys.argv[1])))
    Path(sys.argv[2]).write_text(standalone(found[0].drawings[0]), encoding="utf-8")
