"""Warnings about a calibration run, from its sums.

Legend: D domains, E experts, I full intermediate size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vllm_atomic_moe.files.statistics import MIN_TOKENS, LayerSums

MAX_DEAD_FRACTION = 0.01


def inspect_sums(sums: Mapping[int, LayerSums]) -> list[str]:
    """Warnings about statistics, one line each."""
    return [line for line in (_masked(sums), _few_tokens(sums)) if line]


@dataclass(frozen=True, slots=True, order=True)
class FewTokens:
    """An expert that saw fewer than MIN_TOKENS tokens, fewest first when sorted."""

    tokens: int
    layer: int
    expert: int


def experts_with_few_tokens(sums: Mapping[int, LayerSums]) -> list[FewTokens]:
    """Experts that saw fewer than MIN_TOKENS tokens of all domains together, fewest first."""
    return sorted(
        FewTokens(int(of_layer.count[:, expert].sum()), layer, expert)
        for layer, of_layer in sums.items()
        for expert in of_layer.few_tokens.nonzero().flatten().tolist()
    )


def _masked(sums: Mapping[int, LayerSums]) -> str | None:
    """Detect a mask in the checkpoint, by atoms without activation or gradient.

    Only experts with enough tokens count: the last token of a window has no loss, so an expert of
    the last layer may see a token without a gradient.
    """
    dead = atoms = 0
    for of_layer in sums.values():
        seen_E = ~of_layer.few_tokens
        silent_EI = of_layer.h2.sum(dim=0) == 0
        if of_layer.g2 is not None:
            silent_EI = silent_EI | (of_layer.g2.sum(dim=0) == 0)
        silent_EI = silent_EI | (of_layer.down_norm == 0)
        dead += int(silent_EI[seen_E].sum())
        atoms += silent_EI[seen_E].numel()
    if dead <= MAX_DEAD_FRACTION * atoms:
        return None
    return (
        f"{dead} of {atoms} atoms ({dead / atoms:.1%}) have exactly zero activation, gradient or "
        "weights: the checkpoint looks already masked or pruned, and scores would reproduce that "
        "mask; calibrate the original checkpoint (float16 may also round gradients to zero)"
    )


def _few_tokens(sums: Mapping[int, LayerSums]) -> str | None:
    few = experts_with_few_tokens(sums)
    if not few:
        return None
    experts = sum(of_layer.count.shape[1] for of_layer in sums.values())
    return (
        f"{len(few)} of {experts} experts saw fewer than {MIN_TOKENS} tokens; methods that score "
        "atoms by tokens keep them whole unless --allow-unseen is given; use more or broader text"
    )
