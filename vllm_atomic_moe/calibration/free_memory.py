"""Free memory of this machine or a device."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
M_MMAP_THRESHOLD = -3  # of malloc.h
CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device; on a CPU within its control group's limit.

    The system's cache of files counts as free.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = _numbers(MEMINFO).get("MemAvailable:", 0) * 1024
    limit = _limit(CGROUP / "memory.max")
    if limit is not None:
        free = min(free, limit - _numbers(CGROUP / "memory.stat").get("anon", 0))
    return max(free, 0)


def give_back_at_once() -> None:
    """Make this process return freed blocks of a MiB and more to the system at once.

    glibc learns to keep blocks of up to 32 MiB, in heaps that fragment from layer to layer. Without
    glibc this does nothing.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)


def _limit(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _numbers(path: Path) -> dict[str, int]:
    """Name -> number, from the first two words of each line of a file."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    words = (line.split() for line in lines)
    return {found[0]: int(found[1]) for found in words if len(found) > 1 and found[1].isdecimal()}
