"""Which plugins a run trains, and on what: what can be asked for, and what contradicts what.

Called by `variator.cli`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from variator.errors import InputError
from variator.toolkit.checkpoint import Backbone
from variator.toolkit.plugin_file import Plugin, load_named
from variator.toolkit.plugin_format import Key, PluginConfig, check_ratio, file_name
from variator.training.batch import Data
from variator.training.corpus import read_corpus
from variator.training.labelled import adaptation, development
from variator.training.pictures import read_pictures
from variator.training.run import Judge

PRESETS = {
    config.name: config
    for config in (
        PluginConfig(4, 64, "tanh", name="paper"),
        PluginConfig(8, 192, "gelu", name="wide"),
        PluginConfig(8, 192, "gelu", keys_values=4, keys_values_rank=64, name="long"),
    )
}
"""Settings under a name; docs/training.md has what each saves and keeps."""

DEFAULT_ACTIVATION = "gelu"
DEFAULT_RANK = 64


@dataclass(frozen=True)
class Plan:
    """What is to be trained; None and empty where nothing was asked for.

    Args:
        ratios: Ratios, each a plugin; with `start` also names.
        presets: Names out of `PRESETS`, trained beside the ratios.
        budget: Share of the FLOPs to save by a schedule, instead of both.
        start: Directory of plugins to go on from.
        local_steps: Of the layer-local stage; None for what is usual.
        rank, activation, keys_values, keys_values_rank, first_alone, name: Of the plugins of `ratios`, as in
            `PluginConfig`; of a budget's schedule only activation and name.

    Raises:
        InputError: If parts contradict each other.
    """

    ratios: tuple[Key, ...] = ()
    presets: tuple[str, ...] = ()
    budget: float | None = None
    start: Path | None = None
    rank: int | None = None
    activation: str | None = None
    keys_values: int | None = None
    keys_values_rank: int | None = None
    first_alone: bool = False
    name: str = ""
    local_steps: int | None = None

    def __post_init__(self) -> None:
        if bool(self.ratios or self.presets) == (self.budget is not None):
            raise InputError(
                "train ratios, presets, or a schedule for a budget",
                valid="--ratio 4 …, --preset wide … or --budget 0.5",
            )
        unknown = [name for name in self.presets if name not in PRESETS]
        if unknown:
            raise InputError(f"preset {unknown[0]!r}", valid=", ".join(PRESETS))
        sites = (self.rank, self.keys_values, self.keys_values_rank, self.first_alone or None)
        chosen_here = any(value is not None for value in (*sites, self.activation, self.name or None))
        if self.start and (self.budget is not None or self.presets or chosen_here):
            raise InputError(
                "plugins that are gone on --from keep their rank, activation and sites", fix="leave those out"
            )
        if self.budget is not None and any(value is not None for value in sites):
            raise InputError(
                "--budget chooses ratio and rank per layer at the FFN site", valid="--activation, --setting and --steps"
            )
        if self.budget is not None and self.local_steps is not None:
            raise InputError("--budget fits its candidates for a fixed number of steps", fix="leave --local-steps out")
        if self.presets and not self.ratios and chosen_here:
            raise InputError(
                "a preset is a rank, an activation and sites", fix="--ratio and --setting, for one of your own"
            )

    @property
    def local(self) -> int:
        """Steps of the layer-local stage: usually none for what was trained before."""
        usual = 0 if self.start else 800
        return usual if self.local_steps is None else self.local_steps

    def before(self) -> list[Plugin]:
        """The plugins to go on from.

        Raises:
            PluginError: If one is missing or damaged.
        """
        return [load_named(self.start / file_name(key)) for key in self.ratios] if self.start else []

    def configs(self) -> tuple[PluginConfig, ...]:
        """Plugins to train from the beginning; of a budget one that has the schedule's activation."""
        fresh = [
            PluginConfig(
                check_ratio(ratio),
                self.rank or DEFAULT_RANK,
                self.activation or DEFAULT_ACTIVATION,
                self.keys_values or 1,
                self.keys_values_rank or 0,
                first_alone=self.first_alone,
                name=self.name if self.budget is None else "",
            )
            for ratio in (self.ratios if self.budget is None else (2,))
        ]
        return *fresh, *(PRESETS[name] for name in self.presets)


@dataclass(frozen=True)
class Material:
    """What is trained on, and what judges it; None and empty where nothing was given.

    Args:
        corpus: Files of plain text, or of pictures for a model that reads those.
        task: Name of a task, instead: its training split is trained on, its development split judges.
        data: Directory of the task's files; None loads them from the hub.
        dev: STS-B in a file: judges training on plain text.

    Raises:
        InputError: If parts contradict each other.
    """

    corpus: tuple[Path, ...] = ()
    task: str | None = None
    data: Path | None = None
    dev: Path | None = None

    def __post_init__(self) -> None:
        if bool(self.corpus) == bool(self.task):
            raise InputError("train on plain text or on a task", valid="either --corpus FILE … or --task NAME")
        if self.data and not self.task:
            raise InputError("--data is for a --task", fix="--corpus FILE for text, --dev FILE for a development set")
        if self.dev and self.task:
            raise InputError("--dev is for plain text", fix=f"--data DIR with DIR/{self.task}/dev.jsonl")

    def read(self, backbone: Backbone, seed: int) -> tuple[Data, Judge | None]:
        """What is trained on, and the judge if there is one."""
        if backbone.config.picture is not None:
            if self.task or self.dev:
                raise InputError(f"{backbone.id} reads pictures", valid="--corpus FILE.npy", fix="leave tasks out")
            return read_pictures(self.corpus, backbone), None
        data: Data = adaptation(backbone, self.task, self.data) if self.task else read_corpus(self.corpus, seed)
        return data, development(backbone, self.task, self.data if self.task else self.dev)
