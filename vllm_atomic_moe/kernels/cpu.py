"""The CPU backend: weights in tiles, prepacked once, and a C++ library (cpu_experts.cpp).

One flat tensor holds the experts one after another, each padded to an even number of atoms with
zeros, which is all the padding there is. The layout of an expert is described in the C++ file; it
serves AVX-512 and AMX alike. `python -m vllm_atomic_moe.kernels.cpu` builds the libraries ahead.

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

from vllm_atomic_moe.kernels import cpu_library
from vllm_atomic_moe.kernels.cpu_library import VariantError

logger = logging.getLogger(__name__)

DTYPES = (torch.bfloat16, torch.float32)
PROJECTION_INDEX = {"gate": 0, "up": 1, "down": 2}


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run there, or None. The first call compiles the library."""
    if device.type != "cpu":
        return f"the device is {device.type}"
    if dtype not in DTYPES:
        return f"it computes in bfloat16 and float32, not in {str(dtype).removeprefix('torch.')}"
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The fastest library that works here, or why none does."""
    flags = cpu_library.cpu_flags()
    variants = [variant for variant in cpu_library.VARIANTS if variant.cpu_flags <= flags]
    reasons = []
    for variant in variants:
        try:
            if variant.name == "amx" and not torch.cpu._init_amx():
                raise VariantError("the operating system does not grant AMX")
            library = cpu_library.open_library(cpu_library.build(variant))
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
            raise ValueError(f"hidden size {hidden_size} is odd, the cpu backend needs an even one")
        numel = 3 * hidden_size * int(_padded_offsets(offsets_E1)[-1])
        packed = torch.empty(numel, dtype=dtype, device=device)
        if packed.device.type == "cpu":
            _advise_huge_pages(packed)
        return {
            "packed": packed,
            "offsets": offsets_E1.to(device, copy=True),
        }

    def write(
        self,
        weights: Sequence[torch.Tensor],
        offsets_E1: torch.Tensor,
        expert: int,
        projection: str,
        rows_SH: torch.Tensor,
        atoms_F: torch.Tensor,
    ) -> None:
        """Put rows_SH[atoms_F] where the expert's `projection` lies.

        Args:
            weights: as allocated, on the CPU.
            offsets_E1: int64 [E+1], first packed row of every expert.
            expert: 0..E-1.
            projection: gate, up or down (of which the rows are the columns of down_proj).
            rows_SH: any float dtype, device and strides.
            atoms_F: int64 [F], indices into rows_SH.
        """
        packed, offsets = weights
        offsets.copy_(offsets_E1)  # a meta tensor of the allocation had nothing to keep
        first_atom = int(_padded_offsets(offsets_E1)[expert])
        if rows_SH.dtype != packed.dtype or rows_SH.device.type != "cpu":
            rows_SH = rows_SH.index_select(0, atoms_F.to(rows_SH.device)).to("cpu", packed.dtype)
            atoms_F = torch.arange(len(rows_SH), device="cpu")
        threads = torch.get_num_threads()
        _pack(_library(), packed, first_atom, projection, rows_SH, atoms_F, threads)


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
    threads = torch.get_num_threads()
    return _compute(_library(), x_TH, weights, runs_ER2, topk_weights_TK, topk_ids_TK, threads)


def _library() -> ctypes.CDLL:
    loaded = _load()
    assert not isinstance(loaded, str), f"chosen without asking `unavailable`: {loaded}"
    return loaded


def _pack(
    library: ctypes.CDLL,
    packed: torch.Tensor,
    first_atom: int,
    projection: str,
    rows_SH: torch.Tensor,
    atoms_F: torch.Tensor,
    threads: int,
) -> None:
    if projection != "down" and rows_SH.stride(1) != 1:
        rows_SH = rows_SH.contiguous()
    atoms_F, hidden_size = atoms_F.contiguous(), rows_SH.shape[1]
    library.atomic_moe_pack(
        packed.data_ptr() + 3 * first_atom * hidden_size * packed.element_size(),
        PROJECTION_INDEX[projection],
        rows_SH.data_ptr(),
        *rows_SH.stride(),
        atoms_F.data_ptr(),
        len(atoms_F),
        hidden_size,
        packed.dtype == torch.bfloat16,
        threads,
    )


def _compute(
    library: ctypes.CDLL,
    x_TH: torch.Tensor,
    weights: Sequence[torch.Tensor],
    runs_ER2: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    threads: int,
) -> torch.Tensor:
    packed, offsets_E1 = weights
    assert x_TH.dtype == packed.dtype, f"x is {x_TH.dtype}, the weights are {packed.dtype}"
    # Named, so that what had to be copied lives until the call returns.
    x_TH, runs_ER2 = x_TH.contiguous(), runs_ER2.contiguous()
    topk_weights_TK = topk_weights_TK.float().contiguous()
    topk_ids_TK = topk_ids_TK.long().contiguous()
    out_TH = torch.empty_like(x_TH)
    library.atomic_moe_fused_experts(
        x_TH.data_ptr(),
        packed.data_ptr(),
        offsets_E1.data_ptr(),
        runs_ER2.data_ptr(),
        topk_weights_TK.data_ptr(),
        topk_ids_TK.data_ptr(),
        out_TH.data_ptr(),
        x_TH.shape[0],
        topk_ids_TK.shape[1],
        runs_ER2.shape[0],
        runs_ER2.shape[1],
        x_TH.shape[1],
        x_TH.dtype == torch.bfloat16,
        threads,
    )
    return out_TH


def _check(library: ctypes.CDLL) -> None:
    """Compare a small problem with plain PyTorch; a compiler may be wrong, and so may an emulator.

    One thread: a process that forks later must not own a pool of threads yet.

    Raises:
        VariantError: they differ.
    """
    widths, hidden_size, tokens = (75, 0, 34), 88, 7
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        offsets_E1 = torch.tensor([0, *widths]).cumsum(0)
        runs_ER2 = torch.tensor([[[3, 40], [50, 20]], [[75, 0], [0, 0]], [[75, 34], [0, 0]]])
        ids_TK = torch.arange(2 * tokens).view(tokens, 2) % 4 - 1
        rows = torch.randn(3, 109, hidden_size, generator=generator) / 9
        x_TH = torch.randn(tokens, hidden_size, generator=generator)
        topk_weights_TK = torch.rand(tokens, 2, generator=generator)
        for dtype, tolerance in ((torch.bfloat16, 2e-2), (torch.float32, 1e-5)):
            weights = list(STORAGE.allocate(offsets_E1, hidden_size, dtype, None).values())
            first_atoms = _padded_offsets(offsets_E1).tolist()
            for expert, width in enumerate(widths):
                atoms_F = torch.arange(width) + offsets_E1[expert]
                for projection, index in PROJECTION_INDEX.items():
                    source = rows[index].to(dtype)
                    _pack(library, weights[0], first_atoms[expert], projection, source, atoms_F, 1)
            found_TH = _compute(
                library, x_TH.to(dtype), weights, runs_ER2.int(), topk_weights_TK, ids_TK, 1
            )
            gate, up, down = rows.to(dtype).float()
            x = x_TH.to(dtype).float()
            h_TP = torch.nn.functional.silu(x @ gate.t()) * (x @ up.t())
            wanted_TH = torch.zeros(tokens, hidden_size)
            for expert, runs in enumerate(runs_ER2.tolist()):
                weights_T1 = (topk_weights_TK * (ids_TK == expert)).sum(1, keepdim=True)
                for first, length in runs:
                    run = slice(first, first + length)
                    wanted_TH += weights_T1 * (h_TP[:, run] @ down[run])
            error = float((found_TH - wanted_TH).norm() / wanted_TH.norm())
            if not error <= tolerance:
                raise VariantError(f"its self-check failed: relative error {error:.1e} in {dtype}")


def _padded_offsets(offsets_E1: torch.Tensor) -> torch.Tensor:
    """First atom of every expert where each is padded to an even number of atoms: int64 [E+1]."""
    padded_E = (offsets_E1.diff() + 1) // 2 * 2
    return torch.cat([padded_E.new_zeros(1), padded_E.cumsum(0)])


def _advise_huge_pages(tensor: torch.Tensor) -> None:
    """Ask for 2 MiB pages, before the first write: reading weights then misses the TLB less."""
    page = 2 << 20
    start = -(-tensor.data_ptr() // page) * page
    size = tensor.data_ptr() + tensor.nbytes - start
    if size > 0:  # only advice: what the kernel answers does not matter
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)


def main() -> int:
    """Build the library of every variant, so that no compiler is needed later."""
    for variant in cpu_library.VARIANTS:
        try:
            print(cpu_library.build(variant))
        except VariantError as reason:
            print(f"{variant.name}: {reason}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
