"""Work that is claimed, and places that one process makes at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from variator.errors import InputError
from variator.files import alone, claim, directory_resumed


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


class Kill(BaseException):
    """What nobody catches."""


def begun(final: Path) -> Path:
    """Work that was stopped, with a result of one file."""
    with pytest.raises(Kill), directory_resumed(final, "mine") as (inner, beside):
        (inner / "weights").write_text("half")
        (beside / "journal").write_text("notes")
        raise Kill
    return final.with_name(f".{final.name}.resumable")


def test_what_a_killed_process_left_beside_its_work_goes_away(tmp_path: Path) -> None:
    work = begun(tmp_path / "out")
    (work / "tmp1234" / "deep").mkdir(parents=True)
    (work / "tmp1234" / "deep" / "piece.data").write_text("large")
    (work / ".journal.99.part").write_text("half")
    with directory_resumed(tmp_path / "out", "mine") as (inner, beside):
        assert {path.name for path in beside.iterdir()} == {"made-from.sha256", "journal", "result"}
        assert (inner / "weights").read_text() == "half" and (beside / "journal").read_text() == "notes"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_kill_at_the_last_moment_throws_nothing_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(tmp_path / "out")

    def killed(path: Path, target: Path) -> None:
        raise Kill

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", killed)
        with pytest.raises(Kill), directory_resumed(tmp_path / "out", "mine"):
            pass
    with directory_resumed(tmp_path / "out", "mine") as (inner, _):
        assert (inner / "weights").read_text() == "half"
    assert (tmp_path / "out" / "weights").exists()
