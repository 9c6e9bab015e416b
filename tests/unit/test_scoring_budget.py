"""Masks from scores: exact, deterministic, nested."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from vllm_atomic_moe.files.router import ExpertGroups
from vllm_atomic_moe.scoring import known_methods, select_masks, selection_options
from vllm_atomic_moe.scoring.budget import align_masks, align_widths, prune_atoms, top_atoms
from vllm_atomic_moe.scoring.masks import LayerScores
from vllm_atomic_moe.scoring.methods.tenp import share_out
from vllm_atomic_moe.scoring.router import RouterNeeds

SIZE = 8


@st.composite
def layer_scores(draw, values=(-1.0, 0.0, 1.0, 2.0), least_experts=1):
    """Scores with few distinct values, so that ties are common."""
    layers = draw(st.lists(st.integers(0, 50), min_size=1, max_size=4, unique=True))
    experts = draw(st.integers(least_experts, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    return {
        layer: LayerScores(
            torch.tensor(values)[
                torch.randint(0, len(values), (experts, SIZE), generator=generator)
            ],
            torch.randint(0, 4, (experts,), generator=generator).float(),
        )
        for layer in sorted(layers)
    }


def whole(scores):
    """The same scores for whole experts."""
    return {layer: LayerScores.whole(x.experts, SIZE) for layer, x in scores.items()}


SCORES = layer_scores()
RATIOS = st.floats(0, 1, exclude_max=True)
SCOPES = st.sampled_from(["global", "layer", "expert"])


def prune(scores, ratio, **options):
    return prune_atoms(scores, ratio, **options).keep


def removed(masks):
    return sum(int((~mask).sum()) for mask in masks.values())


@given(SCORES, RATIOS, SCOPES)
def test_exactly_the_rounded_number_of_atoms_goes(scores, ratio, scope):
    masks = prune(scores, ratio, scope=scope)
    experts = next(iter(scores.values())).atoms.shape[0]
    for layer, mask in masks.items():
        assert mask.dtype == torch.bool
        assert mask.shape == scores[layer].atoms.shape
        if scope == "layer":
            assert int((~mask).sum()) == round(ratio * experts * SIZE)
        if scope == "expert":
            assert set((~mask).sum(dim=1).tolist()) == {round(ratio * SIZE)}
    if scope == "global":
        assert removed(masks) == round(ratio * len(scores) * experts * SIZE)


@given(SCORES, RATIOS, SCOPES)
def test_no_removed_atom_scores_higher_than_a_kept_one(scores, ratio, scope):
    masks = prune(scores, ratio, scope=scope)
    groups = []  # pairs (mask, scores) within which atoms compete
    for layer, mask in masks.items():
        atoms = scores[layer].atoms
        groups += zip(mask, atoms, strict=True) if scope == "expert" else [(mask, atoms)]
    if scope == "global":
        groups = [tuple(torch.stack(list(parts)) for parts in zip(*groups, strict=True))]
    for mask, atoms in groups:
        assert mask.all() or not mask.any() or atoms[~mask].max() <= atoms[mask].min()


@given(SCORES, RATIOS, RATIOS, SCOPES, st.integers(0, SIZE))
def test_masks_are_nested_in_the_ratio(scores, one, other, scope, min_width):
    assume(max(one, other) * SIZE <= SIZE - min_width)
    options = {"scope": scope, "min_width": min_width}
    wide = prune(scores, min(one, other), **options)
    narrow = prune(scores, max(one, other), **options)
    assert all(not (mask & ~wide[layer]).any() for layer, mask in narrow.items())


@pytest.mark.parametrize("method", sorted(set(known_methods().entries) - {"tenp"}))
@given(data=st.data())
def test_every_method_that_only_ranks_gives_nested_masks(method, data):
    scores = data.draw(layer_scores(values=(0.0, 1.0, 2.0), least_experts=2))
    if known_methods().find(method).whole_experts:
        scores = whole(scores)
    one, other = sorted((data.draw(st.floats(0, 0.5)), data.draw(st.floats(0, 0.5))))
    options = selection_options(method, {})
    wide = select_masks(method, scores, one, RouterNeeds(1), options)
    narrow = select_masks(method, scores, other, RouterNeeds(1), options)
    for layer, mask in narrow.keep.items():
        assert not (mask & ~wide.keep[layer]).any()
        if layer in narrow.routable:
            assert not (narrow.routable[layer] & ~wide.routable[layer]).any()


@given(
    SCORES,
    RATIOS,
    st.sampled_from(["global", "layer"]),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(0, SIZE),
)
def test_aligned_widths_meet_the_budget(scores, ratio, scope, align, min_width):
    least = -(-min_width // align) * align
    assume(ratio * SIZE <= SIZE - least)
    options = {"scope": scope, "min_width": min_width}
    exact = prune(scores, ratio, scope=scope, min_width=least)
    masks = prune(scores, ratio, align=align, **options)
    for layer, mask in masks.items():
        widths, wanted = mask.sum(dim=1), exact[layer].sum(dim=1)
        assert (widths % align == 0).all()
        assert (widths >= least).all()
        assert ((widths - wanted).abs() < align).all(), "a width moved further than it must"
        assert abs(int(widths.sum() - wanted.sum())) <= align, "off by more than a unit"
    assert 2 * abs(removed(masks) - removed(exact)) <= align
    assert align > 1 or all(torch.equal(masks[layer], exact[layer]) for layer in masks)


@given(SCORES, RATIOS, st.sampled_from([1, 2, 4, 8]))
def test_every_expert_gets_one_aligned_width(scores, ratio, align):
    exact = SIZE - round(ratio * SIZE)
    masks = prune(scores, ratio, scope="expert", align=align)
    widths = torch.stack([mask.sum(dim=1) for mask in masks.values()])
    assert len(widths.unique()) == 1
    width = int(widths[0, 0])
    assert width % align == 0
    assert 2 * abs(width - exact) <= align or width == align > exact > 0
    for layer, mask in masks.items():
        assert torch.equal(mask, top_atoms(scores[layer].atoms, widths[0, 0].expand(len(mask))))


@given(SCORES, RATIOS, st.sampled_from([2, 4]))
def test_alignment_moves_the_fewest_atoms(scores, ratio, align):
    """Brute force over all ways to round one layer's widths to the same total."""
    atoms = next(iter(scores.values())).atoms
    exact = prune({0: LayerScores(atoms)}, ratio)[0].sum(dim=1)
    found = align_widths(exact, atoms, align)
    ups = (found > exact).sum()

    def moved(widths):
        return int((widths - exact).abs().sum())

    down, movable = exact - exact % align, (exact % align > 0).nonzero().flatten().tolist()
    best = min(
        moved(
            torch.where(torch.tensor([i in chosen for i in range(len(exact))]), down + align, down)
        )
        for chosen in combinations_of(movable, int(ups))
    )
    assert moved(found) == best


def combinations_of(items, count):
    from itertools import combinations

    return [set(chosen) for chosen in combinations(items, count)]


def test_alignment_moves_the_least_important_atoms():
    """Two experts of width 2: one goes to 4, one to 0; the block of higher scores stays."""
    atoms = torch.tensor([[4.0, 3, 2, 1, 0, 0, 0, 0], [9, 8, 2, 1, 0, 0, 0, 0]])
    widths = align_widths(torch.tensor([2, 2]), atoms, 4)
    assert widths.tolist() == [0, 4]
    aligned = align_masks({0: atoms}, {0: top_atoms(atoms, torch.tensor([2, 2]))}, 4)[0]
    assert aligned.tolist() == [[False] * 8, [True] * 4 + [False] * 4]


@given(SCORES, st.floats(0, 0.5), st.integers(0, SIZE // 2))
def test_every_expert_keeps_its_best_atoms(scores, ratio, min_width):
    for layer, mask in prune(scores, ratio, min_width=min_width).items():
        best = scores[layer].atoms.argsort(dim=1, stable=True)[:, SIZE - min_width :]
        assert mask.gather(1, best).all()


def test_of_equal_scores_the_lower_layer_expert_and_atom_go_first():
    scores = {layer: LayerScores(torch.zeros(2, 3)) for layer in (1, 2)}
    masks = prune(scores, 5 / 12)
    assert masks[1].tolist() == [[False, False, False], [False, False, True]]
    assert masks[2].all()


def test_the_scores_are_not_modified_and_layers_compete():
    scores = {
        0: LayerScores(torch.tensor([[5.0, 6.0]])),
        1: LayerScores(torch.tensor([[1.0, 7.0]])),
    }
    before = {layer: score.atoms.clone() for layer, score in scores.items()}
    masks = prune(scores, 0.5, align=1)
    assert masks[0].tolist() == [[False, True]]
    assert masks[1].tolist() == [[False, True]]
    assert all(torch.equal(scores[layer].atoms, before[layer]) for layer in scores)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 25, float("nan"), float("inf")])
def test_ratios_out_of_range_are_refused(ratio):
    with pytest.raises(ValueError, match=r"0 <= ratio < 1 \(25 percent is 0.25\)"):
        select_masks("heapr", {0: LayerScores(torch.ones(2, 2))}, ratio, RouterNeeds(1), {})


def test_nan_and_no_scores_are_refused():
    bad = {3: LayerScores(torch.tensor([[1.0, torch.nan]]))}
    with pytest.raises(ValueError, match=r"layers\.3\.score holds NaN"):
        select_masks("heapr", bad, 0.5, RouterNeeds(1), {})
    with pytest.raises(ValueError, match="no layers to prune"):
        select_masks("heapr", {}, 0.5, RouterNeeds(1), {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "model"}, "scope 'model': wanted one of global, layer, expert"),
        ({"align": 3}, "alignment 3: wanted a divisor of the intermediate size 8"),
        ({"align": 0}, "alignment 0: wanted a divisor"),
        ({"min_width": 9}, "minimal width 9 .* wanted 0 to the intermediate size 8"),
        ({"min_width": -1}, "minimal width -1"),
        ({"min_width": 7}, r"removes 8 of the 16 atoms of all layers, and only 2 may go"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        prune({0: LayerScores(torch.rand(2, SIZE))}, 0.5, **options)


def test_protected_experts_stay_whole_or_the_budget_is_refused():
    atoms = torch.rand(4, SIZE)
    scores = {0: LayerScores(atoms).protect(torch.tensor([True, False, False, False]))}
    for align in (1, 4):
        assert prune(scores, 0.5, align=align)[0][0].all()
        assert prune(scores, 0.75, align=align)[0].sum() == SIZE
    for scope, ratio, where in (("global", 0.8, "all layers"), ("layer", 0.8, "layer 0")):
        with pytest.raises(ValueError, match=f"of {where}, and only 24 may go.*--allow-unseen"):
            prune(scores, ratio, scope=scope)
    with pytest.raises(ValueError, match=r"of layer 0 expert 0, and only 0 may go"):
        prune(scores, 0.5, scope="expert")


def tenp(scores, ratio, **options):
    return select_masks(
        "tenp", scores, ratio, RouterNeeds(1), selection_options("tenp", options)
    ).keep


@given(layer_scores(least_experts=2), st.floats(0, 0.9), st.sampled_from([1, 2, 4]))
def test_tenp_keeps_some_whole_and_narrows_the_others_alike(scores, ratio, align):
    masks = tenp(scores, ratio, align=align)
    atoms = sum(mask.numel() for mask in masks.values())
    if align == 1:
        assert removed(masks) == round(ratio * atoms)
    else:
        assert 2 * abs(removed(masks) - round(ratio * atoms)) <= align
    experts = next(iter(masks.values())).shape[0]
    whole_experts = round((1 - ratio) / 2 * len(masks) * experts)
    widths = torch.stack([mask.sum(dim=1) for mask in masks.values()])
    narrow = sorted(widths.flatten().tolist())[: widths.numel() - whole_experts]
    assert max(narrow) - min(narrow) <= align
    for layer, mask in masks.items():
        for expert in range(experts):
            kept, score = mask[expert], scores[layer].atoms[expert]
            assert kept.all() or not kept.any() or score[~kept].max() <= score[kept].min()
        wide, importance = mask.sum(dim=1), scores[layer].experts
        for one in range(experts):
            for two in range(experts):
                if align == 1 and wide[one] > wide[two]:
                    assert importance[one] >= importance[two]


def four_layers():
    """Random scores of 64 experts and their atoms."""
    generator = torch.Generator().manual_seed(0)
    return {
        layer: LayerScores(
            torch.rand(16, SIZE, generator=generator), torch.rand(16, generator=generator)
        )
        for layer in range(4)
    }


def test_tenp_keeps_more_experts_whole_in_deeper_layers():
    scores = four_layers()

    def whole_experts(**options):
        return [int(mask.all(dim=1).sum()) for mask in tenp(scores, 0.25, **options).values()]

    # 24 whole experts (α = 0.375) in proportion 1 : 4/3 : 5/3 : 2.
    assert whole_experts() == [4, 5, 7, 8]
    assert whole_experts(trapezoid="1:1") == [6, 6, 6, 6]
    assert whole_experts(trapezoid="2:1") == [8, 7, 5, 4]
    # All of ρ in whole experts leaves nothing for the others.
    assert sum(whole_experts(alpha=0.75)) == 48
    assert removed(tenp(scores, 0.25, alpha=0.75)) == 16 * SIZE
    assert removed(tenp(scores, 0.25, alpha=0.0)) == 16 * SIZE
    assert whole_experts(alpha=0.0) == [0, 0, 0, 0]


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=6), st.integers(1, 9), st.floats(0, 1))
def test_shares_sum_up_and_are_capped(weights, most, fraction):
    total = round(fraction * most * len(weights))
    shares = share_out(total, weights, most)
    assert sum(shares) == total
    assert all(0 <= share <= most for share in shares)
    if all(weight * total / sum(weights) <= most for weight in weights):
        quotas = [weight * total / sum(weights) for weight in weights]
        assert all(abs(s - q) < 1 + 1e-9 for s, q in zip(shares, quotas, strict=True))


def test_tenp_meets_its_budget_where_all_that_stays_is_whole_experts():
    """α = ρ: 0.7 of 64 experts are 45 after rounding, and 44.8 experts' atoms stay."""
    scores = four_layers()
    masks = tenp(scores, 0.3, alpha=0.7)
    assert removed(masks) == round(0.3 * 64 * SIZE)


def test_of_equal_experts_tenp_keeps_the_higher_index_whole():
    scores = {0: LayerScores(torch.rand(4, SIZE), torch.tensor([1.0, 1.0, 1.0, 1.0]))}
    assert tenp(scores, 0.25, alpha=0.5)[0].all(dim=1).tolist() == [False, False, True, True]
    more = {0: LayerScores(torch.rand(128, SIZE), torch.ones(128))}
    whole = tenp(more, 0.25, alpha=0.5)[0].all(dim=1)
    assert whole.nonzero().flatten().tolist() == list(range(64, 128))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.8}, r"alpha 0.8: wanted .* 0 to 0.75 \(1 - ratio\)"),
        ({"alpha": -0.1}, "alpha -0.1: wanted"),
        ({"trapezoid": "1"}, "trapezoid '1': wanted FIRST:LAST, both above 0"),
        ({"trapezoid": "0:1"}, "trapezoid '0:1'"),
        ({"trapezoid": "1:nan"}, "trapezoid '1:nan'"),
        ({"align": 3}, "alignment 3: wanted a divisor"),
        ({"scope": "layer"}, "method 'tenp' has no option --scope"),
        ({"min_width": 2}, "method 'tenp' has no option --min-width"),
    ],
)
def test_tenp_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        tenp({0: LayerScores(torch.rand(4, SIZE), torch.rand(4))}, 0.25, **options)


def test_tenp_keeps_protected_experts_whole_or_refuses():
    scores = {0: LayerScores(torch.rand(8, SIZE), torch.rand(8))}
    few = torch.zeros(8, dtype=torch.bool)
    few[[2, 5]] = True
    protected = {0: scores[0].protect(few)}
    assert tenp(protected, 0.25)[0][few].all()
    with pytest.raises(ValueError, match="2 experts saw too few tokens and must stay whole"):
        tenp(protected, 0.9)


def literal_shape(scores, ratio, top_k):
    """Bisection for α over prefixes, as in the paper."""
    order = {
        layer: x.atoms[:, 0].argsort(descending=True, stable=True) for layer, x in scores.items()
    }

    def prefixes(alpha):
        kept = {}
        for layer, x in scores.items():
            phi = x.atoms[:, 0].double()
            needed, total, count = alpha * phi.sum(), 0.0, 0
            while total < needed and count < len(phi):
                total += phi[order[layer][count]]
                count += 1
            kept[layer] = max(count, top_k)
        return kept

    experts = sum(x.atoms.shape[0] for x in scores.values())
    wanted = experts - round(ratio * experts)
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if sum(prefixes(middle).values()) <= wanted:
            low = middle
        else:
            high = middle
    return {
        layer: set(order[layer][:count].tolist()) for layer, count in prefixes(low).items()
    }, wanted


@given(st.integers(0, 1000), st.integers(1, 4), st.floats(0, 0.6), st.integers(1, 3))
def test_shape_finds_the_alpha_that_bisection_finds(seed, layers, ratio, top_k):
    generator = torch.Generator().manual_seed(seed)
    scores = {
        layer: LayerScores.whole(torch.rand(9, generator=generator) ** 3, SIZE)
        for layer in range(layers)
    }
    masks = select_masks("shape", scores, ratio, RouterNeeds(top_k), {})
    wanted, count = literal_shape(scores, ratio, top_k)
    found = {
        layer: set(mask.nonzero().flatten().tolist()) for layer, mask in masks.routable.items()
    }
    assert found == wanted
    assert sum(map(len, found.values())) == count
    for layer, mask in masks.keep.items():
        assert torch.equal(mask, masks.routable[layer][:, None].expand(-1, SIZE))


def test_whole_expert_methods_never_leave_fewer_than_k_experts():
    phi = torch.tensor([1.0, 0, 0, 0])
    scores = {
        0: LayerScores.whole(phi, SIZE),
        1: LayerScores.whole(torch.zeros(4), SIZE),
        2: LayerScores.whole(torch.ones(4), SIZE),
    }
    for method, scope in (
        ("shape", {}),
        ("shape", {"scope": "layer"}),
        ("reap", {"scope": "global"}),
        ("reap", {"scope": "layer"}),
        ("frequency", {"scope": "group"}),
    ):
        masks = select_masks(method, scores, 0.5, RouterNeeds(2), scope)
        assert [int(mask.sum()) for mask in masks.routable.values()] == [2, 2, 2], method
        assert masks.routable[0][0]
        with pytest.raises(ValueError, match=r"use at most 0\.5"):
            select_masks(method, scores, 0.75, RouterNeeds(2), scope)


def test_reap_removes_the_lowest_scores():
    scores = {
        0: LayerScores.whole(torch.tensor([5.0, 1, 2, 9]), SIZE),
        1: LayerScores.whole(torch.tensor([7.0, 8, 6, 3]), SIZE),
    }
    routable = select_masks("reap", scores, 3 / 8, RouterNeeds(1), {"scope": "global"}).routable
    assert [mask.tolist() for mask in routable.values()] == [
        [True, False, False, True], [True, True, True, False]
    ]  # fmt: skip
    routable = select_masks("reap", scores, 0.5, RouterNeeds(1), {"scope": "layer"}).routable
    assert [mask.tolist() for mask in routable.values()] == [
        [True, False, False, True], [True, True, False, False]
    ]  # fmt: skip
    for method in ("reap", "shape"):
        with pytest.raises(ValueError, match="experts go whole; wanted global, layer, group"):
            select_masks(method, scores, 0.5, RouterNeeds(1), {"scope": "expert"})


@pytest.mark.parametrize("method", ["reap", "shape", "frequency", "random-experts"])
def test_every_group_of_a_router_loses_as_much(method):
    router = RouterNeeds(2, ExpertGroups(2, 1, biased=True))
    scores = {
        0: LayerScores.whole(torch.tensor([8.0, 7, 6, 5, 1, 2, 3, 4]), SIZE),
        1: LayerScores.whole(torch.tensor([1.0, 9, 2, 8, 7, 3, 4, 6]), SIZE),
    }
    routable = select_masks(method, scores, 0.25, router, {"scope": "group"}).routable
    assert routable[0].tolist() == [True, True, True, False, False, True, True, True]
    assert routable[1].tolist() == [False, True, True, True, True, False, True, True]
    layer = select_masks(method, scores, 0.25, router, {"scope": "layer"}).routable
    assert layer[0].tolist() == [True, True, True, True, False, False, True, True]


@given(
    st.integers(0, 1000),
    st.sampled_from(["shape", "reap"]),
    st.sampled_from([(4, 1), (4, 2), (2, 1), (8, 3)]),
    st.booleans(),
    st.integers(2, 4),
    st.floats(0, 0.95),
)
def test_whole_experts_leave_a_router_with_groups_what_it_needs(
    seed, method, groups, biased, top_k, ratio
):
    """Otherwise they are refused: `atomic-moe check` never refuses a profile that `prune` wrote."""
    number, chosen = groups
    if top_k > chosen * 16 // number:
        return
    router = RouterNeeds(top_k, ExpertGroups(number, chosen, biased))
    generator = torch.Generator().manual_seed(seed)
    scores = {
        layer: LayerScores.whole(torch.rand(16, generator=generator).round(decimals=1), SIZE)
        for layer in range(3)
    }
    try:
        masks = select_masks(method, scores, ratio, router, selection_options(method, {}))
    except ValueError as error:
        assert "must stay for the router's choice" in str(error)
        return
    gone = sum(int((~mask).sum()) for mask in masks.routable.values())
    assert gone == round(ratio * 48)
    for mask in masks.routable.values():
        assert router.groups.fault(mask, top_k) is None


def test_groups_of_the_report():
    """16 experts in 4 groups, 2 of 4 allowed, 4 a token: half of them go, 70 % cannot."""
    router = RouterNeeds(4, ExpertGroups(4, 2, biased=False))
    scores = {0: LayerScores.whole(torch.arange(16.0), SIZE)}
    for method in ("shape", "reap"):
        masks = select_masks(method, scores, 0.5, router, {})
        assert masks.routable[0].view(4, 4).sum(dim=1).tolist() == [2, 2, 2, 2]
        with pytest.raises(ValueError, match=r"8 must stay for the router's .*use at most 0\.5"):
            select_masks(method, scores, 0.7, router, {})
