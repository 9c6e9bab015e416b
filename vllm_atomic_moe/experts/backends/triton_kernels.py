# mypy: disallow-untyped-defs=False
"""The GPU kernels of `kernels.triton`: plain Triton over plain row-major packed rows.

Routed rows are the N = T·K pairs (token, slot), numbered token·K + slot. A program of the GEMMs
works on one block of routed rows that share an expert. Grids are upper bounds known on the host;
what an expert really has (its tokens, its active runs) is read from device tensors, and a program
without work returns after reading a few integers.

Positions number an expert's active atoms across its runs, every run beginning at a multiple of 16;
a position is turned into a packed row by walking the runs.

Legend: T tokens, K experts per token, N routed rows, E experts, H hidden size, P packed rows,
R runs per expert. Lower case for what a program holds of them: n routed rows, f atoms or positions,
h and d hidden columns (read and written).
"""

import triton
from triton import language as tl

# They change from call to call; their divisibility must not compile a kernel anew.
_VARYING = ["num_rows", "num_blocks"]


@triton.jit(do_not_specialize=_VARYING)
def sort_rows_kernel(
    ids_ptr,  # [N]
    rows_ptr,  # out [num_blocks · BLOCK_N]: routed rows by expert; num_rows where there is none
    experts_ptr,  # out [num_blocks]: the expert of each block; -1 where there is none
    num_rows,
    num_blocks,
    E: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Stable sort of routed rows by expert, every expert padded to whole blocks.

    One program an expert and a last one for the blocks that stay empty. Each counts all rows by
    itself, so that one launch does it, without atomics: the order is always the same.
    """
    expert = tl.program_id(0)
    bins = tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(0, num_rows, CHUNK):
        n = start + tl.arange(0, CHUNK)
        ids = tl.load(ids_ptr + n, mask=n < num_rows, other=-1)
        counts += tl.histogram(ids.to(tl.int32), BINS, mask=(ids >= 0) & (ids < E))
    blocks = (counts + BLOCK_N - 1) // BLOCK_N
    first_block = tl.sum(tl.where(bins < expert, blocks, 0))

    if expert == E:
        for start in range(first_block, num_blocks, CHUNK):
            block = start + tl.arange(0, CHUNK)
            tl.store(experts_ptr + block, -1, mask=block < num_blocks)
        return

    count = tl.sum(tl.where(bins == expert, counts, 0))
    end_block = first_block + (count + BLOCK_N - 1) // BLOCK_N
    for start in range(first_block, end_block, CHUNK):
        block = start + tl.arange(0, CHUNK)
        tl.store(experts_ptr + block, expert, mask=block < end_block)
    place = first_block * BLOCK_N
    padding = place + count + tl.arange(0, BLOCK_N)
    tl.store(rows_ptr + padding, num_rows, mask=padding < end_block * BLOCK_N)
    for start in range(0, tl.where(count > 0, num_rows, 0), CHUNK):
        n = start + tl.arange(0, CHUNK)
        ids = tl.load(ids_ptr + n, mask=n < num_rows, other=-1)
        mine = (ids == expert).to(tl.int32)
        tl.store(rows_ptr + place + tl.cumsum(mine, 0) - 1, n, mask=mine != 0)
        place += tl.sum(mine)


@triton.jit
def _block_and_tile(num_blocks, num_tiles, GROUP: tl.constexpr):
    """This program's row block and tile: blocks in groups, so that both operands stay in L2."""
    program = tl.program_id(0)
    group_size = GROUP * num_tiles
    first = program // group_size * GROUP
    size = tl.minimum(num_blocks - first, GROUP)
    return first + program % group_size % size, program % group_size // size


@triton.jit
def _routed_rows(rows_ptr, block, num_rows, BLOCK_N: tl.constexpr, SORTED: tl.constexpr):
    """The block's routed rows, `num_rows` where there is none; unsorted, a block is one row."""
    lanes_n = tl.arange(0, BLOCK_N)
    if SORTED:
        rows_n = tl.load(rows_ptr + block * BLOCK_N + lanes_n)
    else:
        rows_n = tl.where(lanes_n == 0, block, num_rows)
    return rows_n


@triton.jit
def _next_run(position):
    """Where a run may begin: at a multiple of 16, so that activations are read as vectors."""
    return (position + 15) // 16 * 16


@triton.jit
def _packed_rows(runs_ptr, expert, positions_f, R: tl.constexpr):
    """Packed rows, int64, of positions; which positions hold an atom; the end of the positions."""
    packed_f = positions_f.to(tl.int64)
    kept_f = positions_f < 0
    end = 0
    for run in range(R):
        first = tl.load(runs_ptr + (expert * R + run) * 2)
        length = tl.load(runs_ptr + (expert * R + run) * 2 + 1)
        begin = _next_run(end)
        end = begin + length
        inside_f = (positions_f >= begin) & (positions_f < end)
        packed_f = tl.where(inside_f, (first + positions_f - begin).to(tl.int64), packed_f)
        kept_f |= inside_f
    return packed_f, kept_f, end


@triton.jit
def _activations(
    x_ptr,
    gate_ptr,
    up_ptr,
    tokens_n,
    live_n,
    packed_f,
    kept_f,
    stride_x,
    H,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """SiLU(x gateᵀ) ⊙ (x upᵀ) of a tile, computed in float32: [BLOCK_N, BLOCK_F] of x's dtype."""
    columns_h = tl.arange(0, BLOCK_H)
    x_ptrs_nh = x_ptr + tokens_n.to(tl.int64)[:, None] * stride_x + columns_h[None, :]
    weights_hf = packed_f[None, :] * H + columns_h[:, None]
    gate_nf = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
    up_nf = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
    for start in range(0, H, BLOCK_H):
        inside_h = columns_h < H - start
        x_nh = tl.load(x_ptrs_nh + start, mask=live_n[:, None] & inside_h[None, :], other=0.0)
        inside_hf = kept_f[None, :] & inside_h[:, None]
        gate_hf = tl.load(gate_ptr + weights_hf + start, mask=inside_hf, other=0.0)
        up_hf = tl.load(up_ptr + weights_hf + start, mask=inside_hf, other=0.0)
        gate_nf = tl.dot(x_nh, gate_hf, gate_nf, input_precision="ieee")
        up_nf = tl.dot(x_nh, up_hf, up_nf, input_precision="ieee")
    return (gate_nf * tl.sigmoid(gate_nf) * up_nf).to(x_ptr.dtype.element_ty)


@triton.jit(do_not_specialize=_VARYING)
def gate_up_kernel(
    x_ptr,  # [T, H], rows stride_x apart
    gate_ptr,  # [P, H]
    up_ptr,  # [P, H]
    h_ptr,  # out [N, positions], rows stride_h apart
    runs_ptr,  # [E, R, 2]
    rows_ptr,
    experts_ptr,
    num_rows,
    num_blocks,
    num_tiles,
    stride_x,
    stride_h,
    H,
    E: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    SORTED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """First kernel of two. A program: a row block and a tile of its expert's positions."""
    block, tile = _block_and_tile(num_blocks, num_tiles, GROUP)
    expert = tl.load(experts_ptr + block)
    if (expert < 0) | (expert >= E):
        return
    positions_f = tile * BLOCK_F + tl.arange(0, BLOCK_F)
    packed_f, kept_f, end = _packed_rows(runs_ptr, expert, positions_f, R)
    if tile * BLOCK_F >= end:
        return
    rows_n = _routed_rows(rows_ptr, block, num_rows, BLOCK_N, SORTED)
    live_n = rows_n < num_rows
    h_nf = _activations(
        x_ptr, gate_ptr, up_ptr, rows_n // K, live_n, packed_f, kept_f, stride_x, H,
        BLOCK_N, BLOCK_F, BLOCK_H,
    )  # fmt: skip
    h_ptrs_nf = h_ptr + rows_n.to(tl.int64)[:, None] * stride_h + positions_f[None, :]
    # Positions without an atom, up to the next multiple of 16, hold zeros.
    written_f = positions_f < _next_run(end)
    tl.store(h_ptrs_nf, h_nf, mask=live_n[:, None] & written_f[None, :])


@triton.jit(do_not_specialize=_VARYING)
def down_kernel(
    h_ptr,  # [N, positions], rows stride_h apart
    down_t_ptr,  # [P, H]
    y_ptr,  # out [N, H]: what each routed row adds to its token
    runs_ptr,  # [E, R, 2]
    weights_ptr,  # [N]
    rows_ptr,
    experts_ptr,
    num_rows,
    num_blocks,
    num_tiles,
    stride_h,
    H,
    E: tl.constexpr,
    R: tl.constexpr,
    SORTED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Second kernel of two. A program: a row block and a tile of H, over all runs of the expert."""
    block, tile = _block_and_tile(num_blocks, num_tiles, GROUP)
    expert = tl.load(experts_ptr + block)
    if (expert < 0) | (expert >= E):
        return
    rows_n = _routed_rows(rows_ptr, block, num_rows, BLOCK_N, SORTED)
    live_n = rows_n < num_rows
    columns_d = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    inside_d = columns_d < H
    h_ptrs_n = h_ptr + rows_n.to(tl.int64) * stride_h
    y_nd = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    end = 0
    for run in range(R):
        first = tl.load(runs_ptr + (expert * R + run) * 2)
        length = tl.load(runs_ptr + (expert * R + run) * 2 + 1)
        begin = _next_run(end)
        for start in range(0, length, BLOCK_F):
            atoms_f = start + tl.arange(0, BLOCK_F)
            kept_f = atoms_f < length
            h_nf = tl.load(
                h_ptrs_n[:, None] + (begin + atoms_f)[None, :],
                mask=live_n[:, None] & (atoms_f < _next_run(length))[None, :],
                other=0.0,
            )
            packed_f = (first + atoms_f).to(tl.int64)
            down_fd = tl.load(
                down_t_ptr + packed_f[:, None] * H + columns_d[None, :],
                mask=kept_f[:, None] & inside_d[None, :],
                other=0.0,
            )
            y_nd = tl.dot(h_nf, down_fd, y_nd, input_precision="ieee")
        end = begin + length
    y_nd *= tl.load(weights_ptr + rows_n, mask=live_n, other=0.0).to(tl.float32)[:, None]
    y_ptrs_nd = y_ptr + rows_n.to(tl.int64)[:, None] * H + columns_d[None, :]
    tl.store(y_ptrs_nd, y_nd.to(y_ptr.dtype.element_ty), mask=live_n[:, None] & inside_d[None, :])


@triton.jit
def sum_rows_kernel(
    y_ptr,  # [N, H]
    ids_ptr,  # [N]
    out_ptr,  # out [T, H]
    H,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum over a token's experts in their order, in float32; skipped ids have no row in y."""
    token = tl.program_id(0).to(tl.int64)
    columns_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    sum_d = tl.zeros([BLOCK_D], tl.float32)
    for slot in range(K):
        expert = tl.load(ids_ptr + token * K + slot)
        length = tl.where((expert >= 0) & (expert < E), H, 0)
        y_ptrs_d = y_ptr + (token * K + slot) * H + columns_d
        sum_d += tl.load(y_ptrs_d, mask=columns_d < length, other=0.0).to(tl.float32)
    out_d = sum_d.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * H + columns_d, out_d, mask=columns_d < H)


@triton.jit(do_not_specialize=_VARYING)
def fused_kernel(
    x_ptr,  # [T, H], rows stride_x apart
    gate_ptr,  # [P, H]
    up_ptr,  # [P, H]
    down_t_ptr,  # [P, H]
    out_ptr,  # in and out [T, H], float32
    runs_ptr,  # [E, R, 2]
    weights_ptr,  # [N]
    rows_ptr,
    experts_ptr,
    num_rows,
    num_blocks,
    num_tiles,
    stride_x,
    H,
    E: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    SORTED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Both GEMMs for a row block and a tile of atoms, added into the output.

    Atomic additions: the order, and with it the last bit, changes from run to run.
    """
    block, tile = _block_and_tile(num_blocks, num_tiles, GROUP)
    expert = tl.load(experts_ptr + block)
    if (expert < 0) | (expert >= E):
        return
    positions_f = tile * BLOCK_F + tl.arange(0, BLOCK_F)
    packed_f, kept_f, end = _packed_rows(runs_ptr, expert, positions_f, R)
    if tile * BLOCK_F >= end:
        return
    rows_n = _routed_rows(rows_ptr, block, num_rows, BLOCK_N, SORTED)
    live_n = rows_n < num_rows
    tokens_n = rows_n // K
    h_nf = _activations(
        x_ptr, gate_ptr, up_ptr, tokens_n, live_n, packed_f, kept_f, stride_x, H,
        BLOCK_N, BLOCK_F, BLOCK_H,
    )  # fmt: skip
    weights_n = tl.load(weights_ptr + rows_n, mask=live_n, other=0.0).to(tl.float32)
    out_ptrs_n = out_ptr + tokens_n.to(tl.int64) * H
    for start in range(0, H, BLOCK_D):
        columns_d = start + tl.arange(0, BLOCK_D)
        inside_d = columns_d < H
        down_fd = tl.load(
            down_t_ptr + packed_f[:, None] * H + columns_d[None, :],
            mask=kept_f[:, None] & inside_d[None, :],
            other=0.0,
        )
        y_nd = tl.dot(h_nf, down_fd, input_precision="ieee") * weights_n[:, None]
        tl.atomic_add(
            out_ptrs_n[:, None] + columns_d[None, :],
            y_nd,
            mask=live_n[:, None] & inside_d[None, :],
            sem="relaxed",
        )
