"""Packed rows hold the right atoms, and bits select those of a profile."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_atomic_moe.experts.packing import (
    PackedExperts,
    PackedLayout,
    build_layout,
    tensor_parallel_share,
    unpack_bits,
    with_slots,
)

masks = st.builds(
    lambda seed, experts, width, profiles: {
        f"p{index}": torch.rand(
            experts, width, generator=torch.Generator().manual_seed(seed + index)
        )
        < 0.2 * (index + 1)
        for index in range(profiles)
    },
    st.integers(0, 1 << 20),
    st.integers(1, 5),
    st.integers(1, 40),
    st.integers(1, 4),
)


def used_rows(layout: PackedLayout, name: str) -> list[list[int]]:
    """Rows of every expert, counted from its first, that a profile's bits select."""
    rows = []
    for expert in range(layout.num_experts):
        first, end = layout.words_E1[expert : expert + 2].tolist()
        width = len(layout.expert_atoms(expert))
        assert end - first == -(-width // 32)
        words = [word % 2**32 for word in layout.bits[name][first:end].tolist()]
        found = [
            32 * index + bit
            for index, word in enumerate(words)
            for bit in range(32)
            if word >> bit & 1
        ]
        assert all(row < width for row in found), "bits beyond the expert's rows are zero"
        unpacked = unpack_bits(layout.bits[name][None, first:end], width)
        assert unpacked[0].nonzero().flatten().tolist() == found
        rows.append(found)
    return rows


@given(masks)
def test_bits_name_exactly_the_mask(keep):
    layout = build_layout(keep)
    union = torch.stack(list(keep.values())).any(dim=0)
    assert layout.num_rows == int(union.sum())
    for expert in range(layout.num_experts):
        assert layout.expert_atoms(expert).sort().values.tolist() == (
            union[expert].nonzero().flatten().tolist()
        )
    for name, mask in keep.items():
        for expert, rows in enumerate(used_rows(layout, name)):
            atoms = layout.expert_atoms(expert)[rows].tolist()
            assert set(atoms) == set(mask[expert].nonzero().flatten().tolist())


@given(masks, st.integers(0, 1 << 20))
def test_any_mask_of_resident_atoms_has_bits(keep, seed):
    """For a mask that the layout was built for, and for a later one."""
    layout = build_layout(keep)
    for name, mask in keep.items():
        assert torch.equal(layout.bits_of(mask), layout.bits[name])
    union = torch.stack(list(keep.values())).any(dim=0)
    later = torch.rand(union.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    again = build_layout({**keep, "later": later & union})
    assert layout.bits_of(later).dtype == torch.int32
    assert torch.equal(layout.bits_of(later), layout.bits_of(later & union)), "foreign atoms"
    of_layout, of_again = (
        unpacked_atoms(one, bits)
        for one, bits in ((layout, layout.bits_of(later)), (again, again.bits["later"]))
    )
    assert torch.equal(of_layout, later & union)
    assert torch.equal(of_again, later & union)


def unpacked_atoms(layout: PackedLayout, bits: torch.Tensor) -> torch.Tensor:
    """The mask [E, I] of these bits."""
    mask = torch.zeros(layout.num_experts, layout.intermediate_size, dtype=torch.bool)
    for expert in range(layout.num_experts):
        first, end = layout.words_E1[expert : expert + 2].tolist()
        atoms = layout.expert_atoms(expert)
        mask[expert, atoms] = unpack_bits(bits[None, first:end], len(atoms))[0].bool()
    return mask


@given(st.integers(0, 1 << 20), st.integers(1, 5))
def test_nested_profiles_are_prefixes(seed, count):
    score = torch.rand(3, 150, generator=torch.Generator().manual_seed(seed))
    layout = build_layout({f"p{index}": score < index / count for index in range(count + 1)})
    for name in layout.bits:
        assert all(rows == list(range(len(rows))) for rows in used_rows(layout, name))


@given(st.integers(0, 1 << 20))
def test_two_profiles_of_any_kind_are_contiguous(seed):
    generator = torch.Generator().manual_seed(seed)
    layout = build_layout({name: torch.rand(4, 60, generator=generator) < 0.5 for name in "ab"})
    for name in "ab":
        assert all(
            rows == list(range(rows[0], rows[0] + len(rows)))
            for rows in used_rows(layout, name)
            if rows
        )


def test_one_profile_keeps_checkpoint_order():
    keep = torch.tensor([[True, False, True, True], [False] * 4, [True] * 4])
    layout = build_layout({"only": keep})
    assert layout.atoms_P.tolist() == [0, 2, 3, 0, 1, 2, 3]
    assert layout.offsets_E1.tolist() == [0, 3, 3, 7]
    assert layout.words_E1.tolist() == [0, 1, 1, 2]
    assert layout.bits["only"].tolist() == [0b111, 0b1111]


def test_ids_carry_slots():
    ids = torch.tensor([[0, 5, -1], [7, -3, 127]], dtype=torch.int32)
    slots = torch.tensor([[15], [3]], dtype=torch.int32)
    carried = with_slots(ids, slots)
    assert carried.dtype == torch.int32
    assert torch.equal(carried >> 4, ids)
    assert torch.equal(carried & 15, slots.expand(2, 3))
    assert with_slots(ids.long(), slots[0]).dtype == torch.int64


def test_layout_does_not_follow_the_default_device():
    """Models are built under `with device:`; the layout is bookkeeping on the host."""
    keep = {"a": torch.ones(2, 4).bool(), "b": torch.zeros(2, 4).bool()}
    with torch.device("meta"):
        layout = build_layout(keep)
        packed = PackedExperts(layout, 8, torch.float32)
    assert layout.atoms_P.device == layout.bits["a"].device == torch.device("cpu")
    assert {tensor.device for tensor in (packed.gate, *packed.index)} == {torch.device("meta")}


# --- tensor parallel ranks ------------------------------------------------------------------------


def shares(keep, size):
    return torch.stack([tensor_parallel_share(keep, rank, size) for rank in range(size)])


def spread(shares_NEI, mask):
    """Difference between the most and the fewest atoms of `mask` on a rank."""
    held_N = (shares_NEI & mask).sum(dim=(1, 2))
    return int(held_N.max() - held_N.min())


@given(masks, st.integers(1, 5))
def test_ranks_share_every_atom_once_and_evenly(keep, size):
    masks_SEI = torch.stack(list(keep.values()))
    shares_NEI = shares(keep, size)
    assert torch.equal(shares_NEI.sum(dim=0), masks_SEI.any(dim=0).long())
    assert spread(shares_NEI, masks_SEI.any(dim=0)) <= 1
    bits = (masks_SEI * 2 ** torch.arange(len(keep))[:, None, None]).sum(dim=0)
    signatures = [bits == value for value in range(1, 2 ** len(keep))]
    assert all(spread(shares_NEI, signature) <= 1 for signature in signatures)
    for expert in range(len(bits)):
        for signature in signatures:
            atoms = signature[expert].nonzero().flatten()
            owners = shares_NEI[:, expert, atoms].long().argmax(dim=0)
            assert owners.tolist() == sorted(owners.tolist()), "pieces are contiguous"
            counts = owners.bincount(minlength=size)
            assert int(counts.max() - counts.min()) <= 1
    if len(keep) <= 2:
        assert all(spread(shares_NEI, mask) <= 1 for mask in masks_SEI)


@given(st.integers(0, 1 << 20), st.integers(1, 5), st.integers(1, 5))
def test_nested_profiles_are_even_on_all_ranks(seed, count, size):
    score = torch.rand(3, 50, generator=torch.Generator().manual_seed(seed))
    keep = {f"p{index}": score < index / count for index in range(count + 1)}
    shares_NEI = shares(keep, size)
    assert all(spread(shares_NEI, mask) <= 1 for mask in keep.values())


def test_fewer_atoms_than_ranks():
    """Width one everywhere: remainders rotate, or the first rank would hold everything."""
    keep = {"only": torch.eye(6, 4, dtype=torch.bool) | torch.eye(6, 4, dtype=torch.bool).flip(0)}
    assert keep["only"].sum(dim=1).max() == 2
    assert shares(keep, 3).sum(dim=(1, 2)).tolist() == [3, 3, 2]
    nothing = {"only": torch.zeros(2, 4, dtype=torch.bool)}
    assert not shares(nothing, 3).any()
    layout = build_layout({"only": nothing["only"] & tensor_parallel_share(nothing, 1, 3)})
    assert layout.num_rows == 0


def test_share_does_not_follow_the_default_device():
    with torch.device("meta"):
        share = tensor_parallel_share({"only": torch.ones(2, 4, device="cpu").bool()}, 1, 2)
    assert share.tolist() == [[False, False, True, True]] * 2


# --- loading --------------------------------------------------------------------------------------


def test_load_slices_rows_and_transposed_columns():
    keep = torch.tensor([[True, False, True], [False, True, False]])
    packed = PackedExperts(build_layout({"only": keep}), 5, torch.bfloat16)
    gate, down = torch.randn(2, 3, 5), torch.randn(2, 5, 3)
    for expert in range(2):
        packed.load_expert(expert, "gate", gate[expert])
        packed.load_expert(expert, "up", -gate[expert])
        packed.load_expert(expert, "down", down[expert])
    assert torch.equal(packed.gate, gate[keep].bfloat16())
    assert torch.equal(packed.up, -gate[keep].bfloat16())
    assert torch.equal(packed.down_t, down.transpose(1, 2)[keep].bfloat16())
    assert packed.weight_bytes == 3 * 3 * 5 * 2


@given(masks, st.integers(0, 1 << 20))
def test_stored_rows_reach_the_rows_that_are_resident(keep, seed):
    """Whatever else an exported checkpoint holds, in any order of resident rows."""
    generator = torch.Generator().manual_seed(seed)
    union = torch.stack(list(keep.values())).any(dim=0)
    stored = union | (torch.rand(union.shape, generator=generator) < 0.3)
    matrices = torch.randn(*union.shape, 3, generator=generator)
    one, two = (PackedExperts(build_layout(keep), 3, torch.float32) for _ in range(2))
    for expert, matrix in enumerate(matrices):
        one.load_expert(expert, "up", matrix)
        one.load_expert(expert, "down", matrix.t())
    two.load_rows("up", matrices[stored], stored)
    two.load_rows("down", matrices[stored], stored)
    assert torch.equal(one.up, two.up)
    assert torch.equal(one.down_t, two.down_t)


def test_rows_that_are_all_resident():
    keep = torch.tensor([[True, False, True], [False, True, False]])
    packed = PackedExperts(build_layout({"only": keep}), 5, torch.bfloat16)
    rows = torch.randn(3, 5)
    packed.load_rows("gate", rows, keep)
    assert torch.equal(packed.gate, rows.bfloat16())
    assert packed.layout.rows_among(keep).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"exported gate rows are \[2, 5\], wanted \[3, 5\]"):
        packed.load_rows("gate", rows[:2], keep)


def test_wrong_shape_is_refused():
    packed = PackedExperts(build_layout({"only": torch.ones(1, 3).bool()}), 5, torch.float32)
    with pytest.raises(ValueError, match=r"checkpoint down_proj is \[3, 5\].*size 3 .* size 5"):
        packed.load_expert(0, "down", torch.zeros(3, 5))


def test_too_many_resident_profiles_are_refused():
    keep = {f"p{index}": torch.ones(1, 2).bool() for index in range(17)}
    with pytest.raises(ValueError, match="17 resident profiles, at most 16"):
        build_layout(keep)


def test_rows_are_parameters_and_bits_are_buffers():
    keep = {"a": torch.ones(2, 40).bool(), "b": torch.zeros(2, 40).bool()}
    packed = PackedExperts(build_layout(keep), 8, torch.float32)
    assert list(dict(packed.named_parameters())) == ["gate", "up", "down_t"]
    assert list(dict(packed.named_buffers())) == ["bits_SW", "words_E1", "offsets_E1"]
    assert list(packed.state_dict()) == ["gate", "up", "down_t"]
    assert packed.bits_SW.tolist() == [[-1, 255, -1, 255], *[[0] * 4] * 15]
    assert (packed.slot("a"), packed.slot("b")) == (0, 1)
    assert packed.index_bytes == 16 * 4 * 4 + 2 * 3 * 8


def test_slots_are_set_and_cleared_in_place():
    keep = {"a": torch.tensor([[True] * 40, [False] * 40]), "b": torch.zeros(2, 40).bool()}
    packed = PackedExperts(build_layout(keep), 8, torch.float32)
    address, later = packed.bits_SW.data_ptr(), torch.zeros(2, 40, dtype=torch.bool)
    later[:, [0, 33]] = True  # those of the second expert are not resident
    packed.set_slot(15, later)
    assert packed.bits_SW[[0, 1, 15]].tolist() == [[-1, 255], [0, 0], [1, 2]]
    packed.set_slot(0, None)
    packed.set_slot(1, keep["a"])
    assert packed.bits_SW[[0, 1, 15]].tolist() == [[0, 0], [-1, 255], [1, 2]]
    assert packed.bits_SW.data_ptr() == address
    assert not packed.bits_SW[2:15].any()


def test_another_dtype_is_refused():
    packed = PackedExperts(build_layout({"only": torch.ones(2, 4).bool()}), 8, torch.float32)
    module = torch.nn.Sequential(packed)
    assert module.float().to("cpu")[0] is packed
    with pytest.raises(ValueError, match=r"float32 and cannot become torch.bfloat16; pack them"):
        module.to(torch.bfloat16)
    assert packed.gate.dtype == torch.float32
