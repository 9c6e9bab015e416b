"""A checkpoint's shards, open together, to read tensors in any order."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors import SafetensorError

from vllm_atomic_moe.files.checkpoint import locate_tensors
from vllm_atomic_moe.files.tensors import open_safetensors


class Shards:
    """A checkpoint's shards, each memory-mapped at its first use.

    Threads may read; a file cannot be closed while one does.

    Attributes:
        where: tensor name -> shard.
    """

    def __init__(self, directory: Path) -> None:
        self.where = locate_tensors(directory)
        self._files: dict[Path, Any] = {}
        self._stack = ExitStack()
        self._lock = Lock()

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._stack.close()

    def shape(self, name: str) -> list[int]:
        """The tensor's shape, from the header."""
        with self._lock:
            return self._file(name).get_slice(name).get_shape()

    def dtype(self, name: str) -> str:
        """The tensor's dtype as safetensors spells it, from the header."""
        with self._lock:
            return self._file(name).get_slice(name).get_dtype()

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, backed by the file: pages are read as they are used.

        Raises:
            ValueError: torch has no such dtype.
        """
        try:
            with self._lock:
                return self._file(name).get_tensor(name)
        except (SafetensorError, RuntimeError, TypeError) as error:
            raise ValueError(f"{self.where[name]}: {name} cannot be read ({error})") from None

    def _file(self, name: str) -> Any:
        path = self.where[name]
        if path not in self._files:
            _, self._files[path] = self._stack.enter_context(open_safetensors(path))
        return self._files[path]
