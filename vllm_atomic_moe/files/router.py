"""The routers of a checkpoint: they identify the model and limit its routing masks.

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

# Inside an MoE block: modules of the router, and the correction bias if it is elsewhere.
ROUTER_MODULES = (
    "gate.",
    "router.",
    "moe_statics.",
    "e_score_correction_bias",
    "experts.e_score_correction_bias",
    "expert_bias",
    "router_bias",
)
# Includes the correction bias: it affects the choice of experts, not their weights.
CORRECTION_BIAS = ("e_score_correction_bias", "expert_bias", "router_bias")
# DeepSeek-V4's table of hash routing: the experts of every token.
EXPERTS_OF_TOKENS = ".tid2eid"
# Sampled values of all routers together, and at least of one tensor.
SAMPLE, OF_A_TENSOR = 64, 8
# Twice the rounding of bfloat16, the coarsest of plain dtypes; and the least of float16.
ROUNDING, LEAST = 2**-7, 2**-24
# Fraction of values that rounding must explain exactly; a few may have been rounded twice.
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
        """Why a routing mask leaves too few experts, in words; None if every choice is valid.

        Groups without routable experts score lowest, so that they are chosen only if fewer than
        `chosen` others exist. A choice of groups with fewer than K routable experts is invalid (the
        rest would be pruned ones), and so is a group with a pruned expert in its score.
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
    """The groups that vLLM's routers use; None if they choose among all experts.

    Args:
        number: of groups, as configured; fewer than two, or a number that does not divide E, means
            no groups (as in vLLM's `GroupedTopKRouter`).
        chosen: groups a token may use, as configured.
        biased: whether the router has a correction bias.
        num_experts: E.

    Raises:
        ValueError: no router can use them.
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
    """The identity of a model's routers.

    Attributes:
        sha256: SHA-256 (hex) of their values in float32, in layer order: copies of a model in
            other dtypes that hold its values are the same model.
        stored_sha256: of their bytes as stored, for profiles of version 0.1.
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
        ValueError: a layer has no known router.
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
    """The identity of routers; holds one tensor in memory at a time.

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
    """Whether two samples could be of the same router in two dtypes.

    They must be near each other, and rounding one of them to a 16-bit dtype must give the other: a
    router after further training or slight scaling is also near.
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
