"""Shape profiles: the ranges of batch and length that an engine with dynamic shapes is compiled for."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from variator.errors import EngineError, InputError

MAX_BATCH = 32
"""Rows per run of the default profiles."""

LENGTHS = (32, 64, 128, 256, 512)
"""Longest rows of the default profiles, up to the model's limit."""

_SHAPE = re.compile(r"([1-9]\d{0,5})x([1-9]\d{0,5})")


@dataclass(frozen=True, order=True)
class Shape:
    """Rows by tokens."""

    batch: int
    length: int

    def within(self, other: Shape) -> bool:
        """Whether neither number is larger than the other shape's."""
        return self.batch <= other.batch and self.length <= other.length

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}"


@dataclass(frozen=True)
class ShapeProfile:
    """A range of shapes, and the one in it that an engine is tuned for.

    Raises:
        InputError: Unless minimum ≤ optimum ≤ maximum in both numbers.
    """

    minimum: Shape
    optimum: Shape
    maximum: Shape

    def __post_init__(self) -> None:
        if not (self.minimum.within(self.optimum) and self.optimum.within(self.maximum)):
            raise InputError(
                f"profile {self} is no range",
                valid="MIN:OPT:MAX with MIN ≤ OPT ≤ MAX in batch and in length, 1x1:8x64:32x128",
            )

    def holds(self, shape: Shape) -> bool:
        """Whether the shape lies in the range."""
        return self.minimum.within(shape) and shape.within(self.maximum)

    @property
    def corners(self) -> list[Shape]:
        """Fewest and most rows by shortest and longest, and the shape it is tuned for."""
        edges = (self.minimum, self.maximum)
        return [*(Shape(a.batch, b.length) for a in edges for b in edges), self.optimum]

    def __str__(self) -> str:
        return f"{self.minimum}:{self.optimum}:{self.maximum}"


def parse_profiles(texts: Iterable[str], limit: int) -> tuple[ShapeProfile, ...]:
    """Read profiles: `MIN:OPT:MAX` with shapes as `8x128` (rows x tokens), several of them apart by commas.

    Args:
        limit: The model's longest row in tokens.

    Raises:
        InputError: For another form, a range that is none, one twice, or one beyond the limit.
    """
    found: list[ShapeProfile] = []
    for text in (part.strip() for whole in texts for part in whole.split(",")):
        shapes = [_SHAPE.fullmatch(part.strip()) for part in text.split(":")]
        if len(shapes) != 3 or not all(shapes):
            raise InputError(
                f"profile {text!r} cannot be read", valid="MIN:OPT:MAX, rows x tokens each: 1x1:8x64:32x128"
            )
        profile = ShapeProfile(*(Shape(*map(int, match.groups())) for match in shapes if match))
        if profile.maximum.length > limit:
            raise InputError(
                f"profile {profile} is for rows of {profile.maximum.length} tokens",
                valid=f"up to {limit}, the model's limit",
            )
        if profile in found:
            raise InputError(f"profile {profile} is given twice", fix="give it once")
        found.append(profile)
    return tuple(found)


def default_profiles(limit: int) -> tuple[ShapeProfile, ...]:
    """One profile per length of `LENGTHS` below the model's limit, and one for the limit."""
    lengths = [*(length for length in LENGTHS if length < limit), limit]
    return tuple(ShapeProfile(Shape(1, 1), Shape(8, length), Shape(MAX_BATCH, length)) for length in lengths)


def most_rows(profiles: Sequence[ShapeProfile], length: int) -> int:
    """The most rows of a length that one run may have; without profiles there is no limit, nor if none holds it."""
    held = [profile.maximum.batch for profile in profiles if profile.minimum.length <= length <= profile.maximum.length]
    return max(held, default=sys.maxsize)


def hold(profiles: Sequence[ShapeProfile], shape: Shape) -> bool:
    """Whether an engine with these profiles takes a shape; without any it takes every one."""
    return not profiles or any(profile.holds(shape) for profile in profiles)


def tightest(profiles: Sequence[ShapeProfile], batch: int, length: int) -> int:
    """Index of the smallest profile that holds a shape.

    Raises:
        EngineError: If none does; names them.
    """
    shape = Shape(batch, length)
    fitting = [index for index, profile in enumerate(profiles) if profile.holds(shape)]
    if not fitting:
        raise EngineError(
            f"no profile of the engine holds {shape} (rows x tokens)",
            valid=", ".join(map(str, profiles)),
            fix="send fewer or shorter rows, or build with --profile MIN:OPT:MAX that holds it",
        )
    return min(fitting, key=lambda index: (profiles[index].maximum.length, profiles[index].maximum.batch))
