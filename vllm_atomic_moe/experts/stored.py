"""Quantized rows in an exported checkpoint: some atoms of all experts of a layer.

Every projection but a refitted down has its codes, packed as in memory, and the tables that decode
them: scale rows of the stored atoms, or if atoms share scales, of the groups with stored atoms;
zero points in the same way; a factor of every expert; and the group of each atom, if the
checkpoint tells it.

Legend: E experts, H hidden size, I full intermediate size, F_e stored atoms of an expert, P of all
experts, G scale rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

import torch

from vllm_atomic_moe.experts.formats import Encoded, check_values, pack_codes, unpack_codes
from vllm_atomic_moe.files.row_formats import Projection, RowFormat


def stored_shapes(
    row_format: RowFormat, projection: Projection, stored_EI: torch.Tensor, hidden_size: int
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of the codes, called weight, and of each table of one projection.

    Args:
        stored_EI: bool [E, I], the atoms with stored rows.
    """
    atoms, groups = int(stored_EI.sum()), 0
    for keep_I in stored_EI:
        kept = keep_I.nonzero().flatten()
        groups += len(row_format.kept_groups(projection, kept, len(keep_I)))
    table = (groups, -(-hidden_size // row_format.block(projection).columns))
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "weight": (torch.uint8, (atoms, hidden_size * row_format.bits // 8)),
        "scales": (row_format.scale, table),
        "groups": (torch.int32, (atoms,)),
        "zeros": (torch.uint8, table),
        "factors": (torch.float32, (len(stored_EI),)),
    }
    return {name: shapes[name] for name in ("weight", *row_format.stored_tables(projection))}


class StoredRows:
    """One projection of a layer.

    Attributes:
        stored_EI: bool [E, I], the atoms with stored rows.
    """

    def __init__(
        self,
        parts: Mapping[str, torch.Tensor],
        stored_EI: torch.Tensor,
        row_format: RowFormat,
        projection: Projection,
        hidden_size: int,
    ) -> None:
        """
        Args:
            parts: as `stored_shapes` says.

        Raises:
            ValueError: a part has the wrong dtype or shape; one line without the layer's name.
        """
        self.stored_EI = stored_EI
        scales = parts["scales"]
        if scales.dtype == torch.uint8:
            parts = {**parts, "scales": scales.view(torch.float8_e8m0fnu)}
        self._parts, self._format, self._projection = parts, row_format, projection
        self._size = stored_EI.shape[1]
        self._atoms = [keep_I.nonzero().flatten() for keep_I in stored_EI]
        self._kept = [
            row_format.kept_groups(projection, atoms_F, self._size) for atoms_F in self._atoms
        ]
        self._rows = [0, *accumulate(map(len, self._atoms))]
        self._groups = [0, *accumulate(map(len, self._kept))]
        wanted = stored_shapes(row_format, projection, stored_EI, hidden_size)
        for name, part in parts.items():
            found = part.dtype, tuple(part.shape)
            if found != wanted[name]:
                raise ValueError(
                    f"{name} is {found[0]} {list(found[1])}, wanted {wanted[name][0]} "
                    f"{list(wanted[name][1])}"
                )

    def expert(self, expert: int) -> Encoded:
        """All I atoms of one expert; atoms that are not stored, and their scales, are zeros.

        Raises:
            ValueError: stored values are not finite, or groups are missing.
        """
        atoms_F, kept = self._atoms[expert], self._kept[expert]
        rows = slice(*self._rows[expert : expert + 2])
        groups = slice(*self._groups[expert : expert + 2])
        codes_FH = unpack_codes(self._parts["weight"][rows], self._format.bits)
        scales, zeros = self._parts["scales"][groups], self._parts.get("zeros")
        zeros = None if zeros is None else zeros[groups]
        factors = self._parts.get("factors")
        factor = None if factors is None else factors[expert]
        group_F = self._format.groups_of(self._projection, atoms_F)
        if "groups" in self._parts:
            group_F = self._parts["groups"][rows].long()
            if len(group_F) and not 0 <= int(group_F.min()) <= int(group_F.max()) < len(kept):
                raise ValueError(f"groups of expert {expert} are not among its {len(kept)}")
        compact = Encoded(codes_FH, scales, zeros, factor, torch.searchsorted(kept, group_F))
        check_values(compact, self._format, self._projection)
        block = self._format.block(self._projection)
        number = -(-self._size // block.atoms)
        group_I = None
        if "groups" in self._parts:
            group_I = _spread(group_F, atoms_F, self._size)
        return Encoded(
            _spread(codes_FH, atoms_F, self._size),
            _spread(scales, kept, number),
            None if zeros is None else _spread(zeros, kept, number),
            factor,
            group_I,
        )


def taken(
    name: str,
    encoded: Encoded,
    row_format: RowFormat,
    projection: Projection,
    atoms_F: torch.Tensor,
) -> torch.Tensor:
    """The stored part of some atoms of one expert.

    Args:
        name: one of `stored_shapes`.
        encoded: all its atoms; the codes may be missing if a table is asked for.
        atoms_F: int64 [F_e], ascending.
    """
    if name == "weight":
        return pack_codes(encoded.codes_SH.index_select(0, atoms_F), row_format.bits)
    if name == "factors":
        assert encoded.factor is not None
        return encoded.factor.reshape(1)
    if name == "groups":
        if encoded.group_S is None:
            return row_format.groups_of(projection, atoms_F).int()
        return encoded.group_S[atoms_F].int()
    table = encoded.scales_GC if name == "scales" else encoded.zeros_GC
    assert table is not None
    atoms = len(table) * row_format.block(projection).atoms  # I, or up to the end of its group
    rows = row_format.kept_groups(projection, atoms_F, atoms)
    return _as_integers(table).index_select(0, rows).view(table.dtype)


def _spread(rows: torch.Tensor, places: torch.Tensor, number: int) -> torch.Tensor:
    """`rows` in their places among `number` rows, zeros elsewhere."""
    spread = torch.zeros(
        number, *rows.shape[1:], dtype=_as_integers(rows).dtype, device=rows.device
    )
    spread.index_copy_(0, places, _as_integers(rows))
    return spread.view(rows.dtype)


def _as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """As integers, since few operators support 8-bit floats."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(integers[tensor.itemsize])
