"""What the HTTP endpoints take, as the clients of OpenAI and of text-embeddings-inference send it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from variator.errors import InputError
from variator.serving.asked import Asked

if TYPE_CHECKING:
    from variator.toolkit.bundle import Manifest

T = TypeVar("T")
List = Annotated[list[T], Field(fail_fast=True)]
"""One error is enough: a million of them would take the server's time."""

Ids = List[Annotated[int, Field(strict=True)]]


class Body(BaseModel):
    """What every request may say; a header of the same name (`x-variator-slo-ms`) says it, too, for other clients."""

    model_config = ConfigDict(extra="ignore")

    ratio: str | int | None = None
    slo_ms: float | None = None
    min_ratio: str | int | None = None
    max_ratio: str | int | None = None
    min_quality: float | None = None

    def asked(self, headers: Asked, truncate: bool) -> Asked:
        """What is asked for: the body's word before the headers'."""
        own = {name: getattr(self, name) for name in Body.model_fields}
        given = {name: value for name, value in own.items() if value is not None}
        return Asked(**{**vars(headers), **given, "truncate": truncate})


class OpenAIEmbeddings(Body):
    """`POST /v1/embeddings`."""

    input: str | List[str] | Ids | List[Ids]
    model: str = ""
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None

    def rows(self) -> list[Any]:
        """One per embedding."""
        return _rows(self.input)


class Embed(Body):
    """`POST /embed`."""

    inputs: str | List[str] | Ids | List[Ids]
    normalize: bool = True
    truncate: bool = False

    def rows(self) -> list[Any]:
        """One per embedding."""
        return _rows(self.inputs)


class Predict(Body):
    """`POST /predict`: a text, a pair, or a list of such, each in a list of its own."""

    inputs: str | List[str] | List[List[str]]
    raw_scores: bool = False
    truncate: bool = False

    def rows(self) -> tuple[list[Any], bool]:
        """Texts and pairs; whether it was one alone.

        Raises:
            InputError: For a list that is neither.
        """
        if isinstance(self.inputs, str):
            return [self.inputs], True
        if self.inputs and isinstance(self.inputs[0], str):
            return [_texts([str(one) for one in self.inputs])], True
        return [_texts(list(one)) for one in self.inputs], False


class Rerank(Body):
    """`POST /rerank`."""

    query: str
    texts: List[str]
    raw_scores: bool = False
    return_text: bool = False
    truncate: bool = False

    def rows(self, manifest: Manifest) -> list[Any]:
        """Texts to embed, the query first, or pairs to classify.

        Raises:
            InputError: If there are none.
        """
        if not self.texts:
            raise InputError("the request has no texts", valid="at least one")
        return [self.query, *self.texts] if manifest.task == "embed" else [(self.query, text) for text in self.texts]


def _texts(one: list[str]) -> str | tuple[str, str]:
    if len(one) not in (1, 2):
        raise InputError(f"an input of {len(one)} texts", valid="one text, or a pair")
    return one[0] if len(one) == 1 else (one[0], one[1])


def _rows(given: str | list[Any]) -> list[Any]:
    whole = isinstance(given, str) or (len(given) > 0 and isinstance(given[0], int))
    return [given] if whole else list(given)
