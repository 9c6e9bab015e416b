"""Packed rows: the kept atoms of every expert, one after another.

An atom is three vectors of length H: its rows of `gate_proj` and `up_proj` and its column of
`down_proj`; without a gate it is two. Biases of gate and up belong to the atom, that of down to the
expert. Resident atoms are stored expert by expert, row-major in matrices [P, H] or in the order
that a kernel reads best (`Storage`). With several resident profiles P counts their union. One bit
per row says whether a profile uses it: a *slot* is one profile's bits, in 32-bit words that start
at every expert's own first row. Expert ids carry the slot of their token (`with_slots`), so that
one batch may mix profiles; no weight moves, and shapes never change.

Legend: T tokens, K experts per token, E experts, H hidden size, I full intermediate size, P packed
rows, F_e resident atoms of an expert, S slots, W words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol, Self

import torch
from torch import nn

from vllm_atomic_moe.experts.activation import SILU, Activation
from vllm_atomic_moe.experts.formats import Encoded, ScaleTables, pack_codes
from vllm_atomic_moe.files.export_format import packed_offsets
from vllm_atomic_moe.files.row_formats import PLAIN, PROJECTIONS, Projection, RowFormat

SLOTS = 16
WORD_BITS = 32
# Extra numbers after the last bias of an atom, which vector loads may read.
BIAS_SLACK = 32


@dataclass(frozen=True, slots=True, eq=False)
class PackedLayout:
    """The resident atoms of one layer, their order, and which of them each profile uses.

    Attributes:
        intermediate_size: I.
        offsets_E1: int64 [E+1], first packed row of every expert; the last entry is P.
        atoms_P: int64 [P], index within its expert (0..I-1) of the atom in every packed row.
        words_E1: int64 [E+1], first word of every expert's bits; the last entry is W.
        bits: profile name -> int32 [W]. Bit b of an expert's word w is set if the profile keeps
            the atom in the expert's packed row 32 w + b. Profiles take slots in this order.
    """

    intermediate_size: int
    offsets_E1: torch.Tensor
    atoms_P: torch.Tensor
    words_E1: torch.Tensor
    bits: Mapping[str, torch.Tensor]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.offsets_E1.numel() - 1

    @property
    def num_rows(self) -> int:
        """P."""
        return self.atoms_P.numel()

    def bits_of(self, mask_EI: torch.Tensor) -> torch.Tensor:
        """The bits of any mask, int32 [W]; atoms that are not resident are ignored.

        Args:
            mask_EI: bool [E, I], on the CPU.
        """
        with torch.device("cpu"):
            experts_P = torch.repeat_interleave(self.offsets_E1.diff())
            row_P = torch.arange(len(self.atoms_P)) - self.offsets_E1[experts_P]
            word_P = self.words_E1[experts_P] + row_P // WORD_BITS
            words_W = torch.zeros(int(self.words_E1[-1]), dtype=torch.int64)
            kept_P = mask_EI[experts_P, self.atoms_P].long()
            return words_W.index_add_(0, word_P, kept_P << row_P % WORD_BITS).to(torch.int32)

    def slot_bits(self) -> torch.Tensor:
        """The bits of every slot: int32 [16, W], zero for slots without a profile."""
        bits_SW = torch.zeros(SLOTS, int(self.words_E1[-1]), dtype=torch.int32, device="cpu")
        bits_SW[: len(self.bits)] = torch.stack(list(self.bits.values()))
        return bits_SW

    def expert_atoms(self, expert: int) -> torch.Tensor:
        """Resident atoms of one expert in packed order: int64 [F_e]."""
        return self.atoms_P[self.offsets_E1[expert] : self.offsets_E1[expert + 1]]

    def rows_among(self, stored_EI: torch.Tensor) -> torch.Tensor:
        """Index of every resident atom among the atoms of `stored_EI`, in order: int64 [P].

        Args:
            stored_EI: bool [E, I]; includes all resident atoms.
        """
        row_EI = (stored_EI.flatten().cumsum(dim=0) - 1).view(stored_EI.shape)
        experts_P = torch.repeat_interleave(self.offsets_E1.diff())
        assert bool(stored_EI[experts_P, self.atoms_P].all()), "profiles are checked before"
        return row_EI[experts_P, self.atoms_P]


def build_layout(keep: Mapping[str, torch.Tensor]) -> PackedLayout:
    """Lay out the union of several profiles' masks of one layer.

    Args:
        keep: profile name -> bool mask [E, I]; at least one profile, all of one shape.

    Returns:
        The layout, in which nested profiles are prefixes and two profiles are contiguous; always
        on the CPU.

    Raises:
        ValueError: there are more profiles than slots.
    """
    with torch.device("cpu"):
        return _build_layout(keep)


def _build_layout(keep: Mapping[str, torch.Tensor]) -> PackedLayout:
    resident_EI = torch.stack(list(keep.values())).any(dim=0)
    intermediate_size = resident_EI.shape[1]
    experts_P, atoms_P, rank_P = _resident_atoms(keep)

    # Stable sort by (expert, rank): atoms of one signature stay in checkpoint order.
    order_P = torch.argsort(experts_P * (1 << len(keep)) + rank_P, stable=True)
    experts_P, atoms_P = experts_P[order_P], atoms_P[order_P]
    offsets_E1 = packed_offsets(resident_EI)
    words_E1 = _first_words(offsets_E1)
    layout = PackedLayout(intermediate_size, offsets_E1, atoms_P, words_E1, bits={})
    return replace(layout, bits={name: layout.bits_of(mask_EI) for name, mask_EI in keep.items()})


def _first_words(offsets_E1: torch.Tensor) -> torch.Tensor:
    words_E = (offsets_E1.diff() + WORD_BITS - 1) // WORD_BITS
    return torch.cat([words_E.new_zeros(1), words_E.cumsum(dim=0)])


def with_slots(ids_TK: torch.Tensor, slots_T1: torch.Tensor) -> torch.Tensor:
    """Expert ids that carry the slot of their token: id · SLOTS + slot, of the ids' dtype.

    Negative ids stay negative. `>> 4` and `& 15` return both.

    Args:
        ids_TK: integer [T, K]; int32 ids must be within ± 2^27, or they would overflow.
        slots_T1: int32 [T, 1] or [1], 0..SLOTS-1.
    """
    return torch.add(slots_T1, ids_TK, alpha=SLOTS)


def unpack_bits(bits_SW: torch.Tensor, rows: int) -> torch.Tensor:
    """The bits of one expert as bool [S, rows].

    Args:
        bits_SW: int32 [S, ⌈rows/32⌉], that expert's words.
    """
    shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=bits_SW.device)
    return ((bits_SW[:, :, None] >> shifts) & 1).flatten(1)[:, :rows].bool()


def tensor_parallel_share(keep: Mapping[str, torch.Tensor], rank: int, size: int) -> torch.Tensor:
    """The resident atoms of one of `size` tensor parallel ranks: bool [E, I].

    Every resident atom is on exactly one rank. The atoms of one expert and one membership signature
    are split into contiguous pieces, with sizes as if all atoms of the layer had been dealt out one
    by one, signature by signature in packed order, expert by expert. Ranks therefore differ by at
    most one atom: in every signature, in the union, in each of two profiles or of nested ones.

    Args:
        keep: as for `build_layout`.
        rank: 0..size-1.
    """
    with torch.device("cpu"):
        experts_P, atoms_P, rank_P = _resident_atoms(keep)
        share_EI = torch.zeros_like(next(iter(keep.values())), device="cpu")
        groups_P, order_P = torch.sort(rank_P * share_EI.shape[0] + experts_P, stable=True)
        # G groups of atoms to be split, N ranks. Of n atoms dealt, rank r has ⌈(n - r) / N⌉.
        ends_G1 = groups_P.unique_consecutive(return_counts=True)[1].cumsum(dim=0)[:, None]
        ranks_N = torch.arange(size)
        dealt_GN = (ends_G1 + size - 1 - ranks_N) // size
        lengths_GN = dealt_GN.diff(dim=0, prepend=torch.zeros(1, size, dtype=torch.int64))
        owner_P = ranks_N.repeat(len(ends_G1)).repeat_interleave(lengths_GN.flatten())
        mine = order_P[owner_P == rank]
        share_EI[experts_P[mine], atoms_P[mine]] = True
        return share_EI


def _resident_atoms(
    keep: Mapping[str, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Expert, index within it and signature rank of every resident atom, in checkpoint order.

    Three int64 [P].
    """
    # Largest profile first: it is the most significant bit of an atom's membership signature.
    names = sorted(keep, key=lambda name: (-int(keep[name].sum()), name))
    masks_SEI = torch.stack([keep[name] for name in names])
    experts_P, atoms_P = masks_SEI.any(dim=0).nonzero(as_tuple=True)
    return experts_P, atoms_P, _signature_rank(masks_SEI)[experts_P, atoms_P]


def _signature_rank(masks_SEI: torch.Tensor) -> torch.Tensor:
    """Position of every atom's membership signature in the packed order: int64 [E, I].

    Signatures follow the reflected Gray code, counted from "in every profile" and rotated to start
    after "in none" (such atoms are not resident): neighbors differ in one profile, so that atoms
    that a profile omits are in long runs, and nested profiles become prefixes.
    """
    num_profiles = masks_SEI.shape[0]
    if num_profiles > SLOTS:
        raise ValueError(
            f"{num_profiles} resident profiles, at most {SLOTS} are supported; list fewer in "
            "`resident`"
        )
    bits_S = 1 << torch.arange(num_profiles - 1, -1, -1, dtype=torch.int64)
    code_EI = (~masks_SEI * bits_S[:, None, None]).sum(dim=0)
    rank_EI, last = _gray_rank(code_EI, num_profiles), _gray_rank(bits_S.sum(), num_profiles)
    return (rank_EI - last - 1) % (1 << num_profiles)


def _gray_rank(code: torch.Tensor, bits: int) -> torch.Tensor:
    """Position of `code` in the reflected Gray code of this many bits."""
    rank, shift = code.clone(), 1
    while shift < bits:
        rank = rank ^ (rank >> shift)
        shift *= 2
    return rank


def projections_of(gated: bool) -> tuple[Projection, ...]:
    """The projections of an expert with or without a gate."""
    return PROJECTIONS if gated else PROJECTIONS[1:]


class Storage(Protocol):
    """How a kernel keeps the packed rows: one copy of the weights, in its own order."""

    def allocate(
        self,
        offsets_E1: torch.Tensor,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device | None,
        gated: bool = True,
        row_format: RowFormat = PLAIN,
    ) -> dict[str, torch.Tensor]:
        """Allocate the rows of all experts, by name, in the order of the kernel's arguments.

        Args:
            offsets_E1: as in `PackedLayout`.
            dtype: of plain weights.
            device: where; None means the default device.
            gated: whether there is a gate_proj.
            row_format: of the rows; codes are always uint8.
        """

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
        """Copy `rows_SH[atoms_F]` into the rows of one expert's projection.

        Args:
            weights: from `allocate`.
            rows_SH: any float dtype, or codes, one per byte; any strides and device; of down_proj
                the columns. Not modified.
            atoms_F: int64 [F_e], on the CPU.
            gated, row_format: as for `allocate`.
        """


class RowStorage:
    """Plain rows: gate (if there is one), up and down_t, [P, H] each; down_t is down_proj
    transposed. Two 4-bit codes share a byte, [P, H / 2], the first in the low half.
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
        """See `Storage`."""
        found: dict[str, torch.Tensor] = {}
        rows = int(offsets_E1[-1])
        for projection in projections_of(gated):
            shape, kind, stored = (rows, hidden_size), dtype, row_format.of(projection)
            if not stored.plain:
                shape, kind = (rows, hidden_size * stored.bits // 8), torch.uint8
            name = "down_t" if projection == "down" else projection
            found[name] = torch.empty(shape, dtype=kind, device=device)
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
        """See `Storage`."""
        start, end = offsets_E1[expert : expert + 2].tolist()
        target_FH = weights[projections_of(gated).index(projection)][start:end]
        atoms_F = atoms_F.to(rows_SH.device)
        if not row_format.of(projection).plain:
            target_FH.copy_(pack_codes(rows_SH.index_select(0, atoms_F), row_format.bits))
        elif rows_SH.is_contiguous():
            target_FH.copy_(rows_SH.index_select(0, atoms_F))
        else:
            target_FH.copy_(rows_SH.t().index_select(1, atoms_F).t())


class PackedExperts(nn.Module):
    """The resident atoms of one MoE layer, and which of them each slot uses.

    The weights, or their codes, are Parameters, named and ordered by `storage`; so are scales, and
    the biases, if there are any, in float32. Buffers: bits_SW, int32 [16, W],
    zero for slots without a profile; words_E1 and offsets_E1, int64, as in `PackedLayout`. Widths
    may be 0 to I. The dtype cannot be changed: storages order the rows by it.

    Attributes:
        layout: which atoms are resident, and where.
        widest: number of resident atoms of the widest expert.
        activation: what experts compute between their projections.
        row_format: how the rows are encoded.
        biases: empty, or by atom those of gate (if there is one) and up, each [P + BIAS_SLACK], and
            that of down, [E, H], zero until loaded; float32.
    """

    bits_SW: torch.Tensor
    words_E1: torch.Tensor
    offsets_E1: torch.Tensor

    def __init__(
        self,
        layout: PackedLayout,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
        storage: Storage | None = None,
        activation: Activation = SILU,
        has_bias: bool = False,
        row_format: RowFormat = PLAIN,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.row_format = row_format
        self.layout = layout
        self.hidden_size = hidden_size
        self.widest = int(layout.offsets_E1.diff().max())
        self._storage: Storage = storage or RowStorage()
        device = device or torch.get_default_device()
        if hidden_size % 2 and not row_format.plain:
            raise ValueError(
                f"hidden size {hidden_size} is odd, quantized experts need an even one"
            )
        allocated = self._storage.allocate(
            layout.offsets_E1, hidden_size, dtype, device, activation.gated, row_format
        )
        self._names = tuple(allocated)
        self._tables = ScaleTables(
            row_format,
            projections_of(activation.gated),
            layout.offsets_E1,
            layout.atoms_P,
            layout.intermediate_size,
            hidden_size,
            device,
        )
        biases = self._allocate_biases(device) if has_bias else {}
        self._bias_names = tuple(biases)
        self._scale_names = tuple(self._tables.tensors)
        for name, tensor in {**allocated, **self._tables.tensors, **biases}.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        for name, tensor in (
            ("bits_SW", layout.slot_bits()),
            ("words_E1", layout.words_E1),
            ("offsets_E1", layout.offsets_E1),
        ):
            self.register_buffer(name, tensor.to(device), persistent=False)

    def _allocate_biases(self, device: torch.device) -> dict[str, torch.Tensor]:
        atoms = self.layout.num_rows + BIAS_SLACK
        shapes = {f"{name}_bias": (atoms,) for name in projections_of(self.activation.gated)}
        shapes["down_bias"] = (self.layout.num_experts, self.hidden_size)  # type: ignore[assignment]
        return {
            name: torch.zeros(shape, dtype=torch.float32, device=device)
            for name, shape in shapes.items()
        }

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        dtype = self.weights[-1].dtype  # codes stay; plain rows may be of down alone
        changed = fn(self.weights[-1].new_empty(0)).dtype
        if changed != dtype:
            raise ValueError(
                f"packed experts are {dtype} and cannot become {changed}; pack them anew"
            )
        return super()._apply(fn, recurse)

    @property
    def weights(self) -> list[torch.Tensor]:
        """The kernel's weight arguments, in the storage's order."""
        return [getattr(self, name) for name in self._names]

    @property
    def scales(self) -> list[torch.Tensor]:
        """The tables of every projection with codes, in the order of `formats.TABLES`."""
        return [getattr(self, name) for name in self._scale_names]

    @property
    def biases(self) -> list[torch.Tensor]:
        """The kernel's bias arguments; empty if the experts have none."""
        return [getattr(self, name) for name in self._bias_names]

    @property
    def index(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The kernel's index arguments: bits_SW, words_E1, offsets_E1."""
        return self.bits_SW, self.words_E1, self.offsets_E1

    @property
    def weight_bytes(self) -> int:
        """Bytes of resident experts: weights, scales and biases, padding included."""
        return sum(weight.nbytes for weight in [*self.weights, *self.scales, *self.biases])

    @property
    def index_bytes(self) -> int:
        """Bytes of the index structures."""
        return sum(index.nbytes for index in self.index)

    @torch.no_grad()
    def set_slot(self, slot: int, mask_EI: torch.Tensor | None) -> None:
        """Make `slot` compute the atoms of a mask, all resident on some rank; None clears it.

        Args:
            slot: 0..SLOTS-1; no running token has it.
            mask_EI: bool [E, I], on the CPU; atoms of other ranks are ignored.
        """
        if mask_EI is None:
            self.bits_SW[slot].zero_()
        else:
            self.bits_SW[slot].copy_(self.layout.bits_of(mask_EI))

    def slot(self, name: str) -> int:
        """The slot of one of the layout's profiles."""
        return list(self.layout.bits).index(name)

    @torch.no_grad()
    def load_expert(self, expert: int, projection: Projection, matrix: torch.Tensor) -> None:
        """Slice one expert's projection into its packed rows; does not modify `matrix`.

        Args:
            expert: 0..E-1.
            projection: gate or up, [I, H], or down, [H, I], as checkpoints store them.
            matrix: any float dtype and device; only the resident rows are copied.

        Raises:
            ValueError: the matrix does not have the model's shape, or is not of plain floats.
        """
        wanted = (self.layout.intermediate_size, self.hidden_size)
        rows_IH = matrix.t() if projection == "down" else matrix
        if tuple(rows_IH.shape) != wanted:
            raise ValueError(
                f"expert {expert}: checkpoint {projection}_proj is {list(matrix.shape)}, the model "
                f"has intermediate size {wanted[0]} and hidden size {wanted[1]}"
            )
        if not rows_IH.is_floating_point() or rows_IH.itemsize < 2:
            raise ValueError(
                f"expert {expert}: checkpoint {projection}_proj is {rows_IH.dtype}, wanted plain "
                "floats"
            )
        self.load_encoded(expert, projection, Encoded(rows_IH))

    @torch.no_grad()
    def load_encoded(self, expert: int, projection: Projection, encoded: Encoded) -> None:
        """Slice one expert's projection, rows of atoms, into its packed rows and scales.

        Args:
            expert: 0..E-1.
            projection: gate, up or down.
            encoded: all I atoms, as `row_format` says; of the model's shape. Not modified.
        """
        atoms_F = self.layout.expert_atoms(expert)
        if not self.row_format.of(projection).plain:
            self._tables.write(expert, projection, encoded, atoms_F)
        self._write(expert, projection, encoded.codes_SH, atoms_F)

    @torch.no_grad()
    def load_bias(self, expert: int, projection: Projection, bias: torch.Tensor) -> None:
        """Load one expert's bias of a projection.

        Args:
            expert: 0..E-1.
            projection: gate or up, [I], reduced to the resident atoms; or down, [H].
            bias: any float dtype and device.

        Raises:
            ValueError: it does not have the model's shape.
        """
        wanted = self.hidden_size if projection == "down" else self.layout.intermediate_size
        if tuple(bias.shape) != (wanted,):
            raise ValueError(
                f"expert {expert}: checkpoint {projection}_proj bias is {list(bias.shape)}, the "
                f"model has {wanted}"
            )
        target = getattr(self, f"{projection}_bias")
        if projection == "down":
            target[expert].copy_(bias)
            return
        start, end = self.layout.offsets_E1[expert : expert + 2].tolist()
        atoms_F = self.layout.expert_atoms(expert).to(bias.device)
        target[start:end].copy_(bias.index_select(0, atoms_F))

    @torch.no_grad()
    def load_rows(
        self, projection: Projection, rows_SH: torch.Tensor, stored_EI: torch.Tensor
    ) -> None:
        """Copy the resident rows out of an exported checkpoint's packed rows of all experts.

        Args:
            projection: for down, rows are down_proj's columns.
            rows_SH: the stored atoms, experts ascending, in checkpoint order within an expert; any
                float dtype and device.
            stored_EI: bool [E, I], these atoms; includes all resident ones.

        Raises:
            ValueError: the number of rows, or their length, is wrong.
        """
        wanted = (int(stored_EI.sum()), self.hidden_size)
        if tuple(rows_SH.shape) != wanted:
            raise ValueError(
                f"exported {projection} rows are {list(rows_SH.shape)}, wanted {list(wanted)}; "
                "export the model again"
            )
        rows_P = self.layout.rows_among(stored_EI)
        for expert, (start, end) in enumerate(pairwise(self.layout.offsets_E1.tolist())):
            self._write(expert, projection, rows_SH, rows_P[start:end])

    def _write(
        self, expert: int, projection: Projection, rows_SH: torch.Tensor, atoms_F: torch.Tensor
    ) -> None:
        offsets_E1 = self.layout.offsets_E1
        self._storage.write(
            self.weights,
            offsets_E1,
            expert,
            projection,
            rows_SH,
            atoms_F,
            self.activation.gated,
            self.row_format,
        )
