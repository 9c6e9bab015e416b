"""Data that a streamed calibration keeps between layers, in memory or in files that survive a kill.

A stage is the result of one step (a layer's inputs, the gradients with respect to them, a layer's
sums): a few named tensors per batch. In a scratch directory a stage is valid only when it is
finished, that is, complete and with the digests of its files.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save

from vllm_atomic_moe.files.plain_files import lock, read_json_object
from vllm_atomic_moe.files.tensors import open_safetensors, replaced_file, shorten

RUN = "run.json"
FINISHED = "finished.json"

Tensors = Mapping[str, torch.Tensor]


class Kept(Protocol):
    """Stages of tensors on the CPU."""

    def begin(self, stage: str) -> None:
        """Make an empty stage, replacing one of that name."""

    def put(self, stage: str, number: int, tensors: Tensors) -> None:
        """Keep the tensors of batch `number`."""

    def get(self, stage: str, number: int) -> Tensors:
        """The tensors of batch `number`, not to be modified."""

    def finish(self, stage: str) -> None:
        """Mark a stage as complete."""

    def finished(self, stage: str) -> bool:
        """Whether a stage is complete and sound."""

    def drop(self, stage: str) -> None:
        """Delete a stage, if it exists."""

    def room(self) -> int:
        """Bytes that may still be kept."""

    def clear(self) -> None:
        """Delete everything."""

    def close(self) -> None:
        """Release it; finished stages remain for a resumed run."""


class InMemory:
    """Keeps stages in host memory."""

    def __init__(self, room: int) -> None:
        """`room`: bytes of memory that are free."""
        self._stages: dict[str, dict[int, Tensors]] = {}
        self._finished: set[str] = set()
        self._room = room

    def begin(self, stage: str) -> None:
        self.drop(stage)
        self._stages[stage] = {}

    def put(self, stage: str, number: int, tensors: Tensors) -> None:
        self._stages[stage][number] = dict(tensors)

    def get(self, stage: str, number: int) -> Tensors:
        return self._stages[stage][number]

    def finish(self, stage: str) -> None:
        self._finished.add(stage)

    def finished(self, stage: str) -> bool:
        return stage in self._finished

    def drop(self, stage: str) -> None:
        self._stages.pop(stage, None)
        self._finished.discard(stage)

    def room(self) -> int:
        return self._room

    def clear(self) -> None:
        self._stages.clear()
        self._finished.clear()

    def close(self) -> None:
        self.clear()


class Scratch:
    """Keeps stages in a directory, one file per batch, for a run that may be killed and resumed."""

    def __init__(self, directory: Path, run: Mapping[str, Any]) -> None:
        """Open a scratch directory, and lock it.

        Args:
            directory: new, or left by a run with the same description.
            run: the description of this run; JSON.

        Raises:
            ValueError: it belongs to another run, another process uses it, or it cannot be written.
        """
        self.directory = directory
        self._sound: set[str] = set()
        self._digests: dict[str, dict[str, str]] = {}
        self._lock = ExitStack()
        told = json.loads(json.dumps(run))
        try:
            directory.mkdir(parents=True, exist_ok=True)
            handle = self._lock.enter_context((directory / ".lock").open("w"))
            lock(handle.fileno(), wait=False)
            if not (directory / RUN).exists():
                _write(directory / RUN, json.dumps(told, indent=2).encode())
        except BlockingIOError:
            raise ValueError(
                f"scratch {directory} is used by another calibration; name another directory"
            ) from None
        except OSError as error:
            raise self._cannot_write(error) from None
        before = read_json_object(directory / RUN)
        for key in dict.fromkeys([*told, *before]):
            if told.get(key) != before.get(key):
                raise ValueError(
                    f"scratch {directory} is of another calibration: its {key} is "
                    f"{shorten(before.get(key))}, here {shorten(told.get(key))}; run that again, "
                    "or empty the directory"
                )

    def begin(self, stage: str) -> None:
        self.drop(stage)
        self._digests[stage] = {}
        try:
            (self.directory / stage).mkdir()
        except OSError as error:
            raise self._cannot_write(error) from None

    def put(self, stage: str, number: int, tensors: Tensors) -> None:
        data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        file = f"{number}.safetensors"
        try:
            (self.directory / stage / file).write_bytes(data)
        except OSError as error:
            raise self._cannot_write(error) from None
        self._digests[stage][file] = hashlib.sha256(data).hexdigest()

    def get(self, stage: str, number: int) -> Tensors:
        with open_safetensors(self.directory / stage / f"{number}.safetensors") as (_, file):
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def finish(self, stage: str) -> None:
        _write(self.directory / stage / FINISHED, json.dumps(self._digests[stage]).encode())
        self._sound.add(stage)

    def finished(self, stage: str) -> bool:
        """Read a whole stage that an earlier run left, once."""
        if stage not in self._sound and _sound(self.directory / stage):
            self._sound.add(stage)
        return stage in self._sound

    def drop(self, stage: str) -> None:
        self._sound.discard(stage)
        # First the mark that makes it valid.
        (self.directory / stage / FINISHED).unlink(missing_ok=True)
        shutil.rmtree(self.directory / stage, ignore_errors=True)

    def room(self) -> int:
        used = sum(file.stat().st_size for file in self.directory.rglob("*.safetensors"))
        return shutil.disk_usage(self.directory).free + used

    def clear(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def close(self) -> None:
        self._lock.close()

    def _cannot_write(self, error: OSError) -> ValueError:
        return ValueError(
            f"scratch {self.directory}: cannot be written ({error.strerror}); make room, or name "
            "another directory"
        )


def _write(path: Path, data: bytes) -> None:
    """Write a file, complete or not at all."""
    with replaced_file(path) as temporary:
        temporary.write_bytes(data)


def _sound(stage: Path) -> bool:
    if not (stage / FINISHED).is_file():
        return False
    try:
        for name, wanted in read_json_object(stage / FINISHED).items():
            with (stage / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != wanted:
                    return False
    except (OSError, ValueError):
        return False
    return True
