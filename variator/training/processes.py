"""The processes of one training run: alone, or started by `accelerate launch` or `torchrun`.

The backbone is frozen, so all that processes have to agree on are the plugins' gradients: a few hundred thousand
numbers, averaged in one message per step and ratio. Plugins and optimisers are the same in every process; the backbone
may be sharded over them (FSDP) where no single one can hold it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from variator import machine
from variator.errors import InputError
from variator.files import alone
from variator.toolkit.checkpoint import Model
from variator.toolkit.decoder import Decoder
from variator.toolkit.heads import GapHead


class Processes:
    """Which process this is, on which device, and how it talks to the others."""

    def __init__(self) -> None:
        self._state = PartialState(cpu=not torch.accelerator.is_available())  # else no process group on CPUs
        self.device: torch.device = self._state.device
        self.rank: int = self._state.process_index
        self.count: int = self._state.num_processes

    @property
    def main(self) -> bool:
        """Whether this is the one that writes files."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean of a tensor over all processes."""
        if self.count == 1:
            return values
        averaged: Tensor = reduce(values, "mean")
        return averaged

    def alone(self, place: Path) -> contextlib.AbstractContextManager[None]:
        """Be the only run that makes `place`: see `files.alone`; its main process holds the lock."""
        return alone(place) if self.main else contextlib.nullcontext()

    def wait(self) -> None:
        """Wait for the others."""
        self._state.wait_for_everyone()

    def place(self, model: Model, shard: bool) -> Model:
        """The model on this process's device, or its share of it; frozen either way.

        Raises:
            InputError: If there is nobody to share with.
        """
        if not shard:
            return model.to(self.device)
        if self.count == 1:
            raise InputError(
                "one process has nobody to share the backbone with",
                fix="accelerate launch --num_processes 2 -m variator train …, or no --shard",
            )
        for block in (model.encoder.embeddings, *model.encoder.blocks):
            fully_shard(block, reshard_after_forward=True)  # each its own root: the local stage runs them one by one
        if isinstance(model.head, GapHead):
            self.place_decoder(model.head.decoder, shard)
        else:
            model.head.to(self.device)
        for part in (model.encoder.relation, model.encoder.rotary, model.encoder.final_norm):
            if part is not None:
                part.to(self.device)
        return model

    def place_decoder(self, decoder: Decoder, shard: bool) -> Decoder:
        """A decoder likewise; its table of the vocabulary stays whole, the encoder has shared its own."""
        if not shard:
            return decoder.to(self.device)
        for layer in decoder.layers:
            fully_shard(layer, reshard_after_forward=True)
        for part in (decoder.token, decoder.relation, decoder.final_norm):
            part.to(self.device)
        if decoder.vocabulary is not None:
            decoder.vocabulary.data = decoder.vocabulary.data.to(self.device)
        return decoder

    def bf16(self, precision: str) -> bool:
        """Whether a training precision means bf16: `auto` does where the device multiplies such matrices natively."""
        if precision != "auto":
            return precision == "bf16"
        if self.device.type == "cuda":
            return bool(torch.cuda.is_bf16_supported())
        return bool({"avx512_bf16", "amx_bf16"} & set(machine.cpu_features()))

    def autocast(self, bf16: bool) -> contextlib.AbstractContextManager[object]:
        """Matrix products in bf16 while the block runs, if asked for."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)


def sharding_asked_for() -> bool:
    """Whether `accelerate launch` was told to shard (its --use_fsdp, or its configuration file)."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")


def average_gradients(processes: Processes, tensors: Iterable[Tensor], scale: float) -> None:
    """Replace every gradient by its mean over all processes, times `scale`, in one message."""
    gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
    flat = processes.mean(torch.cat([gradient.reshape(-1) for gradient in gradients])) * scale
    parts = torch.split(flat, [gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
