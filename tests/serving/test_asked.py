"""What a request wants: fields of a protocol, and the parameters of a Triton request."""

from __future__ import annotations

import json
from typing import Any

import pytest

from variator.errors import InputError
from variator.serving.asked import Asked, asked_from
from variator.serving.triton_request import read_parameters


def test_fields_of_a_protocol_become_what_is_asked() -> None:
    assert asked_from({"ratio": "4", "slo_ms": "20.5"}) == Asked("4", 20.5)
    assert asked_from({"min_ratio": 2}, Asked(slo_ms=7.0)) == Asked(slo_ms=7.0, min_ratio=2)
    assert asked_from({"truncate": True, "host": "a"}) == Asked(truncate=True)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"slo_ms": "soon"}, "a number"),
        ({"slo_ms": True}, "a number"),
        ({"min_quality": [1]}, "a number"),
        ({"truncate": "yes"}, "true or false"),
    ],
)
def test_a_value_of_the_wrong_kind_is_told(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        asked_from(fields)


def test_a_fixed_ratio_becomes_both_bounds_and_goes_not_with_others() -> None:
    served = [1, 2, 4, 8, "long"]
    options = Asked("4", 5.0).options(served)
    assert (options["min_ratio"], options["max_ratio"], options["slo_ms"]) == (4, 4, 5.0)
    assert Asked(min_ratio="2", max_ratio="long").options(served)["max_ratio"] == "long"
    for wrong in (
        Asked(4, max_ratio=8),
        Asked("long", min_quality=0.5),
        Asked(0),
        Asked(True),
        Asked(min_ratio="auto"),
    ):
        with pytest.raises(InputError):
            wrong.options(served)
    with pytest.raises(InputError, match=r"ratio '3'(.|\n)*auto, 1, 2"):
        Asked(3).options([1, 2])


def test_the_parameters_of_a_triton_request() -> None:
    assert read_parameters("") == Asked()
    assert read_parameters("", 5000, 2) == Asked(2, 5.0)
    assert read_parameters(json.dumps({"ratio": 4, "slo_ms": "7"}), 5000) == Asked(4, 7.0)
    assert read_parameters(json.dumps({"ratio": "4"}), patience_ms=900.0) == Asked("4", 900.0)
    assert read_parameters("", patience_ms=900.0).slo_ms is None, "who follows the load has the usual objective"
    with pytest.raises(InputError, match="'rato'"):
        read_parameters(json.dumps({"rato": 4}))
