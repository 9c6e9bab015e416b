"""The Triton backend without a GPU: kernels in the interpreter, and what the host launches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
from vllm_atomic_moe.experts.activation import SILU
from vllm_atomic_moe.experts.backends import triton as backend
from vllm_atomic_moe.experts.packing import SLOTS, PackedExperts, build_layout
from vllm_atomic_moe.files.row_formats import PLAIN, Block, RowFormat

NVFP4 = RowFormat("e2m1", Block(1, 16), Block(16, 1), torch.float8_e4m3fn, factor="over")


@pytest.mark.parametrize("tier", ["not full", pytest.param("full", marks=pytest.mark.full)])
def test_kernels_in_the_interpreter(tier):
    """The tests of triton_interpreted.py, which need their own process."""
    file = Path(__file__).with_name("triton_interpreted.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", tier, file],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]


class NoHostReads(TorchDispatchMode):
    """Refuses calls that make the host wait for the device, which cannot be captured."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "bincount"), name
        return func(*args, **(kwargs or {}))


def shapes(argument):
    """Shapes of tensors, also within tuples."""
    if isinstance(argument, tuple):
        return tuple(map(shapes, argument))
    return tuple(argument.shape) if torch.is_tensor(argument) else str(argument)


@pytest.mark.parametrize("rows", [PLAIN, NVFP4], ids=lambda it: it.code)
@pytest.mark.parametrize("one_kernel", [False, True])
@pytest.mark.parametrize("T", [1, 40])
def test_launches_depend_on_shapes_alone(T, one_kernel, rows, monkeypatch):
    """The host reads nothing from the device, so CUDA graphs capture the call; kernels left out."""
    from vllm_atomic_moe.experts.backends import triton_kernels

    launches: list = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid):
            def record(*args, **kwargs):
                launches.append((self.name, grid, shapes(args), kwargs))

            return record

    for name in dir(triton_kernels):
        if name.endswith("_kernel"):
            monkeypatch.setattr(triton_kernels, name, Recorder(name))
    mask = torch.arange(50) < torch.tensor([50, 10, 40])[:, None]
    packed = PackedExperts(build_layout({"a": mask}), 32, torch.float32, row_format=rows)
    bits_SW, words_E1, offsets_E1 = packed.index
    ids_TK = torch.arange(2 * T, dtype=torch.int32).view(T, 2) % (3 * SLOTS)
    tiles = backend.choose_tiles(1, torch.float32, rows.plain)
    found = []
    for bits, ids in ((bits_SW, ids_TK), (bits_SW * 0, ids_TK * 0 - 1)):
        with NoHostReads():
            backend.launch(
                torch.randn(T, 32), packed.weights, packed.scales, [], bits, words_E1, offsets_E1,
                torch.rand(T, 2), ids, 50, SILU.spec, rows.spec, tiles, one_kernel,
            )  # fmt: skip
        found.append(list(launches))
        launches.clear()
    assert found[0] == found[1]
    assert found[0]


def test_says_why_it_is_unavailable(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert "float64" in backend.unavailable(cuda, torch.float64)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "CUDA" in backend.unavailable(cpu, torch.float32)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.unavailable(cpu, torch.float32) is None
    assert "bfloat16" in backend.unavailable(cpu, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "7.5" in backend.unavailable(cuda, torch.float16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert backend.unavailable(cuda, torch.float16) is None
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in backend.unavailable(cuda, torch.float16)
