"""The bundle on disk: contract, and every way in which one can be damaged."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from variator.errors import BundleError, InputError, VariatorError
from variator.files import directory_written_whole, inside, write_atomically
from variator.toolkit.bundle import Bundle


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return shutil.copytree(bundle.path, tmp_path / "copy", ignore=shutil.ignore_patterns("engines"))


def edit(copy: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))


def test_the_manifest_keeps_the_contract(bundle: Bundle) -> None:
    manifest = json.loads((bundle.path / "manifest.json").read_text())
    assert manifest["format_version"] == 4
    assert {"model", "family", "task", "pooling", "hidden_size", "layers", "max_length", "precision"} <= set(manifest)
    assert set(manifest["ratios"]) == {"1", "2", "4"}
    entry = manifest["ratios"]["4"]
    assert entry["graph"] == "ratio-4.onnx" and entry["untrained"] is True and len(entry["plugin_sha256"]) == 64
    assert entry["plugin_parameters"] == 2 * (16 * 32 + 4 + 2 * 32 * 16 + 16 + 16 * 32 + 32)
    files = {path.name for path in bundle.path.iterdir() if path.is_file()}
    assert files == set(manifest["files"]) | {"manifest.json"}
    assert {"backbone.data", "tokenizer.json", "ratio-1.onnx", "ratio-2.onnx"} <= files


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format_version=99), "version 99"),
        (lambda m: m.pop("format_version"), "version None"),
        (lambda m: m.pop("task"), "damaged"),
        (lambda m: m.update(color="red"), "damaged"),
        (lambda m: m.update(max_length="many"), "max_length is 'many'"),
        (lambda m: m.update(inputs=7), "inputs is 7"),
        (lambda m: m["ratios"]["4"].update(setting={"ratio": 99, "rank": 4}), "damaged"),
        (lambda m: m["ratios"]["4"].update(setting={"colour": "red"}), "damaged"),
        (lambda m: m["ratios"].pop("1"), "ratio 1"),
        (lambda m: m["ratios"].update({"Four": m["ratios"]["4"]}), "damaged"),
        (lambda m: m["files"].update({"../outside": {"bytes": 1, "sha256": "0"}}), "outside"),
        (lambda m: m["files"].update({"/etc/passwd": {"bytes": 1, "sha256": "0"}}), "outside"),
        (lambda m: m["ratios"]["4"].update(graph="../ratio-4.onnx"), "not listed"),
        (lambda m: m["ratios"].update({"0": m["ratios"]["1"]}), "ratio 0 is not usable"),
        (lambda m: m.update(max_length=0), "max_length is 0"),
        (lambda m: m.update(hidden_size=-1), "hidden_size is -1"),
        (lambda m: m["ratios"]["4"].update(graph=["x"]), r"graph is \['x'\]"),
        (lambda m: m["ratios"]["4"].update(rank=True), "rank is True"),
        (lambda m: m["ratios"]["4"].update(plugin="ratio-2.onnx"), "ratio 4 has graph"),
        (lambda m: m["ratios"]["4"].update(head=True), "ratio 4 has a head"),
        (lambda m: m.update(layout="shared"), "layout shared lacks a shared profile"),
        (lambda m: m.update(layout="split"), "layout is 'split', not one of per-ratio, shared"),
    ],
)
def test_a_manifest_that_is_wrong_is_refused(
    copy: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    edit(copy, change)
    with pytest.raises(BundleError, match=message):
        Bundle.open(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["ratios"]["4"].update(plugin=""), "ratio 4 has graph 'shared.onnx' and plugin ''"),
        (lambda m: m["ratios"]["4"].update(graph="ratio-1.onnx"), "ratio 4 has graph 'ratio-1.onnx'"),
        (lambda m: m["ratios"]["1"].update(graph="shared.onnx"), "ratio 1 has graph 'shared.onnx'"),
        (lambda m: m["ratios"]["4"].update(plugin="../ratio-4.safetensors"), "not listed"),
        (lambda m: m["ratios"]["4"].update(plugin=["x"]), "plugin is"),
        (lambda m: m["files"].pop("shared.onnx"), "'shared.onnx' is not listed"),
        (lambda m: m["shared"].update(max_rank="256"), "max_rank is '256'"),
        (lambda m: m["shared"].update(head="false"), "head is 'false'"),
        (lambda m: m["shared"].update(colour=1), "damaged"),
        (lambda m: m.update(shared=None), "lacks a shared profile"),
        (lambda m: m.update(layout="per-ratio"), "layout per-ratio has a shared profile"),
        (lambda m: (m["ratios"].pop("2"), m["ratios"].pop("4"), m["ratios"]["1"].update(head=True)), "has a head"),
    ],
)
def test_a_shared_manifest_that_is_wrong_is_refused(
    shared_bundle: Bundle, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    copy = shutil.copytree(shared_bundle.path, tmp_path / "shared", ignore=shutil.ignore_patterns("engines"))
    edit(copy, change)
    with pytest.raises(BundleError, match=message):
        Bundle.open(copy)


def test_bundles_of_the_first_format_are_read(copy: Path) -> None:
    def age(manifest: dict[str, Any]) -> None:
        manifest["format_version"] = 1
        del manifest["shared"]
        for entry in manifest["ratios"].values():
            del entry["plugin"], entry["head"]

    edit(copy, age)
    assert Bundle.open(copy).ratios == [1, 2, 4]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'"text"'])
def test_a_manifest_that_is_not_json_is_refused(copy: Path, content: bytes) -> None:
    (copy / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError):
        Bundle.open(copy)


def test_missing_truncated_and_swapped_files_are_refused(copy: Path) -> None:
    data = (copy / "backbone.data").read_bytes()
    (copy / "backbone.data").write_bytes(data[:-1])
    with pytest.raises(BundleError, match="bytes long"):
        Bundle.open(copy)
    (copy / "backbone.data").unlink()
    with pytest.raises(BundleError, match="missing"):
        Bundle.open(copy)
    (copy / "backbone.data").write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(BundleError, match="sha256"):
        Bundle.open(copy).verify()


def test_a_link_out_of_the_bundle_is_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "backbone.data").rename(tmp_path / "backbone.data")
    (copy / "backbone.data").symlink_to(tmp_path / "backbone.data")
    with pytest.raises(BundleError, match="outside"):
        Bundle.open(copy)


@pytest.mark.parametrize("ratio", [3, 0, 1000, 3.5, True, "4"])
def test_a_ratio_that_is_not_there_names_those_that_are(bundle: Bundle, ratio: Any) -> None:
    with pytest.raises(InputError, match="1, 2, 4"):
        bundle.ratio(ratio)


def test_paths_stay_inside(tmp_path: Path) -> None:
    for name in ("", "..", "../x", "/x", "a/../../x"):
        with pytest.raises(BundleError):
            inside(tmp_path, name)
    assert inside(tmp_path, "a") == tmp_path / "a"


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    final = tmp_path / "out"
    with pytest.raises(VariatorError, match="No space left"), directory_written_whole(final) as partial:
        (partial / "a").write_text("1")
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []
    with directory_written_whole(final) as partial:
        (partial / "a").write_text("1")
        assert not final.exists()
    with directory_written_whole(final, replace=True) as partial:
        (partial / "a").write_text("2")
    assert (final / "a").read_text() == "2" and [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(VariatorError, match="exists already"), directory_written_whole(final):
        pass


def test_a_directory_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(VariatorError, match="appeared meanwhile"), directory_written_whole(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis").write_text("years")
    assert (tmp_path / "out" / "thesis").read_text() == "years"


def test_the_old_directory_comes_back_when_the_new_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "out"
    final.mkdir()
    (final / "a").write_text("old")
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if ".part-" in self.name:
            raise OSError(28, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(VariatorError), directory_written_whole(final, replace=True):
        pass
    assert (final / "a").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["out"]
    monkeypatch.undo()
    final.rename(tmp_path / ".out.old")  # killed between the two renames
    with pytest.raises(VariatorError, match="exists already"), directory_written_whole(final):
        pass
    assert (final / "a").read_text() == "old"


def test_what_a_killed_process_left_behind_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".out.part-999999999-x").mkdir()  # no such process
    (tmp_path / f".out.part-{os.getppid()}-x").mkdir()  # somebody at work
    with directory_written_whole(tmp_path / "out"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"out", f".out.part-{os.getppid()}-x"}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(VariatorError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
