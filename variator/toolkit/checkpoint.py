"""Load a checkpoint, local or from a hub, into the canonical encoder with its own head.

The task is read from the checkpoint's files: sentence-transformers' `modules.json` means `embed`, our `prompt.json` or
a `...ForSequenceClassification` architecture `classify`, `...ForQuestionAnswering` `qa`, `...ForConditionalGeneration`
`seq2seq`, anything else `hidden`.
No code from a model directory is ever run.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from variator.errors import BackboneError, InputError
from variator.toolkit.checkpoint_files import read_prompt, sentence_transformers
from variator.toolkit.decoder import Decoder
from variator.toolkit.encoder import Encoder, EncoderConfig, rotary_tables
from variator.toolkit.families import family_of
from variator.toolkit.families.base import ACTIVATION_NAMES, Classifier, DecoderParts, Family
from variator.toolkit.heads import OUTPUTS, ClassifyHead, EmbedHead, GapHead, HiddenHead, QaHead, linear
from variator.toolkit.plugin import Compression
from variator.toolkit.prompt import FILE, Prompt
from variator.toolkit.random_models import PREFIX, RANDOM_MARK, write_random_checkpoint
from variator.toolkit.rows import Special
from variator.toolkit.stream import Layered, Stream, open_stream, placeholders

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

AUTO_CLASSES = {
    "embed": "AutoModel",
    "classify": "AutoModelForSequenceClassification",
    "qa": "AutoModelForQuestionAnswering",
    "hidden": "AutoModel",
    "seq2seq": "AutoModelForSeq2SeqLM",
}

TORCH_ACTIVATIONS = {"torch.nn.modules.activation.Tanh": "tanh", "torch.nn.modules.linear.Identity": ""}
"""Activation classes that a sentence-transformers Dense module may name -> ours."""


GENERATION: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "length_penalty": 1.0,
    "early_stopping": False,
    "do_sample": False,
    "min_length": 0,
    "min_new_tokens": 0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "stop_strings": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "watermarking_config": None,
}
"""Settings of transformers' `generate` that change which tokens come, and the values that leave them alone."""


class Model(nn.Module):
    """Encoder and head: ids in, the task's outputs out."""

    def __init__(self, encoder: Encoder, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        plugin: Compression | None = None,
    ) -> tuple[Tensor, ...]:
        """Arguments as `Encoder.forward`; outputs as `heads.OUTPUTS` names them."""
        hidden = self.encoder(input_ids, attention_mask, token_type_ids, plugin)
        outputs: tuple[Tensor, ...] = self.head(hidden, attention_mask.to(hidden.dtype))
        return outputs

    def look(self, pixel_values: Tensor, plugin: Compression | None = None) -> tuple[Tensor, ...]:
        """The same for pictures: [batch, channels, size, size]."""
        hidden = self.encoder.look(pixel_values, plugin)
        outputs: tuple[Tensor, ...] = self.head(hidden, torch.ones_like(hidden[:, :, 0]))
        return outputs


@dataclass(frozen=True)
class Backbone:
    """A frozen pretrained model, ready to train plugins for and to export.

    Args:
        id: What the manifest calls it.
        family: Name of its family.
        task: A key of `heads.OUTPUTS`.
        model: The canonical encoder and head, in eval mode, fp32, no gradients.
        checkpoint: transformers' configuration of it.
        original: transformers' own model of the same checkpoint, the reference for ratio 1; None with a `stream`.
        tokenizer: transformers' tokenizer; None for models that read pictures.
        max_length: Longest sequence in tokens the checkpoint allows.
        token_types: Whether `token_type_ids` is an input.
        fingerprint: sha256 over the encoder's tensors; the head is not part of it.
        source: The directory or hub id it was loaded from.
        real: False for a checkpoint with random weights.
        decoder: Of task seq2seq; shares its embedding table with the encoder.
        prompt: How it is asked for a class, if it classifies by writing (`heads.GapHead`).
        generation: transformers' generation configuration, with a `stream`; else it is that of `original`.
        stream: Where the tensors are that `model` and `decoder` hold placeholders for, if it was loaded for low memory.
    """

    id: str
    family: str
    task: str
    model: Model
    checkpoint: PretrainedConfig
    original: PreTrainedModel | None
    tokenizer: Any
    max_length: int
    token_types: bool
    fingerprint: str
    source: str
    real: bool = True
    pooling: dict[str, Any] = field(default_factory=dict)
    decoder: Decoder | None = None
    stream: Stream | None = None
    generation: Any = None
    prompt: Prompt | None = None

    @property
    def config(self) -> EncoderConfig:
        """Sizes of the encoder."""
        return self.model.encoder.config

    @property
    def parameters(self) -> int:
        """How many there are, each once; those of a decoder, too."""
        modules = [self.model, *([self.decoder] if self.decoder is not None else [])]
        return sum({id(one): one.numel() for module in modules for one in module.parameters()}.values())

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        return OUTPUTS[self.task]

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of a classifier's classes, in order; empty for other tasks."""
        if self.prompt is not None:
            return tuple(self.prompt.names)
        if not isinstance(self.model.head, ClassifyHead):
            return ()
        named = self.checkpoint.id2label or {}
        return tuple(str(named.get(place, "")) for place in range(self.model.head.output.weight.shape[1]))

    @property
    def _generating(self) -> Any:
        return getattr(self.original, "generation_config", None) or self.generation or self.checkpoint

    @property
    def unapplied(self) -> dict[str, Any]:
        """What else the checkpoint says of how texts are generated, and `engines.generation` does not do by itself."""
        found = {name: getattr(self._generating, name, None) for name in GENERATION}
        return {name: value for name, value in found.items() if value not in (None, [], GENERATION[name])}

    @property
    def special(self) -> Special:
        """What texts are generated with.

        Raises:
            BackboneError: If the checkpoint does not say which token starts a text and which ends it.
        """
        names = ("decoder_start_token_id", "eos_token_id", "pad_token_id")
        start, ends, pad = (getattr(self._generating, name, None) for name in names)
        if start is None or ends is None or pad is None:
            raise BackboneError(
                f"{self.id} does not say how texts begin, end and are padded",
                valid="decoder_start_token_id, eos_token_id and pad_token_id in generation_config.json or config.json",
            )
        return Special(start, tuple(ends) if isinstance(ends, list) else (ends,), pad)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs, in order."""
        if self.config.picture:
            return ("pixel_values",)
        return ("input_ids", "attention_mask") + (("token_type_ids",) if self.token_types else ())


def fingerprint(family: Family, weights: Mapping[str, Tensor], config: PretrainedConfig) -> str:
    """sha256 over the checkpoint's encoder tensors as stored (and prepared): what a plugin was trained for.

    The folded tensors of `Encoder` would not do: their last bits depend on the machine's matrix product.
    """
    digest = hashlib.sha256()
    for name in family.encoder_sources(weights, config):
        tensor = weights[name].float().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def load_backbone(model: str, task: str | None = None, name: str | None = None) -> Backbone:
    """Load a checkpoint from a local directory or a hub id.

    Args:
        model: Directory or hub id; or `random:<size>`, a toy with random weights for speed measurements.
        task: Overrides the detected task; `embed` without sentence-transformers files means mean pooling
            and normalisation.
        name: What to call the model in manifests; the directory's name or the hub id by default.

    Weights come from safetensors files or, where a checkpoint has only `pytorch_model.bin`, through transformers'
    `weights_only` loading.

    Raises:
        BackboneError: If it cannot be read, is of an unsupported architecture, or lacks the task's head.
        InputError: For an unknown task.
    """
    import transformers

    if task is not None and task not in OUTPUTS:
        raise InputError(f"unknown task {task!r}", valid=", ".join(OUTPUTS))
    _quiet()
    if model.startswith(PREFIX):
        with tempfile.TemporaryDirectory() as scratch:
            directory = write_random_checkpoint(model.removeprefix(PREFIX), Path(scratch) / "model")
            return replace(load_backbone(str(directory), task, name or model.replace(":", "-")), source=model)
    directory = Path(model)
    if not directory.exists() and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise BackboneError(
            f"no directory {model!r}", valid="a directory with config.json, or a hub id such as org/name"
        )
    config = _load(transformers.AutoConfig, model)
    family = family_of(config.model_type)
    if family.picture is not None:  # of a model of texts and pictures its vision tower
        config = getattr(config, "vision_config", config)
    files = sentence_transformers(model)
    prompt = read_prompt(model) if family.decoder is not None and task in (None, "classify") else None
    task = task or ("classify" if prompt else _detect_task(config, files))
    sizes = family.encoder_config(config)
    original = _load_original(_class_of(family, config, "seq2seq" if prompt else task), model, task, family)
    stored = {key.removeprefix(f"{original.base_model_prefix}."): value for key, value in original.state_dict().items()}
    weights = family.prepare(stored, config)
    encoder = Encoder(sizes)
    state = family.encoder_weights(weights, config)
    encoder.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()}, assign=True)
    tokenizer = None if sizes.picture else _load(transformers.AutoTokenizer, model)
    decoder = None
    if task == "seq2seq" and family.decoder is not None:
        decoder = _decoder(family.decoder(weights, config, sizes), encoder.table)
    head, pooling = _head(task, family, weights, files, config)
    if prompt is not None and family.decoder is not None:
        head = _gap_head(family.decoder(weights, config, sizes), encoder.table, prompt, tokenizer, original, model)
    limit = int(files.get("sentence_bert_config.json", {}).get("max_seq_length") or encoder.config.max_length)
    return Backbone(
        id=name or (directory.resolve().name if directory.exists() else model),
        family=family.name,
        task=task,
        model=Model(encoder, head).eval().requires_grad_(False),
        checkpoint=config,
        original=original,
        tokenizer=tokenizer,
        max_length=min(limit, encoder.config.max_length),
        token_types=encoder.config.token_types > 1 and task != "embed",
        fingerprint=fingerprint(family, weights, config),
        source=model,
        real=not getattr(config, RANDOM_MARK, False),
        pooling=pooling,
        decoder=None if decoder is None else decoder.eval().requires_grad_(False),
        prompt=prompt,
    )


def stream_backbone(model: str, task: str | None = None, name: str | None = None) -> Backbone:
    """A checkpoint in a local directory, opened without reading it: for models that are larger than memory.

    What it holds computes nothing: its large tensors are placeholders. `exporters.low_memory` exports it.

    Raises:
        BackboneError: As `load_backbone`, and for a checkpoint that is not in safetensors files, or lacks a tensor.
        InputError: For an unknown task.
    """
    import transformers

    if task is not None and task not in OUTPUTS:
        raise InputError(f"unknown task {task!r}", valid=", ".join(OUTPUTS))
    _quiet()
    directory = Path(model)
    if not directory.is_dir():
        raise BackboneError(f"{model!r} is no directory", valid="a local checkpoint for --low-memory")
    config = _load(transformers.AutoConfig, model)
    family = family_of(config.model_type)
    if family.picture is not None:
        raise BackboneError(f"{config.model_type!r} is not exported with low memory", fix="leave --low-memory out")
    files = sentence_transformers(model)
    if task in (None, "classify") and family.decoder is not None and read_prompt(model):
        raise BackboneError(
            f"{model!r} classifies by writing, which is not exported with low memory",
            valid="--task seq2seq, and score the words; or no --low-memory",
        )
    task = task or _detect_task(config, files)
    auto = _class_of(family, config, task)
    concrete = auto._model_mapping[type(config)] if hasattr(auto, "_model_mapping") else auto
    prefix = f"{concrete.base_model_prefix}."
    tensors = open_stream(model, prefix)
    with torch.device("meta"):
        tensors.check(concrete(config), lambda name: _needed(name, task, family))
    weights = Layered(tensors, family, config)
    sizes = family.encoder_config(config)
    decodes = task == "seq2seq" and family.decoder is not None
    parts = family.decoder(weights, config, sizes) if decodes and family.decoder else None
    stream = Stream(weights, family, config, parts)
    with torch.device("meta"):
        encoder = Encoder(sizes)
    encoder.rotary = rotary_tables(sizes)
    placeholders(encoder, stream.encoder)
    decoder = None if parts is None else _placeholder_decoder(parts, encoder.table, stream)
    head, pooling = _head(task, family, weights, files, config)
    limit = int(files.get("sentence_bert_config.json", {}).get("max_seq_length") or sizes.max_length)
    return Backbone(
        id=name or directory.resolve().name,
        family=family.name,
        task=task,
        model=Model(encoder, head).eval().requires_grad_(False),
        checkpoint=config,
        original=None,
        tokenizer=_load(transformers.AutoTokenizer, model),
        max_length=min(limit, sizes.max_length),
        token_types=sizes.token_types > 1 and task != "embed",
        fingerprint=fingerprint(family, weights, config),
        source=model,
        real=not getattr(config, RANDOM_MARK, False),
        pooling=pooling,
        decoder=None if decoder is None else decoder.eval().requires_grad_(False),
        stream=stream,
        generation=_generation(directory),
    )


def _generation(directory: Path) -> Any:
    """What `generation_config.json` says; None without it."""
    import transformers

    if not (directory / "generation_config.json").is_file():
        return None
    return _load(transformers.GenerationConfig, str(directory))


def _placeholder_decoder(parts: DecoderParts, token: nn.Embedding, stream: Stream) -> Decoder:
    """A decoder that holds nothing, over the encoder's embedding table."""
    output = None if parts.output is None else nn.Parameter(torch.empty_like(token.weight.t(), device="meta"), False)
    with torch.device("meta"):
        decoder = Decoder(parts.config, token, output, parts.scale)
    placeholders(decoder, stream.decoder, {"token.weight": token.weight})
    return decoder


def _decoder(parts: DecoderParts, token: nn.Embedding) -> Decoder:
    """A decoder with its tensors, over the encoder's embedding table."""
    output = None if parts.output is None else nn.Parameter(parts.output().float())
    decoder = Decoder(parts.config, token, output, parts.scale)
    tables = {"token.weight": token.weight, **({} if output is None else {"vocabulary": output})}
    decoder.load_state_dict({**{k: v.float() for k, v in parts.state().items()}, **tables}, assign=True)
    return decoder


def _gap_head(
    parts: DecoderParts, table: nn.Embedding, prompt: Prompt, tokenizer: Any, original: PreTrainedModel, model: str
) -> GapHead:
    """What classifies by a prompt's words: of the vocabulary's tables no more than these."""
    start = start_of(original)
    if start is None:
        raise BackboneError(f"{model!r} does not say how texts begin", valid="decoder_start_token_id in config.json")
    try:
        gap, words = prompt.tokens(tokenizer)
    except InputError as error:
        raise BackboneError(f"{FILE} of {model!r}: {error}") from error
    known = nn.Embedding(2, table.embedding_dim, _weight=table.weight[[start, gap]].clone())
    output = table.weight[words].t() if parts.output is None else parts.output()[:, words].float()
    return GapHead(_decoder(replace(parts, output=output.contiguous), known))


def start_of(original: Any) -> int | None:
    """Token that the texts of transformers' model begin with, where it says so."""
    start: int | None = getattr(original.generation_config, "decoder_start_token_id", None)
    return original.config.decoder_start_token_id if start is None else start


def writes(model: str) -> bool:
    """Whether a checkpoint is of a family that writes texts. Errors as `load_backbone`."""
    import transformers

    return family_of(_load(transformers.AutoConfig, model).model_type).decoder is not None


def _class_of(family: Family, config: PretrainedConfig, task: str) -> Any:
    """transformers' class for a family's encoder with a task's head.

    Raises:
        BackboneError: If there is none, or its head is not computed here.
    """
    import transformers

    encoder_alone = AUTO_CLASSES[task] == "AutoModel"
    computed = {
        "classify": family.classifier is not None,
        "qa": family.answers and not family.auto_classes,
        "seq2seq": family.decoder is not None,
    }
    if not computed.get(task, True):
        valid = [name for name in AUTO_CLASSES if computed.get(name, True)]
        asked = f"; or classify with {FILE}, as variator finetune writes it" if family.decoder is not None else ""
        raise BackboneError(
            f"task {task} is not supported for {config.model_type!r}", valid=f"{', '.join(valid)} (--task){asked}"
        )
    own = family.auto_classes.get(config.model_type) if encoder_alone else None
    return getattr(transformers, own or AUTO_CLASSES[task])


def _quiet() -> None:
    """transformers' loading bars and reports belong to its own command line, not to ours."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("httpx").setLevel(logging.ERROR)


def _load(auto_class: Any, model: str, **options: Any) -> Any:
    try:
        return auto_class.from_pretrained(model, trust_remote_code=False, **options)
    except Exception as error:  # transformers raises many kinds; all mean that the checkpoint cannot be used
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BackboneError(
            f"cannot load {model!r} with {auto_class.__name__}: {reason}",
            valid="a directory in Hugging Face format, or a hub id that this machine can reach or has cached",
            fix="check the path, or download the checkpoint to a local directory",
        ) from error


def _load_original(auto_class: Any, model: str, task: str, family: Family) -> PreTrainedModel:
    original, report = _load(auto_class, model, output_loading_info=True, dtype=torch.float32)
    missing = [key for key in report["missing_keys"] if _needed(key, task, family)]
    if missing:
        raise BackboneError(
            f"{model!r} lacks {len(missing)} tensors that task {task!r} needs, the first {sorted(missing)[0]!r}",
            valid=f"a checkpoint trained for it, or --task {'hidden' if task != 'hidden' else 'embed'}",
        )
    loaded: PreTrainedModel = original.eval().requires_grad_(False)
    return loaded


def _needed(name: str, task: str, family: Family) -> bool:
    """Whether a tensor of transformers' model is computed with: a pooler is by some classifiers alone."""
    of_pooler = task == "classify" and bool(family.classifier and family.classifier.dense.startswith("pooler"))
    return of_pooler or ".pooler." not in f".{name}"


def _detect_task(config: PretrainedConfig, files: Mapping[str, Any]) -> str:
    if "modules.json" in files:
        return "embed"
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if architecture.endswith("ForSequenceClassification"):
        return "classify"
    if architecture.endswith("ForConditionalGeneration"):
        return "seq2seq"
    return "qa" if architecture.endswith("ForQuestionAnswering") else "hidden"


def _head(
    task: str, family: Family, weights: Mapping[str, Tensor], files: Mapping[str, Any], config: PretrainedConfig
) -> tuple[nn.Module, dict[str, Any]]:
    if task == "embed":
        return _embed_head(files)
    if task == "classify" and family.classifier is not None:
        return _classify_head(family.classifier, weights, config), {}
    if task == "qa":
        return QaHead(linear(weights["qa_outputs.weight"], weights["qa_outputs.bias"])), {}
    return HiddenHead(), {}


def _classify_head(names: Classifier, weights: Mapping[str, Tensor], config: PretrainedConfig) -> ClassifyHead:
    dense, output = (
        linear(weights[f"{name}.weight"], weights.get(f"{name}.bias")) for name in (names.dense, names.output)
    )
    activation = names.activation
    if names.activation_setting:
        activation = ACTIVATION_NAMES.get(getattr(config, names.activation_setting), "")
    pooling = getattr(config, names.pooling_setting) if names.pooling_setting else "cls"
    if not activation or pooling not in ("cls", "mean"):
        raise BackboneError(
            f"a classifier with {getattr(config, names.activation_setting)!r} and pooling {pooling!r} is not supported",
            valid=f"{', '.join(ACTIVATION_NAMES)}; cls or mean",
        )
    norm = None
    if names.norm:
        bias = weights.get(f"{names.norm}.bias")
        norm = torch.nn.LayerNorm(output.weight.shape[0], getattr(config, "norm_eps", 1e-5), bias=bias is not None)
        norm.weight = torch.nn.Parameter(weights[f"{names.norm}.weight"])
        if bias is not None:
            norm.bias = torch.nn.Parameter(bias)
    return ClassifyHead(dense, activation, output, norm, pooling)


def _embed_head(files: Mapping[str, Any]) -> tuple[EmbedHead, dict[str, Any]]:
    if not files:
        return EmbedHead("mean", True), {"pooling": "mean", "normalise": True}
    settings = files.get("Pooling") or {}
    modes = {"cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens", "mean_sqrt_length": "mean_sqrt_len_tokens"}
    chosen = [mode for mode, key in modes.items() if settings.get(f"pooling_mode_{key}")]
    if not chosen and settings.get("pooling_mode"):
        chosen = [str(settings["pooling_mode"])]
    if len(chosen) != 1:
        raise BackboneError(
            f"pooling {chosen or settings} is not supported", valid=f"exactly one of {', '.join(modes)}"
        )
    dense, activation = None, ""
    if "Dense" in files:
        from safetensors.torch import load_file

        name = str(files["Dense"].get("activation_function", ""))
        if name not in TORCH_ACTIVATIONS or files["Dense weights"] is None:
            raise BackboneError(
                f"the Dense module ({name}) cannot be loaded",
                valid=f"model.safetensors with activation {', '.join(TORCH_ACTIVATIONS)}",
            )
        tensors = load_file(files["Dense weights"])
        dense, activation = (
            linear(tensors["linear.weight"].float(), tensors.get("linear.bias")),
            TORCH_ACTIVATIONS[name],
        )
    normalise = "Normalize" in files
    head = EmbedHead(chosen[0], normalise, dense, activation)
    return head, {"pooling": chosen[0], "normalise": normalise, "dense": dense is not None, "from": "modules.json"}
