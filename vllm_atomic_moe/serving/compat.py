"""The one place that imports vLLM internals which are no public API.

Each has its reason; `tests/serving/test_compat.py` probes their signatures and names the one that
moved. Supported: vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FUSED_MOE_UNQUANTIZED_CONFIG,
    FusedMoEConfig,
)
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.fused_moe.router.fused_moe_router import FusedMoERouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import FusedTopKBiasRouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter
from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopKRouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.quantization.base_config import resolve_quant_method
from vllm.model_executor.models.utils import extract_layer_index

__all__ = [
    "FUSED_MOE_UNQUANTIZED_CONFIG",
    "KNOWN_ROUTERS",
    "FusedMoEConfig",
    "FusedMoEMethodBase",
    "FusedMoERouter",
    "MoEActivation",
    "MoERunner",
    "RoutedExperts",
    "UnquantizedFusedMoEMethod",
    "extract_layer_index",
    "resolve_quant_method",
    "routed_experts_replaced_by",
]

# The routers that choose by logits and correction bias alone, so that a mask on both holds. Reason
# for the names: a router class that is not read cannot be trusted with masked logits.
KNOWN_ROUTERS: tuple[type[FusedMoERouter], ...] = (
    CPURouter,
    FusedTopKRouter,
    FusedTopKBiasRouter,
    GroupedTopKRouter,
)


@contextmanager
def routed_experts_replaced_by(layer_class: type[RoutedExperts]) -> Iterator[None]:
    """While open, every `RoutedExperts` that vLLM builds is a `layer_class`.

    Reason: `PluggableLayer.register_oot`, the public way, replaces the layer for the whole process
    and for good, also for models that use another load format. The registry behind it is the same.
    """
    name = RoutedExperts.__name__
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
