"""The table of what this version does not serve. `refusals.py` detects it, README lists it.

Never silently wrong: every feature that was not tested with packed experts is here. An entry has
the feature's name, as in README; the flag that asks for it, or the reason ({} is what was found);
and the remedy.
"""

from __future__ import annotations

from collections.abc import Mapping

Features = Mapping[str, tuple[str, str]]

_OUT = "leave it out"
_PYTHON = "use vLLM's Python API server"
_DENSE = "serve the model dense"

# Refused before anything is built, except runners of experts, which a model builds.
CONFIGURATION: Features = {
    "the transformers backend": (
        "{}; vLLM has no model of its own for it, or --model-impl asks",
        _DENSE,
    ),
    "prefill-context parallelism": ("--prefill-context-parallel-size {}", "use 1"),
    "decode-context parallelism": ("--decode-context-parallel-size {}", "use 1"),
    "API servers that reach some data parallel engines only": (
        "--data-parallel-rank, --data-parallel-external-lb, --data-parallel-hybrid-lb; engines "
        "exchange tokens, and all must have the same profiles",
        "let vLLM balance the load",
    ),
    "data parallelism on CPU": (
        "vLLM's own: its CPU ranks cannot gather tokens, and the first request of any MoE model "
        "ends the server",
        "start several servers",
    ),
    "data parallelism with a model's own runner of experts": (
        "{}",
        "use --data-parallel-size 1",
    ),
    "the expert load balancer": ("--enable-eplb", _OUT),
    "elastic expert parallelism": ("--enable-elastic-ep", _OUT),
    "round-robin expert placement": ("--expert-placement-strategy {}", "use linear"),
    "all-to-all kernels between experts": ("--all2all-backend {}", _OUT),
    "dual-batch overlap": ("--enable-dbo, --ubatch-size", _OUT),
    "pipelines in eager mode on CPU": (
        "vLLM's own second stage fails there",
        "drop --enforce-eager",
    ),
    "the Rust front end": ("VLLM_USE_RUST_FRONTEND; it does not know profiles", _PYTHON),
    "the gRPC front end": ("--grpc; it does not know profiles", _PYTHON),
    "KV connectors and offloading": (
        "--kv-transfer-config, --kv-offloading-size; some identify entries by tokens alone and "
        "would mix profiles",
        _OUT,
    ),
    "LoRA": (
        "--enable-lora; profiles use its place in requests",
        "merge the adapter into the checkpoint",
    ),
    "sleep mode": ("--enable-sleep-mode; level 2 drops weights that cannot be reloaded", _OUT),
    "weight updates from a trainer": (
        "--weight-transfer-config",
        "restart with the new checkpoint and a profile made for it",
    ),
    "weights offloaded to host memory": ("--cpu-offload-gb, --offload-group-size", _OUT),
    "max_autotune on CPU": ("inductor_compile_config; it freezes parameters", _OUT),
    "CUDA graphs of the kernel reference": (
        "it reads widths on the host; {}",
        "add --enforce-eager",
    ),
}
# Refused at the first layer that has it, before its weights are allocated.
LAYER: Features = {
    "experts of a model's own class": ("{}", _DENSE),
    "quantized experts of other kinds": ("{}", _DENSE),
    "activations that the kernels do not know": ("{}", _DENSE),
    "router weights on the input of several experts a token": ("", _DENSE),
    "sequence-parallel experts": ("", _DENSE),
    "shared experts fused into the routed ones": ("", _DENSE),
}
_ZERO = "drop `routable` to keep experts routable and zero"
# Refused with a routing mask, before weights are read.
ROUTING: Features = {
    "routers that were not read": ("{}", _ZERO),
    "custom routing": ("", _ZERO),
    "hash routing": ("", _ZERO),
    "a routing bias for image tokens": ("", _ZERO),
    "scoring other than softmax or sigmoid": ("{}", _ZERO),
    "routers that another plug-in has taken": ("", _ZERO),
    "correction biases that are not the layer's own": ("", _ZERO),
    "platforms other than CPU and CUDA": ("{}", _ZERO),
    "correction biases in float16 on CUDA": (
        "-1e9 is out of its range",
        f"use --dtype bfloat16, or {_ZERO}",
    ),
}


def refuse(features: Features, found: Mapping[str, object], where: str = "") -> None:
    """Refuse the first of `features` that was found.

    Args:
        features: of this table.
        found: name -> a true value if it was found, which may give a detail.
        where: the layer.

    Raises:
        ValueError: one line with the feature's name and the remedy.
    """
    for name, (detail, remedy) in features.items():
        if answer := found.get(name):
            told = "; ".join(filter(None, (detail.format(answer), where)))
            raise ValueError(f"not served by this version: {name} ({told}); {remedy}")
