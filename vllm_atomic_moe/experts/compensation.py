"""The compensation of one layer by slot: scales and biases of its experts' outputs.

Scales multiply the router weights and biases are added after the experts, so kernels need not know
about either. The buffers have a fixed shape, with room for a fixed number of compensated profiles.

Legend: T tokens, K experts per token, E experts, H hidden size, S slots, R rows of biases.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from vllm_atomic_moe.experts.packing import SLOTS
from vllm_atomic_moe.files.compensation import Compensation


class SlotCompensation(nn.Module):
    """Buffers: scale_SE, float32 [16, E], ones for slots without compensation; first_row_S, int64
    [16], first row of the slot's biases, -1 if it has none; bias_RH, [room · E, H].

    Args:
        room: how many compensated profiles can be loaded at a time.
        own_E: bool [E], on the CPU: experts whose biases this rank adds.
        hidden_size: H.
        dtype: of the activations, and of the biases.
    """

    scale_SE: torch.Tensor
    first_row_S: torch.Tensor
    bias_RH: torch.Tensor

    def __init__(
        self, room: int, own_E: torch.Tensor, hidden_size: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self._own_E, self._room = own_E, room
        experts, device = len(own_E), torch.get_default_device()
        # Ranks that add no bias allocate none.
        rows = room * experts if bool(own_E.any()) else 0
        for name, tensor in (
            ("scale_SE", torch.ones(SLOTS, experts, dtype=torch.float32, device=device)),
            ("first_row_S", torch.full((SLOTS,), -1, dtype=torch.int64, device=device)),
            ("bias_RH", torch.zeros(rows, hidden_size, dtype=dtype, device=device)),
        ):
            self.register_buffer(name, tensor, persistent=False)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the biases."""
        return self.bias_RH.nbytes

    @property
    def index_bytes(self) -> int:
        """Bytes of the row index and the scales."""
        return self.scale_SE.nbytes + self.first_row_S.nbytes

    @torch.no_grad()
    def set_slot(self, slot: int, compensation: Compensation | None) -> None:
        """Set the compensation of a slot; None removes it.

        Args:
            slot: 0..SLOTS-1; no token in flight carries it.
            compensation: on the CPU.

        Raises:
            ValueError: no room is left for another compensated profile.
        """
        self.scale_SE[slot] = 1
        self.first_row_S[slot] = -1
        if compensation is None:
            return
        experts = len(self._own_E)
        taken = set(self.first_row_S.tolist())
        free = [row * experts for row in range(self._room) if row * experts not in taken]
        if not free:
            raise ValueError(
                f"there is room for the biases of {self._room} compensated profiles, as many as "
                "were listed at start; unload one first"
            )
        self.scale_SE[slot].copy_(compensation.scale_E)
        if len(self.bias_RH):
            own_EH = compensation.bias_EH * self._own_E[:, None]
            self.bias_RH[free[0] : free[0] + experts].copy_(own_EH)
        self.first_row_S[slot] = free[0]

    def forward(
        self, topk_weights_TK: torch.Tensor, topk_ids_TK: torch.Tensor, slots_T1: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Router weights with the scales in them, and what to add to the experts' output, [T, H].

        Args:
            topk_weights_TK: any float dtype.
            topk_ids_TK: expert ids without slots; ids outside 0..E-1 are ignored.
            slots_T1: int32 [T, 1].
        """
        experts = self.scale_SE.shape[1]
        slots_T1, ids_TK = slots_T1.long(), topk_ids_TK.long().clamp(0, experts - 1)
        scaled_TK = topk_weights_TK * self.scale_SE[slots_T1, ids_TK]
        if not len(self.bias_RH):
            return scaled_TK, None
        first_T1 = self.first_row_S[slots_T1]
        used_TK = (topk_ids_TK == ids_TK) & (first_T1 >= 0)
        rows_TK = torch.where(used_TK, first_T1 + ids_TK, 0)
        shares_TK = torch.where(used_TK, topk_weights_TK, 0).to(self.bias_RH.dtype)
        added_TH = functional.embedding_bag(
            rows_TK, self.bias_RH, mode="sum", per_sample_weights=shares_TK
        )
        return scaled_TK, added_TH
