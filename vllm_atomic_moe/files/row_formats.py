"""Row formats: how the numbers of packed rows are encoded, and their size.

A quantized checkpoint's codes and scales stay as they are. One formula gives the value of a number,

    value[a, h] = (meaning of code[a, h] − zero[g, c]) · scale[g, c] · factor

where a block of atoms and columns shares a scale, and a zero point if there are any: g = row of
`scales` that atom a belongs to, c = h // columns. For down_proj rows are its columns, so that its
scales run across atoms: atoms of one group share them, and scales of a group without atoms are not
kept. Plain weights are the format without codes.

Legend: H hidden size, I full intermediate size, F_e kept atoms of an expert.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self, cast, get_args

import torch

Code = Literal["plain", "e4m3", "int4", "uint4", "e2m1"]
# How a factor changes the scales, if there is one.
Factor = Literal["none", "times", "over"]
FACTORS: tuple[Factor, ...] = get_args(Factor)
Projection = Literal["gate", "up", "down"]
PROJECTIONS: tuple[Projection, ...] = ("gate", "up", "down")
# Part of the packed layout (`layouts.PACKED_ROWS`) -> projection.
PART_PROJECTIONS: Mapping[str, Projection] = {"gate": "gate", "up": "up", "down_t": "down"}


class CodeFacts(NamedTuple):
    """One code.

    Attributes:
        bits: 0 of plain rows, which are as wide as their dtype.
        number: what it stands for.
        most: its largest meaning.
    """

    bits: int
    number: Literal["float", "int"]
    most: float


# In the order of their numbers in C++, which has no plain ones.
CODES: Mapping[Code, CodeFacts] = {
    "plain": CodeFacts(0, "float", torch.inf),
    "e4m3": CodeFacts(8, "float", 448),
    "int4": CodeFacts(4, "int", 8),
    "uint4": CodeFacts(4, "int", 15),
    "e2m1": CodeFacts(4, "float", 6),
}


class Block(NamedTuple):
    """The block of one scale: its numbers of atoms and columns."""

    atoms: int
    columns: int


ATOM = Block(1, 0)


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
        return CODES[self.code].bits

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
        assert code in CODES, f"code {code!r} is none of {[*CODES]}"
        assert factor in FACTORS, f"factor {factor!r} is none of {FACTORS}"
        known, block = cast("Code", code), Block(1, int(rows))
        if columns == "plain":
            return cls(known, block, factor=factor, plain_down=True)
        return cls(known, block, Block(1, int(columns)), factor=factor)

    def block(self, projection: Projection) -> Block:
        """Of a scale of one projection."""
        return self.columns if projection == "down" else self.rows

    def stored_tables(self, projection: Projection) -> tuple[str, ...]:
        """The tables beside the rows in an exported checkpoint (`layouts.PACKED_TABLES`)."""
        if self.of(projection).plain:
            return ()
        present = {
            "scales": True,
            # Where the order of activations may tell the groups.
            "groups": self.scattered and projection == "down",
            "zeros": self.zeros,
            "factors": self.factor != "none",
        }
        return tuple(table for table, found in present.items() if found)

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
