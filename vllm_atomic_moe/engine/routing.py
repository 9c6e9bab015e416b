"""The routing mask: experts that a profile excludes are never chosen for its tokens.

Before the model's own router runs, the logits of excluded experts become -inf, token by token, by
each token's slot; the router then treats the others as usual (softmax, renormalization, groups,
scaling). A correction bias is one vector for the whole batch: the router runs once for every
*distinct* mask among the profiles listed at start, each time with that mask's experts at -1e9, and
every token takes the result of its own mask. All buffers have fixed shapes, so that compiled code
and CUDA graphs do not notice when a profile is loaded or unloaded.

The hook is on each router instance, and only if a profile listed at start masks routing. It is
tested with vLLM's CPU router (softmax with and without renormalization; sigmoid with correction
bias and groups), eager and compiled. The CUDA routers are NOT VERIFIED: their code was read, never
run with a mask. Top-k softmax and sigmoid give -inf the score zero and add the bias in float32;
fused grouped top-k skips logits that are not finite and sums the two best of a group, which stays
finite in float32 and bfloat16 but not in float16 (refused). ROCm, XPU and routers outside
`compat.KNOWN_ROUTERS` are refused.

Legend: T tokens, K experts per token, E experts, S slots, V distinct masks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from vllm_atomic_moe.engine.compat import FusedMoERouter, MoERunner
from vllm_atomic_moe.engine.options import ResidentProfiles
from vllm_atomic_moe.engine.refusals import check_router
from vllm_atomic_moe.engine.unserved import CONFIGURATION, refuse
from vllm_atomic_moe.experts.packing import SLOTS

if TYPE_CHECKING:
    from vllm_atomic_moe.engine.layer import AtomicRoutedExperts

MASKED_BIAS = -1e9  # finite: group scores are sums, and kernels take non-finite ones for errors


class RoutingMask(nn.Module):
    """The experts of one layer that each slot lets the router choose.

    Buffers of fixed shape: routable_SE, bool [16, E], all true for slots without a profile;
    variant_S, int32 [16], the distinct mask of a slot; bias_VE, float32 [V, E], the correction bias
    of every distinct mask (zeros where the router has none).

    Args:
        masks: profile name -> bool [E], on the CPU; they take slots in this order.
    """

    routable_SE: torch.Tensor
    variant_S: torch.Tensor
    bias_VE: torch.Tensor

    def __init__(self, masks: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.masks = dict(masks)
        with torch.device("cpu"):
            self.distinct_VE = torch.stack(list(masks.values())).unique(dim=0)
            routable_SE = torch.ones(SLOTS, self.distinct_VE.shape[1], dtype=torch.bool)
        self.masks_routing = not bool(self.distinct_VE.all())
        self.biased = False
        device = torch.get_default_device()
        for name, tensor in (
            ("routable_SE", routable_SE),
            ("variant_S", torch.zeros(SLOTS, dtype=torch.int32)),
            ("bias_VE", torch.zeros(self.distinct_VE.shape, dtype=torch.float32)),
        ):
            self.register_buffer(name, tensor.to(device), persistent=False)
        for slot, mask_E in enumerate(masks.values()):
            self.set_slot(slot, mask_E)

    @property
    def index_bytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for buffer in self.buffers())

    @torch.no_grad()
    def set_slot(self, slot: int, routable_E: torch.Tensor | None) -> None:
        """Let tokens of `slot` use these experts only; None allows all.

        Args:
            slot: 0..SLOTS-1.
            routable_E: bool [E], on the CPU.

        Raises:
            ValueError: the router was not prepared at start for masks, or not for this one.
        """
        if routable_E is None:  # no token has this slot
            self.routable_SE[slot] = True
            self.variant_S[slot] = 0
            return
        variants = (self.distinct_VE == routable_E).all(dim=1).nonzero().flatten().tolist()
        if not self.masks_routing and not bool(routable_E.all()):
            raise ValueError(
                "it excludes experts from routing and no profile listed at start does; list one "
                "that does in `resident` and restart"
            )
        if self.biased and not variants:
            raise ValueError(
                "its routing mask is none of those listed at start, and this router has a "
                "correction bias; list it in `resident` and restart"
            )
        self.routable_SE[slot].copy_(routable_E)
        self.variant_S[slot] = variants[0] if variants else 0

    @torch.no_grad()
    def prepare(self, correction_bias_E: torch.Tensor | None) -> None:
        """Mask the model's correction bias by every distinct mask, after it is loaded.

        Args:
            correction_bias_E: the model's own bias [E], any float dtype, not modified; None if the
                router has none. Only without masks may it be of more experts: LongCat's zero
                experts have biases, too, and its router follows no masks.
        """
        self.biased = correction_bias_E is not None
        if correction_bias_E is None:
            return
        if self.masks_routing or len(correction_bias_E) == self.bias_VE.shape[1]:
            excluded_VE = ~self.distinct_VE.to(self.bias_VE.device)
            self.bias_VE.copy_(correction_bias_E.float().masked_fill(excluded_VE, MASKED_BIAS))

    def attach(
        self, router: FusedMoERouter, slots_of: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """Wrap one router: each token chooses among the experts of its slot.

        Args:
            router: one of `compat.KNOWN_ROUTERS`.
            slots_of: hidden states [T, H] -> the slot of every token, int32 [T, 1].
        """
        routers = [router]
        if getattr(router, "e_score_correction_bias", None) is not None:
            routers = [copy.copy(router) for _ in self.bias_VE]
            for variant, bias_E in zip(routers, self.bias_VE, strict=True):
                variant.e_score_correction_bias = bias_E
        compute = [variant._compute_routing for variant in routers]

        def compute_routing(
            hidden_states: torch.Tensor,
            router_logits: torch.Tensor,
            indices_type: torch.dtype | None,
            *,
            input_ids: torch.Tensor | None = None,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            slots_T = slots_of(hidden_states)[:, 0]
            masked_logits_TE = torch.where(self.routable_SE[slots_T], router_logits, -math.inf)
            weights_TK, ids_TK = compute[0](
                hidden_states, masked_logits_TE, indices_type, input_ids=input_ids
            )
            for variant in range(1, len(compute)):
                others = compute[variant](
                    hidden_states, masked_logits_TE, indices_type, input_ids=input_ids
                )
                chosen_T1 = (self.variant_S[slots_T] == variant)[:, None]
                weights_TK = torch.where(chosen_T1, others[0], weights_TK)
                ids_TK = torch.where(chosen_T1, others[1], ids_TK)
            return weights_TK, ids_TK

        router._compute_routing = compute_routing


def mask_routers(
    model: nn.Module, layers: Iterable[AtomicRoutedExperts], resident: ResidentProfiles
) -> None:
    """Apply the routing masks of `layers` to the model's routers, if a profile needs them.

    If no profile listed at start masks routing, every router stays as vLLM built it. Under data
    parallelism the slots of the tokens travel with their router logits.

    Raises:
        ValueError: a router, or its caller, is not known to follow a routing mask.
    """
    runners = {
        id(module.routed_experts): module
        for module in model.modules()
        if isinstance(module, MoERunner)
    }
    for layer in layers:
        if layer.moe_config.dp_size > 1:
            send_slots_along(layer, runners.get(id(layer)))
    if not resident.masking:
        return
    for layer in layers:
        runner = runners.get(id(layer))
        check_router(layer, runner, {name: layer.routing.masks[name] for name in resident.masking})
        assert runner is not None
        layer.routing.attach(runner.router, layer.slots_of)


def send_slots_along(layer: AtomicRoutedExperts, runner: MoERunner | None) -> None:
    """Send the slots along where vLLM gathers the tokens of data parallel ranks before routing.

    They become one more column of the router's logits: small integers, exact in every dtype.

    Raises:
        ValueError: vLLM does not gather hidden states and router logits there.
    """
    if runner is None or type(runner) is not MoERunner or not runner.do_naive_dispatch_combine:
        feature = "data parallelism with a model's own runner of experts"
        refuse(CONFIGURATION, {feature: type(runner).__name__}, layer.layer_name)
    assert runner is not None
    dispatch = runner._maybe_dispatch

    def dispatch_with_slots(
        hidden_states: torch.Tensor, router_logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        own_T1 = layer.token_slots[: router_logits.shape[0], None].to(router_logits.dtype)
        hidden_states, logits = dispatch(hidden_states, torch.cat([router_logits, own_T1], dim=1))
        layer.gathered_slots = logits[:, -1:].to(torch.int32)
        return hidden_states, logits[:, :-1].contiguous()

    runner._maybe_dispatch = dispatch_with_slots
