"""HTTP: OpenAI's embeddings, text-embeddings-inference's endpoints, metrics and a status page, over one `Service`."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException

from variator.engines.metrics import PrometheusObserver
from variator.engines.runtime import Result
from variator.engines.serving import wall_clock
from variator.errors import BundleError, DeadlineExceeded, EngineError, InputError, Overloaded, VariatorError
from variator.serving.asked import Asked, asked_from
from variator.serving.bodies import Body, Embed, OpenAIEmbeddings, Predict, Rerank
from variator.serving.guard import Guard, endpoint
from variator.serving.service import Service
from variator.tasks.score import cosines

if TYPE_CHECKING:
    from variator.serving.service import Inputs
    from variator.toolkit.bundle import Manifest
    from variator.toolkit.rows import Row

PAGE = Path(__file__).with_name("status.html")
HEADER = "x-variator-"
LONG_TEXT = 20_000
"""Characters of a request from which on it is tokenised beside the loop that serves all others."""

GONE_EVERY_S = 0.5
"""How often it is looked whether a client that waits is still there."""


@dataclass(frozen=True)
class HttpSettings:
    """Limits of the HTTP front.

    Args:
        max_body: Bytes of a request.
        max_batch: Inputs of a request.
        max_tokens: Tokens of a request, all inputs together.
        body_s: Seconds in which a body has to arrive.
        token: That clients have to bring (`Authorization: Bearer …`); empty for none.
    """

    max_body: int = 2 * 2**20
    max_batch: int = 128
    max_tokens: int = 65_536
    body_s: float = 30.0
    token: str = ""

    def __post_init__(self) -> None:
        for name in ("max_body", "max_batch", "max_tokens", "body_s"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)!r}", valid="more than 0")
        if self.token != self.token.strip() or not self.token.isascii():
            raise InputError("the token has blanks around it or letters beyond ASCII", valid="a plain word")


class Fault(Exception):  # noqa: N818 - an answer, not a defect
    """An answer that is an error."""

    def __init__(self, status: int, kind: str, text: str, retry_s: int = 0) -> None:
        super().__init__(text)
        self.status, self.kind, self.text, self.retry_s = status, kind, text, retry_s


def create_app(
    service: Service,
    settings: HttpSettings | None = None,
    close: bool = False,
    reload: Callable[[], Awaitable[None]] | None = None,
) -> FastAPI:
    """The application over a service.

    Args:
        close: Whether the service ends with it.
        reload: What `POST /reload` does, where there are more services to reload than this one.
    """
    settings = settings or HttpSettings()
    registry = CollectorRegistry()
    service.observe(PrometheusObserver(registry))

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        if close:
            await asyncio.to_thread(service.close)

    app = FastAPI(title="variator", version=_version(), lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, max_body=settings.max_body, body_s=settings.body_s, token=settings.token, service=service)
    app.add_exception_handler(Fault, _fault)
    app.add_exception_handler(VariatorError, _told)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _broken)
    _endpoints(app, service, settings)
    _about(app, service, registry, reload or functools.partial(asyncio.to_thread, service.reload))
    return app


def _version() -> str:
    import variator

    return variator.__version__


def _endpoints(app: FastAPI, service: Service, settings: HttpSettings) -> None:
    """What answers with the model."""

    async def run(request: Request, rows: Inputs, asked: Asked) -> tuple[Result, Manifest]:
        return await _answer(request, service, settings, rows, asked)

    @app.post("/v1/embeddings")
    async def embeddings(request: Request, body: OpenAIEmbeddings) -> Response:
        result, manifest = await run(request, body.rows(), body.asked(_headers(request), False))
        values = _need(result, "embedding")
        if body.dimensions not in (None, values.shape[1]):
            raise InputError(f"{body.dimensions} dimensions", valid=f"{values.shape[1]}, which this model has")
        plain = body.encoding_format == "float"
        data = [
            {"object": "embedding", "index": index, "embedding": one if plain else _base64(one)}
            for index, one in enumerate(values)
        ]
        tokens = sum(result.lengths)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return _json({"object": "list", "data": data, "model": manifest.model, "usage": usage}, result)

    @app.post("/embed")
    async def embed(request: Request, body: Embed) -> Response:
        result, _ = await run(request, body.rows(), body.asked(_headers(request), body.truncate))
        values = _need(result, "embedding")
        if body.normalize:
            values = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
        return _json(values, result)

    @app.post("/predict")
    async def predict(request: Request, body: Predict) -> Response:
        rows, alone = body.rows()
        result, manifest = await run(request, rows, body.asked(_headers(request), body.truncate))
        logits = _need(result, "logits")
        scores = logits if body.raw_scores else _probabilities(logits)
        found = [_ranked(one, manifest.labels) for one in scores]
        return _json(found[0] if alone else found, result)

    @app.post("/rerank")
    async def rerank(request: Request, body: Rerank) -> Response:
        result, manifest = await run(request, body.rows, body.asked(_headers(request), body.truncate))
        if manifest.task == "embed":
            values = _need(result, "embedding")
            scores = cosines(values[1:], values[:1])
        else:
            logits = _need(result, "logits")
            if logits.shape[1] != 1:
                raise InputError(f"a classifier of {logits.shape[1]} classes ranks nothing", valid="one of one score")
            scores = logits[:, 0] if body.raw_scores else _probabilities(logits)[:, 0]
        order = np.argsort(-scores, kind="stable")
        texts = body.texts if body.return_text else None
        return _json(
            [{"index": int(i), "score": float(scores[i]), **({"text": texts[i]} if texts else {})} for i in order],
            result,
        )

    usual: dict[str, Callable[[Request], Awaitable[Response]]] = {
        "embed": lambda request: _parsed(request, Embed, embed),
        "classify": lambda request: _parsed(request, Predict, predict),
    }

    @app.post("/")
    async def root(request: Request) -> Response:
        """What fits the model, as clients of an inference endpoint send it."""
        answer = usual.get(service.manifest.task)
        if answer is None:
            raise InputError(f"a model of task {service.manifest.task}", valid="/embed or /predict of a model for it")
        return await answer(request)


async def _parsed(request: Request, kind: type[Any], answer: Callable[[Request, Any], Awaitable[Response]]) -> Response:
    from pydantic import ValidationError

    try:
        body = kind.model_validate_json(await request.body())
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
    return await answer(request, body)


def _about(app: FastAPI, service: Service, registry: CollectorRegistry, again: Callable[[], Awaitable[None]]) -> None:
    """What tells about the service."""

    @app.get("/health")
    async def health() -> Response:
        if service.draining:
            raise Fault(503, "Unhealthy", "the server is about to end")
        if service.server.hanging:
            raise Fault(503, "Unhealthy", "the engine does not answer")
        return Response(status_code=200)

    @app.get("/info")
    async def info() -> Response:
        return _json(service.info())

    @app.get("/v1/models")
    async def models() -> Response:
        return _json({"object": "list", "data": [{"id": service.manifest.model, "object": "model", "owned_by": ""}]})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(await asyncio.to_thread(generate_latest, registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/status")
    async def status() -> Response:
        return _json(service.status())

    @app.get("/")
    async def page() -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    @app.post("/reload")
    async def reload(request: Request) -> Response:
        """Serve what lies at the bundle's path now; not because a page of somebody else's in a browser says so."""
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
            raise Fault(403, "Forbidden", f"a page of {origin} asks for it")
        try:
            await again()
        except (BundleError, EngineError, InputError) as error:
            raise Fault(409, "Unloadable", f"{error}; the old bundle is still served") from error
        return _json(service.info())


async def _answer(
    request: Request, service: Service, settings: HttpSettings, rows: Inputs, asked: Asked
) -> tuple[Result, Manifest]:
    """The queue's answer to a request, and whose it is; what nobody waits for any more leaves the queue."""
    arrived = wall_clock()
    given = rows(service.manifest) if callable(rows) else rows
    if len(given) > settings.max_batch:
        raise Fault(413, "Validation", f"{len(given)} inputs in a request; valid: up to {settings.max_batch}")

    def check(tokenised: Sequence[Row]) -> None:
        if (tokens := sum(len(row.ids) for row in tokenised)) > settings.max_tokens:
            raise Fault(413, "Validation", f"{tokens} tokens in a request; valid: up to {settings.max_tokens}")

    submit = functools.partial(service.submit, rows, asked, check, arrived)
    submitted = await asyncio.to_thread(submit) if sum(map(_size, given)) > LONG_TEXT else submit()
    waiting = asyncio.wrap_future(submitted.future)
    try:
        while True:
            done, _ = await asyncio.wait([waiting], timeout=GONE_EVERY_S)
            if done:
                return waiting.result(), submitted.manifest
            if await request.is_disconnected():
                raise Fault(499, "Gone", "the client is gone")
    finally:  # some servers cancel instead of telling
        waiting.cancel()


def _size(row: Any) -> int:
    return sum(map(len, row)) if isinstance(row, tuple) else len(row)


def _headers(request: Request) -> Asked:
    """What the headers ask for."""
    return _asked(tuple((name, value) for name, value in request.headers.items() if name.startswith(HEADER)))


@functools.lru_cache(maxsize=256)
def _asked(given: tuple[tuple[str, str], ...]) -> Asked:
    named = {name.removeprefix(HEADER).replace("-", "_"): value for name, value in given}
    return asked_from({name: value for name, value in named.items() if name in Body.model_fields})


def _need(result: Result, output: str) -> Any:
    """An output of the model, or the refusal of an endpoint that is not for it."""
    if output not in result.outputs:
        raise InputError(f"this model gives {', '.join(result.outputs)}", valid=f"a model that gives {output}")
    return result.outputs[output]


def _probabilities(logits: Any) -> Any:
    if logits.shape[1] == 1:
        return 1 / (1 + np.exp(-logits))
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def _ranked(scores: Any, labels: list[str]) -> list[dict[str, Any]]:
    """Scores with their labels, the best first."""
    order = np.argsort(-scores, kind="stable")
    return [{"score": float(scores[i]), "label": labels[i] if i < len(labels) else f"LABEL_{i}"} for i in order]


def _base64(values: Any) -> str:
    return base64.b64encode(np.ascontiguousarray(values, np.float32).tobytes()).decode("ascii")


def _json(
    content: Any, result: Result | None = None, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    headers = dict(headers or {})
    if result is not None:
        headers |= {
            f"{HEADER}ratio": str(result.ratio),
            f"{HEADER}queue-ms": f"{result.queue_ms:.3f}",
            f"{HEADER}compute-ms": f"{result.compute_ms:.3f}",
        }
        if result.expected_quality is not None:
            headers[f"{HEADER}quality"] = f"{result.expected_quality:.4f}"
    body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(body, status, headers, "application/json")


def error_body(path: str, status: int, kind: str, text: str) -> dict[str, Any]:
    """An error as the clients of a path expect it: OpenAI's form below /v1, else text-embeddings-inference's."""
    if path.startswith("/v1/"):
        return {"error": {"message": text, "type": kind, "param": None, "code": status}}
    return {"error": text, "error_type": kind}


def _error(request: Request, status: int, kind: str, text: str, retry_s: int = 0) -> Response:
    headers = {"retry-after": str(retry_s)} if retry_s else {}
    return _json(error_body(endpoint(request.scope), status, kind, text), status=status, headers=headers)


async def _fault(request: Request, error: Any) -> Response:
    return _error(request, error.status, error.kind, error.text, error.retry_s)


async def _told(request: Request, error: Any) -> Response:
    """Our own errors: what was wrong with the request, or with the moment."""
    if isinstance(error, Overloaded | DeadlineExceeded):
        return _error(request, 429, "Overloaded", str(error), 1)
    if isinstance(error, InputError):
        return _error(request, 422, "Validation", str(error))
    return _error(request, 503 if isinstance(error, EngineError) else 500, "Backend", str(error))


async def _invalid(request: Request, error: Any) -> Response:
    """A body that is not JSON, or not of the form."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first.get("loc", ()) if part != "body")
    unread = first.get("type") == "json_invalid"
    text = f"{where + ': ' if where and not unread else ''}{first.get('msg', 'not valid')}"
    return _error(request, 400 if unread else 422, "Validation", text)


async def _http(request: Request, error: Any) -> Response:
    return _error(request, error.status_code, "NotFound" if error.status_code == 404 else "Request", str(error.detail))


async def _broken(request: Request, error: Exception) -> Response:
    return _error(request, 500, "Backend", f"{type(error).__name__}")
