"""The maths against an independent reference written as loops, token by token, straight from the equations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from variator.errors import InputError
from variator.toolkit.plugin import ACTIVATIONS, compressed_ffn, initial_tensors
from variator.toolkit.plugin_format import (
    ACTIVATION_NAMES,
    SITES,
    PluginConfig,
    layer_operands,
    tensor_shapes,
)

D, RANK, INNER = 6, 3, 10


def loop_reference(
    x: NDArray[np.float64], mask: NDArray[np.int64], k: int, w: dict[str, NDArray[np.float64]], activation: str
) -> NDArray[np.float64]:
    """DESIGN section 2 in loops over batch, groups and tokens; shares no code with the package."""
    act = {
        "tanh": math.tanh,
        "gelu": lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))),
        "relu": lambda v: max(v, 0.0),
    }
    out = np.zeros_like(x)
    for b in range(x.shape[0]):
        for i in range(math.ceil(x.shape[1] / k)):
            members = []
            for j in range(k):
                t = i * k + j
                real = t < x.shape[1] and mask[b, t] == 1
                members.append((x[b, t] if real else np.zeros(D), real))
            flat = np.concatenate([vector for vector, _ in members])
            scores = [float(w["score.weight"][j] @ flat + w["score.bias"][j]) for j in range(k)]
            scores = [s if real else -math.inf for s, (_, real) in zip(scores, members, strict=True)]
            if not any(real for _, real in members):
                continue
            top = max(scores)
            exps = [math.exp(s - top) for s in scores]
            c = sum((e / sum(exps)) * vector for e, (vector, _) in zip(exps, members, strict=True))
            y = w["w2"].T @ np.maximum(w["w1"].T @ c + w["b1"], 0.0) + w["b2"]
            for j in range(k):
                t = i * k + j
                if t < x.shape[1]:
                    both = np.concatenate([y, x[b, t]])
                    hidden = np.array([act[activation](float(v)) for v in w["down.weight"] @ both + w["down.bias"]])
                    out[b, t] = y + w["up.weight"] @ hidden + w["up.bias"]
    return out


@pytest.mark.parametrize("activation", ["tanh", "gelu", "relu"])
@pytest.mark.parametrize(("k", "length"), [(2, 7), (3, 7), (4, 16), (4, 5), (8, 3), (5, 1)])
def test_the_site_computes_the_papers_equations(k: int, length: int, activation: str) -> None:
    rng = np.random.default_rng(k * 100 + length)
    shapes = {
        "score.weight": (k, k * D),
        "score.bias": (k,),
        "down.weight": (RANK, 2 * D),
        "down.bias": (RANK,),
        "up.weight": (D, RANK),
        "up.bias": (D,),
        "w1": (D, INNER),
        "b1": (INNER,),
        "w2": (INNER, D),
        "b2": (D,),
    }
    w = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    x = rng.normal(size=(3, length, D))
    mask = (np.arange(length)[None] < np.array([length, max(1, length - 2), 1])[:, None]).astype(np.int64)
    expected = loop_reference(x, mask, k, w, activation)

    t = {name: torch.from_numpy(value) for name, value in w.items()}
    extra = -length % k
    padded = torch.nn.functional.pad(torch.from_numpy(x), (0, 0, 0, extra))
    padded_mask = torch.nn.functional.pad(torch.from_numpy(mask), (0, extra)).double()
    found = compressed_ffn(
        padded,
        padded_mask,
        lambda c: torch.relu(c @ t["w1"] + t["b1"]) @ t["w2"] + t["b2"],
        layer_operands({f"layers.0.ffn.{name}": tensor for name, tensor in t.items()}, 0)["ffn"],
        activation,
    )

    real = mask.astype(bool)
    np.testing.assert_allclose(found[:, :length].numpy()[real], expected[real], rtol=1e-9, atol=1e-9)


def test_a_plugin_has_the_papers_number_of_parameters() -> None:
    k, d, r, layers = 4, 768, 64, 12
    shapes = tensor_shapes(PluginConfig(k, r), d, layers)
    assert sum(math.prod(shape) for shape in shapes.values()) == layers * (k * k * d + k + 2 * d * r + r + r * d + d)


def test_every_tensor_belongs_to_a_layer_and_a_site() -> None:
    config = PluginConfig(2, 4, keys_values=2, name="both")
    tensors = initial_tensors(config, D, 3)
    assert set(tensor_shapes(config, D, 3)) == set(tensors)
    assert {tuple(name.split(".", 3)[1:3]) for name in tensors} == {(str(i), site) for i in range(3) for site in SITES}


def test_every_activation_that_a_plugin_may_name_has_a_function() -> None:
    assert set(ACTIVATION_NAMES) <= set(ACTIVATIONS)


@pytest.mark.parametrize("ratio", [0, -1, 17, 1000, 3.5, True, "4", None])
def test_an_impossible_ratio_is_refused(ratio: object) -> None:
    with pytest.raises(InputError, match="ratio"):
        PluginConfig(ratio)  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{"rank": 0}, {"rank": 2.5}, {"activation": "sigmoid"}, {"ratio": 1}])
def test_other_settings_are_checked_too(settings: dict[str, object]) -> None:
    with pytest.raises(InputError):
        PluginConfig(**{"ratio": 4, **settings})  # type: ignore[arg-type]
