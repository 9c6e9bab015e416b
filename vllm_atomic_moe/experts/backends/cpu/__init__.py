"""The CPU backend: weights in tiles, prepacked once, and a C++ library (cpu_experts.cpp).

One flat tensor holds the experts one after another, each padded to an even number of atoms with
zeros, which is all the padding there is. The C++ file describes the layout of an expert; AVX-512
and AMX share it. `python -m vllm_atomic_moe.experts.backends.cpu` builds the libraries ahead.

Legend: T tokens, K experts per token, E experts, H hidden size, P packed rows, R runs per expert,
S stored rows, F atoms of an expert.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import mmap
import sys
from collections.abc import Sequence

import torch
from torch.nn import functional

from vllm_atomic_moe.experts.backends.cpu import library as cpu_library
from vllm_atomic_moe.experts.backends.cpu.library import Library, VariantError
from vllm_atomic_moe.experts.packing import PROJECTIONS, Projection

logger = logging.getLogger(f"vllm.{__name__}")


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run there, or None. The first call compiles the library."""
    if device.type != "cpu":
        return f"the device is {device.type}"
    if dtype not in cpu_library.DTYPES:
        return f"it computes in bfloat16 and float32, not in {str(dtype).removeprefix('torch.')}"
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


@functools.cache
def _load() -> Library | str:
    """The fastest library that works here, or why none does."""
    flags = cpu_library.cpu_flags()
    variants = [variant for variant in cpu_library.VARIANTS if variant.cpu_flags <= flags]
    reasons = []
    for variant in variants:
        try:
            if variant.name == "amx" and not torch.cpu._init_amx():
                raise VariantError("the operating system does not grant AMX")
            library = cpu_library.load(variant)
            _check(library)
        except VariantError as reason:
            logger.warning("Expert kernels for %s are not used: %s", variant.name, reason)
            reasons.append(str(reason))
            continue
        logger.info("Expert kernels: %s", variant.name)
        return library
    return reasons[-1] if reasons else "the processor has no AVX-512"


class TiledStorage:
    """Packed rows in tiles: the weights "packed" [3 · padded P · H] and "offsets" [E+1]."""

    def allocate(
        self,
        offsets_E1: torch.Tensor,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device | None,
    ) -> dict[str, torch.Tensor]:
        """Uninitialised weights; `write` fills an expert's padding too.

        Raises:
            ValueError: the hidden size is odd.
        """
        if hidden_size % 2:
            raise ValueError(
                f"hidden size {hidden_size} is odd, the kernel `cpu` needs an even one; "
                "choose the kernel `reference`"
            )
        numel = 3 * hidden_size * _first_atom(offsets_E1, len(offsets_E1) - 1)
        packed = torch.empty(numel, dtype=dtype, device=device)
        if packed.device.type == "cpu":
            _advise_huge_pages(packed)
        return {"packed": packed, "offsets": offsets_E1.to(packed.device, copy=True)}

    def write(
        self,
        weights: Sequence[torch.Tensor],
        offsets_E1: torch.Tensor,
        expert: int,
        projection: Projection,
        rows_SH: torch.Tensor,
        atoms_F: torch.Tensor,
    ) -> None:
        """See `Storage`; the weights are on the CPU."""
        packed = weights[0]
        first_atom = _first_atom(offsets_E1, expert)
        if rows_SH.dtype != packed.dtype or rows_SH.device.type != "cpu":
            rows_SH = rows_SH.index_select(0, atoms_F.to(rows_SH.device)).to("cpu", packed.dtype)
            atoms_F = torch.arange(len(rows_SH), device="cpu")
        threads = torch.get_num_threads()
        _library().pack(packed, first_atom, projection, rows_SH, atoms_F, threads)


STORAGE = TiledStorage()


def fused_experts(
    x_TH: torch.Tensor,
    weights: Sequence[torch.Tensor],
    runs_ER2: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    widest: int,
) -> torch.Tensor:
    """Arguments and result as in `kernels.fused_experts`; the same for any number of threads."""
    packed, offsets_E1 = weights
    return _library().fused_experts(
        x_TH,
        packed,
        offsets_E1,
        runs_ER2,
        topk_weights_TK,
        topk_ids_TK,
        torch.get_num_threads(),
    )


def _library() -> Library:
    loaded = _load()
    assert not isinstance(loaded, str), f"chosen without asking `unavailable`: {loaded}"
    return loaded


def _check(library: Library) -> None:
    """Compare a small problem with plain PyTorch: a compiler may be wrong, and so may an emulator.

    Nothing follows torch's default device and dtype, which are the model's while it is loaded.

    Raises:
        VariantError: they differ.
    """
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        rows_3PH = torch.randn(3, 109, 88, generator=generator, dtype=torch.float32) / 9
        offsets_E1 = torch.tensor([0, 75, 75, 109])  # an odd width, none, a narrow tile
        runs_ER2 = torch.tensor([[[3, 40], [50, 20]], [[75, 0], [0, 0]], [[75, 34], [0, 0]]]).int()
        topk_ids_TK = torch.arange(80).view(40, 2) % 4 - 1  # enough rows for AMX
        x_TH, topk_weights_TK = 9 * rows_3PH[0, :40], rows_3PH[1, :40, :2].abs()
        for dtype, tolerance in ((torch.bfloat16, 2e-2), (torch.float32, 1e-5)):
            rounded_3PH, x = rows_3PH.to(dtype), x_TH.to(dtype)
            packed = TiledStorage().allocate(offsets_E1, 88, dtype, None)["packed"]
            for expert in range(3):
                first_atom = _first_atom(offsets_E1, expert)
                atoms_F = torch.arange(*offsets_E1[expert : expert + 2].tolist())
                for projection, rows_PH in zip(PROJECTIONS, rounded_3PH, strict=True):
                    library.pack(packed, first_atom, projection, rows_PH, atoms_F, 1)
            found_TH = library.fused_experts(
                x, packed, offsets_E1, runs_ER2, topk_weights_TK, topk_ids_TK, 1
            )
            gate_PH, up_PH, down_PH = rounded_3PH.float()
            h_TP = functional.silu(x.float() @ gate_PH.t()) * (x.float() @ up_PH.t())
            wanted_TH = torch.zeros_like(x_TH)
            for expert, runs in enumerate(runs_ER2.tolist()):
                weights_T1 = (topk_weights_TK * (topk_ids_TK == expert)).sum(1, keepdim=True)
                for first, length in runs:
                    run = slice(first, first + length)
                    wanted_TH += weights_T1 * (h_TP[:, run] @ down_PH[run])
            error = float((found_TH - wanted_TH).norm() / wanted_TH.norm())
            if not error <= tolerance:
                raise VariantError(f"its self-check failed: relative error {error:.1e} in {dtype}")


def _first_atom(offsets_E1: torch.Tensor, expert: int) -> int:
    """How many atoms lie before an expert, each expert padded to an even number of them."""
    odd_widths = offsets_E1[: expert + 1].diff() % 2
    return int(offsets_E1[expert] + odd_widths.sum())


def _advise_huge_pages(tensor: torch.Tensor) -> None:
    """Ask for 2 MiB pages, before the first write: reading weights then misses the TLB less."""
    page = 2 << 20
    start = -(-tensor.data_ptr() // page) * page
    size = tensor.data_ptr() + tensor.nbytes - start
    if size > 0:  # only advice: what the kernel answers does not matter
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)


def main() -> int:
    """Build the library of every variant, so that no compiler is needed later.

    Returns:
        0, or 1 where none was built; an old compiler may not know the newest variant.
    """
    built = 0
    for variant in cpu_library.VARIANTS:
        try:
            print(cpu_library.build(variant))
            built += 1
        except VariantError as reason:
            print(f"{variant.name}: {reason}", file=sys.stderr)
    return 0 if built else 1


if __name__ == "__main__":
    sys.exit(main())
