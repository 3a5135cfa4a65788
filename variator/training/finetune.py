"""A backbone for a task: transformers' own model and Trainer, no more than put together.

The result is a checkpoint in Hugging Face format that `train --task`, `export` and everything else take. STS-B needs
none: it is scored by embeddings as they are.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from variator.errors import BackboneError, InputError, VariatorError
from variator.files import claim, directory_written_whole
from variator.tasks.read import Split
from variator.toolkit.checkpoint import AUTO_CLASSES, Backbone, load_backbone, writes
from variator.toolkit.prompt import FILE
from variator.training.labelled import items
from variator.training.processes import Processes
from variator.training.settings import check_precision


@dataclass(frozen=True)
class FinetuneSettings:
    """Settings of a fine-tuning; the defaults are those usual for small encoders.

    Args:
        epochs: Passes over the training split; None takes 2 (large) to 8 (a few thousand rows).
        learning_rate: Peak of AdamW's linear schedule.
        batch: Rows per step.
        seed: Of head and order.
        precision: fp32, bf16, or `auto`: bf16 where the device has it.
        overwrite: Whether an existing checkpoint may be replaced.
    """

    epochs: float | None = None
    learning_rate: float = 5e-5
    batch: int = 32
    seed: int = 0
    precision: str = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        usable = self.epochs is None or 0 < self.epochs < math.inf
        if not usable or not 0 < self.learning_rate < math.inf or self.batch < 1:
            raise InputError(
                f"{self.epochs} epochs at {self.learning_rate} in batches of {self.batch}", valid="positive numbers"
            )
        check_precision(self.precision)


def finetune(
    model: str,
    split: Split,
    output: Path,
    settings: FinetuneSettings,
    on_step: Callable[[int, int], None] = lambda step, steps: None,
) -> Path:
    """Fine-tune a checkpoint on a task's training split and write it to `output`.

    An interrupted run goes on from its last epoch when it is called again with the same arguments: what it needs lies
    beside `output` until it is done.

    Args:
        model: Directory or hub id of an encoder.
        on_step: Told the step and how many there are.

    Raises:
        InputError: For a task that needs no fine-tuned backbone, or an `output` that is there or being made.
        BackboneError: If the checkpoint cannot be loaded.
    """
    if split.task.head not in ("classify", "qa"):
        raise InputError(
            f"{split.task.name} is scored by embeddings as they are",
            valid="a classification task or squad",
            fix="variator train MODEL --task stsb adapts a plugin to it",
        )
    if output.exists() and not settings.overwrite:
        raise InputError(f"{output} exists already", fix="choose another -o, or pass --overwrite")
    if output.exists() and not (output / "config.json").exists():
        raise InputError(f"{output} exists and is no checkpoint, so it is not overwritten", fix="choose another -o")
    if output.resolve() == Path(model).resolve():
        raise InputError(f"{output} is what is to be fine-tuned, so it is not overwritten", fix="choose another -o")
    processes = Processes()
    with processes.alone(output):
        return _finetune(model, split, output, settings, processes, on_step)


def _finetune(
    model: str,
    split: Split,
    output: Path,
    settings: FinetuneSettings,
    processes: Processes,
    on_step: Callable[[int, int], None],
) -> Path:
    import transformers

    transformers.set_seed(settings.seed)  # before the head is made
    writer = writes(model)
    prompt = split.task.prompt if writer else None
    backbone = replace(load_backbone(model, "seq2seq" if writer else "hidden"), prompt=prompt)
    rows = _rows(backbone, split)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    scratch = output.with_name(f".{output.name}.training")
    if processes.main:
        made_from = [asdict(replace(settings, overwrite=False)), backbone.fingerprint, split.origin]
        claim(scratch, made_from, anew=settings.overwrite)
    processes.wait()

    class Tell(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            on_step(state.global_step, state.max_steps)

    trainer = transformers.Trainer(
        model=_with_head(backbone, split, processes.device.type == "cpu"),
        args=_arguments(scratch, len(split.examples), settings, processes),
        train_dataset=rows,
        data_collator=_collator(backbone),
        callbacks=[Tell()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    result = trainer.train(resume_from_checkpoint=_last_epoch(scratch))
    if not math.isfinite(result.training_loss):
        shutil.rmtree(scratch, ignore_errors=True)
        raise VariatorError(
            f"the loss of {split.task.name} is {result.training_loss}", fix="fine-tune with a lower --learning-rate"
        )
    if processes.main:
        with directory_written_whole(output, replace=settings.overwrite) as directory:
            trainer.model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
            if prompt is not None:
                (directory / FILE).write_text(prompt.to_json(), encoding="utf-8")
        shutil.rmtree(scratch, ignore_errors=True)
    processes.wait()
    return output


def _last_epoch(scratch: Path) -> str | None:
    """The newest checkpoint that was written to its end: Trainer writes its state last."""
    whole = [path for path in scratch.glob("checkpoint-*") if (path / "trainer_state.json").exists()]
    return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None


def _arguments(scratch: Path, examples: int, settings: FinetuneSettings, processes: Processes) -> Any:
    """Trainer's own settings."""
    import transformers

    return transformers.TrainingArguments(
        output_dir=str(scratch),
        num_train_epochs=settings.epochs or min(8, max(2, round(36_000 / examples))),
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.batch,
        warmup_steps=0.06,  # below 1: a share of the steps
        weight_decay=0.01,
        seed=settings.seed,
        bf16=processes.bf16(settings.precision),
        use_cpu=processes.device.type == "cpu",
        train_sampling_strategy="group_by_length",
        length_column_name="length",
        save_strategy="epoch",
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        logging_nan_inf_filter=False,
    )


def _rows(backbone: Backbone, split: Split) -> Any:
    """The split in the form Trainer takes, tokenised as for plugins."""
    import datasets

    names = {"label": "labels", "start": "start_positions", "end": "end_positions", "answer": "labels"}
    gap, words = (0, []) if backbone.prompt is None else backbone.prompt.tokens(backbone.tokenizer)
    rows = []
    # A sentence-transformers checkpoint may stop short of its position table; what is written here does not.
    for item in items(split, replace(backbone, max_length=backbone.config.max_length)):
        (row,) = item.rows
        types = {"token_type_ids": list(row.types)} if backbone.token_types else {}
        labels: dict[str, Any] = {
            names[name]: value if isinstance(value, list) else [gap, words[int(value)]] if words else int(value)
            for name, value in item.labels.items()
        }
        mask = [1] * len(row.ids)
        rows.append({"input_ids": list(row.ids), "attention_mask": mask, **types, **labels, "length": len(row.ids)})
    return datasets.Dataset.from_list(rows)


def _collator(backbone: Backbone) -> Any:
    """What puts rows into a batch."""
    import transformers

    kind = transformers.DataCollatorWithPadding if backbone.decoder is None else transformers.DataCollatorForSeq2Seq
    return kind(backbone.tokenizer)


def _with_head(backbone: Backbone, split: Split, on_cpu: bool) -> Any:
    """The checkpoint with the task's head, in fp32."""
    import transformers

    # On a CPU torch's fused attention is slow with dropout: 2.1 to 2.7 s per step against 1.3 s (MiniLM, 32 x 184).
    attention = {"attn_implementation": "eager"} if on_cpu else {}
    kind = getattr(transformers, AUTO_CLASSES[split.task.head if backbone.decoder is None else backbone.task])
    labels = {} if backbone.decoder is not None else dict(enumerate(split.task.labels))
    heads = {"id2label": labels, "label2id": {name: place for place, name in labels.items()}} if labels else {}
    try:
        return kind.from_pretrained(backbone.source, trust_remote_code=False, dtype=torch.float32, **attention, **heads)
    except Exception as error:  # transformers raises many kinds
        raise BackboneError(f"cannot load {backbone.source!r} for {split.task.name}: {error}") from error
