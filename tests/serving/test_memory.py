"""Loading 1.1 GiB of experts: the pruned memory is never there, at peak or at rest."""

from __future__ import annotations

import pytest

from tests.memory import EXPERT_BYTES, SHARD_BYTES, make_large_checkpoint, measure
from vllm_atomic_moe.profiles import PruningProfile

SLACK_BYTES = 64 * 2**20  # what vLLM's model and loader allocate besides the weights


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    directory = tmp_path_factory.mktemp("large")
    make_large_checkpoint(directory, ratio=0.5)
    profile = PruningProfile.read(directory / "atomic_profiles" / "random.safetensors")
    found = {name: measure(directory, name) for name in ("safetensors", "atomic-pruned")}
    for shard in directory.glob("*.safetensors"):
        shard.unlink()
    return profile.kept, found


def test_resident_memory_is_what_is_kept(measured):
    kept, found = measured
    pruned, dense = found["atomic-pruned"], found["safetensors"]
    saved = (1 - kept) * EXPERT_BYTES
    assert dense["parameters"] - pruned["parameters"] == pytest.approx(saved, rel=0.02)
    assert dense["rest"] - pruned["rest"] > saved - SLACK_BYTES


def test_peak_is_resident_plus_one_shard_at_most(measured):
    _, found = measured
    pruned = found["atomic-pruned"]
    assert pruned["peak"] - pruned["before"] < pruned["parameters"] + SHARD_BYTES + SLACK_BYTES
