"""The routing mask: experts that a profile excludes are never chosen.

Ahead of the model's own router, the logits of excluded experts become -inf and their correction
bias -1e9; what the router then does with the others (softmax, renormalization, groups, scaling)
is left alone. Both come from buffers, rewritten in place: a switch of profiles changes neither the
tensors' addresses nor any Python state that compiled code or a CUDA graph has seen.

The hook sits on each router instance, and only where a resident profile masks routing. It is tested
with vLLM's CPU router (softmax with and without renormalization; sigmoid with correction bias and
groups), eager and compiled. The CUDA routers are NOT VERIFIED: their code was read, never run with
a mask. Top-k softmax and sigmoid give -inf the score zero and add the bias in float32; fused
grouped top-k skips logits that are not finite and adds up the two best of a group, which stays
finite in float32 and bfloat16 but not in float16 (refused). ROCm, XPU and routers that are not
listed in `compat.KNOWN_ROUTERS` are refused.

Legend: T tokens, K experts per token, E experts, S resident profiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from vllm_atomic_moe.engine.compat import FusedMoERouter, MoERunner
from vllm_atomic_moe.engine.options import ResidentProfiles
from vllm_atomic_moe.engine.refusals import check_router

if TYPE_CHECKING:
    from vllm_atomic_moe.engine.layer import AtomicRoutedExperts

MASKED_BIAS = -1e9  # finite: group scores are sums, and kernels take non-finite ones for errors


class RoutingMask(nn.Module):
    """Which experts of one layer the active profile lets the router choose.

    Buffers, always there and rewritten in place by `activate`: routable_E, bool [E];
    correction_bias_E, float32 [E], what a router with a correction bias adds to its scores (zeros
    otherwise). Prepared for all S profiles: routable_SE and correction_bias_SE.

    Args:
        masks: profile name -> bool [E], on the CPU.
    """

    routable_SE: torch.Tensor
    correction_bias_SE: torch.Tensor
    routable_E: torch.Tensor
    correction_bias_E: torch.Tensor

    def __init__(self, masks: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.masks = dict(masks)
        default = torch.get_default_device()
        routable_SE = torch.stack(list(masks.values())).to(default)
        correction_bias_SE = torch.zeros(routable_SE.shape, dtype=torch.float32)
        for name, tensor in (
            ("routable_SE", routable_SE),
            ("correction_bias_SE", correction_bias_SE),
            ("routable_E", torch.ones_like(routable_SE[0])),
            ("correction_bias_E", torch.zeros_like(correction_bias_SE[0])),
        ):
            self.register_buffer(name, tensor, persistent=False)

    @property
    def index_bytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for buffer in self.buffers())

    @torch.no_grad()
    def prepare(self, correction_bias_E: torch.Tensor | None) -> None:
        """Mask the model's correction bias for every profile, once it is loaded.

        Args:
            correction_bias_E: the model's own bias [E], any float dtype, not modified; None where
                the router has none.
        """
        if correction_bias_E is not None:
            bias_E = correction_bias_E.float()
            self.correction_bias_SE.copy_(bias_E.masked_fill(~self.routable_SE, MASKED_BIAS))

    @torch.no_grad()
    def activate(self, name: str) -> None:
        """Make `name`, one of the resident profiles, the one that the buffers describe."""
        index = list(self.masks).index(name)
        self.routable_E.copy_(self.routable_SE[index])
        self.correction_bias_E.copy_(self.correction_bias_SE[index])

    def attach(self, router: FusedMoERouter) -> None:
        """Stand ahead of one router: its logits and its correction bias come masked from now on."""
        select_experts = router.select_experts

        def select_routable_experts(
            hidden_states: torch.Tensor,
            router_logits: torch.Tensor,
            topk_indices_dtype: torch.dtype | None = None,
            *,
            input_ids: torch.Tensor | None = None,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            masked_logits_TE = torch.where(self.routable_E, router_logits, -math.inf)
            return select_experts(
                hidden_states, masked_logits_TE, topk_indices_dtype, input_ids=input_ids
            )

        router.select_experts = select_routable_experts
        if getattr(router, "e_score_correction_bias", None) is not None:
            router.e_score_correction_bias = self.correction_bias_E


def mask_routers(
    model: nn.Module, layers: Iterable[AtomicRoutedExperts], resident: ResidentProfiles
) -> None:
    """Put the routing masks of `layers` ahead of the model's routers, if a profile needs them.

    Where no resident profile masks routing, every router stays as vLLM built it.

    Raises:
        ValueError: a router, or what runs it, is not known to follow a routing mask.
    """
    if not resident.masking:
        return
    runners = {
        id(module.routed_experts): module
        for module in model.modules()
        if isinstance(module, MoERunner)
    }
    for layer in layers:
        runner = runners.get(id(layer))
        check_router(layer, runner, {name: layer.routing.masks[name] for name in resident.masking})
        assert runner is not None
        layer.routing.attach(runner.router)
