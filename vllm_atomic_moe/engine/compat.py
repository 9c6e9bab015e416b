"""The one place that imports vLLM internals which are no public API.

Each has its reason; `tests/serving/test_compat.py` probes their signatures and names the one that
moved. Supported: vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vllm.entrypoints.serve.instrumentator.health import health as vllm_health
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FUSED_MOE_UNQUANTIZED_CONFIG,
        FusedMoEConfig,
    )
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.fused_moe.router.fused_moe_router import FusedMoERouter
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
        UnquantizedFusedMoEMethod,
    )
    from vllm.model_executor.layers.quantization.base_config import resolve_quant_method
    from vllm.model_executor.models.utils import extract_layer_index

__all__ = [
    "FUSED_MOE_UNQUANTIZED_CONFIG",
    "DenseExperts",
    "FusedMoEConfig",
    "FusedMoEMethodBase",
    "FusedMoERouter",
    "MoEActivation",
    "MoERunner",
    "RoutedExperts",
    "UnquantizedFusedMoEMethod",
    "attach_engine_methods",
    "call_engine_core",
    "extract_layer_index",
    "known_routers",
    "resolve_quant_method",
    "routed_experts_replaced_by",
    "vllm_health",
]

_MOE = "vllm.model_executor.layers.fused_moe"
# Name -> its module, imported when the name is first asked for: every vLLM process imports this
# file, few of them build a layer.
_SOURCES = {
    "FUSED_MOE_UNQUANTIZED_CONFIG": f"{_MOE}.config",
    "FusedMoEConfig": f"{_MOE}.config",
    "FusedMoEMethodBase": f"{_MOE}.fused_moe_method_base",
    "FusedMoERouter": f"{_MOE}.router.fused_moe_router",
    "MoEActivation": f"{_MOE}.activation",
    "MoERunner": f"{_MOE}.runner.moe_runner",
    "RoutedExperts": f"{_MOE}.routed_experts",
    "UnquantizedFusedMoEMethod": f"{_MOE}.unquantized_fused_moe_method",
    "extract_layer_index": "vllm.model_executor.models.utils",
    "resolve_quant_method": "vllm.model_executor.layers.quantization.base_config",
    "vllm_health": "vllm.entrypoints.serve.instrumentator.health",
}


def __getattr__(name: str) -> Any:
    if name not in _SOURCES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_SOURCES[name]), name.removeprefix("vllm_"))


def known_routers() -> tuple[type[FusedMoERouter], ...]:
    """The routers that choose by logits and correction bias alone, so that a mask on both holds.

    Reason for the names: a router class that was not read cannot be trusted with masked logits.
    """
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
    from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import (
        FusedTopKBiasRouter,
    )
    from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter
    from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopKRouter

    return (CPURouter, FusedTopKRouter, FusedTopKBiasRouter, GroupedTopKRouter)


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


@contextmanager
def routed_experts_replaced_by(layer_class: type[RoutedExperts]) -> Iterator[None]:
    """While open, every `RoutedExperts` that vLLM builds is a `layer_class`.

    Reason: `PluggableLayer.register_oot`, the public way, replaces the layer for the whole process
    and for good, also for models that use another load format. The registry behind it is the same.
    """
    from vllm.model_executor.custom_op import op_registry_oot

    name = "RoutedExperts"
    if name in op_registry_oot:
        raise ValueError(
            f"{name} is already replaced by {op_registry_oot[name].__qualname__} of another "
            "plug-in; unload it (VLLM_PLUGINS) to serve with --load-format atomic-pruned"
        )
    op_registry_oot[name] = layer_class
    try:
        yield
    finally:
        del op_registry_oot[name]


class DenseExperts:
    """vLLM's own unquantised experts for CPUs, one layer's weights in its own order.

    Reason: what the benchmark compares with. The layer around it needs a whole model's
    configuration; the ops below are what that layer calls. Imported here only, so that serving
    does not lean on them.

    Attributes:
        isa: which of vLLM's micro-kernels: `amx` where there is AMX and in bfloat16, else `vec`.

    Args:
        w13: [E, 2·I, H], gate above up.
        w2: [E, H, I].
    """

    def __init__(self, w13: torch.Tensor, w2: torch.Tensor) -> None:
        from vllm._custom_ops import cpu_fused_moe, cpu_prepack_moe_weight
        from vllm.model_executor.layers.fused_moe.activation import MoEActivation

        self._activation = MoEActivation.SILU.value
        self.isa = self.isa_for(w13.dtype)
        if self.isa == "amx":
            torch.cpu._init_amx()
        self.w13, self.w2 = (cpu_prepack_moe_weight(matrix, self.isa) for matrix in (w13, w2))
        self._op = cpu_fused_moe

    @staticmethod
    def isa_for(dtype: torch.dtype) -> str:
        """What vLLM would choose on this machine."""
        from vllm.model_executor.layers.fused_moe.experts.cpu_moe import (
            CPUUnquantizedExperts,
            X86CPUUnquantizedExperts,
        )

        amx = X86CPUUnquantizedExperts._supports_current_device() and dtype == torch.bfloat16
        return (X86CPUUnquantizedExperts if amx else CPUUnquantizedExperts).isa

    def __call__(
        self, x_TH: torch.Tensor, topk_weights_TK: torch.Tensor, topk_ids_TK: torch.Tensor
    ) -> torch.Tensor:
        """The layer's answer, [T, H]; ids are int32, every expert's among E."""
        out_TH = torch.empty_like(x_TH)
        self._op(
            out_TH,
            x_TH,
            self.w13,
            self.w2,
            None,
            None,
            topk_weights_TK,
            topk_ids_TK,
            self._activation,
            self.isa,
        )
        return out_TH
