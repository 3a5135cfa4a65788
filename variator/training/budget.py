"""A schedule over layers under a budget: which ratio and rank each layer's FFN site gets, so that a share is saved.

Every candidate is fitted layer by layer (`training.local`, all from one teacher pass). Then each layer in turn runs
with each candidate, all others uncompressed, and the error of the last hidden states says what that costs. The
cheapest sum of errors within the budget is a multiple-choice knapsack, solved exactly up to the rounding of costs.
Errors of several layers add up only roughly: what a schedule is worth is measured after it was trained.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from variator.errors import InputError
from variator.files import claim, write_atomically
from variator.toolkit.checkpoint import Backbone
from variator.toolkit.encoder import EncoderConfig
from variator.toolkit.plugin import Compression
from variator.toolkit.plugin_file import Plugin, load_plugin, save_plugin
from variator.toolkit.plugin_format import LayerSites, PluginConfig, SiteSize, file_name, layer_operands, scheduled
from variator.training.batch import Batch, Data
from variator.training.objective import normalised_error
from variator.training.processes import Processes
from variator.training.run import Progress
from variator.training.settings import TrainSettings
from variator.training.train import train

CANDIDATES = tuple(
    SiteSize(*size)
    for size in ((2, 64), (4, 64), (4, 128), (8, 64), (8, 128), (8, 192), (16, 64), (16, 128), (16, 192))
)
"""Ratios and ranks at or near the front of error over cost: docs/training.md."""

BATCHES = 8
"""That sensitivity is measured on."""

FIT_STEPS = 400
"""Layer-local steps that every candidate gets."""

GRAIN = 4000
"""Costs are rounded to this part of the whole."""


@dataclass(frozen=True)
class Choice:
    """A schedule, with what it was chosen by.

    Args:
        config: The schedule.
        start: Its plugin, put together from the candidates' fits.
        saved: Share of the encoder's FLOPs saved at `sequence` tokens.
        errors: Layer by layer: error of the last hidden states by ratio and rank, the others uncompressed.
    """

    config: PluginConfig
    start: Plugin
    saved: float
    sequence: int
    errors: list[dict[SiteSize, float]]

    def to_json(self) -> str:
        """The choice without its tensors, and the table it was made from."""
        errors = [
            {f"{size.ratio}/{size.rank}": round(error, 5) for size, error in layer.items()} for layer in self.errors
        ]
        found = {"schedule": self.config.schedule, "saved": round(self.saved, 4), "sequence": self.sequence}
        return json.dumps({**found, "errors": errors}, indent=1) + "\n"


def layer_flops(sizes: EncoderConfig, sequence: int, sites: LayerSites) -> float:
    """FLOPs (2 x multiply-accumulates) of one layer for one row of `sequence` tokens, matrix products only.

    Args:
        sites: Ratio and rank of its compressed sites, by name.
    """
    d, inner, width = sizes.hidden_size, sizes.intermediate_size, sizes.attention_size
    padded = {site: math.ceil(sequence / size.ratio) for site, size in sites.items()}
    groups, keys = padded.get("ffn", sequence), padded.get("kv", sequence)
    total = 2 * width * (sequence * d + keys * d + sequence * keys) + (3 if sizes.gated else 2) * groups * d * inner
    total += 2 * sequence * width * sizes.relative_rows
    if "ffn" in sites:
        k, r = sites["ffn"]
        total += groups * (k * k * d + k * d + d * r) + groups * k * 2 * d * r
    if "kv" in sites:
        k, r = sites["kv"]
        total += keys * (k * k * d + k * d + k * d * r + r * d)
    return 2.0 * total


def candidate_flops(
    sizes: EncoderConfig, budget: float, candidates: Sequence[SiteSize] = CANDIDATES, sequence: int = 128
) -> dict[SiteSize, float]:
    """FLOPs of one layer with each candidate at its FFN, and without (1, 1).

    Raises:
        InputError: If no choice of them saves the budget; says how much they can.
    """
    if not 0.0 < budget < 1.0:
        raise InputError(f"budget {budget}", valid="a share of the FLOPs to save, such as 0.5")
    costs = {size: layer_flops(sizes, sequence, {"ffn": size}) for size in candidates}
    whole = layer_flops(sizes, sequence, {})
    most = 1 - min(costs.values()) / whole
    if most < budget:
        raise InputError(
            f"a budget of {budget:.0%} at {sequence} tokens", valid=f"up to {most:.1%} with the FFN site alone"
        )
    return {SiteSize(1, 1): whole, **costs}


def choose(
    backbone: Backbone,
    data: Data,
    budget: float,
    name: str,
    settings: TrainSettings,
    directory: Path,
    on_step: Callable[[Progress], None] = lambda progress: None,
    candidates: Sequence[SiteSize] = CANDIDATES,
    sequence: int = 128,
) -> Choice:
    """Find ratio and rank per layer that save a share of the encoder's FLOPs at the smallest error.

    Args:
        budget: Share to save, above 0 and below 1.
        name: Of the setting.
        settings: `tokens`, seed and precision of the fits, and the plugins' activation.
        directory: Where the candidates' fits are kept, for a run that is resumed.
        candidates: Of a layer, beside leaving it uncompressed.
        sequence: Tokens that FLOPs are counted at.

    Raises:
        InputError: If no choice of candidates saves that much.
    """
    sizes, activation = backbone.config, settings.plugins[0].activation
    costs = candidate_flops(sizes, budget, candidates, sequence)
    one = SiteSize(1, 1)
    whole = sizes.layers * costs[one]
    configs = tuple(
        PluginConfig(size.ratio, size.rank, activation, name=f"candidate-{size.ratio}-{size.rank}")
        for size in candidates
    )
    fitting = replace(settings, plugins=configs, steps=0, local_steps=FIT_STEPS)
    files = [directory / file_name(config.key) for config in configs]
    if all(file.exists() for file in files):
        fits = [load_plugin(file) for file in files]
    else:
        fits = train(backbone, data, fitting, directory, on_step)
    tensors: dict[SiteSize, Mapping[str, Tensor]] = {
        size: {key: torch.tensor(value) for key, value in fit.tensors.items()}
        for size, fit in zip(candidates, fits, strict=True)
    }
    batches = [data.batch(backbone, f"{settings.seed}:sensitivity", index, settings.tokens) for index in range(BATCHES)]
    errors = sensitivity(backbone, dict(zip(configs, tensors.values(), strict=True)), batches)
    table = [{one: 0.0, **dict(zip(candidates, layer, strict=True))} for layer in errors]
    schedule = cheapest(table, costs, (1 - budget) * whole)
    config = scheduled(name, schedule, activation)
    start = {
        part: tensor.numpy()
        for layer, size in enumerate(schedule)
        if size != one
        for part, tensor in tensors[size].items()
        if part.startswith(f"layers.{layer}.")
    }
    plugin = replace(fits[0], config=config, tensors=start, training={"stage": "sensitivity"})
    saved = 1 - sum(costs[size] for size in schedule) / whole
    return Choice(config, plugin, saved, sequence, table)


def within_budget(
    backbone: Backbone,
    data: Data,
    budget: float,
    name: str,
    settings: TrainSettings,
    directory: Path,
    on_step: Callable[[Progress], None] = lambda progress: None,
    overwrite: bool = False,
) -> tuple[TrainSettings, list[Plugin]]:
    """Settings and start for training a schedule; the choice is kept in `directory` for a run that is resumed.

    Args:
        name: Of the setting; empty names it by the budget: 0.5 is `s50`.
        overwrite: Choose anew.

    Raises:
        InputError: If `directory` holds a choice of that name with another budget, model, data or settings; for no
            steps of distillation.
    """
    if not settings.steps:
        raise InputError("a schedule for a budget is made good by distillation", valid="1 or more --steps")
    candidate_flops(backbone.config, budget, CANDIDATES)  # refused before anything is written
    name = name or f"s{round(100 * budget)}"
    place = directory / f"{name}.choice"
    path = place / file_name(name)
    fitted = {
        "activation": settings.plugins[0].activation,
        "tokens": settings.tokens,
        "accumulate": settings.accumulate,
        "rate": settings.local_rate,
        "seed": settings.seed,
    }
    processes = Processes()
    if processes.main:
        if overwrite:
            shutil.rmtree(place, ignore_errors=True)
        claim(place, [budget, fitted, CANDIDATES, FIT_STEPS, backbone.fingerprint, data.record()])
    processes.wait()
    chosen = path.exists()
    processes.wait()  # all have looked
    if not chosen:
        choice = choose(backbone, data, budget, name, settings, place / "fits", on_step, CANDIDATES)
        processes.wait()  # all have read the fits
        if processes.main:
            write_atomically(place / "choice.json", choice.to_json())
            save_plugin(choice.start, place)
            shutil.rmtree(place / "fits", ignore_errors=True)
        processes.wait()
    # As the file has it, so that a resumed run starts from the same numbers.
    start = load_plugin(path)
    return replace(settings, plugins=(start.config,), local_steps=0), [start]


def sensitivity(
    backbone: Backbone, fits: Mapping[PluginConfig, Mapping[str, Tensor]], batches: Sequence[Batch]
) -> list[list[float]]:
    """What each layer costs with each fit alone: the error of the last hidden states, [layers][fits]."""
    encoder = backbone.model.encoder
    found = [[0.0] * len(fits) for _ in range(backbone.config.layers)]
    with torch.no_grad():
        for batch in batches:
            mask = batch.mask.float()
            target = batch.through(encoder)
            for position, (config, tensors) in enumerate(fits.items()):
                for layer in range(backbone.config.layers):
                    sites = partial(_alone, tensors, layer)
                    plugin = Compression(sites, config.multiple, config.activation)
                    made = batch.through(encoder, plugin)
                    found[layer][position] += float(normalised_error(made, target, mask)) / len(batches)
    return found


def _alone(tensors: Mapping[str, Tensor], chosen: int, layer: int) -> dict[str, dict[str, Tensor]]:
    return layer_operands(tensors, layer) if layer == chosen else {}


def cheapest(
    errors: Sequence[Mapping[SiteSize, float]], costs: Mapping[SiteSize, float], limit: float
) -> list[SiteSize]:
    """One candidate per layer with the smallest sum of errors whose costs stay within a limit.

    Args:
        errors: Layer by layer, by candidate.
        costs: By candidate; `limit` in the same unit.
    """
    unit = limit / GRAIN
    whole = {size: math.ceil(cost / unit - 1e-9) for size, cost in costs.items()}
    # best[cost] = smallest error of the layers so far at that cost, with the choices that led there
    best: dict[int, tuple[float, tuple[SiteSize, ...]]] = {0: (0.0, ())}
    for layer in errors:
        following: dict[int, tuple[float, tuple[SiteSize, ...]]] = {}
        for spent, (error, chosen) in best.items():
            for size, more in layer.items():
                cost = spent + whole[size]
                if cost <= GRAIN and (cost not in following or error + more < following[cost][0]):
                    following[cost] = error + more, (*chosen, size)
        best = following
    if best:
        return list(min(best.values())[1])
    least = min(costs, key=lambda size: costs[size])
    if len(errors) * costs[least] > limit:
        raise InputError("no choice of candidates stays within the budget", fix="a smaller --budget")
    return [least] * len(errors)  # only rounding stood against it
