"""What is trained: ratios, presets, a budget or files to go on from, and what contradicts what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import lively
from variator.errors import InputError, VariatorError
from variator.toolkit.checkpoint import Backbone
from variator.toolkit.plugin_file import save_plugin
from variator.toolkit.plugin_format import PluginConfig
from variator.training.plan import PRESETS, Plan


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "--ratio 4"),
        ({"ratios": (4,), "budget": 0.5}, "--ratio 4"),
        ({"presets": ("wide",), "budget": 0.5}, "--ratio 4"),
        ({"presets": ("narrow",)}, "paper, wide, long"),
        ({"presets": ("wide",), "rank": 32}, "a preset is"),
        ({"presets": ("wide",), "start": Path("plugins")}, "gone on"),
        ({"ratios": (4,), "start": Path("plugins"), "rank": 32}, "gone on"),
        ({"ratios": (4,), "start": Path("plugins"), "name": "mine"}, "gone on"),
        ({"budget": 0.5, "start": Path("plugins")}, "gone on"),
        ({"budget": 0.5, "keys_values": 4}, "chooses ratio and rank"),
        ({"budget": 0.5, "rank": 32}, "chooses ratio and rank"),
        ({"budget": 0.5, "first_alone": True}, "chooses ratio and rank"),
        ({"budget": 0.5, "local_steps": 9}, "fixed number of steps"),
    ],
)
def test_parts_that_contradict_each_other_are_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Plan(**asked)


def test_ratios_and_presets_become_plugins_of_one_run() -> None:
    plan = Plan((2, 4), ("wide",), rank=32)
    assert plan.configs() == (PluginConfig(2, 32, "gelu"), PluginConfig(4, 32, "gelu"), PRESETS["wide"])
    assert plan.local == 800 and plan.before() == []
    assert all(name == config.key for name, config in PRESETS.items())


def test_shape_and_name_reach_the_plugin() -> None:
    shaped = Plan((8,), rank=16, activation="relu", keys_values=4, keys_values_rank=2, first_alone=True, name="mine")
    assert shaped.configs() == (PluginConfig(8, 16, "relu", 4, 2, first_alone=True, name="mine"),)
    (schedule,) = Plan(budget=0.5, activation="tanh", name="half").configs()
    assert schedule.activation == "tanh" and schedule.key == 2  # the name is the schedule's


def test_wrong_ratios_are_refused() -> None:
    for ratio in (1, 17, "wide"):
        with pytest.raises(InputError):
            Plan((ratio,)).configs()


def test_plugins_that_are_there_are_gone_on_from(backbone: Backbone, tmp_path: Path) -> None:
    save_plugin(lively(backbone, 2), tmp_path)
    plan = Plan((2,), start=tmp_path)
    assert [plugin.config.ratio for plugin in plan.before()] == [2] and plan.local == 0
    with pytest.raises(VariatorError, match=r"ratio-4\.safetensors"):
        Plan((4,), start=tmp_path).before()
