"""Every family through the whole chain: attach, export at ratios 1 and 4, gate, engine, FLOPs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import CONFIGS, PICTURES, deberta, lively, made, modernbert, write_checkpoint
from variator.bench.run import BenchSettings, bench
from variator.engines.build import build
from variator.engines.latency import calibrated
from variator.engines.runtime import Runtime, _buckets, rows_of
from variator.errors import BackboneError, InputError
from variator.exporters.export import ExportSettings, export
from variator.exporters.flops import count_flops
from variator.exporters.graph import Compressed
from variator.toolkit.checkpoint import load_backbone
from variator.toolkit.families import family_of
from variator.toolkit.families.base import UNBOUNDED
from variator.toolkit.plugin_file import save_plugin
from variator.toolkit.plugin_format import PluginConfig
from variator.toolkit.positions import deberta_row, log_bucket
from variator.toolkit.rows import Row
from variator.training.budget import layer_flops

RANK = 8


RELATED = ("xlm-roberta", "deberta-v2, own projections", "modernbert, all biases")
"""What differs from its neighbour in the table by less than a family: taken through the whole chain with -m slow."""


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in RELATED else kind for kind in CONFIGS]
)
def test_the_whole_chain(kind: str, tmp_path: Path) -> None:
    backbone = load_backbone(str(write_checkpoint(kind, tmp_path / "model")))
    plugin = lively(backbone, 4, rank=RANK)
    save_plugin(plugin, tmp_path / "plugins")
    bundle = export(backbone, tmp_path / "bundle", ExportSettings((4,), tmp_path / "plugins"))  # its gate has passed
    build(bundle, "onnxruntime", "fp32")
    rows = [[7, 8, 9, 30, 31, 5, 60, 61, 62], [100, 7, 9]]
    with Runtime.open(bundle, "onnxruntime", "fp32") as runtime:
        for ratio, module in ((1, Compressed(backbone.model, None)), (4, Compressed(backbone.model, plugin))):
            found = runtime.infer(rows, ratio=ratio).outputs["last_hidden_state"]
            for row, ids in zip(found, rows, strict=True):
                tensor = torch.tensor([ids])
                with torch.no_grad():
                    expected = module(tensor, torch.ones_like(tensor))[0][0]
                np.testing.assert_allclose(row[: len(ids)], expected.numpy(), rtol=1e-3, atol=1e-4)
    sizes = backbone.config
    for ratio in (1, 4):
        sites = plugin.config.sites(0) if ratio == 4 else {}
        head = 2 * 64 * sizes.embedding_size * sizes.hidden_size if sizes.embedding_size != sizes.hidden_size else 0
        expected_flops = sizes.layers * layer_flops(sizes, 64, sites) + head
        assert count_flops(bundle.graph(ratio), 64)["total"] == expected_flops


@pytest.mark.parametrize("kind", PICTURES)
def test_the_whole_chain_of_pictures(kind: str, tmp_path: Path) -> None:
    backbone = load_backbone(str(write_checkpoint(kind, tmp_path / "model")))
    picture = backbone.config.picture
    assert picture is not None and backbone.max_length == 49 + picture.token and backbone.inputs == ("pixel_values",)
    plugin = lively(backbone, 4, rank=RANK)
    save_plugin(plugin, tmp_path / "plugins")
    bundle = export(backbone, tmp_path / "bundle", ExportSettings((4,), tmp_path / "plugins"))  # its gate has passed
    build(bundle, "onnxruntime", "fp32")
    pixels = np.random.default_rng(1).standard_normal((3, 3, 28, 28)).astype(np.float32)
    with Runtime.open(bundle, "onnxruntime", "fp32") as runtime:
        for ratio, module in ((1, Compressed(backbone.model, None)), (4, Compressed(backbone.model, plugin))):
            found = runtime.infer(list(pixels), ratio=ratio).outputs["last_hidden_state"]
            with torch.no_grad():
                expected = module.model.look(torch.from_numpy(pixels), module.compression())[0]
            np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        original = backbone.original(pixel_values=torch.from_numpy(pixels)).last_hidden_state  # type: ignore[operator]
        torch.testing.assert_close(backbone.model.look(torch.from_numpy(pixels))[0], original, rtol=1e-3, atol=1e-4)
    sizes, patches = backbone.config, 2 * 49 * 3 * 4 * 4 * 32
    for ratio in (1, 4):
        sites = plugin.config.sites(0) if ratio == 4 else {}
        length = -(-backbone.max_length // ratio) * ratio  # all of a layer runs on the padded sequence
        expected_flops = sizes.layers * layer_flops(sizes, length, sites) + patches
        assert count_flops(bundle.graph(ratio), 0)["total"] == expected_flops
        assert bundle.manifest.ratios[ratio].flops["total"] == expected_flops


def test_pictures_are_served_measured_and_checked(tmp_path: Path) -> None:
    backbone = load_backbone(str(write_checkpoint("vit", tmp_path / "model")))
    bundle = export(backbone, tmp_path / "bundle", ExportSettings((2, 4), untrained=True))
    built = build(bundle, "onnxruntime", "fp32")
    pixels = np.zeros((3, 28, 28), np.float32)
    calibrated(bundle.path, built)
    with Runtime.open(bundle) as runtime:
        result = runtime.infer([pixels], ratio="auto", slo_ms=5000)
        assert result.ratio == 1 and result.outputs["last_hidden_state"].shape == (1, 50, 32)
        wrong = (
            "a text",
            [7, 8],
            np.zeros((3, 28, 27), np.float32),
            np.zeros((3, 28, 28), np.int64),
            np.full((3, 28, 28), np.nan, np.float32),
        )
        for value in wrong:
            with pytest.raises(InputError, match=r"picture|pixel"):
                runtime.infer([value], ratio=4)  # type: ignore[list-item]
        with pytest.raises(InputError, match="no tokenizer"):
            _ = runtime.tokenizer
    record = bench(bundle, BenchSettings(runs=5, memory=False, quality=False))
    assert {(result.batch, result.sequence) for result in record.results} == {(1, 50), (8, 50), (32, 50)}
    with pytest.raises(InputError, match="length 50"):
        bench(bundle, BenchSettings(shapes=((1, 32),)))
    for layout, message in (("shared", "reads pictures"),):
        with pytest.raises(InputError, match=message):
            export(backbone, tmp_path / "other", ExportSettings((2,), untrained=True, layout=layout))


def test_pictures_that_are_not_square_are_refused() -> None:
    config = PICTURES["vit"]()
    for image, patch in ((28, 5), ([28, 32], 4), (28, [4, 2])):
        config.image_size, config.patch_size = image, patch
        with pytest.raises(BackboneError, match="patches"):
            family_of("vit").encoder_config(config)


@pytest.mark.parametrize("kind", ["mpnet", "deberta-v2", "modernbert", "nomic_bert", "t5"])
def test_the_amount_of_padding_does_not_change_a_result(kind: str, tmp_path: Path) -> None:
    backbone = load_backbone(str(write_checkpoint(kind, tmp_path / "model")))
    for ratio in (1, 3, 4):
        module = Compressed(backbone.model, lively(backbone, ratio) if ratio > 1 else None).eval()
        ids = torch.randint(5, 120, (1, 21))
        alone = module(ids, torch.ones_like(ids))[0]
        wide = torch.cat([ids, torch.randint(0, 120, (1, 18))], dim=1)
        mask = torch.cat([torch.ones_like(ids), torch.zeros(1, 18, dtype=torch.int64)], dim=1)
        torch.testing.assert_close(module(wide, mask)[0][:, :21], alone, rtol=0, atol=2e-5)


def test_t5_takes_longer_sequences_than_it_was_trained_on_and_bert_does_not(calibrated: Path, tmp_path: Path) -> None:
    backbone = load_backbone(str(write_checkpoint("t5", tmp_path / "t5")))
    assert backbone.max_length == UNBOUNDED
    bundle = export(backbone, tmp_path / "bundle", ExportSettings((4,), untrained=True))
    build(bundle, "onnxruntime", "fp32")
    ids = [[7] * 600]
    with Runtime.open(bundle, "onnxruntime", "fp32") as runtime:
        assert runtime.infer(ids, ratio=4).outputs["last_hidden_state"].shape == (1, 600, 32)
    with Runtime.open(calibrated, "onnxruntime", "fp32") as runtime, pytest.raises(InputError, match="600 tokens"):
        runtime.infer(ids, ratio=4)


def test_long_texts_are_not_padded_to_the_limit() -> None:
    def lengths(*tokens: int) -> list[int]:
        return [length for length, _ in _buckets([Row([7] * count, [0] * count) for count in tokens], 8192)]

    assert lengths(513, 600, 700, 5000, 8000) == [640, 768, 6144, 8192]
    assert (rows_of(64), rows_of(512), rows_of(2048), rows_of(8192)) == (256, 32, 8, 1)


@pytest.mark.parametrize("kind", ["mpnet", "deberta-v2", "modernbert", "t5"])
def test_keys_and_values_cannot_be_merged_where_attention_needs_their_positions(kind: str, tmp_path: Path) -> None:
    backbone = load_backbone(str(write_checkpoint(kind, tmp_path / "model")))
    with pytest.raises(InputError, match="positions"):
        Compressed(backbone.model, made(backbone, PluginConfig(4, 8, keys_values=2, name="long")))


def test_what_a_family_does_not_compute_is_refused() -> None:
    for settings, what in (
        ({"conv_kernel_size": 3}, "convolution"),
        ({"relative_attention": False}, "relative attention"),
        ({"pos_att_type": ["c2p"]}, "pos_att_type"),
    ):
        config = deberta()
        for name, value in settings.items():
            setattr(config, name, value)
        with pytest.raises(BackboneError, match=what):
            family_of("deberta-v2").encoder_config(config)
    config = modernbert()
    config.rope_parameters["full_attention"] = {"rope_type": "linear", "rope_theta": 10.0, "factor": 2.0}
    with pytest.raises(BackboneError, match="linear"):
        family_of("modernbert").encoder_config(config)


def test_buckets_of_distances_are_transformers_own() -> None:
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position
    from transformers.models.t5.modeling_t5 import T5Attention

    away = torch.arange(-700, 701)
    for buckets, farthest in ((32, 128), (16, 40), (64, 256)):
        expected = T5Attention._relative_position_bucket(away, True, buckets, farthest)
        assert [log_bucket(int(one), buckets, farthest) for one in away] == expected.tolist()
    for buckets, farthest in ((256, 512), (8, 160)):
        expected = (make_log_bucket_position(away, buckets, farthest).long() + buckets).clamp(0, 2 * buckets - 1)
        assert [deberta_row(int(one), buckets, farthest) for one in away] == expected.tolist()
