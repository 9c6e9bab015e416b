"""The one place that imports vLLM's internals for layers, which are not public API.

Each has its reason. `tests/serving/test_compat.py` probes their signatures and names the one that
moved. Supported: vLLM 0.32 and 0.33. Internals for the plug-in's registration are in `attach.py`:
importing this file imports vLLM's MoE layers, which only processes that load a pruned model need.
"""

# ruff: noqa: F401 (imported for the rest of engine/)

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from vllm.config import ModelConfig
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FUSED_MOE_UNQUANTIZED_CONFIG,
    FusedMoEConfig,
)
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.fused_moe.router.fused_moe_router import FusedMoERouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import (
    FusedTopKBiasRouter,
)
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter
from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopKRouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.quantization.base_config import resolve_quant_method
from vllm.model_executor.models.utils import extract_layer_index

from vllm_atomic_moe.experts.activation import Activation

# Subclasses that differ from `RoutedExperts` only in how their weights arrive.
KNOWN_EXPERTS = ("DbrxExperts", "GptOssRoutedExperts")
# Routers that choose by logits and correction bias alone, so that a mask on both is enough. We read
# their code; masked logits are not safe with other routers.
KNOWN_ROUTERS = (CPURouter, FusedTopKRouter, FusedTopKBiasRouter, GroupedTopKRouter)


def import_model_class(model_config: ModelConfig) -> None:
    """Import the model's class, and with it the model's own experts class.

    Reason: a class can be replaced by name only after its import; vLLM imports it during the build.
    """
    from vllm.model_executor.model_loader.utils import get_model_architecture

    get_model_architecture(model_config)


@contextmanager
def routed_experts_replaced_by(layer_class: type[RoutedExperts]) -> Iterator[None]:
    """While open, every `RoutedExperts` that vLLM builds is a `layer_class`.

    This includes every imported subclass that a model defines; the replacement then derives from
    the model's class too and has it in the attribute `special`.

    Reason: `PluggableLayer.register_oot`, the public way, replaces the layer permanently and for
    the whole process, also for models of other load formats. It uses the same registry.
    """
    from vllm.model_executor.custom_op import op_registry_oot

    replaced = {"RoutedExperts": layer_class}
    for special in RoutedExperts.__subclasses__():
        if special is not layer_class:
            own = {"special": special.__name__}
            replaced[special.__name__] = type(special.__name__, (layer_class, special), own)
    for name in replaced:
        if name in op_registry_oot:
            raise ValueError(
                f"{name} is already replaced by {op_registry_oot[name].__qualname__} of another "
                "plug-in; unload it (VLLM_PLUGINS) to serve with --load-format atomic-pruned"
            )
    op_registry_oot.update(replaced)
    try:
        yield
    finally:
        for name in replaced:
            del op_registry_oot[name]


def activation_of(config: FusedMoEConfig) -> Activation | None:
    """What a layer's experts compute between projections; None if the kernels do not know it.

    Reason: vLLM has an enumeration, and numbers that only some kinds use; those of gpt-oss and Step
    are constants in its kernels.
    """
    kind = config.activation
    limit = math.inf if config.swiglu_limit is None else config.swiglu_limit
    if kind == MoEActivation.SILU:
        return Activation(limit=limit)
    if kind == MoEActivation.SWIGLUOAI:
        return Activation(limit=7.0, alpha=1.702, beta=1.0)
    if kind == MoEActivation.SWIGLUOAI_UNINTERLEAVE and config.swiglu_limit is not None:
        alpha = 1.0 if config.swiglu_alpha is None else config.swiglu_alpha
        return Activation(limit=limit, alpha=alpha, beta=config.swiglu_beta or 0.0)
    if kind == MoEActivation.GELU_TANH:
        return Activation("gelu_tanh")
    if kind == MoEActivation.SWIGLUSTEP:
        return Activation("swiglustep", limit=7.0)
    if kind == MoEActivation.SITU and config.activation_situ_beta is not None:
        beta = config.activation_situ_linear_beta or 0.0
        return Activation("situ", alpha=config.activation_situ_beta, beta=beta)
    return Activation("relu2") if kind == MoEActivation.RELU2_NO_MUL else None


def cpu_ranks_can_gather() -> bool:
    """Whether vLLM's CPU ranks can gather uneven numbers of tokens, which data parallel MoE needs.

    Reason: stock vLLM 0.32 starts such a server and ends it at the first request. Remove this when
    they can.
    """
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    return "all_gatherv" in vars(CpuCommunicator)


class DenseExperts:
    """vLLM's own unquantized experts for CPUs: one layer's weights in vLLM's order.

    Reason: the baseline of the benchmark. The layer around it needs a whole model's configuration;
    these are the ops that the layer calls. They are imported here only, so that serving does not
    depend on them.

    Attributes:
        isa: which of vLLM's micro-kernels: `amx` for bfloat16 with AMX, else `vec`.

    Args:
        w13: [E, 2·I, H], gate above up.
        w2: [E, H, I].
    """

    def __init__(self, w13: torch.Tensor, w2: torch.Tensor) -> None:
        from vllm._custom_ops import cpu_fused_moe, cpu_prepack_moe_weight

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
        """The layer's output, [T, H]; ids are int32, global over all E experts."""
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
