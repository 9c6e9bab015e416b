"""Loading 576 MiB of experts never allocates the pruned memory, neither at peak nor at rest.

Nor does loading them quantized. With `-s` it prints the seconds that each load took, per GiB read.
"""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from safetensors import safe_open

from tests.e2e.conftest import ENVIRONMENT, ROOT
from vllm_atomic_moe.measure.server_benchmark import measure_servers
from vllm_atomic_moe.measure.server_report import Phase, ServerPlan
from vllm_atomic_moe.measure.synthetic import Sizes, make_checkpoint

pytestmark = pytest.mark.full
SIZES = Sizes(layers=3)
SLACK_BYTES = 16 * 2**20  # what vLLM's model and loader allocate besides the weights
PLAN = ServerPlan(
    phases=(Phase("decode", input_tokens=8, output_tokens=8, concurrency=1, requests=1),),
    warmups=0,
)


@pytest.fixture(scope="module", params=["bf16", "fp8", "int4", "mxfp4"])
def measured(request, tmp_path_factory):
    """Format; bytes of a layer's experts on disk, and of all as reported; rows dense and half."""
    directory = tmp_path_factory.mktemp("large")
    make_checkpoint(directory / "bf16", SIZES, {"half": 0.5})
    if request.param != "bf16":
        recipe = ROOT / "deploy/demo/recipe/quantize.py"
        names = [directory / "bf16", directory / request.param, request.param]
        subprocess.run([sys.executable, recipe, *names], check=True)
    model = directory / request.param
    layer_bytes = expert_bytes(model)
    with pytest.MonkeyPatch.context() as patch:
        for key, value in ENVIRONMENT.items():
            patch.setenv(key, value)
        patch.delenv("VLLM_PLUGINS", raising=False)
        report = measure_servers(
            model,
            model / "atomic_profiles",
            plan=PLAN,
            serve_arguments=["--enforce-eager", "--max-model-len=512"],
        )
    for run in report.runs:
        seconds = run.load_s / (SIZES.layers * layer_bytes / 2**30)
        print(f"{request.param} {run.profile}: {run.load_s:.2f} s, {seconds:.2f} s per GiB")
    for shard in directory.glob("*/*.safetensors"):
        shard.unlink()
    reported = next(run.dense_bytes for run in report.runs if run.dense_bytes is not None)
    return request.param, layer_bytes, reported, *report.profiles


def expert_bytes(model) -> int:
    """Of the first layer's experts in the checkpoint, all parts that are not mere shapes."""
    total = 0
    with safe_open(model / "model-0.safetensors", "pt") as shard:
        for name in shard.keys():  # noqa: SIM118
            if ".experts." in name and not name.endswith("weight_shape"):
                part = shard.get_tensor(name)
                total += math.prod(part.shape) * part.element_size()
    return total


def test_resident_memory_is_what_is_kept(measured):
    name, layer_bytes, reported, dense, pruned = measured
    whole = SIZES.layers * layer_bytes
    if name == "bf16":
        assert whole == SIZES.expert_bytes
    assert reported == whole
    assert dense.resident_bytes == pytest.approx(whole, rel=0 if name == "bf16" else 0.02)
    # Nearly every INT4 group of 32 atoms has one that is kept, and its scales stay.
    assert pruned.resident_bytes / whole == pytest.approx(pruned.kept, abs=0.02)
    saved = (1 - pruned.kept) * whole
    assert dense.rest_bytes - pruned.rest_bytes > saved - SLACK_BYTES
    assert pruned.freed == pytest.approx((dense.rest_bytes - pruned.rest_bytes) / saved)


def test_peak_is_resident_plus_one_expert_at_most(measured):
    """One in 16 bits; test_quantization.py counts what a matrix takes while it is decoded. Mapped
    shards do not count: the system takes pages of files back when it needs memory.
    """
    *_, pruned = measured
    assert pruned.peak_bytes < pruned.rest_bytes + SIZES.shard_bytes / SIZES.experts
