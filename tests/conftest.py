"""Tiny random models, made once per session; everything the tests run on."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from filelock import FileLock
from safetensors.torch import load_file, save_file

from variator.engines.build import build
from variator.engines.built import LATENCY_FILE
from variator.engines.latency import calibrate
from variator.engines.runtime import Runtime
from variator.exporters.export import ExportSettings, export
from variator.toolkit.bundle import Bundle
from variator.toolkit.checkpoint import Backbone, load_backbone
from variator.toolkit.plugin_file import Head, Plugin, save_plugin, untrained_plugin
from variator.toolkit.plugin_format import PluginConfig, scheduled, tensor_shapes
from variator.toolkit.random_models import write_random_checkpoint, write_word_tokenizer

torch.set_num_threads(1)
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 120,
}
CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "bert": lambda: transformers.BertConfig(**SIZES, max_position_embeddings=160),
    "roberta": lambda: transformers.RobertaConfig(**SIZES, max_position_embeddings=162, type_vocab_size=1),
    "xlm-roberta": lambda: transformers.XLMRobertaConfig(**SIZES, max_position_embeddings=162, type_vocab_size=1),
    "distilbert": lambda: transformers.DistilBertConfig(
        dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=120, max_position_embeddings=160
    ),
    "electra": lambda: transformers.ElectraConfig(**SIZES, embedding_size=16, max_position_embeddings=160),
    "mpnet": lambda: transformers.MPNetConfig(**SIZES, max_position_embeddings=162),
    "deberta-v2": lambda: deberta(type_vocab_size=0, position_biased_input=False, share_att_key=True),
    "deberta-v2, own projections": lambda: deberta(type_vocab_size=2, position_biased_input=True, share_att_key=False),
    "modernbert": lambda: modernbert(),
    "modernbert, all biases": lambda: modernbert(
        attention_bias=True, mlp_bias=True, norm_bias=True, classifier_bias=True, classifier_pooling="mean"
    ),
    "nomic_bert": lambda: transformers.NomicBertConfig(**SIZES, max_position_embeddings=160),
    "t5": lambda: t5(feed_forward_proj="relu"),
    "t5, gated": lambda: t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "mt5": lambda: transformers.MT5Config(**T5_SIZES, feed_forward_proj="gated-gelu"),
}
"""Every family of texts, and what differs inside of one. Each is a row of the tests that all of them have to pass."""

PICTURE_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 4}
PICTURES: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "vit": lambda: transformers.ViTConfig(**PICTURE_SIZES, intermediate_size=64),
    "clip_vision_model": lambda: transformers.CLIPVisionConfig(**PICTURE_SIZES, intermediate_size=64),
    "siglip_vision_model": lambda: transformers.SiglipVisionConfig(**PICTURE_SIZES, intermediate_size=64),
    "dinov2": lambda: transformers.Dinov2Config(**PICTURE_SIZES, mlp_ratio=2),
    "dinov2, giant": lambda: transformers.Dinov2Config(**PICTURE_SIZES, mlp_ratio=2, use_swiglu_ffn=True),
}
"""Every family of pictures: 7 x 7 patches."""

T5_SIZES = {"d_model": 32, "d_ff": 64, "d_kv": 6, "num_heads": 4, "num_layers": 2, "vocab_size": 120,
            "relative_attention_num_buckets": 16, "relative_attention_max_distance": 40}  # fmt: skip
"""Heads of another size than the hidden size would give, as in T5-3B."""


def t5(**settings: object) -> transformers.T5Config:
    """A tiny T5."""
    return transformers.T5Config(**T5_SIZES, **settings)


def deberta(**settings: object) -> transformers.DebertaV2Config:
    """A tiny DeBERTa-v2 whose farthest distances are beyond its buckets."""
    return transformers.DebertaV2Config(
        **SIZES, max_position_embeddings=160, relative_attention=True, position_buckets=8, max_relative_positions=-1,
        pos_att_type="p2c|c2p", norm_rel_ebd="layer_norm", pooler_hidden_act="gelu", **settings,
    )  # fmt: skip


def modernbert(**settings: object) -> transformers.ModernBertConfig:
    """A tiny ModernBERT with a narrow window in its second and third layer."""
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
    sizes = {**SIZES, "num_hidden_layers": 4}
    return transformers.ModernBertConfig(**sizes, max_position_embeddings=160, local_attention=12, **ids, **settings)


HEADLESS = {
    ("t5", "classify"), ("t5", "qa"), ("t5, gated", "classify"), ("t5, gated", "qa"), ("mt5", "classify"),
    ("mt5", "qa"),    ("modernbert", "qa"), ("modernbert, all biases", "qa"), ("nomic_bert", "qa"),
}  # fmt: skip
"""Tasks that a kind has no head for: transformers has none, or one that is not computed here."""


def write_checkpoint(kind: str, directory: Path, auto: str = "AutoModel", **settings: object) -> Path:
    """A tiny random checkpoint of one architecture, through transformers' own classes. Nothing in it is zero."""
    config = (CONFIGS | PICTURES)[kind]()
    for name, value in settings.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(config)
    for name, parameter in model.named_parameters():
        is_norm = "norm" in name.lower() and name.endswith("weight")
        torch.nn.init.normal_(parameter, mean=1.0 if is_norm else 0.0, std=0.2)
    model.save_pretrained(directory)
    write_word_tokenizer(120, directory)
    return directory


def untie(directory: Path) -> Path:
    """Give a T5 a table of its own for its answers, as v1.1, Flan and mT5 have: transformers makes tied ones alone."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors
    table = tensors["shared.weight"]
    drawn = torch.randn(table.shape, generator=torch.Generator().manual_seed(7)) * table.float().std()
    save_file({**tensors, "lm_head.weight": drawn.to(table.dtype)}, file, {"format": "pt"})
    return directory


def make_sentence_transformer(directory: Path, pooling: str = "mean_tokens") -> Path:
    """Turn a checkpoint into a sentence-transformers model."""
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(
        f'{{"word_embedding_dimension": 32, "pooling_mode_{pooling}": true}}'
    )
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    entries = [
        f'{{"idx": {i}, "name": "{i}", "path": "{path}", "type": "sentence_transformers.models.{kind}"}}'
        for i, (path, kind) in enumerate(modules)
    ]
    (directory / "modules.json").write_text(f"[{', '.join(entries)}]")
    (directory / "sentence_bert_config.json").write_text('{"max_seq_length": 150, "do_lower_case": false}')
    return directory


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny sentence-transformers BERT."""
    return make_sentence_transformer(write_checkpoint("bert", tmp_path_factory.mktemp("models") / "tiny-embedder"))


@pytest.fixture(scope="session")
def backbone(checkpoint: Path) -> Backbone:
    """The tiny embedder, loaded."""
    return load_backbone(str(checkpoint))


def hear_ctrl_c() -> None:
    """For a process that is to be interrupted: what a shell's background jobs start does not hear it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A directory that whichever process of this run needs it first makes; not to be changed."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    place = root / "made-once" / name
    place.parent.mkdir(exist_ok=True)
    with FileLock(place.with_name(f".{name}.lock")):
        if not (done := place.with_name(f".{name}.done")).exists():
            make(place)
            done.touch()
    return place


@pytest.fixture(scope="session")
def bundle(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny embedder, exported at ratios 1, 2 and 4 with untrained plugins. Not to be changed: copy it."""
    settings = ExportSettings((2, 4), untrained=True, rank=16)
    return Bundle.open(once(tmp_path_factory, "tiny", lambda path: export(backbone, path, settings)))


@pytest.fixture(scope="session")
def shared_bundle(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same in the shared layout, with an engine each of onnxruntime and openvino (fp32). Not to be changed."""
    from variator.engines.backends import BACKENDS
    from variator.engines.build import build

    def make(path: Path) -> None:
        exported = export(backbone, path, ExportSettings((2, 4), untrained=True, rank=16, layout="shared"))
        for engine in ("onnxruntime", "openvino"):
            if not BACKENDS[engine].missing():
                build(exported, engine, "fp32")

    return Bundle.open(once(tmp_path_factory, "tiny-shared", make))


def lively(backbone: Backbone, ratio: int, seed: int = 0, rank: int = 8, classes: int = 0) -> Plugin:
    """A plugin with no tensor at zero, so that every one of them matters; with a head if `classes` says so."""
    plugin = untrained_plugin(backbone, PluginConfig(ratio, rank))
    rng = np.random.default_rng(100 * seed + ratio)
    tensors = {
        name: (tensor + 0.3 * rng.standard_normal(tensor.shape)).astype(np.float16).astype(np.float32)
        for name, tensor in plugin.tensors.items()
    }
    head = random_head(plugin.hidden_size, classes, seed) if classes else None
    return replace(plugin, tensors=tensors, training={"stage": "test"}, head=head)


def random_head(hidden: int, classes: int, seed: int = 0) -> Head:
    """A classifier with random values."""
    rng = np.random.default_rng(seed)
    return Head(*(rng.standard_normal(shape).astype(np.float32) for shape in ((classes, hidden), (classes,))))


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint `random:tiny` writes."""
    return write_random_checkpoint("tiny", tmp_path_factory.mktemp("models") / "toy")


LONG = PluginConfig(4, 8, "gelu", keys_values=2, keys_values_rank=4, name="long")
ONLY_KV = PluginConfig(1, 8, keys_values=4, name="only-kv")
UNEVEN = scheduled("s50", [(8, 6), (2, 10)], "gelu")
PARTLY = scheduled("partly", [(1, 8), (4, 8)], keys_values=4)
FIRST = PluginConfig(4, 8, keys_values=2, first_alone=True, name="first")
SETTINGS = (FIRST, LONG, ONLY_KV, UNEVEN, PARTLY)
"""One setting of every kind beyond a ratio."""


def made(backbone: Backbone, config: PluginConfig) -> Plugin:
    """A plugin of a configuration with no tensor at zero."""
    rng = np.random.default_rng(len(config.name))
    shapes = tensor_shapes(config, backbone.config.hidden_size, backbone.config.layers)
    tensors = {
        name: (0.3 * rng.standard_normal(shape)).astype(np.float16).astype(np.float32) for name, shape in shapes.items()
    }
    return replace(lively(backbone, 2), config=config, tensors=tensors)


@pytest.fixture(scope="session")
def named_plugins(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("plugins")
    for config in SETTINGS:
        save_plugin(made(backbone, config), place)
    save_plugin(lively(backbone, 4), place)
    return place


@pytest.fixture(scope="session")
def named(backbone: Backbone, named_plugins: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny embedder with ratio 4 and every kind of setting, exported; its gate has passed."""
    settings = ExportSettings((4, *(config.name for config in SETTINGS)), named_plugins)
    return Bundle.open(once(tmp_path_factory, "named", lambda path: export(backbone, path, settings)))


@pytest.fixture(scope="session")
def calibrated(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with an ONNX Runtime engine and a table of its latency; not to be changed."""

    def make(path: Path) -> None:
        shutil.copytree(bundle.path, path)
        build(path, "onnxruntime", "fp32")
        write_latency(path)

    return once(tmp_path_factory, "calibrated", make)


def write_latency(path: Path) -> None:
    """A table of the latency of a bundle's fp32 engine of ONNX Runtime."""
    with Runtime.open(path, "onnxruntime", "fp32") as opened:
        lengths = (8, 64, opened.bundle.manifest.max_length)
        table = calibrate(opened, runs=3, batches=(1, 4, 16), lengths=lengths)
        # Machine and key are real, times are made up: a toy's ratios all take the same, in the order of chance.
        points = [
            replace(point, p50_ms=time, p95_ms=1.2 * time)
            for point in table.points
            for time in [(0.3 + 0.001 * point.batch * point.length) / (1 + 0.1 * int(point.ratio))]
        ]
        (opened.built.directory / LATENCY_FILE).write_text(replace(table, points=tuple(points)).to_json())
