"""KL divergence of two models' reported predictions, and agreement of answers."""

from __future__ import annotations

import math

import pytest
import torch

from vllm_atomic_moe.measure.likeness import (
    Answers,
    Predictions,
    compare_answers,
    divergence,
)

VOCABULARY, POSITIONS = 40, 50
GENERATOR = torch.Generator().manual_seed(0)


def logits(spread: float = 3.0) -> torch.Tensor:
    return spread * torch.randn(POSITIONS, VOCABULARY, generator=GENERATOR)


def predict(logits: torch.Tensor, tokens: torch.Tensor, likeliest: int) -> Predictions:
    logprobs = logits.log_softmax(dim=1)
    values, ids = logprobs.topk(likeliest, dim=1)
    own = logprobs.gather(1, tokens[:, None])
    ids = torch.cat([tokens[:, None], ids], dim=1).int()
    return Predictions(ids, torch.cat([own, values], dim=1))


def the_long_way(dense: Predictions, other: Predictions, position: int) -> float:
    p, q = (
        dict(
            zip(it.ids_TA[position].tolist(), it.logprobs_TA[position].exp().tolist(), strict=True)
        )
        for it in (dense, other)
    )
    pairs = [(p[token], q[token]) for token in p.keys() & q.keys()]
    rest = [max(1 - math.fsum(side), 1e-6) for side in zip(*pairs, strict=True)]
    return math.fsum(one * math.log(one / two) for one, two in [*pairs, rest])


@pytest.mark.parametrize("likeliest", [0, 1, 5, 39, 40])
def test_divergence_is_over_tokens_that_both_report(likeliest):
    base = logits()
    changed = base + logits(0.5)
    tokens = torch.randint(VOCABULARY, (POSITIONS,), generator=GENERATOR)
    dense, other = (predict(it, tokens, likeliest) for it in (base, changed))
    found = divergence(dense, other)
    wanted = [the_long_way(dense, other, position) for position in range(POSITIONS)]
    assert found.tolist() == pytest.approx(wanted, abs=1e-7)
    p, q = (it.double().log_softmax(dim=1) for it in (base, changed))
    whole = (p.exp() * (p - q)).sum(dim=1)
    assert (found <= whole + 1e-5).all()
    if likeliest == VOCABULARY:
        assert found.tolist() == pytest.approx(whole.tolist(), abs=1e-5)
    assert divergence(dense, dense).abs().max() == 0


def test_more_tokens_raise_the_lower_bound():
    base = logits()
    changed = base + logits(0.5)
    tokens = torch.randint(VOCABULARY, (POSITIONS,), generator=GENERATOR)
    means = []
    for likeliest in (1, 5, 20, 40):
        dense, other = (predict(it, tokens, likeliest) for it in (base, changed))
        means.append(divergence(dense, other).mean().item())
    assert means == sorted(means)
    assert means[0] < 0.8 * means[-1] < 0.9 * means[-2]


def test_tokens_impossible_in_both_add_nothing():
    base = torch.zeros(1, 4)
    base[0, 3] = -torch.inf
    tokens = torch.tensor([3])
    assert divergence(predict(base, tokens, 4), predict(base, tokens, 4)).tolist() == [0]


@pytest.mark.parametrize(
    ("other", "equal", "common"),
    [
        ([[1, 2, 3, 4], [5, 6]], 1.0, 1.0),
        ([[1, 2, 9, 4], [5, 6]], 0.5, (0.5 + 1) / 2),
        # One ends early, where the other goes on.
        ([[1, 2, 3], [5, 6, 7, 8]], 0.0, (0.75 + 0.5) / 2),
        ([[9, 2, 3, 4], []], 0.0, 0.0),
    ],
)
def test_answers_are_compared_token_by_token(other, equal, common):
    dense = [[1, 2, 3, 4], [5, 6]]
    assert compare_answers(dense, other, 4) == Answers(2, 4, equal, common)
    assert compare_answers(other, dense, 4) == Answers(2, 4, equal, common)
