"""What a calibration run should be warned about, read off its sums.

Legend: D domains, E experts, I full intermediate size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

MIN_TOKENS = 32
MAX_DEAD_FRACTION = 0.01
NAMED_EXPERTS = 4


def inspect_sums(sums: Mapping[int, Mapping[str, torch.Tensor]]) -> list[str]:
    """Warnings about statistics, one line each; none if all is well.

    Args:
        sums: as in `Statistics.sums`.
    """
    return [line for line in (_masked(sums), _starved(sums)) if line]


def _masked(sums: Mapping[int, Mapping[str, torch.Tensor]]) -> str | None:
    """A mask applied to the checkpoint leaves atoms without activation or without gradient.

    Only experts with enough tokens count: the last token of a window has no loss, so that an
    expert of the last layer may see a token and no gradient.
    """
    dead = atoms = 0
    for tensors in sums.values():
        seen_E = tensors["count"].sum(dim=0) >= MIN_TOKENS
        silent_EI = (tensors["h2"].sum(dim=0) == 0) | (tensors["g2"].sum(dim=0) == 0)
        dead += int(silent_EI[seen_E].sum())
        atoms += silent_EI[seen_E].numel()
    if dead <= MAX_DEAD_FRACTION * atoms:
        return None
    return (
        f"{dead} of {atoms} atoms ({dead / atoms:.1%}) have exactly zero activation or gradient: "
        "the checkpoint looks already masked or pruned, and scores would reproduce that mask; "
        "calibrate the original checkpoint (float16 may also round gradients to zero)"
    )


def _starved(sums: Mapping[int, Mapping[str, torch.Tensor]]) -> str | None:
    counts = [
        (int(count), layer, expert)
        for layer, tensors in sums.items()
        for expert, count in enumerate(tensors["count"].sum(dim=0).tolist())
    ]
    starved = sorted(entry for entry in counts if entry[0] < MIN_TOKENS)
    if not starved:
        return None
    worst = ", ".join(
        f"layer {layer} expert {expert}: {count}"
        for count, layer, expert in starved[:NAMED_EXPERTS]
    )
    return (
        f"{len(starved)} of {len(counts)} experts saw fewer than {MIN_TOKENS} tokens "
        f"(fewest: {worst}); their scores are unsure, those without any are kept whole; "
        "use more or broader text"
    )
