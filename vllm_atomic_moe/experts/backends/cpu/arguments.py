"""The C++ arguments of a layer besides the tensors of a call, and the checks of both.

Legend: E experts, G scale rows of a layer, C scale columns, P packed rows, W words.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from vllm_atomic_moe.experts.formats import TABLES
from vllm_atomic_moe.experts.packing import BIAS_SLACK, SLOTS, projections_of
from vllm_atomic_moe.files.row_formats import (
    CODES,
    FACTORS,
    PLAIN,
    PROJECTIONS,
    Projection,
    RowFormat,
)

# Dtypes of scales, in the order of their numbers in C++.
SCALE_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e8m0fnu,
    torch.float8_e4m3fn,
)
# Bytes after the last weight that vectors may read.
SLACK_BYTES = 64


class ScaleTable(ctypes.Structure):
    """As scales.h has it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in TABLES),
        *((name, ctypes.c_int64) for name in ("columns", "columns_of_scale")),
    )


class Quantized(ctypes.Structure):
    """As scales.h has it."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("code", "scale", "factor")),
        ("tables", ScaleTable * len(PROJECTIONS)),
    )


def bits_of(row_format: RowFormat, dtype: torch.dtype) -> int:
    """Bits of one stored weight: a code, or a plain weight of `dtype`."""
    return row_format.bits or 8 * dtype.itemsize


def tensors_of(gated: bool, row_format: RowFormat) -> dict[str, tuple[RowFormat, int]]:
    """The tensors of all rows: name -> their format, and the number of projections in it."""
    projections = len(projections_of(gated))
    if row_format.plain_down:
        return {"packed": (row_format, projections - 1), "down": (PLAIN, 1)}
    return {"packed": (row_format, projections)}


def coded(gated: bool, row_format: RowFormat) -> list[Projection]:
    """The projections that have codes, and so scales."""
    return [name for name in projections_of(gated) if not row_format.of(name).plain]


def quantized(scales: Sequence[torch.Tensor], gated: bool, row_format: RowFormat) -> Quantized:
    """The C++ arguments for codes; valid as long as the scales."""
    found = Quantized(
        [*CODES].index(row_format.code) - 1,
        SCALE_DTYPES.index(scales[0].dtype),
        FACTORS.index(row_format.factor),
    )
    for which, name in enumerate(coded(gated, row_format)):
        tables = scales[which * len(TABLES) :][: len(TABLES)]
        found.tables[PROJECTIONS.index(name)] = ScaleTable(
            *(table.data_ptr() if table.numel() else None for table in tables),
            tables[0].shape[1],
            row_format.block(name).columns,
        )
    return found


def check_layer(
    weights: Sequence[torch.Tensor],
    bits_SW: torch.Tensor,
    words_E1: torch.Tensor,
    offsets_E1: torch.Tensor,
    hidden_size: int,
    biases: Sequence[torch.Tensor],
    gated: bool,
    row_format: RowFormat,
    scales: Sequence[torch.Tensor],
) -> None:
    """Check what C++ trusts and only a bug of ours can break; once per layer, to save time."""
    for tensor in (*weights, bits_SW, words_E1, offsets_E1, *biases, *scales):
        assert tensor.is_cpu, f"a tensor is on {tensor.device}, wanted cpu"
        assert tensor.is_contiguous(), f"strides are {tensor.stride()}, wanted contiguous ones"
    assert bits_SW.dtype == torch.int32, f"bits are {bits_SW.dtype}, wanted int32"
    assert words_E1.dtype == torch.int64, f"words are {words_E1.dtype}, wanted int64"
    assert offsets_E1.dtype == torch.int64, f"offsets are {offsets_E1.dtype}, wanted int64"
    widths_E = offsets_E1.diff()
    vectors = len(projections_of(gated))
    numbers = hidden_size * int((widths_E + widths_E % 2).sum())
    stored_together = tensors_of(gated, row_format).values()
    for tensor, (stored, count) in zip(weights, stored_together, strict=True):
        wanted = count * numbers * bits_of(stored, tensor.dtype) // 8 + SLACK_BYTES
        wanted //= tensor.element_size()
        assert tensor.numel() == wanted, (
            f"{tensor.numel()} numbers for hidden size {hidden_size}, wanted {wanted}"
        )
        if not stored.plain:
            assert tensor.dtype == torch.uint8, f"codes are {tensor.dtype}, wanted uint8"
    if biases:
        atoms = (int(offsets_E1[-1]) + BIAS_SLACK,)
        shapes = [*[atoms] * (vectors - 1), (len(widths_E), hidden_size)]
        found = [tuple(bias.shape) for bias in biases]
        assert found == shapes, f"biases are {found}, wanted {shapes}"
        assert all(bias.dtype == torch.float32 for bias in biases), "biases are not float32"
    words_E = (widths_E + 31) // 32
    assert torch.equal(words_E1.diff(), words_E), f"words are {words_E1.diff()}, wanted {words_E}"
    shape = (SLOTS, int(words_E.sum()))
    assert bits_SW.shape == shape, f"bits are {tuple(bits_SW.shape)}, wanted {shape}"
    if not row_format.plain:
        _check_scales(scales, offsets_E1, hidden_size, coded(gated, row_format), row_format)


def _check_scales(
    scales: Sequence[torch.Tensor],
    offsets_E1: torch.Tensor,
    hidden_size: int,
    projections: Sequence[Projection],
    row_format: RowFormat,
) -> None:
    assert len(scales) == len(projections) * len(TABLES), f"{len(scales)} tables of scales"
    atoms, experts = int(offsets_E1[-1]), len(offsets_E1) - 1
    with_zeros = scales[TABLES.index("zeros")].numel() > 0
    assert row_format.bits == 4 or not with_zeros, f"{row_format.code} codes have no zeros"
    dtype = scales[0].dtype
    assert dtype in SCALE_DTYPES, f"scales are {dtype}"
    for which, name in enumerate(projections):
        tables = scales[which * len(TABLES) :][: len(TABLES)]
        scales_GC, rows_P, firsts_E, _, _ = tables
        groups, columns = len(scales_GC), -(-hidden_size // row_format.block(name).columns)
        factors = 0 if row_format.factor == "none" else experts
        wanted = (
            ((groups, columns), dtype),
            ((atoms if rows_P.numel() else 0,), torch.int16),
            ((experts if rows_P.numel() else 0,), torch.int32),
            ((groups, columns) if with_zeros else (0,), torch.uint8),
            ((factors,), torch.float32),
        )
        for table, found, (shape, dtype_of_table) in zip(TABLES, tables, wanted, strict=True):
            assert (tuple(found.shape), found.dtype) == (shape, dtype_of_table), (
                f"{name}: {table} are {found.dtype} {tuple(found.shape)}, wanted {dtype_of_table} "
                f"{shape}"
            )
        if not rows_P.numel():
            assert groups == atoms, f"{name}: {groups} rows of scales, wanted {atoms}"
            continue
        low = min(int(firsts_E.min()), int(rows_P.min()))
        high = int((firsts_E.repeat_interleave(offsets_E1.diff()) + rows_P).max())
        assert low >= 0, f"{name}: row {low} of {groups} rows of scales"
        assert high < groups, f"{name}: row {high} of {groups} rows of scales"
