"""The GPU backend: Triton kernels over row-major packed rows or codes, for CUDA devices.

Two forms of the same result. *Two kernels* (gate and up with the activation, then down) write one
row per token and expert, which a third kernel sums in a fixed order: deterministic. *One kernel*
does both GEMMs for a tile of atoms and adds to the output atomically: fewer waits if an expert has
a row or two, as in decoding. Launches and allocations depend on shapes alone, so that CUDA graphs
capture them; the device reads slots and bits, so replays follow both.

Legend: T tokens, K experts per token, N = T·K routed rows, E experts, H hidden size, P packed rows,
S slots, W words of all experts, B row blocks, U words of the widest expert.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from vllm_atomic_moe.experts.activation import Activation
from vllm_atomic_moe.experts.packing import WORD_BITS, RowStorage
from vllm_atomic_moe.files.row_formats import RowFormat

if TYPE_CHECKING:
    from vllm_atomic_moe.experts.backends.triton_rows import Rows

STORAGE = RowStorage()
# Use one kernel up to this mean number of routed rows per expert. By arithmetic, not yet measured:
# the atomic additions of a row take about a tenth of the time of reading its expert's weights.
ONE_KERNEL_ROWS = 1


class Tiles(NamedTuple):
    """Block sizes of one launch. Shared memory stays below the 99 KiB of the smallest devices.

    Attributes:
        rows: routed rows of a block, at least 16.
        atoms, hidden: tile of gate and up written, in whole words, and step over H.
        out_hidden, out_atoms: tile of down written, and step over atoms, in whole words.
        warps, stages: per program; steps loaded ahead.
    """

    rows: int
    atoms: int
    hidden: int
    out_hidden: int
    out_atoms: int
    warps: int
    stages: int


# Tiles by the largest mean number of routed rows per expert that they serve, for 16-bit dtypes.
# Blocks are larger than the mean because routing is uneven. Not yet measured on a device:
# CONTRIBUTING, "Kernels", says how to tune them.
TILES = (
    (1, Tiles(16, 32, 128, 128, 64, warps=4, stages=4)),
    (8, Tiles(16, 32, 128, 64, 64, warps=4, stages=4)),
    (24, Tiles(32, 64, 64, 64, 64, warps=4, stages=3)),
    (160, Tiles(64, 64, 64, 128, 64, warps=4, stages=3)),
    (None, Tiles(128, 64, 64, 128, 64, warps=8, stages=3)),
)
ROW_BLOCKS_PER_GROUP = 8
# With at least this many experts per routed row, rows are not sorted: each is its own block, as in
# vLLM's fused_moe.
UNSORTED_EXPERTS_PER_ROW = 4


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the backend cannot run there, as one clause, or None.

    In tests on the CPU, Triton's interpreter (`TRITON_INTERPRET=1`) replaces a GPU.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"{dtype} weights, not bfloat16, float16 or float32"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return "bfloat16 in Triton's interpreter" if dtype == torch.bfloat16 else None
    if device.type != "cuda":
        return f"no CUDA device but {device.type}"
    if torch.version.hip:
        return "ROCm, on which it was never tested"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"compute capability {major}.{minor}, below 8.0"


class _Routing(NamedTuple):
    """Routed rows in blocks of one expert each; the arguments all GEMM kernels share.

    Attributes:
        rows: int32 [blocks · rows of a block]; not read when blocks are single rows.
        experts: [blocks], negative or another rank's for blocks without work; with slots if blocks
            are single rows.
        constants: of the kernels, such as SORTED, which is false if block n is routed row n.
    """

    rows: torch.Tensor
    experts: torch.Tensor
    constants: dict[str, int | bool]

    @property
    def num_blocks(self) -> int:
        return self.experts.numel()


def fused_experts(
    x_TH: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    bits_SW: torch.Tensor,
    words_E1: torch.Tensor,
    offsets_E1: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    widest: int,
    activation: str,
    rows: str,
) -> torch.Tensor:
    """Arguments and result as those of the op; weights are gate (if any), up, down_t [P, H].

    Bit-identical from call to call under `torch.use_deterministic_algorithms(True)`; a server uses
    `triton_deterministic` for that.
    """
    one_kernel = rows_per_expert(topk_ids_TK, offsets_E1) <= ONE_KERNEL_ROWS
    one_kernel &= not torch.are_deterministic_algorithms_enabled()
    return launch(
        x_TH, weights, scales, biases, bits_SW, words_E1, offsets_E1, topk_weights_TK, topk_ids_TK,
        widest, activation, rows, None, one_kernel,
    )  # fmt: skip


def rows_per_expert(topk_ids_TK: torch.Tensor, offsets_E1: torch.Tensor) -> int:
    """Mean routed rows per expert, rounded up."""
    return -(-topk_ids_TK.numel() // (offsets_E1.numel() - 1))


def choose_tiles(rows: int, dtype: torch.dtype, plain: bool = True) -> Tiles:
    """The table's entry for this many rows per expert.

    For float32 with half the steps, which take the same shared memory; for codes with smaller
    tiles, since the largest leave too few registers for decoding.
    """
    tiles = next(tiles for most, tiles in TILES if most is None or rows <= most)
    if not plain:
        most = 32 if dtype.itemsize == 4 else tiles.rows
        tiles = tiles._replace(rows=min(tiles.rows, most), out_hidden=64)
    if dtype.itemsize == 4:
        tiles = tiles._replace(hidden=tiles.hidden // 2, out_atoms=tiles.out_atoms // 2)
    return tiles


def launch(
    x_TH: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    bits_SW: torch.Tensor,
    words_E1: torch.Tensor,
    offsets_E1: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    widest: int,
    activation: str,
    rows: str,
    tiles: Tiles | None,
    one_kernel: bool,
) -> torch.Tensor:
    """`fused_experts` in a given form, with given tiles or the table's."""
    if not topk_ids_TK.numel() or not (widest or biases):
        return x_TH.new_zeros(x_TH.shape)
    row_format = RowFormat.parse(rows)
    if tiles is None:
        mean = rows_per_expert(topk_ids_TK, offsets_E1)
        tiles = choose_tiles(mean, x_TH.dtype, row_format.plain)
    x_TH = x_TH if x_TH.stride(1) == 1 else x_TH.contiguous()
    ids_TK, weights_TK = topk_ids_TK.contiguous(), topk_weights_TK.contiguous()
    form = _one_kernel if one_kernel else _two_kernels
    with torch.cuda.device_of(x_TH):
        routing = _sort_rows(ids_TK, offsets_E1.numel() - 1, tiles)
        experts = _Experts.of(weights, scales, biases, activation, row_format, x_TH.shape[1])
        return form(
            x_TH, experts, bits_SW, words_E1, offsets_E1, weights_TK, ids_TK, widest, tiles, routing
        )


class _Experts(NamedTuple):
    """Weights, biases and activation, as the GEMM kernels take them.

    Attributes:
        gate: None if there is none.
        constants: of the kernels, for the activation.
    """

    gate: Rows | None
    up: Rows
    down: Rows
    constants: dict[str, str | float]

    @classmethod
    def of(
        cls,
        weights: Sequence[torch.Tensor],
        scales: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor],
        activation: str,
        row_format: RowFormat,
        hidden_size: int,
    ) -> _Experts:
        from vllm_atomic_moe.experts.backends.triton_rows import rows_of

        act = Activation.parse(activation)
        *gate, up, down = rows_of(weights, scales, biases, row_format, hidden_size)
        constants: dict[str, str | float] = {
            "KIND": act.kind,
            "LIMIT": 0.0 if math.isinf(act.limit) else act.limit,
            "A": act.alpha,
            "B": act.beta,
        }
        return cls(gate[0] if gate else None, up, down, constants)


def _sort_rows(ids_TK: torch.Tensor, E: int, tiles: Tiles) -> _Routing:
    from vllm_atomic_moe.experts.backends import triton_kernels

    N = ids_TK.numel()
    shared = {
        "E": E,
        "GROUP": ROW_BLOCKS_PER_GROUP,
        "BLOCK_N": tiles.rows,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
    if N * UNSORTED_EXPERTS_PER_ROW <= E:
        return _Routing(ids_TK, ids_TK.view(N), {**shared, "SORTED": False})
    # ⌈n/B⌉ summed over the min(N, E) experts that can have rows, whatever the ids are.
    num_blocks = (N + min(N, E) * (tiles.rows - 1)) // tiles.rows
    rows = ids_TK.new_empty(num_blocks * tiles.rows, dtype=torch.int32)
    experts = ids_TK.new_empty(num_blocks, dtype=torch.int32)
    triton_kernels.sort_rows_kernel[(E + 1,)](
        ids_TK, rows, experts, N, num_blocks,
        E=E, BINS=max(16, 1 << (E - 1).bit_length()), BLOCK_N=tiles.rows,
        CHUNK=1024 if N <= 1024 else 4096,
    )  # fmt: skip
    return _Routing(rows, experts, {**shared, "SORTED": True})


def _two_kernels(
    x_TH: torch.Tensor,
    experts: _Experts,
    bits_SW: torch.Tensor,
    words_E1: torch.Tensor,
    offsets_E1: torch.Tensor,
    weights_TK: torch.Tensor,
    ids_TK: torch.Tensor,
    widest: int,
    tiles: Tiles,
    routing: _Routing,
) -> torch.Tensor:
    from vllm_atomic_moe.experts.backends import triton_kernels

    (T, H), K = x_TH.shape, ids_TK.shape[1]
    num_tiles = -(-widest // tiles.atoms)
    h_NF = x_TH.new_empty(T * K, -(-widest // WORD_BITS) * WORD_BITS)
    unions_BU = ids_TK.new_empty(
        routing.num_blocks, num_tiles * (tiles.atoms // WORD_BITS), dtype=torch.int32
    )
    y_NH = x_TH.new_empty(T * K, H)
    out_TH = x_TH.new_empty(T, H)
    if num_tiles:
        triton_kernels.gate_up_kernel[(routing.num_blocks * num_tiles,)](
            x_TH, experts.gate, experts.up, h_NF, unions_BU, bits_SW, words_E1,
            offsets_E1, ids_TK, routing.rows, routing.experts, T * K, routing.num_blocks, num_tiles,
            bits_SW.shape[1], unions_BU.shape[1], x_TH.stride(0), h_NF.stride(0), H,
            K=K, BLOCK_F=tiles.atoms, BLOCK_H=tiles.hidden,
            **experts.constants, **routing.constants,
        )  # fmt: skip
    num_tiles = -(-H // tiles.out_hidden)
    triton_kernels.down_kernel[(routing.num_blocks * num_tiles,)](
        h_NF, experts.down, y_NH, unions_BU, offsets_E1, weights_TK, routing.rows,
        routing.experts, T * K, routing.num_blocks, num_tiles, unions_BU.shape[1], h_NF.stride(0),
        H, BLOCK_F=tiles.out_atoms, BLOCK_D=tiles.out_hidden,
        **routing.constants,
    )  # fmt: skip
    triton_kernels.sum_rows_kernel[(T, -(-H // 1024))](
        y_NH, ids_TK, out_TH, H, E=offsets_E1.numel() - 1, K=K, BLOCK_D=1024
    )
    return out_TH


def _one_kernel(
    x_TH: torch.Tensor,
    experts: _Experts,
    bits_SW: torch.Tensor,
    words_E1: torch.Tensor,
    offsets_E1: torch.Tensor,
    weights_TK: torch.Tensor,
    ids_TK: torch.Tensor,
    widest: int,
    tiles: Tiles,
    routing: _Routing,
) -> torch.Tensor:
    from vllm_atomic_moe.experts.backends import triton_kernels

    (T, H), K = x_TH.shape, ids_TK.shape[1]
    out_TH = x_TH.new_zeros(T, H, dtype=torch.float32)
    num_tiles = max(1, -(-widest // tiles.atoms))  # the first also adds the bias
    triton_kernels.fused_kernel[(routing.num_blocks * num_tiles,)](
        x_TH, experts.gate, experts.up, experts.down, out_TH,
        bits_SW, words_E1, offsets_E1, weights_TK, ids_TK,
        routing.rows, routing.experts, T * K, routing.num_blocks, num_tiles, bits_SW.shape[1],
        x_TH.stride(0), H,
        K=K, BLOCK_F=tiles.atoms, BLOCK_H=tiles.hidden,
        BLOCK_D=tiles.out_hidden, **experts.constants, **routing.constants,
    )  # fmt: skip
    return out_TH.to(x_TH.dtype)
