"""Shape profiles: read, checked, and the tightest one chosen."""

from __future__ import annotations

import pytest

from variator.engines.profiles import (
    LENGTHS,
    Shape,
    ShapeProfile,
    default_profiles,
    most_rows,
    parse_profiles,
    tightest,
)
from variator.errors import EngineError, InputError


def test_profiles_are_read_from_one_text_or_several() -> None:
    found = parse_profiles(["1x16:8x128:32x512, 1x1:1x8:1x16", "2x2:2x2:2x2"], 512)
    assert [str(profile) for profile in found] == ["1x16:8x128:32x512", "1x1:1x8:1x16", "2x2:2x2:2x2"]
    assert found[0] == ShapeProfile(Shape(1, 16), Shape(8, 128), Shape(32, 512))
    assert found[0].corners == [Shape(1, 16), Shape(1, 512), Shape(32, 16), Shape(32, 512), Shape(8, 128)]


@pytest.mark.parametrize("text", ["", "8x128", "1x1:8x64", "1x1:8x64:32x128:64x128", "0x1:1x1:1x1", "1:2:3", "axb:c:d"])
def test_another_form_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InputError, match=r"cannot be read(.|\n)*1x1:8x64:32x128"):
        parse_profiles([text], 512)


@pytest.mark.parametrize("text", ["8x64:1x64:32x128", "1x65:8x64:32x128", "1x1:33x64:32x128", "1x1:8x129:32x128"])
def test_a_range_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="MIN ≤ OPT ≤ MAX"):
        parse_profiles([text], 512)


def test_what_the_model_cannot_take_or_is_given_twice_is_refused() -> None:
    with pytest.raises(InputError, match=r"rows of 512 tokens(.|\n)*up to 256"):
        parse_profiles(["1x1:8x64:32x512"], 256)
    with pytest.raises(InputError, match="given twice"):
        parse_profiles(["1x1:8x64:32x128", "1x1:8x64:32x128"], 256)


@pytest.mark.parametrize(
    ("limit", "lengths"), [(512, list(LENGTHS)), (150, [32, 64, 128, 150]), (20, [20]), (64, [32, 64])]
)
def test_the_defaults_follow_the_models_limit(limit: int, lengths: list[int]) -> None:
    found = default_profiles(limit)
    assert [profile.maximum.length for profile in found] == lengths
    assert {profile.maximum.batch for profile in found} == {32}
    for length in range(1, limit + 1):  # whatever the model takes is held, by the shortest that does
        chosen = found[tightest(found, 7, length)]
        assert chosen.maximum.length == min(bucket for bucket in lengths if bucket >= length)


def test_a_shape_that_no_profile_holds_is_an_error_that_names_them() -> None:
    found = default_profiles(64)
    with pytest.raises(EngineError, match=r"33x10(.|\n)*1x1:8x32:32x32, 1x1:8x64:32x64(.|\n)*--profile"):
        tightest(found, 33, 10)
    with pytest.raises(EngineError, match="1x65"):
        tightest(found, 1, 65)


def test_a_request_is_cut_to_the_rows_that_a_run_may_have() -> None:
    found = parse_profiles(["1x1:8x64:64x128", "1x1:8x64:32x128", "1x1:1x32:1x64"], 128)
    assert [most_rows(found, length) for length in (1, 64, 65, 128)] == [64] * 4
    assert most_rows(found[2:], 64) == 1 and most_rows((), 64) > 10**9
    assert most_rows(found, 129) > 10**9  # no profile holds it: `tightest` says so


def test_the_tightest_is_the_shortest_then_the_one_with_fewest_rows() -> None:
    found = parse_profiles(["1x1:8x64:64x128", "1x1:8x64:32x128", "1x1:1x32:1x64"], 128)
    assert [tightest(found, *shape) for shape in ((1, 64), (2, 64), (1, 65), (33, 5))] == [2, 1, 1, 0]
