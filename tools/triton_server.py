"""A real tritonserver on this machine, for tests and measurements: from its wheel, on the loopback, with free ports.

The wheel brings the server and its Python backend, for CPUs, and no other backend. Its stubs are compiled for numpy 1,
and they look for packages in the virtual environment that PATH names, whatever PYTHONPATH says: so a small one is made
whose only content is the list of places to look in.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from variator.errors import EngineError
from variator.files import directory_written_whole

WHEEL, STUB_NUMPY = "nvidia-pytriton==0.7.0", "numpy>=1.26,<2"
CACHE = Path(os.environ.get("VARIATOR_TRITON_CACHE", Path.home() / ".cache" / "variator-tests" / "triton"))
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
ROOT = Path(__file__).parents[1]


def install(cache: Path = CACHE) -> Path:
    """The server's directory; fetched once, then found.

    Raises:
        EngineError: If its wheel, or a numpy that its stub can use, cannot be had for this Python.
    """
    place = cache / f"{WHEEL}-python{PYTHON}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / ".lock"):
        if not place.exists():
            with directory_written_whole(place) as partial:
                fetch(WHEEL, partial / "site")
                fetch(STUB_NUMPY, partial / "numpy")
                home = partial / "site" / "pytriton" / "tritonserver"
                stub = home / "python_backend_stubs" / PYTHON / "triton_python_backend_stub"
                if not stub.exists():
                    raise EngineError(f"{WHEEL} has no stub for Python {PYTHON}")
                shutil.copy(stub, home / "backends" / "python")
                for program in (home / "bin" / "tritonserver", home / "backends" / "python" / stub.name):
                    program.chmod(0o755)
    return place


def fetch(what: str, target: Path) -> None:
    """Install a wheel into a directory. `EngineError` if it cannot be had."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--target"]
    done = subprocess.run([*command, str(target), what], capture_output=True, text=True)
    if done.returncode:
        raise EngineError(f"{what} cannot be installed: {done.stderr.strip().splitlines()[-1:]}")


def _environment(place: Path, server: Path, numpy: bool) -> dict[str, str]:
    """What the server is started with; its stubs find numpy 1, this checkout, and this interpreter's packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    packages = place / "lib" / f"python{PYTHON}" / "site-packages"
    where = [server / "numpy"] if numpy else []
    (packages / "places.pth").write_text("\n".join(map(str, [*where, ROOT, sysconfig.get_path("purelib")])))
    libraries = [str(sysconfig.get_config_var("LIBDIR")), str(server / "site" / "nvidia_pytriton.libs")]
    return {
        **os.environ,
        "LD_LIBRARY_PATH": ":".join(libraries),
        "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
        "VIRTUAL_ENV": str(place),
    }


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class TritonServer:
    """A running server; use it as a context manager.

    Args:
        work: Directory for its log and environment.
        models: Loaded at the start.
        numpy: Whether the stub gets the numpy that it was compiled for.
    """

    def __init__(
        self, repository: Path, work: Path, models: Sequence[str], options: Sequence[str] = (), numpy: bool = True
    ) -> None:
        self.repository, self.server = repository, install()
        self.log = work / "tritonserver.log"
        self._http, self._grpc, self._metrics = _free_ports(3)
        home = self.server / "site" / "pytriton" / "tritonserver"
        command = [
            str(home / "bin" / "tritonserver"),
            f"--model-repository={repository}",
            f"--backend-directory={home / 'backends'}",
            f"--cache-directory={home / 'caches'}",
            "--model-control-mode=explicit",
            "--exit-timeout-secs=5",
            "--exit-on-error=false",
            *(f"--load-model={name}" for name in models),
            *(f"--{kind}-address=127.0.0.1" for kind in ("http", "grpc", "metrics")),
            f"--http-port={self._http}",
            f"--grpc-port={self._grpc}",
            f"--metrics-port={self._metrics}",
            *options,
        ]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                env=_environment(work / "environment", self.server, numpy),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def http(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self._http}"

    @property
    def grpc(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self._grpc}"

    def __enter__(self) -> TritonServer:
        try:
            self.wait()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def wait(self, timeout_s: float = 60.0) -> None:
        """Until it listens.

        Raises:
            EngineError: If it ends, or does not listen in time; with the end of its log.
        """
        end = time.monotonic() + timeout_s
        while time.monotonic() < end and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://{self.http}/v2/health/live", timeout=1):
                    return
            except OSError:
                time.sleep(0.1)
        raise EngineError(f"tritonserver did not start: {self.said()[-2000:]}")

    def said(self) -> str:
        """Its log so far."""
        return self.log.read_bytes().decode("utf-8", "replace")

    def stubs(self) -> dict[str, int]:
        """Process ids of the Python models' stubs that run, by model and version."""
        found = {}
        for place in Path("/proc").glob("[0-9]*"):
            try:
                words = (place / "cmdline").read_bytes().decode().split("\0")
                state = (place / "stat").read_text().rsplit(")", 1)[1].split()[0]
                group = os.getpgid(int(place.name))
            except (OSError, ValueError):
                continue
            named = re.search(r"/([^/]+)/(\d+)/model\.py$", words[1] if len(words) > 1 else "")
            if named and state != "Z" and group == self.process.pid and words[0].endswith("stub"):
                found["/".join(named.groups())] = int(place.name)
        return found

    def metrics(self) -> str:
        """What the metrics endpoint says."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._metrics}/metrics", timeout=10) as answer:
            return str(answer.read().decode())

    def close(self) -> None:
        """End it and whatever it has started."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
