"""Export of models that are larger than memory: the same bytes, checked layer by layer, resumed after a kill."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.conftest import lively, untie
from variator.engines.build import build
from variator.engines.generation import GenerateSettings
from variator.engines.runtime import Runtime
from variator.errors import BackboneError, GateError, InputError, VariatorError
from variator.exporters.export import ExportSettings, export
from variator.exporters.gate import plain_runner
from variator.exporters.pieces import run_in_pieces
from variator.toolkit.bundle import Bundle
from variator.toolkit.checkpoint import load_backbone, stream_backbone
from variator.toolkit.plugin_file import save_plugin
from variator.toolkit.random_models import write_word_tokenizer
from variator.toolkit.weights import WeightStore

SIZES = {"hidden_size": 528, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 536}
T5 = {"d_model": 528, "d_ff": 536, "d_kv": 132, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 3}
IDS = {"decoder_start_token_id": 0, "eos_token_id": 3, "pad_token_id": 0}
ZEROS = dict.fromkeys(("bos_token_id", "cls_token_id", "sep_token_id", "pad_token_id", "eos_token_id"), 0)
KINDS = {
    "bert": ("AutoModel", lambda: transformers.BertConfig(**SIZES, vocab_size=607)),
    "classifier": ("AutoModelForSequenceClassification", lambda: transformers.BertConfig(**SIZES, vocab_size=607)),
    "modernbert": ("AutoModel", lambda: transformers.ModernBertConfig(**SIZES, vocab_size=607, **ZEROS)),
    "deberta": (
        "AutoModel",
        lambda: transformers.DebertaV2Config(
            **SIZES, vocab_size=607, relative_attention=True, pos_att_type="p2c|c2p", position_buckets=64,
            type_vocab_size=0, position_biased_input=False, share_att_key=True, norm_rel_ebd="layer_norm",
        ),
    ),
    "t5": ("AutoModelForSeq2SeqLM", lambda: transformers.T5Config(**T5, **IDS, vocab_size=607)),
    "t5, gated": (
        "AutoModelForSeq2SeqLM",
        lambda: transformers.T5Config(**T5, **IDS, vocab_size=607, feed_forward_proj="gated-gelu"),
    ),
    "t5, untied": ("AutoModelForSeq2SeqLM", lambda: transformers.T5Config(**T5, **IDS, vocab_size=607)),
}  # fmt: skip
"""Large enough that most tensors are never in memory; odd vocabularies."""


def checkpoint(kind: str, directory: Path, shard: str = "3MB", dtype: torch.dtype = torch.float32) -> Path:
    """A random checkpoint in shards."""
    auto, config = KINDS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(config())
    for name, parameter in model.named_parameters() if not kind.startswith("t5") else ():  # T5 begins with 1/sqrt(d)
        is_norm = "norm" in name.lower() and name.endswith("weight")
        torch.nn.init.normal_(parameter, mean=1.0 if is_norm else 0.0, std=0.02)
    model.to(dtype).save_pretrained(directory, max_shard_size="1GB" if kind.endswith("untied") else shard)
    write_word_tokenizer(607, directory)
    return untie(directory) if kind.endswith("untied") else directory


def plugins(place: Path, model: Path) -> Path:
    backbone = load_backbone(str(model))
    for ratio in (2, 4):
        save_plugin(lively(backbone, ratio), place)
    return place


def contents(bundle: Bundle) -> dict[str, str]:
    """What has to be the same byte by byte: everything but what PyTorch computed in another order."""
    return {name: file.sha256 for name, file in bundle.manifest.files.items() if not name.startswith("gate")}


def settings(place: Path, low: bool = True, ratios: tuple[int, ...] = (2, 4), **options: object) -> ExportSettings:
    return ExportSettings(ratios, place, low_memory=low, **options)  # type: ignore[arg-type]


QUICK = (("bert", "bf16"),)
EVERY = [
    pytest.param(kind, precision, marks=() if (kind, precision) in QUICK else pytest.mark.slow)
    for kind in KINDS
    for precision in ("fp32", "bf16")
    if precision == "fp32" or kind in ("bert", "t5")
]


@pytest.mark.parametrize(("kind", "precision"), EVERY)
def test_the_bundle_is_the_ordinary_one_byte_by_byte(kind: str, precision: str, tmp_path: Path) -> None:
    model = checkpoint(kind, tmp_path / "model")
    place = plugins(tmp_path / "plugins", model)
    usual = export(str(model), tmp_path / "usual", settings(place, False, precision=precision), name="m")
    low = export(str(model), tmp_path / "low", settings(place, precision=precision), name="m")
    assert contents(low) == contents(usual) and set(low.manifest.files) == set(usual.manifest.files)
    one, other = usual.manifest, low.manifest
    assert (one.parameters, one.backbone, one.task, one.labels) == (
        other.parameters, other.backbone, other.task, other.labels
    )  # fmt: skip
    for ratio in (1, 2, 4):
        assert one.ratios[ratio].flops == other.ratios[ratio].flops
    if one.decoder is not None:
        assert other.decoder is not None and other.decoder.flops == one.decoder.flops
    assert not list(tmp_path.glob(".low*"))


@pytest.mark.slow
def test_what_was_exported_with_low_memory_runs(tmp_path: Path) -> None:
    model = checkpoint("t5", tmp_path / "model", dtype=torch.bfloat16)
    bundle = export(str(model), tmp_path / "low", settings(plugins(tmp_path / "plugins", model)))
    build(bundle, "onnxruntime", "fp32")
    original = load_backbone(str(model)).original
    assert original is not None
    ids = torch.tensor([[7, 8, 9, 30]])
    expected = original.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)[0, 1:].tolist()  # type: ignore[operator]
    with Runtime.open(bundle) as runtime:
        found = runtime.generate(ids.tolist(), ratio=1, settings=GenerateSettings(6))
    assert found.ids[0] == expected


def test_pieces_give_what_the_whole_graph_gives(tmp_path: Path) -> None:
    model = checkpoint("modernbert", tmp_path / "model")
    bundle = export(str(model), tmp_path / "usual", settings(plugins(tmp_path / "plugins", model), False, (4,)))
    feed = {"input_ids": np.arange(5, 35).reshape(2, 15), "attention_mask": np.ones((2, 15), np.int64)}
    feed["attention_mask"][1, 9:] = 0
    for ratio in (1, 4):
        told: list[tuple[int, int]] = []
        (found,), _ = run_in_pieces(bundle.graph(ratio), "fp32", [feed], (), lambda *place: told.append(place))  # noqa: B023
        expected = plain_runner(bundle.graph(ratio))(feed)
        np.testing.assert_allclose(found["last_hidden_state"], expected["last_hidden_state"], rtol=1e-4, atol=1e-5)
        assert len(told) >= 3 and told[-1][0] == told[-1][1], "embeddings and two layers at least"


class KilledError(Exception):
    pass


ASKED: list[str] = []


@pytest.fixture
def killing(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Stops an export after so many tensors as the list says; counts them, and keeps their names in `ASKED`."""
    left, add = [10**9], WeightStore.add
    ASKED.clear()

    def counted(store: WeightStore, data: bytes, file: str, name: str = "") -> object:
        if left[0] <= 0:
            raise KilledError
        left[0] -= 1
        ASKED.append(name)
        return add(store, data, file, name)

    monkeypatch.setattr(WeightStore, "add", counted)
    yield left


@pytest.mark.parametrize("kind", ["bert", pytest.param("t5", marks=pytest.mark.slow)])
def test_an_export_that_was_stopped_goes_on_where_it_was(kind: str, killing: list[int], tmp_path: Path) -> None:
    model = checkpoint(kind, tmp_path / "model")
    place = plugins(tmp_path / "plugins", model)
    whole = export(str(model), tmp_path / "whole", settings(place, ratios=(4,)))
    ASKED.clear()
    for stop in (1, 7, 5):
        killing[0] = stop
        with pytest.raises(KilledError):
            export(str(model), tmp_path / "low", settings(place, ratios=(4,)))
        data = tmp_path / ".low.resumable" / "result" / "backbone.data"
        with data.open("ab") as file:  # what a kill leaves of a tensor that was being written
            file.write(b"half of it")
    killing[0] = 10**9
    low = export(str(model), tmp_path / "low", settings(place, ratios=(4,)))
    named = [name for name in ASKED if name]
    assert len(named) == len(set(named)) > 5, "what was written is not asked for again"
    assert contents(low) == contents(whole)
    assert not (tmp_path / ".low.resumable").exists()


@pytest.mark.slow
def test_another_model_does_not_go_on_with_what_was_begun(killing: list[int], tmp_path: Path) -> None:
    model = checkpoint("bert", tmp_path / "model")
    place = plugins(tmp_path / "plugins", model)
    killing[0] = 6
    with pytest.raises(KilledError):
        export(str(model), tmp_path / "low", settings(place))
    killing[0] = 10**9
    usual = export(str(model), tmp_path / "usual", settings(place, False, precision="bf16"), name="low")
    low = export(str(model), tmp_path / "low", settings(place, precision="bf16"))
    assert contents(low) == contents(usual)


@pytest.mark.slow
def test_a_full_disk_keeps_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = checkpoint("bert", tmp_path / "model")
    place = plugins(tmp_path / "plugins", model)
    add, left = WeightStore.add, [8]

    def full(store: WeightStore, data: bytes, file: str, name: str = "") -> object:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return add(store, data, file, name)

    monkeypatch.setattr(WeightStore, "add", full)
    with pytest.raises(VariatorError, match=r"No space left(.|\n)*goes on where it stopped"):
        export(str(model), tmp_path / "low", settings(place, ratios=(4,)))
    assert not (tmp_path / "low").exists()
    left[0] = 10**9
    assert export(str(model), tmp_path / "low", settings(place, ratios=(4,))).ratios == [1, 4]


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_a_damaged_checkpoint_is_told_before_anything_is_written(kind: str, tmp_path: Path) -> None:
    model = checkpoint(kind, tmp_path / "model")
    place = plugins(tmp_path / "plugins", model)
    shards = sorted(model.glob("model-*.safetensors"))
    assert len(shards) > 2

    def damaged(change: object, message: str) -> None:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(model, copy)
        change(copy)  # type: ignore[operator]
        with pytest.raises(BackboneError, match=message):
            export(str(copy), tmp_path / "low", settings(place))
        assert not (tmp_path / "low").exists()

    def edit_config(copy: Path, **values: object) -> None:
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, **values}))

    damaged(lambda copy: (copy / shards[1].name).unlink(), shards[1].name)
    damaged(lambda copy: (copy / shards[1].name).write_bytes(shards[1].read_bytes()[:-7]), shards[1].name)
    layers, first, wide = {
        "bert": ("num_hidden_layers", r"encoder\.layer\.2", "intermediate_size"),
        "t5": ("num_decoder_layers", r"decoder\.block\.3", "d_ff"),
    }[kind]
    damaged(lambda copy: edit_config(copy, **{layers: 4}), rf"lacks tensor '{first}")
    damaged(lambda copy: edit_config(copy, **{wide: 540}), r"is of shape(.|\n)*540")
    damaged(lambda copy: edit_config(copy, vocab_size=608), r"is of shape(.|\n)*608")
    damaged(lambda copy: (copy / "model.safetensors.index.json").write_text("{"), "damaged")
    damaged(lambda copy: (copy / "model.safetensors.index.json").unlink(), "no model.safetensors")

    def rename(copy: Path) -> None:
        tensors = load_file(copy / shards[0].name)
        save_file({f"x{name}": tensor for name, tensor in tensors.items()}, copy / shards[0].name)

    damaged(rename, "lacks tensor")

    def drop(copy: Path) -> None:
        index = json.loads((copy / "model.safetensors.index.json").read_text())
        index["weight_map"].pop(sorted(index["weight_map"])[3])
        (copy / "model.safetensors.index.json").write_text(json.dumps(index))

    damaged(drop, "lacks tensor")


@pytest.mark.slow
def test_a_checkpoint_of_links_is_read_as_the_hub_keeps_them(tmp_path: Path) -> None:
    model = checkpoint("bert", tmp_path / "blobs")
    links = tmp_path / "snapshot"
    links.mkdir()
    for path in model.iterdir():
        (links / path.name).symlink_to(path)
    low = export(str(links), tmp_path / "low", ExportSettings((2,), untrained=True, low_memory=True))
    assert low.ratios == [1, 2]
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../elsewhere.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BackboneError, match="outside"):
        stream_backbone(str(links))


@pytest.mark.slow
def test_a_lost_file_begins_the_weights_anew(killing: list[int], tmp_path: Path) -> None:
    model = checkpoint("bert", tmp_path / "model")
    place = plugins(tmp_path / "plugins", model)
    killing[0] = 9
    with pytest.raises(KilledError):
        export(str(model), tmp_path / "low", settings(place))
    killing[0] = 10**9
    (tmp_path / ".low.resumable" / "result" / "backbone.data").unlink()
    (tmp_path / ".low.resumable" / "result" / "setting-old.onnx").write_text("of an earlier attempt")
    low = export(str(model), tmp_path / "low", settings(place))
    usual = export(str(model), tmp_path / "usual", settings(place, False), name="low")
    assert contents(low) == contents(usual)


@pytest.mark.slow
def test_a_checkpoint_that_was_replaced_does_not_go_on(killing: list[int], tmp_path: Path) -> None:
    """Its encoder, and so its fingerprint, is the same; its decoder is not."""
    model = checkpoint("t5", tmp_path / "model", shard="1GB")
    place = plugins(tmp_path / "plugins", model)
    whole = export(str(model), tmp_path / "whole", settings(place))
    killing[0] = (10**9 - killing[0]) - 3  # in the decoder, which comes last
    with pytest.raises(KilledError):
        export(str(model), tmp_path / "low", settings(place))
    tensors = load_file(model / "model.safetensors")
    name = "decoder.block.0.layer.2.DenseReluDense.wi.weight"
    tensors[name] = tensors[name] + 0.01
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    killing[0] = 10**9
    low = export(str(model), tmp_path / "low", settings(place))
    usual = export(str(model), tmp_path / "usual", settings(place, False), name="low")
    assert contents(low) == contents(usual) != contents(whole)


def test_what_low_memory_cannot_do_is_told(tmp_path: Path) -> None:
    model = checkpoint("bert", tmp_path / "model")
    backbone = load_backbone(str(model))
    with pytest.raises(InputError, match="low memory"):
        export(backbone, tmp_path / "low", ExportSettings((2,), untrained=True, low_memory=True))
    with pytest.raises(InputError, match="low memory"):
        export(str(model), tmp_path / "low", ExportSettings((2,), untrained=True, low_memory=True, layout="shared"))
    with pytest.raises(BackboneError, match="no directory"):
        stream_backbone("org/name")
    command = [sys.executable, "-m", "variator", "export", "random:tiny", "--ratio", "2", "--untrained", "--low-memory"]
    done = subprocess.run([*command, "-o", str(tmp_path / "b")], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "no directory" in done.stderr and "Traceback" not in done.stderr


def test_a_wrong_weight_fails_the_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from variator.exporters import low_memory

    model, tensor = checkpoint("bert", tmp_path / "model"), low_memory._tensor

    def wrong(source: object, name: str) -> object:
        return tensor(lambda: source() * (1.5 if "layers.1.ffn.inner" in name else 1), name)  # type: ignore[operator]

    monkeypatch.setattr(low_memory, "_tensor", wrong)
    with pytest.raises(GateError, match="off by"):
        export(str(model), tmp_path / "low", ExportSettings((4,), untrained=True, low_memory=True))


def test_a_vocabulary_of_its_own_is_not_held(tmp_path: Path) -> None:
    backbone = stream_backbone(str(checkpoint("t5, untied", tmp_path / "model")))
    assert backbone.decoder is not None and backbone.stream is not None
    assert backbone.stream.decoder("vocabulary").shape == backbone.decoder.vocabulary.shape == (528, 607)
    held = [one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]
    assert not [
        one.shape for one in held if one.numel() == 528 * 607 and one.device.type == "cpu" and any(one.stride())
    ]


@pytest.mark.slow
def test_tied_and_untied_vocabularies(tmp_path: Path) -> None:
    """T5 v1.1 has a table of its own for its answers."""
    model = checkpoint("t5", tmp_path / "model", shard="1GB")
    place = plugins(tmp_path / "plugins", model)
    tied = export(str(model), tmp_path / "tied", settings(place))
    untied = export(str(untie(model)), tmp_path / "untied", settings(place))
    more = untied.manifest.files["backbone.data"].bytes - tied.manifest.files["backbone.data"].bytes
    assert 4 * 607 * 528 <= more < 4 * 607 * 528 + 8192
    assert untied.manifest.parameters - tied.manifest.parameters == 607 * 528
