"""Adds up what the experts of one layer do, while the model runs.

Everything is summed in float64 on the layer's device and moved once, at the end. The state is a few
numbers per atom, nothing of size H·H, and the table of observed top-k sets.

Legend: T tokens, K experts per token, D domains, E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import torch

from vllm_atomic_moe.calibration.experts import (
    ExpertRows,
    ExpertsModule,
    Routed,
    weight_norms,
)
from vllm_atomic_moe.calibration.topk_sets import TopKSetsAccumulator
from vllm_atomic_moe.files.statistics import LayerSums


@dataclass(slots=True)
class Batch:
    """The running batch, for the layers' observers.

    Attributes:
        domain: index of its domain.
        padding_T: bool [T], True where a token is padding; None if none is.
    """

    domain: int = 0
    padding_T: torch.Tensor | None = None

    @classmethod
    def of(cls, domain: int, ids: torch.Tensor) -> Batch:
        """The batch of these windows, int32 [windows, seq_len]; a negative id is padding."""
        return cls(domain, (ids < 0).flatten() if bool((ids < 0).any()) else None)

    def unpadded(self, topk_ids_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
        """Ids that route padding to no expert."""
        if self.padding_T is None:
            return topk_ids_TK
        padding_T1 = self.padding_T.to(topk_ids_TK.device)[:, None]
        return topk_ids_TK.masked_fill(padding_T1, num_experts)


@dataclass(slots=True)
class Unwatched:
    """The `LayerObserver` of a layer that runs as if observed, without adding anything up.

    Attributes:
        batch: the current batch.
    """

    batch: Batch

    def see_routing(self, module: ExpertsModule, routed: Routed) -> torch.Tensor:
        """Route padding to no expert, as `LayerAccumulator` does."""
        return self.batch.unpadded(routed.topk_ids_TK, module.num_experts)

    def see_expert(self, expert: int, rows: ExpertRows) -> torch.Tensor:
        """Return the output unchanged."""
        return rows.y


@dataclass(slots=True, eq=False)
class LayerAccumulator:
    """The `LayerObserver` of one layer.

    Attributes:
        shape: (D, E, I).
        gradients: whether a backward pass follows, so that `g2` can be summed.
        batch: the current batch; set before each one.
        sums: the sums so far, without the table of sets; None before the first batch.
        sets: the table of sets.
    """

    shape: tuple[int, int, int]
    gradients: bool
    batch: Batch
    sums: LayerSums | None = None
    sets: TopKSetsAccumulator = field(default_factory=TopKSetsAccumulator)

    def see_routing(self, module: ExpertsModule, routed: Routed) -> torch.Tensor:
        """Route padding to no expert, and count the sets of the other tokens."""
        topk_ids_TK = routed.topk_ids_TK
        if self.sums is None:
            zeros = LayerSums.zeros(self.shape, self.gradients, topk_ids_TK.device)
            self.sums = replace(zeros, **weight_norms(module))
        topk_ids_TK = self.batch.unpadded(topk_ids_TK, self.shape[1])
        whole_T = (topk_ids_TK < self.shape[1]).all(dim=1)
        self.sets.see(topk_ids_TK[whole_T], self.batch.domain)
        return topk_ids_TK

    @torch.no_grad()
    def see_expert(self, expert: int, rows: ExpertRows) -> torch.Tensor:
        """Add one expert's rows; the gradients follow during the backward pass."""
        assert self.sums is not None, "routing comes first"
        sums, at = self.sums, (self.batch.domain, expert)
        h, y, x, p = (tensor.detach() for tensor in (rows.h, rows.y, rows.x, rows.p))
        norm = torch.linalg.vector_norm(y, dim=1, dtype=torch.float64)
        direction = (y / norm[:, None].clamp_min(torch.finfo(torch.float64).tiny)).to(y.dtype)
        weighted_norm = p.double() * norm
        cosine = torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=1)
        sums.count[at] += h.shape[0]
        sums.h2[at] += sum_of_squares(h)
        sums.contribution[at] += (h.double() * (direction @ rows.down_HI)).sum(dim=0)
        sums.output_norm[at] += weighted_norm.sum()
        sums.output_change[at] += (weighted_norm * (1 - cosine)).sum()
        if sums.g2 is not None:
            rows.h.register_hook(partial(_add_squares, sums.g2[at]))
        return rows.y

    def not_finite(self, domain: int) -> str | None:
        """Names the sums of a domain that are not finite; None if all are finite."""
        if self.sums is None:
            return None
        sums = self.sums
        forward = (sums.h2, sums.contribution, sums.output_norm, sums.output_change)
        if not all(bool(total[domain].isfinite().all()) for total in forward):
            return "activations"
        if sums.g2 is not None and not bool(sums.g2[domain].isfinite().all()):
            return "gradients"
        return None

    def result(self) -> LayerSums:
        """The sums on the CPU, with the table of sets."""
        assert self.sums is not None, "no batch was seen"
        on_cpu = {name: tensor.cpu() for name, tensor in self.sums.tensors().items()}
        sets, set_counts = self.sets.table()
        return replace(LayerSums(**on_cpu), sets=sets, set_counts=set_counts)


def _add_squares(total_I: torch.Tensor, rows: torch.Tensor) -> None:
    total_I += sum_of_squares(rows)


def sum_of_squares(rows: torch.Tensor) -> torch.Tensor:
    """Σ over rows of the square, in float64: [rows, I] -> [I]."""
    return rows.detach().double().square().sum(dim=0)
