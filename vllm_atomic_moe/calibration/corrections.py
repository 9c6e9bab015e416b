"""Corrections of pruned experts' outputs, which offset the error of pruning.

A correction is linear in its parameters, one tensor per expert: new columns of `down_proj` for the
kept atoms, or a scale and a bias of the output. `fitting` finds the parameters.

Legend: H hidden size, F atoms kept of one expert.
"""

from __future__ import annotations

from typing import Protocol

import torch

from vllm_atomic_moe.calibration.experts import ExpertRows

Parameters = dict[int, torch.Tensor]
"""Expert -> its parameters; experts that cannot be corrected are absent."""


class Correction(Protocol):
    """A kind of correction of one layer."""

    def corrects(self, expert: int) -> bool:
        """Whether this expert can be corrected."""

    def apply(self, expert: int, of_expert: torch.Tensor, rows: ExpertRows) -> torch.Tensor:
        """The change of an expert's output before the router weight: [rows, H]."""

    def gather(self, expert: int, rows: ExpertRows, errors: torch.Tensor) -> torch.Tensor:
        """Adjoint of `apply` times the router weight: errors [rows, H] -> shape of parameters."""

    def curvature(self, expert: int, rows: ExpertRows) -> torch.Tensor:
        """These rows' share of the expert's own normal equations, for `precondition`."""

    def precondition(
        self, curvature: torch.Tensor, ridge: float, of_expert: torch.Tensor
    ) -> torch.Tensor:
        """Solve the expert's own normal equations with `penalty` on their diagonal."""

    def penalty(self, curvature: torch.Tensor, ridge: float) -> torch.Tensor:
        """The penalty of a ridge that is relative to the diagonal; broadcasts over parameters."""


class Columns:
    """A change of down_proj's columns: parameters [F, H], for experts with atoms.

    Args:
        keep_EI: bool [E, I], the atoms that are kept.
    """

    def __init__(self, keep_EI: torch.Tensor) -> None:
        self._atoms = {
            expert: keep_I.nonzero().flatten()
            for expert, keep_I in enumerate(keep_EI)
            if keep_I.any()
        }

    def corrects(self, expert: int) -> bool:
        return expert in self._atoms

    def apply(self, expert: int, of_expert: torch.Tensor, rows: ExpertRows) -> torch.Tensor:
        return self._kept(expert, rows) @ of_expert

    def gather(self, expert: int, rows: ExpertRows, errors: torch.Tensor) -> torch.Tensor:
        return (self._kept(expert, rows) * rows.p[:, None].float()).t() @ errors

    def curvature(self, expert: int, rows: ExpertRows) -> torch.Tensor:
        weighted = self._kept(expert, rows) * rows.p[:, None].float()
        return weighted.t() @ weighted

    def precondition(
        self, curvature: torch.Tensor, ridge: float, of_expert: torch.Tensor
    ) -> torch.Tensor:
        matrix = curvature.double()
        matrix.diagonal().add_(self.penalty(curvature, ridge))
        factor = torch.linalg.cholesky(matrix)
        return torch.cholesky_solve(of_expert.double(), factor).float()

    def penalty(self, curvature: torch.Tensor, ridge: float) -> torch.Tensor:
        return _positive(ridge * curvature.diagonal().double().mean())

    def _kept(self, expert: int, rows: ExpertRows) -> torch.Tensor:
        return rows.h[:, self._atoms[expert].to(rows.h.device)].float()


class ScaleAndBias:
    """A change of the output's scale, and a bias: parameters [1 + H]."""

    def corrects(self, expert: int) -> bool:
        return True

    def apply(self, expert: int, of_expert: torch.Tensor, rows: ExpertRows) -> torch.Tensor:
        return of_expert[0] * rows.y.float() + of_expert[1:]

    def gather(self, expert: int, rows: ExpertRows, errors: torch.Tensor) -> torch.Tensor:
        weighted = errors * rows.p[:, None].float()
        return torch.cat([(rows.y.float() * weighted).sum()[None], weighted.sum(dim=0)])

    def curvature(self, expert: int, rows: ExpertRows) -> torch.Tensor:
        """Σ p²‖y‖², Σ p², Σ p² y: [2 + H]."""
        squares = rows.p.double().square()
        y = rows.y.double()
        return torch.cat([(squares @ y.square()).sum()[None], squares.sum()[None], squares @ y])

    def precondition(
        self, curvature: torch.Tensor, ridge: float, of_expert: torch.Tensor
    ) -> torch.Tensor:
        scale_penalty, bias_penalty, *_ = self.penalty(curvature, ridge)
        diagonal, count, sums = (
            curvature[0] + scale_penalty,
            curvature[1] + bias_penalty,
            curvature[2:],
        )
        first, rest = of_expert[0].double(), of_expert[1:].double()
        scale = (first - sums @ rest / count) / (diagonal - sums @ sums / count)
        return torch.cat([scale[None], (rest - scale * sums) / count]).float()

    def penalty(self, curvature: torch.Tensor, ridge: float) -> torch.Tensor:
        hidden_size = len(curvature) - 2
        return _positive(ridge * curvature[[0] + [1] * hidden_size])


def _positive(penalty: torch.Tensor) -> torch.Tensor:
    """An expert without tokens has nothing to fit, so any positive penalty works."""
    return torch.where(penalty > 0, penalty, 1.0)
