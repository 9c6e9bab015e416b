"""The same tests under vLLM 0.33: its Python files with the CPU libraries of the installed release.

The requirements have no CPU build of 0.33; its wheel for CUDA has the same Python files. They are
unpacked into a cache outside the repository, beside copies of the installed release's `*.so`.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT

RELEASE = "0.33.0"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vllm-atomic-moe"
TESTS = (
    "tests/serving/test_compat.py",
    "tests/serving/test_architectures.py",
    "tests/serving/test_admission.py",
    "tests/serving/test_batches_of_profiles.py",
    "tests/serving/test_profiles_of_requests.py",
    "tests/serving/test_routing.py",
    "tests/e2e/test_admin.py",
    "tests/e2e/test_routes.py",
)


@pytest.fixture(scope="module")
def overlay():
    """A folder for PYTHONPATH."""
    folder = CACHE / f"vllm-{RELEASE}"
    if not folder.is_dir():
        wheels = CACHE / "wheels"
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--dest",
                str(wheels),
                f"vllm=={RELEASE}",
            ],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            pytest.skip(f"vllm {RELEASE} cannot be downloaded here: {done.stderr[-300:]}")
        [wheel] = wheels.glob(f"vllm-{RELEASE}-*.whl")
        unpack(wheel, folder)
    return folder


def unpack(wheel, folder):
    """Unpack all but the CUDA libraries, complete or not at all."""
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(partial, [it for it in archive.namelist() if not it.endswith(".so")])
    # The version's suffix tells vLLM that it is built for CPUs.
    metadata = partial / f"vllm-{RELEASE}.dist-info"
    metadata = metadata.rename(partial / f"vllm-{RELEASE}+cpu.dist-info") / "METADATA"
    said = metadata.read_text()
    metadata.write_text(said.replace(f"\nVersion: {RELEASE}\n", f"\nVersion: {RELEASE}+cpu\n", 1))
    installed = Path(importlib.util.find_spec("vllm").origin).parent
    for library in installed.glob("*.so"):
        shutil.copy(library, partial / "vllm")
    partial.rename(folder)


@pytest.mark.full
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("tests", TESTS)
def test_release(overlay, tests):
    environment = {**os.environ, "PYTHONPATH": str(overlay)}
    version = "import vllm; print(vllm.__version__)"
    told = subprocess.run(
        [sys.executable, "-c", version], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert told.stdout.split()[-1].startswith(RELEASE)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not full", tests],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    print(done.stdout[-6000:])
    assert done.returncode == 0
