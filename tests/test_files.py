"""Work that is claimed, and places that one process makes at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from variator.errors import InputError
from variator.files import alone, claim


def test_the_same_work_goes_on_and_other_work_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "work"
    claim(place, ["a", 1])
    (place / "part").write_text("done")
    claim(place, ["a", 1])
    assert (place / "part").exists()
    with pytest.raises(InputError, match="another model, data or settings"):
        claim(place, ["a", 2])
    assert (place / "part").exists()
    claim(place, ["a", 1], anew=True)
    assert (place / "part").exists()
    claim(place, ["a", 2], anew=True)
    assert not (place / "part").exists()


def test_work_of_unknown_origin_is_not_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "work" / "checkpoint-384").mkdir(parents=True)
    claim(tmp_path / "work", "mine")
    assert not (tmp_path / "work" / "checkpoint-384").exists()


def test_one_process_at_a_time_and_no_trace_behind_it(tmp_path: Path) -> None:
    with alone(tmp_path / "out"), pytest.raises(InputError, match="another process is making"), alone(tmp_path / "out"):
        pass
    with alone(tmp_path / "out"):
        pass
    assert not list(tmp_path.iterdir())
