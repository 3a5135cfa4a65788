"""What a family says about its checkpoints, and the one function that applies it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from variator.errors import BackboneError
from variator.toolkit.bundle import Picture
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
    "quick_gelu": "quick_gelu",
}
"""transformers' names of activations -> ours."""


UNBOUNDED = 4096
"""Longest sequence of models whose positions are relative and have no limit of their own; memory has one."""

Weights = Mapping[str, Tensor]
"""A checkpoint's tensors, without the model prefix."""


@dataclass(frozen=True)
class Classifier:
    """A family's classification head, out(norm(activation(dense(pooled)))): its tensors' names and activation.

    Args:
        norm: Behind the activation; empty without.
        activation_setting, pooling_setting: Where the checkpoint's configuration says them; else `activation`, and the
            first token.
    """

    dense: str
    activation: str
    output: str
    norm: str = ""
    activation_setting: str = ""
    pooling_setting: str = ""


@dataclass(frozen=True)
class DecoderParts:
    """A decoder's tensors, from a checkpoint.

    Args:
        config: Its sizes.
        outside: Tensors of `decoder.Decoder` that belong to no layer, without the tables of the vocabulary.
        layer: Those of one layer.
        output: Gives what hidden states are multiplied with, [d, vocabulary]; None is the embedding table itself.
        scale: Of the hidden states in front of it.
    """

    config: EncoderConfig
    outside: dict[str, Tensor]
    layer: Callable[[int], dict[str, Tensor]]
    output: Callable[[], Tensor] | None
    scale: float

    def state(self) -> dict[str, Tensor]:
        """All of them, at once."""
        found = dict(self.outside)
        for index in range(self.config.layers):
            found |= {f"layers.{index}.{name}": tensor for name, tensor in self.layer(index).items()}
        return found


@dataclass(frozen=True)
class PictureNames:
    """How a vision model's embeddings are called.

    Args:
        patch: The convolution that reads a patch; its bias may be missing.
        position: Table of positions, [places, d] or [1, places, d], the class token's first.
        token: The class token, any shape of d numbers; empty without one.
        norm: Behind the embeddings; empty without.
    """

    patch: str
    position: str
    token: str = ""
    norm: str = ""

    @property
    def sources(self) -> list[str]:
        """All names."""
        norms = [f"{self.norm}.{part}" for part in ("weight", "bias")] if self.norm else []
        tokens = [self.token] if self.token else []
        return [f"{self.patch}.weight", f"{self.patch}.bias", self.position, *tokens, *norms]

    def weights(self, weights: Weights) -> dict[str, Tensor]:
        """The tensors of `encoder.PictureEmbeddings`: the bias and the class token go into the table of positions."""
        patch = weights[f"{self.patch}.weight"]
        place = weights[self.position].reshape(-1, len(patch))
        found = {"project.weight": patch.flatten(1).t().contiguous()}
        if self.token:
            found["first"] = place[:1] + weights[self.token].reshape(1, -1)
            place = place[1:]
        bias = weights.get(f"{self.patch}.bias")
        found["place"] = place if bias is None else place + bias
        for part in ("weight", "bias"):
            if self.norm:
                found[f"norm.{part}"] = weights[f"{self.norm}.{part}"]
        return found


def picture(config: Any) -> Picture:
    """The pictures that a checkpoint reads, by its configuration.

    Raises:
        BackboneError: For pictures that are not square, or patches that do not fill them.
    """
    size, patch = config.image_size, config.patch_size
    size, patch = (one if isinstance(one, int) else one[0] if len(set(one)) == 1 else 0 for one in (size, patch))
    if not (size and patch) or size % patch:
        raise BackboneError(
            f"pictures of {config.image_size} in patches of {config.patch_size} are not supported",
            valid="square ones, of a whole number of square patches",
        )
    return Picture(size, patch, config.num_channels)


def picture_kind(config: Any, token: bool) -> dict[str, Any]:
    """Fields of `EncoderConfig` that vision models have in common."""
    found = picture(config)
    return {
        "picture": replace(found, token=token),
        "max_length": found.patches + token,
        "norm_first": True,
        "positions": False,
        "vocabulary": 0,
        "token_types": 0,
    }


def _none(weights: Weights, config: Any, sizes: EncoderConfig) -> dict[str, Tensor]:
    return {}


@dataclass(frozen=True)
class Family:
    """How checkpoints of one family name things. All names are without the model prefix (`bert.`).

    Args:
        name: Of the family, as manifests and plugin files record it.
        model_types: transformers' `model_type` values it loads.
        embeddings: Tensors of `encoder.Embeddings` -> checkpoint names; what a checkpoint lacks is left out.
        layer: Modules of `encoder.Layer` -> checkpoint names, with `{layer}` for the index.
        classifier: The sequence-classification head; None if it is none that `heads.ClassifyHead` computes.
        final_norm: The norm behind the last layer.
        settings: Fields of `EncoderConfig` whose checkpoint setting has a name of its own.
        kind: Fields of `EncoderConfig` by the checkpoint's configuration, where they are not BERT's. Refuses
            (`BackboneError`) what the encoder does not compute.
        prepare: Gives the tensors separate names where a checkpoint has them in one.
        relation: The encoder's tensors of relative positions, and the names in the checkpoint that they come from.
        scale: What attention scores are multiplied by; None is 1 / sqrt(head size).
        unused_positions: How many first rows of the position table no token uses.
        auto_classes: transformers' class of the encoder by model type, where it is not `AutoModel`; such have no heads.
        answers: Whether its question-answering head is one map, as `heads.QaHead` is.
        decoder: What the decoder is made of, for families that have one.
        picture: For families that read pictures, in place of `embeddings`.
    """

    name: str
    model_types: tuple[str, ...]
    embeddings: Mapping[str, str]
    layer: Mapping[str, str]
    classifier: Classifier | None
    final_norm: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    kind: Callable[[Any], dict[str, Any]] = lambda config: {}
    prepare: Callable[[Weights, Any], Weights] = lambda weights, config: weights
    relation: Callable[[Weights, Any, EncoderConfig], dict[str, Tensor]] = _none
    relation_sources: tuple[str, ...] = ()
    scale: Callable[[EncoderConfig], float] | None = None
    unused_positions: Callable[[Any], int] = lambda config: 0
    auto_classes: Mapping[str, str] = field(default_factory=dict)
    answers: bool = True
    decoder: Callable[[Weights, Any, EncoderConfig], DecoderParts] | None = None
    picture: PictureNames | None = None

    def encoder_config(self, config: PretrainedConfig) -> EncoderConfig:
        """The sizes of the canonical encoder for this checkpoint configuration.

        Raises:
            BackboneError: For positions or an activation that are not known here.
        """

        def setting(name: str, usual: Any = None) -> Any:
            return getattr(config, self.settings.get(name, name), usual)

        positions = getattr(config, "position_embedding_type", "absolute") or "absolute"
        if positions != "absolute":
            raise BackboneError(f"position embeddings of type {positions!r} are not supported", valid="absolute")
        activation = setting("hidden_act")
        if activation not in ACTIVATION_NAMES:
            raise BackboneError(f"FFN activation {activation!r} is not supported", valid=", ".join(ACTIVATION_NAMES))
        fields: dict[str, Any] = {
            "vocabulary": getattr(config, "vocab_size", 0),
            "embedding_size": getattr(config, "embedding_size", config.hidden_size),
            "hidden_size": config.hidden_size,
            "layers": config.num_hidden_layers,
            "heads": config.num_attention_heads,
            "intermediate_size": setting("intermediate_size"),
            "activation": ACTIVATION_NAMES[activation],
            "max_length": setting("max_position_embeddings", UNBOUNDED) - self.unused_positions(config),
            "token_types": getattr(config, "type_vocab_size", 0) if "token_type.weight" in self.embeddings else 0,
            "norm_eps": setting("layer_norm_eps", 1e-12),
        }
        return EncoderConfig(**{**fields, **self.kind(config)})

    def encoder_sources(self, weights: Weights, config: PretrainedConfig) -> list[str]:
        """Names of the (prepared) checkpoint's encoder tensors, in a fixed order."""
        sizes = self.encoder_config(config)
        pictures = self.picture.sources if self.picture else []
        embeddings = [source for name, source in self.embeddings.items() if not self._left_out(name, sizes)]
        modules = [source.format(layer=layer) for layer in range(sizes.layers) for source in self.layer.values()]
        if sizes.embedding_size != sizes.hidden_size:
            modules.append(self.embeddings["project"])
        modules += [self.final_norm] if self.final_norm else []
        parts = [f"{module}.{part}" for module in modules for part in ("weight", "bias")]
        relative = self.relation_sources
        return [name for name in [*pictures, *embeddings, *parts, *relative] if name in weights]

    def _left_out(self, name: str, sizes: EncoderConfig) -> bool:
        """Whether an embedding tensor is none of this model's, or one of a module that is handled apart."""
        there = {"project": False, "position.weight": sizes.positions, "token_type.weight": sizes.token_types > 0}
        return not there.get(name, True)

    def encoder_weights(self, weights: Weights, config: PretrainedConfig) -> dict[str, Tensor]:
        """Rename and fold a checkpoint's (prepared) tensors, in torch's layout [out, in], into the encoder's state."""
        sizes = self.encoder_config(config)
        encoder = self.weights_outside(weights, config)
        for layer in range(sizes.layers):
            for name, tensor in self.layer_weights(weights, layer, sizes).items():
                encoder[f"layers.{layer}.{name}"] = tensor
        return encoder | self.relation(weights, config, sizes)

    def weights_outside(self, weights: Weights, config: PretrainedConfig) -> dict[str, Tensor]:
        """Those of no layer, but for the relative positions."""
        sizes = self.encoder_config(config)
        encoder: dict[str, Tensor] = {}
        if self.picture:
            encoder = {f"embeddings.{name}": tensor for name, tensor in self.picture.weights(weights).items()}
        for name, source in self.embeddings.items():
            if not self._left_out(name, sizes) and source in weights:
                encoder[f"embeddings.{name}"] = weights[source]
        if sizes.embedding_size != sizes.hidden_size:
            source = self.embeddings["project"]
            encoder["embeddings.project.weight"] = weights[f"{source}.weight"].t().contiguous()
            encoder["embeddings.project.bias"] = weights[f"{source}.bias"]
        if sizes.positions:
            unused = self.unused_positions(config)
            encoder["embeddings.position.weight"] = encoder["embeddings.position.weight"][unused:]
        for part in ("weight", "bias"):
            if sizes.final_norm and f"{self.final_norm}.{part}" in weights:
                encoder[f"final_norm.{part}"] = weights[f"{self.final_norm}.{part}"]
        return encoder

    @staticmethod
    def _needed(module: str, layer: int, sizes: EncoderConfig) -> bool:
        """Whether every layer has this module, so that a checkpoint without it is not whole."""
        missing = {"ffn.gate": not sizes.gated, "attention_norm": layer == 0 and not sizes.first_norm}
        return not missing.get(module, False)

    def layer_weights(self, weights: Weights, layer: int, sizes: EncoderConfig) -> dict[str, Tensor]:
        """Those of one layer of the encoder."""
        found = {
            f"{name}.{part}": weights[place]
            for name, source in self.layer.items()
            if not name.startswith("relative.")  # of the fingerprint alone: `relation` has computed with them
            for part in ("weight", "bias")
            if (place := f"{source.format(layer=layer)}.{part}") in weights
            or (part == "weight" and self._needed(name, layer, sizes))
        }
        prefix = "attention."
        attention = {name[len(prefix) :]: found.pop(name) for name in list(found) if name.startswith(prefix)}
        scale = self.scale(sizes) if self.scale else None
        folded = fold_attention(attention, sizes.heads, scale, sizes.key_bias)
        for name in [name for name in found if name.startswith("ffn.") and name.endswith("weight")]:
            found[name] = found[name].t().contiguous()
        return {f"{prefix}{name}": tensor for name, tensor in folded.items()} | found


def relative_rows(row: Callable[[int], int], reach: int) -> list[int]:
    """A table by distance (key minus query) from -`reach` to `reach`."""
    return [row(distance) for distance in range(-reach, reach + 1)]


def rotary_theta(parameters: Mapping[str, Any]) -> float:
    """The base of the frequencies, from transformers' `rope_parameters`.

    Raises:
        BackboneError: For rotary embeddings that are scaled.
    """
    if parameters.get("rope_type", "default") != "default":
        raise BackboneError(f"rotary positions of type {parameters['rope_type']!r} are not supported", valid="default")
    return float(parameters["rope_theta"])
