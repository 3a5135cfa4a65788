"""Texts from a seq2seq bundle: the encoder at a ratio, then the one decoder, step by step.

`Runtime.generate` and `Runtime.score` come through here. The encoder's request is an ordinary one of the runtime; the
decoder's steps wait for their turn one by one, so that a long text does not keep short requests waiting.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from variator.engines.generation import Floats, GenerateSettings, Ids, Step, generate, scores_at
from variator.errors import InputError
from variator.toolkit.bundle import DecoderEntry
from variator.toolkit.plugin_format import Key
from variator.toolkit.rows import Input, Outputs, Row, Special

if TYPE_CHECKING:
    from variator.engines.runtime import Result, Runtime

ROWS_PER_STEP = 64
"""Most rows, beams counted, that go through the decoder at once."""

BYTES_PER_STEP = 1 << 29
"""Most that a step knows of the rows' inputs and texts, unless they are the beams of a single one."""

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
    decoder = _Decoder(runtime, entry, settings.beams, settings.max_new_tokens)
    special, ids, finished = Special(entry.start, tuple(entry.ends), entry.pad), [], []
    for rows, step in decoder.parts(inputs, ratio, plugin, truncate):
        texts, ended = generate(step, rows, entry.width, special, settings)
        ids += texts
        finished += ended
    words, encoded = [runtime.tokenizer.decode(one, skip_special_tokens=True) for one in ids], decoder.encoded
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
    given = [entry.start] if blank is None else [entry.start, blank]
    decoder, found = _Decoder(runtime, entry, 1, len(given)), []
    for rows, step in decoder.parts(inputs, ratio, plugin, truncate):
        found.append(scores_at(step, rows, entry.width, given)[:, tokens])
    return np.concatenate(found), decoder.encoded, decoder.queue_ms, decoder.compute_ms


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


class _Decoder:
    """The decoder over what the encoder makes of a request, part by part, and what both took.

    Args:
        beams: Texts of each input that are written at once.
        tokens: Most that one will have.
    """

    def __init__(self, runtime: Runtime, entry: DecoderEntry, beams: int, tokens: int) -> None:
        self.runtime, self.entry, self.beams, self.tokens = runtime, entry, beams, tokens
        self.steps, self.queue_ms, self.compute_ms = 0, 0.0, 0.0
        self._encoded: Result | None = None

    @property
    def encoded(self) -> Result:
        """The encoder's result for all rows so far, without its outputs."""
        assert self._encoded is not None
        return self._encoded

    def parts(self, inputs: Sequence[Input], ratio: Key, plugin: str, truncate: bool) -> Iterator[tuple[int, Step]]:
        """How many inputs come next, encoded now, and their step, which repeats each by the beams."""
        started = time.perf_counter()
        rows = self.runtime.tokenise(inputs, truncate)
        tokenised = (time.perf_counter() - started) * 1e3
        while rows:
            part = rows[: self._fitting(rows)]
            rows = rows[len(part) :]
            encoded = self.runtime.infer(part, ratio=ratio, plugin=plugin)
            self._note(replace(encoded, outputs={}, tokenise_ms=encoded.tokenise_ms + tokenised))
            tokenised = 0.0
            yield len(part), self._step(encoded)

    def _fitting(self, rows: Sequence[Row]) -> int:
        """How many of the first rows go through the decoder together."""
        most, longest = max(1, ROWS_PER_STEP // self.beams), 0
        for count, row in enumerate(rows[:most]):
            longest = max(longest, len(row.ids))
            numbers = (count + 1) * self.beams * (longest + self.tokens) * self.entry.width
            if count and 4 * numbers > BYTES_PER_STEP:
                return count
        return min(most, len(rows))

    def _note(self, part: Result) -> None:
        before = self._encoded
        times = ("tokenise_ms", "load_ms", "queue_ms", "compute_ms")
        if before is not None:
            sums = {name: getattr(before, name) + getattr(part, name) for name in times}
            part = replace(part, lengths=before.lengths + part.lengths, **sums)
        self._encoded = part

    def _step(self, encoded: Result) -> Step:
        lengths, hidden = np.array(encoded.lengths), encoded.outputs["last_hidden_state"]
        beams = self.beams
        crossed: Floats | None = None

        def step(ids: Ids, past: Floats) -> tuple[Floats, Floats]:
            nonlocal crossed
            if crossed is None:  # all beams of a row begin alike: once will do
                nothing = np.zeros((len(hidden), 0, past.shape[2]), np.float32)
                outputs = self._run(ids[::beams], lengths, hidden, nothing, past[::beams])
                logits, present, crossed = (_repeated(outputs[name], beams) for name in NAMES)
                return logits, present
            outputs = self._run(ids, _repeated(lengths, beams), _repeated(hidden[:, :0], beams), crossed, past)
            return outputs["logits"], outputs["present"]

        return step

    def _run(self, ids: Ids, lengths: Ids, hidden: Floats, cross: Floats, past: Floats) -> Outputs:
        """One step of the engine; see `toolkit.decoder`."""
        given = {"input_ids": ids, "lengths": lengths, "hidden": hidden, "cross": cross, "past": past}
        feed = {name: np.ascontiguousarray(values) for name, values in given.items()}
        outputs, queue_ms, compute_ms = self.runtime.run_graph(self.entry.graph, feed)
        self.steps, self.queue_ms, self.compute_ms = (
            self.steps + 1, self.queue_ms + queue_ms, self.compute_ms + compute_ms,
        )  # fmt: skip
        return outputs


def _repeated(values: npt.NDArray[Any], beams: int) -> npt.NDArray[Any]:
    """Each row as often as it has beams."""
    return values if beams == 1 else np.repeat(values, beams, axis=0)
