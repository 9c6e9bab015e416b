"""What this version does not serve, refused by name before any weight is read.

Never silently wrong: a feature that was not tested with packed experts is on this list.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from vllm import envs
from vllm.config import (
    CompilationMode,
    CUDAGraphMode,
    ModelConfig,
    ParallelConfig,
    VllmConfig,
)
from vllm.platforms import current_platform

from vllm_atomic_moe.engine.compat import (
    KNOWN_ROUTERS,
    FusedMoERouter,
    MoERunner,
    RoutedExperts,
    UnquantizedFusedMoEMethod,
    activation_of,
    cpu_ranks_can_gather,
)
from vllm_atomic_moe.experts.backends import Backend
from vllm_atomic_moe.files.router import ExpertGroups, expert_groups

if TYPE_CHECKING:
    from vllm_atomic_moe.engine.layer import AtomicRoutedExperts


def check_config(vllm_config: VllmConfig, model_config: ModelConfig) -> None:
    """Refuse what the configuration alone shows.

    Raises:
        ValueError: one line naming the feature, the flag that asked for it and the remedy.
    """
    offload = vllm_config.offload_config
    compilation = vllm_config.compilation_config
    refused: tuple[tuple[bool, str, str], ...] = (
        *_parallel_features(vllm_config.parallel_config),
        (
            current_platform.is_cpu()
            and vllm_config.parallel_config.pipeline_parallel_size > 1
            and compilation.mode == CompilationMode.NONE,
            "pipeline parallelism in eager mode on CPU (vLLM's own second stage fails there)",
            "drop --enforce-eager",
        ),
        (
            envs.VLLM_USE_RUST_FRONTEND,
            "the Rust front end (VLLM_USE_RUST_FRONTEND), which knows no profiles",
            "use vLLM's Python API server",
        ),
        (
            vllm_config.kv_transfer_config is not None,
            "KV connectors and offloading (--kv-transfer-config, --kv-offloading-size; some know "
            "what they hold by its tokens alone and would mix profiles)",
            "",
        ),
        (
            vllm_config.lora_config is not None,
            "LoRA (--enable-lora; profiles travel with requests in its place)",
            "merge the adapter into the checkpoint",
        ),
        (
            model_config.enable_sleep_mode,
            "sleep mode (--enable-sleep-mode; level 2 drops weights that cannot be reloaded)",
            "",
        ),
        (
            vllm_config.weight_transfer_config is not None,
            "weight updates from a trainer (--weight-transfer-config)",
            "restart with the new checkpoint and a profile made for it",
        ),
        (
            offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0,
            "weights offloaded to host memory (--cpu-offload-gb, --offload-group-size)",
            "",
        ),
        (
            current_platform.is_cpu()
            and bool(compilation.inductor_compile_config.get("max_autotune")),
            "max_autotune on CPU (inductor_compile_config; it freezes parameters)",
            "",
        ),
    )
    for applies, feature, remedy in refused:
        if applies:
            raise ValueError(f"not served by this version: {feature}; {remedy or 'leave it out'}")


def _parallel_features(parallel: ParallelConfig) -> Iterator[tuple[bool, str, str]]:
    """Ways to spread a model that were not tested: whether asked for, name and remedy.

    Experts that exchange tokens (all-to-all kernels, sequence parallel MoE) are among them: packed
    experts and their global ids know nothing of it.
    """
    for name in ("prefill_context", "decode_context"):
        size = getattr(parallel, f"{name}_parallel_size")
        feature = name.replace("_", " ") + " parallelism"
        flag = f"--{name.replace('_', '-')}-parallel-size {size}"
        yield size > 1, f"{feature} ({flag})", "use 1"
    yield (
        parallel.data_parallel_external_lb or parallel.data_parallel_hybrid_lb,
        "API servers that do not reach all data parallel engines (--data-parallel-rank, "
        "--data-parallel-external-lb, --data-parallel-hybrid-lb; the engines exchange tokens, and "
        "all must have loaded the same profiles)",
        "let vLLM balance the load",
    )
    yield (
        parallel.data_parallel_size > 1
        and current_platform.is_cpu()
        and not cpu_ranks_can_gather(),
        "data parallelism on CPU (vLLM's own: its CPU ranks cannot gather tokens, and the first "
        "request of any MoE model ends the server)",
        "start several servers",
    )
    placement, backend = parallel.expert_placement_strategy, parallel.all2all_backend
    yield parallel.enable_eplb, "the expert load balancer (--enable-eplb)", ""
    yield parallel.enable_elastic_ep, "elastic expert parallelism (--enable-elastic-ep)", ""
    yield (
        placement != "linear",
        f"{placement} placement of experts (--expert-placement-strategy)",
        "use linear",
    )
    yield (
        backend != "allgather_reducescatter",
        f"all-to-all kernels between experts (--all2all-backend {backend})",
        "",
    )
    yield parallel.use_ubatching, "dual-batch overlap (--enable-dbo, --ubatch-size)", ""


def unverified(parallel: ParallelConfig) -> Iterator[str]:
    """What is served, since nothing of ours depends on it, and was never tried."""
    if (executor := parallel.distributed_executor_backend) not in ("uni", "mp"):
        yield f"the executor {executor} (--distributed-executor-backend)"


def check_graphs(vllm_config: VllmConfig, backend: Backend) -> None:
    """Refuse to capture a kernel that reads widths on the host.

    Raises:
        ValueError: CUDA graphs are on, and `backend` is the reference.
    """
    mode = vllm_config.compilation_config.cudagraph_mode
    if (
        backend.name == "reference"
        and not current_platform.is_cpu()
        and mode not in (None, CUDAGraphMode.NONE)
    ):
        raise ValueError(
            f"not served by this version: CUDA graph capture (kernel {backend.name!r} reads widths "
            f"on the host; {backend.reason}); add --enforce-eager"
        )


def check_layer(layer: RoutedExperts, quant_method: Any) -> None:
    """Refuse experts that packed rows do not describe.

    Args:
        layer: the layer under construction, its configuration set.
        quant_method: what the model's quantization answers for this layer, or None.

    Raises:
        ValueError: one line naming the property.
    """
    config = layer.moe_config
    refused: tuple[tuple[bool, str], ...] = (
        (
            not isinstance(quant_method, UnquantizedFusedMoEMethod | None),
            f"quantized experts ({type(quant_method).__name__})",
        ),
        (
            activation_of(config) is None,
            f"the activation {config.activation.value} with limit {config.swiglu_limit}",
        ),
        (
            layer.apply_router_weight_on_input and config.experts_per_token > 1,
            "router weights applied to the input of several experts a token",
        ),
        (config.moe_parallel_config.is_sequence_parallel, "experts with sequence parallelism"),
        (
            layer.expert_map_manager.num_fused_shared_experts > 0,
            "shared experts fused into the routed ones",
        ),
    )
    for applies, feature in refused:
        if applies:
            raise ValueError(
                f"not served by this version: {feature} ({layer.layer_name}); serve the model dense"
            )


def check_router(
    layer: AtomicRoutedExperts, runner: MoERunner | None, masks: Mapping[str, torch.Tensor]
) -> None:
    """Refuse routers that might choose an expert which a routing mask excludes.

    Args:
        layer: the packed experts, built, their weights not read.
        runner: what calls the router for them; None if it is not a `MoERunner`.
        masks: name -> bool [E] of the resident profiles that mask routing.

    Raises:
        ValueError: one line naming the profile, the router's property and the remedy.
    """
    for feature in _unsafe_routing(layer, runner):
        raise ValueError(
            f"not served by this version: the routing mask of profile {next(iter(masks))!r} with "
            f"{feature} ({layer.layer_name}); drop `routable` to keep experts routable and zero"
        )
    assert runner is not None
    # Again, as the router has it: --hf-overrides may change what config.json says.
    groups, top_k = _groups(layer, runner.router), runner.router.top_k
    for name, routable in masks.items():
        fault = groups and groups.fault(routable, top_k)
        if int(routable.sum()) < top_k:
            fault = f"leaves {int(routable.sum())} experts, a token uses {top_k}; keep as many"
        if fault:
            raise ValueError(f"profile {name!r}: layers.{layer.index}.routable {fault}")


def _unsafe_routing(layer: AtomicRoutedExperts, runner: MoERunner | None) -> Iterator[str]:
    """What forbids a routing mask, in words."""
    if runner is None or type(runner) is not MoERunner:
        yield f"the runner {type(runner).__name__}"
        return
    router = runner.router
    if type(router) not in KNOWN_ROUTERS:
        yield f"the router {type(router).__name__}"
        return
    if getattr(router, "custom_routing_function", None) is not None:
        yield "a custom routing function"
    if getattr(router, "_hash_indices_table", None) is not None:
        yield "hash routing"
    if router.bias_vl is not None:
        yield "a routing bias for image tokens"
    if router.scoring_func not in ("softmax", "sigmoid"):
        yield f"the scoring function {router.scoring_func}"
    if {"select_experts", "_compute_routing"} & vars(router).keys():
        yield "a router that another layer or plug-in has taken"
    bias = getattr(router, "e_score_correction_bias", None)
    if bias is not layer.e_score_correction_bias:
        yield "a correction bias that is not the layer's own"
    if bias is not None and tuple(bias.shape) != (layer.global_num_experts,):
        yield f"a correction bias of shape {list(bias.shape)}"
    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        yield f"the routers of {current_platform.device_name}"
    if bias is not None and not current_platform.is_cpu() and _in_float16(layer):
        yield "a correction bias in float16 (-1e9 is out of its range; use --dtype bfloat16)"


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
