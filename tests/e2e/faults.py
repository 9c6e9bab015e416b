"""Faults for the switch, injected into real servers: a vLLM plug-in of these tests.

`installed(directory)` makes an entry point of it. In a server whose environment names the plug-in,
the file `directory/VERB` makes that call of `atomic_moe_control` go wrong, as its text says:
`fail`, `half` (the first layer changes, then it fails), `digest` (another than that of the other
ranks), `exit` (the process ends), `sleep SECONDS`;
with `@RANK` behind it, on that rank only. The file `directory/reset_prefix_cache` makes vLLM's
prefix cache say that it was not reset; `directory/step` slows every step of the engine by so many
seconds.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

VARIABLE = "ATOMIC_MOE_TEST_FAULTS"


def installed(directory: Path) -> dict[str, str]:
    """Put the entry point into `directory`; gives the environment that a server needs."""
    metadata = directory / "atomic_moe_faults-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: atomic-moe-faults\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(
        f"[vllm.general_plugins]\nfaults = {__name__}:register\n"
    )
    root = Path(__file__).parents[2]
    return {VARIABLE: str(directory), "PYTHONPATH": f"{directory}:{root}"}


def register() -> None:
    """In every vLLM process, behind the project's own `register()`."""
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.worker.worker_base import WorkerBase

    import vllm_atomic_moe

    vllm_atomic_moe.register()
    directory = Path(os.environ[VARIABLE])
    control = WorkerBase.atomic_moe_control
    reset_prefix_cache = EngineCore.reset_prefix_cache
    if control.__module__ == __name__:
        return

    def faulty_control(self, verb, arguments):
        fault = directory / verb
        if fault.exists():
            what, _, rank = fault.read_text().partition("@")
            if not rank or int(rank) == self.rank:
                return _go_wrong(self, what.split(), arguments) or control(self, verb, arguments)
        return control(self, verb, arguments)

    def faulty_reset_prefix_cache(self, *arguments, **options):
        if (directory / "reset_prefix_cache").exists():
            return False
        return reset_prefix_cache(self, *arguments, **options)

    step = EngineCore.step

    def slow_step(self):
        if (directory / "step").exists():
            time.sleep(float((directory / "step").read_text()))
        return step(self)

    EngineCore.step = slow_step
    WorkerBase.atomic_moe_control = faulty_control
    EngineCore.reset_prefix_cache = faulty_reset_prefix_cache


def _go_wrong(worker, what, arguments):
    """The reply of a call that goes wrong; None if it is only late."""
    if what[0] == "exit":
        os._exit(1)
    if what[0] == "sleep":
        time.sleep(float(what[1]))
        return None
    if what[0] == "digest":
        return {"ok": True, "digest": "another"}
    if what[0] == "half":
        profiles = worker.get_model().atomic_moe_profiles
        profiles._layers[0].activate(profiles.lease.profile)
    return {"ok": False, "error": f"injected: {' '.join(what)}"}
