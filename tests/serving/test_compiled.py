"""The demo, compiled: two profile sets one after another through one compile cache, float32."""

from __future__ import annotations

import pytest

from tests.checkpoints import zero_pruned
from tests.serving.conftest import DEMO, engine, logprobs_of, prompt_logprobs
from vllm_atomic_moe.profiles import PruningProfile

PROFILES = ("heapr-20", "heapr-40")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Per profile: log-probabilities of a compiled engine, and its configuration's hash."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CACHE_ROOT", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        for profile in PROFILES:
            with engine(
                DEMO,
                load_format="atomic-pruned",
                model_loader_extra_config={"active": profile},
                enforce_eager=False,
            ) as llm:
                config = llm.llm_engine.model_executor.driver_worker.worker.vllm_config
                found[profile] = (prompt_logprobs(llm), config.compute_hash())
                assert config.compilation_config.mode != 0, "not compiled"
    return found


@pytest.mark.parametrize("profile", PROFILES)
def test_compiled_and_eager_equal_zeroed_dense(compiled, tmp_path, profile):
    masks = PruningProfile.read(DEMO / "atomic_profiles" / f"{profile}.safetensors")
    zero_pruned(DEMO, tmp_path / "zeroed", masks)
    wanted = logprobs_of(tmp_path / "zeroed")
    eager = logprobs_of(
        DEMO, load_format="atomic-pruned", model_loader_extra_config={"active": profile}
    )
    assert (eager - wanted).abs().max() < 1e-4
    assert (compiled[profile][0] - wanted).abs().max() < 1e-4


def test_profiles_have_their_own_compile_cache_keys(compiled):
    (first, first_hash), (second, second_hash) = compiled.values()
    assert first_hash != second_hash
    assert (first - second).abs().max() > 0.01
