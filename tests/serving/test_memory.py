"""Loading 1.1 GiB of experts: the pruned memory is never there, at peak or at rest."""

from __future__ import annotations

import pytest

from tests.load_time import measure
from tests.synthetic import Sizes, make_checkpoint
from vllm_atomic_moe.files.profiles import PruningProfile

SIZES = Sizes(layers=6, experts=32, experts_per_token=4, hidden=1024, intermediate=1024)
SLACK_BYTES = 64 * 2**20  # what vLLM's model and loader allocate besides the weights


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    directory = tmp_path_factory.mktemp("large")
    make_checkpoint(directory, SIZES, {"half": 0.5})
    profile = PruningProfile.read(directory / "atomic_profiles" / "half.safetensors")
    found = {name: measure(directory, name) for name in ("dense", "half")}
    for shard in directory.glob("*.safetensors"):
        shard.unlink()
    return profile.kept, found


def test_resident_memory_is_what_is_kept(measured):
    kept, found = measured
    pruned, dense = found["half"], found["dense"]
    saved = (1 - kept) * SIZES.expert_bytes
    assert dense["parameters"] - pruned["parameters"] == pytest.approx(saved, rel=0.02)
    assert dense["rest"] - pruned["rest"] > saved - SLACK_BYTES


def test_peak_is_resident_plus_one_shard_at_most(measured):
    _, found = measured
    pruned = found["half"]
    assert (
        pruned["peak"] - pruned["before"] < pruned["parameters"] + SIZES.shard_bytes + SLACK_BYTES
    )
