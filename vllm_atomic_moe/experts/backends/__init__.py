"""The backends that compute packed experts, and the choice among them.

Each is a module of this package with the names of `BackendModule`, imported at its first use.
Importable without vLLM.

Legend: T tokens, K experts per token, E experts, H hidden size, S slots, W words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Protocol, cast

import torch

from vllm_atomic_moe.experts.packing import Storage

# Modules of this package by device type, the fastest first. The reference runs everywhere, so those
# after it are used only by name.
BACKENDS: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("triton", "reference", "triton_deterministic"),
}


class BackendModule(Protocol):
    """The names that a backend's module must have.

    Attributes:
        STORAGE: the order in which it keeps the packed rows.
    """

    STORAGE: Storage

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot run there, as a clause, or None. May compile."""

    def fused_experts(
        self,
        x_TH: torch.Tensor,
        weights: Sequence[torch.Tensor],
        scales: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor],
        bits_SW: torch.Tensor,
        words_E1: torch.Tensor,
        offsets_E1: torch.Tensor,
        topk_weights_TK: torch.Tensor,
        topk_ids_TK: torch.Tensor,
        widest: int,
        activation: str,
        rows: str,
    ) -> torch.Tensor:
        """Like the op of this name; returns a new tensor."""


@dataclass(frozen=True, slots=True)
class Backend:
    """The backend that was chosen.

    Attributes:
        name: the op's last argument.
        reason: why it was chosen, for the log.
        fallback: whether a faster one cannot run here.
    """

    name: str
    reason: str
    fallback: bool = False

    @property
    def storage(self) -> Storage:
        """How `PackedExperts` must keep its rows for it."""
        return backend_module(self.name).STORAGE


@cache
def backend_module(name: str) -> BackendModule:
    """The module of one backend, imported on first use."""
    return cast(BackendModule, import_module(f"{__name__}.{name}"))


def choose_backend(device: torch.device, dtype: torch.dtype, wanted: str | None = None) -> Backend:
    """The fastest backend that runs on `device` in `dtype`, or `wanted` and no other.

    Raises:
        ValueError: `wanted` is unknown, or cannot run there.
    """
    names = BACKENDS.get(device.type, ("reference",))
    if wanted is not None:
        if wanted not in names:
            raise ValueError(
                f"kernel {wanted!r} does not run on {device.type}; wanted one of {', '.join(names)}"
            )
        reason = backend_module(wanted).unavailable(device, dtype)
        if reason is not None:
            raise ValueError(
                f"kernel {wanted!r} cannot be used: {reason}; leave the option out to take "
                "what runs here"
            )
        return Backend(wanted, "as the options ask")
    passed_over: list[str] = []
    for name in names:
        reason = backend_module(name).unavailable(device, dtype)
        if reason is None and not passed_over:
            return Backend(name, f"the fastest on {device.type}")
        if reason is None:
            why = "; ".join(passed_over)
            slow = " (decoding takes 10 to 30 times as long)" if device.type == "cpu" else ""
            return Backend(name, f"{why}{slow}", fallback=True)
        passed_over.append(f"not {name}: {reason}")
    raise AssertionError("the reference runs everywhere")
