"""From what a request holds to what a graph takes: texts, token ids or pictures, checked, as rows and as arrays.

Needs a bundle's manifest and tokenizer alone: the runtime goes through here, and so does a model that only tokenises.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from variator.errors import BundleError, InputError
from variator.files import inside
from variator.toolkit.bundle import Bundle, Picture
from variator.toolkit.rows import Input, Row

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BUCKETS = (
    8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 640, 768, 1024, 1280, 1536, 2048, 2560, 3072, 4096, 6144,
)  # fmt: skip
"""Lengths that rows are padded to: few distinct shapes, little padding."""


def padded_length(length: int, limit: int) -> int:
    """The length that a row of so many tokens is padded to, for a model that takes `limit`."""
    return max(min(next((bucket for bucket in BUCKETS if bucket >= length), limit), limit), length)


class Reader:
    """Reads requests for one bundle; threads may share it."""

    def __init__(self, bundle: Bundle) -> None:
        self._manifest = bundle.manifest
        self._tokenizer = None if bundle.manifest.picture is not None else _read_tokenizer(bundle)

    @property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer, without truncation or padding. Not to be changed.

        Raises:
            InputError: If the model reads pictures.
        """
        if self._tokenizer is None:
            raise InputError("a model that reads pictures has no tokenizer")
        return self._tokenizer

    @cached_property
    def _truncating(self) -> Tokenizer:
        """Truncates its own way, which keeps the special tokens. Made on first use: it parses the file again."""
        tokenizer = type(self.tokenizer).from_str(self.tokenizer.to_str())
        tokenizer.enable_truncation(self._manifest.max_length)
        return tokenizer

    def tokenise(self, inputs: Sequence[Input], truncate: bool = False) -> list[Row]:
        """Check inputs and turn them into token ids.

        Args:
            truncate: Cut what is too long, token ids simply at the end.

        Raises:
            InputError: For an empty request or row, a row that is too long, ids outside the vocabulary.
        """
        if isinstance(inputs, str):
            raise InputError("the request is a text, not a list of texts", fix=f"[{inputs[:20]!r}]")
        if len(inputs) == 0:
            raise InputError("the request is empty", valid="at least one text or list of token ids")
        if self._manifest.picture is not None:
            return [self._picture(index, value, self._manifest.picture) for index, value in enumerate(inputs)]
        rows = [self._tokenise_one(index, value, truncate) for index, value in enumerate(inputs)]
        limit = self._manifest.max_length
        for index, row in enumerate(rows):
            if len(row.ids) > limit:
                raise InputError(
                    f"input {index} has {len(row.ids)} tokens",
                    valid=f"1 to {limit}, the model's limit",
                    fix="shorten it, or pass truncate=True (--truncate)",
                )
        return rows

    def _picture(self, index: int, value: Input, picture: Picture) -> Row:
        shape = (picture.channels, picture.size, picture.size)
        pixels = value.pixels if isinstance(value, Row) else value
        if not isinstance(pixels, np.ndarray) or pixels.shape != shape or not np.issubdtype(pixels.dtype, np.floating):
            found = (
                f"an array {pixels.shape} of {pixels.dtype}" if isinstance(pixels, np.ndarray) else type(value).__name__
            )
            raise InputError(
                f"input {index} is {found}, and this model reads pictures",
                valid=f"pixel values as floats, {shape}, scaled as the model's image processor does",
            )
        if not np.isfinite(pixels).all():
            raise InputError(f"input {index} holds pixel values that are not finite", valid="finite numbers")
        nothing = [0] * self._manifest.max_length
        return Row(nothing, nothing, np.ascontiguousarray(pixels, np.float32))

    def _tokenise_one(self, index: int, value: Input, truncate: bool) -> Row:
        if isinstance(value, Row):
            ids = self._tokenise_one(index, value.ids, truncate).ids
            if len(value.types) != len(value.ids) or not {0, 1}.issuperset(value.types):
                raise InputError(f"the token types of input {index} do not fit", valid="a 0 or 1 for every token id")
            return Row(ids, list(value.types)[: len(ids)])
        texts = (value,) if isinstance(value, str) else value
        if isinstance(texts, tuple) and 1 <= len(texts) <= 2 and all(isinstance(text, str) for text in texts):
            if not any(str(text).strip() for text in texts):
                raise InputError(f"input {index} is an empty text", valid="a text with at least one character")
            prompt = self._manifest.prompt
            texts = texts if prompt is None else (prompt.fill(texts),)
            tokenizer = self._truncating if truncate else self.tokenizer
            try:
                encoding = tokenizer.encode(*texts)
            except TypeError as error:
                raise InputError(f"input {index} is not valid Unicode: {error}", valid="text") from error
            if prompt is not None and tokenizer.token_to_id(prompt.gap) not in encoding.ids:
                raise InputError(
                    f"input {index} is so long that {prompt.gap} behind it was cut off",
                    valid=f"{self._manifest.max_length} tokens with the prompt",
                    fix="shorten it, or export with a template that has the gap in front",
                )
            return Row(encoding.ids, encoding.type_ids)
        whole = isinstance(value, Sequence) and not isinstance(value, bytes | bytearray) and len(value) > 0
        # By their types, of which there are few, not one by one: requests come by the hundred in a second.
        if not whole or not all(kind is int or issubclass(kind, np.integer) for kind in set(map(type, value))):
            raise InputError(
                f"input {index} is neither a text nor a list of token ids", valid="str, (str, str) or a list of ints"
            )
        ids = list(map(int, value))
        limit = self._manifest.vocabulary - 1
        for one in (min(ids), max(ids)):
            if not 0 <= one <= limit:
                raise InputError(f"input {index} holds token id {one}", valid=f"0 to {limit}")
        ids = ids[: self._manifest.max_length] if truncate else ids
        return Row(ids, [0] * len(ids))

    def feed(self, rows: Sequence[Row], length: int) -> dict[str, npt.NDArray[Any]]:
        """The inputs for tokenised rows, padded on the right to `length`: int64 [rows, length]. Or pictures."""
        if self._manifest.picture is not None:
            return {"pixel_values": np.stack([row.pixels for row in rows if row.pixels is not None])}
        feed = {name: np.zeros((len(rows), length), np.int64) for name in self._manifest.inputs}
        for index, row in enumerate(rows):
            feed["input_ids"][index, : len(row.ids)] = row.ids
            feed["attention_mask"][index, : len(row.ids)] = 1
            if "token_type_ids" in feed:
                feed["token_type_ids"][index, : len(row.ids)] = row.types
        return feed


def _read_tokenizer(bundle: Bundle) -> Tokenizer:
    from tokenizers import Tokenizer

    path = inside(bundle.path, "tokenizer.json")
    bundle.verify("tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise BundleError(f"cannot read {path}: {error}", fix="export again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
