"""A vLLM plug-in of these tests that injects faults into real servers.

`installed(directory)` registers it as an entry point. If the environment of a server names the
plug-in, the text of the file `directory/VERB` says how that call of `atomic_moe_rank` fails:
`fail`, `raise` (in the last layer, half way), `exit` (ends the process), `sleep SECONDS`; `@RANK`
appended limits it to one of all engines' ranks. `directory/step` slows every step of the engine by
that many seconds.

The variable GATHERS adds the collectives that vLLM's CPU ranks lack for data parallel MoE.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

VARIABLE = "ATOMIC_MOE_TEST_FAULTS"
GATHERS = "ATOMIC_MOE_TEST_CPU_GATHERS"


def installed(directory: Path) -> dict[str, str]:
    """Put the entry point into `directory`; return the environment that a server needs."""
    metadata = directory / "atomic_moe_faults-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: atomic-moe-faults\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(
        f"[vllm.general_plugins]\nfaults = {__name__}:register\n"
    )
    root = Path(__file__).parents[2]
    places = [str(directory), str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {VARIABLE: str(directory), "PYTHONPATH": ":".join(places)}


def read(path: Path) -> str:
    """A file's text; empty if the file is missing, or just removed."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def register() -> None:
    """In every vLLM process, after the project's own `register()`."""
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.worker.worker_base import WorkerBase

    import vllm_atomic_moe

    vllm_atomic_moe.register()
    if os.environ.get(GATHERS):
        let_cpu_ranks_gather()
    directory = Path(os.environ[VARIABLE])
    answer = WorkerBase.atomic_moe_rank
    if answer.__module__ == __name__:
        return

    def faulty_rank(self, verb, arguments):
        if told := read(directory / verb):
            what, _, rank = told.partition("@")
            parallel = self.vllm_config.parallel_config
            own = parallel.data_parallel_rank * parallel.world_size + self.rank
            if not rank or int(rank) == own:
                return _go_wrong(self, what.split(), verb, arguments, answer)
        return answer(self, verb, arguments)

    step = EngineCore.step

    def slow_step(self):
        if pause := read(directory / "step"):
            time.sleep(float(pause))
        return step(self)

    EngineCore.step = slow_step
    WorkerBase.atomic_moe_rank = faulty_rank


def _go_wrong(worker, what, verb, arguments, answer):
    """The reply of a failing call."""
    if what[0] == "exit":
        os._exit(1)
    if what[0] == "sleep":
        time.sleep(float(what[1]))
        return answer(worker, verb, arguments)
    if what[0] == "raise":
        last = worker.get_model().atomic_moe_profiles._layers[-1]
        set_slot = last.set_slot

        def raising(slot, profile):
            if profile is not None:
                raise RuntimeError("injected: raise")
            set_slot(slot, profile)

        last.set_slot = raising
        try:
            return answer(worker, verb, arguments)
        finally:
            del last.set_slot
    return {"ok": False, "error": f"injected: {' '.join(what)}"}


def let_cpu_ranks_gather() -> None:
    """Add two collectives over gloo that vLLM's CPU ranks lack for data parallel MoE."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    def all_gatherv(self: Any, input_: Any, dim: int = 0, sizes: Any = None) -> Any:
        if isinstance(input_, list):
            return [all_gatherv(self, tensor, dim, sizes) for tensor in input_]
        sizes = sizes or [input_.shape[0]] * self.world_size
        padded = input_.new_zeros(max(sizes), *input_.shape[1:])
        padded[: input_.shape[0]] = input_
        parts = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(parts, padded, group=self.device_group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def reduce_scatterv(self: Any, input_: Any, dim: int = 0, sizes: Any = None) -> Any:
        sizes = sizes or [input_.shape[0] // self.world_size] * self.world_size
        summed = input_.clone()
        torch.distributed.all_reduce(summed, group=self.device_group)
        return summed.split(sizes)[self.rank_in_group].clone()

    CpuCommunicator.all_gatherv = all_gatherv
    CpuCommunicator.reduce_scatterv = reduce_scatterv
