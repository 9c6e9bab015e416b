"""The demo, compiled: two profile sets one after another through one compile cache, float32.

The second set holds profiles that mask routing too. Each is made active, then one more is loaded,
and all are computed in one batch.
"""

from __future__ import annotations

import shutil

import pytest

from tests.checkpoints import write_profile, write_routing_profiles, zero_pruned
from tests.quantized import quantize_checkpoint
from tests.serving.conftest import (
    DEMO,
    activate,
    core,
    engine,
    logprobs_of,
    masked_transformers_logprobs,
    mixed_logprobs,
    prompt_logprobs,
)
from tests.unit.tiny_models import make_model, random_text
from vllm_atomic_moe import api
from vllm_atomic_moe.files.checkpoint import describe_checkpoint
from vllm_atomic_moe.files.profiles import PruningProfile

RESIDENT = {"heapr-20": [], "heapr-40": ["whole", "ragged"]}
LATER = "heapr-60"  # its atoms are among those of the others


@pytest.fixture(scope="module")
def profiles(tmp_path_factory):
    """A directory with the demo's profiles and three that exclude experts or their atoms."""
    directory = tmp_path_factory.mktemp("profiles") / "profiles"
    shutil.copytree(DEMO / "atomic_profiles", directory)
    write_routing_profiles(describe_checkpoint(DEMO), directory)
    return directory


@pytest.fixture(scope="module")
def compiled(tmp_path_factory, profiles):
    """Per active profile: log-probabilities by name from a compiled engine, with each profile
    active and with all in one batch; and the hash of its configuration.
    """
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CACHE_ROOT", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        for active, others in RESIDENT.items():
            with engine(
                DEMO,
                load_format="atomic-pruned",
                model_loader_extra_config={
                    "profiles": str(profiles),
                    "active": active,
                    "resident": others,
                },
                enforce_eager=False,
            ) as llm:
                config = llm.llm_engine.model_executor.driver_worker.worker.vllm_config
                assert config.compilation_config.mode != 0, "not compiled"
                logprobs = {active: prompt_logprobs(llm)}
                for name in others:
                    activate(llm, name)
                    logprobs[name] = prompt_logprobs(llm)
                load(llm, profiles)
                mixed = mixed_logprobs(llm, [active, *others, LATER])
                found[active] = (logprobs, mixed, config.compute_hash())
    return found


def load(llm, profiles):
    later = PruningProfile.read(profiles / f"{LATER}.safetensors")
    known = {"digest": later.digest(), "kept_atoms": later.kept_atoms}
    reply = core(llm, "change", verb="load", profile=LATER, **known)
    assert reply["ok"], reply
    activate(llm, reply["served"]["active"])


@pytest.mark.parametrize("profile", RESIDENT)
def test_compiled_and_eager_equal_zeroed_dense(compiled, tmp_path, profile):
    masks = PruningProfile.read(DEMO / "atomic_profiles" / f"{profile}.safetensors")
    zero_pruned(DEMO, tmp_path / "zeroed", masks)
    wanted = logprobs_of(tmp_path / "zeroed")
    eager = logprobs_of(
        DEMO, load_format="atomic-pruned", model_loader_extra_config={"active": profile}
    )
    assert (eager - wanted).abs().max() < 1e-4
    for found in compiled[profile][:2]:
        assert (found[profile] - wanted).abs().max() < 1e-4


def test_compiled_equals_masked_dense_whatever_is_active_or_in_the_batch(compiled, profiles):
    active, mixed, _ = compiled["heapr-40"]
    for name in RESIDENT["heapr-40"]:
        profile = PruningProfile.read(profiles / f"{name}.safetensors")
        assert profile.masks_routing
        wanted = masked_transformers_logprobs(DEMO, profile)
        for found in (active, mixed):
            assert (found[name] - wanted).abs().max() < 1e-4
    assert (active["whole"] - active["ragged"]).abs().max() > 0.01


def test_compiled_computes_what_was_loaded_later(compiled, profiles):
    profile = PruningProfile.read(profiles / f"{LATER}.safetensors")
    wanted = masked_transformers_logprobs(DEMO, profile)
    for active, mixed, _ in compiled.values():
        assert (mixed[LATER] - wanted).abs().max() < 1e-4
        assert all((found - wanted).abs().max() > 0.01 for found in active.values())


def test_profiles_have_their_own_compile_cache_keys(compiled):
    (first, _, first_hash), (second, _, second_hash) = compiled.values()
    assert first_hash != second_hash
    assert (first["heapr-20"] - second["heapr-40"]).abs().max() > 0.01


@pytest.mark.full
def test_a_refit_in_place_is_compiled_anew(tmp_path, monkeypatch):
    """The path, config.json and the profile stay; rows of down become plain."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    make_model("qwen3_moe", tmp_path / "original")
    quantize_checkpoint(tmp_path / "original", tmp_path / "model", "int4")
    (tmp_path / "text.txt").write_text(random_text(4000))
    write_profile(describe_checkpoint(tmp_path / "model"), "half", tmp_path, seed=1)
    fit = {"data": [str(tmp_path / "text.txt")], "seq_len": 64, "samples": 32}
    hashes, found = [], []
    for refit in (False, True):
        told = {"refit": True, **fit} if refit else {}
        api.export(tmp_path / "model", tmp_path / "half.safetensors", tmp_path / "out", **told)
        served = {"load_format": "atomic-pruned", "model_loader_extra_config": {"active": "half"}}
        with engine(tmp_path / "out", enforce_eager=False, **served) as llm:
            worker = llm.llm_engine.model_executor.driver_worker.worker
            hashes.append(worker.vllm_config.compute_hash())
            found.append(prompt_logprobs(llm))
        eager = logprobs_of(tmp_path / "out", **served)
        assert (found[-1] - eager).abs().max() < 1e-4
    assert hashes[0] != hashes[1]
    assert (found[0] - found[1]).abs().max() > 0.01
