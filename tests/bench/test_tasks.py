"""The quality of tasks as one command: parts are kept, goes on where it stopped, mixes up nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import lively
from tests.tasks.toys import write_tasks
from variator.bench.tasks import QualityRecord, QualitySettings, markdown, mean_drop, plot, quality
from variator.errors import InputError, PluginError
from variator.toolkit.checkpoint import Backbone
from variator.toolkit.plugin_file import save_plugin


@pytest.fixture(scope="module")
def inputs(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Toy tasks, and plugins to start from."""
    place = tmp_path_factory.mktemp("quality")
    for ratio in (2, 4):
        save_plugin(lively(backbone, ratio), place / "plugins")
    return write_tasks(place / "data", 60, 20), place / "plugins"


def settings(work: Path, inputs: tuple[Path, Path], tasks: tuple[str, ...] = ("sst2", "stsb")) -> QualitySettings:
    return QualitySettings(work, tasks, (2, 4), *inputs, steps=8, tokens=256)


@pytest.fixture(scope="module")
def record(checkpoint: Path, inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> QualityRecord:
    """Both tasks, stopped in the middle of the second and gone on."""
    work = tmp_path_factory.mktemp("work")

    def stop(stage: str) -> None:
        if stage.startswith("stsb: scoring"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quality(str(checkpoint), settings(work, inputs), "variator quality …", on_stage=stop)
    assert list(work.glob("sst2/*/rows-*.json")) and not list(work.glob("stsb/*/rows-*.json"))
    stages: list[str] = []
    record = quality(str(checkpoint), settings(work, inputs), "variator quality …", on_stage=stages.append)
    assert stages and all("sst2" not in stage and "adapting" not in stage for stage in stages)
    return record


def test_every_task_has_a_row_per_ratio(record: QualityRecord) -> None:
    assert [(row.task, row.ratio) for row in record.rows] == [(t, k) for t in ("sst2", "stsb") for k in (1, 2, 4)]
    for row in record.rows:
        first = next(one for one in record.rows if one.task == row.task and one.ratio == 1)
        assert row.reference == first.value and row.drop == pytest.approx(1 - row.value / first.value, abs=1e-4)
        assert (row.engine, row.precision) == ("onnxruntime", "fp32") and "sample" in row.split
        assert (row.parameters > 0) == (row.share > 0) == (row.ratio != 1)
        assert (row.flops_saved == 0) == (row.ratio == 1)


def test_the_record_is_read_back_and_drawn(record: QualityRecord, tmp_path: Path) -> None:
    (tmp_path / "quality.json").write_text(record.to_json())
    assert QualityRecord.load(tmp_path / "quality.json") == record
    table = markdown(record)
    assert table.count("\n| ") == 7
    assert all(
        part in table
        for part in ("sst2 dev (sample: 20 of 872)", "mean of 1 without stsb", "FLOPs saved at 128 tokens")
    )
    assert plot(record).startswith("<svg") and "stsb" in plot(record)
    drop, count = mean_drop(record.rows, 4)
    assert count == 1 and drop == next(row.drop for row in record.rows if (row.task, row.ratio) == ("sst2", 4))
    (tmp_path / "quality.json").write_text(json.dumps({"schema": "other/1"}))
    with pytest.raises(InputError, match="other/1"):
        QualityRecord.load(tmp_path / "quality.json")


@pytest.mark.slow
def test_other_plugins_find_the_backbone_again_and_nothing_else(
    checkpoint: Path, inputs: tuple[Path, Path], tmp_path: Path, backbone: Backbone
) -> None:
    said: list[str] = []
    data, work = inputs[0], tmp_path / "work"
    for gain in (1.0, 0.5):
        plugin = lively(backbone, 2)
        tensors = {name: gain * value for name, value in plugin.tensors.items()}
        save_plugin(replace(plugin, tensors=tensors), tmp_path / f"plugins-{gain}")
        chosen = QualitySettings(work, ("sst2",), (2,), data, tmp_path / f"plugins-{gain}", steps=2, tokens=128)
        said.append("")
        quality(str(checkpoint), chosen, "…", on_stage=lambda stage: said.append(stage))
    first, second = " ".join(said).split("  ")
    assert "fine-tuning" in first and "fine-tuning" not in second
    assert "exporting" in first and "exporting" in second
    assert len(list((work / "sst2").glob("backbone-*"))) == 1 and len(list((work / "sst2").glob("adapted-*"))) == 2


def test_what_is_missing_is_said_before_anything_is_trained(
    checkpoint: Path, inputs: tuple[Path, Path], tmp_path: Path, toy: Path
) -> None:
    with pytest.raises(PluginError, match="no plugin of ratio 2 ships"):
        quality(str(checkpoint), QualitySettings(tmp_path / "w", ("sst2",), (2,), inputs[0]), "…")
    with pytest.raises(InputError, match=r"needs 'embed'(.|\n)*sentence-transformers"):
        quality(str(toy), settings(tmp_path / "w", inputs), "…")
    assert not (tmp_path / "w").exists()
    for wrong in ({"tasks": ("cola",)}, {"tasks": ()}, {"ratios": ()}, {"ratios": (1, 2)}):
        with pytest.raises(InputError):
            QualitySettings(**{"work": tmp_path, **wrong})  # type: ignore[arg-type]
