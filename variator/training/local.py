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
from variator.toolkit.encoder import masked_scores
from variator.toolkit.plugin import compressed_ffn
from variator.toolkit.plugin_format import PluginConfig, layer_operands
from variator.training.batch import Batch
from variator.training.objective import Losses, normalised_error


def local_step(
    model: Model, configs: Sequence[PluginConfig], tensors: Mapping[int, Mapping[str, Tensor]], batch: Batch
) -> dict[int, Losses]:
    """One pass of the teacher and of one student per ratio; the gradients are left in the tensors.

    Layer by layer, each student reads its own stream (what its compressed layers made so far) and is pulled back to
    the teacher's: the error is taken behind the layer's residual and norm, where the next layer reads, because a few
    outlier dimensions carry nearly all of the FFN output's variance (98 % in MiniLM's first layer). No gradient
    crosses a layer.

    Args:
        tensors: By ratio, by name.
    """
    encoder = model.encoder
    extra = -batch.ids.shape[1] % math.lcm(*(config.ratio for config in configs))
    ids, mask = F.pad(batch.ids, (0, extra)), F.pad(batch.mask, (0, extra))
    types = None if batch.types is None else F.pad(batch.types, (0, extra))
    errors: dict[int, list[Tensor]] = {config.ratio: [] for config in configs}
    with torch.no_grad(), whole(encoder):
        teacher = encoder.embeddings(ids, types)
    float_mask = mask.to(teacher.dtype)
    scores_mask = masked_scores(float_mask).repeat(1 + len(configs), 1, 1, 1)
    students = [teacher] * len(configs)
    for index, layer in enumerate(encoder.blocks):
        with whole(layer):
            with torch.no_grad():
                teacher, *students = torch.split(layer.attend(torch.cat([teacher, *students]), scores_mask), len(ids))
                teacher = layer.finish(teacher, layer.ffn(teacher))
            for position, config in enumerate(configs):
                x = students[position]
                site = layer_operands(tensors[config.ratio], index)["ffn"]
                output = layer.finish(x, compressed_ffn(x, float_mask, layer.ffn, site, config.activation))
                error = normalised_error(output, teacher, float_mask)
                error.backward()  # type: ignore[no-untyped-call]
                errors[config.ratio].append(error.detach())
                students[position] = output.detach()
    return {ratio: Losses(torch.stack(values).mean(), torch.stack(values)) for ratio, values in errors.items()}


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
