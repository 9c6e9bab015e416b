"""Several processes, started by torchrun, that share the windows of one calibration.

Each runs its share as if alone. At the end the sums, which are on the CPU by then, are added up
over gloo.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from vllm_atomic_moe.calibration.text import CalibrationText, take_shard
from vllm_atomic_moe.files.statistics import SUMS, LayerSums, add_sets

# One rank may finish hours before another.
PATIENCE = timedelta(days=30)


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes of a run.

    Attributes:
        rank: this one's number, from 0.
        world: how many there are.
        local_rank: its number on this machine.
        local_world: how many there are on this machine.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1

    @classmethod
    def here(cls) -> Ranks:
        """This process among those that torchrun started; the only one without torchrun."""
        if not distributed.is_torchelastic_launched():
            return cls()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        return cls(*(int(os.environ[name]) for name in names))

    def device(self, wanted: str) -> str:
        """The device of this process; each has its own. A single process gets `wanted`.

        Raises:
            ValueError: all processes would share the named device, or there are too few.
        """
        if self.world == 1 or wanted == "cpu":
            return wanted
        if wanted not in ("auto", "cuda"):
            raise ValueError(
                f"device {wanted!r}: {self.world} processes take a device each; use --device auto"
            )
        devices = torch.cuda.device_count()
        if not devices and wanted == "auto":
            return "cpu"
        if devices < self.local_world:
            raise ValueError(
                f"{self.local_world} processes and {devices} CUDA devices on this machine; use "
                f"--nproc-per-node {devices}, or --device cpu"
            )
        return f"cuda:{self.local_rank}"

    def share(self, text: CalibrationText) -> CalibrationText:
        """The windows of this process.

        Raises:
            ValueError: there are fewer windows than processes.
        """
        if text.num_windows < self.world:
            raise ValueError(
                f"{self.world} processes share {text.num_windows} windows; start fewer processes, "
                "or use more text"
            )
        return take_shard(text, self.rank + 1, self.world)

    def add(self, sums: Mapping[int, LayerSums]) -> dict[int, LayerSums]:
        """Add up the sums of all processes; the result is the same in all of them."""
        return {layer: self._added(of_layer) for layer, of_layer in sums.items()}

    def _added(self, sums: LayerSums) -> LayerSums:
        if self.world == 1:
            return sums
        added = {name: it.clone() for name, it in sums.tensors().items() if name in SUMS}
        for tensor in added.values():
            distributed.all_reduce(tensor)
        tables: list[Any] = [None] * self.world
        distributed.all_gather_object(tables, (sums.sets, sums.set_counts))
        sets, set_counts = add_sets(tables)
        return replace(sums, **added, sets=sets, set_counts=set_counts)


@contextmanager
def joined() -> Iterator[Ranks]:
    """Within the context, this process can communicate with the others of its run."""
    ranks = Ranks.here()
    if ranks.world == 1:
        yield ranks
        return
    distributed.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield ranks
    finally:
        distributed.destroy_process_group()
