"""Counts top-k sets: the experts that tokens choose together, and how often.

SHAPE (see `scoring/methods/shape.py`) scores experts by this table. It is exact, with one row per
domain and observed set.

Legend: T tokens, K experts per token, S rows of the table.
"""

from __future__ import annotations

import torch

from vllm_atomic_moe.files.statistics import add_sets

# Maximum number of rows that wait to be added up: a few MB for any model.
PENDING_ROWS = 1 << 16


class TopKSetsAccumulator:
    """Adds up sets; at most PENDING_ROWS tokens wait between additions."""

    def __init__(self) -> None:
        self._tables: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._pending = 0

    def see(self, topk_ids_TK: torch.Tensor, domain: int) -> None:
        """Count the sets of T tokens.

        Args:
            topk_ids_TK: expert ids, any integer dtype, in any order; at most 32767.
            domain: index of the domain.
        """
        ids_TK = topk_ids_TK.detach().to("cpu", torch.int16).sort(dim=1).values
        domains_T1 = torch.full((ids_TK.shape[0], 1), domain, dtype=torch.int16)
        ones_T = torch.ones(ids_TK.shape[0], dtype=torch.int64)
        self._tables.append((torch.cat([domains_T1, ids_TK], dim=1), ones_T))
        self._pending += ids_TK.shape[0]
        if self._pending >= PENDING_ROWS:
            self.table()

    def table(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`LayerSums.sets` and `set_counts` of all tokens seen, after at least one `see`."""
        self._tables = [add_sets(self._tables)]
        self._pending = 0
        return self._tables[0]
