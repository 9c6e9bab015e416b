"""The compiled half of the CPU backend: experts.cpp as a shared library, built once and cached.

Built at the first use with $CXX (or g++, or clang++) and torch's own headers, into
$ATOMIC_MOE_CACHE or the user's cache directory, under a name that depends on the source, the
compiler, the flags, the OpenMP runtime, and the versions of torch and libc. Images build ahead with
`python -m vllm_atomic_moe.experts.backends.cpu`; with the libraries in the cache no compiler is
needed, and nothing is written. Libraries from the cache run code: nobody else may write there.

Legend: T tokens, K experts per token, E experts, H hidden size, S stored rows, F atoms of an
expert, W words.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_atomic_moe.experts.activation import KINDS, SILU, Activation
from vllm_atomic_moe.experts.backends.cpu.arguments import (
    Quantized,
    bits_of,
    check_layer,
    quantized,
    tensors_of,
)
from vllm_atomic_moe.experts.packing import projections_of
from vllm_atomic_moe.files.plain_files import allow_reading, lock
from vllm_atomic_moe.files.row_formats import PLAIN, PROJECTIONS, Projection, RowFormat

SOURCES = tuple(
    Path(__file__).with_name(name)
    for name in (
        *("experts.cpp", "packing.h", "weights.h", "plan.h", "scales.h", "codes.h"),
        *("panels.h", "amx.h", "avx512_bf16.h", "activation.h", "threads.h", "vectors.h"),
    )
)
COMMON_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-shared")
BUILD_SECONDS = 300
CGROUP = Path("/sys/fs/cgroup")
# In the order of their numbers in C++.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class VariantError(Exception):
    """Why a variant cannot be used, as one clause."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to compile the source.

    Attributes:
        name: of the instruction set; part of the library's file name.
        cpu_flags: what /proc/cpuinfo must list for the library to run.
        compiler_flags: in addition to COMMON_FLAGS.
    """

    name: str
    cpu_flags: frozenset[str]
    compiler_flags: tuple[str, ...]


def _capability(name: str) -> tuple[str, str]:
    """Flags that select the vectors of torch's headers."""
    return f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name}"


_AVX2 = frozenset({"avx2", "fma", "f16c"})
_AVX2_FLAGS = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
_AVX512_FLAGS = (
    *_AVX2_FLAGS,
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
    *_capability("AVX512"),
)
# Fastest first.
VARIANTS = (
    Variant(
        "amx",
        _AVX512 | {"avx512_bf16", "amx_tile", "amx_bf16"},
        (*_AVX512_FLAGS, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    ),
    Variant("avx512_bf16", _AVX512 | {"avx512_bf16"}, (*_AVX512_FLAGS, "-mavx512bf16")),
    Variant("avx512", _AVX512, _AVX512_FLAGS),
    Variant("avx2", _AVX2, (*_AVX2_FLAGS, *_capability("AVX2"))),
    Variant("neon", frozenset({"asimd"}), ("-DCPU_CAPABILITY=DEFAULT",)),
)


def variants_of_machine() -> list[Variant]:
    """Variants that processors of this architecture can run, the fastest first."""
    arm = platform.machine() in ("aarch64", "arm64")
    return [variant for variant in VARIANTS if (variant.name == "neon") == arm]


def usable_variants() -> list[Variant]:
    """Variants that this processor can run, the fastest first.

    $ATOMIC_MOE_CPU_ISA names the widest instruction set to use, for tests on wider machines.

    Raises:
        ValueError: that name is unknown here.
    """
    flags = cpu_flags()
    usable = [variant for variant in VARIANTS if variant.cpu_flags <= flags]
    widest = os.environ.get("ATOMIC_MOE_CPU_ISA")
    if not widest:
        return usable
    names = [variant.name for variant in usable]
    if widest not in names:
        raise ValueError(
            f"ATOMIC_MOE_CPU_ISA is {widest!r}, this processor has {', '.join(names) or 'none'}; "
            "name one of them, or none"
        )
    return usable[names.index(widest) :]


def cpu_flags() -> frozenset[str]:
    """Features of this machine's processor; empty if the kernel does not tell."""
    try:
        found = re.search(
            r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
    except OSError:
        found = None
    return frozenset(found[1].split() if found else ())


def load(variant: Variant) -> Library:
    """The library of one variant; if it cannot be loaded, it is compiled again, once.

    Raises:
        VariantError: it can be neither loaded nor compiled.
    """
    try:
        return Library(build(variant))
    except OSError:  # damaged, or made on another system
        path = build(variant, again=True)
    try:
        return Library(path)
    except OSError as error:
        raise VariantError(f"{path.name} cannot be loaded: {error}") from error


def build(variant: Variant, again: bool = False) -> Path:
    """The library of one variant, compiled unless the cache has it (or `again`).

    Raises:
        VariantError: there is no compiler, it fails, or the cache cannot be written or trusted.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or [_installed_compiler()]
    include = ["-isystem", str(Path(torch.__file__).parent / "include")]
    flags = [*COMMON_FLAGS, *variant.compiler_flags]
    contents = [source.read_bytes() for source in SOURCES]
    openmp = _openmp()
    runtimes = [Path(argument).name for argument in openmp]
    key = repr((contents, compiler, flags, torch.__version__, platform.libc_ver(), runtimes))
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    library = _cache_directory() / f"cpu_experts-{variant.name}-{digest}.so"
    try:
        # Readable for others: root builds an image's libraries and any user loads them.
        library.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        _check_owner(library.parent)
        if library.exists() and not again:
            return library
        # Many workers start at once: one compiles, the others wait for it.
        with open(library.with_suffix(".lock"), "a", opener=_open_no_link) as turn:
            lock(turn.fileno())
            if again or not library.exists():
                with tempfile.TemporaryDirectory(dir=library.parent) as directory:
                    built = Path(directory) / library.name
                    _compile(
                        [*compiler, *flags, *include, str(SOURCES[0]), "-o", str(built), *openmp]
                    )
                    allow_reading(built, 0o755)
                    built.replace(library)
    except OSError as error:
        raise VariantError(
            f"cannot use {library.parent} ({error.strerror}); set ATOMIC_MOE_CACHE"
        ) from error
    return library


def _installed_compiler() -> str:
    return "clang++" if shutil.which("clang++") and not shutil.which("g++") else "g++"


def _cache_directory() -> Path:
    if chosen := os.environ.get("ATOMIC_MOE_CACHE"):
        return Path(chosen)
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if caches.startswith("~"):
        raise VariantError("this user has no home directory to compile into; set ATOMIC_MOE_CACHE")
    return Path(caches) / "vllm-atomic-moe"


def _check_owner(directory: Path) -> None:
    found = directory.stat()
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise VariantError(
            f"{directory} belongs to another user (uid {found.st_uid}) or may be written by others "
            f"(mode {stat.S_IMODE(found.st_mode):o}); `chmod go-w` it or set ATOMIC_MOE_CACHE"
        )


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


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
    """Linker arguments for torch's own OpenMP runtime, whose threads vLLM has bound to cores.

    A process must have only one. Torch's may have its own name, so it is linked by path; other
    runtimes also have GNU's entry points, which experts.cpp calls.
    """
    package = Path(torch.__file__).parent
    patterns = ("libgomp*.so*", "libiomp5*.so*", "libomp*.so*")
    directories = (package / "lib", package.parent / "torch.libs")
    found = [
        path for name in patterns for directory in directories for path in directory.glob(name)
    ]
    return [*map(str, found[:1]), "-Wl,--as-needed"] if found else ["-lgomp"]


class Library:
    """The two functions of a built library, over tensors on the CPU."""

    def __init__(self, path: Path) -> None:
        """Load it.

        Raises:
            OSError: it cannot be loaded.
            VariantError: it brings a second OpenMP runtime.
        """
        # Checked layers by addresses, sizes and dtype, since freed memory may be reused.
        self._checked: dict[tuple[object, ...], Quantized | None] = {}
        before = _openmp_runtimes()
        self.functions = ctypes.CDLL(str(path))
        if before and (second := _openmp_runtimes() - before):
            raise VariantError(
                f"{path.name} brings an OpenMP runtime of its own, {min(second)}, beside torch's; "
                "compile with g++ (set CXX)"
            )
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        pack = self.functions.atomic_moe_pack
        pack.argtypes = [
            *(pointer, number, number, pointer, size, size, pointer, size, size),
            *[number] * 3,
        ]
        pack.restype = number
        fused_experts = self.functions.atomic_moe_fused_experts
        fused_experts.argtypes = [
            *[pointer] * 9,
            *[size] * 3,
            *[number] * 2,
            *[ctypes.c_float] * 3,
            *[pointer] * 4,
            *[size] * 2,
            *[number] * 3,
        ]
        fused_experts.restype = number

    def pack(
        self,
        packed: torch.Tensor,
        first_atom: int,
        projection: Projection,
        rows_SH: torch.Tensor,
        atoms_F: torch.Tensor,
        threads: int,
        gated: bool = True,
        row_format: RowFormat = PLAIN,
    ) -> None:
        """Copy rows_SH[atoms_F] to the projection of the expert at `first_atom`.

        Args:
            packed: the flat tensor of all experts, in which the projection is.
            first_atom: atoms before the expert, padding included.
            rows_SH: of packed's dtype, any strides; one code per byte.
            atoms_F: int64, indices into rows_SH.
            gated: whether there is a gate_proj.
            row_format: of the rows.

        Raises:
            MemoryError: not enough for the gathered rows.
        """
        of_tensor = tensors_of(gated, row_format)
        sides = len(projections_of(gated)) - 1
        alone = "down" in of_tensor and projection == "down"
        row_format, vectors = of_tensor["down" if alone else "packed"]
        dtypes = DTYPES if row_format.plain else (torch.uint8,)
        atoms = first_atom + len(atoms_F)
        for tensor in (packed, rows_SH, atoms_F):
            assert tensor.is_cpu, f"a tensor is on {tensor.device}, wanted cpu"
        assert rows_SH.dtype == packed.dtype in dtypes, f"{rows_SH.dtype} into {packed.dtype}"
        assert atoms_F.dtype == torch.int64, f"atoms are {atoms_F.dtype}, wanted int64"
        atom_bytes = vectors * rows_SH.shape[1] * bits_of(row_format, packed.dtype) // 8
        assert atoms * atom_bytes <= packed.nbytes, "atoms lie beyond the tensor"
        if projection != "down" and rows_SH.stride(1) != 1:
            rows_SH = rows_SH.contiguous()
        atoms_F, hidden_size = atoms_F.contiguous(), rows_SH.shape[1]
        failed = self.functions.atomic_moe_pack(
            packed.data_ptr() + first_atom * atom_bytes,
            PROJECTIONS.index(projection),
            0 if alone else sides,
            rows_SH.data_ptr(),
            *rows_SH.stride(),
            atoms_F.data_ptr(),
            len(atoms_F),
            hidden_size,
            DTYPES.index(packed.dtype)
            if row_format.plain
            else len(DTYPES) + (row_format.bits == 4),
            threads,
            min(threads, quota()),
        )
        if failed:
            raise MemoryError(f"no memory to pack {len(atoms_F)} rows")

    def fused_experts(
        self,
        x_TH: torch.Tensor,
        packed: torch.Tensor,
        bits_SW: torch.Tensor,
        words_E1: torch.Tensor,
        offsets_E1: torch.Tensor,
        topk_weights_TK: torch.Tensor,
        topk_ids_TK: torch.Tensor,
        threads: int,
        biases: Sequence[torch.Tensor] = (),
        activation: str = SILU.spec,
        scales: Sequence[torch.Tensor] = (),
        rows: str = PLAIN.spec,
        down: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Arguments as those of the op; x has the dtype of plain weights.

        Args:
            packed: the rows of all projections, or all but down.
            down: plain rows of down beside codes of the others.

        Raises:
            MemoryError: not enough for the intermediate activations.
        """
        tokens, hidden_size = x_TH.shape
        ids, top_k = topk_ids_TK.shape
        gated, numbers = _activation_numbers(activation)
        bias_pointers = [0] * (3 - len(biases)) + [bias.data_ptr() for bias in biases]
        pointers = bits_SW.data_ptr(), words_E1.data_ptr(), offsets_E1.data_ptr()
        sizes = offsets_E1.numel() - 1, bits_SW.shape[1], hidden_size
        layer = (
            *(*bias_pointers, *pointers, *sizes),
            *(DTYPES.index(x_TH.dtype), *numbers),
        )
        weights = [packed] if down is None else [packed, down]
        stored = tuple((it.data_ptr(), it.numel(), it.dtype) for it in (*weights, *scales))
        key = (layer, rows, stored)
        if key not in self._checked:
            row_format = RowFormat.parse(rows)
            check_layer(
                *(weights, bits_SW, words_E1, offsets_E1, hidden_size),
                *(biases, gated, row_format, scales),
            )
            if row_format.of("down").plain:
                assert x_TH.dtype == weights[-1].dtype, (
                    f"x is {x_TH.dtype}, the weights are {weights[-1].dtype}"
                )
            self._checked[key] = None if row_format.plain else quantized(scales, gated, row_format)
        codes = self._checked[key]
        for tensor in (x_TH, topk_ids_TK, topk_weights_TK):
            assert tensor.is_cpu, f"a tensor is on {tensor.device}, wanted cpu"
        assert ids == tokens, f"{ids} rows of expert ids for {tokens} tokens"
        assert topk_weights_TK.shape == topk_ids_TK.shape, (
            f"router weights are {topk_weights_TK.shape}, ids {topk_ids_TK.shape}"
        )
        wide = topk_ids_TK.dtype == torch.int64
        assert wide or topk_ids_TK.dtype == torch.int32, f"expert ids are {topk_ids_TK.dtype}"
        # Named, so that copies live until the call returns.
        x_TH = x_TH.contiguous()
        topk_weights_TK = topk_weights_TK.float().contiguous()
        topk_ids_TK = topk_ids_TK.contiguous()
        out_TH = torch.empty_like(x_TH)
        failed = self.functions.atomic_moe_fused_experts(
            packed.data_ptr(),
            None if down is None else down.data_ptr(),
            None if codes is None else ctypes.addressof(codes),
            *layer,
            x_TH.data_ptr(),
            topk_weights_TK.data_ptr(),
            topk_ids_TK.data_ptr(),
            out_TH.data_ptr(),
            tokens,
            top_k,
            wide,
            threads,
            min(threads, quota()),
        )
        if failed:
            raise MemoryError(f"no memory for the experts of {tokens} tokens")
        return out_TH


@functools.cache
def _activation_numbers(spec: str) -> tuple[bool, tuple[int, float, float, float]]:
    """Whether there is a gate; and kind, limit, alpha and beta as C++ takes them."""
    act = Activation.parse(spec)
    return act.gated, (KINDS.index(act.kind), act.limit, act.alpha, act.beta)


@functools.cache
def quota() -> int:
    """Processors that the container may use, rounded up; very many without a limit."""
    try:
        if (CGROUP / "cpu.max").exists():
            quota, period = (CGROUP / "cpu.max").read_text().split()
        else:
            quota, period = (
                (CGROUP / "cpu" / name).read_text().strip()
                for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            )
    except (OSError, ValueError):
        return 1 << 16
    limited = quota != "max" and int(quota) > 0
    return -(-int(quota) // int(period)) if limited else 1 << 16


def _openmp_runtimes() -> set[str]:
    maps = Path("/proc/self/maps").read_text()
    return set(re.findall(r"\S*/lib(?:gomp|iomp5|omp)\b\S*", maps))
