"""The CPU backend: weights in tiles, packed once, and a C++ library (experts.cpp).

One flat tensor holds the experts one after another, each padded with zeros to an even number of
atoms. 64 bytes follow the last expert, which vector loads may read. Codes have the
layout of weights, two 4-bit codes per byte along the summed dimension; scales stay in their tables.
experts.cpp describes the layout of an expert, the same for every instruction set.
`python -m vllm_atomic_moe.experts.backends.cpu` builds the libraries ahead.

Legend: T tokens, K experts per token, E experts, H hidden size, S stored rows, F atoms of an
expert, W words.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import logging
import mmap
from collections.abc import Sequence

import torch

from vllm_atomic_moe.experts.activation import SILU
from vllm_atomic_moe.experts.backends import reference
from vllm_atomic_moe.experts.backends.cpu import library as cpu_library
from vllm_atomic_moe.experts.backends.cpu.arguments import SLACK_BYTES, bits_of, tensors_of
from vllm_atomic_moe.experts.backends.cpu.library import Library, VariantError
from vllm_atomic_moe.experts.formats import Encoded
from vllm_atomic_moe.experts.packing import PackedExperts, build_layout, with_slots
from vllm_atomic_moe.files.row_formats import PLAIN, PROJECTIONS, Block, Projection, RowFormat

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
    """The fastest library that works here, or the reason why none does."""
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

    Without a gate it is 2 · H · padded P. A byte holds one 8-bit code or two 4-bit codes. If down
    is plain beside codes, it has a second tensor, "down".
    """

    def __init__(self, library: Library | None = None) -> None:
        """`library` packs; None means the fastest that works here."""
        self._library = library

    def allocate(
        self,
        offsets_E1: torch.Tensor,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device | None,
        gated: bool = True,
        row_format: RowFormat = PLAIN,
    ) -> dict[str, torch.Tensor]:
        """Uninitialized weights; `write` also fills an expert's padding.

        Raises:
            ValueError: the hidden size is odd.
        """
        if hidden_size % 2:
            raise ValueError(
                f"hidden size {hidden_size} is odd, the kernel `cpu` needs an even one; "
                "choose the kernel `reference`"
            )
        atoms, found = _first_atom(offsets_E1, len(offsets_E1) - 1), {}
        for name, (stored, projections) in tensors_of(gated, row_format).items():
            kind = dtype if stored.plain else torch.uint8
            bits = bits_of(stored, kind)
            numel = projections * hidden_size * atoms * bits // (8 * kind.itemsize)
            slack = SLACK_BYTES // kind.itemsize
            found[name] = torch.empty(numel + slack, dtype=kind, device=device)
            if found[name].device.type == "cpu":
                _advise_huge_pages(found[name])
            found[name][numel:] = 0
        return found

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
        packed = weights[-1 if projection == "down" else 0]
        first_atom = _first_atom(offsets_E1, expert)
        if rows_SH.dtype != packed.dtype or rows_SH.device.type != "cpu":
            rows_SH = rows_SH.index_select(0, atoms_F.to(rows_SH.device)).to("cpu", packed.dtype)
            atoms_F = torch.arange(len(rows_SH), device="cpu")
        library, threads = self._library or _library(), torch.get_num_threads()
        library.pack(packed, first_atom, projection, rows_SH, atoms_F, threads, gated, row_format)


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
        scales,
        rows,
        *weights[1:],
    )


def _library() -> Library:
    loaded = _load()
    assert not isinstance(loaded, str), f"chosen without asking `unavailable`: {loaded}"
    return loaded


# Of the self-check's relative errors.
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-5}
# Formats of the self-check: plain weights, codes of both sizes in blocks of 16 atoms, and both.
_CHECKED = (
    PLAIN,
    RowFormat("e4m3", Block(16, 32), Block(16, 32)),
    RowFormat("e2m1", Block(1, 16), Block(16, 1), torch.float8_e4m3fn),
    RowFormat("e4m3", Block(16, 32), plain_down=True),
)


def _check(library: Library) -> None:
    """Compare a small problem with the reference: compilers and emulators can be wrong.

    It ignores torch's default device and dtype, which are the model's while it loads.

    Raises:
        VariantError: they differ.
    """
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        rows_3IH = torch.randn(3, 75, 88, generator=generator, dtype=torch.float32) / 9
        widths = (75, 0, 34)  # an odd width, none, a narrow tile
        keep_EI = torch.arange(75) < torch.tensor(widths)[:, None]
        layout = build_layout({"all": keep_EI, "some": keep_EI & (torch.arange(75) % 37 > 20)})
        slots_T1 = torch.arange(40, dtype=torch.int32)[:, None] % 2
        ids_TK = with_slots(torch.arange(80).view(40, 2) % 4 - 1, slots_T1)  # enough for AMX
        x_TH, topk_weights_TK = 9 * rows_3IH[0, :40], rows_3IH[1, :40, :2].abs()
        for dtype, row_format in itertools.product(cpu_library.DTYPES, _CHECKED):
            found, wanted = (
                PackedExperts(layout, 88, dtype, storage=storage, row_format=row_format)
                for storage in (TiledStorage(library), reference.STORAGE)
            )
            for experts in (found, wanted):
                for expert, projection in itertools.product(range(len(widths)), PROJECTIONS):
                    rows_IH = rows_3IH[PROJECTIONS.index(projection)]
                    encoded = _encoded(rows_IH, row_format, projection)
                    experts.load_encoded(expert, projection, encoded)
            for tokens in (40, 3):
                x, ids, weights = x_TH[:tokens].to(dtype), ids_TK[:tokens], topk_weights_TK[:tokens]
                found_TH = library.fused_experts(
                    x,
                    found.weights[0],
                    *found.index,
                    weights,
                    ids,
                    1,
                    scales=found.scales,
                    rows=row_format.spec,
                    down=found.weights[1] if row_format.plain_down else None,
                ).float()
                wanted_TH = reference.fused_experts(
                    x,
                    wanted.weights,
                    wanted.scales,
                    [],
                    *wanted.index,
                    weights,
                    ids,
                    wanted.widest,
                    SILU.spec,
                    row_format.spec,
                ).float()
                error = float((found_TH - wanted_TH).norm() / wanted_TH.norm())
                if not error <= _TOLERANCE[dtype]:
                    raise VariantError(
                        f"its self-check failed: relative error {error:.1e} in {dtype}"
                    )


def _encoded(rows_IH: torch.Tensor, row_format: RowFormat, projection: Projection) -> Encoded:
    """Codes and scales derived from the numbers; plain rows unchanged."""
    if row_format.of(projection).plain:
        return Encoded(rows_IH)
    atoms, columns = row_format.block(projection)
    codes_IH = (rows_IH.abs() * 1000).to(torch.uint8) % (120 if row_format.bits == 8 else 16)
    codes_IH += (rows_IH < 0).to(torch.uint8) * (128 if row_format.bits == 8 else 0)
    scales_GC = rows_IH[::atoms, ::columns].abs() / 99
    return Encoded(codes_IH, scales_GC.to(row_format.scale))


def _first_atom(offsets_E1: torch.Tensor, expert: int) -> int:
    """Number of atoms before an expert; each expert is padded to an even number."""
    odd_widths = offsets_E1[: expert + 1].diff() % 2
    return int(offsets_E1[expert] + odd_widths.sum())


def _advise_huge_pages(tensor: torch.Tensor) -> None:
    """Ask for 2 MiB pages before the first write, for fewer TLB misses when reading weights."""
    page = 2 << 20
    start = -(-tensor.data_ptr() // page) * page
    size = tensor.data_ptr() + tensor.nbytes - start
    if size > 0:  # only advice: the kernel's answer does not matter
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)
