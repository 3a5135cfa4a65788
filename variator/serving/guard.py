"""In front of the endpoints: who may ask, how much, and for how long."""

from __future__ import annotations

import asyncio
import hmac
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from variator.serving.service import Service

OPEN = ("/health", "/")
"""Paths that need no token: what a load balancer asks, and the page, which has no data of its own."""

ABOUT = ("/health", "/info", "/metrics", "/status")
"""What is answered while the server drains."""


def endpoint(scope: Scope) -> str:
    """The path that was asked for, wherever the application is mounted."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "").rstrip("/")) or "/"


class Guard:
    """ASGI middleware: bearer token, size and time of the body, and refusal while the server drains.

    Args:
        max_body: Bytes.
        body_s: Seconds in which a body has to arrive.
        token: Empty for none.
    """

    def __init__(self, app: ASGIApp, max_body: int, body_s: float, token: str, service: Service) -> None:
        self.app, self.max_body, self.body_s, self.service = app, max_body, body_s, service
        self.token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, headers = endpoint(scope), dict(scope["headers"])
        if self.token and not (path in OPEN and scope["method"] == "GET") and not self._knows(headers):
            await _refuse(send, path, 401, "Unauthorized", "no valid token", {"www-authenticate": "Bearer"})
            return
        if self.service.draining and path not in ABOUT:
            await _refuse(send, path, 503, "Unhealthy", "the server is about to end", {"retry-after": "5"})
            return
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            await self.app(scope, receive, send)
            return
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_body:
            await self._too_large(send, path)
            return
        try:
            body = await asyncio.wait_for(_read(receive, self.max_body), self.body_s)
        except TimeoutError:
            await _refuse(send, path, 408, "Timeout", f"the body did not arrive in {self.body_s:g} s", CLOSE)
            return
        if body is None:
            return  # nobody is there any more
        if len(body) > self.max_body:
            await self._too_large(send, path)
            return
        await self.app(scope, _once(body, receive), send)

    def _knows(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self.token)

    async def _too_large(self, send: Send, path: str) -> None:
        await _refuse(send, path, 413, "Validation", f"the body is larger than {self.max_body} bytes", CLOSE)


CLOSE = {"connection": "close"}


async def _read(receive: Receive, most: int) -> bytes | None:
    """A body, or as much of it as shows that it is too large; None if the client is gone."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most or not message.get("more_body", False):
            return b"".join(parts)


def _once(body: bytes, receive: Receive) -> Receive:
    """What gives a body that was read already, then what really comes."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _refuse(send: Send, path: str, status: int, kind: str, text: str, headers: dict[str, str]) -> None:
    from variator.serving.http import error_body

    body = orjson.dumps(error_body(path, status, kind, text))
    raw = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    raw += [(name.encode(), value.encode()) for name, value in headers.items()]
    start: dict[str, Any] = {"type": "http.response.start", "status": status, "headers": raw}
    await send(start)
    await send({"type": "http.response.body", "body": body})
