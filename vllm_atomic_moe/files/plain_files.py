"""Helpers for plain files: JSON, Git LFS pointers, and mounts without locks and modes.

Files may start with a byte order mark, or be a Git LFS pointer, three lines of text in place of a
file that was not fetched. CIFS and FAT have no modes, some NFS and Lustre mounts no locks.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

# Errors of flock on a mount without locks (NFS locks only files that are open for writing).
NO_LOCKS = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
# Errors of fsync on a mount, or for a kind of file, without it.
NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
# Names of profiles, and of their files without the suffix.
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, in UTF-8, 16 or 32, with or without a byte order mark.

    Raises:
        ValueError: it cannot be read, or holds another value; one line.
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


def one_line(error: BaseException | str, limit: int = 120) -> str:
    """A message on one line, cut in the middle: the place is first, the remedy last."""
    line = " ".join(str(error).split()) or type(error).__name__
    if len(line) <= limit:
        return line
    tail = 2 * limit // 3
    return f"{line[: limit - tail - 3]} … {line[-tail:]}"


class NotInPlaceError(ValueError):
    """A complete file or directory could not take its place; the message says where it is."""


def check_output(path: Path) -> None:
    """Refuse a file that cannot be written, before long work starts.

    Raises:
        ValueError: `path` is a directory, or its directory cannot be written to.
    """
    if path.is_dir():
        raise ValueError(f"output {path} is a directory; name a file in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"output {path}: {path.parent} is not writable; choose another directory")


def allow_reading(file: int | Path, mode: int = 0o644) -> None:
    """Set a file's mode, if the mount allows it."""
    with suppress(OSError):
        os.chmod(file, mode)


def onto_disk(path: Path) -> None:
    """Write a file or a directory through to the disk, so that it survives a power cut.

    Raises:
        OSError: it cannot be written to the disk; not raised if the mount lacks the call.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(handle)


def lock(handle: int, wait: bool = True) -> None:
    """Lock an open file or directory until it is closed; does nothing on a mount without locks.

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is not set.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
