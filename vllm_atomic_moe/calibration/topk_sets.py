"""The table of observed top-k sets: which experts were chosen together, and how often.

SHAPE (see `scoring/shape.py`) scores experts by it. It is exact, has one row per domain and set
that occurred, and two tables add up to the table of both runs.

Legend: T tokens, K experts per token, S rows of the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Rows that may wait before they are added up: some MB, whatever the model.
PENDING_ROWS = 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class TopKSets:
    """Observed sets.

    Attributes:
        sets: int16 [S, 1+K]: the domain's index, then the ids of the experts chosen together,
            ascending; rows are unique and sorted.
        counts: int64 [S], how many tokens chose that set.
    """

    sets: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def add(cls, tables: Sequence[TopKSets]) -> TopKSets:
        """The table of all tokens of several tables of one K; at least one table."""
        sets, position = torch.unique(
            torch.cat([table.sets for table in tables]), dim=0, return_inverse=True
        )
        counts = torch.zeros(sets.shape[0], dtype=torch.int64)
        counts.index_add_(0, position, torch.cat([table.counts for table in tables]))
        return cls(sets, counts)

    @classmethod
    def of_tokens(cls, topk_ids_TK: torch.Tensor, domain: int) -> TopKSets:
        """Every token's set by itself, not added up yet, on the CPU.

        Args:
            topk_ids_TK: expert ids, any integer dtype, in any order; at most 32767.
            domain: index of the domain.
        """
        ids_TK = topk_ids_TK.detach().to("cpu", torch.int16).sort(dim=1).values
        domains_T1 = torch.full((ids_TK.shape[0], 1), domain, dtype=torch.int16)
        counts = torch.ones(ids_TK.shape[0], dtype=torch.int64)
        return cls(torch.cat([domains_T1, ids_TK], dim=1), counts)


class TopKSetsAccumulator:
    """Adds up sets; between additions at most PENDING_ROWS tokens wait."""

    def __init__(self) -> None:
        self._tables: list[TopKSets] = []
        self._pending = 0

    def see(self, topk_ids_TK: torch.Tensor, domain: int) -> None:
        """Count the sets of T tokens."""
        self._tables.append(TopKSets.of_tokens(topk_ids_TK, domain))
        self._pending += topk_ids_TK.shape[0]
        if self._pending >= PENDING_ROWS:
            self.table()

    def table(self) -> TopKSets:
        """The sets of all tokens seen so far, of at least one call of `see`."""
        self._tables = [TopKSets.add(self._tables)]
        self._pending = 0
        return self._tables[0]
