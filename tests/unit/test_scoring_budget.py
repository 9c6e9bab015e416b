"""Masks from scores: exact, deterministic, nested."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_atomic_moe.scoring.budget import global_masks

# Few different values: ties are the rule, +inf (an expert without tokens) among them.
SCORES = st.builds(
    lambda layers, experts, atoms, seed: {
        layer: torch.tensor([0.0, 1.0, 2.0, torch.inf])[
            torch.randint(
                0, 4, (experts, atoms), generator=torch.Generator().manual_seed(seed + layer)
            )
        ]
        for layer in layers
    },
    layers=st.lists(st.integers(0, 50), min_size=1, max_size=4, unique=True),
    experts=st.integers(1, 5),
    atoms=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
RATIOS = st.floats(0, 1, exclude_max=True)


def removed(masks):
    return sum(int((~mask).sum()) for mask in masks.values())


@given(SCORES, RATIOS)
def test_exactly_the_rounded_number_of_atoms_goes(scores, ratio):
    masks = global_masks(scores, ratio)
    assert removed(masks) == round(ratio * sum(score.numel() for score in scores.values()))
    for layer, mask in masks.items():
        assert mask.dtype == torch.bool
        assert mask.shape == scores[layer].shape


@given(SCORES, RATIOS)
def test_no_removed_atom_scores_higher_than_a_kept_one(scores, ratio):
    masks = global_masks(scores, ratio)
    gone = [value for layer, mask in masks.items() for value in scores[layer][~mask].tolist()]
    kept = [value for layer, mask in masks.items() for value in scores[layer][mask].tolist()]
    assert not gone or not kept or max(gone) <= min(kept)


@given(SCORES, RATIOS, RATIOS)
def test_masks_are_nested_in_the_ratio(scores, one, other):
    wide, narrow = global_masks(scores, min(one, other)), global_masks(scores, max(one, other))
    for layer, mask in narrow.items():
        assert not (mask & ~wide[layer]).any()


def test_of_equal_scores_the_lower_layer_expert_and_atom_go_first():
    scores = {2: torch.zeros(2, 3), 1: torch.zeros(2, 3)}
    masks = global_masks(scores, 5 / 12)
    assert masks[1].tolist() == [[False, False, False], [False, False, True]]
    assert masks[2].all()


def test_the_scores_are_not_modified_and_layers_compete():
    scores = {0: torch.tensor([[5.0, 6.0]]), 1: torch.tensor([[1.0, 7.0]])}
    before = {layer: score.clone() for layer, score in scores.items()}
    masks = global_masks(scores, 0.5)
    assert masks[0].tolist() == [[False, True]]
    assert masks[1].tolist() == [[False, True]]
    assert all(torch.equal(scores[layer], before[layer]) for layer in scores)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 25, float("nan"), float("inf")])
def test_ratios_out_of_range_are_refused(ratio):
    with pytest.raises(ValueError, match=r"0 <= ratio < 1 \(25 percent is 0.25\)"):
        global_masks({0: torch.ones(2, 2)}, ratio)


def test_nan_scores_are_refused():
    with pytest.raises(ValueError, match=r"layers\.3\.score holds NaN"):
        global_masks({3: torch.tensor([[1.0, torch.nan]])}, 0.5)
    with pytest.raises(ValueError, match="no layers to prune"):
        global_masks({}, 0.5)
