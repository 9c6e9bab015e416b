"""The kernel on a CUDA device against the same on the CPU. Needs torch only."""

from __future__ import annotations

import pytest
import torch

from vllm_atomic_moe.kernels import fused_experts
from vllm_atomic_moe.packing import PackedExperts, build_layout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
)
def test_cuda_equals_cpu(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    keep = {name: torch.rand(8, 160, generator=generator) < 0.5 for name in "ab"}
    packed = PackedExperts(build_layout(keep), 64, dtype)
    for parameter in packed.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    x = torch.randn(33, 64, generator=generator).to(dtype)
    topk_ids = torch.randint(-1, 8, (33, 4), generator=generator).int()
    topk_weights = torch.rand(33, 4, generator=generator)

    def run(device: str) -> torch.Tensor:
        moved = packed.to(device)
        weights = (moved.gate, moved.up, moved.down_t, moved.runs_ER2)
        found = fused_experts(x.to(device), *weights, topk_weights.to(device), topk_ids.to(device))
        return found.double().cpu()

    for name in keep:
        packed.activate(name)
        wanted = run("cpu")
        assert (run("cuda") - wanted).norm() <= tolerance * wanted.norm()
        packed.to("cpu")
