"""Watch the experts of a transformers model, through its experts interface.

An experts class with transformers' decorator `use_experts_implementation` calls a registered
function instead of its own forward; we make Llama-4 do so too. Our function computes the same and
shows an observer the inputs, activations h = act(gate·x, up·x), outputs and router weights of every
expert, as part of the autograd graph.

Legend: T tokens, K experts per token, N = T·K routed rows, E experts, H hidden size, I full
intermediate size.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import transformers
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts, Llama4TextMoe

from vllm_atomic_moe.files.checkpoint import CheckpointInfo

IMPLEMENTATION = "atomic_moe_calibration"
LAYER = re.compile(r"\blayers\.(\d+)\.")
# Attributes that `use_experts_implementation` sets on every experts module.
INTERFACE_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")

# An nn.Module whose class carries `use_experts_implementation`. Its attributes (gate_up_proj,
# act_fn, the flags above) are not in the type of nn.Module.
ExpertsModule = Any


@dataclass(frozen=True, slots=True, eq=False)
class ExpertRows:
    """The tokens routed to one expert, and its results; part of the autograd graph, read-only.

    Attributes:
        x: [rows, H], the expert's input.
        h: [rows, I], the input of `down_proj`: act(gate·x, up·x), biases included.
        y: [rows, H], the expert's output with its bias, before the router weight.
        p: [rows], router weights.
        down_HI: [H, I], the expert's down-projection.
        tokens: int64 [rows], the indices of these tokens.
    """

    x: torch.Tensor
    h: torch.Tensor
    y: torch.Tensor
    p: torch.Tensor
    down_HI: torch.Tensor
    tokens: torch.Tensor


class Routed(NamedTuple):
    """The inputs of a layer's experts.

    Attributes:
        hidden_TH: hidden states.
        topk_ids_TK: the experts of every token.
        topk_weights_TK: router weights.
    """

    hidden_TH: torch.Tensor
    topk_ids_TK: torch.Tensor
    topk_weights_TK: torch.Tensor


class LayerObserver(Protocol):
    """Watches the experts of one layer."""

    def see_routing(self, module: ExpertsModule, routed: Routed) -> torch.Tensor:
        """Called once per forward; returns the ids to use, where E and above mean "no expert"."""

    def see_expert(self, expert: int, rows: ExpertRows) -> torch.Tensor:
        """Called for every expert that has tokens; returns the output to use, as `rows.y`."""


def observed_experts_forward(
    module: ExpertsModule,
    hidden_TH: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
) -> torch.Tensor:
    """The experts' output [T, H], as `grouped_mm_experts_forward` of transformers computes it.

    `module.layer_observer` sees every expert's rows. The router weight is applied after
    `down_proj`, so that the gradient of h includes it; where the model applies it to the input, x
    includes it and p is 1. Ids of E and above mean "no expert" and contribute zero.
    """
    num_tokens, top_k = topk_ids_TK.shape
    routed = Routed(hidden_TH, topk_ids_TK, topk_weights_TK)
    topk_ids_TK = module.layer_observer.see_routing(module, routed)
    ids_N = topk_ids_TK.reshape(-1)
    counts = torch.bincount(ids_N, minlength=module.num_experts)[: module.num_experts].tolist()
    order_N = ids_N.argsort(stable=True)[: sum(counts)]

    outputs = []
    # Gather once for all experts, so that the backward pass scatters once, not once per expert.
    tokens_N = order_N // top_k
    x_NH = hidden_TH[tokens_N]
    p_N = topk_weights_TK.reshape(-1)[order_N]
    if isinstance(module, Llama4TextExperts):
        x_NH, p_N = x_NH * p_N[:, None], torch.ones_like(p_N)
    of_experts = zip(*(it.split(counts) for it in (x_NH, p_N, tokens_N)), strict=True)
    for expert, (x, p, tokens) in enumerate(of_experts):
        if x.shape[0] == 0:
            continue
        h = _activate(module, _project(module, _first(module), expert, x))
        down = module.down_proj[expert]
        y = _project(module, "down_proj", expert, h)
        rows = ExpertRows(x, h, y, p, down.t() if module.is_transposed else down, tokens)
        outputs.append(module.layer_observer.see_expert(expert, rows))
    if not outputs:
        return torch.zeros_like(hidden_TH)

    weighted = torch.cat(outputs) * p_N[:, None]
    y_NH = weighted.new_zeros(ids_N.numel(), weighted.shape[1]).index_copy(0, order_N, weighted)
    return y_NH.view(num_tokens, top_k, -1).sum(dim=1).to(hidden_TH.dtype)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, observed_experts_forward)


def _llama4_experts_forward(module: ExpertsModule, every_input: torch.Tensor) -> torch.Tensor:
    """Llama-4's experts get every token, times its router weight, once per expert: [E·T, H]. The
    model sums their outputs over E, so this returns the sum for one expert and zeros for the rest.
    """
    if not hasattr(module, "layer_observer"):
        return _unobserved_llama4_forward(module, every_input)
    output_TH = observed_experts_forward(module, *module.routing.pop())
    return functional.pad(output_TH, (0, 0, 0, every_input.shape[0] - output_TH.shape[0]))


# Llama-4 does not use the experts interface. Patch its class, not its modules, so that the wrappers
# that accelerate puts around a module stay.
_unobserved_llama4_forward = Llama4TextExperts.forward
Llama4TextExperts.forward = _llama4_experts_forward
Llama4TextExperts._apply_gate = _default_apply_gate
LLAMA4_FLAGS = dict(zip(INTERFACE_FLAGS, (True, False, True, True), strict=True))


def _note_llama4_routing(
    experts: ExpertsModule, router: Any, given: tuple[torch.Tensor], answer: Any
) -> None:
    """Hook of a router: note its input and its choice for the experts, which are called next."""
    scores_TE, logits_TE = answer
    topk_ids_TK = logits_TE.topk(router.top_k, dim=1).indices
    experts.routing = [(given[0], topk_ids_TK, scores_TE.gather(1, topk_ids_TK))]


@contextmanager
def observe(
    model: transformers.PreTrainedModel,
    experts: Mapping[int, ExpertsModule],
    observers: Mapping[int, LayerObserver],
) -> Iterator[None]:
    """Within the context, each layer's observer sees what that layer's experts do."""
    before = model.get_experts_implementation()
    for layer, module in experts.items():
        module.layer_observer = observers[layer]
    hooks = [
        block.router.register_forward_hook(functools.partial(_note_llama4_routing, block.experts))
        for block in model.modules()
        if isinstance(block, Llama4TextMoe)
    ]
    model.set_experts_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_experts_implementation(before)
        for hook in hooks:
            hook.remove()
        for module in experts.values():
            del module.layer_observer
            module.__dict__.pop("routing", None)


@torch.no_grad()
def weight_norms(module: ExpertsModule) -> dict[str, torch.Tensor]:
    """L2 norms of every atom's three vectors: `gate_norm`, `up_norm`, `down_norm`, float64 [E, I].

    Biases do not count. Experts without a gate get a gate norm of 1, so that products of the three
    norms stay valid.

    Call it while the module's weights are on their device (inside its forward if they are
    offloaded). It takes one expert at a time, so that no second copy of the weights exists.
    """
    rows: dict[str, list[torch.Tensor]] = {"gate_norm": [], "up_norm": [], "down_norm": []}
    # gate_up_proj is [2I, H] per expert and down_proj [H, I]; transposed modules swap both.
    along = (0, 1) if module.is_transposed else (1, 0)
    for first, down in zip(getattr(module, _first(module)), module.down_proj, strict=True):
        both = torch.linalg.vector_norm(first, dim=along[0], dtype=torch.float64)
        if not module.has_gate:
            both = torch.cat([torch.ones_like(both), both])
        concatenated = module.is_concatenated or not module.has_gate
        pair = both.chunk(2) if concatenated else (both[::2], both[1::2])
        rows["gate_norm"].append(pair[0])
        rows["up_norm"].append(pair[1])
        rows["down_norm"].append(torch.linalg.vector_norm(down, dim=along[1], dtype=torch.float64))
    return {name: torch.stack(norms) for name, norms in rows.items()}


def find_experts(
    model: transformers.PreTrainedModel, checkpoint: CheckpointInfo
) -> dict[int, ExpertsModule]:
    """The routed experts of every MoE layer, by decoder layer index, checked.

    Raises:
        ValueError: the architecture does not use transformers' experts interface, or its layers or
            shapes differ from the checkpoint's.
    """
    experts: dict[int, ExpertsModule] = {}
    for name, module in model.named_modules():
        if isinstance(module, Llama4TextExperts):
            vars(module).update(LLAMA4_FLAGS)
        if not all(flag in vars(module) for flag in INTERFACE_FLAGS):
            continue
        found = LAYER.findall(name)
        if not found or int(found[-1]) in experts:
            raise ValueError(
                f"{checkpoint.architecture}: experts {name!r} are not the only ones of a decoder "
                "layer; this architecture cannot be calibrated"
            )
        _check_experts(name, module, checkpoint)
        experts[int(found[-1])] = module
    if not experts:
        raise ValueError(
            f"{checkpoint.architecture}: transformers {transformers.__version__} does not build "
            "its experts through the experts interface; calibrate with a version that does"
        )
    if tuple(sorted(experts)) != checkpoint.layers:
        raise ValueError(
            f"{checkpoint.architecture}: transformers builds routed experts in layers "
            f"{sorted(experts)}, the checkpoint holds them in {list(checkpoint.layers)}; "
            "is config.json of this checkpoint?"
        )
    return dict(sorted(experts.items()))


def _first(module: ExpertsModule) -> str:
    """The projection ahead of the activation."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def _activate(module: ExpertsModule, rows: torch.Tensor) -> torch.Tensor:
    return module._apply_gate(rows) if module.has_gate else module.act_fn(rows)


def _project(
    module: ExpertsModule, projection: str, expert: int, rows: torch.Tensor
) -> torch.Tensor:
    """Rows times one expert's matrix, plus its bias."""
    weight = getattr(module, projection)[expert]
    bias = getattr(module, f"{projection}_bias")[expert] if module.has_bias else None
    product = rows @ weight if module.is_transposed else functional.linear(rows, weight)
    return product if bias is None else product + bias


def _check_experts(name: str, module: ExpertsModule, checkpoint: CheckpointInfo) -> None:
    experts, first, second = module.down_proj.shape
    size = first if module.is_transposed else second
    if (experts, size) != (checkpoint.num_experts, checkpoint.intermediate_size):
        raise ValueError(
            f"{checkpoint.architecture}: experts {name!r} are {experts} of intermediate size "
            f"{size}, the checkpoint has {checkpoint.num_experts} of "
            f"{checkpoint.intermediate_size}; is config.json of this checkpoint?"
        )
