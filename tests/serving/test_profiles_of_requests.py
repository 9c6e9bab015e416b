"""Each request of a batch gets its own profile, whatever is loaded and changed meanwhile.

All tests of this file share one engine.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from vllm import SamplingParams
from vllm.exceptions import VLLMNotFoundError, VLLMValidationError

from tests.checkpoints import (
    make_checkpoint,
    ragged_masks,
    write_profile,
    write_routing_profiles,
)
from tests.serving.conftest import (
    activate,
    core,
    engine,
    masked_transformers_logprobs,
    mixed_logprobs,
    packed_layers_of,
    prompt_logprobs,
)
from vllm_atomic_moe.engine.requests import Loaded, Served
from vllm_atomic_moe.experts.backends.cpu.arguments import SLACK_BYTES
from vllm_atomic_moe.experts.packing import SLOTS
from vllm_atomic_moe.files.profiles import PruningProfile

TOLERANCE = 1e-4
NAMES = ["narrow", "other", "hollow", "whole", "dense"]
LONG = [3 + (11 * j + j * j) % 250 for j in range(300)]  # two blocks of 128 tokens, and some


def make_model(directory):
    """A checkpoint; ragged profiles that are not nested, one that masks routing, one with a layer
    of width zero, the dense one, and one that is not listed.
    """
    info = make_checkpoint("qwen2_moe", directory, max_position_embeddings=512)
    files = directory / "atomic_profiles"
    hollow = ragged_masks(info, seed=3)
    hollow[info.layers[1]][:] = False
    found = {
        "narrow": write_profile(info, "narrow", files, seed=1),
        "other": write_profile(info, "other", files, seed=2),
        "hollow": PruningProfile("hollow", hollow, metadata={"model": json.dumps(info.identity())}),
        "whole": write_routing_profiles(info, files)["whole"],
        "dense": PruningProfile.dense(info),
        "absent": write_profile(info, "absent", files, seed=4),
    }
    found["hollow"].write(files / "hollow.safetensors")
    return SimpleNamespace(directory=directory, info=info, files=files, profiles=found)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def wanted(model):
    """Name -> transformers' log-probabilities with the masks of the profile."""
    found = {
        name: masked_transformers_logprobs(model.directory, profile)
        for name, profile in model.profiles.items()
    }
    for one, other in combinations(found, 2):
        assert (found[one] - found[other]).abs().max() > 0.01, "alike: the test is blind"
    return found


def served(model, names, **options):
    """An engine with these profiles, the first of them active."""
    extra = {"active": names[0], "resident": names[1:]}
    return engine(
        model.directory,
        load_format="atomic-pruned",
        model_loader_extra_config=extra,
        **{"max_model_len": 512, "enable_prefix_caching": True, **options},
    )


@pytest.fixture(scope="module")
def shared(model):
    with served(model, NAMES) as running:
        yield running


@pytest.fixture
def llm(shared):
    """The shared engine; profiles that a test leaves loaded are unloaded."""
    yield shared
    activate(shared, NAMES[0])
    for name in core(shared, "status")["served"]["loaded"].keys() - set(NAMES):
        unload(shared, name)
    shared.reset_prefix_cache()


def change(llm, verb, profile, **more):
    """A change as the admin endpoint makes it; admission follows as an API server's does."""
    reply = core(llm, "change", verb=verb, profile=profile, **more)
    if reply["ok"]:
        admission = llm.llm_engine.input_processor.atomic_moe_admission
        admission.served = Served.of(reply["served"])
    return reply


def load(llm, profile):
    return change(llm, "load", profile.name, digest=profile.digest(), kept_atoms=profile.kept_atoms)


def unload(llm, name):
    assert change(llm, "withdraw", name)["ok"]
    with pytest.raises(VLLMNotFoundError):
        answers(llm, [[3]], [name])
    return change(llm, "free", name)


def close(found, wanted):
    return (found - wanted).abs().max() < TOLERANCE


def bits(llm):
    return [layer.packed.bits_SW.clone() for layer in packed_layers_of(llm)]


def unchanged(llm, before):
    return all(map(torch.equal, bits(llm), before))


def answers(llm, prompts, names, tokens=6):
    """(tokens, log-probabilities, cached tokens) of every prompt under every profile, one batch."""
    jobs = [(prompt, name) for prompt in prompts for name in names]
    settings = {"max_tokens": tokens, "temperature": 0, "logprobs": 0, "detokenize": False}
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt, _ in jobs],
        [
            SamplingParams(**settings, ignore_eos=True, extra_args=name and {"profile": name})
            for _, name in jobs
        ],
        use_tqdm=False,
    )
    return [
        (
            list(output.outputs[0].token_ids),
            [
                score[token].logprob
                for score, token in zip(
                    output.outputs[0].logprobs, output.outputs[0].token_ids, strict=True
                )
            ],
            output.num_cached_tokens,
        )
        for output in outputs
    ]


def check_same(found, expected):
    assert [tokens for tokens, *_ in found] == [tokens for tokens, *_ in expected]
    for (_, one, _), (_, other, _) in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=TOLERANCE)


def test_every_profile_of_a_batch_computes_what_it_keeps_and_no_weight_moves(llm, wanted):
    tensors = {
        (layer.index, name): (tensor.data_ptr(), tensor.shape)
        for layer in packed_layers_of(llm)
        for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]
    }
    weights = [layer.packed.weights[0].clone() for layer in packed_layers_of(llm)]
    before = bits(llm)
    for name, found in mixed_logprobs(llm, NAMES).items():
        assert close(found, wanted[name]), name
    assert unchanged(llm, before)
    slots = {layer.token_slots.data_ptr() for layer in packed_layers_of(llm)}
    assert len(slots) == 1, "one buffer for all layers"
    for layer, then in zip(packed_layers_of(llm), weights, strict=True):
        assert torch.equal(layer.packed.weights[0], then)
        for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
            assert tensors[layer.index, name] == (tensor.data_ptr(), tensor.shape)


def test_status_description_and_catalogue(llm, model):
    from vllm_atomic_moe.control.catalogue import Catalogue

    atom_bytes = 3 * model.info.hidden_size * 4
    description, status = core(llm, "describe"), core(llm, "status")
    assert description["dense_bytes"] == model.info.atoms * atom_bytes
    assert list(description["profiles"]) == NAMES
    served = Served.of(status["served"])
    for name, profile in served.loaded.items():
        assert (profile.digest, profile.kept_atoms) == (
            model.profiles[name].digest(),
            model.profiles[name].kept_atoms,
        )
    # `dense` is resident: its atoms are the union, whatever else is.
    slack = len(model.info.layers) * SLACK_BYTES
    (memory,) = status["ranks"]
    assert memory["resident_bytes"] == model.info.atoms * atom_bytes + slack
    assert memory["tiles"] == memory["live_tiles"][served.loaded["dense"].slot]
    assert memory["live_tiles"][len(NAMES) :] == [0] * (SLOTS - len(NAMES))
    listed = {entry["name"]: entry for entry in Catalogue(description).profiles(served)}
    assert list(listed) == sorted([*model.profiles, "ragged", "zeroed"])
    for name, profile in model.profiles.items():
        entry = listed[name]
        assert entry["bytes"] == profile.kept_atoms * atom_bytes
        assert (entry["loaded"], entry["servable"]) == (name in NAMES, True)
        assert entry["active"] == (name == NAMES[0])


def test_requests_without_a_name_get_the_active_profile(llm, wanted):
    for name in ("other", "dense", "narrow"):
        activate(llm, name)
        assert close(prompt_logprobs(llm), wanted[name]), name


@pytest.mark.parametrize(
    ("name", "error"), [("nobody", VLLMNotFoundError), (7, VLLMValidationError)]
)
def test_a_refused_request_leaves_nothing_behind(llm, wanted, name, error):
    admitted = core(llm, "status")["requests"]
    with pytest.raises(error):
        answers(llm, [[3, 4, 5]], [name])
    assert core(llm, "status")["requests"] == admitted
    assert not llm.llm_engine.has_unfinished_requests()
    assert close(prompt_logprobs(llm), wanted[NAMES[0]])


def test_a_profile_is_loaded_and_unloaded_while_the_engine_serves(llm, model, wanted):
    absent = model.profiles["absent"]
    reply = load(llm, absent)
    assert reply["ok"]
    slot = reply["served"]["loaded"]["absent"]["slot"]
    assert slot == len(NAMES)
    assert load(llm, absent)["served"] == reply["served"], "a repeated load changes nothing"
    for name, found in mixed_logprobs(llm, [*NAMES, "absent"]).items():
        assert close(found, wanted[name]), name
    for verb, kind in (("withdraw", "ProfileActiveError"), ("free", "ProfileInUseError")):
        refused = change(llm, verb, NAMES[0])
        assert (refused["ok"], refused["kind"]) == (False, kind)
    assert unload(llm, "absent")["ok"]
    assert not any(layer[slot].any() for layer in bits(llm))
    assert change(llm, "activate", "absent")["kind"] == "ProfileNotLoadedError"
    assert change(llm, "withdraw", "absent")["kind"] == "NotFoundError"


def test_a_wrong_digest_is_refused(llm):
    before = bits(llm), core(llm, "status")["served"]
    reply = change(llm, "load", "absent", digest="0" * 64, kept_atoms=1)
    assert (reply["ok"], reply["kind"]) == (False, "RankError")
    assert "its file is not the same everywhere, or changed" in reply["error"]
    assert (unchanged(llm, before[0]), core(llm, "status")["served"]) == (True, before[1])


def test_a_rank_that_fails_half_way_frees_the_slot(llm, model, monkeypatch):
    before, layer = bits(llm), packed_layers_of(llm)[-1]
    set_slot = layer.set_slot

    def fail(slot, profile):
        if profile is not None:
            raise RuntimeError("out of luck")
        set_slot(slot, profile)

    monkeypatch.setattr(layer, "set_slot", fail)
    assert load(llm, model.profiles["absent"])["error"] == "rank 0: out of luck"
    assert unchanged(llm, before)


def test_there_are_sixteen_slots(llm, model, tmp_path):
    masks = model.profiles["absent"].keep
    more = [PruningProfile(f"more-{index}", masks) for index in range(SLOTS - len(NAMES) + 1)]
    for profile in more:
        profile.write(model.files / f"{profile.name}.safetensors")
    try:
        *fitting, last = more
        assert all(load(llm, profile)["ok"] for profile in fitting)
        refused = load(llm, last)
        assert (refused["ok"], refused["kind"]) == (False, "NoFreeSlotError")
        gone = fitting[3].name
        slot = core(llm, "status")["served"]["loaded"][gone]["slot"]
        unload(llm, gone)
        assert load(llm, last)["served"]["loaded"][last.name]["slot"] == slot
        found = mixed_logprobs(llm, [fitting[0].name, last.name, NAMES[0]])
        assert close(found[last.name], found[fitting[0].name])
    finally:
        for profile in more:
            (model.files / f"{profile.name}.safetensors").unlink()


def test_a_name_is_loaded_anew_from_a_changed_file(llm, model):
    """Earlier marks mean the old file; its cached prefixes do not serve the new one."""
    path = model.files / "moving.safetensors"

    def write(seed):
        return write_profile(model.info, "moving", model.files, seed)

    try:
        old = write(seed=5)
        load(llm, old)
        stale = llm.llm_engine.input_processor.atomic_moe_admission.served.mark("moving")
        answers(llm, [LONG], ["moving"])
        assert answers(llm, [LONG], ["moving"])[0][2] == 256
        new = write(seed=6)
        refused = load(llm, new)
        assert (refused["ok"], refused["kind"]) == (False, "ProfileChangedError")
        assert answers(llm, [LONG], ["moving"])[0][2] == 256
        unload(llm, "moving")
        assert load(llm, new)["ok"]
        assert answers(llm, [LONG], ["moving"])[0][2] == 0
        expected = masked_transformers_logprobs(model.directory, new)
        assert close(mixed_logprobs(llm, ["moving", "other"])["moving"], expected)
        request = SimpleNamespace(lora_request=stale, sampling_params=None, pooling_params=None)
        with pytest.raises(ValueError, match="'moving' is not loaded, or loaded from another file"):
            llm.llm_engine.engine_core.engine_core.atomic_moe_profiles.admit(request)
        with pytest.raises(VLLMNotFoundError, match="not loaded any more"):
            llm.generate([{"prompt_token_ids": LONG}], lora_request=stale, use_tqdm=False)
    finally:
        path.unlink(missing_ok=True)


def test_the_state_of_another_engine_is_taken_if_it_is_newer(llm, model, wanted):
    start = Served.of(core(llm, "status")["served"])
    absent = model.profiles["absent"]
    more = {**start.loaded, "absent": Loaded(9, absent.digest(), absent.kept_atoms)}
    del more["hollow"]
    for generation in (start.generation - 1, start.generation):
        old = Served(generation, "other", more)
        assert core(llm, "apply", served=old.plain())["served"] == start.plain()
    newer = Served(start.generation + 5, "other", more)
    for _ in range(2):
        assert core(llm, "apply", served=newer.plain())["served"] == newer.plain()
    llm.llm_engine.input_processor.atomic_moe_admission.served = newer
    assert not any(layer[start.loaded["hollow"].slot].any() for layer in bits(llm))
    assert close(mixed_logprobs(llm, ["absent", "narrow"])["absent"], wanted["absent"])
    back = replace(start, generation=newer.generation + 1)
    core(llm, "apply", served=back.plain())
    llm.llm_engine.input_processor.atomic_moe_admission.served = back
    assert close(mixed_logprobs(llm, ["hollow", "narrow"])["hollow"], wanted["hollow"])


def test_profiles_never_share_a_prefix_and_a_change_empties_nothing(llm):
    for name in NAMES:
        assert [answers(llm, [LONG], [name])[0][2] for _ in range(2)] == [0, 256], name
    expected = answers(llm, [LONG], NAMES)
    assert [cached for *_, cached in expected] == [256] * len(NAMES)
    for active in ("other", "narrow", "whole", "narrow"):
        activate(llm, active)
        unnamed = answers(llm, [LONG], [None])
        check_same(unnamed, [expected[NAMES.index(active)]])
        assert unnamed[0][2] == 256
    assert [cached for *_, cached in answers(llm, [LONG], NAMES)] == [256] * len(NAMES)


def test_counts_and_abort(llm):
    settings = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True, detokenize=False)
    before = {name: n["admitted"] for name, n in core(llm, "status")["requests"].items()}
    for index, name in enumerate(("other", "whole", None)):
        params = settings.clone()
        params.extra_args = name and {"profile": name}
        llm.llm_engine.add_request(f"request {index}", {"prompt_token_ids": [3, 4]}, params)
    waiting = core(llm, "status")["requests"]
    assert [waiting[name]["waiting"] for name in NAMES] == [1, 1, 0, 1, 0]
    llm.llm_engine.step()
    running = core(llm, "status")["requests"]
    assert [running[name]["running"] for name in NAMES] == [1, 1, 0, 1, 0]
    assert [running[name]["admitted"] - before[name] for name in NAMES] == [1, 1, 0, 1, 0]
    assert core(llm, "abort", profile="whole")["aborted"] == 2
    left = core(llm, "status")["requests"]
    assert [left[name]["running"] for name in NAMES] == [0, 0, 0, 1, 0]
    llm.llm_engine.abort_request([f"request {index}" for index in range(3)])
    llm.llm_engine.step()
    assert not llm.llm_engine.has_unfinished_requests()


def test_workers_answer_whatever_they_are_asked(llm):
    for verb, arguments in (
        ("burn", {}),
        ("load", {"name": "x", "slot": 1, "digest": ""}),
        ("free", {"slot": 99}),
        ("memory", {"x": 1}),
    ):
        (reply,) = llm.collective_rpc("atomic_moe_rank", args=(verb, arguments))
        assert not reply["ok"]
        assert reply["error"]
