# mypy: disallow-untyped-defs=False
"""The packed rows of one projection as arguments of the Triton kernels, and how kernels read them.

Codes are decoded to the dtype of the activations, like the weights of a plain checkpoint, with
integer operations alone: the device needs no 8-bit or 4-bit floating-point types or instructions.

Legend: E experts, H hidden size, P packed rows, G scale rows of a layer, C scale columns. Lower
case for what a program holds of them: f atoms, h columns, b stored numbers of these columns,
s scales of these columns.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from triton import language as tl

from vllm_atomic_moe.experts.formats import TABLES
from vllm_atomic_moe.files.row_formats import RowFormat

# Columns of a scale that a whole row shares: divisible by tiles of any width.
WHOLE_ROW = 1 << 30


class Rows(NamedTuple):
    """The packed rows of one projection, as the kernels take them; absent parts are None.

    Attributes:
        stored: weights, or codes as `RowStorage` keeps them, [P, ·].
        bias: float32, of gate and up by atom [P], of down by expert [E, H].
        width: bytes of a row of codes. An argument, so that the compiler knows its divisibility.
        scales: [G, C]; 8-bit floats as uint8.
        scale_columns: C.
        rows: int16 [P], the scale row of every packed row, counted from the first of its expert;
            None if it is the row's own number.
        firsts: int32 [E], these first ones.
        zeros: uint8 [G, C].
        factors: float32 [E].
        CODE, FACTOR: as in `RowFormat`.
        SCALE: e8m0 or e4m3 for scales of these types, else empty.
        COLUMNS: of a block of scales.
    """

    stored: torch.Tensor
    bias: torch.Tensor | None
    width: int | None = None
    scales: torch.Tensor | None = None
    scale_columns: int | None = None
    rows: torch.Tensor | None = None
    firsts: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    factors: torch.Tensor | None = None
    CODE: tl.constexpr = tl.constexpr("plain")
    SCALE: tl.constexpr = tl.constexpr("")
    COLUMNS: tl.constexpr = tl.constexpr(WHOLE_ROW)
    FACTOR: tl.constexpr = tl.constexpr("none")


def rows_of(
    weights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    row_format: RowFormat,
    hidden_size: int,
) -> list[Rows]:
    """Every projection's, down last; arguments as those of the op."""
    found = []
    for which, weight in enumerate(weights):
        bias = biases[which] if biases else None
        down = which == len(weights) - 1
        if row_format.of("down" if down else "up").plain:
            found.append(Rows(weight, bias))
            continue
        tables = scales[which * len(TABLES) :][: len(TABLES)]
        rows, firsts, zeros, factors = (table if table.numel() else None for table in tables[1:])
        block = row_format.columns if down else row_format.rows
        scale = tables[0]
        kind = {torch.float8_e8m0fnu: "e8m0", torch.float8_e4m3fn: "e4m3"}.get(scale.dtype, "")
        if kind:
            scale = scale.view(torch.uint8)
        columns = block.columns if block.columns < hidden_size else WHOLE_ROW
        constants = row_format.code, kind, columns, row_format.factor
        tensors = weight, bias, weight.shape[1], scale, scale.shape[1], rows, firsts, zeros, factors
        found.append(Rows(*tensors, *map(tl.constexpr, constants)))
    return found


@triton.jit
def load_factor(weights, expert):
    """The factor on the scales of an expert."""
    factor = 1.0
    if weights.factors is not None:
        factor = tl.load(weights.factors + expert)
    return factor


@triton.jit
def scale_rows(weights, packed_f, kept_f, expert):
    """The scale row of every packed row, int64."""
    rows_f = packed_f
    if weights.rows is not None:
        rows_f = tl.load(weights.rows + packed_f, mask=kept_f, other=0).to(tl.int64)
        rows_f += tl.load(weights.firsts + expert)
    return rows_f


@triton.jit
def _small_float(codes, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr):
    """Floats with this many bits and a sign, as float32, except infinities and NaN.

    Their bits are placed into a float32, whose exponent has another bias: the result is too small
    by a power of two, subnormals included.
    """
    SIGN: tl.constexpr = 1 << (EXPONENT + MANTISSA)
    POWER: tl.constexpr = 2.0 ** (128 - (1 << (EXPONENT - 1)))
    bits = (codes & (SIGN - 1)) << (23 - MANTISSA)
    bits |= (codes & SIGN) << (31 - EXPONENT - MANTISSA)
    return bits.to(tl.float32, bitcast=True) * POWER


@triton.jit
def _meaning(codes, CODE: tl.constexpr):
    """Values of codes (32-bit integers) before scaling: float32."""
    if CODE == "e4m3":
        values = _small_float(codes, 4, 3)
    elif CODE == "e2m1":
        values = _small_float(codes, 2, 1)
    elif CODE == "e8m0":  # a float32's exponent; 0 is a subnormal
        values = tl.where(codes == 0, 1 << 22, codes << 23).to(tl.float32, bitcast=True)
    elif CODE == "int4":
        values = (codes - 8).to(tl.float32)
    else:
        values = codes.to(tl.float32)
    return values


@triton.jit
def _scale_columns(start, COLUMNS: tl.constexpr, BLOCK_H: tl.constexpr):
    """The scale column of every run of a tile's columns: [s].

    A run is the largest power of two that divides both the tile and a block of scales.
    """
    RUN: tl.constexpr = BLOCK_H if COLUMNS % BLOCK_H == 0 else COLUMNS & -COLUMNS
    first = tl.multiple_of(start // RUN, BLOCK_H // RUN)
    return (first + tl.arange(0, BLOCK_H // RUN)) // (COLUMNS // RUN)


@triton.jit
def _spread(table_fs, BLOCK_H: tl.constexpr):
    """Each number, repeated for its run of columns: [f, BLOCK_H]."""
    F: tl.constexpr = table_fs.shape[0]
    S: tl.constexpr = table_fs.shape[1]
    table_fsr = tl.broadcast_to(table_fs[:, :, None], [F, S, BLOCK_H // S])
    return tl.reshape(table_fsr, [F, BLOCK_H])


@triton.jit
def load_rows(
    weights,
    packed_f,
    kept_f,
    scale_rows_f,
    factor,
    start,
    H,
    DTYPE: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """BLOCK_H columns of packed rows from `start`: [f, BLOCK_H], rounded to DTYPE.

    `start` is a multiple of BLOCK_H. For rows that are not kept and columns beyond H, weights are
    zero and codes have finite values.
    """
    CODE: tl.constexpr = weights.CODE
    SHARE: tl.constexpr = 1 if CODE == "plain" or CODE == "e4m3" else 2
    width = H if CODE == "plain" else weights.width
    lanes_b = tl.arange(0, BLOCK_H // SHARE)
    offsets_fb = packed_f[:, None] * width + lanes_b[None, :]  # the same for all steps
    first = tl.multiple_of(start // SHARE, BLOCK_H // SHARE)
    stored_fb = tl.load(
        weights.stored + offsets_fb + first,
        mask=kept_f[:, None] & (lanes_b < width - first)[None, :],
        other=0,
    )
    if CODE == "plain":
        tile_fh = stored_fb
    else:
        if SHARE == 2:
            stored_fb = tl.interleave(stored_fb & 15, stored_fb >> 4)
        values_fh = _meaning(stored_fb.to(tl.int32), CODE)
        columns_s = _scale_columns(start, weights.COLUMNS, BLOCK_H)
        places_fs = scale_rows_f[:, None] * weights.scale_columns + columns_s[None, :]
        inside_fs = kept_f[:, None] & (columns_s < weights.scale_columns)[None, :]
        if weights.zeros is not None:
            zeros_fs = tl.load(weights.zeros + places_fs, mask=inside_fs, other=0)
            values_fh -= _spread(zeros_fs.to(tl.float32), BLOCK_H)
        scales_fs = tl.load(weights.scales + places_fs, mask=inside_fs, other=0)
        if weights.SCALE != "":
            scales_fs = _meaning(scales_fs.to(tl.int32), weights.SCALE)
        scales_fs = scales_fs.to(tl.float32)
        if weights.FACTOR == "times":
            scales_fs *= factor
        elif weights.FACTOR == "over":
            scales_fs = tl.div_rn(scales_fs, factor)  # `/` does not round to nearest
        tile_fh = (values_fh * _spread(scales_fs, BLOCK_H)).to(DTYPE)
    return tile_fh
