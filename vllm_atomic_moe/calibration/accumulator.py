"""Adds up what the experts of one layer do, while the model runs.

Everything is summed in float64 on the layer's device and moved once, at the end. The state is a few
numbers per atom, nothing of size H·H, and the table of observed top-k sets.

Legend: T tokens, K experts per token, D domains, E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch

from vllm_atomic_moe.calibration.experts import ExpertRows, ExpertsModule, weight_norms
from vllm_atomic_moe.calibration.statistics import ATOM_SUMS, EXPERT_SUMS, GRADIENT_SUM
from vllm_atomic_moe.calibration.topk_sets import TopKSetsAccumulator


@dataclass(slots=True)
class Batch:
    """What the layers' observers must know about the batch that runs.

    Attributes:
        domain: index of its domain.
        padding_T: bool [T], True where a token is padding; None if none is.
    """

    domain: int = 0
    padding_T: torch.Tensor | None = None


@dataclass(slots=True, eq=False)
class LayerAccumulator:
    """The `LayerObserver` of one layer.

    Attributes:
        shape: (D, E, I).
        gradients: whether a backward pass follows, so that `g2` can be summed.
        batch: what runs now; shared by all layers, set before each batch.
        sums: name -> tensor, as in `Statistics.sums`, without the table of sets.
        sets: the table of sets.
    """

    shape: tuple[int, int, int]
    gradients: bool
    batch: Batch
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    sets: TopKSetsAccumulator = field(default_factory=TopKSetsAccumulator)

    def see_routing(self, module: ExpertsModule, topk_ids_TK: torch.Tensor) -> torch.Tensor:
        """Send padding nowhere, so that it counts nowhere, and count the others' sets."""
        if not self.sums:
            self.allocate(topk_ids_TK.device)
            self.sums.update(weight_norms(module))
        if self.batch.padding_T is not None:
            padding_T1 = self.batch.padding_T.to(topk_ids_TK.device)[:, None]
            topk_ids_TK = topk_ids_TK.masked_fill(padding_T1, self.shape[1])
        whole_T = (topk_ids_TK < self.shape[1]).all(dim=1)
        self.sets.see(topk_ids_TK[whole_T], self.batch.domain)
        return topk_ids_TK

    @torch.no_grad()
    def see_expert(self, expert: int, rows: ExpertRows) -> None:
        """Add one expert's rows; the gradients follow during the backward pass."""
        at = (self.batch.domain, expert)
        h, y, x, p = (tensor.detach() for tensor in (rows.h, rows.y, rows.x, rows.p))
        norm = torch.linalg.vector_norm(y, dim=1, dtype=torch.float64)
        direction = (y / norm[:, None].clamp_min(torch.finfo(torch.float64).tiny)).to(y.dtype)
        weighted_norm = p.double() * norm
        cosine = torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=1)
        self.sums["count"][at] += h.shape[0]
        self.sums["h2"][at] += sum_of_squares(h)
        self.sums["contribution"][at] += (h.double() * (direction @ rows.down_HI)).sum(dim=0)
        self.sums["output_norm"][at] += weighted_norm.sum()
        self.sums["output_change"][at] += (weighted_norm * (1 - cosine)).sum()
        if self.gradients:
            rows.h.register_hook(partial(self.see_gradient, at))

    def see_gradient(self, at: tuple[int, int], g: torch.Tensor) -> None:
        """Add the gradients ∂ℓ/∂h [rows, I] of one (domain, expert); `g` is not modified."""
        self.sums["g2"][at] += sum_of_squares(g)

    def allocate(self, device: torch.device | str) -> None:
        """Make the sums, all zero; the norms of the weights come with the first batch."""
        for name in EXPERT_SUMS:
            self.sums[name] = torch.zeros(self.shape[:2], dtype=torch.float64, device=device)
        for name in (*ATOM_SUMS, *([GRADIENT_SUM] if self.gradients else [])):
            self.sums[name] = torch.zeros(self.shape, dtype=torch.float64, device=device)

    def result(self) -> dict[str, torch.Tensor]:
        """Name -> tensor on the CPU, as in `Statistics.sums`."""
        table = self.sets.table()
        return {
            **{name: tensor.cpu() for name, tensor in self.sums.items()},
            "sets": table.sets,
            "set_counts": table.counts,
        }


def sum_of_squares(rows: torch.Tensor) -> torch.Tensor:
    """Σ over rows of the square, in float64: [rows, I] -> [I]."""
    return rows.detach().double().square().sum(dim=0)
