"""What a request wants beside its answer: the same of every protocol, whose headers, bodies and parameters say it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from variator.engines.runtime import AUTO
from variator.errors import InputError
from variator.toolkit.plugin_format import Key, parse_key


@dataclass(frozen=True)
class Asked:
    """What a request wants beside its answer, as text fields of a protocol give it.

    Args:
        ratio: A ratio or a setting's name; `auto` follows the load.
        slo_ms, min_ratio, max_ratio, min_quality, truncate: As for `Server.submit`.
    """

    ratio: str | int = AUTO
    slo_ms: float | None = None
    min_ratio: str | int | None = None
    max_ratio: str | int | None = None
    min_quality: float | None = None
    truncate: bool = False

    def options(self, ratios: Sequence[Key]) -> dict[str, Any]:
        """Arguments of `Server.submit`.

        Args:
            ratios: That are served.

        Raises:
            InputError: For a ratio that is not served, or bounds beside a fixed one.
        """
        bounds: dict[str, Any] = {"min_ratio": self.min_ratio, "max_ratio": self.max_ratio}
        keys = {name: None if one is None else _served(one, name, ratios) for name, one in bounds.items()}
        if self.ratio != AUTO:
            fixed = _served(self.ratio, "ratio", [AUTO, *ratios])
            bounds["min_quality"] = self.min_quality
            if named := [name for name, one in bounds.items() if one is not None]:
                raise InputError(f"{named[0]} with ratio {fixed}", valid=f"{named[0]} with ratio {AUTO}")
            keys = {"min_ratio": fixed, "max_ratio": fixed}
        return {"slo_ms": self.slo_ms, "truncate": self.truncate, "min_quality": self.min_quality, **keys}


def _served(ratio: str | int, what: str, ratios: Sequence[Key]) -> Key:
    with contextlib.suppress(InputError):
        if (key := parse_key(ratio)) in ratios:
            return key
    raise InputError(f"{what} {str(ratio)[:40]!r}", valid=", ".join(map(str, ratios)))


FIELDS = tuple(field.name for field in fields(Asked))
"""What can be asked for."""


def asked_from(given: Mapping[str, Any], defaults: Asked | None = None) -> Asked:
    """What the fields of a protocol ask for; those that are missing are left as they are.

    Raises:
        InputError: For a value of the wrong kind.
    """
    found = {name: given[name] for name in FIELDS if given.get(name) is not None}
    for name in ("slo_ms", "min_quality"):
        if name in found:
            found[name] = _number(found[name], name)
    if not isinstance(found.get("truncate", False), bool):
        raise InputError(f"truncate is {found['truncate']!r}", valid="true or false")
    return replace(defaults or Asked(), **found)


def _number(value: Any, what: str) -> float:
    """Protocols differ in which numbers they can send; as text all of them can."""
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        raise InputError(f"{what} is {value!r}", valid="a number, or one as text") from None
