"""Scores of one layer, and the masks of all layers.

Legend: E experts, I full intermediate size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True, eq=False)
class LayerScores:
    """Scores of one layer, higher = more important; +inf is never removed.

    Attributes:
        atoms: float32 [E, I]; methods that score whole experts give all atoms the expert's score.
        experts: float32 [E] from methods that also score experts (tenp), else None.
    """

    atoms: torch.Tensor
    experts: torch.Tensor | None = None

    @classmethod
    def whole(cls, score_E: torch.Tensor, size: int) -> LayerScores:
        """Give all `size` atoms the score of their expert."""
        return cls(score_E.float()[:, None].expand(-1, size).contiguous())

    def protect(self, experts_E: torch.Tensor) -> LayerScores:
        """The same scores with +inf for the experts where bool [E] is True."""
        return LayerScores(
            self.atoms.masked_fill(experts_E[:, None], torch.inf),
            None if self.experts is None else self.experts.masked_fill(experts_E, torch.inf),
        )

    def has_nan(self) -> bool:
        """Whether any score is NaN."""
        experts = self.experts is not None and bool(self.experts.isnan().any())
        return experts or bool(self.atoms.isnan().any())


@dataclass(frozen=True, slots=True, eq=False)
class Masks:
    """Masks of all layers, from a method or from another tool's file.

    Attributes:
        keep: layer index -> bool [E, I], True where an atom stays.
        routable: layer index -> bool [E], False for experts that leave the router.
        metadata: strings for the profile (method, ...), from a file.
        warnings: about the file, one line each.
    """

    keep: Mapping[int, torch.Tensor]
    routable: Mapping[int, torch.Tensor] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @classmethod
    def whole(cls, routable: Mapping[int, torch.Tensor], size: int) -> Masks:
        """Masks of experts of `size` atoms that are kept or removed whole."""
        keep = {layer: mask[:, None].expand(-1, size) for layer, mask in routable.items()}
        return cls({layer: mask.contiguous() for layer, mask in keep.items()}, routable)
