"""The output directory of an export: what it may replace, and how it appears at once.

An export is built in a hidden directory beside its place and renamed when it is complete. A lock on
the hidden directory keeps two exports to one place apart. It ends with the process, so that the
next export recognizes and removes the remains of a killed one. A mount without locks (some NFS and
Lustre) does not keep two exports apart.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from vllm_atomic_moe.convert.exporting.plan import Plan
from vllm_atomic_moe.files.checkpoint import CheckpointInfo, describe_checkpoint
from vllm_atomic_moe.files.export_format import EXPORT_DIRECTORY, INDEX
from vllm_atomic_moe.files.plain_files import (
    NotInPlaceError,
    allow_reading,
    lock,
    one_line,
    read_json_object,
)
from vllm_atomic_moe.files.profiles import PruningProfile

# Marks a complete export that could not be renamed, so that the next one does not remove it.
KEPT = ".complete"
SHARD = re.compile(rf"(?:{EXPORT_DIRECTORY}/)?model-\d+-of-\d+\.safetensors")


def check_place(model: Path, output: Path) -> None:
    """Refuse a place that is not writable, or that is inside the model.

    Raises:
        ValueError: one line.
    """
    if model.resolve() in (output, *output.parents):
        raise ValueError(f"output {output} is inside the model {model}; name another directory")
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is a file; name a directory")
    if output.is_mount():
        raise ValueError(
            f"output {output} is a mount point, which cannot be replaced; name a directory in it"
        )
    parent = next(parent for parent in output.parents if parent.exists())
    if not os.access(parent, os.W_OK):
        raise ValueError(f"output {output}: {parent} is not writable; choose another directory")


def check_replaced(
    output: Path, info: CheckpointInfo, profile: PruningProfile, plan: Plan, made: set[str]
) -> None:
    """Refuse to replace anything but an export of the same model and profile.

    Args:
        output: the place.
        info: the model to be exported.
        profile: the profile to be exported.
        plan: the export.
        made: files of the new export, relative to `output`.

    Raises:
        ValueError: one line that says what is at `output`.
    """
    if not output.exists() or not any(output.iterdir()):
        return
    remedy = "remove it or name another directory"
    try:
        found = describe_checkpoint(output)
        told = dict(read_json_object(output / plan.folder / INDEX)["metadata"])
    except (ValueError, KeyError, TypeError):
        found, told = None, {}
    if found is None or told.get("format") != plan.metadata["format"]:
        raise ValueError(f"output {output} holds something that is not a finished export; {remedy}")
    if found.stored is None:
        same = {key: told.get(key) for key in plan.metadata} == plan.metadata
    else:
        same = found == info and told.get("profile") == profile.name
        same = same and _equal(found.stored, profile.keep)
    if not same:
        raise ValueError(
            f"output {output} holds an export of another model or profile, "
            f"{told.get('profile')!r:.80}; wanted {profile.name!r} of this model; {remedy}"
        )
    there = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    if more := sorted(file for file in there - made if not SHARD.fullmatch(file)):
        raise ValueError(
            f"output {output} holds {more[0]}, which would be lost: the export does not make it; "
            "move it away or name another directory"
        )


def check_space(output: Path, needed: int) -> None:
    """Refuse a disk that is too small for `needed` bytes.

    Raises:
        ValueError: one line with both numbers.
    """
    free = shutil.disk_usage(output.parent).free
    if needed > free:
        raise ValueError(
            f"output {output}: {needed / 2**20:.1f} MiB are needed, {free / 2**20:.1f} MiB "
            "are free; make room or name a directory on another disk"
        )


@contextmanager
def working_directory(output: Path) -> Iterator[Path]:
    """The empty hidden directory that becomes `output`; removed if anything fails.

    The remains of a killed export are removed, and what it moved aside is moved back.

    Raises:
        ValueError: another export to `output` is running.
    """
    made = [parent for parent in output.parents if not parent.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    work = output.parent / f".{output.name}.exporting"
    handle = _lock(work, output)
    try:
        if (work / KEPT).exists():
            raise NotInPlaceError(
                f"output {output}: {work} holds a complete export that could not take its place; "
                "move it there, or remove it"
            )
        for entry in work.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        _move_back(output)
        yield work
    except NotInPlaceError:
        with suppress(OSError):
            (work / KEPT).touch()
        with suppress(OSError):
            _move_back(output)
        raise
    except BaseException as error:
        _move_back(output)
        shutil.rmtree(work, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError) and str(error.filename or work).startswith(str(work)):
            raise ValueError(
                f"output {output}: cannot be written ({one_line(error)}); make room, or name a "
                "directory elsewhere"
            ) from error
        raise
    finally:
        os.close(handle)


def publish(work: Path, output: Path) -> None:
    """Rename `work` to `output`; removes an earlier export once the new one is in place.

    Raises:
        NotInPlaceError: it cannot be renamed; `work` is complete and stays.
    """
    allow_reading(work, 0o755)
    try:
        if output.exists():
            shutil.rmtree(_aside(output), ignore_errors=True)
            output.rename(_aside(output))
        work.rename(output)
    except OSError as error:
        raise NotInPlaceError(
            f"output {output}: the export is complete, but {work} cannot be renamed to it "
            f"({error.strerror}); move it there"
        ) from error
    shutil.rmtree(_aside(output), ignore_errors=True)


def _lock(work: Path, output: Path) -> int:
    """Make and lock the directory; returns a file descriptor that holds the lock until closed."""
    while True:
        work.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):
            handle = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
            try:
                lock(handle, wait=False)
                # If its owner has just finished, the directory is `output` by now.
                if os.path.samestat(os.fstat(handle), os.stat(work)):
                    return handle
            except BlockingIOError:
                os.close(handle)
                raise ValueError(
                    f"output {output}: another export to it is running; wait for it or name "
                    "another directory"
                ) from None
            except BaseException:
                os.close(handle)
                with suppress(OSError):
                    work.rmdir()
                raise
            os.close(handle)


def _move_back(output: Path) -> None:
    """Undo the first half of `publish` if the second half has not happened."""
    if _aside(output).exists() and not output.exists():
        _aside(output).rename(output)


def _aside(output: Path) -> Path:
    return output.parent / f".{output.name}.replaced"


def _equal(one: Mapping[int, torch.Tensor], two: Mapping[int, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
