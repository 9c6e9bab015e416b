"""Least squares over all experts of a layer at once: the corrections that minimize its error.

All experts that a token chose share its error, which couples their normal equations. Conjugate
gradients solve them, preconditioned by each expert's own equations: one pass over the tokens per
step, and no matrix larger than one expert's. Some batches are held out. Their error selects the
ridge and stops the steps, so that a fit never increases it.

Legend: T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from vllm_atomic_moe.calibration.corrections import Correction, Parameters
from vllm_atomic_moe.calibration.experts import ExpertRows

RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
STEPS = 12
ENOUGH = 1e-3  # stop when a step reduces the held-out error by less than this fraction

Rows = Callable[[], Iterator[dict[int, ExpertRows]]]
"""One pass over the tokens: for each batch, the rows of each expert."""


@dataclass(frozen=True, slots=True)
class Fit:
    """The best correction of one layer.

    Attributes:
        parameters: of every expert that was corrected.
        before, after: squared error of the held-out tokens.
        steps: number of conjugate gradient steps.
    """

    parameters: Parameters
    before: float
    after: float
    steps: int


def fit(
    correction: Correction,
    rows: Rows,
    errors: Sequence[torch.Tensor],
    held_out: Sequence[bool],
) -> Fit:
    """Fit a correction to the errors of a layer.

    Args:
        correction: the kind of correction.
        rows: returns the same rows at every call.
        errors: per batch, what the experts' weighted outputs lack, float32 [T, H]; not modified.
        held_out: per batch, whether it is held out.
    """
    return _Solver(correction, rows, errors, held_out).run()


class _Solver:
    def __init__(
        self,
        correction: Correction,
        rows: Rows,
        errors: Sequence[torch.Tensor],
        held_out: Sequence[bool],
    ) -> None:
        self.correction, self.rows, self.errors = correction, rows, errors
        # Remaining errors of the held-out batches.
        of_batches = enumerate(zip(errors, held_out, strict=True))
        self.left = {number: error.clone() for number, (error, held) in of_batches if held}
        # Of experts with tokens in the fitted batches.
        self.curvature: Parameters = {}

    def run(self) -> Fit:
        before = error = self._held_out_error()
        gradient = self._first_pass()
        found = {expert: torch.zeros_like(it) for expert, it in gradient.items()}
        ridge = self._choose_ridge(gradient)
        if ridge is None:
            return Fit({}, before, before, 0)
        direction: Parameters = {}
        product = 0.0
        for step in range(STEPS):
            conditioned = self._precondition(gradient, ridge)
            last, product = product, _dot(gradient, conditioned)
            direction = {
                expert: it + product / last * direction[expert] if direction else it
                for expert, it in conditioned.items()
            }
            images, normal = self._multiply(direction, ridge)
            length = product / _dot(direction, normal)
            for number, image in images.items():
                self.left[number].sub_(image, alpha=length)
            now = self._held_out_error()
            if now > error * (1 - ENOUGH):
                return Fit(found, before, error, step)
            error = now
            found = {expert: it + length * direction[expert] for expert, it in found.items()}
            gradient = {expert: it - length * normal[expert] for expert, it in gradient.items()}
        return Fit(found, before, error, STEPS)

    def _first_pass(self) -> Parameters:
        """Right-hand sides, and every expert's own normal equations."""
        gradient: Parameters = {}
        for number, of_batch in enumerate(self.rows()):
            for expert, rows in self._fitted(number, of_batch):
                errors = self.errors[number].to(rows.h.device)[rows.tokens]
                added = self.correction.gather(expert, rows, errors)
                gradient[expert] = added + gradient.get(expert, 0)
                grown = self.correction.curvature(expert, rows).double()
                self.curvature[expert] = grown + self.curvature.get(expert, 0)
        return gradient

    def _choose_ridge(self, gradient: Parameters) -> float | None:
        """The ridge whose first step reduces the held-out error most; None if none does."""
        directions = [self._precondition(gradient, ridge) for ridge in RIDGES]
        # Squared norms of their images on the fitted and on the held-out batches, and the inner
        # products of the latter with the held-out errors.
        fitted, held_out, along = ([0.0] * len(RIDGES) for _ in range(3))
        for number, of_batch in enumerate(self.rows()):
            for index, direction in enumerate(directions):
                image = self._image(direction, number, of_batch)
                square = _square(image)
                if number in self.left:
                    held_out[index] += square
                    along[index] += float((image * self.left[number].to(image.device)).sum())
                else:
                    fitted[index] += square
        best, chosen = 0.0, None
        for index, ridge in enumerate(RIDGES):
            direction = directions[index]
            curved = fitted[index] + _dot(direction, self._penalized(direction, ridge))
            length = _dot(gradient, direction) / curved if curved > 0 else 0.0
            change = length * (length * held_out[index] - 2 * along[index])
            if change < best:
                best, chosen = change, ridge
        return chosen

    def _multiply(
        self, direction: Parameters, ridge: float
    ) -> tuple[dict[int, torch.Tensor], Parameters]:
        """Images of a direction on the held-out batches, and the normal equations times it."""
        images = {}
        normal = self._penalized(direction, ridge)
        for number, of_batch in enumerate(self.rows()):
            image = self._image(direction, number, of_batch)
            if number in self.left:
                images[number] = image.to(self.left[number].device)
            for expert, rows in self._fitted(number, of_batch):
                normal[expert] += self.correction.gather(expert, rows, image[rows.tokens])
        return images, normal

    def _image(
        self, direction: Parameters, number: int, of_batch: dict[int, ExpertRows]
    ) -> torch.Tensor:
        """The change of the layer's output in one batch along a direction: [T, H]."""
        device = next((rows.h.device for rows in of_batch.values()), self.errors[number].device)
        image = torch.zeros_like(self.errors[number], device=device)
        for expert, rows in of_batch.items():
            if expert in direction:
                added = self.correction.apply(expert, direction[expert], rows)
                image.index_add_(0, rows.tokens, added * rows.p[:, None].float())
        return image

    def _penalized(self, direction: Parameters, ridge: float) -> Parameters:
        return {
            expert: it * self.correction.penalty(self.curvature[expert], ridge).float()
            for expert, it in direction.items()
        }

    def _fitted(
        self, number: int, of_batch: dict[int, ExpertRows]
    ) -> Iterator[tuple[int, ExpertRows]]:
        """Rows of the experts that can be corrected; none for held-out batches."""
        for expert, rows in of_batch.items():
            if self.correction.corrects(expert) and number not in self.left:
                yield expert, rows

    def _precondition(self, gradient: Parameters, ridge: float) -> Parameters:
        return {
            expert: self.correction.precondition(self.curvature[expert], ridge, it)
            for expert, it in gradient.items()
        }

    def _held_out_error(self) -> float:
        return sum(map(_square, self.left.values()))


def _square(numbers: torch.Tensor) -> float:
    return float(numbers.double().square().sum())


def _dot(one: Parameters, two: Parameters) -> float:
    return float(sum((it.double() * two[expert].double()).sum() for expert, it in one.items()))
