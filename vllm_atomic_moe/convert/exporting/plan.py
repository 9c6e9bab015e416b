"""The plan of an export, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_atomic_moe.files.shards import Shards
from vllm_atomic_moe.files.tensors import StreamedTensor


@dataclass(frozen=True, slots=True)
class Plan:
    """A checkpoint to write.

    Attributes:
        tensors: all of its tensors, in the order of their names.
        config: its config.json.
        metadata: of the index of its shards.
        folder: of its shards, relative to the checkpoint.
        experts: number of experts of a layer.
        width: atoms of every expert; None if widths differ.
    """

    tensors: Sequence[StreamedTensor]
    config: bytes
    metadata: Mapping[str, Any] = field(default_factory=dict)
    folder: str = ""
    experts: int = 0
    width: int | None = None


def copied(source: Shards, name: str, new_name: str | None = None) -> StreamedTensor:
    """An unchanged tensor, under its own name or a new one."""
    shape, nbytes = tuple(source.shape(name)), source.tensor(name).nbytes
    return StreamedTensor(
        new_name or name,
        source.dtype(name),
        shape,
        nbytes,
        lambda: iter([source.tensor(name)]),
    )
