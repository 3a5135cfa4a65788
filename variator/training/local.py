"""First stage: fit every layer's plugin to the teacher's layer, all ratios from one teacher pass.

Nothing is propagated back through the stack, so minutes on a CPU give `training.distil` a far better start than
zeros would.

Each plugin is fitted on the inputs it will meet, those of the compressed stream, not on the teacher's: measured on
the real MiniLM (k=4, 600 steps, Spearman on 400 pairs of STS-B dev; uncompressed 0.922) 0.893 against 0.874.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F

from variator.toolkit.checkpoint import Model
from variator.toolkit.encoder import Encoder
from variator.toolkit.plugin import compressed_ffn, compressed_memory
from variator.toolkit.plugin_format import Key, PluginConfig, layer_operands
from variator.toolkit.positions import Context
from variator.training.batch import Batch
from variator.training.objective import Losses, normalised_error


def local_step(
    model: Model, configs: Sequence[PluginConfig], tensors: Mapping[Key, Mapping[str, Tensor]], batch: Batch
) -> dict[Key, Losses]:
    """One pass of the teacher and of one student per ratio; the gradients are left in the tensors.

    Layer by layer, each student reads its own stream (what its compressed layers made so far) and is pulled back to
    the teacher's: the error is taken behind the layer's residual and norm, where the next layer reads, because a few
    outlier dimensions carry nearly all of the FFN output's variance (98 % in MiniLM's first layer). No gradient
    crosses a layer. The keys/values site is fitted likewise, behind the attention's residual and norm.

    Args:
        tensors: By setting, by name.
    """
    encoder = model.encoder
    multiple = math.lcm(*(config.multiple for config in configs))
    # The first token alone in its group for the largest multiple is so for all that divide it.
    lead = multiple - 1 if configs[0].first_alone else 0
    teacher, float_mask = _embedded(encoder, batch, lead, -(lead + batch.ids.shape[1]) % multiple)
    rows = len(teacher)
    contexts: dict[int, list[Context]] = {}  # by how many streams lie in one batch
    students = {config.key: teacher for config in configs}
    errors: dict[Key, list[Tensor]] = {config.key: [] for config in configs}
    memories: dict[Key, list[Tensor]] = {config.key: [] for config in configs}
    for index, layer in enumerate(encoder.blocks):
        sites = {config.key: layer_operands(tensors[config.key], index) for config in configs}
        with whole(layer):
            with torch.no_grad():
                plain = [key for key in students if "kv" not in sites[key]]
                together = torch.cat([teacher, *(students[key] for key in plain)])
                count = 1 + len(plain)
                if count not in contexts:
                    contexts[count] = encoder.contexts(float_mask.repeat(count, 1))
                past, read = layer.attend(together, contexts[count][index])
                halves = list(zip(torch.split(past, rows), torch.split(read, rows), strict=True))
                attended, teacher_read = halves[0]
                halfway = dict(zip(plain, halves[1:], strict=True))
                teacher = layer.finish(attended, layer.ffn(teacher_read))
            for config in configs:
                key, site = config.key, sites[config.key]
                if "kv" in site:
                    source = layer.read(students[key])
                    memory, memory_mask = compressed_memory(source, float_mask, site["kv"], config.activation)
                    past, read = layer.attend(students[key], Context(memory_mask), memory)
                    memories[key].append(_fit(normalised_error(past, attended, float_mask)))
                    halfway[key] = past.detach(), read.detach()
                past, read = halfway[key]
                if "ffn" in site:
                    y = compressed_ffn(read, float_mask, layer.ffn, site["ffn"], config.activation)
                    made = layer.finish(past, y)
                    errors[key].append(_fit(normalised_error(made, teacher, float_mask)))
                else:
                    with torch.no_grad():
                        made = layer.finish(past, layer.ffn(read))
                        errors[key].append(normalised_error(made, teacher, float_mask))
                students[key] = made.detach()
    return {key: _losses(errors[key], memories[key]) for key in errors}


def _embedded(encoder: Encoder, batch: Batch, lead: int, extra: int) -> tuple[Tensor, Tensor]:
    """What the first layer reads, with so many places more in front and behind; and its mask."""
    with torch.no_grad(), whole(encoder.embeddings):
        if batch.pixels is not None:
            x = F.pad(encoder.embeddings(batch.pixels), (0, 0, lead, extra))
        else:
            types = None if batch.types is None else F.pad(batch.types, (0, extra))
            x = F.pad(encoder.embeddings(F.pad(batch.ids, (0, extra)), types), (0, 0, lead, 0))
    return x, F.pad(batch.mask.to(x.dtype), (lead, extra))


def _fit(error: Tensor) -> Tensor:
    """Leave the gradient of a site's error in its tensors."""
    error.backward()  # type: ignore[no-untyped-call]
    return error.detach()


def _losses(layers: list[Tensor], memories: list[Tensor]) -> Losses:
    terms = {"keys_values": torch.stack(memories).mean()} if memories else {}
    total = torch.stack(layers).mean()
    return Losses(total + sum(terms.values(), torch.zeros_like(total)), torch.stack(layers), terms)


@contextmanager
def whole(module: torch.nn.Module) -> Iterator[None]:
    """A module's own parameters gathered from all processes while the block runs, if they are sharded."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()
