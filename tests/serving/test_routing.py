"""Profiles that exclude experts from routing equal a dense model with the same routing mask."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from tests.checkpoints import make_checkpoint, write_routing_profiles
from tests.serving.conftest import (
    activate,
    check_resident,
    engine,
    masked_transformers_logprobs,
    mixed_logprobs,
    packed_layers_of,
    prompt_logprobs,
)
from vllm_atomic_moe.files.profiles import PruningProfile
from vllm_atomic_moe.files.router import ExpertGroups

TOLERANCE = 1e-4
ATOM_BYTES = 3 * 128 * 4
NAMES = ("whole", "ragged", "zeroed")


def options(active, *resident):
    return {
        "load_format": "atomic-pruned",
        "model_loader_extra_config": {"active": active, "resident": list(resident)},
    }


def buffer_addresses(llm):
    return [buffer.data_ptr() for layer in packed_layers_of(llm) for buffer in layer.buffers()]


def chosen_experts(llm, monkeypatch):
    """Layer -> ids of the experts that the prompts' tokens were sent to."""
    from vllm_atomic_moe.engine.layer import AtomicExpertsMethod

    apply, seen = AtomicExpertsMethod.apply, {}

    def spy(self, layer, x, topk_weights, topk_ids, **rest):
        assert torch.isfinite(topk_weights).all()
        seen.setdefault(layer.index, set()).update(topk_ids.flatten().tolist())
        return apply(self, layer, x, topk_weights, topk_ids, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(AtomicExpertsMethod, "apply", spy)
        prompt_logprobs(llm)
    return seen


def check_profiles(llm, profiles, wanted, monkeypatch, mixed=True):
    """Each profile, then all in one batch: parity, and no token sent to an excluded expert."""
    before = buffer_addresses(llm)
    if mixed:
        for name, found in mixed_logprobs(llm, list(wanted)).items():
            assert (found - wanted[name]).abs().max() < TOLERANCE, name
    for name in (*wanted, next(iter(wanted))):
        activate(llm, name)
        assert (prompt_logprobs(llm) - wanted[name]).abs().max() < TOLERANCE, name
        chosen = chosen_experts(llm, monkeypatch)
        for layer, mask in profiles[name].routable.items():
            assert chosen[layer] <= set(mask.nonzero().flatten().tolist()), (name, layer)
    assert buffer_addresses(llm) == before


# --- parity ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["qwen3_moe", "olmoe", "mixtral", "glm4_moe"])
def test_served_equals_masked_dense(tmp_path, monkeypatch, architecture):
    model = tmp_path / "model"
    info = make_checkpoint(architecture, model)
    profiles = write_routing_profiles(info, model / "atomic_profiles")
    wanted = {name: masked_transformers_logprobs(model, profiles[name]) for name in NAMES}
    for name in ("ragged", "zeroed"):
        difference = (wanted["whole"] - wanted[name]).abs().max()
        assert difference > 0.01, f"whole and {name} are alike: the test is blind"

    with engine(model, **options(*NAMES)) as llm:
        check_profiles(llm, profiles, wanted, monkeypatch)
        # whole is the union of the three: the weights of the experts it excludes are nowhere.
        layers = packed_layers_of(llm)
        assert check_resident(layers, profiles["whole"].keep) < info.atoms * ATOM_BYTES
        for layer in layers:
            rows_E = layer.packed.layout.offsets_E1.diff()
            assert (rows_E > 0).tolist() == profiles["whole"].routable[layer.index].tolist()


def test_groups_without_bias_equal_stock_vllm_with_masked_logits(tmp_path, monkeypatch):
    """Experts that are never chosen need no zeroing: the oracle is the checkpoint as it is.

    Batches are those of the oracle: stock vLLM's answers for this architecture on CPU depend on
    what else is in a batch, by far more than rounding.
    """
    monkeypatch.setenv("VLLM_MLA_DISABLE", "1")
    model = tmp_path / "model"
    info = make_checkpoint("deepseek_v2", model)
    assert info.groups == ExpertGroups(2, 1, biased=False)
    profiles = write_routing_profiles(info, model / "atomic_profiles")
    profiles["dense"] = PruningProfile.dense(info)
    with engine(model) as llm:
        wanted = {"dense": prompt_logprobs(llm)}
        mask_gates(llm, profiles["whole"])
        wanted["whole"] = prompt_logprobs(llm)
    assert (wanted["whole"] - wanted["dense"]).abs().max() > 0.01
    with engine(model, **options("whole", "dense")) as llm:
        check_profiles(llm, profiles, wanted, monkeypatch, mixed=False)


def mask_gates(llm, profile: PruningProfile) -> None:
    """Mask the logits where stock vLLM computes them."""
    served = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    for index, mask in profile.routable.items():

        def hook(module, arguments, output, mask=mask):
            return output[0].masked_fill(~mask, float("-inf")), output[1]

        served.model.layers[index].mlp.gate.register_forward_hook(hook)


# --- the group rule -------------------------------------------------------------------------------

TOKENS, EXPERTS, GROUPS = 128, 12, 4


def dumb_choice(logits, bias, mask, scoring, chosen, top_k):
    """One token's choice, group by group, as if the excluded experts did not exist: a set."""
    logits = logits.masked_fill(~mask, float("-inf"))
    scores = logits.softmax(0) if scoring == "softmax" else logits.sigmoid()
    ranked = [
        sorted((float(scores[e] + bias[e]), e) for e in group if mask[e])[::-1]
        for group in torch.arange(EXPERTS).view(GROUPS, -1).tolist()
    ]
    best = 2 if bias.any() else 1
    groups = sorted((g for g in ranked if g), key=lambda g: sum(s for s, _ in g[:best]))[::-1]
    candidates = [expert for group in groups[:chosen] for expert in group]
    return {e for _, e in sorted(candidates)[::-1][:top_k]}


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("router_class", ["CPURouter", "GroupedTopKRouter"])
def test_group_rule_is_what_vllms_grouped_routers_need(scoring, biased, router_class):
    """GroupedTopKRouter is for CUDA; here its PyTorch code runs, not its fused kernel."""
    from vllm_atomic_moe.engine import compat
    from vllm_atomic_moe.engine.routing import RoutingMask

    known = {router.__name__: router for router in compat.KNOWN_ROUTERS}
    extra = {"use_grouped_topk": True} if router_class == "CPURouter" else {}
    generator = torch.Generator().manual_seed(0)
    verdicts = {"right": 0, "wrong": 0}
    for trial in range(60):
        chosen, top_k = 1 + trial % 3, 1 + trial % 4
        mask = torch.rand(EXPERTS, generator=generator) < 0.25 + 0.6 * (trial % 5) / 4
        if mask.sum() < top_k:
            continue
        bias = torch.randn(EXPERTS, generator=generator) / 4 * biased
        router = known[router_class](
            top_k=top_k,
            global_num_experts=EXPERTS,
            num_expert_group=GROUPS,
            topk_group=chosen,
            scoring_func=scoring,
            e_score_correction_bias=bias if biased else None,
            **extra,
        )
        routing = RoutingMask({"masked": mask})
        routing.prepare(bias if biased else None)
        routing.attach(router, slots_of([0] * TOKENS))
        logits = torch.randn(TOKENS, EXPERTS, generator=generator)
        with torch.compiler.set_stance("force_eager"):
            weights, ids = router.select_experts(logits, logits)
        right = all(
            set(ids[t].tolist()) == dumb_choice(logits[t], bias, mask, scoring, chosen, top_k)
            for t in range(TOKENS)
        )
        fault = ExpertGroups(GROUPS, chosen, biased).fault(mask, top_k)
        if fault is not None and "two best" in fault:
            continue  # a pruned expert's -1e9 takes part in such a group's score: refused as such
        assert right == (fault is None), (mask.tolist(), chosen, top_k, fault)
        if right:
            assert torch.allclose(weights.sum(dim=1), torch.ones(TOKENS))
        verdicts["right" if right else "wrong"] += 1
    assert min(verdicts.values()) >= 5, verdicts


def slots_of(slots):
    """Slots of a layer's tokens."""
    return lambda x: torch.tensor(slots, dtype=torch.int32)[:, None]


def test_masked_rows_are_never_nan_and_survivors_keep_their_weights():
    from vllm_atomic_moe.engine.compat import KNOWN_ROUTERS
    from vllm_atomic_moe.engine.routing import RoutingMask

    mask = torch.tensor([True, False, True, False])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        router = KNOWN_ROUTERS[0](top_k=2, global_num_experts=4, renormalize=False)
        routing = RoutingMask({"masked": mask, "plain": torch.ones(4, dtype=torch.bool)})
        routing.attach(router, slots_of([0, 1]))
        logits = torch.tensor([[1.0, 3e4, 1.0, 2.0]] * 2, dtype=dtype)
        weights, ids = router.select_experts(logits, logits)
        assert set(ids[0].tolist()) == {0, 2}
        assert torch.allclose(weights[0], torch.full((2,), 0.5), atol=1e-2)
        assert ids[1].tolist().count(1) == 1


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("groups", [1, GROUPS])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_tokens_of_one_batch_choose_by_their_own_masks(biased, groups, scoring):
    """One run of the router for every distinct mask; what it captures is what is chosen."""
    from vllm_atomic_moe.engine.compat import KNOWN_ROUTERS
    from vllm_atomic_moe.engine.routing import RoutingMask

    generator = torch.Generator().manual_seed(0)
    masks = {
        "all": torch.ones(EXPERTS, dtype=torch.bool),
        "even": torch.arange(EXPERTS) % 2 == 0,
        "low": torch.arange(EXPERTS) < 7,
        "even too": torch.arange(EXPERTS) % 2 == 0,
    }
    bias = torch.randn(EXPERTS, generator=generator) if biased else None

    def router(bias):
        return KNOWN_ROUTERS[0](
            top_k=2,
            global_num_experts=EXPERTS,
            num_expert_group=groups,
            topk_group=max(1, groups // 2),
            use_grouped_topk=True,
            scoring_func=scoring,
            e_score_correction_bias=bias,
        )

    mixed, captured = router(bias), []
    routing = RoutingMask(masks)
    routing.prepare(bias)
    assert len(routing.bias_VE) == 3
    slots = torch.arange(TOKENS) % 4
    routing.attach(mixed, slots_of(slots.tolist()))
    mixed.set_capture_fn(captured.append)
    logits = torch.randn(TOKENS, EXPERTS, generator=generator)
    weights, ids = mixed.select_experts(logits, logits)
    assert torch.equal(captured[0], ids)
    for slot, mask in enumerate(masks.values()):
        own = slots == slot
        alone = router(None if bias is None else bias.masked_fill(~mask, -1e9))
        kept = logits[own].masked_fill(~mask, float("-inf"))
        wanted_weights, wanted_ids = alone.select_experts(kept, kept)
        assert torch.equal(ids[own], wanted_ids)
        assert torch.equal(weights[own], wanted_weights)


def test_masks_that_were_not_prepared_are_refused():
    from vllm_atomic_moe.engine.routing import RoutingMask

    everything, even = torch.ones(4, dtype=torch.bool), torch.arange(4) % 2 == 0
    plain = RoutingMask({"dense": everything})
    with pytest.raises(ValueError, match="no profile listed at start does"):
        plain.set_slot(1, even)
    masked = RoutingMask({"dense": everything, "even": even})
    masked.set_slot(2, ~even)
    assert masked.routable_SE[2].tolist() == (~even).tolist()
    masked.prepare(torch.zeros(4))
    with pytest.raises(ValueError, match="none of those listed at start"):
        masked.set_slot(2, ~even)
    masked.set_slot(2, even)
    assert masked.variant_S[2] == masked.variant_S[1] != masked.variant_S[0]
    masked.set_slot(2, None)
    assert masked.routable_SE[2].all()


def test_a_bias_of_more_experts_than_are_packed_is_left_alone_without_masks():
    """LongCat's: its router also chooses among experts that compute nothing."""
    from vllm_atomic_moe.engine.routing import RoutingMask

    plain = RoutingMask({"dense": torch.ones(4, dtype=torch.bool)})
    plain.prepare(torch.ones(6))
    assert not plain.masks_routing
    plain.prepare(torch.ones(4))  # masks of another layer wrap this one's router, too
    assert plain.bias_VE.tolist() == [[1.0] * 4]


# --- refusals -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Qwen3-MoE with routing profiles."""
    directory = tmp_path_factory.mktemp("models") / "model"
    write_routing_profiles(make_checkpoint("qwen3_moe", directory), directory / "atomic_profiles")
    return directory


def test_profiles_that_mask_nothing_leave_any_router_alone(model, monkeypatch):
    from vllm_atomic_moe.engine.compat import MoERunner

    monkeypatch.setenv("VLLM_MOE_ROUTING_SIMULATION_STRATEGY", "uniform_random")
    with engine(model, **options("zeroed", "dense")) as llm:
        assert torch.isfinite(prompt_logprobs(llm)).all()
        served = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
        runners = [module for module in served.modules() if isinstance(module, MoERunner)]
        assert len(runners) == 3
        for runner in runners:
            assert "_compute_routing" not in vars(runner.router)
            assert runner.routed_experts.routing.routable_SE.all()


@pytest.mark.parametrize("resident", [("whole",), ("zeroed", "whole")])
def test_unknown_router_is_refused(model, monkeypatch, no_weights_read, resident):
    monkeypatch.setenv("VLLM_MOE_ROUTING_SIMULATION_STRATEGY", "uniform_random")
    words = r"not read \(RoutingSimulatorRouter; .* mask of profile 'whole', model.layers"
    with pytest.raises(ValueError, match=words), engine(model, **options(*resident)):
        pass


def test_custom_routing_is_refused(model, monkeypatch, no_weights_read):
    from vllm.model_executor.models import qwen3_moe

    original = qwen3_moe.FusedMoEFactory
    monkeypatch.setattr(
        qwen3_moe,
        "FusedMoEFactory",
        lambda **given: original(**given, custom_routing_function=lambda **_: None),
    )
    words = r"custom routing \(with the routing mask of profile 'whole', .*; drop `routable`"
    with pytest.raises(ValueError, match=words), engine(model, **options("whole")):
        pass


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_hash_indices_table": torch.zeros(3)}, "hash routing"),
        ({"bias_vl": torch.zeros(4)}, "a routing bias for image tokens"),
        ({"scoring_func": "sqrtsoftplus"}, r"other than softmax or sigmoid \(sqrtsoftplus; "),
        ({"_compute_routing": print}, "routers that another plug-in has taken"),
        ({"e_score_correction_bias": torch.zeros(4)}, "biases that are not the layer's own"),
    ],
)
def test_router_properties_no_small_model_here_has_are_refused(change, words):
    from vllm_atomic_moe.engine.refusals import check_router

    layer, runner, masks = routed_layer()
    check_router(layer, runner, masks)
    vars(runner.router).update(change)
    with pytest.raises(ValueError, match=words):
        check_router(layer, runner, masks)


def test_runner_platform_and_float16_are_refused(monkeypatch):
    from vllm_atomic_moe.engine import refusals

    layer, runner, masks = routed_layer()
    with pytest.raises(ValueError, match=r"routers that were not read \(NoneType"):
        refusals.check_router(layer, None, masks)
    layer.moe_config.in_dtype = torch.float16
    refusals.check_router(layer, runner, masks)  # vLLM's CPU router computes in float32
    platform = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: True, device_name="other")
    monkeypatch.setattr(refusals, "current_platform", platform)
    with pytest.raises(ValueError, match=r"correction biases in float16 .*use --dtype bfloat16"):
        refusals.check_router(layer, runner, masks)
    layer.moe_config.in_dtype = torch.bfloat16
    refusals.check_router(layer, runner, masks)
    platform.is_cuda = lambda: False
    with pytest.raises(ValueError, match=r"platforms other than CPU and CUDA \(other; "):
        refusals.check_router(layer, runner, masks)


def routed_layer():
    """A layer of four experts in two groups, its runner and its masks, without a model."""
    from vllm_atomic_moe.engine.compat import KNOWN_ROUTERS, MoERunner

    bias = torch.zeros(4)
    runner = MoERunner.__new__(MoERunner)
    torch.nn.Module.__init__(runner)
    runner.router = KNOWN_ROUTERS[0](
        top_k=1,
        global_num_experts=4,
        use_grouped_topk=True,
        num_expert_group=2,
        topk_group=1,
        scoring_func="sigmoid",
        e_score_correction_bias=bias,
    )
    layer = SimpleNamespace(
        index=3,
        layer_name="model.layers.3.mlp.experts",
        global_num_experts=4,
        e_score_correction_bias=bias,
        moe_config=SimpleNamespace(in_dtype=torch.bfloat16, router_logits_dtype=None),
    )
    return layer, runner, {"shape": torch.tensor([True, True, False, False])}


def test_groups_that_only_the_router_tells_are_checked():
    from vllm_atomic_moe.engine.refusals import check_router

    layer, runner, masks = routed_layer()
    masks["bad"] = torch.tensor([True, True, True, False])
    words = r"profile 'bad': layers.3.routable leaves \[2, 1\] experts in the router's groups"
    with pytest.raises(ValueError, match=words):
        check_router(layer, runner, masks)
    runner.router.top_k = 3
    with pytest.raises(ValueError, match=r"profile 'shape': .* leaves 2 experts, a token uses 3"):
        check_router(layer, runner, masks)


def test_groups_that_the_configuration_tells_are_checked_first(tmp_path, no_weights_read):
    """By `atomic-moe check` and by the loader."""

    model = tmp_path / "model"
    info = make_checkpoint("glm4_moe", model)
    assert info.groups == ExpertGroups(2, 1, biased=True)
    keep = torch.ones(8, 64, dtype=torch.bool)
    keep[:3] = False
    metadata = {"model": json.dumps(info.identity())}
    routable = {layer: keep.any(dim=1) for layer in info.layers}
    keeps = {layer: keep.clone() for layer in info.layers}
    profile = PruningProfile("one", keeps, routable, metadata)
    profile.write(model / "atomic_profiles" / "one.safetensors")
    words = r"profile 'one': layers.1.routable leaves \[1, 4\] experts .* at least two of a group"
    with pytest.raises(ValueError, match=words):
        profile.check(info)
    with pytest.raises(ValueError, match=words), engine(model, load_format="atomic-pruned"):
        pass


def test_digest_depends_on_the_routing_masks(model):
    from vllm_atomic_moe.engine.options import ResidentProfiles
    from vllm_atomic_moe.files.checkpoint import describe_checkpoint

    info = describe_checkpoint(model)
    profile = PruningProfile.read(model / "atomic_profiles" / "whole.safetensors")
    unmasked = PruningProfile("whole", profile.keep, metadata=profile.metadata)
    first, second = (
        ResidentProfiles(info, "whole", {"whole": each}).digest() for each in (profile, unmasked)
    )
    assert first != second
