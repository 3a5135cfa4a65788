"""Checkpoints with random weights at the usual sizes, for speed and tests. Every record calls them toys."""

from __future__ import annotations

from pathlib import Path

from variator.errors import InputError

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


def write_random_checkpoint(size: str, directory: Path, seed: int = 0) -> Path:
    """Write a BERT checkpoint with random weights and a word tokenizer of made-up words.

    Args:
        size: Key of `SIZES`.

    Raises:
        InputError: For an unknown size.
    """
    import torch
    from transformers import BertConfig, BertModel

    if size not in SIZES:
        raise InputError(f"no random model of size {size!r}", valid=", ".join(f"{PREFIX}{name}" for name in SIZES))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = BertConfig(**{"vocab_size": 30522, **SIZES[size]})
        setattr(config, RANDOM_MARK, True)
        BertModel(config, add_pooling_layer=False).save_pretrained(directory)
    write_word_tokenizer(config.vocab_size, directory)
    return directory


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
