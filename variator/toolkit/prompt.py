"""Classification by a model that writes: a text with a gap, and a word per class that could fill it.

The paper's form for T5 (Variator, section 4): the encoder reads the text with `<extra_id_0>` where a word is asked for,
the decoder starts with that mark, and the scores of the words' first tokens at the next place are the class scores.
A checkpoint says so in a file `prompt.json`, which `variator finetune` writes.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from typing import Any

from variator.errors import InputError

FILE = "prompt.json"
GAP = "<extra_id_0>"
PLACES = ("{0}", "{1}")
"""Where a template has the texts of an input."""


@dataclass(frozen=True)
class Prompt:
    """How a model that writes is asked for a class.

    Args:
        template: Text with `{0}`, of pairs also `{1}`, for an input's texts, and the gap's mark once.
        words: What fills the gap, one word per class.
        labels: Names of the classes; without them the words.
        gap: The mark.
    """

    template: str
    words: list[str]
    labels: list[str] = field(default_factory=list)
    gap: str = GAP

    def __post_init__(self) -> None:
        texts = [self.template, self.gap, *self.words, *self.labels]
        if not isinstance(self.words, list) or not all(isinstance(text, str) and text.strip() for text in texts):
            raise InputError(f"the prompt holds something else than texts: {self.template!r}, {self.words!r}")
        if self.template.count(self.gap) != 1 or PLACES[0] not in self.template:
            raise InputError(
                f"the template is {self.template!r}", valid=f"a text with {PLACES[0]} and, once, {self.gap}"
            )
        if len(self.words) < 2 or len(set(self.words)) < len(self.words):
            raise InputError(f"the words are {self.words}", valid="two or more, all different")
        if self.labels and len(self.labels) != len(self.words):
            raise InputError(f"{len(self.labels)} labels for {len(self.words)} words", valid="one per word")

    @property
    def names(self) -> list[str]:
        """Of the classes."""
        return list(self.labels or self.words)

    def fill(self, texts: tuple[str, ...]) -> str:
        """The text that is asked about an input.

        Raises:
            InputError: If the template has places for another number of texts.
        """
        places = sum(place in self.template for place in PLACES)
        if len(texts) != places:
            raise InputError(
                f"the input has {len(texts)} text{'s' if len(texts) > 1 else ''}",
                valid="a pair of texts" if places > 1 else "one text",
            )
        return re.sub(r"\{([01])\}", lambda place: texts[int(place[1])], self.template)

    def to_json(self) -> str:
        """What `prompt.json` holds."""
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"

    @staticmethod
    def of(data: Any, place: str) -> Prompt:
        """What a file held.

        Raises:
            InputError: If it is no prompt.
        """
        try:
            return Prompt(**data)
        except TypeError as error:
            raise InputError(
                f"{place} is no prompt: {error}", valid='{"template": "…", "words": ["…", "…"]}'
            ) from error

    def tokens(self, tokenizer: Any) -> tuple[int, list[int]]:
        """The gap's token and each word's first, by transformers' tokenizer.

        Raises:
            InputError: If the gap is no token of the model, or two words begin with the same one.
        """
        gap = tokenizer.convert_tokens_to_ids(self.gap)
        if gap is None or gap == tokenizer.unk_token_id:
            raise InputError(f"{self.gap!r} is no token of this model", valid="one of its tokens as the prompt's gap")
        first = [tokenizer(word, add_special_tokens=False)["input_ids"][:1] for word in self.words]
        if not all(first) or len({one[0] for one in first}) < len(first):
            raise InputError(f"two of the words {self.words} begin with the same token", valid="words that differ")
        return int(gap), [int(one[0]) for one in first]
