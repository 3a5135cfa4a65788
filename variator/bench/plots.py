"""The plots of a benchmark record, as inline SVG drawn by matplotlib (imported only when a report is written).

One drawing follows the reader's light or dark scheme: its colours are placeholders that become CSS variables.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from variator.bench import table
from variator.bench.record import PEER, Record, Result
from variator.toolkit.plugin_format import in_order

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, NARROW = (9.4, 4.6), (5.0, 3.7)
MOST_FILES = 10
LONGEST_LABEL = 38

# Placeholders that become CSS variables, so that one drawing follows the reader's light or dark scheme.
INK, MUTED, LINE, PAPER = "#010203", "#010204", "#010205", "#010206"
VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)", PAPER: "var(--paper)"}
# Mid-tones: at least 3:1 on white and on the dark background.
SERIES = ("#3a82c8", "#cf7426", "#2c9a72", "#a06ac6", "#cc5562", "#8a7d4f", "#3796a6", "#7c8591")
MARKERS = "osD^vPX*"

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
    return table.clean(f"{row.engine.removeprefix(PEER)} {row.precision}")


def plots(record: Record) -> list[Plot]:
    """Every plot that the record has data for."""
    painters = (_quality_plot, _speedup_plot, _flops_plot, _length_plot, _training_plot, _size_plot)
    with _style():
        return [plot for painter in painters if (plot := painter(record))]


def _style() -> AbstractContextManager[None]:
    """The house style, while the block runs."""
    import matplotlib

    settings: dict[Any, Any] = {
        "svg.hashsalt": "variator",  # ids must not change from run to run
        "svg.fonttype": "none",
        "text.parse_math": False,
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": LINE,
        "xtick.color": LINE,
        "ytick.color": LINE,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "grid.color": LINE,
        "grid.linewidth": 0.7,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "lines.markersize": 6.5,
    }
    style: AbstractContextManager[None] = matplotlib.rc_context(settings)
    return style


def _draw(size: tuple[float, float], title: str, paint: Callable[[Axes], None]) -> str:
    """One SVG element; `title` is what a screen reader says, and keeps the ids of several drawings apart."""
    from markupsafe import escape
    from matplotlib.figure import Figure

    figure: Figure = Figure(figsize=size, layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    paint(axes)
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = stream.getvalue()
    needless = r'<metadata>.*?</metadata>|<!--.*?-->|\sxmlns(:\w+)?="[^"]*"'  # an HTML parser knows the namespaces
    text = re.sub(needless, "", text[text.index("<svg") :], flags=re.DOTALL)
    slug = re.sub(r"[^a-z0-9]+", "-", title.lower())
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{slug}-", text)
    for placeholder, variable in VARIABLES.items():
        text = text.replace(placeholder, variable)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)


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
        axes.xaxis.set_major_formatter(_percent_tick)
        axes.legend(loc="upper left")

    note = f"Lines: {table.tokens(shape)} tokens; small marks: other shapes. Ideal: 1 / (1 - FLOPs saved)."
    return Plot("Speed-up against FLOPs saved", note, [_draw(NARROW, "Speed-up against FLOPs saved", paint)])


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

    return _draw(NARROW, f"Latency against sequence length: {title}", paint)


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
        axes.set_ylabel(_short(table.clean(f"{score.metric}, {score.split}")))
        axes.margins(0.1, 0.14)
        axes.legend(loc="upper right", ncols=3, bbox_to_anchor=(1, 1.1))
        _label(axes, points, front)

    title = table.marked(record, f"Quality against speed ({table.clean(score.metric)})")
    note = "Up and to the right is better. The step line joins the configurations that no other one beats in both."
    return Plot(title, note, [_draw(WIDE, title, paint)], True)


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
            text = f"{table.percent(row.saved, 0)} saved" if row.saved else ""
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
        axes.xaxis.set_major_formatter(_percent_tick)
        axes.grid(False, axis="y")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, handlelength=1, columnspacing=1.2)

    note = f"{table.tokens(shape)} tokens, counted from the exported graphs."
    return Plot("Where the FLOPs go", note, [_draw(NARROW, "FLOPs per ratio", paint)])


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
            files[MOST_FILES:] = [(table.count(len(rest), "further file"), sum(number for _, number in rest))]
        drawings.append(_bars("Disk", files))
    return Plot("Memory and disk", "Memory is proportional set size.", drawings, True) if drawings else None


def _bars(title: str, values: Sequence[tuple[str, float]]) -> str:
    def paint(axes: Axes) -> None:
        axes.barh(range(len(values)), [number / 1e6 for _, number in values], 0.62, color=SERIES[0])
        for position, (_, number) in enumerate(values):
            axes.annotate(
                table.size(number),
                (max(number, 0) / 1e6, position),
                (5, 0),
                va="center",
                textcoords="offset points",
                fontsize=9,
                color=MUTED,
            )
        axes.set(xlabel="MB", title=title)
        axes.set_yticks(range(len(values)), [_short(table.clean(label)) for label, _ in values])
        axes.invert_yaxis()
        axes.margins(x=0.18)
        axes.grid(False, axis="y")

    return _draw((NARROW[0], 1.3 + 0.34 * len(values)), title, paint)


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
            axes.set(title=table.clean(stage), xlabel="step", ylabel="error of the hidden states", yscale="log")
            axes.legend(loc="upper right")

        return paint

    note = "Mean over layers of the squared error over the teacher's variance, single steps of a noisy curve."
    drawings = [_draw(NARROW, f"Loss of the {stage} stage", panel(stage)) for stage in stages]
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


def _percent_tick(value: float, _: float) -> str:
    return f"{100 * value:.0f} %"


def line_picture(lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str, across: str, up: str) -> str:
    """Lines of shares over shares as an SVG file of its own.

    Args:
        lines: Label -> x and y, each from 0 to 1.
        title, across, up: What is drawn, and over what.
    """

    def paint(axes: Axes) -> None:
        for index, (label, (x, y)) in enumerate(lines.items()):
            colour, marker = SERIES[index % len(SERIES)], MARKERS[index % len(MARKERS)]
            axes.plot(x, y, color=colour, marker=marker, linewidth=1.4, label=label)
        axes.set(title=title, xlabel=across, ylabel=up)
        axes.xaxis.set_major_formatter(_percent_tick)
        axes.yaxis.set_major_formatter(_percent_tick)
        axes.legend(loc="best", ncols=2)

    with _style():
        return standalone(_draw(WIDE, title, paint))


def standalone(drawing: str) -> str:
    """A drawing as an SVG file of its own, in the light scheme on white."""
    scheme = {"var(--ink)": "#1d2329", "var(--muted)": "#5c6670", "var(--line)": "#d8dde2", "var(--paper)": "#fff"}
    for variable, colour in scheme.items():
        drawing = drawing.replace(variable, colour)
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    drawing = drawing.replace("<svg", f"<svg {names}", 1)
    return drawing.replace(">", '><rect width="100%" height="100%" fill="#fff"/>', 1) + "\n"


if __name__ == "__main__":  # python -m variator.bench.plots RECORD.json PICTURE.svg: the picture of the README
    import sys
    from pathlib import Path

    found = plots(Record.load(Path(sys.argv[1])))
    Path(sys.argv[2]).write_text(standalone(found[0].drawings[0]), encoding="utf-8")
