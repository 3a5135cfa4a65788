"""This machine, as build keys and records name it: processor, cores, memory and the features kernels depend on."""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache
from pathlib import Path

KERNEL_FEATURES = (
    "avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8",
    "asimd", "asimddp", "i8mm", "bf16",
)  # fmt: skip
"""Instruction sets that decide which kernels and weight layouts a CPU runtime uses."""


@cache
def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def cpu_name() -> str:
    """The processor's name."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Which of `KERNEL_FEATURES` this processor has."""
    flags = set((_cpuinfo().get("flags") or _cpuinfo().get("Features") or "").split())
    return [feature for feature in KERNEL_FEATURES if feature in flags]


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def release_memory() -> None:
    """Give freed memory back to the system; glibc keeps what buffers of changing sizes leave between them."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def system() -> str:
    """Operating system and Python."""
    return f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
