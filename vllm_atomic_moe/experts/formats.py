"""Row formats: how the numbers of packed rows are encoded, and their size.

A quantized checkpoint's codes and scales stay as they are. One formula gives the value of a number,

    value[a, h] = (meaning of code[a, h] − zero[g, c]) · scale[g, c] · factor

where a block of atoms and columns shares a scale, and a zero point if there are any: g = row of
`scales` that atom a belongs to, c = h // columns. For down_proj rows are its columns, so that its
scales run across atoms: atoms of one group share them, and scales of a group without atoms are not
kept. Plain weights are the format without codes.

Legend: E experts, H hidden size, I full intermediate size, P packed rows, F_e resident atoms of an
expert, G scale rows of a layer, C scale columns, S source rows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, Self, get_args

import torch

Code = Literal["plain", "e4m3", "int4", "uint4", "e2m1"]
CODES: tuple[Code, ...] = get_args(Code)
# How a factor changes the scales, if there is one.
Factor = Literal["none", "times", "over"]
FACTORS: tuple[Factor, ...] = get_args(Factor)
Projection = Literal["gate", "up", "down"]
PROJECTIONS: tuple[Projection, ...] = ("gate", "up", "down")
# Tables of each projection, in this order; those that a format lacks are empty.
TABLES = ("scales", "rows", "zeros", "factors")

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Block(NamedTuple):
    """The block of one scale: its numbers of atoms and columns."""

    atoms: int
    columns: int


ATOM = Block(1, 0)


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


@dataclass(frozen=True, slots=True)
class RowFormat:
    """How the packed rows of one layer are encoded; hashable, and a string for operators.

    Attributes:
        code: e4m3 one byte; int4 (code − 8), uint4 and e2m1 half a byte; plain the weights' dtype.
        rows: block of a scale of gate and up.
        columns: block of a scale of down; its rows are down_proj's columns.
        scale: dtype of the scales.
        zeros: whether there are zero points.
        factor: whether, and how, one float32 per expert and projection acts on the scales.
        scattered: whether the checkpoint says to which group an atom of down belongs.
        plain_down: whether down has plain rows beside the codes of gate and up.
    """

    code: Code = "plain"
    rows: Block = ATOM
    columns: Block = ATOM
    scale: torch.dtype = torch.float32
    zeros: bool = False
    factor: Factor = "none"
    scattered: bool = False
    plain_down: bool = False

    def of(self, projection: Projection) -> RowFormat:
        """The format of one projection's rows."""
        return PLAIN if self.plain_down and projection == "down" else self

    @property
    def plain(self) -> bool:
        """Whether rows are weights, not codes."""
        return self.code == "plain"

    @property
    def bits(self) -> int:
        """Of one code; 0 of plain rows, which are as wide as their dtype."""
        return {"plain": 0, "e4m3": 8}.get(self.code, 4)

    @property
    def spec(self) -> str:
        """The input of `parse`; kernels need no more."""
        down = "plain" if self.plain_down else self.columns.columns
        return f"{self.code}:{self.rows.columns}:{down}:{self.factor}"

    @classmethod
    @functools.cache
    def parse(cls, spec: str) -> Self:
        """The parts of a format that a spec holds: codes, columns of a block, factor."""
        code, rows, columns, factor = spec.split(":")
        assert code in CODES, f"code {code!r} is none of {CODES}"
        assert factor in FACTORS, f"factor {factor!r} is none of {FACTORS}"
        if columns == "plain":
            return cls(code, Block(1, int(rows)), factor=factor, plain_down=True)
        return cls(code, Block(1, int(rows)), Block(1, int(columns)), factor=factor)

    def block(self, projection: Projection) -> Block:
        """Of a scale of one projection."""
        return self.columns if projection == "down" else self.rows

    def shared(self, projection: Projection) -> bool:
        """Whether atoms share scales, so that a table maps rows to scale rows."""
        return self.block(projection).atoms > 1

    def groups_of(self, projection: Projection, atoms_F: torch.Tensor) -> torch.Tensor:
        """Scale row of each atom, within its expert: int64 [F]."""
        return atoms_F // self.block(projection).atoms

    def kept_groups(
        self, projection: Projection, atoms_F: torch.Tensor, intermediate_size: int
    ) -> torch.Tensor:
        """Scale rows of an expert that are kept for some of its atoms: int64, ascending.

        Args:
            atoms_F: int64 [F], any order.
            intermediate_size: I.
        """
        if not self.shared(projection):
            return atoms_F
        if self.scattered and projection == "down" and len(atoms_F):
            groups = -(-intermediate_size // self.block(projection).atoms)
            return torch.arange(groups, device=atoms_F.device)
        return self.groups_of(projection, atoms_F).unique()

    def expert_bytes(
        self, hidden_size: int, intermediate_size: int, itemsize: int, gated: bool = True
    ) -> int:
        """Bytes of one whole expert in a checkpoint, without biases.

        Args:
            itemsize: bytes of a plain weight.
        """
        weights, total = hidden_size * intermediate_size, 0
        for name in PROJECTIONS if gated else PROJECTIONS[1:]:
            if self.of(name).plain:
                total += weights * itemsize
                continue
            total += weights * self.bits // 8
            atoms, columns = self.block(name)
            scales = -(-intermediate_size // atoms) * -(-hidden_size // columns)
            total += scales * self.scale.itemsize + (scales // 2 if self.zeros else 0)
            total += 4 * (self.factor != "none")
        return total


PLAIN = RowFormat()


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
    most = {"e4m3": 448, "e2m1": 6}.get(row_format.code, 15)
    if not (scales * most).isfinite().all():
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
    scales_GC, rows_P, zeros_GC, factors_E = scales[which * len(TABLES) :][: len(TABLES)]
    groups_F = rows_P[rows_F].long() if rows_P.numel() else rows_F
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
            scales [G, C] of the format's dtype; rows int32 [P], the scale row of every packed row,
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
            rows = self._first[name][-1] if kept else self._offsets[-1]
            shape = (rows, -(-hidden_size // block.columns))
            made = {
                "scales": torch.empty(shape, dtype=row_format.scale, device=device),
                "rows": torch.empty(
                    self._offsets[-1] if kept else 0, dtype=torch.int32, device=device
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
        scales, rows, zeros, factors = (self.tensors[f"{projection}_{table}"] for table in TABLES)
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
        rows[start:end].copy_(first + torch.searchsorted(kept, groups_F))


def _copy_rows(target: torch.Tensor, source: torch.Tensor, rows: torch.Tensor) -> None:
    """target[:] = source[rows], as integers, since few operators support 8-bit floats."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[target.itemsize]
    source = source.to(target.dtype).view(integers)
    target.view(integers).copy_(source.index_select(0, rows.to(source.device)))
