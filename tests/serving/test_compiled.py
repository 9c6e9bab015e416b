"""The demo, compiled: two profile sets one after another through one compile cache, float32.

The second set holds profiles that mask routing too, made active in place.
"""

from __future__ import annotations

import shutil

import pytest

from tests.checkpoints import write_routing_profiles, zero_pruned
from tests.serving.conftest import (
    DEMO,
    activate,
    engine,
    logprobs_of,
    masked_transformers_logprobs,
    prompt_logprobs,
)
from vllm_atomic_moe.files.checkpoint import describe_checkpoint
from vllm_atomic_moe.files.profiles import PruningProfile

RESIDENT = {"heapr-20": [], "heapr-40": ["whole", "ragged"]}


@pytest.fixture(scope="module")
def profiles(tmp_path_factory):
    """A directory with the demo's profiles and three that exclude experts or their atoms."""
    directory = tmp_path_factory.mktemp("profiles") / "profiles"
    shutil.copytree(DEMO / "atomic_profiles", directory)
    write_routing_profiles(describe_checkpoint(DEMO), directory)
    return directory


@pytest.fixture(scope="module")
def compiled(tmp_path_factory, profiles):
    """Per active profile: what a compiled engine gives for it and for its other resident profiles,
    name -> log-probabilities, and its configuration's hash.
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
                found[active] = (logprobs, config.compute_hash())
    return found


@pytest.mark.parametrize("profile", RESIDENT)
def test_compiled_and_eager_equal_zeroed_dense(compiled, tmp_path, profile):
    masks = PruningProfile.read(DEMO / "atomic_profiles" / f"{profile}.safetensors")
    zero_pruned(DEMO, tmp_path / "zeroed", masks)
    wanted = logprobs_of(tmp_path / "zeroed")
    eager = logprobs_of(
        DEMO, load_format="atomic-pruned", model_loader_extra_config={"active": profile}
    )
    assert (eager - wanted).abs().max() < 1e-4
    assert (compiled[profile][0][profile] - wanted).abs().max() < 1e-4


def test_compiled_equals_masked_dense_after_a_switch_in_place(compiled, profiles):
    found = compiled["heapr-40"][0]
    for name in RESIDENT["heapr-40"]:
        profile = PruningProfile.read(profiles / f"{name}.safetensors")
        assert profile.masks_routing
        assert (found[name] - masked_transformers_logprobs(DEMO, profile)).abs().max() < 1e-4
    assert (found["whole"] - found["ragged"]).abs().max() > 0.01


def test_profiles_have_their_own_compile_cache_keys(compiled):
    (first, first_hash), (second, second_hash) = compiled.values()
    assert first_hash != second_hash
    assert (first["heapr-20"] - second["heapr-40"]).abs().max() > 0.01
