"""Every method's scores equal its formula, transcribed literally: loops over experts and tokens."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.unit.long_way import LongWay, run_the_long_way
from tests.unit.tiny_models import make_model, random_windows
from vllm_atomic_moe.calibration.collect import collect
from vllm_atomic_moe.calibration.experts import find_experts
from vllm_atomic_moe.calibration.text import CalibrationText
from vllm_atomic_moe.files.statistics import LayerSums
from vllm_atomic_moe.scoring import known_methods, method_options, score_layers

SEQ_LEN = 24
WHOLE = tuple(name for name, it in known_methods().entries.items() if it.whole_experts)


@pytest.fixture(
    scope="module",
    params=[
        "glm4_moe",
        *(pytest.param(it, marks=pytest.mark.full) for it in ("qwen3_moe", "mixtral", "llama4")),
    ],
)
def calibrated(request, tmp_path_factory):
    """Sums of a calibration run, and of the slow oracle over the same two domains, in float64."""
    directory = tmp_path_factory.mktemp(request.param)
    info = make_model(request.param, directory, num_experts_per_tok=2)
    domains = [random_windows(2, SEQ_LEN), random_windows(3, SEQ_LEN, seed=1)]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    text = CalibrationText({"a": domains[0], "b": domains[1]}, ())
    sums = collect(model, find_experts(model, info), info, text, batch_size=2)
    return info, sums, run_the_long_way(directory, info, domains, torch.float64)


def heapr(layer: LongWay) -> torch.Tensor:
    rows = []
    for expert, down in enumerate(layer.down):
        tokens = layer.of_expert(expert)
        if not tokens:
            rows.append(torch.zeros(down.shape[1], dtype=torch.float64))
            continue
        mean_g = sum(torch.outer(token.g, token.g) for token in tokens) / len(tokens)
        mean_h2 = sum(token.h**2 for token in tokens) / len(tokens)
        w = down.double()
        rows.append(
            torch.stack(
                [0.5 * mean_h2[k] * (w[:, k] @ mean_g @ w[:, k]) for k in range(w.shape[1])]
            )
        )
    return torch.stack(rows)


def heapr_by_frequency(layer: LongWay) -> torch.Tensor:
    frequency = [
        len(layer.of_expert(expert)) / len(layer.tokens) for expert in range(len(layer.down))
    ]
    return heapr(layer) * torch.tensor(frequency, dtype=torch.float64)[:, None]


def camera(layer: LongWay) -> torch.Tensor:
    rows = []
    for expert, down in enumerate(layer.down):
        tokens = layer.of_expert(expert)
        mean_h2 = sum((token.h**2 for token in tokens), torch.zeros(down.shape[1]).double())
        rows.append(mean_h2 / max(1, len(tokens)) * (down.double() ** 2).sum(dim=0))
    return torch.stack(rows)


def magnitude(layer: LongWay) -> torch.Tensor:
    return torch.stack(
        [
            torch.stack(
                [
                    gate[k].double().norm() * up[k].double().norm() * down[:, k].double().norm()
                    for k in range(down.shape[1])
                ]
            )
            for gate, up, down in zip(layer.gate, layer.up, layer.down, strict=True)
        ]
    )


def reap(layer: LongWay) -> torch.Tensor:
    scores = []
    for expert in range(len(layer.down)):
        tokens = layer.of_expert(expert)
        scores.append(sum(float(t.p * t.y.norm()) for t in tokens) / max(1, len(tokens)))
    return torch.tensor(scores, dtype=torch.float64)


def frequency(layer: LongWay) -> torch.Tensor:
    chosen = [len(layer.of_expert(expert)) for expert in range(len(layer.down))]
    return torch.tensor(chosen, dtype=torch.float64) / len(layer.tokens)


def tenp_atoms(layer: LongWay) -> torch.Tensor:
    rows = []
    for expert, down in enumerate(layer.down):
        tokens, w = layer.of_expert(expert), down.double()
        scores = torch.zeros(w.shape[1], dtype=torch.float64)
        for token in tokens:
            for k in range(w.shape[1]):
                scores[k] += token.h[k] * (w[:, k] @ token.y) / token.y.norm() / len(tokens)
        rows.append(scores)
    return torch.stack(rows)


def tenp_experts(layer: LongWay) -> torch.Tensor:
    total = torch.zeros(len(layer.down), dtype=torch.float64)
    for domain in {token.domain for token in layer.tokens}:
        scores = torch.zeros(len(layer.down), dtype=torch.float64)
        for token in layer.tokens:
            if token.domain == domain:
                cosine = token.x @ token.y / (token.x.norm() * token.y.norm())
                scores[token.expert] += token.p * token.y.norm() * (1 - cosine)
        total += scores / math.sqrt(sum(score**2 for score in scores.tolist()))
    return total


def shape(layer: LongWay) -> torch.Tensor:
    chosen = [experts for _, experts in layer.chosen]
    sets = set(chosen)

    def v(a):
        return chosen.count(a)

    def n(b):
        return sum(1 for experts in chosen if b <= experts)

    phi = torch.zeros(len(layer.down), dtype=torch.float64)
    for i in range(len(layer.down)):
        with_i = [a for a in sets if i in a]
        if with_i:
            alpha = min(v(a) / n(a - {i}) for a in with_i)
            phi[i] = sum(v(a) - alpha * n(a - {i}) for a in with_i)
    return phi / phi.sum()


ORACLES = {
    "heapr": heapr,
    "magnitude": magnitude,
    "camera": camera,
    "reap": reap,
    "frequency": frequency,
    "tenp": tenp_atoms,
    "shape": shape,
}


def test_every_method_but_random_has_an_oracle():
    assert set(ORACLES) == set(known_methods().entries) - {"random", "random-experts"}


@pytest.mark.parametrize("method", ORACLES)
def test_scores_are_the_formula(method, calibrated):
    info, sums, long_way = calibrated
    options = method_options(method, {})
    if "allow_unseen" in options:
        options["allow_unseen"] = True
    scores = score_layers(method, sums, options)
    assert tuple(scores) == tuple(long_way) == info.layers
    for layer, of_layer in scores.items():
        wanted = ORACLES[method](long_way[layer])
        if method in WHOLE:
            wanted = wanted[:, None].expand(-1, info.intermediate_size)
        assert of_layer.atoms.dtype == torch.float32
        assert wanted.abs().max() > 0
        torch.testing.assert_close(of_layer.atoms.double(), wanted, rtol=1e-6, atol=1e-9)


def test_tenp_scores_experts_beside_atoms(calibrated):
    info, sums, long_way = calibrated
    scores = score_layers("tenp", sums, {"allow_unseen": True})
    for layer in info.layers:
        wanted = tenp_experts(long_way[layer])
        torch.testing.assert_close(scores[layer].experts.double(), wanted, rtol=1e-6, atol=0)


def test_heapr_weighted_by_routing_frequency(calibrated):
    info, sums, long_way = calibrated
    options = {"weight_by_frequency": True, "allow_unseen": True}
    scores = score_layers("heapr", sums, options)
    for layer in info.layers:
        wanted = heapr_by_frequency(long_way[layer])
        torch.testing.assert_close(scores[layer].atoms.double(), wanted, rtol=1e-6, atol=0)


def test_the_table_of_sets_is_what_the_router_chose(calibrated):
    info, sums, long_way = calibrated
    for layer in info.layers:
        table = {
            (domain, frozenset(ids)): count
            for (domain, *ids), count in zip(
                sums[layer].sets.tolist(), sums[layer].set_counts.tolist(), strict=True
            )
        }
        chosen = long_way[layer].chosen
        assert table == {entry: chosen.count(entry) for entry in set(chosen)}


@pytest.mark.parametrize("method", ["heapr", "tenp", "camera"])
def test_experts_with_few_tokens_are_never_scored_as_useless(method, calibrated):
    _, sums, _ = calibrated
    found = score_layers(method, sums, method_options(method, {}))
    allowed = score_layers(method, sums, method_options(method, {"allow_unseen": True}))
    protected = 0
    for layer, of_layer in sums.items():
        few = of_layer.count.sum(dim=0) < 32
        protected += int(few.sum())
        assert found[layer].atoms[few].isposinf().all()
        assert torch.equal(found[layer].atoms[~few], allowed[layer].atoms[~few])
        assert allowed[layer].atoms.isfinite().all()
        if method == "tenp":
            assert found[layer].experts[few].isposinf().all()
            assert found[layer].experts[~few].isfinite().all()
    assert protected, "every expert saw enough tokens: the test is blind"


def test_random_experts_are_whole_and_follow_the_seed(calibrated):
    info, sums, _ = calibrated
    found = [score_layers("random-experts", sums, {"seed": seed}) for seed in (0, 0, 1)]
    for layer in info.layers:
        one, again, other = (scores[layer].atoms for scores in found)
        assert torch.equal(one, again)
        assert not torch.equal(one, other)
        assert torch.equal(one, one[:, :1].expand_as(one))


@pytest.mark.parametrize("method", [*WHOLE, "random", "magnitude"])
def test_other_methods_have_no_such_exception(method, calibrated):
    _, sums, _ = calibrated
    for scores in score_layers(method, sums, method_options(method, {})).values():
        assert scores.atoms.isfinite().all()


def test_shape_scores_many_experts_without_number_overflow():
    """512 experts, 10 per token: a set of nine does not fit one 64-bit number."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.stack([torch.randperm(512, generator=generator)[:10] for _ in range(40)])
    chosen[1] = chosen[0]
    # Sets that share nine experts, so that N(A∖i) is more than v(A).
    chosen[2, :9] = chosen[0, :9]
    sets, counts = chosen.sort(dim=1).values.unique(dim=0, return_counts=True)
    domain = torch.zeros(len(sets), 1, dtype=torch.int64)
    sums = dataclasses.replace(
        LayerSums.zeros((1, 512, 1), False),
        sets=torch.cat([domain, sets], dim=1).short(),
        set_counts=counts,
    )
    layer = type("Chosen", (), {})()
    layer.chosen = [(0, frozenset(row)) for row in chosen.tolist()]
    layer.down = range(512)
    found = known_methods().entries["shape"].score_layer(sums, 0).atoms[:, 0].double()
    torch.testing.assert_close(found, shape(layer), rtol=1e-6, atol=1e-9)


def test_shape_refuses_a_router_that_picks_one_expert():
    sums = dataclasses.replace(
        LayerSums.zeros((1, 4, 1), False),
        sets=torch.zeros(3, 2).short(),
        set_counts=torch.ones(3),
    )
    with pytest.raises(ValueError, match="routes every token to 1 expert"):
        known_methods().entries["shape"].score_layer(sums, 0)


def test_heapr_refuses_statistics_without_gradients(calibrated):
    _, sums, _ = calibrated
    without = {layer: dataclasses.replace(of_layer, g2=None) for layer, of_layer in sums.items()}
    with pytest.raises(ValueError, match=r"lack g2, which heapr needs \(made with --no-gr"):
        score_layers("heapr", without, method_options("heapr", {}))
    score_layers("tenp", without, method_options("tenp", {}))
