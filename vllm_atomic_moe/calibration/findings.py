"""What a calibration run should be warned about, read off its sums.

Legend: D domains, E experts, I full intermediate size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

MIN_TOKENS = 32
MAX_DEAD_FRACTION = 0.01


def inspect_sums(sums: Mapping[int, Mapping[str, torch.Tensor]]) -> list[str]:
    """Warnings about statistics, one line each; none if all is well.

    Args:
        sums: as in `Statistics.sums`.
    """
    return [line for line in (_masked(sums), _few_tokens(sums)) if line]


@dataclass(frozen=True, slots=True, order=True)
class FewTokens:
    """An expert that saw fewer than MIN_TOKENS tokens, fewest first when sorted."""

    tokens: int
    layer: int
    expert: int


def experts_with_few_tokens(sums: Mapping[int, Mapping[str, torch.Tensor]]) -> list[FewTokens]:
    """Experts that saw fewer than MIN_TOKENS tokens of all domains together, fewest first."""
    return sorted(
        FewTokens(int(count), layer, expert)
        for layer, tensors in sums.items()
        for expert, count in enumerate(tensors["count"].sum(dim=0).tolist())
        if count < MIN_TOKENS
    )


def _masked(sums: Mapping[int, Mapping[str, torch.Tensor]]) -> str | None:
    """A mask applied to the checkpoint leaves atoms without activation or without gradient.

    Only experts with enough tokens count: the last token of a window has no loss, so that an
    expert of the last layer may see a token and no gradient.
    """
    dead = atoms = 0
    for tensors in sums.values():
        seen_E = tensors["count"].sum(dim=0) >= MIN_TOKENS
        silent_EI = tensors["h2"].sum(dim=0) == 0
        if "g2" in tensors:
            silent_EI = silent_EI | (tensors["g2"].sum(dim=0) == 0)
        silent_EI = silent_EI | (tensors["down_norm"] == 0)
        dead += int(silent_EI[seen_E].sum())
        atoms += silent_EI[seen_E].numel()
    if dead <= MAX_DEAD_FRACTION * atoms:
        return None
    return (
        f"{dead} of {atoms} atoms ({dead / atoms:.1%}) have exactly zero activation, gradient or "
        "weights: the checkpoint looks already masked or pruned, and scores would reproduce that "
        "mask; calibrate the original checkpoint (float16 may also round gradients to zero)"
    )


def _few_tokens(sums: Mapping[int, Mapping[str, torch.Tensor]]) -> str | None:
    few = experts_with_few_tokens(sums)
    if not few:
        return None
    experts = sum(tensors["count"].shape[1] for tensors in sums.values())
    return (
        f"{len(few)} of {experts} experts saw fewer than {MIN_TOKENS} tokens; methods that score "
        "atoms by tokens keep them whole unless --allow-unseen is given; use more or broader text"
    )
