"""Tensors that lie on the GPU, given and taken through DLPack: no copy through host memory, and no library in between.

The structures are DLPack 0.8's (`DLManagedTensor`, https://dmlc.github.io/dlpack/latest/c_api.html), which torch, CuPy,
JAX and numba exchange.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from variator.errors import InputError

CUDA = 2
"""DLPack's kDLCUDA."""

CODES = {"i": 0, "u": 1, "f": 2}
"""DLPack's type codes by numpy's kinds. bfloat16, 4, comes and goes as its bits: numpy has none."""
BFLOAT = 4

NAME, USED = b"dltensor", b"used_dltensor"
"""Of a capsule that nobody has taken yet, and of one that somebody has."""


class _Device(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int32), ("number", ctypes.c_int32)]


class _Type(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _Type),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Managed(ctypes.Structure):
    pass


_DELETER = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_DESTRUCTOR = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
_Managed._fields_ = [("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _DELETER)]

_new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, _DESTRUCTOR)(
    ("PyCapsule_New", ctypes.pythonapi)
)
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_untaken = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_content = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_lent: dict[int, tuple[object, ...]] = {}
"""What must live until a taker of one of our tensors lets go, by the address of its structure."""


@_DELETER  # type: ignore[untyped-decorator]
def _let_go(managed: Any) -> None:
    _lent.pop(ctypes.addressof(managed.contents), None)


@_DESTRUCTOR  # type: ignore[untyped-decorator]
def _forgotten(capsule: int) -> None:
    """A capsule that nobody has taken is gone; whoever took it calls the deleter instead."""
    if _untaken(capsule, NAME):
        _lent.pop(_content(capsule, NAME), None)


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """A dense tensor on the GPU.

    Args:
        owner: What keeps the memory; it lives as long as this and whatever was made of this through DLPack.
        dtype: bfloat16 as uint16.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: object
    device: int = 0

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, self.device

    def __dlpack__(
        self, *, stream: int | None = None, max_version: Any = None, dl_device: Any = None, copy: bool | None = None
    ) -> object:
        """A capsule, as DLPack's Python specification has it. The contents are there: runs are waited for."""
        if copy:
            raise BufferError("this tensor is lent, not copied")
        shape = (ctypes.c_int64 * len(self.shape))(*self.shape)
        kind = _Type(CODES[self.dtype.kind], 8 * self.dtype.itemsize, 1)
        tensor = _Tensor(self.address, _Device(*self.__dlpack_device__()), len(self.shape), kind, shape, None, 0)
        managed = _Managed(tensor, None, _let_go)
        _lent[ctypes.addressof(managed)] = (managed, shape, self.owner)
        return _new(ctypes.addressof(managed), NAME, _forgotten)


def on_device(tensors: Mapping[str, Any], dtypes: Mapping[str, npt.DTypeLike], stream: int) -> dict[str, DeviceArray]:
    """An engine's inputs, as they lie on the GPU.

    Args:
        dtypes: Of all inputs that the engine takes.
        stream: On which they will be read: whoever made them lets that wait for what is still being written.

    Raises:
        InputError: If one is missing, lies elsewhere, is of another type or shape or not dense.
    """
    if set(tensors) != set(dtypes):
        raise InputError(f"the tensors are {', '.join(sorted(tensors)) or 'none'}", valid=", ".join(sorted(dtypes)))
    # In the engine's order: what is kept for addresses that come again knows them by their places.
    found = {name: _on_device(name, tensors[name], dtype, stream) for name, dtype in dtypes.items()}
    shapes = {array.shape for array in found.values()}
    if len(shapes) > 1 or len(next(iter(shapes))) != 2 or 0 in next(iter(shapes)):
        sizes = ", ".join(f"{name} {list(array.shape)}" for name, array in found.items())
        raise InputError(f"the shapes are {sizes}", valid="[rows, tokens], the same for all")
    return found


def _on_device(name: str, tensor: Any, dtype: npt.DTypeLike, stream: int) -> DeviceArray:
    """Somebody's tensor as it lies on the GPU; arguments and errors as `on_device`."""
    wanted = np.dtype(dtype)
    if not hasattr(tensor, "__dlpack__") or not hasattr(tensor, "__dlpack_device__"):
        raise InputError(f"{name} is a {type(tensor).__name__}", valid="a tensor on the GPU that speaks DLPack")
    kind, number = tensor.__dlpack_device__()
    if (int(kind), int(number)) != (CUDA, 0):
        raise InputError(
            f"{name} lies on DLPack's device {int(kind)}:{int(number)}",
            valid=f"the first GPU ({CUDA}:0)",
            fix="move it",
        )
    if isinstance(tensor, DeviceArray):
        found = tensor
    else:
        capsule = tensor.__dlpack__(stream=stream)
        managed = ctypes.cast(_pointer(capsule, NAME), ctypes.POINTER(_Managed)).contents
        inner = managed.tensor
        shape = tuple(inner.shape[i] for i in range(inner.ndim))
        dense, step = True, 1
        for place in reversed(range(inner.ndim)):
            dense &= not inner.strides or shape[place] == 1 or inner.strides[place] == step
            step *= shape[place]
        if not dense:
            raise InputError(f"{name} is not dense", valid="rows behind one another", fix="tensor.contiguous()")
        # The capsule is kept, not taken: when it goes, so does what its maker lent.
        found = DeviceArray((inner.data or 0) + inner.byte_offset, shape, _numpy(inner.dtype), (capsule, tensor))
    if found.dtype != wanted:
        raise InputError(f"{name} is {found.dtype}", valid=str(wanted), fix="convert it on the device")
    return found


def _numpy(kind: _Type) -> np.dtype[Any]:
    letter = "u" if kind.code == BFLOAT else {code: letter for letter, code in CODES.items()}.get(kind.code, "V")
    return np.dtype(f"{letter}{kind.bits // 8}")


@dataclass(frozen=True)
class DeviceResult:
    """What a run between device tensors gave.

    Args:
        outputs: By name, in the engine's own type, complete.
        device_ms: From the start to the end of the computation by CUDA's events, without any copy.
    """

    outputs: Mapping[str, DeviceArray]
    device_ms: float
