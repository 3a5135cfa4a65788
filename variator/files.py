"""Files on disk: hashes, names that stay inside a directory, and writes that are complete or absent.

Used by every room that writes something another process may read.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from variator.errors import BundleError, InputError, VariatorError

MARK = "made-from.sha256"
"""In a directory of work that may be interrupted."""

DISK_TROUBLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
"""Errors that are the disk's, whatever was being done."""


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(value: Any) -> str:
    """Hex sha256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def inside(directory: Path, name: str) -> Path:
    """`directory / name`, refused if it would lie anywhere else (absolute, `..`, or a link that leads out).

    Raises:
        BundleError: If it would.
    """
    path = directory / name
    if not name or Path(name).is_absolute() or not path.resolve().is_relative_to(directory.resolve()):
        raise BundleError(
            f"{name!r} is a path outside {directory}", valid="plain names of files in the directory", fix="export again"
        )
    return path


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file beside its place, flush it to disk and rename it there.

    Raises:
        VariatorError: If the disk is full or the place not writable; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with disk_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an operating system's error while writing `path` into one that says what to do."""
    try:
        yield
    except OSError as error:
        raise VariatorError(
            f"cannot write {path}: {error.strerror or error}",
            fix="free disk space or choose another place; nothing half-written was kept",
        ) from error


@contextlib.contextmanager
def directory_written_whole(final: Path, *, replace: bool = False) -> Iterator[Path]:
    """A directory that appears under its final name only when the block has succeeded.

    The block writes into a hidden sibling, which is renamed at the end and removed on any error. What killed
    processes left behind is removed first, and an old directory that one had put aside is put back.

    Args:
        final: Where it goes.
        replace: Whether an existing directory may be replaced.

    Raises:
        VariatorError: If `final` exists and may not be replaced, or the disk refuses.
    """
    aside = final.with_name(f".{final.name}.old")
    with disk_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        _tidy(final, aside)
    if final.exists() and not replace:
        raise VariatorError(f"{final} exists already", fix="choose another name, or pass --overwrite")
    with disk_errors(final):
        # The process id in the name lets a later run tell a leftover from a neighbour at work.
        partial = Path(tempfile.mkdtemp(prefix=f".{final.name}.part-{os.getpid()}-", dir=final.parent))
    try:
        try:
            yield partial
        except OSError as error:
            if error.errno not in DISK_TROUBLE:
                raise
            with disk_errors(final):
                raise
        with disk_errors(final):
            partial.chmod(0o755)
            if not final.exists():
                partial.rename(final)
            elif replace:
                _exchange(partial, final, aside)
            else:
                raise VariatorError(f"{final} has appeared meanwhile", fix="choose another name, or pass --overwrite")
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def directory_resumed(final: Path, made_from: Any, *, replace: bool = False) -> Iterator[tuple[Path, Path]]:
    """A directory that appears under its final name when the block has succeeded, and stays for later if it did not.

    Args:
        made_from: A JSON value: the same goes on with what is there, another throws it away.
        replace: Whether an existing directory may be replaced.

    Yields:
        Where to write, and a place beside it for notes that do not belong to the result.

    Raises:
        InputError: If another process is at it.
        VariatorError: If the disk refuses; what was written stays.
    """
    work = final.with_name(f".{final.name}.resumable")
    aside = final.with_name(f".{final.name}.old")
    with alone(final):
        with disk_errors(final):
            _tidy(final, aside)
        claim(work, made_from, anew=True)
        inner = work / "result"
        for path in work.iterdir():  # what a killed process has left: neither result nor notes
            if path.is_dir() and path != inner:
                shutil.rmtree(path, ignore_errors=True)
            elif path.suffix == ".part":
                path.unlink(missing_ok=True)
        try:
            inner.mkdir(exist_ok=True)
            yield inner, work
        except OSError as error:
            if error.errno not in DISK_TROUBLE:
                raise
            reason = error.strerror or str(error)
            raise VariatorError(
                f"cannot write {final}: {reason}",
                fix="free disk space and repeat the command: it goes on where it stopped",
            ) from error
        with disk_errors(final):
            if final.exists() and not replace:
                raise VariatorError(f"{final} has appeared meanwhile", fix="choose another name, or pass --overwrite")
            if final.exists():
                _exchange(inner, final, aside)
            else:
                inner.rename(final)
            shutil.rmtree(work, ignore_errors=True)  # what is left of it after a kill begins anew


@contextlib.contextmanager
def alone(place: Path) -> Iterator[None]:
    """Be the only process that makes `place` while the block runs; a hidden file beside it is the lock.

    Raises:
        InputError: If another one is at it.
    """
    with disk_errors(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        file = place.with_name(f".{place.name}.lock")
        lock = FileLock(file)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise InputError(f"another process is making {place}", fix="wait for it, or choose another -o") from error
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        lock.release()


def claim(place: Path, made_from: Any, *, anew: bool = False) -> None:
    """Mark the directory of work that may be interrupted with what it is made from: only the same goes on in it.

    Args:
        made_from: A JSON value.
        anew: Whether to throw away something else that was begun there.

    Raises:
        InputError: If something else was begun there.
    """
    key, mark = sha256_of_json(made_from), place / MARK
    if mark.exists():
        if mark.read_text(encoding="utf-8") == key:
            return
        if not anew:
            raise InputError(
                f"{place} holds work that was begun with another model, data or settings",
                fix="repeat that command to finish it, choose another -o, or start anew with --overwrite",
            )
    with disk_errors(place):
        mark.unlink(missing_ok=True)  # first: without it the rest is nobody's, whatever happens now
    shutil.rmtree(place, ignore_errors=True)  # of another origin, or without its mark of one that nobody knows
    with disk_errors(place):
        place.mkdir(parents=True, exist_ok=True)
    write_atomically(mark, key)


def _exchange(new: Path, final: Path, aside: Path) -> None:
    final.rename(aside)
    try:
        new.rename(final)
    except OSError:
        aside.rename(final)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _tidy(final: Path, aside: Path) -> None:
    if aside.exists() and not final.exists():
        aside.rename(final)
    shutil.rmtree(aside, ignore_errors=True)
    for leftover in final.parent.glob(f".{glob.escape(final.name)}.part-*"):
        owner = leftover.name.split(".part-")[-1].split("-")[0]
        if owner.isdigit() and not _alive(int(owner)):
            shutil.rmtree(leftover, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
