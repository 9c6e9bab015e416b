"""Every kernel of the GPU backend compiles for its supported GPUs, without a GPU.

A stand-in for the CUDA driver names the target, and launching stops after compiling; the arguments
are meta tensors of real shapes, so that what is compiled is what a GPU would run.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from tests.kernel_suite import ACTIVATIONS
from tests.quantized import SCHEMES
from vllm_atomic_moe.experts.activation import SILU, Activation
from vllm_atomic_moe.experts.backends import triton as backend
from vllm_atomic_moe.experts.packing import PackedExperts, build_layout
from vllm_atomic_moe.files.row_formats import PLAIN, RowFormat

# What a block may have on compute capability 8.6 and 8.9, the smallest of those supported.
SHARED_MEMORY = 99 * 1024
# Qwen3-30B-A3B: experts, hidden and intermediate size, experts per token.
E, H, WIDEST, K = 128, 2048, 768, 8
# Tokens that between them take both forms, unsorted rows and all tiles.
TOKENS = (1, 16, 64, 256, 1000, 4000)
LAYOUT = build_layout({"dense": torch.ones(E, WIDEST, dtype=torch.bool)})
GEMMS = ("fused_kernel", "gate_up_kernel", "down_kernel")


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


def compile_all(
    capability: int,
    dtype: torch.dtype,
    tokens: tuple[int, ...],
    activation: Activation = SILU,
    has_bias: bool = False,
    rows: RowFormat = PLAIN,
) -> list:
    """The compiled kernels of calls with so many tokens."""
    kernels: list = []
    run = jit.JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    packed = PackedExperts(LAYOUT, H, dtype, torch.device("meta"), None, activation, has_bias, rows)
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(jit.JITFunction, "run", compile_only)
        patch.setattr(driver, "_active", Target(capability))
        for T in tokens:
            backend.fused_experts(
                torch.empty(T, H, dtype=dtype),
                packed.weights,
                packed.scales,
                packed.biases,
                *packed.index,
                torch.empty(T, K),
                torch.empty(T, K, dtype=torch.int32),
                packed.widest,
                activation.spec,
                rows.spec,
            )
    return kernels


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_compiles(capability, dtype):
    # The dtypes differ little in code: every tile in bfloat16, the ends of the table in the others.
    tokens = TOKENS if dtype == torch.bfloat16 else (TOKENS[0], TOKENS[-1])
    kernels = compile_all(capability, dtype, tokens)
    assert {kernel.metadata.name for kernel in kernels} == {
        "fused_kernel",
        "sort_rows_kernel",
        "gate_up_kernel",
        "down_kernel",
        "sum_rows_kernel",
    }
    for kernel in kernels:
        assert kernel.metadata.shared <= SHARED_MEMORY, kernel.metadata
        # Rows are loaded in 16-byte vectors before their use, which makes the kernels fast.
        if kernel.metadata.name in GEMMS:
            assert "cp.async.cg.shared.global" in kernel.asm["ptx"], kernel.metadata


@pytest.mark.parametrize("activation", ACTIVATIONS[1:], ids=lambda it: it.spec)
def test_every_activation_compiles_with_biases(activation):
    kernels = compile_all(90, torch.bfloat16, (TOKENS[0], TOKENS[-1]), activation, has_bias=True)
    assert {"fused_kernel", "gate_up_kernel"} <= {kernel.metadata.name for kernel in kernels}
    assert all(kernel.metadata.shared <= SHARED_MEMORY for kernel in kernels)


@pytest.mark.parametrize("plain_down", [False, pytest.param(True, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    ("name", "dtype", "capability"),
    [
        # `make test` takes the two kinds of scale tables, with zero points and without.
        ("fp8-block", torch.bfloat16, 90),
        ("awq", torch.bfloat16, 80),
        *(
            pytest.param(name, torch.bfloat16, capability, marks=pytest.mark.full)
            for name in SCHEMES
            for capability in (80, 90)
            if (name, capability) not in (("fp8-block", 90), ("awq", 80))
        ),
        pytest.param("awq", torch.float32, 80, marks=pytest.mark.full),
        pytest.param("awq", torch.float32, 90, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_every_row_format_compiles(name, dtype, capability, plain_down):
    """Decoding and prefill, also beside a refitted down_proj; one format in another dtype, which
    decodes in the same way.
    """
    rows = replace(SCHEMES[name].row_format(H, WIDEST), plain_down=plain_down)
    kernels = compile_all(capability, dtype, (TOKENS[0], TOKENS[-1]), rows=rows)
    assert {kernel.metadata.name for kernel in kernels} >= {*GEMMS}
    for kernel in kernels:
        assert kernel.metadata.shared <= SHARED_MEMORY, kernel.metadata
        if kernel.metadata.name in GEMMS:
            # Codes are loaded before their use, 16 bytes at a time.
            assert "cp.async.cg.shared.global" in kernel.asm["ptx"], kernel.metadata
            # Small codes become subnormal float32 numbers.
            assert ".ftz" not in kernel.asm["ptx"], kernel.metadata
