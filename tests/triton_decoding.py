"""Tiles of codes, as the Triton kernels load them, equal the reference's decoding.

For Triton's interpreter, which must be chosen before this is imported, and for GPUs.

Legend: P packed rows, E experts, H hidden size.
"""

from __future__ import annotations

import torch
import triton
from triton import language as tl

from vllm_atomic_moe.experts.backends.triton_rows import (
    load_factor,
    load_rows,
    rows_of,
    scale_rows,
)
from vllm_atomic_moe.experts.formats import stored_values
from vllm_atomic_moe.files.row_formats import Block, RowFormat

P, E, H = 40, 2, 96
# What kernels ask for: less and more than a block of scales, and than H.
TILES = (16, 64, 128)

PER_ROW, OF_32, OF_16 = Block(1, H), Block(1, 32), Block(1, 16)
DECODED = {
    "fp8": RowFormat("e4m3", PER_ROW, Block(1, 1)),
    "fp8 of blocks that no tile fits": RowFormat("e4m3", Block(128, 48), Block(128, 48)),
    "fp8, powers of two": RowFormat("e4m3", OF_32, OF_32, torch.float8_e8m0fnu),
    "int4": RowFormat("int4", OF_32, Block(32, 1), torch.bfloat16),
    "int4, zero points": RowFormat("uint4", OF_32, Block(32, 1), torch.float16, zeros=True),
    "mxfp4": RowFormat("e2m1", OF_32, Block(32, 1), torch.float8_e8m0fnu),
    "nvfp4, over": RowFormat("e2m1", OF_16, Block(16, 1), torch.float8_e4m3fn, factor="over"),
    "nvfp4, times": RowFormat("e2m1", OF_16, Block(16, 1), torch.float8_e4m3fn, factor="times"),
}


@triton.jit
def _decode_kernel(
    weights,
    out_ptr,  # [BLOCK_F, H]
    expert,
    num_rows,
    H: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    packed_f = tl.arange(0, BLOCK_F).to(tl.int64)
    kept_f = packed_f < num_rows
    rows_f = scale_rows(weights, packed_f, kept_f, expert)
    factor = load_factor(weights, expert)
    for start in range(0, H, BLOCK_H):
        tile_fh = load_rows(weights, packed_f, kept_f, rows_f, factor, start, H, DTYPE, BLOCK_H)
        columns_h = start + tl.arange(0, BLOCK_H)
        pointers_fh = out_ptr + packed_f[:, None] * H + columns_h[None, :]
        tl.store(pointers_fh, tile_fh, mask=kept_f[:, None] & (columns_h < H)[None, :])


def check_decoding(name: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Both kinds of projection, tiles of all sizes, values too small and too large for `dtype`."""
    row_format = DECODED[name]
    weights, scales = _random_rows(row_format, device)
    for expert in range(E):
        for which in range(2):
            rows_P = torch.arange(P, device=device)
            values = stored_values(weights, scales, which, row_format, expert, rows_P)
            rows = rows_of(weights, scales, [], row_format, H)[which]
            for size in TILES:
                found = torch.full((P, H), float("nan"), dtype=dtype, device=device)
                _decode_kernel[(1,)](rows, found, expert, P, H=H, BLOCK_F=64, BLOCK_H=size)
                torch.testing.assert_close(found, values.to(dtype), rtol=0, atol=0)


def _random_rows(
    row_format: RowFormat, device: str
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Codes and tables of up and down, finite."""
    generator = torch.Generator().manual_seed(0)
    weights, scales = [], []
    for block in (row_format.rows, row_format.columns):
        shared = block.atoms > 1
        groups, columns = 5 if shared else P, -(-H // block.columns)
        codes_PB = torch.randint(0, 256, (P, H * row_format.bits // 8), generator=generator)
        if row_format.code == "e4m3":
            codes_PB[codes_PB % 128 == 127] = 0  # not a number
        weights.append(codes_PB.to(torch.uint8))
        if row_format.scale.itemsize == 1:
            most = 127 if row_format.scale == torch.float8_e4m3fn else 255
            table = torch.randint(0, most, (groups, columns), generator=generator)
            table.view(-1)[:2] = torch.tensor([0, 1])
            table = table.to(torch.uint8).view(row_format.scale)
        else:
            table = torch.rand(groups, columns, generator=generator).to(row_format.scale)
        rows_P = torch.randint(0, groups - E + 1, (P if shared else 0,), generator=generator)
        firsts_E = torch.arange(E if shared else 0)
        zeros = torch.randint(0, 16, (groups, columns), generator=generator).to(torch.uint8)
        factors_E = torch.rand(E, generator=generator) * 3000
        scales += [
            table,
            rows_P.short(),
            firsts_E.int(),
            zeros if row_format.zeros else zeros[:0],
            factors_E if row_format.factor != "none" else factors_E[:0],
        ]
    return [tensor.to(device) for tensor in weights], [tensor.to(device) for tensor in scales]
