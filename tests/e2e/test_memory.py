"""Loading 576 MiB of experts never allocates the pruned memory, neither at peak nor at rest."""

from __future__ import annotations

import pytest

from tests.e2e.conftest import ENVIRONMENT
from vllm_atomic_moe.measure.server_benchmark import measure_servers
from vllm_atomic_moe.measure.server_report import Phase, ServerPlan
from vllm_atomic_moe.measure.synthetic import Sizes, make_checkpoint

pytestmark = pytest.mark.full
SIZES = Sizes(layers=3)
SLACK_BYTES = 64 * 2**20  # what vLLM's model and loader allocate besides the weights
PLAN = ServerPlan(
    phases=(Phase("decode", input_tokens=8, output_tokens=8, concurrency=1, requests=1),),
    warmups=0,
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Dense, and pruned by half."""
    directory = tmp_path_factory.mktemp("large")
    make_checkpoint(directory, SIZES, {"half": 0.5})
    with pytest.MonkeyPatch.context() as patch:
        for key, value in ENVIRONMENT.items():
            patch.setenv(key, value)
        patch.delenv("VLLM_PLUGINS", raising=False)
        report = measure_servers(
            directory,
            directory / "atomic_profiles",
            plan=PLAN,
            serve_arguments=["--enforce-eager", "--max-model-len=512"],
        )
    for shard in directory.glob("*.safetensors"):
        shard.unlink()
    return report.profiles


def test_resident_memory_is_what_is_kept(rows):
    dense, pruned = rows
    assert dense.resident_bytes == SIZES.expert_bytes
    assert pruned.resident_bytes / SIZES.expert_bytes == pytest.approx(pruned.kept, abs=0.02)
    saved = (1 - pruned.kept) * SIZES.expert_bytes
    assert dense.rest_bytes - pruned.rest_bytes > saved - SLACK_BYTES
    assert pruned.freed == pytest.approx((dense.rest_bytes - pruned.rest_bytes) / saved)


def test_peak_is_resident_plus_one_shard_at_most(rows):
    pruned = rows[1]
    assert pruned.peak_bytes < pruned.rest_bytes + SIZES.shard_bytes + SLACK_BYTES
