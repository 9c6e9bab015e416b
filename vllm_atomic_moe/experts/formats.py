"""Encoded rows: decode them, check them, and keep the scales of packed ones.

`files/row_formats.py` says what the encodings are.

Legend: E experts, H hidden size, I full intermediate size, P packed rows, F_e resident atoms of an
expert, G scale rows of a layer, C scale columns, S source rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from vllm_atomic_moe.files.row_formats import CODES, Code, Factor, Projection, RowFormat

# Tables of each projection, in this order; those that a format lacks are empty.
TABLES = ("scales", "rows", "firsts", "zeros", "factors")

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Encoded(NamedTuple):
    """One projection of one expert, its atoms as rows; of down_proj the columns.

    Attributes:
        codes_SH: one code per byte, uint8 [S, H]; of plain rows the weights themselves.
        scales_GC: of any float dtype, float8_e8m0fnu and float8_e4m3fn among them.
        zeros_GC: uint8.
        factor: float32, one number.
        group_S: scale row of every row, int64 [S], if the format does not imply it.
    """

    codes_SH: torch.Tensor
    scales_GC: torch.Tensor | None = None
    zeros_GC: torch.Tensor | None = None
    factor: torch.Tensor | None = None
    group_S: torch.Tensor | None = None


def pack_codes(codes_SH: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes as stored: two 4-bit codes per byte, the first in the low half.

    Args:
        codes_SH: uint8 [S, H], H even.
    """
    if bits == 8:
        return codes_SH
    return codes_SH[:, 0::2] | (codes_SH[:, 1::2] << 4)


def unpack_codes(stored: torch.Tensor, bits: int) -> torch.Tensor:
    """Undo `pack_codes`."""
    if bits == 8:
        return stored
    pairs = stored.contiguous().to(torch.int16)  # the low byte comes first
    return pairs.bitwise_or_(pairs << 4).bitwise_and_(0x0F0F).view(torch.uint8)


def meaning(codes: torch.Tensor, code: Code) -> torch.Tensor:
    """Values of codes, uint8, before scaling: float32."""
    if code == "e4m3":
        return codes.view(torch.float8_e4m3fn).float()
    if code == "e2m1":
        values = [*E2M1, *(-value for value in E2M1)]
        lut = torch.tensor(values, dtype=torch.float32, device=codes.device)
        return lut[codes.long()]
    return codes.float() - (8 if code == "int4" else 0)


def effective_scales(
    scales_GC: torch.Tensor, factor: torch.Tensor | None, how: Factor
) -> torch.Tensor:
    """Scales with the factor applied, float32.

    Args:
        factor: float32, broadcast over the scales.
    """
    scales = scales_GC.float()
    if factor is None:
        return scales
    return scales * factor if how == "times" else scales / factor


def scale_rows(encoded: Encoded, row_format: RowFormat, projection: Projection) -> torch.Tensor:
    """Scale row of every row: int64 [S]."""
    if encoded.group_S is not None:
        return encoded.group_S
    codes_SH = encoded.codes_SH
    rows_S = torch.arange(len(codes_SH), device=codes_SH.device)
    return row_format.groups_of(projection, rows_S)


def decode(encoded: Encoded, row_format: RowFormat, projection: Projection) -> torch.Tensor:
    """The weights of encoded rows, float32 [S, H], before they are rounded to any dtype."""
    codes_SH, scales_GC, zeros_GC, factor, _ = encoded
    if scales_GC is None:
        return codes_SH.float()
    group_S = scale_rows(encoded, row_format, projection)
    return decode_rows(
        codes_SH,
        row_format.code,
        row_format.block(projection).columns,
        effective_scales(scales_GC, factor, row_format.factor)[group_S],
        None if zeros_GC is None else zeros_GC[group_S],
    )


def decode_rows(
    codes_FH: torch.Tensor,
    code: Code,
    columns: int,
    scales_FC: torch.Tensor,
    zeros_FC: torch.Tensor | None,
) -> torch.Tensor:
    """Values of rows with gathered scales: float32 [F, H].

    Args:
        codes_FH: uint8, one code a byte.
        columns: number of columns of one scale.
        scales_FC: float32.
        zeros_FC: uint8, or none.
    """
    hidden_size = codes_FH.shape[1]

    def spread(table_FC: torch.Tensor) -> torch.Tensor:
        return table_FC.repeat_interleave(columns, dim=1)[:, :hidden_size]

    values_FH = meaning(codes_FH, code)
    if zeros_FC is not None:
        values_FH = values_FH - spread(zeros_FC.float())
    return values_FH * spread(scales_FC)


def check_values(encoded: Encoded, row_format: RowFormat, projection: Projection) -> None:
    """Refuse encoded rows with values that are not finite, or with zero scales of nonzero codes.

    Raises:
        ValueError: one line without names.
    """
    codes_SH, scales_GC, zeros_GC, factor, _ = encoded
    assert scales_GC is not None
    # Doubling drops the sign: not a number is 127 or 255.
    if row_format.code == "e4m3" and codes_SH.numel() and (codes_SH + codes_SH).max() == 254:
        raise ValueError("weights are not finite")
    if factor is not None and not (factor.isfinite() and factor):
        raise ValueError(f"the factor of its scales is {factor.item()}")
    scales = effective_scales(scales_GC, factor, row_format.factor)
    if not (scales * CODES[row_format.code].most).isfinite().all():
        raise ValueError("scales are not finite, or too large")
    if bool((nothing := scales == 0).any()):
        group_S = scale_rows(encoded, row_format, projection)
        zeros = None if zeros_GC is None else zeros_GC[group_S]
        columns = row_format.block(projection).columns
        lost = decode_rows(codes_SH, row_format.code, columns, nothing.float()[group_S], zeros)
        if lost.any():
            raise ValueError("a scale is zero, the codes that it is for are not")


def stored_values(
    weights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    which: int,
    row_format: RowFormat,
    expert: int,
    rows_F: torch.Tensor,
) -> torch.Tensor:
    """The values of some packed rows of one expert: float32 [F, H].

    Args:
        weights: plain rows or codes, [P, ·] for every projection, down last.
        scales: tables of every projection with codes, as in `ScaleTables`.
        which: index of the projection.
        row_format: has at least what `RowFormat.parse` returns.
        rows_F: int64, packed rows, all of `expert`.
    """
    stored, down = weights[which][rows_F], which == len(weights) - 1
    if row_format.of("down" if down else "up").plain:
        return stored.float()
    scales_GC, rows_P, firsts_E, zeros_GC, factors_E = scales[which * len(TABLES) :][: len(TABLES)]
    groups_F = firsts_E[expert] + rows_P[rows_F].long() if rows_P.numel() else rows_F
    factor = factors_E[expert] if factors_E.numel() else None
    block = row_format.columns if down else row_format.rows
    return decode_rows(
        unpack_codes(stored, row_format.bits),
        row_format.code,
        block.columns,
        effective_scales(scales_GC.float()[groups_F], factor, row_format.factor),
        zeros_GC[groups_F] if zeros_GC.numel() else None,
    )


class ScaleTables:
    """The scales of one layer's packed rows: allocated before they are known, filled by expert.

    Attributes:
        tensors: name -> tensor: of every projection with codes `{projection}_{table}` for TABLES:
            scales [G, C] of the format's dtype; rows int16 [P], the scale row of every packed row,
            counted from the first of its expert, and firsts int32 [E], these first ones, both
            empty if it is the row's own number; zeros uint8 [G, C]; factors float32 [E].
    """

    def __init__(
        self,
        row_format: RowFormat,
        projections: Sequence[Projection],
        offsets_E1: torch.Tensor,
        atoms_P: torch.Tensor,
        intermediate_size: int,
        hidden_size: int,
        device: torch.device | None,
    ) -> None:
        self._format = row_format
        self._offsets = offsets_E1.tolist()
        self._groups: dict[Projection, list[torch.Tensor]] = {}
        self._first: dict[Projection, list[int]] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        for name in projections:
            if row_format.of(name).plain:
                continue
            block = row_format.block(name)
            kept: list[torch.Tensor] = []
            if row_format.shared(name):
                kept = [
                    row_format.kept_groups(name, atoms_P[start:end], intermediate_size)
                    for start, end in pairwise(self._offsets)
                ]
                self._groups[name] = kept
                self._first[name] = [0, *torch.tensor([*map(len, kept)]).cumsum(0).tolist()]
                most = torch.iinfo(torch.int16).max
                assert max(map(len, kept)) <= most, f"more than {most} scale rows of an expert"
            rows = self._first[name][-1] if kept else self._offsets[-1]
            shape = (rows, -(-hidden_size // block.columns))
            made = {
                "scales": torch.empty(shape, dtype=row_format.scale, device=device),
                "rows": torch.empty(
                    self._offsets[-1] if kept else 0, dtype=torch.int16, device=device
                ),
                "firsts": torch.tensor(
                    self._first[name][:-1] if kept else [], dtype=torch.int32, device=device
                ),
                "zeros": torch.empty(
                    shape if row_format.zeros else (0,), dtype=torch.uint8, device=device
                ),
                "factors": torch.ones(
                    len(self._offsets) - 1 if row_format.factor != "none" else 0,
                    dtype=torch.float32,
                    device=device,
                ),
            }
            self.tensors.update({f"{name}_{table}": made[table] for table in TABLES})

    def write(
        self, expert: int, projection: Projection, encoded: Encoded, atoms_F: torch.Tensor
    ) -> None:
        """Store the scales of one expert's projection.

        Args:
            atoms_F: int64 [F_e], the rows of `encoded` that are resident, in packed order.
        """
        scales, rows, _, zeros, factors = (
            self.tensors[f"{projection}_{table}"] for table in TABLES
        )
        start, end = self._offsets[expert : expert + 2]
        if encoded.factor is not None:
            factors[expert] = encoded.factor
        assert encoded.scales_GC is not None
        if not self._format.shared(projection):
            _copy_rows(scales[start:end], encoded.scales_GC, atoms_F)
            if encoded.zeros_GC is not None:
                _copy_rows(zeros[start:end], encoded.zeros_GC, atoms_F)
            return
        kept = self._groups[projection][expert]
        first, last = self._first[projection][expert : expert + 2]
        _copy_rows(scales[first:last], encoded.scales_GC, kept)
        if encoded.zeros_GC is not None:
            _copy_rows(zeros[first:last], encoded.zeros_GC, kept)
        groups_F = (
            self._format.groups_of(projection, atoms_F)
            if encoded.group_S is None
            else encoded.group_S.cpu()[atoms_F]
        )
        rows[start:end].copy_(torch.searchsorted(kept, groups_F))


def _copy_rows(target: torch.Tensor, source: torch.Tensor, rows: torch.Tensor) -> None:
    """target[:] = source[rows], as integers, since few operators support 8-bit floats."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[target.itemsize]
    source = source.to(target.dtype).view(integers)
    target.view(integers).copy_(source.index_select(0, rows.to(source.device)))
