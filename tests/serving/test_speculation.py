"""A multi-token-prediction head or a draft model proposes tokens, whole, while the model is pruned.

Greedy answers are those without it, and its proposals are often accepted.
"""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from tests.checkpoints import write_profile, write_routing_profiles
from tests.gated_delta_net import make_qwen3_5, save_random
from tests.prediction_heads import add_qwen_head, make_glm4_moe_with_head
from tests.serving.conftest import PROMPTS, core, engine, packed_layers_of
from vllm_atomic_moe.convert.exporting.export import export
from vllm_atomic_moe.files.layouts import atom_bytes

NAMES = ["narrow", "whole"]  # the second masks routing
HEAD = "model.layers.3."
HEAD_PROPOSES = {"method": "mtp", "num_speculative_tokens": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    info = make_glm4_moe_with_head(directory)
    assert info.layers == (1, 2)
    write_profile(info, NAMES[0], directory / "atomic_profiles", seed=1)
    write_routing_profiles(info, directory / "atomic_profiles")
    return directory, info


@pytest.fixture(scope="module")
def wanted(model):
    """Greedy tokens by profile, without speculation."""
    with served(model[0], *NAMES) as llm:
        found = answers(llm, NAMES)
    assert found[NAMES[0]] != found[NAMES[1]]
    return found


def answers(llm, names):
    """Greedy tokens of every prompt under every profile, in one batch."""
    from vllm import SamplingParams

    jobs = [(prompt, name) for prompt in PROMPTS for name in names]
    settings = {"max_tokens": 16, "temperature": 0, "ignore_eos": True, "detokenize": False}
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt, _ in jobs],
        [SamplingParams(**settings, extra_args={"profile": name}) for _, name in jobs],
        use_tqdm=False,
    )
    found = {name: [] for name in names}
    for (_, name), output in zip(jobs, outputs, strict=True):
        found[name] += output.outputs[0].token_ids
    return found


def accepted(llm):
    """How many proposed tokens were accepted."""
    name = "vllm:spec_decode_num_accepted_tokens"
    return next(metric.value for metric in llm.get_metrics() if metric.name == name)


def served(directory, *names, **options):
    extra = {"active": names[0], "resident": [*names[1:]]} if names else {}
    options = {"disable_log_stats": False, "model_loader_extra_config": extra, **options}
    return engine(directory, load_format="atomic-pruned", **options)


def test_head_proposes_for_two_profiles(model, wanted):
    directory, info = model
    with served(directory, *NAMES, speculative_config=HEAD_PROPOSES) as llm:
        assert answers(llm, NAMES) == wanted
        assert accepted(llm) > 50
        check_head_is_whole(llm, info)


def test_export_keeps_the_head(model, wanted, tmp_path):
    directory, _ = model
    profile = directory / "atomic_profiles" / f"{NAMES[0]}.safetensors"
    export(str(directory), profile, tmp_path / "out")
    before = load_file(directory / "model.safetensors")
    after = {}
    for shard in (tmp_path / "out/atomic_weights").glob("*.safetensors"):
        after |= load_file(shard)
    head = [name for name in before if name.startswith(HEAD)]
    assert all(after[name].equal(before[name]) for name in head)
    with served(tmp_path / "out", speculative_config=HEAD_PROPOSES) as llm:
        assert answers(llm, NAMES[:1])[NAMES[0]] == wanted[NAMES[0]]
        assert accepted(llm) > 25


def test_draft_model_of_experts_proposes(model, wanted):
    """Here the unpruned model itself."""
    directory, _ = model
    draft = {"method": "draft_model", "model": str(directory), "num_speculative_tokens": 2}
    with served(directory, *NAMES, speculative_config=draft) as llm:
        assert answers(llm, NAMES) == wanted
        assert accepted(llm) > 25


@pytest.mark.full
def test_head_of_qwen3_5(tmp_path):
    """In bfloat16 some answers diverge, as vLLM's own do: linear attention rounds differently with
    speculation.
    """
    save_random(make_qwen3_5(), tmp_path, fused=True)
    info = add_qwen_head(tmp_path)
    assert info.layers == (0, 1, 2)
    for seed, name in enumerate(NAMES):
        write_profile(info, name, tmp_path / "atomic_profiles", seed)
    options = {
        "dtype": "bfloat16",
        "limit_mm_per_prompt": {"image": 0, "video": 0},
        "enable_prefix_caching": False,  # with it vLLM's CPU worker fails
    }
    with served(tmp_path, *NAMES, **options) as llm:
        wanted = answers(llm, NAMES)
    with served(tmp_path, *NAMES, speculative_config=HEAD_PROPOSES, **options) as llm:
        found = answers(llm, NAMES)
        assert accepted(llm) > 25
    assert agreement(wanted[NAMES[0]], wanted[NAMES[1]]) < 0.7
    for name in NAMES:
        assert agreement(found[name], wanted[name]) > 0.7


def agreement(one, other):
    """The fraction of tokens that are the same."""
    return sum(map(int.__eq__, one, other)) / len(one)


def check_head_is_whole(llm, info):
    """The head is vLLM's own layer with its own router, and not part of the memory report."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    modules = list(runner.drafter.model.modules())
    (experts,) = [module for module in modules if isinstance(module, RoutedExperts)]
    assert type(experts) is RoutedExperts
    atoms = info.num_experts * info.intermediate_size
    per_atom = atom_bytes(info.hidden_size, 4)
    held = experts.w13_weight.nbytes + experts.w2_weight.nbytes
    assert held == atoms * per_atom
    (router,) = [module.router for module in modules if hasattr(module, "router")]
    assert not {"select_experts", "_compute_routing"} & vars(router).keys()
    packed = packed_layers_of(llm)
    assert [layer.index for layer in packed] == list(info.layers)
    (memory,) = core(llm, "status")["ranks"]
    assert core(llm, "describe")["dense_bytes"] == info.atoms * per_atom
    assert memory["resident_bytes"] == sum(layer.packed.weight_bytes for layer in packed)
