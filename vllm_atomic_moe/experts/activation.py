"""What an expert computes between its projections: one family, described by a kind and numbers.

    h = f(gate·x + gate bias, up·x + up bias), or without a gate f(up·x + up bias)

Kernels get it as a string (`Activation.spec`), since operators take no objects.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal, Self, get_args

import torch
from torch.nn import functional

Kind = Literal["swish", "gelu_tanh", "swiglustep", "situ", "relu2"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True)
class Activation:
    """An activation; g and u are the outputs of gate and up.

    swish       ĝ · σ(alpha·ĝ) · (û + beta), ĝ at most `limit`, û within ± `limit`. SiLU by default;
                gpt-oss has limit 7, alpha 1.702, beta 1
    gelu_tanh   GELU(g), by tanh, · u
    swiglustep  SiLU(g), at most `limit`, · u within ± `limit`
    situ        alpha·tanh(g / alpha) · σ(g) · u; with beta > 0 u is beta·tanh(u / beta)
    relu2       max(u, 0)², without a gate

    Attributes:
        kind: one of KINDS.
        limit: infinite if there is none.
        alpha, beta: as the kind says.
    """

    kind: Kind = "swish"
    limit: float = math.inf
    alpha: float = 1.0
    beta: float = 0.0

    @property
    def gated(self) -> bool:
        """Whether there is a gate_proj."""
        return self.kind != "relu2"

    @property
    def spec(self) -> str:
        """What `parse` reads."""
        return f"{self.kind}:{self.limit!r}:{self.alpha!r}:{self.beta!r}"

    @classmethod
    @functools.cache
    def parse(cls, spec: str) -> Self:
        """The activation of a spec."""
        kind, *numbers = spec.split(":")
        assert kind in KINDS, f"activation {kind!r} is none of {KINDS}"
        return cls(kind, *map(float, numbers))

    def __call__(self, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
        """h of float tensors of one shape; `gate` is None if there is none."""
        if gate is None:
            return functional.relu(up).square()
        if self.kind == "swish":
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
            return gate * torch.sigmoid(self.alpha * gate) * (up + self.beta)
        if self.kind == "gelu_tanh":
            return functional.gelu(gate, approximate="tanh") * up
        if self.kind == "swiglustep":
            return functional.silu(gate).clamp(max=self.limit) * up.clamp(-self.limit, self.limit)
        if self.beta > 0:
            up = self.beta * torch.tanh(up / self.beta)
        return self.alpha * torch.tanh(gate / self.alpha) * torch.sigmoid(gate) * up


SILU = Activation()
