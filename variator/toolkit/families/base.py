"""What a family says about its checkpoints, and the one function that applies it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from variator.errors import BackboneError
from variator.toolkit.encoder import EncoderConfig, fold_attention

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ACTIVATION_NAMES = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
"""transformers' names of activations -> ours."""


@dataclass(frozen=True)
class Classifier:
    """A family's classification head, out(activation(dense(first token))): its tensors' names and activation."""

    dense: str
    activation: str
    output: str


@dataclass(frozen=True)
class Family:
    """How checkpoints of one family name things. All names are without the model prefix (`bert.`).

    Args:
        name: Of the family, as manifests and plugin files record it.
        model_types: transformers' `model_type` values it loads.
        embeddings: Tensors of `encoder.Embeddings` -> checkpoint names; `project` only where there is one.
        layer: Modules of `encoder.Layer` -> checkpoint names, with `{layer}` for the index.
        classifier: The sequence-classification head.
        settings: Fields of `EncoderConfig` whose checkpoint setting has a name of its own.
        unused_positions: How many first rows of the position table no token uses.
    """

    name: str
    model_types: tuple[str, ...]
    embeddings: Mapping[str, str]
    layer: Mapping[str, str]
    classifier: Classifier
    settings: Mapping[str, str] = field(default_factory=dict)
    unused_positions: Callable[[Any], int] = lambda config: 0

    def encoder_config(self, config: PretrainedConfig) -> EncoderConfig:
        """The sizes of the canonical encoder for this checkpoint configuration.

        Raises:
            BackboneError: For relative positions or an activation that is not known here.
        """
        positions = getattr(config, "position_embedding_type", "absolute") or "absolute"
        if positions != "absolute":
            raise BackboneError(f"position embeddings of type {positions!r} are not supported", valid="absolute")
        activation = getattr(config, self.settings.get("activation", "hidden_act"))
        if activation not in ACTIVATION_NAMES:
            raise BackboneError(f"FFN activation {activation!r} is not supported", valid=", ".join(ACTIVATION_NAMES))
        return EncoderConfig(
            vocabulary=config.vocab_size,
            embedding_size=getattr(config, "embedding_size", config.hidden_size),
            hidden_size=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            intermediate_size=getattr(config, self.settings.get("intermediate_size", "intermediate_size")),
            activation=ACTIVATION_NAMES[activation],
            max_length=config.max_position_embeddings - self.unused_positions(config),
            token_types=config.type_vocab_size if "token_type.weight" in self.embeddings else 0,
            norm_eps=getattr(config, "layer_norm_eps", 1e-12),
        )

    def encoder_sources(self, config: PretrainedConfig) -> list[str]:
        """Names of the checkpoint's encoder tensors, in a fixed order."""
        embeddings = [source for name, source in self.embeddings.items() if name != "project"]
        modules = [
            source.format(layer=layer) for layer in range(config.num_hidden_layers) for source in self.layer.values()
        ]
        if getattr(config, "embedding_size", config.hidden_size) != config.hidden_size:
            modules.append(self.embeddings["project"])
        return embeddings + [f"{module}.{part}" for module in modules for part in ("weight", "bias")]

    def encoder_weights(self, weights: Mapping[str, Tensor], config: PretrainedConfig) -> dict[str, Tensor]:
        """Rename and fold a checkpoint's tensors (torch layout, [out, in]) into the encoder's state dict."""
        sizes = self.encoder_config(config)
        encoder: dict[str, Tensor] = {}
        for name, source in self.embeddings.items():
            if name.startswith("project"):
                if sizes.embedding_size != sizes.hidden_size:
                    encoder["embeddings.project.weight"] = weights[f"{source}.weight"].t().contiguous()
                    encoder["embeddings.project.bias"] = weights[f"{source}.bias"]
            else:
                encoder[f"embeddings.{name}"] = weights[source]
        unused = self.unused_positions(config)
        encoder["embeddings.position.weight"] = encoder["embeddings.position.weight"][unused:]
        for layer in range(sizes.layers):
            for name, tensor in self._layer_weights(weights, layer, sizes.heads).items():
                encoder[f"layers.{layer}.{name}"] = tensor
        return encoder

    def _layer_weights(self, weights: Mapping[str, Tensor], layer: int, heads: int) -> dict[str, Tensor]:
        found = {
            f"{name}.{part}": weights[f"{source.format(layer=layer)}.{part}"]
            for name, source in self.layer.items()
            for part in ("weight", "bias")
        }
        prefix = "attention."
        attention = {name[len(prefix) :]: found.pop(name) for name in list(found) if name.startswith(prefix)}
        folded = {f"{prefix}{name}": tensor for name, tensor in fold_attention(attention, heads).items()}
        for name in ("ffn.inner.weight", "ffn.outer.weight"):
            found[name] = found[name].t().contiguous()
        return folded | found
