"""How figures and texts are written, the same in every table, report and page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

MISSING = "-"


def clean(text: str) -> str:
    """Text without line breaks or control characters: a model id must not steer somebody's terminal."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def decimal(value: float, digits: int) -> str:
    """A number with thousands separated, or `-` if it is not finite."""
    return f"{value:,.{digits}f}" if math.isfinite(value) else MISSING


def significant(value: float) -> str:
    """A positive number with about three significant digits and no exponent."""
    return decimal(value, 2 if value < 10 else 1 if value < 100 else 0)


def percent(share: float, digits: int = 1) -> str:
    """A share as a percentage."""
    positive_zero = 0.0
    return f"{decimal(round(100 * share, digits) + positive_zero, digits)} %" if math.isfinite(share) else MISSING


def times(factor: float) -> str:
    """A speed-up."""
    return MISSING if not math.isfinite(factor) else f"{factor:.2f}\N{MULTIPLICATION SIGN}"


def size(number: float, unit: str = "B") -> str:
    """A count of bytes (or of another unit) with a decimal prefix."""
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= factor:
            scaled = number / factor
            return f"{scaled:.{1 if abs(scaled) < 100 else 0}f} {prefix}{unit}"
    return f"{number:.0f} {unit}"


def count(number: int, noun: str) -> str:
    """A number and its noun."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], labels: int) -> str:
    """A Markdown table; the first `labels` columns hold names, all others figures."""
    rule = ["---"] * labels + ["---:"] * (len(columns) - labels)
    return "".join(f"| {' | '.join(map(markdown_escape, line))} |\n" for line in (columns, rule, *rows))


def markdown_escape(text: str) -> str:
    """Text that Markdown prints as it is."""
    return "".join(f"\\{letter}" if letter in "\\|<`[*_" else letter for letter in clean(text))
