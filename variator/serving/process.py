"""The verb `serve`: one process that serves, and one that starts it again should it die.

The port is opened once, by the parent, so that nobody is turned away while the child starts anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from variator.engines.serving import ServeSettings
from variator.errors import EngineError, InputError, VariatorError
from variator.serving.http import HttpSettings, create_app
from variator.serving.service import OpenSettings, Service

SETTINGS = "VARIATOR_SERVE"
"""Environment variable that tells the child what to serve."""

TOKEN = "VARIATOR_TOKEN"
"""Environment variable with the clients' token: on a command line everybody on the machine could read it."""

IDLE_S = 30.0
"""Seconds after which a connection on which no request has begun is closed."""

GRACE_S = 30
"""Seconds that requests under way have to be answered once the server ends."""

SIGNALS = (signal.SIGTERM, signal.SIGINT)

RESTARTS, WITHIN_S = 5, 60.0
"""A child that dies this often in this time will not get well by another start."""


@dataclass(frozen=True)
class ServerSettings:
    """Where and how a bundle is served.

    Args:
        bundle: Its directory.
        host, port: To listen on; port 0 takes a free one.
        engine, precision, threads: As for `Runtime.open`.
        policy: By name, as for `replay`.
        slo_ms, max_queue: Of the queue.
        http: Limits.
        drain_s: How long requests are refused with 503, and `/health` says so, before the server ends.
    """

    bundle: str
    host: str = "127.0.0.1"
    port: int = 8000
    engine: str = "auto"
    precision: str | None = None
    threads: int = 0
    policy: str = "drain"
    slo_ms: float = 100.0
    max_queue: int = 4096
    http: HttpSettings = field(default_factory=HttpSettings)
    drain_s: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536 or self.drain_s < 0:
            raise InputError(f"port {self.port}, {self.drain_s} s to drain", valid="0 to 65535, and 0 s or more")

    def opened(self) -> Service:
        """The service. Errors as its own."""
        serve = ServeSettings(self.slo_ms, self.max_queue)
        return Service(self.bundle, OpenSettings(self.engine, self.precision, self.threads, self.policy, serve))

    def to_json(self) -> str:
        """For the child; without the token, which has a variable of its own."""
        return json.dumps(asdict(self) | {"http": asdict(self.http) | {"token": ""}})

    @staticmethod
    def from_json(text: str, token: str) -> ServerSettings:
        """What the parent told."""
        data = json.loads(text)
        return ServerSettings(**data | {"http": HttpSettings(**data["http"] | {"token": token})})


def serve(settings: ServerSettings, on_start: Callable[[str], None] = lambda address: None) -> None:
    """Serve until a signal says to end; a child that dies is started again.

    Args:
        on_start: Told the address once requests are answered.

    Raises:
        InputError: If the port is in use.
        EngineError: If the bundle cannot be served, with the child's reason.
    """
    listening = _listen(settings.host, settings.port)
    _many_connections()
    host, port = listening.getsockname()[:2]
    os.environ |= {SETTINGS: settings.to_json(), TOKEN: settings.http.token}
    _watch(listening, lambda: on_start(f"http://{f'[{host}]' if ':' in host else host}:{port}"))


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise InputError(
            f"cannot listen on {host}:{port}: {error.strerror}", fix="another --port, or end who uses it"
        ) from error
    listening.set_inheritable(True)
    return listening


def _many_connections() -> None:
    """Connections that wait cost a file each: as many as the system allows."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _watch(listening: socket.socket, on_start: Callable[[], None]) -> None:
    """Start the child, again if it dies, and pass signals on."""
    ended = begun = False
    child = 0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal ended
        ended = True
        listening.close()  # the child's goes when it has drained: nobody is let in whom it will not hear
        if child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    deaths: list[float] = []
    try:
        while True:
            ready, told = os.pipe()
            os.set_inheritable(told, True)
            unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # none is lost before the child has a number
            try:
                if ended:
                    return
                files = [str(listening.fileno()), str(told)]
                child = os.posix_spawn(
                    sys.executable,
                    [sys.executable, "-m", "variator.serving.process", *files, str(os.getpid())],
                    dict(os.environ),
                    setpgroup=0,  # Ctrl-C is ours to pass on
                    setsigmask=unblocked,
                )
            finally:
                os.close(told)
                signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
            with os.fdopen(ready) as word:
                reason = word.read()
            if reason == READY and not begun:
                begun = True
                on_start()
            _, status = os.waitpid(child, 0)
            child = 0
            if ended or (os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0):
                return
            if reason not in ("", READY):  # there is no sense in another start
                raise EngineError(**json.loads(reason))
            deaths = [*(at for at in deaths if time.monotonic() - at < WITHIN_S), time.monotonic()]
            if len(deaths) >= RESTARTS:
                raise EngineError(
                    f"the serving process died {RESTARTS} times in {WITHIN_S:g} s", fix="see its messages"
                )
            print(f"the serving process died ({_how(status)}); it is started again", file=sys.stderr, flush=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        listening.close()


def _how(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)}"
    return f"exit status {os.WEXITSTATUS(status)}"


READY = "ready"
"""What the child says when it serves; else the error that keeps it from it."""


def child(file: int, told: int, parent: int) -> None:
    """Serve on a socket that the parent has opened."""
    _end_with(parent)
    settings = ServerSettings.from_json(os.environ[SETTINGS], os.environ[TOKEN])
    with os.fdopen(told, "w") as word:
        try:
            service = settings.opened()
        except VariatorError as error:
            json.dump({"what": error.what, "valid": error.valid, "fix": error.fix}, word)
            sys.exit(1)
        word.write(READY)
    app = create_app(service, settings.http, close=True)
    config = uvicorn.Config(
        app,
        http=Impatient,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=int(IDLE_S),
        timeout_graceful_shutdown=GRACE_S,
        server_header=False,
        lifespan="on",
    )
    _Draining(config, service, settings.drain_s).run(sockets=[socket.socket(fileno=file)])


class _Draining(uvicorn.Server):
    """A server that refuses for a while before it ends, so that a load balancer can turn away."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_s: float) -> None:
        super().__init__(config)
        self.service, self.drain_s = service, drain_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first one begins to drain, a second one does not wait."""
        end = super().handle_exit
        if self.service.draining or not self.drain_s:
            self.service.draining = True
            end(sig, frame)
            return
        self.service.draining = True
        timer = threading.Timer(self.drain_s, end, (sig, frame))
        timer.daemon = True
        timer.start()


class Impatient(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """A connection that is closed when no request begins on it for a while.

    uvicorn's own limit holds only between requests: who sends nothing at all, or a head letter by letter, may stay.
    """

    idle_s = IDLE_S

    def connection_made(self, transport: Any) -> None:
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        self._last: Any = None
        self._looking = self.loop.call_later(self.idle_s, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._looking.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        under_way = self.cycle is not None and not self.cycle.response_complete
        if self.cycle is self._last and not under_way:
            self.transport.close()
            return
        self._last = self.cycle
        self._looking = self.loop.call_later(self.idle_s, self._look)


def _end_with(parent: int) -> None:
    """Linux tells a child when its parent dies, if asked to in time."""
    prctl: Any = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit("the process that started this one is gone")


PR_SET_PDEATHSIG = 1


if __name__ == "__main__":
    child(*map(int, sys.argv[1:]))
