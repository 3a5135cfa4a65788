"""The numeric gate: every artefact against the PyTorch reference, on shapes that tracing did not see.

The reference runs each row alone and unpadded; the artefact gets padded batches with random token ids under
the padding. So the gate also proves that padding and neighbours do not matter. Ratio 1's reference is
transformers' own model, the others' the module the graph was made from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from variator.errors import BundleError, GateError, InputError
from variator.files import write_atomically
from variator.toolkit.bundle import Manifest, Picture
from variator.toolkit.plugin_file import Head
from variator.toolkit.plugin_format import Key, parse_key
from variator.toolkit.rows import PER_TOKEN
from variator.toolkit.stack import LOGITS

if TYPE_CHECKING:
    from torch import Tensor

    from variator.exporters.graph import Compressed
    from variator.toolkit.checkpoint import Backbone
    from variator.toolkit.prompt import Prompt

Array = npt.NDArray[np.float32]
Feed = dict[str, npt.NDArray[Any]]

SHAPES = ((1, 1), (1, 5), (1, 33), (1, 128), (3, 1), (3, 5), (3, 33), (3, 128))
"""Batch and length of the cases; rows of a batch of 3 are 1/1, 2/3 and 1/3 of the length long."""

DECODER_SHAPES = ((1, 3, 0, 1), (3, 5, 0, 2), (1, 6, 3, 1), (2, 4, 2, 3), (1, 20, 0, 1), (2, 33, 40, 1), (1, 128, 7, 1))
"""Batch, tokens of the encoder, tokens before, and tokens of the decoder's cases."""

DECODER_GATE_BYTES = 48 * 2**20
"""What the memories in the decoder's cases may take in a bundle; of a wide decoder the long cases are left out."""

PASSAGE = """The lighthouse at the end of the pier was built in 1871, after a storm had driven three fishing boats onto
the rocks within a single night. Its lamp burned colza oil at first, later paraffin, and since 1932 it has been
electric. The keeper lived with his family in two rooms below the lantern, climbed 114 steps every evening and wrote
down wind, visibility and passing ships in a book that the harbour museum still owns. How many vessels it has saved
nobody can say. Today the light is switched on by a timer; visitors may go up between May and September, if the
weather allows it, and on a clear day they can see the islands, the chalk cliffs and, with good eyes, the wreck."""
"""Real text for the gate: on random ids a real model's activations look like nothing it was made for."""

CONFUSED = 0.25
"""Squared distance to another ratio's answers, over that to its own, below which an artefact is the other ratio. Not
1: where two ratios answer alike, rounding decides which is nearer."""

FIRST_ORDINARY = 5
"""Token ids below are special tokens in the usual vocabularies. RoBERTa's own code takes a padding id among real
tokens for padding and counts positions differently; the runtime never sends one."""

HEAD_CLASSES = 3

TOLERANCE = {"fp32": 1e-3, "fp16": 0.01, "bf16": 0.05, "int8": 0.5, "fp8": 0.3}
"""Largest accepted error by precision: the L2 norm of the difference over the reference's, per case.

A wrong mask, weight or order gives about 1. Measured on the real MiniLM with its shipped plugins, all ratios: fp32
4e-6, fp16 0.0015, bf16 0.014, fp8 0.093, int8 0.19 (OpenVINO), 0.14 (as for GPUs) and 0.15 (ONNX Runtime). The low
precisions' limits only tell rounding from wrong; whether it is good enough is a question of quality.
"""


@dataclass(frozen=True)
class Case:
    """One input of the gate and what PyTorch makes of it, by ratio."""

    feed: Feed
    expected: dict[Key, dict[str, Array]]

    @property
    def lengths(self) -> list[int]:
        """Real tokens per row."""
        return [int(total) for total in self.feed["attention_mask"].sum(axis=1)]


def make_feeds(
    inputs: Sequence[str], vocabulary: int, max_length: int, text: Sequence[int] = (), seed: int = 0
) -> list[Feed]:
    """The gate's inputs for a model: stretches of `text`, random ids under the padding and where there is no text.

    Args:
        text: Token ids of real text; ids that are repeated often (unknown words of a toy) are not used.
    """
    rng = np.random.default_rng(seed)
    text = [token for token in text if text.count(token) < len(text) // 4]
    feeds = []
    for batch, length in SHAPES:
        length = min(length, max_length)
        rows = [length, max(1, 2 * length // 3), max(1, length // 3)][:batch]
        mask = (np.arange(length)[None, :] < np.array(rows)[:, None]).astype(np.int64)
        ids = rng.integers(FIRST_ORDINARY if vocabulary > FIRST_ORDINARY else 0, vocabulary, (batch, length))
        for row, count in enumerate(rows):
            stretch = text[row * 5 : row * 5 + count]
            ids[row, : len(stretch)] = stretch
        feed = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in inputs:
            feed["token_type_ids"] = rng.integers(0, 2, (batch, length))
        feeds.append(feed)
    return feeds


def reshaped(cases: Sequence[Case], batch: int, length: int) -> Case:
    """A case of any batch and length, made of the rows of others: what a row gives depends on neither.

    Args:
        cases: The gate's; at least one has a row of at most `length` tokens.
    """
    rows = [(case, row) for case in cases for row, tokens in enumerate(case.lengths) if tokens <= length]
    longest = max(case.lengths[row] for case, row in rows)
    # The longest first, so that one row is a long one.
    rows.sort(key=lambda place: (place[0].lengths[place[1]] != longest, place[0].lengths[place[1]]))
    chosen = [rows[index % len(rows)] for index in range(batch)]

    def stacked(parts: Sequence[npt.NDArray[Any]], per_token: bool) -> npt.NDArray[Any]:
        if not per_token:
            return np.stack(parts)
        whole = np.zeros((batch, length, *parts[0].shape[1:]), parts[0].dtype)
        for row, part in enumerate(parts):
            whole[row, : min(length, len(part))] = part[:length]
        return whole

    feed = {name: stacked([case.feed[name][row] for case, row in chosen], True) for name in cases[0].feed}
    expected = {
        ratio: {
            name: stacked([case.expected[ratio][name][row] for case, row in chosen], name in PER_TOKEN)
            for name in outputs
        }
        for ratio, outputs in cases[0].expected.items()
    }
    return Case(feed, expected)


def picture_feeds(picture: Picture, seed: int = 0) -> list[Feed]:
    """The gate's inputs for a model that reads pictures: noise."""
    rng = np.random.default_rng(seed)
    shape = (picture.channels, picture.size, picture.size)
    return [{"pixel_values": rng.standard_normal((batch, *shape)).astype(np.float32)} for batch in (1, 3)]


def full_feed(manifest: Manifest, shape: tuple[int, int]) -> Feed:
    """Random ids without padding at (batch, length): every token of the shape is real work. For measurements.

    Raises:
        InputError: For another length than that of the pictures, where a model reads those.
    """
    inputs, vocabulary, picture = manifest.inputs, manifest.vocabulary, manifest.picture
    if picture is not None:
        if shape[1] != manifest.max_length:
            raise InputError(f"pictures of {shape[1]} patches", valid=f"{manifest.max_length}, which this model reads")
        size = (shape[0], picture.channels, picture.size, picture.size)
        return {"pixel_values": np.random.default_rng(0).standard_normal(size).astype(np.float32)}
    feed = {name: np.zeros(shape, np.int64) for name in inputs}
    feed["input_ids"] = np.random.default_rng(0).integers(0, vocabulary, shape)
    feed["attention_mask"] = np.ones(shape, np.int64)
    return feed


def reference_outputs(backbone: Backbone, module: Compressed, feed: Feed) -> dict[str, Array]:
    """PyTorch's outputs for one case, each row run alone without padding; token outputs are 0 on padding."""
    import torch

    outputs: dict[str, Array] = {}
    if backbone.config.picture is not None:
        rows = [_seen(backbone, module, torch.from_numpy(feed["pixel_values"][[row]])) for row in range(_batch(feed))]
        parts = zip(backbone.outputs, zip(*rows, strict=True), strict=True)
        return {name: np.concatenate(values) for name, values in parts}
    for row, length in enumerate(feed["attention_mask"].sum(axis=1)):
        tensors = {
            name: torch.from_numpy(np.ascontiguousarray(values[row : row + 1, :length]))
            for name, values in feed.items()
        }
        with torch.no_grad():
            results = _original(backbone, tensors) if module.config is None else module(**tensors)
        for name, result in zip(backbone.outputs, results, strict=True):
            shape = tuple(result.shape[1:])
            if name not in outputs:
                per_token = name in PER_TOKEN
                full = (feed["input_ids"].shape[1], *shape[1:]) if per_token else shape
                outputs[name] = np.zeros((len(feed["input_ids"]), *full), np.float32)
            target = outputs[name][row]
            if name in PER_TOKEN:
                target[:length] = result[0].numpy()
            else:
                target[...] = result[0].numpy()
    return outputs


def _batch(feed: Feed) -> int:
    return len(next(iter(feed.values())))


def _seen(backbone: Backbone, module: Compressed, pixels: Tensor) -> list[Array]:
    """PyTorch's outputs for one picture."""
    import torch

    original: Any = backbone.original
    with torch.no_grad():
        if module.config is None:
            hidden = original(pixel_values=pixels).last_hidden_state
            results = backbone.model.head(hidden, torch.ones_like(hidden[:, :, 0]))
        else:
            results = module.model.look(pixels, module.compression())
    return [result.numpy() for result in results]


def gate_head(hidden: int) -> Head:
    """The classifier that the gate puts on a shared graph's embedding: random, the same for every bundle."""
    rng = np.random.default_rng(0)
    return Head(*(rng.standard_normal(s).astype(np.float32) for s in ((HEAD_CLASSES, hidden), (HEAD_CLASSES,))))


def add_logits(outputs: dict[str, Array], head: Head) -> None:
    """Add what a classifier on the embedding gives."""
    outputs[LOGITS] = outputs["embedding"] @ head.weight.T + head.bias


def _original(backbone: Backbone, tensors: Mapping[str, object]) -> tuple[object, ...]:
    """Ratio 1 by transformers' own code; our head only where transformers has none."""
    original: Any = backbone.original
    if backbone.prompt is not None:
        return (_asked(backbone, backbone.prompt, tensors),)
    result = original.get_encoder()(**tensors) if backbone.decoder is not None else original(**tensors)
    if backbone.task in ("classify", "qa"):
        return tuple(getattr(result, name) for name in backbone.outputs)
    mask = tensors["attention_mask"]
    return tuple(backbone.model.head(result.last_hidden_state, mask.float()))  # type: ignore[attr-defined]


def _asked(backbone: Backbone, prompt: Prompt, tensors: Mapping[str, object]) -> object:
    """transformers' own scores of a prompt's words, behind the gap's mark: [1, classes]."""
    import torch

    from variator.toolkit.checkpoint import start_of

    original: Any = backbone.original
    gap, words = prompt.tokens(backbone.tokenizer)
    return original(**tensors, decoder_input_ids=torch.tensor([[start_of(original), gap]])).logits[:, -1, words]


def decoder_shapes(width: int) -> list[tuple[int, int, int, int]]:
    """Those of `DECODER_SHAPES` that a decoder whose memories have `width` numbers per token is checked with."""
    chosen: list[tuple[int, int, int, int]] = []
    for shape in DECODER_SHAPES:
        tokens = sum(batch * (source + 2 * before + count) for batch, source, before, count in (*chosen, shape))
        if len(chosen) < 4 or 4 * width * tokens <= DECODER_GATE_BYTES:
            chosen.append(shape)
    return chosen


def decoder_cases(backbone: Backbone, seed: int = 0) -> list[Case]:
    """What the decoder is compared with: transformers' own, started and gone on with. Random ids, padded encoders.

    Raises:
        GateError: If the backbone has no decoder.
    """
    import torch

    from variator.toolkit.decoder import cache_width

    if backbone.decoder is None:
        raise GateError(f"{backbone.id} has no decoder")
    rng = np.random.default_rng(seed)
    model: Any = backbone.original
    cases = []
    for batch, source, before, count in decoder_shapes(cache_width(backbone.decoder.config)):
        rows = np.maximum(1, (source * np.arange(batch, 0, -1)) // batch)
        mask = torch.from_numpy((np.arange(source)[None, :] < rows[:, None]).astype(np.int64))
        ids, text = (
            torch.from_numpy(rng.integers(FIRST_ORDINARY, backbone.config.vocabulary, shape))
            for shape in ((batch, source), (batch, before + count))
        )
        with torch.no_grad():
            encoded = model.get_encoder()(input_ids=ids, attention_mask=mask)
            (hidden,) = backbone.model.head(encoded.last_hidden_state, mask.float())
            whole = model(encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=text, use_cache=True)
        known, crossed = (
            torch.cat(
                [part.transpose(1, 2).flatten(2) for layer in cache.layers for part in (layer.keys, layer.values)], -1
            )
            for cache in (whole.past_key_values.self_attention_cache, whole.past_key_values.cross_attention_cache)
        )  # of [batch, heads, tokens, head size] each
        crossed = crossed * mask[:, :, None]  # as the encoder's graph hands padding out: zeros
        first = 0 if before else source  # of what the encoder read, what comes with the first step
        feed = {
            "input_ids": text[:, before:],
            "lengths": mask.sum(dim=1),
            "hidden": hidden[:, :first],
            "cross": crossed[:, first:],
            "past": known[:, :before],
        }
        expected = {"logits": whole.logits[:, -1], "present": known, "crossed": crossed[:, :first]}
        feeds, results = ({n: np.ascontiguousarray(v.numpy()) for n, v in part.items()} for part in (feed, expected))
        cases.append(Case(feeds, {1: results}))
    return cases


def compare(
    name: str, precision: str, cases: Sequence[Case], ratio: Key, run: Callable[[Feed], Mapping[str, Array]]
) -> float:
    """Run an artefact on every case and compare.

    Args:
        name: What the artefact is called in the error.
        precision: Key of `TOLERANCE`.
        run: The artefact; any exception it raises counts as a failure.

    Returns:
        The largest absolute error.

    Raises:
        GateError: Naming the tensor, the shape and the error; also if the answers are clearly another ratio's.
    """
    worst = 0.0
    distances = dict.fromkeys(cases[0].expected if cases else [], 0.0)
    for case in cases:
        shape = "x".join(map(str, next(iter(case.feed.values())).shape))
        try:
            outputs = run(case.feed)
        except Exception as error:  # any failure of a runtime on a legal shape fails the gate
            raise GateError(f"{name} cannot run shape {shape}: {error}", valid="any batch and length") from error
        # What lies on padding is nobody's result.
        real = case.feed["attention_mask"].astype(bool) if "attention_mask" in case.feed else ...
        for tensor, expected in case.expected[ratio].items():
            found = outputs[tensor]
            where = f"{name}, tensor {tensor!r}, shape {shape}"
            if found.shape != expected.shape:
                raise GateError(
                    f"{where}: the result has shape {found.shape}",
                    valid=str(expected.shape),
                    fix="a dimension was fixed on the way; report this model",
                )
            kept = real if tensor in PER_TOKEN else ...
            worst = max(worst, _error(where, precision, expected[kept], found[kept]))
            for other, others in case.expected.items():
                distances[other] += float(np.square(found[kept] - others[tensor][kept]).sum())
    nearest = min(distances, key=lambda other: distances[other], default=ratio)
    if distances and distances[nearest] < CONFUSED * distances[ratio]:
        raise GateError(f"{name} answers like ratio {nearest}, not like ratio {ratio}", fix="build or export it again")
    return worst


def _error(where: str, precision: str, expected: Array, found: Array) -> float:
    if not np.isfinite(found).all():
        raise GateError(
            f"{where}: the result holds NaN or infinity", fix="check the weights of the model and the plugin"
        )
    difference = found - expected
    relative = float(np.linalg.norm(difference) / max(float(np.linalg.norm(expected)), 1e-12))
    error = float(np.abs(difference).max(initial=0.0))
    if not relative <= TOLERANCE[precision]:
        raise GateError(
            f"{where}: off by {relative:.3g} of the reference's norm (largest difference {error:.3g})",
            valid=f"at most {TOLERANCE[precision]} in {precision}",
        )
    return error


def plain_runner(graph: Path, threads: int = 0) -> Callable[[Mapping[str, npt.NDArray[np.int64]]], dict[str, Array]]:
    """Runs a graph as ONNX Runtime does by itself, its threads asleep in between; 0 threads means all cores."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda feed: dict(zip(names, session.run(None, dict(feed)), strict=True))


def save_cases(cases: Sequence[Case], path: Path) -> None:
    """Store the cases in a bundle, so that `variator build` can gate engines without PyTorch."""
    from safetensors.numpy import save

    tensors: dict[str, npt.NDArray[np.generic]] = {}
    for index, case in enumerate(cases):
        tensors |= {f"{index}/feed/{name}": values for name, values in case.feed.items()}
        for ratio, outputs in case.expected.items():
            tensors |= {f"{index}/{ratio}/{name}": values for name, values in outputs.items()}
    write_atomically(path, save(tensors))


def load_cases(path: Path) -> list[Case]:
    """Read the cases back.

    Raises:
        BundleError: If the file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise BundleError(f"cannot read {path}: {error}", fix="export again") from error
    cases: dict[Key, Case] = {}
    for key in sorted(tensors):
        index, part, name = key.split("/")
        case = cases.setdefault(int(index), Case({}, {}))
        if part == "feed":
            case.feed[name] = tensors[key]
        else:
            case.expected.setdefault(parse_key(part), {})[name] = tensors[key]
    return [cases[index] for index in sorted(cases)]
