"""The routers of a checkpoint: what identifies the model, and which routing masks they can follow.

Legend: E experts, K experts per token.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vllm_atomic_moe.files.tensors import read_tensor

# Inside a MoE block: modules of the router, and the correction bias where it stands elsewhere.
ROUTER_MODULES = (
    "gate.",
    "router.",
    "moe_statics.",
    "e_score_correction_bias",
    "experts.e_score_correction_bias",
    "expert_bias",
    "router_bias",
)
# The correction bias among them: it takes part in the choice of experts, not in their weights.
CORRECTION_BIAS = ("e_score_correction_bias", "expert_bias", "router_bias")
# Values of all routers together that are sampled, and of one tensor at least.
SAMPLE, OF_A_TENSOR = 64, 8
# Twice the rounding of bfloat16, the coarsest of plain dtypes; and the least of float16.
ROUNDING, LEAST = 2**-7, 2**-24
# Values that rounding must explain exactly; a few may have been rounded twice.
EXACT = 7 / 8


@dataclass(frozen=True, slots=True)
class ExpertGroups:
    """A router that first chooses groups of neighboring experts, then experts inside them.

    Attributes:
        number: groups; each holds E / number experts.
        chosen: groups a token may use.
        biased: a group's score is the sum of its two best scores, correction bias included; without
            a bias it is the best score.
    """

    number: int
    chosen: int
    biased: bool

    def fault(self, routable_E: torch.Tensor, experts_per_token: int) -> str | None:
        """What a routing mask leaves too little of, in words; None if every choice is right.

        Groups without routable experts score lowest, so that they are chosen only where fewer than
        `chosen` others exist. Wrong is a choice of groups that holds fewer than K routable experts
        (the rest would be pruned ones), and a group whose score counts a pruned expert.
        """
        counts = routable_E.view(self.number, -1).sum(dim=1).tolist()
        selectable = sorted(count for count in counts if count)
        if self.biased and len(selectable) > self.chosen and selectable[0] == 1:
            return (
                f"leaves {counts} experts in the router's groups, which it scores by their two "
                "best; keep at least two of a group, or none"
            )
        fewest = sum(selectable[: self.chosen])
        if fewest < experts_per_token:
            return (
                f"leaves {counts} experts in the router's groups; the {self.chosen} it chooses may "
                f"hold {fewest}, a token uses {experts_per_token}: keep at least as many"
            )
        return None


def expert_groups(number: Any, chosen: Any, biased: bool, num_experts: int) -> ExpertGroups | None:
    """The groups that vLLM's routers go by; None where they choose among all experts.

    Args:
        number: of groups, as configured; none are fewer than two, or ones that do not divide E
            (as in vLLM's `GroupedTopKRouter`).
        chosen: groups a token may use, as configured.
        biased: whether the router has a correction bias.
        num_experts: E.

    Raises:
        ValueError: no router can go by them.
    """
    if number is None or chosen is None:
        return None
    if type(number) is int and (number < 2 or number >= num_experts or num_experts % number):
        return None
    if type(number) is not int or type(chosen) is not int or not 1 <= chosen <= number:
        raise ValueError(
            f"its router chooses {chosen!r:.40} of {number!r:.40} groups of experts, wanted two "
            "numbers, the first of them at least 1 and at most the second"
        )
    return ExpertGroups(number, chosen, biased)


@dataclass(frozen=True, slots=True)
class RouterIdentity:
    """What tells a model's routers from others'.

    Attributes:
        sha256: SHA-256 (hex) over their values in float32, in layer order: copies of one model in
            dtypes that hold its values are one model.
        stored_sha256: over their bytes as stored, which earlier profiles carry.
        sample: some of the values, spread evenly.
    """

    sha256: str
    stored_sha256: str = field(default="", compare=False)
    sample: tuple[float, ...] = field(default=(), compare=False)


def router_names(where: Mapping[str, Path], blocks: Mapping[int, str]) -> dict[int, list[str]]:
    """Layer index -> names of its router's tensors, both ascending.

    Args:
        where: tensor name -> shard.
        blocks: layer index -> name of its MoE block.

    Raises:
        ValueError: a layer has none that is known.
    """
    names: dict[int, list[str]] = {}
    for layer, block in sorted(blocks.items()):
        prefixes = tuple(f"{block}.{module}" for module in ROUTER_MODULES)
        names[layer] = sorted(name for name in where if name.startswith(prefixes))
        if not names[layer]:
            raise ValueError(
                f"layer {layer}: no router tensor under {block}.gate or {block}.router; "
                "this architecture's router is not known"
            )
    return names


def identify_router(where: Mapping[str, Path], names: Sequence[str]) -> RouterIdentity:
    """The identity of routers, of whose tensors only one is in memory at a time.

    Args:
        where: tensor name -> shard.
        names: of the routers' tensors, in layer order.
    """
    values, stored = hashlib.sha256(), hashlib.sha256()
    sample: list[float] = []
    for name in names:
        tensor = read_tensor(where[name], name).contiguous().view(-1)
        stored.update(tensor.view(torch.uint8).numpy().tobytes())
        tensor = tensor.float()
        values.update(tensor.numpy().tobytes())
        count = min(max(OF_A_TENSOR, SAMPLE // len(names)), tensor.numel())
        at = (2 * torch.arange(count) + 1) * tensor.numel() // max(1, 2 * count)
        sample += tensor[at].tolist()
    return RouterIdentity(values.hexdigest(), stored.hexdigest(), tuple(sample))


def differ_by_rounding(one: Any, two: Any) -> bool:
    """Whether two samples could be of one router, stored in two dtypes.

    They are near each other, and rounding one of them to a 16-bit dtype gives the other: a router
    that was trained on, or scaled a little, is near as well.
    """
    if not (isinstance(one, list) and isinstance(two, list) and len(one) == len(two) > 0):
        return False
    if not all(isinstance(value, float | int) for value in one + two):
        return False
    if not all(
        math.isclose(a, b, rel_tol=ROUNDING, abs_tol=LEAST) for a, b in zip(one, two, strict=True)
    ):
        return False
    first, second = (torch.tensor(values, dtype=torch.float32) for values in (one, two))
    return any(
        float((fine.to(dtype).float() == coarse).float().mean()) >= EXACT
        for dtype in (torch.bfloat16, torch.float16)
        for fine, coarse in ((first, second), (second, first))
    )
