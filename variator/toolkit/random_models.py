"""Checkpoints with random weights at the usual sizes, for speed and tests. Every record calls them toys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from variator.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

PREFIX = "random:"
RANDOM_MARK = "variator_random_weights"
"""Setting in config.json by which a checkpoint says that it was never trained."""

SIZES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 120,
    },
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "bert-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "bert-large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}
"""BERT sizes by name; vocabulary 30,522 unless said otherwise."""

T5_SIZES: dict[str, dict[str, int]] = {
    "t5-tiny": {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 2, "vocab_size": 120},
    "t5-base": {"d_model": 768, "d_ff": 3072, "d_kv": 64, "num_heads": 12, "num_layers": 12},
    "t5-large": {"d_model": 1024, "d_ff": 4096, "d_kv": 64, "num_heads": 16, "num_layers": 24},
    "t5-3b": {"d_model": 1024, "d_ff": 16384, "d_kv": 128, "num_heads": 32, "num_layers": 24},
    "t5-11b": {"d_model": 1024, "d_ff": 65536, "d_kv": 128, "num_heads": 128, "num_layers": 24},
}
"""T5 v1.0 sizes by name; vocabulary 32,128 unless said otherwise."""


def random_config(size: str) -> PretrainedConfig:
    """The configuration of a random model.

    Raises:
        InputError: For an unknown size.
    """
    from transformers import BertConfig, T5Config

    if size in SIZES:
        config: PretrainedConfig = BertConfig(**{"vocab_size": 30522, **SIZES[size]})
    elif size in T5_SIZES:
        ends = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 3}  # of the word tokenizer
        config = T5Config(**{"vocab_size": 32128, **ends, **T5_SIZES[size]})
    else:
        valid = ", ".join(f"{PREFIX}{name}" for name in (*SIZES, *T5_SIZES))
        raise InputError(f"no random model of size {size!r}", valid=valid)
    setattr(config, RANDOM_MARK, True)
    return config


def write_random_checkpoint(size: str, directory: Path, seed: int = 0) -> Path:
    """Write a BERT, or a T5 with its decoder, with random weights and a word tokenizer of made-up words.

    Args:
        size: Key of `SIZES` or `T5_SIZES`.

    Raises:
        InputError: For an unknown size.
    """
    import torch
    from transformers import BertModel, T5ForConditionalGeneration

    config = random_config(size)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertModel(config, add_pooling_layer=False) if size in SIZES else T5ForConditionalGeneration(config)
        model.save_pretrained(directory)
    write_word_tokenizer(config.vocab_size, directory)
    return directory


def write_random_shards(size: str, directory: Path, shard_bytes: int = 1 << 30, seed: int = 0) -> Path:
    """Write a T5 in bf16, shard by shard, without ever holding all of it.

    Args:
        size: Key of `T5_SIZES`.
        shard_bytes: Of a file, about; a tensor is never cut.

    Raises:
        InputError: For an unknown size.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import T5ForConditionalGeneration

    if size not in T5_SIZES:
        raise InputError(f"no random T5 of size {size!r}", valid=", ".join(T5_SIZES))
    config = random_config(size)
    config.architectures = ["T5ForConditionalGeneration"]
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = [(name, tuple(one.shape)) for name, one in T5ForConditionalGeneration(config).named_parameters()]
    places: dict[str, str] = {}
    held: dict[str, torch.Tensor] = {}

    def write() -> None:
        file = f"model-{len(set(places.values())) + 1:05d}.safetensors"
        save_file(held, directory / file, {"format": "pt"})
        places.update(dict.fromkeys(held, file))
        held.clear()

    for name, shape in shapes:
        held[name] = _drawn(name, shape, config.d_kv, generator).to(torch.bfloat16)
        if sum(2 * one.numel() for one in held.values()) >= shard_bytes:
            write()
    if held:
        write()
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    write_word_tokenizer(config.vocab_size, directory)
    return directory


def _drawn(name: str, shape: tuple[int, ...], head_size: int, generator: torch.Generator) -> torch.Tensor:
    """A tensor of T5 as its training began: Raffel et al. do not scale attention, but its queries' weights."""
    import torch

    if len(shape) == 1:
        return torch.ones(shape)
    inputs = 1 if name.startswith("shared") else shape[1] * head_size if name.endswith(".q.weight") else shape[1]
    drawn: torch.Tensor = torch.randn(shape, generator=generator) * float(inputs) ** -0.5
    return drawn


def write_word_tokenizer(vocabulary: int, directory: Path) -> None:
    """A word tokenizer whose vocabulary is BERT's special tokens, letters and made-up words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [mark + chr(code) for code in range(ord("a"), ord("z") + 1) for mark in ("", "##")]
    words = (special + letters + [f"w{index}" for index in range(vocabulary)])[:vocabulary]
    tokens = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(tokens, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(directory)
