"""The compiled half of the CPU backend: cpu_experts.cpp as a shared library, built once and cached.

Built at first use with $CXX (or g++) into $ATOMIC_MOE_CACHE, or the user's cache directory, under a
name that follows from the source, the flags and torch's version. Images build ahead with
`python -m vllm_atomic_moe.kernels.cpu`; with the libraries in the cache no compiler is needed.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import re
import shlex
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("cpu_experts.cpp")
COMMON_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-mfma")
BUILD_SECONDS = 300


class VariantError(Exception):
    """Why a variant cannot be used, as one clause."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to compile the source.

    Attributes:
        name: part of the library's file name.
        cpu_flags: what /proc/cpuinfo must list for the library to run.
        compiler_flags: beside COMMON_FLAGS.
    """

    name: str
    cpu_flags: frozenset[str]
    compiler_flags: tuple[str, ...]


_AVX512 = frozenset({"fma", "avx512f", "avx512bw", "avx512vl", "avx512dq"})
_AVX512_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
# Fastest first.
VARIANTS = (
    Variant(
        "amx",
        _AVX512 | {"avx512_bf16", "amx_tile", "amx_bf16"},
        (*_AVX512_FLAGS, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    ),
    Variant("avx512_bf16", _AVX512 | {"avx512_bf16"}, (*_AVX512_FLAGS, "-mavx512bf16")),
    Variant("avx512", _AVX512, _AVX512_FLAGS),
)


def cpu_flags() -> frozenset[str]:
    """What this machine's processor can do; empty where the kernel does not say."""
    try:
        found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return frozenset(found[1].split() if found else ())


def build(variant: Variant) -> Path:
    """The library of one variant, compiled unless the cache has it.

    Raises:
        VariantError: there is no compiler, it fails, or the cache cannot be written.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    flags = [*COMMON_FLAGS, *variant.compiler_flags]
    key = repr((SOURCE.read_bytes(), compiler, flags, torch.__version__))
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    library = _cache_directory() / f"cpu_experts-{variant.name}-{digest}.so"
    if library.exists():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        # Many workers start at once: one compiles, the others wait for it.
        with open(library.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.exists():
                with tempfile.TemporaryDirectory(dir=library.parent) as directory:
                    built = Path(directory) / library.name
                    _compile([*compiler, *flags, str(SOURCE), "-o", str(built), *_openmp()])
                    built.replace(library)
    except OSError as error:
        raise VariantError(
            f"cannot write {library.parent} ({error.strerror}); set ATOMIC_MOE_CACHE"
        ) from error
    return library


def _cache_directory() -> Path:
    if chosen := os.environ.get("ATOMIC_MOE_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-atomic-moe"


def _compile(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS)
    except FileNotFoundError:
        raise VariantError(
            f"no C++ compiler: {command[0]} not found; install g++ or set CXX"
        ) from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise VariantError(f"the C++ compiler {command[0]} failed: {error}") from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr]
        raise VariantError(f"the C++ compiler {command[0]} failed: {said[0].strip()[:300]}")


def _openmp() -> list[str]:
    """Linker arguments for torch's own OpenMP runtime.

    A process must have one: its threads are those that vLLM has bound to cores. Torch's may have a
    name of its own, so it is linked by path; the compiler's then is needed no more.
    """
    package = Path(torch.__file__).parent
    found = [*package.glob("lib/libgomp*.so*"), *package.parent.glob("torch.libs/libgomp*.so*")]
    return [*map(str, found[:1]), "-Wl,--as-needed"]


def open_library(path: Path) -> ctypes.CDLL:
    """The library, its two functions declared.

    Raises:
        VariantError: it cannot be loaded, or would bring a second OpenMP runtime.
    """
    before = _openmp_runtimes()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise VariantError(f"{path.name} cannot be loaded: {error}") from error
    if before and (second := _openmp_runtimes() - before):
        raise VariantError(
            f"{path.name} brings an OpenMP runtime of its own, {min(second)}, beside torch's; "
            "compile with g++ (set CXX)"
        )
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.atomic_moe_fused_experts.argtypes = [*[pointer] * 7, *[size] * 5, *[ctypes.c_int] * 2]
    library.atomic_moe_fused_experts.restype = None
    library.atomic_moe_pack.argtypes = [
        pointer,
        ctypes.c_int,
        pointer,
        size,
        size,
        pointer,
        size,
        size,
        *[ctypes.c_int] * 2,
    ]
    library.atomic_moe_pack.restype = None
    return library


def _openmp_runtimes() -> set[str]:
    maps = Path("/proc/self/maps").read_text()
    return set(re.findall(r"\S*/lib(?:gomp|iomp5|omp)\b\S*", maps))
