"""Texts from a seq2seq bundle: the encoder at a ratio, then the one decoder, step by step.

`Runtime.generate` and `Runtime.score` come through here. The encoder's request is an ordinary one of the runtime; the
decoder's steps wait for their turn one by one, so that a long text does not keep short requests waiting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from variator.engines.generation import Floats, GenerateSettings, Ids, Step, generate, scores_at
from variator.errors import InputError
from variator.toolkit.bundle import DecoderEntry
from variator.toolkit.plugin_format import Key
from variator.toolkit.rows import Input, Outputs, Special

if TYPE_CHECKING:
    from variator.engines.runtime import Result, Runtime

ROWS_PER_STEP = 64
"""Most rows, beams counted, that go through the decoder at once."""

NAMES = ("logits", "present", "crossed")
"""What a step gives; see `toolkit.decoder`, which a serving machine does not load."""


@dataclass(frozen=True)
class Generation:
    """What one request got.

    Args:
        texts: One per input.
        ids: Their tokens, the last of which ends a text that is finished.
        finished: Whether each ended by itself; the others hit `max_new_tokens`.
        precision: As read back from the engine.
        load_ms: Time to load the ratio, for the first request that asks for it.
        queue_ms: Time waited for other requests, between steps, too.
        encode_ms, decode_ms: Time in the engines.
        steps: Of the decoder.
    """

    texts: list[str]
    ids: list[list[int]]
    finished: list[bool]
    ratio: Key
    plugin: str
    engine: str
    precision: str
    tokenise_ms: float
    load_ms: float
    queue_ms: float
    encode_ms: float
    decode_ms: float
    steps: int


def write(
    runtime: Runtime, inputs: Sequence[Input], ratio: Key, plugin: str, truncate: bool, settings: GenerateSettings
) -> Generation:
    """Generate a text for every input. Errors as `Runtime.infer`; `InputError` for a bundle without a decoder."""
    entry = decoder_of(runtime)
    encoded = runtime.infer(inputs, ratio=ratio, plugin=plugin, truncate=truncate)
    special = Special(entry.start, tuple(entry.ends), entry.pad)
    most, ids, finished = max(1, ROWS_PER_STEP // settings.beams), [], []
    decoder = _Steps(runtime, entry, encoded)
    for start in range(0, len(encoded.lengths), most):
        rows = range(start, min(start + most, len(encoded.lengths)))
        step = decoder.of(rows, settings.beams)
        texts, ended = generate(step, len(rows), entry.width, special, settings)
        ids += texts
        finished += ended
    words = [runtime.tokenizer.decode(one, skip_special_tokens=True) for one in ids]
    return Generation(
        words, ids, finished, encoded.ratio, encoded.plugin, encoded.engine, encoded.precision,
        encoded.tokenise_ms, encoded.load_ms, encoded.queue_ms + decoder.queue_ms, encoded.compute_ms,
        decoder.compute_ms, decoder.steps,
    )  # fmt: skip


def score(
    runtime: Runtime,
    inputs: Sequence[Input],
    candidates: Sequence[str],
    prefix: str,
    ratio: Key,
    plugin: str,
    truncate: bool,
) -> tuple[npt.NDArray[np.float32], Result, float, float]:
    """Scores of what could follow `prefix`, [rows, candidates]; the encoder's result, ms waited and decoded."""
    entry = decoder_of(runtime)
    tokens = [_first_token(runtime, text) for text in candidates]
    if not tokens or len(set(tokens)) < len(tokens):
        raise InputError(
            f"candidates {list(candidates)}" + (" begin with the same token" if tokens else ""),
            valid="at least one, each with a first token of its own",
        )
    blank = runtime.tokenizer.token_to_id(prefix) if prefix else None
    if prefix and blank is None:
        raise InputError(f"{prefix!r} is no token of this model", valid="one of its tokens, or an empty prefix")
    encoded = runtime.infer(inputs, ratio=ratio, plugin=plugin, truncate=truncate)
    decoder, found = _Steps(runtime, entry, encoded), []
    given = [entry.start] if blank is None else [entry.start, blank]
    for start in range(0, len(encoded.lengths), ROWS_PER_STEP):
        rows = range(start, min(start + ROWS_PER_STEP, len(encoded.lengths)))
        found.append(scores_at(decoder.of(rows, 1), len(rows), entry.width, given)[:, tokens])
    return np.concatenate(found), encoded, decoder.queue_ms, decoder.compute_ms


def decoder_of(runtime: Runtime) -> DecoderEntry:
    """The decoder of a runtime's bundle, or `InputError`."""
    manifest = runtime.bundle.manifest
    if manifest.decoder is None:
        raise InputError(
            f"{manifest.model} was exported for task {manifest.task} and has no decoder", valid="a bundle of seq2seq"
        )
    return manifest.decoder


def _first_token(runtime: Runtime, text: str) -> int:
    ids = runtime.tokenizer.encode(text, add_special_tokens=False).ids
    if not ids:
        raise InputError(f"candidate {text!r} has no token", valid="a word")
    return int(ids[0])


class _Steps:
    """The decoder's steps over what the encoder gave, and what they took."""

    def __init__(self, runtime: Runtime, entry: DecoderEntry, encoded: Result) -> None:
        self.runtime, self.entry, self.encoded = runtime, entry, encoded
        self.steps, self.queue_ms, self.compute_ms = 0, 0.0, 0.0

    def of(self, rows: range, beams: int) -> Step:
        """The step of some rows, each as often as it has beams."""
        lengths = np.array(self.encoded.lengths[rows.start : rows.stop])
        hidden = self.encoded.outputs["last_hidden_state"][rows.start : rows.stop, : lengths.max()]
        crossed: Floats | None = None

        def step(ids: Ids, past: Floats) -> tuple[Floats, Floats]:
            nonlocal crossed
            if crossed is None:  # all beams of a row begin alike: once will do
                nothing = np.zeros((len(rows), 0, past.shape[2]), np.float32)
                outputs = self.run(ids[::beams], lengths, hidden, nothing, past[::beams])
                logits, present, crossed = (np.repeat(outputs[name], beams, axis=0) for name in NAMES)
                return logits, present
            outputs = self.run(ids, np.repeat(lengths, beams), np.repeat(hidden[:, :0], beams, axis=0), crossed, past)
            return outputs["logits"], outputs["present"]

        return step

    def run(self, ids: Ids, lengths: Ids, hidden: Floats, cross: Floats, past: Floats) -> Outputs:
        """One step of the engine; see `toolkit.decoder`."""
        given = {"input_ids": ids, "lengths": lengths, "hidden": hidden, "cross": cross, "past": past}
        feed = {name: np.ascontiguousarray(values) for name, values in given.items()}
        outputs, queue_ms, compute_ms = self.runtime.run_graph(self.entry.graph, feed)
        self.steps, self.queue_ms, self.compute_ms = (
            self.steps + 1, self.queue_ms + queue_ms, self.compute_ms + compute_ms,
        )  # fmt: skip
        return outputs
