"""Budget: how many atoms go, and which.

Legend: E experts, I full intermediate size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch


def global_masks(scores: Mapping[int, torch.Tensor], ratio: float) -> dict[int, torch.Tensor]:
    """Masks that remove the lowest scores over all layers together.

    Exactly round(ratio · atoms) atoms go. Of equal scores the one in the lower layer, then the
    lower expert, then the lower atom goes first; so masks are nested in the ratio. Atoms that score
    +inf go last.

    Args:
        scores: layer index -> float [E, I], higher = more important; not modified.
        ratio: fraction of atoms to remove, 0 <= ratio < 1.

    Returns:
        Layer index -> bool [E, I], True where an atom stays.

    Raises:
        ValueError: the ratio is out of range, there are no scores, or one is NaN.
    """
    if not 0 <= ratio < 1:
        raise ValueError(
            f"ratio {ratio}: wanted the fraction of atoms to remove, 0 <= ratio < 1 "
            "(25 percent is 0.25)"
        )
    if not scores:
        raise ValueError("no layers to prune; score a Mixture-of-Experts model")
    layers = sorted(scores)
    for layer in layers:
        if bool(scores[layer].isnan().any()):
            raise ValueError(f"layers.{layer}.score holds NaN; calibrate and score again")
    flat = torch.cat([scores[layer].flatten() for layer in layers])
    keep = torch.ones(flat.numel(), dtype=torch.bool)
    keep[flat.argsort(stable=True)[: round(ratio * flat.numel())]] = False
    pieces = keep.split([scores[layer].numel() for layer in layers])
    return {
        layer: piece.view(scores[layer].shape) for layer, piece in zip(layers, pieces, strict=True)
    }
