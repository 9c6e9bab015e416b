# mypy: disallow-untyped-defs=False
"""The GPU kernels of `backends.triton`: plain Triton over row-major packed rows.

Routed rows are the N = T·K pairs (token, expert), numbered token·K + k. A program of the GEMMs
works on one block of routed rows that share an expert. Grids are upper bounds known on the host;
programs read an expert's tokens and atoms from device tensors, and a program without work returns
after reading a few integers.

Atom numbers count an expert's packed rows from its first one. A tile of atoms is whole 32-bit words
of the slots' bits. The *union* of a row block is the OR of its rows' words: gate and up are read
only for its atoms, down for its nonzero words. Rows may have different slots, so each masks its
activations by its own words.

Weights are `triton_rows.Rows`, one per projection: plain, or codes that are decoded when loaded.

Legend: T tokens, K experts per token, N routed rows, E experts, H hidden size, P packed rows,
S slots, W words of all experts, B row blocks, U words of the widest expert. Lower case for what a
program holds of them: n routed rows, f atoms, u words, h and d hidden columns (read and written).
"""

import triton
from triton import language as tl

from vllm_atomic_moe.experts.backends.triton_rows import load_factor, load_rows, scale_rows

# They change from call to call or layer to layer; their divisibility must not recompile a kernel.
_VARYING = ["num_rows", "num_blocks", "num_words", "num_unions"]


@triton.jit(do_not_specialize=_VARYING)
def sort_rows_kernel(
    ids_ptr,  # [N], with slots
    rows_ptr,  # out [num_blocks · BLOCK_N]: routed rows by expert, padded with num_rows
    experts_ptr,  # out [num_blocks]: the expert of each block, or -1
    num_rows,
    num_blocks,
    E: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Stable sort of routed rows by expert, whatever their slots; experts padded to whole blocks.

    One program per expert, and a last one for the empty blocks. Each counts all rows by itself, so
    that one launch without atomics suffices: the order is always the same.
    """
    expert = tl.program_id(0)
    bins = tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(0, num_rows, CHUNK):
        n = start + tl.arange(0, CHUNK)
        experts = tl.load(ids_ptr + n, mask=n < num_rows, other=-1) >> 4
        ours = (experts >= 0) & (experts < E)
        counts += tl.histogram(experts.to(tl.int32), BINS, mask=ours)
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
        experts = tl.load(ids_ptr + n, mask=n < num_rows, other=-1) >> 4
        mine = (experts == expert).to(tl.int32)
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
    """The block's routed rows, padded with `num_rows`; unsorted, a block is one row."""
    lanes_n = tl.arange(0, BLOCK_N)
    if SORTED:
        rows_n = tl.load(rows_ptr + block * BLOCK_N + lanes_n)
    else:
        rows_n = tl.where(lanes_n == 0, block, num_rows)
    return rows_n


@triton.jit
def _block_expert(experts_ptr, block, SORTED: tl.constexpr):
    """The expert of a block; unsorted, from the row's id, which carries a slot."""
    expert = tl.load(experts_ptr + block)
    if not SORTED:
        expert = expert >> 4
    return expert


@triton.jit
def _first_row_and_width(offsets_ptr, expert):
    """The expert's first packed row, int64, and its number of rows, int32."""
    first = tl.load(offsets_ptr + expert)
    return first, (tl.load(offsets_ptr + expert + 1) - first).to(tl.int32)


@triton.jit
def _row_words(bits_ptr, words_ptr, ids_ptr, expert, rows_n, live_n, num_words):
    """Start of the expert's words in the slot of every row."""
    slots_n = tl.load(ids_ptr + rows_n, mask=live_n, other=0) & 15
    return bits_ptr + slots_n * num_words + tl.load(words_ptr + expert)


@triton.jit
def _tile_words(words_ptrs_n, live_n, u: tl.constexpr, atoms_left):
    """Word u of a tile of every row; zero past the expert's end, where the next one starts."""
    inside_n = tl.full(live_n.shape, u * 32, tl.int32) < atoms_left
    return tl.load(words_ptrs_n + u, mask=live_n & inside_n, other=0)


@triton.jit
def _union(words_ptrs_n, live_n, atoms_left, BLOCK_F: tl.constexpr):
    """The union of a tile: the word with each atom's bit [BLOCK_F], and whether any is set."""
    lanes_f = tl.arange(0, BLOCK_F)
    union_f = tl.zeros([BLOCK_F], tl.int32)
    any_bits = 0
    for u in tl.static_range(BLOCK_F // 32):
        word = tl.reduce_or(_tile_words(words_ptrs_n, live_n, u, atoms_left), 0)
        union_f = tl.where(lanes_f // 32 == u, word, union_f)
        any_bits |= word
    return union_f, any_bits != 0


@triton.jit
def _mask_rows(h_nf, words_ptrs_n, live_n, atoms_left, BLOCK_F: tl.constexpr):
    """Zero the atoms that the row's slot does not use, whatever their values."""
    lanes_f = tl.arange(0, BLOCK_F)
    used_nf = tl.zeros(h_nf.shape, tl.int32)
    for u in tl.static_range(BLOCK_F // 32):
        bit_f = tl.where(lanes_f // 32 == u, 1 << lanes_f % 32, 0)
        words_n = _tile_words(words_ptrs_n, live_n, u, atoms_left)
        used_nf |= words_n[:, None] & bit_f[None, :]
    return tl.where(used_nf != 0, h_nf, 0.0)


@triton.jit
def _tanh(x):
    """2σ(2x) − 1; near zero, where that loses digits, a polynomial."""
    square = x * x
    near = x + x * square * (-1 / 3 + square * (2 / 15 - square * (17 / 315)))
    return tl.where(square < 0.04, near, 2 * tl.sigmoid(2 * x) - 1)


@triton.jit
def _activate(gate, up, KIND: tl.constexpr, LIMIT: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """h from the outputs of gate and up; arguments as in `Activation`, LIMIT 0 for none."""
    if KIND == "relu2":
        positive = tl.maximum(up, 0.0)
        h = positive * positive
    elif KIND == "gelu_tanh":
        h = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
    elif KIND == "swiglustep":
        h = gate * tl.sigmoid(gate)
        if LIMIT > 0:
            h = tl.minimum(h, LIMIT)
            up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        h = h * up
    elif KIND == "situ":
        if B > 0:
            up = B * _tanh(up / B)
        h = A * _tanh(gate / A) * tl.sigmoid(gate) * up
    else:
        if LIMIT > 0:
            gate = tl.minimum(gate, LIMIT)
            up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        h = gate * tl.sigmoid(A * gate) * (up + B)
    return h


@triton.jit
def _activations(
    x_ptr,
    gate,
    up,
    expert,
    tokens_n,
    live_n,
    packed_f,
    kept_f,
    stride_x,
    H,
    KIND: tl.constexpr,
    LIMIT: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """act(x gateᵀ, x upᵀ) of a tile, unmasked: [BLOCK_N, BLOCK_F] of x's dtype.

    Computed in float32.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    columns_h = tl.arange(0, BLOCK_H)
    x_ptrs_nh = x_ptr + tokens_n.to(tl.int64)[:, None] * stride_x + columns_h[None, :]
    gate_nf = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
    up_nf = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
    if gate is not None:
        gate_factor = load_factor(gate, expert)
        gate_scales_f = scale_rows(gate, packed_f, kept_f, expert)
    up_factor = load_factor(up, expert)
    up_scales_f = scale_rows(up, packed_f, kept_f, expert)
    for start in range(0, H, BLOCK_H):
        inside_h = columns_h < H - start
        x_nh = tl.load(x_ptrs_nh + start, mask=live_n[:, None] & inside_h[None, :], other=0.0)
        if gate is not None:
            gate_fh = load_rows(
                gate, packed_f, kept_f, gate_scales_f, gate_factor, start, H, DTYPE, BLOCK_H
            )
            gate_nf = tl.dot(x_nh, tl.trans(gate_fh), gate_nf, input_precision="ieee")
        up_fh = load_rows(up, packed_f, kept_f, up_scales_f, up_factor, start, H, DTYPE, BLOCK_H)
        up_nf = tl.dot(x_nh, tl.trans(up_fh), up_nf, input_precision="ieee")
    if gate is not None:  # noqa: SIM102 (known at compile time)
        if gate.bias is not None:
            gate_nf += tl.load(gate.bias + packed_f, mask=kept_f, other=0.0)[None, :]
    if up.bias is not None:
        up_nf += tl.load(up.bias + packed_f, mask=kept_f, other=0.0)[None, :]
    return _activate(gate_nf, up_nf, KIND, LIMIT, A, B).to(DTYPE)


@triton.jit(do_not_specialize=_VARYING)
def gate_up_kernel(
    x_ptr,  # [T, H], rows stride_x apart
    gate,  # None without a gate
    up,
    h_ptr,  # out [N, 32 U], rows stride_h apart; words outside the union stay as they are
    unions_ptr,  # out [B, num_unions], of whole tiles
    bits_ptr,  # [S, num_words]
    words_ptr,  # [E+1]
    offsets_ptr,  # [E+1]
    ids_ptr,  # [N], with slots
    rows_ptr,
    experts_ptr,
    num_rows,
    num_blocks,
    num_tiles,
    num_words,
    num_unions,
    stride_x,
    stride_h,
    H,
    E: tl.constexpr,
    K: tl.constexpr,
    KIND: tl.constexpr,
    LIMIT: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    SORTED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """First of two kernels. A program: a row block and a tile of its expert's atoms."""
    block, tile = _block_and_tile(num_blocks, num_tiles, GROUP)
    expert = _block_expert(experts_ptr, block, SORTED)
    if (expert < 0) | (expert >= E):
        return
    first, width = _first_row_and_width(offsets_ptr, expert)
    if tile * BLOCK_F >= width:
        return
    rows_n = _routed_rows(rows_ptr, block, num_rows, BLOCK_N, SORTED)
    live_n = rows_n < num_rows
    words_ptrs_n = _row_words(bits_ptr, words_ptr, ids_ptr, expert, rows_n, live_n, num_words)
    words_ptrs_n += tile * (BLOCK_F // 32)
    atoms_left = width - tile * BLOCK_F
    union_f, used = _union(words_ptrs_n, live_n, atoms_left, BLOCK_F)
    atoms_f = tile * BLOCK_F + tl.arange(0, BLOCK_F)
    unions_ptrs_f = unions_ptr + block * num_unions + atoms_f // 32
    tl.store(unions_ptrs_f, union_f, mask=atoms_f % 32 == 0)
    if not used:
        return
    kept_f = (((union_f >> (atoms_f % 32)) & 1) != 0) & (atoms_f < width)
    h_nf = _activations(
        x_ptr, gate, up, expert, rows_n // K, live_n, first + atoms_f, kept_f, stride_x, H,
        KIND, LIMIT, A, B, BLOCK_N, BLOCK_F, BLOCK_H,
    )  # fmt: skip
    h_nf = _mask_rows(h_nf, words_ptrs_n, live_n, atoms_left, BLOCK_F)
    h_ptrs_nf = h_ptr + rows_n.to(tl.int64)[:, None] * stride_h + atoms_f[None, :]
    # Whole words, so that they are read as vectors.
    inside_f = atoms_f < (width + 31) // 32 * 32
    tl.store(h_ptrs_nf, h_nf, mask=live_n[:, None] & inside_f[None, :])


@triton.jit(do_not_specialize=_VARYING)
def down_kernel(
    h_ptr,  # [N, 32 U], rows stride_h apart
    down_t,
    y_ptr,  # out [N, H]: the addend of each routed row to its token
    unions_ptr,  # [B, num_unions]
    offsets_ptr,  # [E+1]
    weights_ptr,  # [N]
    rows_ptr,
    experts_ptr,
    num_rows,
    num_blocks,
    num_tiles,
    num_unions,
    stride_h,
    H,
    E: tl.constexpr,
    SORTED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Second of two kernels. A program: a row block and a tile of H, over its union.

    The loop jumps over steps without atoms instead of branching: loads behind a branch are not
    pipelined. It takes 64 words at a time; one bit per word says whether any atom is used.
    """
    STEP_WORDS: tl.constexpr = BLOCK_F // 32
    DTYPE: tl.constexpr = h_ptr.dtype.element_ty
    block, tile = _block_and_tile(num_blocks, num_tiles, GROUP)
    expert = _block_expert(experts_ptr, block, SORTED)
    if (expert < 0) | (expert >= E):
        return
    first, width = _first_row_and_width(offsets_ptr, expert)
    rows_n = _routed_rows(rows_ptr, block, num_rows, BLOCK_N, SORTED)
    live_n = rows_n < num_rows
    columns_d = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    inside_d = columns_d < H
    h_ptrs_n = h_ptr + rows_n.to(tl.int64) * stride_h
    y_nd = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    factor = load_factor(down_t, expert)
    lanes_f, lanes_u = tl.arange(0, BLOCK_F), tl.arange(0, 64)
    for first_word in range(0, (width + 31) // 32, 64):
        words_u = first_word + lanes_u
        unions_ptrs_u = unions_ptr + block * num_unions + words_u
        union_u = tl.load(unions_ptrs_u, mask=words_u * 32 < width, other=0)
        used_u = (union_u != 0).to(tl.int64)
        words = tl.sum(used_u << lanes_u)
        steps = tl.sum(tl.max(tl.reshape(used_u, [64 // STEP_WORDS, STEP_WORDS]), 1))
        for _ in range(steps.to(tl.int32)):
            # A float's exponent gives the lowest set bit, and so the step that it is in.
            lowest = (words & -words).to(tl.float32).to(tl.int32, bitcast=True)
            word = (((lowest >> 23) & 255) - 127) // STEP_WORDS * STEP_WORDS
            step_words = (words >> word).to(tl.int32)
            words = (words >> word >> STEP_WORDS) << word << STEP_WORDS
            atoms_f = (first_word + word) * 32 + lanes_f
            used_f = ((step_words >> (lanes_f // 32)) & 1) != 0
            h_nf = tl.load(
                h_ptrs_n[:, None] + atoms_f[None, :],
                mask=live_n[:, None] & used_f[None, :],
                other=0.0,
            )
            packed_f, kept_f = first + atoms_f, used_f & (atoms_f < width)
            scales_f = scale_rows(down_t, packed_f, kept_f, expert)
            down_fd = load_rows(
                down_t, packed_f, kept_f, scales_f, factor, tile * BLOCK_D, H, DTYPE, BLOCK_D
            )
            y_nd = tl.dot(h_nf, down_fd, y_nd, input_precision="ieee")
    if down_t.bias is not None:
        bias_ptrs_d = down_t.bias + expert.to(tl.int64) * H + columns_d
        y_nd += tl.load(bias_ptrs_d, mask=inside_d, other=0.0)[None, :]
    y_nd *= tl.load(weights_ptr + rows_n, mask=live_n, other=0.0).to(tl.float32)[:, None]
    y_ptrs_nd = y_ptr + rows_n.to(tl.int64)[:, None] * H + columns_d[None, :]
    tl.store(y_ptrs_nd, y_nd.to(y_ptr.dtype.element_ty), mask=live_n[:, None] & inside_d[None, :])


@triton.jit
def sum_rows_kernel(
    y_ptr,  # [N, H]
    ids_ptr,  # [N], with slots
    out_ptr,  # out [T, H]
    H,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum over a token's experts in order, in float32; skipped ids have no row in y."""
    token = tl.program_id(0).to(tl.int64)
    columns_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    sum_d = tl.zeros([BLOCK_D], tl.float32)
    for k in range(K):
        expert = tl.load(ids_ptr + token * K + k) >> 4
        length = tl.where((expert >= 0) & (expert < E), H, 0)
        y_ptrs_d = y_ptr + (token * K + k) * H + columns_d
        sum_d += tl.load(y_ptrs_d, mask=columns_d < length, other=0.0).to(tl.float32)
    out_d = sum_d.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * H + columns_d, out_d, mask=columns_d < H)


@triton.jit
def _add_bias(
    out_ptr, bias_ptr, weights_ptr, rows_n, live_n, H, K: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Adds an expert's bias, weighted, to the tokens of its rows."""
    weights_n = tl.load(weights_ptr + rows_n, mask=live_n, other=0.0).to(tl.float32)
    out_ptrs_n = out_ptr + (rows_n // K).to(tl.int64) * H
    for start in range(0, H, BLOCK_D):
        columns_d = start + tl.arange(0, BLOCK_D)
        inside_d = columns_d < H
        bias_d = tl.load(bias_ptr + columns_d, mask=inside_d, other=0.0)
        tl.atomic_add(
            out_ptrs_n[:, None] + columns_d[None, :],
            weights_n[:, None] * bias_d[None, :],
            mask=live_n[:, None] & inside_d[None, :],
            sem="relaxed",
        )


@triton.jit(do_not_specialize=_VARYING)
def fused_kernel(
    x_ptr,  # [T, H], rows stride_x apart
    gate,  # None without a gate
    up,
    down_t,
    out_ptr,  # in and out [T, H], float32
    bits_ptr,  # [S, num_words]
    words_ptr,  # [E+1]
    offsets_ptr,  # [E+1]
    weights_ptr,  # [N]
    ids_ptr,  # [N], with slots
    rows_ptr,
    experts_ptr,
    num_rows,
    num_blocks,
    num_tiles,
    num_words,
    stride_x,
    H,
    E: tl.constexpr,
    K: tl.constexpr,
    KIND: tl.constexpr,
    LIMIT: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    SORTED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Both GEMMs for a row block and a tile of its expert's atoms, added into the output.

    Atomic additions: their order, and so the last bit, changes from run to run. The first tile of
    an expert, even of one without atoms, also adds its bias.
    """
    block, tile = _block_and_tile(num_blocks, num_tiles, GROUP)
    expert = _block_expert(experts_ptr, block, SORTED)
    if (expert < 0) | (expert >= E):
        return
    first, width = _first_row_and_width(offsets_ptr, expert)
    rows_n = _routed_rows(rows_ptr, block, num_rows, BLOCK_N, SORTED)
    live_n = rows_n < num_rows
    if down_t.bias is not None:  # noqa: SIM102 (known at compile time, unlike the tile)
        if tile == 0:
            _add_bias(
                out_ptr, down_t.bias + expert.to(tl.int64) * H, weights_ptr, rows_n, live_n, H,
                K, BLOCK_D,
            )  # fmt: skip
    if tile * BLOCK_F >= width:
        return
    words_ptrs_n = _row_words(bits_ptr, words_ptr, ids_ptr, expert, rows_n, live_n, num_words)
    words_ptrs_n += tile * (BLOCK_F // 32)
    atoms_left = width - tile * BLOCK_F
    union_f, used = _union(words_ptrs_n, live_n, atoms_left, BLOCK_F)
    if not used:
        return
    atoms_f = tile * BLOCK_F + tl.arange(0, BLOCK_F)
    kept_f = (((union_f >> (atoms_f % 32)) & 1) != 0) & (atoms_f < width)
    packed_f = first + atoms_f
    tokens_n = rows_n // K
    h_nf = _activations(
        x_ptr, gate, up, expert, tokens_n, live_n, packed_f, kept_f, stride_x, H,
        KIND, LIMIT, A, B, BLOCK_N, BLOCK_F, BLOCK_H,
    )  # fmt: skip
    h_nf = _mask_rows(h_nf, words_ptrs_n, live_n, atoms_left, BLOCK_F)
    weights_n = tl.load(weights_ptr + rows_n, mask=live_n, other=0.0).to(tl.float32)
    out_ptrs_n = out_ptr + tokens_n.to(tl.int64) * H
    factor = load_factor(down_t, expert)
    scales_f = scale_rows(down_t, packed_f, kept_f, expert)
    for start in range(0, H, BLOCK_D):
        columns_d = start + tl.arange(0, BLOCK_D)
        inside_d = columns_d < H
        down_fd = load_rows(
            down_t, packed_f, kept_f, scales_f, factor, start, H, h_nf.dtype, BLOCK_D
        )
        y_nd = tl.dot(h_nf, down_fd, input_precision="ieee") * weights_n[:, None]
        tl.atomic_add(
            out_ptrs_n[:, None] + columns_d[None, :],
            y_nd,
            mask=live_n[:, None] & inside_d[None, :],
            sem="relaxed",
        )
