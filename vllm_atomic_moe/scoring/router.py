"""The experts that a router needs, which methods that prune whole experts must keep.

Legend: E experts, K experts per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vllm_atomic_moe.files.router import ExpertGroups


@dataclass(frozen=True, slots=True)
class RouterNeeds:
    """The experts that a router cannot do without.

    Attributes:
        experts_per_token: K.
        groups: its expert groups; None if it chooses among all experts.
    """

    experts_per_token: int
    groups: ExpertGroups | None = None

    def must_stay(self, order_E: torch.Tensor) -> torch.Tensor:
        """The best K experts; with groups the best of every group, so that any choice has K.

        Args:
            order_E: int64 [E], the experts from the best to the worst.

        Returns:
            bool [E], by expert. These pass `ExpertGroups.fault`, with or without others.
        """
        experts, number, least = order_E.numel(), 1, self.experts_per_token
        if self.groups is not None:
            number = self.groups.number
            least = math.ceil(self.experts_per_token / self.groups.chosen)
            least = max(least, 2 if self.groups.biased else 1)
        group_E = order_E // (experts // number)
        in_group_EG = torch.nn.functional.one_hot(group_E, number)
        rank_E = in_group_EG.cumsum(dim=0).gather(1, group_E[:, None]).squeeze(1)
        stays = torch.zeros(experts, dtype=torch.bool)
        stays[order_E] = rank_E <= least
        return stays
