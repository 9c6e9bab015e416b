"""Every kernel the GPU backend launches compiles for the GPUs it says it runs on, without one.

A stand-in for the CUDA driver names the target, and launching stops after compiling; the arguments are
meta tensors of real shapes, so that what is compiled is what a GPU would run.
"""

from __future__ import annotations

import os

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver, jit  # noqa: E402

from vllm_atomic_moe.kernels import triton as backend  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)
# Shared memory of a block on compute capability 8.6 and 8.9, the smallest of those supported.
SHARED_MEMORY = 99 * 1024
REGISTERS = 65536


class Target:
    """The part of a driver that compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@pytest.fixture
def compiled(monkeypatch):
    """Launches compile only; the list of what was compiled."""
    kernels: list = []
    run = jit.JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    monkeypatch.setattr(jit.JITFunction, "run", compile_only)
    return kernels


def launch(dtype: torch.dtype, tiles: backend.Tiles, one_kernel: bool, T: int, K: int = 8) -> None:
    E, H, widest, runs = 128, 2048, 768, 2
    with torch.device("meta"):
        x, gate = torch.empty(T, H, dtype=dtype), torch.empty(E * widest, H, dtype=dtype)
        runs_ER2 = torch.empty(E, runs, 2, dtype=torch.int32)
        weights, ids = torch.empty(T, K), torch.empty(T, K, dtype=torch.int32)
    backend.launch(x, (gate, gate, gate), runs_ER2, weights, ids, widest, tiles, one_kernel)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("one_kernel", [False, True])
def test_compiles(capability, dtype, one_kernel, compiled, monkeypatch):
    monkeypatch.setattr(driver, "_active", Target(capability))
    for most, _ in backend.TILES:
        tiles = backend.choose_tiles(most or 1000, dtype)
        launch(dtype, tiles, one_kernel, T=1 if tiles.rows == 16 else 1000)
    for kernel in compiled:
        assert "cubin" in kernel.asm
        print(
            capability,
            dtype,
            kernel.metadata.name,
            kernel.metadata.shared,
            kernel.metadata.num_warps,
        )
        assert kernel.metadata.shared <= SHARED_MEMORY, kernel.metadata.name
