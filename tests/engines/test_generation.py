"""Texts from a tiny T5: token for token those of transformers' `generate`."""

from __future__ import annotations

import json
import shutil
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput
from typer.testing import CliRunner

from tests.conftest import lively, untie, write_checkpoint
from variator.cli import app
from variator.engines import seq2seq
from variator.engines.build import build
from variator.engines.generation import GenerateSettings
from variator.engines.runtime import BLANK, Result, Runtime
from variator.errors import BundleError, EngineError, InputError
from variator.exporters import export as export_module
from variator.exporters.export import ExportSettings, export
from variator.exporters.graph import Compressed
from variator.toolkit.bundle import DECODER_GRAPH, Bundle
from variator.toolkit.checkpoint import Backbone, load_backbone, stream_backbone
from variator.toolkit.plugin import compression
from variator.toolkit.plugin_file import save_plugin
from variator.toolkit.rows import Row
from variator.training.student import answering, writing

LIMIT = 12
SEQ2SEQ = "AutoModelForSeq2SeqLM"


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(5, 120, int(rng.integers(1, 30))).tolist() for _ in range(count)]


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])


def by_transformers(backbone: Backbone, rows: list[list[int]], beams: int, **options: object) -> list[list[int]]:
    ids, mask = padded(rows)
    if "encoder_outputs" not in options:
        options["input_ids"] = ids
    settings = {"max_new_tokens": LIMIT, "num_beams": beams, "do_sample": False, "early_stopping": False}
    found = backbone.original.generate(attention_mask=mask, **settings, **options)  # type: ignore[operator]
    texts = []
    for row in found[:, 1:].tolist():
        end = next((place for place, token in enumerate(row) if token in backbone.special.ends), None)
        texts.append(row if end is None else row[: end + 1])
    return texts


def make(kind: str, directory: Path) -> Path:
    """A checkpoint whose texts end now and then: the end is a token that its texts hold."""
    settings = {"decoder_start_token_id": 0, "eos_token_id": 119, "pad_token_id": 0}
    loaded = load_backbone(str(write(kind, directory / "first", **settings)))
    texts = by_transformers(loaded, prompts(30), 1)
    common = [token for token, _ in Counter(token for text in texts for token in text[2:]).most_common()]
    settings["eos_token_id"] = common[len(common) // 3]
    return write(kind, directory / kind, **settings)


def write(kind: str, directory: Path, **settings: object) -> Path:
    """A checkpoint; but for T5 v1.0 with a vocabulary of its own for answers."""
    model = write_checkpoint(kind, directory, SEQ2SEQ, **settings)
    tokenizer = model / "tokenizer.json"
    assert '"w50"' in tokenizer.read_text()
    tokenizer.write_text(tokenizer.read_text().replace('"w50"', f'"{BLANK}"'))
    return model if kind == "t5" else untie(model)


@pytest.fixture(
    scope="module", params=["t5, gated", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("t5", "mt5"))]
)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return load_backbone(str(make(request.param, tmp_path_factory.mktemp("models"))))


@pytest.fixture(scope="module")
def writer(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("bundles")
    save_plugin(lively(backbone, 4), path / "plugins")
    exported = export(backbone, path / "bundle", ExportSettings((4,), path / "plugins"))
    build(exported, "onnxruntime", "fp32")
    return exported


def test_transformers_itself_has_a_vocabulary_of_its_own_where_the_checkpoint_has(backbone: Backbone) -> None:
    tied = torch.equal(backbone.original.lm_head.weight, backbone.original.shared.weight)
    assert backbone.decoder is not None
    assert tied == (backbone.decoder.vocabulary is None) == (backbone.id == "t5")


@pytest.mark.parametrize("beams", [1, 4])
def test_texts_are_those_of_transformers_generate(writer: Bundle, backbone: Backbone, beams: int) -> None:
    rows = prompts(100)
    expected = by_transformers(backbone, rows, beams)
    with Runtime.open(writer) as runtime:
        found = runtime.generate(rows, ratio=1, settings=GenerateSettings(LIMIT, beams))
    assert found.ids == expected
    assert 0 < sum(found.finished) < 100, "both what ends by itself and what hits the limit has to occur"
    ends = backbone.special.ends
    assert found.finished == [text[-1] in ends for text in expected]
    assert found.ratio == 1 and found.steps > 1 and found.decode_ms > 0 and len(found.texts) == 100


@pytest.mark.parametrize("beams", [1, 3])
def test_a_higher_ratio_changes_the_encoder_alone(writer: Bundle, backbone: Backbone, beams: int) -> None:
    rows, plugin = prompts(20, seed=1), lively(backbone, 4)
    ids, mask = padded(rows)
    tensors = {name: torch.from_numpy(value) for name, value in plugin.tensors.items()}
    hidden = backbone.model.encoder(ids, mask, plugin=compression(plugin.config, tensors))
    expected = by_transformers(backbone, rows, beams, encoder_outputs=BaseModelOutput(hidden))
    with Runtime.open(writer) as runtime:
        found = runtime.generate(rows, ratio=4, settings=GenerateSettings(LIMIT, beams))
    assert found.ids == expected and found.ratio == 4
    assert expected != by_transformers(backbone, rows, beams)


@pytest.mark.parametrize("penalty", [0.0, 2.0, -1.0])
def test_the_length_penalty_is_transformers_own(writer: Bundle, backbone: Backbone, penalty: float) -> None:
    rows = prompts(20, seed=2)
    expected = by_transformers(backbone, rows, 4, length_penalty=penalty)
    with Runtime.open(writer) as runtime:
        assert runtime.generate(rows, ratio=1, settings=GenerateSettings(LIMIT, 4, penalty)).ids == expected


def test_neighbours_do_not_change_a_text(writer: Bundle) -> None:
    rows = prompts(9, seed=3)
    with Runtime.open(writer) as runtime:
        for beams in (1, 4):
            settings = GenerateSettings(LIMIT, beams)
            together = runtime.generate(rows, ratio=4, settings=settings).ids
            assert together == [runtime.generate([row], ratio=4, settings=settings).ids[0] for row in rows]


@pytest.mark.parametrize("beams", [1, 4])
def test_what_is_too_large_for_a_step_goes_in_parts(
    writer: Bundle, monkeypatch: pytest.MonkeyPatch, beams: int
) -> None:
    rows, settings = prompts(40, seed=7), GenerateSettings(LIMIT, beams)
    assert writer.manifest.decoder is not None
    most = 150 * beams * 4 * writer.manifest.decoder.width
    with Runtime.open(writer) as runtime:
        whole, scores = (
            runtime.generate(rows, ratio=4, settings=settings),
            runtime.score(rows, ["w7"], ratio=4, prefix=""),
        )
        infer, parts = runtime.infer, list[list[int]]()

        def counted(inputs: Sequence[Row], **options: Any) -> Result:
            parts.append([len(row.ids) for row in inputs])
            return infer(inputs, **options)

        monkeypatch.setattr(runtime, "infer", counted)
        monkeypatch.setattr(seq2seq, "BYTES_PER_STEP", most)
        found = runtime.generate(rows, ratio=4, settings=settings)
        assert found.ids == whole.ids and found.steps > whole.steps
        assert [length for part in parts for length in part] == [len(row) for row in rows]
        assert len(parts) > 3 and max(map(len, parts)) > 1
        for part in parts:
            assert len(part) == 1 or len(part) * (max(part) + LIMIT) <= 150
        parts.clear()
        again = runtime.score(rows, ["w7"], ratio=4, prefix="")
        assert len(parts) > 1 and again.lengths == scores.lengths == [len(row) for row in rows]
        np.testing.assert_allclose(again.outputs["logits"], scores.outputs["logits"], rtol=1e-4, atol=1e-5)
        monkeypatch.setattr(seq2seq, "BYTES_PER_STEP", 1)
        parts.clear()
        assert runtime.generate(rows[:3], ratio=4, settings=settings).ids == whole.ids[:3] and len(parts) == 3


def test_settings_of_the_checkpoint_that_are_not_computed_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = {"decoder_start_token_id": 0, "eos_token_id": 119, "pad_token_id": 0}
    plain = write_checkpoint("t5", tmp_path / "plain", SEQ2SEQ, **ends)
    other = shutil.copytree(plain, tmp_path / "other")
    asked = {"no_repeat_ngram_size": 1, "min_length": 3, "num_beams": 4}
    (other / "generation_config.json").write_text(json.dumps({**ends, **asked}))
    one, two = load_backbone(str(plain)), load_backbone(str(other))
    assert not one.unapplied and two.unapplied == stream_backbone(str(other)).unapplied == asked

    rows = [Row(row, [0] * len(row)) for row in prompts(20)]
    texts = [writing(backbone, answering(backbone, None))(rows) for backbone in (one, two)]
    assert texts[0] == texts[1] and two.original.generation_config.min_length == 3
    assert by_transformers(two, prompts(20), 1) != by_transformers(one, prompts(20), 1)

    def stop(*given: object) -> None:
        raise InputError("enough")

    monkeypatch.setattr(export_module, "_place", stop)
    for backbone, warned in ((one, []), (two, ["no_repeat_ngram_size 1"])):
        with warnings.catch_warnings(record=True) as caught, pytest.raises(InputError, match="enough"):
            warnings.simplefilter("always")
            export(backbone, tmp_path / "bundle", ExportSettings(()))
        told = [str(one.message) for one in caught if "texts are generated" in str(one.message)]
        assert len(told) == len(warned) and all(part in told[0] for part in warned)


def test_candidates_are_scored_at_the_gap(writer: Bundle, backbone: Backbone) -> None:
    rows = prompts(7, seed=4)
    ids, mask = padded(rows)
    with Runtime.open(writer) as runtime:
        tokens = [runtime.tokenizer.token_to_id(word) for word in ("w7", "w3", "w40")]
        blank, other = (runtime.tokenizer.token_to_id(word) for word in (BLANK, "w5"))
        for options, given in (({}, [0, blank]), ({"prefix": ""}, [0]), ({"prefix": "w5"}, [0, other])):
            found = runtime.score(rows, ["w7", "w3", "w40"], ratio=1, **options)
            expected = backbone.original(ids, mask, decoder_input_ids=torch.tensor([given] * 7)).logits[:, -1, tokens]
            np.testing.assert_allclose(found.outputs["logits"], expected.numpy(), rtol=1e-3, atol=1e-4)
        with pytest.raises(InputError, match="no token"):
            runtime.score(rows, ["w7"], ratio=1, prefix="nothing")
        for candidates in ([], ["w7", "w7"], [""]):
            with pytest.raises(InputError, match="candidate"):
                runtime.score(rows, candidates, ratio=1, prefix="")


def test_one_backbone_file_holds_everything_once(writer: Bundle, backbone: Backbone) -> None:
    manifest = writer.manifest
    assert manifest.decoder is not None and manifest.decoder.graph == DECODER_GRAPH
    stored = manifest.files["backbone.data"].bytes
    assert stored < 4 * backbone.parameters + 4096 * 80  # each tensor once, page-aligned
    assert manifest.parameters == sum(one.numel() for one in backbone.original.parameters()) + (
        # Tables of relative positions are written out by distance.
        2 * 4 * (2 * 40 + 1) - 2 * 4 * 16
    )
    flops = manifest.decoder.flops
    assert flops["total"] == flops["attention"] + flops["ffn"] + flops["head"] and flops["head"] == 2 * 32 * 120


def test_openvino_writes_the_same(writer: Bundle) -> None:
    pytest.importorskip("openvino")
    build(writer, "openvino", "fp32")
    rows = prompts(10, seed=5)
    with Runtime.open(writer, "openvino", "fp32") as one, Runtime.open(writer, "onnxruntime", "fp32") as other:
        for beams in (1, 4):
            settings = GenerateSettings(LIMIT, beams)
            assert (
                one.generate(rows, ratio=4, settings=settings).ids
                == other.generate(rows, ratio=4, settings=settings).ids
            )


def test_int8_is_gated_and_says_so(writer: Bundle) -> None:
    built = build(writer, "onnxruntime", "int8")
    assert set(built.record.max_abs_error) == {"1", "4", "decoder"}
    with Runtime.open(writer, "onnxruntime", "int8") as runtime:
        assert runtime.generate([[7, 8]], ratio=4).precision == "int8"


@pytest.mark.parametrize("engine", ["tensorrt-rtx", "onnxruntime-cuda"])
def test_gpu_engines_refuse_a_decoder_and_say_what_would_do(writer: Bundle, engine: str) -> None:
    from variator.engines.backends import BACKENDS
    from variator.engines.base import BuildOptions

    with pytest.raises(InputError, match="decoder"):
        BACKENDS[engine].choices(writer, BuildOptions())


def test_what_cannot_be_generated_is_told(writer: Bundle) -> None:
    with Runtime.open(writer) as runtime:
        with pytest.raises(InputError, match="empty"):
            runtime.generate([], ratio=1)
        with pytest.raises(InputError, match="ratio 3"):
            runtime.generate([[7]], ratio=3)
        with pytest.raises(InputError, match="decoder"):
            runtime.generate([[7]], ratio="auto")
    for settings in ({"beams": 0}, {"max_new_tokens": -1}, {"max_new_tokens": 2.5}, {"length_penalty": float("nan")}):
        with pytest.raises(InputError, match="valid"):
            GenerateSettings(**settings)  # type: ignore[arg-type]


def test_scores_that_are_not_finite_are_an_error(writer: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with Runtime.open(writer) as runtime:
        run = runtime.run_graph

        def broken(graph: str, feed: object) -> object:
            outputs, *times = run(graph, feed)  # type: ignore[arg-type]
            return {**outputs, "logits": outputs["logits"] * np.nan}, *times

        monkeypatch.setattr(runtime, "run_graph", broken)
        for beams in (1, 2):
            with pytest.raises(EngineError, match="not finite"):
                runtime.generate([[7]], ratio=1, settings=GenerateSettings(3, beams))


def test_the_command_writes_and_scores(writer: Bundle) -> None:
    run = CliRunner().invoke
    command = ["run", str(writer.path), "--text", "w1 w2 w3", "--ratio", "4", "--max-new-tokens", "5"]
    done = run(app, [*command, "--beams", "2"])
    assert done.exit_code == 0, done.output
    assert "decode" in done.output and "ratio 4" in done.output
    assert '"finished"' in run(app, [*command, "--json"]).output
    with Runtime.open(writer) as runtime:
        expected = runtime.score(["w1 w2 w3"], ["w7", "w3"], ratio=4).outputs["logits"]
    command, words = [*command[:6], "--json"], ["--candidate", "w7", "--candidate", "w3"]
    np.testing.assert_allclose(
        json.loads(run(app, [*command, *words]).stdout)["outputs"]["logits"], expected, rtol=1e-4
    )
    refused = run(app, [*command, *words, "--beams", "2"])
    assert isinstance(refused.exception, InputError) and "--candidate alone" in str(refused.exception)
    assert "decoder: 2 layers" in run(app, ["inspect", str(writer.path)]).output


def test_a_manifest_that_contradicts_itself_is_refused(writer: Bundle) -> None:
    manifest = writer.manifest
    assert manifest.decoder is not None
    for wrong in (
        replace(manifest, decoder=None),
        replace(manifest, task="hidden"),
        replace(manifest, decoder=replace(manifest.decoder, graph="gone.onnx")),
        replace(manifest, decoder=replace(manifest.decoder, width=0)),
        replace(manifest, decoder=replace(manifest.decoder, ends="3")),  # type: ignore[arg-type]
        replace(manifest, decoder=replace(manifest.decoder, ends=[])),
        replace(manifest, decoder=replace(manifest.decoder, ends=[120])),
        replace(manifest, decoder=replace(manifest.decoder, start=-1)),
        replace(manifest, decoder=replace(manifest.decoder, graph="ratio-1.onnx")),
        replace(manifest, inputs=["pixel_values"]),
    ):
        with pytest.raises(BundleError, match="damaged"):
            type(manifest).from_json(wrong.to_json(), "here")


def test_the_reference_of_ratio_1_is_our_own_encoder_too(backbone: Backbone) -> None:
    ids, mask = padded(prompts(3, seed=6))
    ours = backbone.model.encoder(ids, mask)
    theirs = backbone.original.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state  # type: ignore[operator]
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], rtol=1e-4, atol=2e-5)
    assert Compressed(backbone.model, None)(ids, mask)[0].shape == (3, ids.shape[1], 32)
