"""Files on other people's disks: JSON, Git LFS pointers, and mounts without locks and modes.

Files come with a byte order mark, or as a Git LFS pointer, three lines of text that stand for a
file that was not fetched. CIFS and FAT know no modes, some NFS and Lustre mounts no locks.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

# What flock answers on a mount without locks (NFS locks only what is open for writing).
NO_LOCKS = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, in UTF-8 (or 16, or 32), with or without a byte order mark.

    Raises:
        ValueError: it cannot be read, or holds something else; one line.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        check_not_pointer(path)
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds {type(value).__name__}, wanted a JSON object")
    return value


def check_not_pointer(path: Path) -> None:
    """Refuse a Git LFS pointer.

    Raises:
        ValueError: the file is one.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
    except OSError:
        return
    if start == LFS_POINTER:
        raise ValueError(
            f"{path}: a Git LFS pointer in the place of the file; run `git lfs pull` there"
        )


class NotInPlaceError(ValueError):
    """What was written is complete and could not take its place; the message says where it is."""


def allow_reading(file: int | Path, mode: int = 0o644) -> None:
    """Set a file's mode. Where the mount does not let us, it stays as the mount gives it."""
    with suppress(OSError):
        os.chmod(file, mode)


def lock(handle: int, wait: bool = True) -> None:
    """Lock an open file or directory until it is closed; not at all on a mount without locks.

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is not set.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
