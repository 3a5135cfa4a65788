"""Build `cpp/` and what it is built with: `make cpp`, the tests and the bench all come through here.

`python -m tools.build_cpp DIRECTORY [SANITIZERS]`, sanitizers apart by commas: `address,undefined`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent / "cpp"


class CannotBuildError(Exception):
    """What a build needs is not here; no fault of the sources."""


def dependencies(place: Path) -> Path:
    """ONNX Runtime's headers and library and the JSON parser, laid out once in a directory.

    Raises:
        CannotBuildError: If they cannot be had.
    """
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_name(f".{place.name}.lock")):
        command = ["sh", str(HERE / "cpp_dependencies.sh"), sys.executable, str(place)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CannotBuildError(f"what cpp/ is built with cannot be had: {done.stderr.strip()[-300:]}")
    return place


def configure(source: Path, build: Path, *options: str) -> None:
    """Run CMake, with Ninja where that is installed."""
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    _run("cmake", *generator, "-S", str(source), "-B", str(build), *options)


def compiled(build: Path) -> Path:
    """Compile what is configured."""
    _run("cmake", "--build", str(build), "--parallel", "2")
    return build


def build(place: Path, needed: Path, sanitize: str = "", *options: str) -> Path:
    """Build the library, the example and what the tests drive into `place`.

    Args:
        needed: What `dependencies` gave.
        sanitize: As the compiler's `-fsanitize`.
        options: More for CMake.

    Raises:
        CannotBuildError: If there is no CMake or compiler.
        RuntimeError: If it does not compile, with the compiler's words.
    """
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            raise CannotBuildError(f"there is no {tool}")
    configure(
        SOURCE,
        place,
        f"-DONNXRUNTIME_ROOT={needed}",
        f"-DNLOHMANN_JSON_ROOT={needed / 'include'}",
        f"-DVARIATOR_SANITIZE={sanitize}",
        "-DVARIATOR_TESTS=ON",
        *options,
    )
    return compiled(place)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-6000:]}\n{done.stderr[-3000:]}")


def main() -> None:
    """Build into a directory, with its dependencies beside it."""
    place = Path(sys.argv[1]).resolve()
    try:
        print(build(place, dependencies(place.parent / "cpp-dependencies"), *sys.argv[2:3]))
    except (CannotBuildError, RuntimeError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
