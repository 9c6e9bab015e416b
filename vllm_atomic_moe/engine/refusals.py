"""Detect the unsupported features of `unserved.py`, and refuse them before any weight is read.

Features that the configuration shows are refused before anything is built; those of experts at the
first layer that has them, before its weights are allocated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from vllm import envs
from vllm.config import (
    CompilationMode,
    CUDAGraphMode,
    ParallelConfig,
    VllmConfig,
)
from vllm.platforms import current_platform

from vllm_atomic_moe.engine.compat import (
    KNOWN_EXPERTS,
    KNOWN_ROUTERS,
    FusedMoERouter,
    MoERunner,
    RoutedExperts,
    UnquantizedFusedMoEMethod,
    activation_of,
    cpu_ranks_can_gather,
)
from vllm_atomic_moe.engine.unserved import CONFIGURATION, LAYER, ROUTING, refuse
from vllm_atomic_moe.experts.backends import Backend
from vllm_atomic_moe.files.router import ExpertGroups, expert_groups

if TYPE_CHECKING:
    from vllm_atomic_moe.engine.layer import AtomicRoutedExperts


def check_config(vllm_config: VllmConfig) -> None:
    """Refuse features that the configuration alone shows.

    Raises:
        ValueError: one line naming the feature, the flag that asked for it and the remedy.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    offload, compilation = vllm_config.offload_config, vllm_config.compilation_config
    on_cpu, placement = current_platform.is_cpu(), parallel.expert_placement_strategy
    contexts = parallel.prefill_context_parallel_size, parallel.decode_context_parallel_size
    found = {
        "the transformers backend": model.using_transformers_backend() and model.architectures[0],
        "prefill-context parallelism": contexts[0] > 1 and contexts[0],
        "decode-context parallelism": contexts[1] > 1 and contexts[1],
        "API servers that reach some data parallel engines only": (
            parallel.data_parallel_external_lb or parallel.data_parallel_hybrid_lb
        ),
        "data parallelism on CPU": (
            parallel.data_parallel_size > 1 and on_cpu and not cpu_ranks_can_gather()
        ),
        "the expert load balancer": parallel.enable_eplb,
        "elastic expert parallelism": parallel.enable_elastic_ep,
        "round-robin expert placement": placement != "linear" and placement,
        "all-to-all kernels between experts": (
            parallel.all2all_backend != "allgather_reducescatter" and parallel.all2all_backend
        ),
        "dual-batch overlap": parallel.use_ubatching,
        "pipelines in eager mode on CPU": (
            on_cpu
            and parallel.pipeline_parallel_size > 1
            and compilation.mode == CompilationMode.NONE
        ),
        "the Rust front end": envs.VLLM_USE_RUST_FRONTEND,
        "KV connectors and offloading": vllm_config.kv_transfer_config is not None,
        "LoRA": vllm_config.lora_config is not None,
        "sleep mode": model.enable_sleep_mode,
        "weight updates from a trainer": vllm_config.weight_transfer_config is not None,
        "weights offloaded to host memory": (
            offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0
        ),
        "max_autotune on CPU": (on_cpu and compilation.inductor_compile_config.get("max_autotune")),
    }
    refuse(CONFIGURATION, found)


def unverified(parallel: ParallelConfig) -> Iterator[str]:
    """Allowed but untested."""
    if (executor := parallel.distributed_executor_backend) not in ("uni", "mp"):
        yield f"the executor {executor} (--distributed-executor-backend)"


def check_graphs(vllm_config: VllmConfig, backend: Backend) -> None:
    """Refuse CUDA graphs of a kernel that reads widths on the host.

    Raises:
        ValueError: CUDA graphs are on, and `backend` is the reference.
    """
    mode = vllm_config.compilation_config.cudagraph_mode
    captured = not current_platform.is_cpu() and mode not in (None, CUDAGraphMode.NONE)
    host = backend.name == "reference" and backend.reason
    refuse(CONFIGURATION, {"CUDA graphs of the kernel reference": captured and host})


def check_layer(layer: RoutedExperts, quant_method: Any) -> None:
    """Refuse experts that packed rows cannot represent.

    Args:
        layer: the layer under construction, its configuration set.
        quant_method: the method of the model's quantization for this layer, or None.

    Raises:
        ValueError: one line naming the property.
    """
    config = layer.moe_config
    kind, limit = config.activation.value, config.swiglu_limit
    own_class = layer.special if layer.special not in KNOWN_EXPERTS else ""
    found = {
        "experts of a model's own class": own_class,
        "quantized experts of other kinds": (
            not isinstance(quant_method, UnquantizedFusedMoEMethod | None)
            and type(quant_method).__name__
        ),
        "activations that the kernels do not know": (
            activation_of(config) is None
            and (kind if limit is None else f"{kind} with limit {limit}")
        ),
        "router weights on the input of several experts a token": (
            layer.apply_router_weight_on_input and config.experts_per_token > 1
        ),
        "sequence-parallel experts": config.moe_parallel_config.is_sequence_parallel,
        "shared experts fused into the routed ones": (
            layer.expert_map_manager.num_fused_shared_experts > 0
        ),
    }
    refuse(LAYER, found, layer.layer_name)


def check_router(
    layer: AtomicRoutedExperts, runner: MoERunner | None, masks: Mapping[str, torch.Tensor]
) -> None:
    """Refuse routers that might choose an expert that a routing mask excludes.

    Args:
        layer: the packed experts, built, without weights.
        runner: the caller of their router; None if it is not a `MoERunner`.
        masks: name -> bool [E] of the resident profiles that mask routing.

    Raises:
        ValueError: one line naming the profile, the router's property and the remedy.
    """
    refuse(
        ROUTING,
        _unsafe_routing(layer, runner),
        f"with the routing mask of profile {next(iter(masks))!r}, {layer.layer_name}",
    )
    assert runner is not None
    # Checked again with the router's own value: --hf-overrides may change what config.json says.
    groups, top_k = _groups(layer, runner.router), runner.router.top_k
    for name, routable in masks.items():
        fault = groups and groups.fault(routable, top_k)
        if int(routable.sum()) < top_k:
            fault = f"leaves {int(routable.sum())} experts, a token uses {top_k}; keep as many"
        if fault:
            raise ValueError(f"profile {name!r}: layers.{layer.index}.routable {fault}")


def _unsafe_routing(layer: AtomicRoutedExperts, runner: MoERunner | None) -> dict[str, object]:
    """The features that forbid a routing mask."""
    if runner is None or type(runner) is not MoERunner:
        return {"routers that were not read": type(runner).__name__}
    router = runner.router
    if type(router) not in KNOWN_ROUTERS:
        return {"routers that were not read": type(router).__name__}
    scoring, bias = router.scoring_func, getattr(router, "e_score_correction_bias", None)
    known_platform = current_platform.is_cpu() or current_platform.is_cuda()
    return {
        "custom routing": getattr(router, "custom_routing_function", None) is not None,
        "hash routing": getattr(router, "_hash_indices_table", None) is not None,
        "a routing bias for image tokens": router.bias_vl is not None,
        "scoring other than softmax or sigmoid": scoring not in ("softmax", "sigmoid") and scoring,
        "routers that another plug-in has taken": (
            {"select_experts", "_compute_routing"} & vars(router).keys()
        ),
        "correction biases that are not the layer's own": (
            bias is not layer.e_score_correction_bias
            or (bias is not None and tuple(bias.shape) != (layer.global_num_experts,))
        ),
        "platforms other than CPU and CUDA": not known_platform and current_platform.device_name,
        "correction biases in float16 on CUDA": (
            bias is not None and not current_platform.is_cpu() and _in_float16(layer)
        ),
    }


def _in_float16(layer: AtomicRoutedExperts) -> bool:
    config = layer.moe_config
    return torch.float16 in (config.in_dtype, config.router_logits_dtype)


def _groups(layer: AtomicRoutedExperts, router: FusedMoERouter) -> ExpertGroups | None:
    # GroupedTopKRouter has no such switch.
    if not getattr(router, "use_grouped_topk", True):
        return None
    number, chosen = (getattr(router, key, None) for key in ("num_expert_group", "topk_group"))
    biased = getattr(router, "e_score_correction_bias", None) is not None
    return expert_groups(number, chosen, biased, layer.global_num_experts)
