"""The switch inside the workers: who may take it, what it changes, and what it leaves alone."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from tests.checkpoints import (
    make_checkpoint,
    ragged_masks,
    write_profile,
    write_routing_profiles,
    zero_pruned,
)
from tests.serving.conftest import (
    engine,
    masked_transformers_logprobs,
    packed_layers_of,
    prompt_logprobs,
)
from tests.serving.test_parity import transformers_logprobs
from vllm_atomic_moe.experts.backends.cpu.library import SLACK_BYTES
from vllm_atomic_moe.files.profiles import PruningProfile

RESIDENT = ["narrow", "other", "hollow", "whole", "dense"]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint; profiles that are not nested, one that masks routing, one with a layer of
    width zero, and one that is not resident.
    """
    directory = tmp_path_factory.mktemp("model")
    info = make_checkpoint("qwen2_moe", directory)
    profiles = directory / "atomic_profiles"
    found = {
        "narrow": write_profile(info, "narrow", profiles, seed=1),
        "other": write_profile(info, "other", profiles, seed=2),
        "absent": write_profile(info, "absent", profiles, seed=4),
        "whole": write_routing_profiles(info, profiles)["whole"],
        "dense": PruningProfile.dense(info),
    }
    masks = ragged_masks(info, seed=3)
    masks[info.layers[1]][:] = False
    metadata = {"model": json.dumps(info.identity())}
    found["hollow"] = PruningProfile("hollow", masks, metadata=metadata)
    found["hollow"].write(profiles / "hollow.safetensors")
    return directory, info, found


@pytest.fixture(scope="module")
def llm(model):
    options = {"active": "narrow", "resident": RESIDENT[1:]}
    with engine(model[0], load_format="atomic-pruned", model_loader_extra_config=options) as served:
        yield served


@pytest.fixture
def control(llm):
    """One call to the worker; the switch that a test leaves behind is ended."""

    def call(verb, **arguments):
        (reply,) = llm.collective_rpc("atomic_moe_control", args=(verb, arguments))
        return reply

    yield call
    owner = call("status")["owner"]
    if owner:
        call("rollback", owner=owner)
        call("release", owner=owner)


def begin(control, profile, owner="me", displaced=None, lease_s=60.0, **changed):
    generation = changed.get("generation", control("status")["generation"])
    return control(
        "begin",
        owner=owner,
        profile=profile,
        generation=generation,
        displaced=displaced,
        lease_s=lease_s,
    )


def switch(control, llm, profile):
    """All steps of one switch."""
    generation = control("status")["generation"]
    for verb, arguments in (
        ("prepare", {}),
        ("commit", {}),
        ("settle", {"switched": True, "record": {"profile": profile}}),
        ("release", {}),
    ):
        if verb == "prepare":
            assert begin(control, profile) == {"ok": True}
        reply = control(verb, owner="me", **arguments)
        assert reply["ok"], reply
    llm.reset_prefix_cache()
    status = control("status")
    assert (status["active"], status["generation"]) == (profile, generation + 1)
    assert (status["state"], status["owner"]) == ("serving", None)
    assert status["last_switch"] == {"profile": profile}


def test_every_profile_computes_what_it_keeps_and_no_weight_moves(llm, control, model, tmp_path):
    directory, _, profiles = model
    tensors = {
        (layer.index, name): (tensor.data_ptr(), tensor.shape)
        for layer in packed_layers_of(llm)
        for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]
    }
    weights = [layer.packed.weights[0].clone() for layer in packed_layers_of(llm)]
    for name in [*RESIDENT[1:], RESIDENT[0]]:
        switch(control, llm, name)
        found = prompt_logprobs(llm)
        if profiles[name].masks_routing:
            wanted = masked_transformers_logprobs(directory, profiles[name])
        else:
            shutil.rmtree(tmp_path / "zeroed", ignore_errors=True)
            zero_pruned(directory, tmp_path / "zeroed", profiles[name])
            wanted = transformers_logprobs(tmp_path / "zeroed")
        assert (found - wanted).abs().max() < TOLERANCE, name
    for layer, before in zip(packed_layers_of(llm), weights, strict=True):
        assert torch.equal(layer.packed.weights[0], before)
        for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
            assert tensors[layer.index, name] == (tensor.data_ptr(), tensor.shape)


def test_status_and_catalogue(control, model):
    _, info, profiles = model
    status = control("status")
    atom_bytes = 3 * info.hidden_size * 4
    assert status["ok"]
    assert status["resident"] == RESIDENT
    assert status["known"] == sorted(["absent", "ragged", "zeroed", *RESIDENT])
    assert status["dense_bytes"] == info.atoms * atom_bytes
    # `dense` is resident: its atoms are the union, whatever else is.
    slack = len(info.layers) * SLACK_BYTES
    assert status["resident_bytes"] == info.atoms * atom_bytes + slack
    assert status["active_bytes"] == profiles[status["active"]].kept_atoms * atom_bytes
    listed = {profile["name"]: profile for profile in control("profiles")["profiles"]}
    assert list(listed) == status["known"]
    for name, profile in profiles.items():
        assert listed[name]["kept"] == profile.kept
        assert listed[name]["bytes"] == profile.kept_atoms * atom_bytes
        assert listed[name]["resident"] == (name in RESIDENT)
        widths = control("profile", name=name)["widths"]
        assert widths == {str(layer): profile.widths(layer).tolist() for layer in profile.keep}
    assert listed["dense"]["method"] == "dense"


def test_only_one_owner_at_a_time(control):
    assert begin(control, "other") == {"ok": True}
    assert control("status")["state"] == "switching"
    for owner, displaced in (("you", None), ("you", "somebody")):
        reply = begin(control, "whole", owner=owner, displaced=displaced)
        assert reply == {"ok": False, "error": "another switch came first"}
    for verb in ("prepare", "commit", "rollback"):
        reply = control(verb, owner="you")
        assert not reply["ok"]
        assert "displaced by another" in reply["error"]
        assert reply["displaced"]
    assert begin(control, "whole", owner="you", displaced="me") == {"ok": True}
    assert not control("commit", owner="me")["ok"]
    assert control("status")["owner"] == "you"


def test_an_old_generation_is_refused(control):
    generation = control("status")["generation"]
    for wrong in (generation - 1, generation + 1):
        assert not begin(control, "other", generation=wrong)["ok"]
    assert control("status")["state"] == "serving"


def test_what_is_not_resident_is_refused(control):
    reply = begin(control, "absent")
    assert not reply["ok"]
    assert "'absent' is not resident" in reply["error"]


def test_leases_are_reported(control):
    assert begin(control, "other", lease_s=100) == {"ok": True}
    assert 90 < control("status")["lease_s"] <= 100
    assert begin(control, "other", owner="you", displaced="me", lease_s=-1) == {"ok": True}
    assert control("status")["lease_s"] < 0


def test_a_commit_is_taken_back(llm, control):
    wanted = prompt_logprobs(llm)
    generation = control("status")["generation"]
    begin(control, "hollow")
    control("commit", owner="me")
    llm.reset_prefix_cache()
    assert (prompt_logprobs(llm) - wanted).abs().max() > 0.01
    assert control("rollback", owner="me") == {"ok": True}
    assert control("settle", owner="me", switched=False, record={"error": "x"})["ok"]
    assert control("status")["state"] == "switching"
    assert control("release", owner="me")["ok"]
    llm.reset_prefix_cache()
    assert torch.equal(prompt_logprobs(llm), wanted)
    status = control("status")
    assert (status["generation"], status["last_switch"]) == (generation, {"error": "x"})


def test_nothing_raises(control):
    for verb, arguments in (("burn", {}), ("profile", {"name": "x"}), ("begin", {"owner": 1})):
        reply = control(verb, **arguments)
        assert not reply["ok"]
        assert reply["error"]


def test_a_failure_stays(control, llm):
    begin(control, "other")
    assert control("fail", owner="you", failure="not yours", record={})["displaced"]
    assert control("release", owner="me")["ok"]
    failed = {"failure": "why", "record": {"outcome": "failed"}}
    assert control("fail", owner="me", **failed) == {"ok": True}
    status = control("status")
    assert (status["state"], status["failure"]) == ("failed", "why")
    reply = begin(control, "other")
    assert not reply["ok"]
    assert "an earlier switch failed: why" in reply["error"]


def test_other_load_formats_are_told_apart(model):
    with engine(model[0]) as llm:
        (reply,) = llm.collective_rpc("atomic_moe_control", args=("status", {}))
    assert reply == {
        "ok": False,
        "error": "the model was not loaded with --load-format atomic-pruned",
    }
