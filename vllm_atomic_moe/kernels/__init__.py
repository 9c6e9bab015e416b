"""Fused experts over packed rows: one opaque custom op, `torch.ops.atomic_moe.fused_experts`.

The op is what the serving layer calls and what compilers see; it has a fake implementation, so that
graphs trace through it without looking inside. Behind it stand backends, chosen once at load by
`choose_backend`; each is a module of this package with the names of `BackendModule`, imported when
it is first asked for. Importable without vLLM.

Legend: T tokens, K experts per token, E experts, H hidden size, P packed rows, R runs per expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Protocol, cast

import torch

from vllm_atomic_moe.packing import Storage

# By device type, the fastest first; modules of this package. The reference runs everywhere, so that
# what stands behind it is taken only when named.
BACKENDS: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("triton", "reference", "triton_deterministic"),
}


class BackendModule(Protocol):
    """What a backend's module holds.

    Attributes:
        STORAGE: the order in which it keeps the packed rows.
    """

    STORAGE: Storage

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot run there, as half a sentence; None where it can. May compile."""

    def fused_experts(
        self,
        x_TH: torch.Tensor,
        weights: Sequence[torch.Tensor],
        runs_ER2: torch.Tensor,
        topk_weights_TK: torch.Tensor,
        topk_ids_TK: torch.Tensor,
        widest: int,
    ) -> torch.Tensor:
        """As the op of this name, into a new tensor."""


@dataclass(frozen=True, slots=True)
class Backend:
    """The backend that was chosen.

    Attributes:
        name: the op's last argument.
        reason: why this one, for the log.
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
        if reason is None:
            fastest = f"the fastest on {device.type}"
            return Backend(name, "; ".join(passed_over) or fastest, fallback=bool(passed_over))
        passed_over.append(f"not {name}: {reason}")
    raise AssertionError("the reference runs everywhere")


def _fused_experts(
    x_TH: torch.Tensor,
    weights: Sequence[torch.Tensor],
    runs_ER2: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    widest: int,
    backend: str,
) -> torch.Tensor:
    """Sum over a token's experts of weight · down(SiLU(gate x) ⊙ (up x)), experts of any width.

    Args:
        x_TH: activations, [T, H].
        weights: packed rows of x's dtype, as the backend's storage keeps them
            (`PackedExperts.weights`).
        runs_ER2: int32 [E, R, 2], (first row, number of rows) of the rows each expert uses.
        topk_weights_TK: router weights, [T, K], any float dtype.
        topk_ids_TK: expert ids, integer [T, K]; a negative id, or one beyond E, is skipped.
        widest: rows of the widest expert: an upper bound on what `runs_ER2` ever says.
        backend: name of the chosen `Backend`.

    Returns:
        [T, H] in x's dtype, accumulated in float32. Experts without rows contribute zero.
    """
    return backend_module(backend).fused_experts(
        x_TH, weights, runs_ER2, topk_weights_TK, topk_ids_TK, widest
    )


# Not `torch.library.custom_op`: its wrappers take longer than a small layer's routing.
torch.library.define(
    "atomic_moe::fused_experts", torch.library.infer_schema(_fused_experts, mutates_args=())
)
torch.library.impl("atomic_moe::fused_experts", "CompositeExplicitAutograd", _fused_experts)


@torch.library.register_fake("atomic_moe::fused_experts")
def _(x_TH, weights, runs_ER2, topk_weights_TK, topk_ids_TK, widest, backend):  # type: ignore[no-untyped-def]
    return torch.empty_like(x_TH, memory_format=torch.contiguous_format)


fused_experts = torch.ops.atomic_moe.fused_experts.default
