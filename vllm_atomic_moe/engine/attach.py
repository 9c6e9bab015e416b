"""What the plug-in attaches to vLLM when it registers, and what the API server asks of vLLM.

Every vLLM process imports this file, so vLLM's internals are imported inside the functions.
`tests/serving/test_compat.py` probes them.
"""

from __future__ import annotations

from typing import Any


def attach_engine_methods() -> None:
    """Give vLLM's workers and engine cores the methods that a switch of profiles calls by name.

    Reason: `worker_extension_cls`, the public way for workers, is an option of the user's, and
    there is none for the engine core, which alone knows the requests that were preempted.
    """
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.worker.worker_base import WorkerBase

    from vllm_atomic_moe.engine import switch, worker

    setattr(WorkerBase, worker.CONTROL, worker.control)
    setattr(EngineCore, switch.COUNT_INTERRUPTED, _count_interrupted)


async def call_engine_core(client: Any, method: str) -> Any:
    """What one of the engine core's methods gives.

    Reason: the engine client has methods for vLLM's own utilities only, and `collective_rpc`
    reaches the workers, which know no queue.
    """
    return await client.engine_core.call_utility_async(method)


def _count_interrupted(engine_core: Any) -> int:
    """Requests of a paused engine that have begun: preempted ones, which wait to be resumed."""
    return sum(
        bool(request.num_preemptions or request.num_output_tokens or request.num_computed_tokens)
        for request in engine_core.scheduler.requests.values()
    )


async def vllm_health(request: Any) -> Any:
    """vLLM's answer to `GET /health`.

    Reason: ours replaces that route, and adds the state of the switch to it.
    """
    from vllm.entrypoints.serve.instrumentator.health import health

    return await health(request)
