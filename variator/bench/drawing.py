"""SVG drawings by matplotlib (imported only when one is drawn): size, style, colours. Used by `bench.plots` and others.

One drawing follows the reader's light or dark scheme: its colours are placeholders that become CSS variables.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, NARROW = (9.4, 4.6), (5.0, 3.7)

# Placeholders that become CSS variables, so that one drawing follows the reader's light or dark scheme.
INK, MUTED, LINE, PAPER = "#010203", "#010204", "#010205", "#010206"
VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)", PAPER: "var(--paper)"}
# Mid-tones: at least 3:1 on white and on the dark background.
SERIES = ("#3a82c8", "#cf7426", "#2c9a72", "#a06ac6", "#cc5562", "#8a7d4f", "#3796a6", "#7c8591")
MARKERS = "osD^vPX*"


def style() -> AbstractContextManager[None]:
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
    found: AbstractContextManager[None] = matplotlib.rc_context(settings)
    return found


def draw(size: tuple[float, float], title: str, paint: Callable[[Axes], None]) -> str:
    """One SVG element; `title` is what a screen reader says, and keeps the ids of several drawings apart."""
    return draw_rows(size, title, (paint,))


def draw_rows(size: tuple[float, float], title: str, paints: Sequence[Callable[[Axes], None]]) -> str:
    """Like `draw`, several over one common axis below."""
    from markupsafe import escape
    from matplotlib.figure import Figure

    figure: Figure = Figure(figsize=size, layout="constrained")
    figure.patch.set_alpha(0)
    for axes, paint in zip(figure.subplots(len(paints), sharex=True, squeeze=False)[:, 0], paints, strict=True):
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


def percent_tick(value: float, _: float) -> str:
    """A share on an axis."""
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
        axes.xaxis.set_major_formatter(percent_tick)
        axes.yaxis.set_major_formatter(percent_tick)
        axes.legend(loc="best", ncols=2)

    with style():
        return standalone(draw(WIDE, title, paint))


def standalone(drawing: str) -> str:
    """A drawing as an SVG file of its own, in the light scheme on white."""
    scheme = {"var(--ink)": "#1d2329", "var(--muted)": "#5c6670", "var(--line)": "#d8dde2", "var(--paper)": "#fff"}
    for variable, colour in scheme.items():
        drawing = drawing.replace(variable, colour)
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    drawing = drawing.replace("<svg", f"<svg {names}", 1)
    return drawing.replace(">", '><rect width="100%" height="100%" fill="#fff"/>', 1) + "\n"
