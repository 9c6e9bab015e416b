"""The C++ kernel on aarch64, cross-compiled and run in an emulator.

Needs Debian's g++-aarch64-linux-gnu and qemu-user.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from vllm_atomic_moe.experts.backends.cpu import library

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.full
@pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
    reason="needs Debian's g++-aarch64-linux-gnu and qemu-user",
)
def test_neon_computes_as_plain_loops_do(tmp_path):
    (neon,) = (variant for variant in library.VARIANTS if variant.name == "neon")
    flags = [flag for flag in library.COMMON_FLAGS if flag not in ("-fPIC", "-shared")]
    include = Path(torch.__file__).parent / "include"
    program = tmp_path / "selftest"
    subprocess.run(
        [
            *(COMPILER, *flags, *neon.compiler_flags, "-static"),
            *("-isystem", str(include), "-I", str(library.SOURCES[0].parent)),
            *(Path(__file__).with_name("experts_selftest.cpp"), "-o", str(program)),
            *("-lgomp", "-lpthread"),
        ],
        check=True,
    )
    done = subprocess.run([EMULATOR, program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
