"""The CPU backend: weights in tiles, prepacked once, and a C++ library (experts.cpp).

One flat tensor holds the experts one after another, each padded to an even number of atoms with
zeros; behind the last one stand 64 bytes that vectors may read. That is all the padding there is.
experts.cpp describes the layout of an expert; every instruction set shares it. `python -m
vllm_atomic_moe.experts.backends.cpu` builds the libraries ahead.

Legend: T tokens, K experts per token, E experts, H hidden size, S stored rows, F atoms of an
expert, W words.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import mmap
from collections.abc import Sequence

import torch

from vllm_atomic_moe.experts.activation import SILU
from vllm_atomic_moe.experts.backends import reference
from vllm_atomic_moe.experts.backends.cpu import library as cpu_library
from vllm_atomic_moe.experts.backends.cpu.library import Library, VariantError
from vllm_atomic_moe.experts.formats import PLAIN, Code, RowFormat
from vllm_atomic_moe.experts.packing import (
    PROJECTIONS,
    Projection,
    build_layout,
    projections_of,
    with_slots,
)

CODES: frozenset[Code] = frozenset({"plain"})

logger = logging.getLogger(f"vllm.{__name__}")


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run there, or None. The first call compiles the library."""
    if device.type != "cpu":
        return f"the device is {device.type}"
    if dtype not in cpu_library.DTYPES:
        return f"{dtype} weights, not bfloat16, float16 or float32"
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


@functools.cache
def _load() -> Library | str:
    """The fastest library that works here, or why none does."""
    reasons = []
    for variant in cpu_library.usable_variants():
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
    return reasons[-1] if reasons else "the processor has neither AVX2 with FMA and F16C nor NEON"


class TiledStorage:
    """Packed rows in tiles: one tensor "packed" of 3 · H · padded P numbers and 64 bytes.

    Without a gate it is 2 · H · padded P.
    """

    def allocate(
        self,
        offsets_E1: torch.Tensor,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device | None,
        gated: bool = True,
        row_format: RowFormat = PLAIN,
    ) -> dict[str, torch.Tensor]:
        """Uninitialized weights; `write` fills an expert's padding too. Plain rows only (CODES).

        Raises:
            ValueError: the hidden size is odd.
        """
        assert row_format.plain, f"chosen for rows of {row_format.code}, which it does not read"
        if hidden_size % 2:
            raise ValueError(
                f"hidden size {hidden_size} is odd, the kernel `cpu` needs an even one; "
                "choose the kernel `reference`"
            )
        numel = (
            len(projections_of(gated)) * hidden_size * _first_atom(offsets_E1, len(offsets_E1) - 1)
        )
        slack = cpu_library.SLACK_BYTES // dtype.itemsize
        packed = torch.empty(numel + slack, dtype=dtype, device=device)
        if packed.device.type == "cpu":
            _advise_huge_pages(packed)
        packed[numel:] = 0
        return {"packed": packed}

    def write(
        self,
        weights: Sequence[torch.Tensor],
        offsets_E1: torch.Tensor,
        expert: int,
        projection: Projection,
        rows_SH: torch.Tensor,
        atoms_F: torch.Tensor,
        gated: bool = True,
        row_format: RowFormat = PLAIN,
    ) -> None:
        """See `Storage`; the weights are on the CPU."""
        packed = weights[0]
        first_atom = _first_atom(offsets_E1, expert)
        if rows_SH.dtype != packed.dtype or rows_SH.device.type != "cpu":
            rows_SH = rows_SH.index_select(0, atoms_F.to(rows_SH.device)).to("cpu", packed.dtype)
            atoms_F = torch.arange(len(rows_SH), device="cpu")
        threads = torch.get_num_threads()
        _library().pack(packed, first_atom, projection, rows_SH, atoms_F, threads, gated)


STORAGE = TiledStorage()


def fused_experts(
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
    """Arguments and result as those of the op; the same bits for any number of threads."""
    return _library().fused_experts(
        x_TH,
        weights[0],
        bits_SW,
        words_E1,
        offsets_E1,
        topk_weights_TK,
        topk_ids_TK,
        torch.get_num_threads(),
        biases,
        activation,
    )


def _library() -> Library:
    loaded = _load()
    assert not isinstance(loaded, str), f"chosen without asking `unavailable`: {loaded}"
    return loaded


def _check(library: Library) -> None:
    """Compare a small problem with the reference: a compiler may be wrong, and so may an emulator.

    Nothing follows torch's default device and dtype, which are the model's while it is loaded.

    Raises:
        VariantError: they differ.
    """
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        rows_3PH = torch.randn(3, 109, 88, generator=generator, dtype=torch.float32) / 9
        widths = (75, 0, 34)  # an odd width, none, a narrow tile
        keep_EI = torch.arange(75) < torch.tensor(widths)[:, None]
        layout = build_layout({"all": keep_EI, "some": keep_EI & (torch.arange(75) % 37 > 20)})
        index = layout.slot_bits(), layout.words_E1, layout.offsets_E1
        slots_T1 = torch.arange(40, dtype=torch.int32)[:, None] % 2
        ids_TK = with_slots(torch.arange(80).view(40, 2) % 4 - 1, slots_T1)  # enough for AMX
        x_TH, topk_weights_TK = 9 * rows_3PH[0, :40], rows_3PH[1, :40, :2].abs()
        for dtype, tolerance in (
            (torch.bfloat16, 2e-2),
            (torch.float16, 2e-3),
            (torch.float32, 1e-5),
        ):
            rounded_3PH, x = rows_3PH.to(dtype), x_TH.to(dtype)
            packed = TiledStorage().allocate(layout.offsets_E1, 88, dtype, None)["packed"]
            for expert in range(len(widths)):
                first_atom = _first_atom(layout.offsets_E1, expert)
                atoms_F = torch.arange(*layout.offsets_E1[expert : expert + 2].tolist())
                for projection, rows_PH in zip(PROJECTIONS, rounded_3PH, strict=True):
                    library.pack(packed, first_atom, projection, rows_PH, atoms_F, 1)
            found_TH = library.fused_experts(x, packed, *index, topk_weights_TK, ids_TK, 1)
            wanted_TH = reference.fused_experts(
                x,
                rounded_3PH.float().unbind(),
                [],
                [],
                *index,
                topk_weights_TK,
                ids_TK,
                max(widths),
                SILU.spec,
                PLAIN.spec,
            ).float()
            error = float((found_TH.float() - wanted_TH).norm() / wanted_TH.norm())
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
