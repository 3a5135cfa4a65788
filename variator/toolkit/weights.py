"""Content-addressed weight files: each distinct tensor once, for all graphs that use it.

Graphs keep small tensors inline and point to large ones by file, offset and length (ONNX external data).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from variator.errors import BundleError
from variator.files import inside, write_atomically

if TYPE_CHECKING:
    import onnx
    import onnx_ir

INLINE_BYTES = 1024
"""Tensors up to this size stay in the graph."""

Place = tuple[str, int, int]
"""File, offset and length of a tensor."""

ALIGNMENT = 4096
"""Offsets are page-aligned, so that a runtime can map a tensor instead of reading it."""


class WeightStore:
    """Appends tensors to data files in a directory and remembers where each content lies.

    Args:
        journal: Where every step is written down, so that work that was killed goes on where it stopped; what the data
            files hold beyond it is cut off, and if it tells of bytes that are not there, all begins anew.
    """

    def __init__(self, directory: Path, journal: Path | None = None) -> None:
        self._directory, self._journal = directory, journal
        self._places: dict[str, Place] = {}
        self._named: dict[str, Place] = {}
        if journal is not None:
            self._resume(journal)

    def _resume(self, journal: Path) -> None:
        """Know what was written before, and cut off what was not finished."""
        lines, ends = [], dict[str, int]()
        for line in journal.read_text(encoding="utf-8").splitlines() if journal.exists() else ():
            try:
                address, name, (file, offset, length) = json.loads(line)
            except ValueError:  # the line that was being written
                break
            lines.append(line)
            self._places[address] = (file, offset, length)
            if name:
                self._named[name] = self._places[address]
            ends[file] = max(ends.get(file, 0), offset + length)
        found = {path.name: path.stat().st_size for path in self._directory.glob("*.data")}
        if any(found.get(name, 0) < end for name, end in ends.items()):  # not what the journal tells of: anew
            lines, ends = [], {}
            self._places, self._named = {}, {}
        write_atomically(journal, "".join(f"{line}\n" for line in lines))
        for name in found:
            os.truncate(self._directory / name, ends.get(name, 0))

    def add(self, data: bytes | memoryview, file: str, name: str = "") -> Place:
        """Where these bytes lie (file, offset, length): in an earlier place if known, else appended to `file`.

        Args:
            name: By which `named` is to find them again.
        """
        address = hashlib.sha256(data).hexdigest()
        known = address in self._places
        if not known:
            with (self._directory / file).open("ab") as out:
                offset = _pad(out)
                out.write(data)
            self._places[address] = (file, offset, len(data))
        if name:
            self._named[name] = self._places[address]
        if self._journal is not None and (name or not known):
            with self._journal.open("a", encoding="utf-8") as out_line:
                out_line.write(json.dumps([address, name, self._places[address]]) + "\n")
        return self._places[address]

    def externalise(self, model: onnx_ir.Model, file: str) -> None:
        """Move a graph's large tensors out of it; those that no earlier graph had go to `file`."""
        import onnx_ir as ir

        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes <= INLINE_BYTES:
                continue
            # What takes work to get is known by its name, which is the same in all graphs, and computed once.
            name = str(value.name) if isinstance(tensor, ir.LazyTensor) else ""
            place = self._named.get(name) or self.add(tensor.tobytes(), file, name)
            location, offset, length = place
            value.const_value = ir.ExternalTensor(
                location,
                offset,
                length,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=value.name or "",
                base_dir=self._directory,
            )


def _pad(out: BinaryIO) -> int:
    position = out.seek(0, 2)
    out.write(b"\0" * (-position % ALIGNMENT))
    return out.tell()


def external_tensors(model: onnx.ModelProto) -> Iterator[tuple[onnx.TensorProto, dict[str, str]]]:
    """Every initializer of a graph that lies in another file, with its entries (location, offset, length, ...)."""
    import onnx

    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            yield tensor, {entry.key: entry.value for entry in tensor.external_data}


def gather(graphs: Sequence[Path], directory: Path, file: str) -> None:
    """Copy graphs into `directory` with all their external data in one content-addressed file.

    Matrices that ONNX Runtime has packed for its kernels go along: their entries have the key `prepacked_<n>` and
    the value `<kernel>+<hash>|<offset>;<length>;0|...`.
    """
    import onnx

    store = WeightStore(directory)
    for graph in graphs:
        model = onnx.load(graph, load_external_data=False)
        for tensor, entries in external_tensors(model):
            with (graph.parent / entries["location"]).open("rb") as data:
                _move(tensor, data, store, file)
        onnx.save(model, directory / graph.name)


def _move(tensor: onnx.TensorProto, data: BinaryIO, store: WeightStore, file: str) -> None:
    def moved(offset: int, length: int) -> int:
        data.seek(offset)
        return store.add(data.read(length), file)[1]

    entries = {entry.key: entry for entry in tensor.external_data}
    entries["offset"].value = str(moved(int(entries["offset"].value), int(entries["length"].value)))
    entries["location"].value = file
    for entry in tensor.external_data:
        if entry.key.startswith("prepacked"):
            kernel, *blobs = entry.value.split("|")
            places = [(int(start), int(length)) for start, length, _ in (blob.split(";") for blob in blobs)]
            packed = [f"{moved(start, length)};{length};0" for start, length in places]
            entry.value = "|".join([kernel, *packed])


def check_external_data(graph: Path) -> None:
    """Refuse a graph whose weights lie outside its directory or beyond the end of a file.

    Raises:
        BundleError: Naming the tensor.
    """
    import onnx
    from google.protobuf.message import DecodeError

    fix = "copy the bundle again, or export again"
    try:
        model = onnx.load(graph, load_external_data=False)
    except DecodeError as error:
        raise BundleError(f"{graph} is not an ONNX graph: {error}", fix=fix) from error
    for tensor, entries in external_tensors(model):
        file = inside(graph.parent, entries.get("location", ""))
        end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
        if not file.is_file() or file.stat().st_size < end:
            raise BundleError(f"{graph.name}: the data of {tensor.name!r} is missing from {file.name}", fix=fix)
