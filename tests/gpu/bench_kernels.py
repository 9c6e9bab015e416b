"""Time the Triton kernels at the shapes of real models: `python -m tests.gpu.bench_kernels`.

Needs a CUDA device, torch and Triton. Every call is captured in a CUDA graph and replayed with a
cold L2 cache; medians. Pruned experts have ragged widths, not multiples of a tile. `vs dense` is
the time over this kernel's own dense time × the mean kept width of the routed rows: 1.00 means
that pruning pays in full. `mix` is the time of four profiles in one batch over that of the union of
their atoms under one profile. `--format` quantizes the weights. `--tune` searches tiles for
`experts/backends/triton.py` instead.

Legend: T tokens, K experts per token, E experts, H hidden size, I intermediate size, P packed rows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch

from tests.quantized import SCHEMES, load_at_random
from vllm_atomic_moe.experts.activation import SILU
from vllm_atomic_moe.experts.backends import triton as backend
from vllm_atomic_moe.experts.packing import PackedExperts, build_layout, with_slots
from vllm_atomic_moe.files.row_formats import PLAIN
from vllm_atomic_moe.measure.shapes import SHAPES

TOKENS = (1, 8, 64, 512, 2048)
PRUNED = (0.0, 0.25, 0.5, 0.75)
MIXED = 4


@dataclass(frozen=True, slots=True)
class Call:
    """Arguments of one call, and what it must move and compute.

    Attributes:
        kept: mean width of the routed rows' experts, over I.
        bytes: weights of the experts that have tokens, activations in and out.
        flops: multiplications and additions of the three GEMMs.
    """

    x_TH: torch.Tensor
    packed: PackedExperts
    index: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    topk_weights_TK: torch.Tensor
    ids_TK: torch.Tensor
    widest: int
    kept: float
    bytes: int
    flops: int

    def run(self, tiles: backend.Tiles, one_kernel: bool) -> torch.Tensor:
        """The kernels, with these tiles."""
        return backend.launch(
            self.x_TH, self.packed.weights, self.packed.scales, [], *self.index,
            self.topk_weights_TK, self.ids_TK, self.widest, SILU.spec, self.packed.row_format.spec,
            tiles, one_kernel,
        )  # fmt: skip

    @property
    def rows_per_expert(self) -> int:
        """The number that selects tiles and form."""
        return backend.rows_per_expert(self.ids_TK, self.index[2])

    @property
    def tiles(self) -> backend.Tiles:
        """The selected tiles."""
        plain = self.packed.row_format.plain
        return backend.choose_tiles(self.rows_per_expert, self.x_TH.dtype, plain)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; times in microseconds, None where that form is not meant."""

    model: str
    tokens: int
    pruned: float
    kept: float
    two_kernels_us: float
    one_kernel_us: float | None
    chosen_us: float
    vs_dense: float
    mix: float | None
    gb_per_s: float
    tflop_per_s: float


def make_experts(E: int, H: int, full: int, dtype: torch.dtype, name: str) -> PackedExperts:
    """Dense experts; pruned ones use the first of their rows."""
    rows = SCHEMES[name].row_format(H, full) if name in SCHEMES else PLAIN
    layout = build_layout({"dense": torch.ones(E, full, dtype=torch.bool)})
    packed = PackedExperts(layout, H, dtype, torch.device("cuda"), row_format=rows)
    if rows.plain:
        for weight in packed.weights:
            weight.normal_(std=H**-0.5)
    else:
        load_at_random(packed)
    return packed


def draw_mask(E: int, full: int, pruned: float, generator: torch.Generator) -> torch.Tensor:
    """bool [E, I]: atoms at random, experts of ragged widths."""
    spread_E1 = 0.75 + 0.5 * torch.rand(E, 1, generator=generator)
    return (
        torch.rand(E, full, generator=generator) < (1 - pruned) * spread_E1
        if pruned
        else (torch.ones(E, full, dtype=torch.bool))
    )


def make_call(
    shape: tuple[int, int, int, int],
    packed: PackedExperts,
    dtype: torch.dtype,
    T: int,
    masks: list[torch.Tensor],
    slots: list[int],
) -> Call:
    """Tokens routed evenly at random, which take `slots` in turn; one mask a slot."""
    E, H, full, K = shape
    generator = torch.Generator().manual_seed(0)
    topk_weights_TK, ids_TK = torch.rand(T, E, generator=generator).topk(K)
    x_TH = torch.randn(T, H, generator=generator).to("cuda", dtype)
    layout = build_layout({str(slot): mask for slot, mask in enumerate(masks)})
    slots_T1 = torch.tensor(slots, dtype=torch.int32).repeat(T)[:T, None]
    widths_E = layout.offsets_E1.diff()
    routed_atoms, read_atoms = int(widths_E[ids_TK].sum()), int(widths_E[ids_TK.unique()].sum())
    index = layout.slot_bits().cuda(), layout.words_E1.cuda(), layout.offsets_E1.cuda()
    return Call(
        x_TH, packed, index, topk_weights_TK.cuda(), with_slots(ids_TK.int(), slots_T1).cuda(),
        int(widths_E.max()), routed_atoms / (full * T * K),
        packed.weight_bytes * read_atoms // (E * full) + 2 * x_TH.nbytes, 6 * routed_atoms * H,
    )  # fmt: skip


def microseconds(call: Callable[[], object]) -> float:
    """Median time of a captured call."""
    from triton.testing import do_bench

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return 1e3 * float(do_bench(graph.replay, return_mode="median"))


def measure(model: str, dtype: torch.dtype, tokens: list[int], name: str) -> Iterator[Row]:
    """All rows of one model."""
    shape = SHAPES[model][1:]
    packed = make_experts(*shape[:3], dtype, name)
    for T in tokens:
        dense = 0.0
        for pruned in PRUNED:
            generator = torch.Generator().manual_seed(1)
            masks = [draw_mask(shape[0], shape[2], pruned, generator) for _ in range(MIXED)]
            call = make_call(shape, packed, dtype, T, masks[:1], [0])
            tiles = call.tiles
            two = microseconds(lambda: call.run(tiles, False))  # noqa: B023
            # Larger blocks of rows would not fit into registers beside the second GEMM.
            one = microseconds(lambda: call.run(tiles, True)) if tiles.rows == 16 else None  # noqa: B023
            takes_one = one is not None and call.rows_per_expert <= backend.ONE_KERNEL_ROWS
            chosen = one if one is not None and takes_one else two
            dense = dense or chosen
            mix = None
            if pruned and T >= MIXED:
                together = [*masks, torch.stack(masks).any(dim=0)]
                calls = (
                    make_call(shape, packed, dtype, T, together, slots)
                    for slots in ([MIXED], list(range(MIXED)))
                )
                union, mixed = (microseconds(lambda: call.run(tiles, takes_one)) for call in calls)  # noqa: B023
                mix = mixed / union
            yield Row(
                model, T, pruned, call.kept, two, one, chosen, chosen / (dense * call.kept),
                mix, call.bytes / chosen / 1e3, call.flops / chosen / 1e6,
            )  # fmt: skip


def tune(model: str, dtype: torch.dtype, tokens: list[int], name: str) -> None:
    """Print the three fastest tiles per number of tokens, dense experts; minutes per line."""
    from triton.runtime.errors import OutOfResources

    shape = SHAPES[model][1:]
    packed = make_experts(*shape[:3], dtype, name)
    dense = [torch.ones(shape[0], shape[2], dtype=torch.bool)]
    for T in tokens:
        call = make_call(shape, packed, dtype, T, dense, [0])
        one_kernel = call.rows_per_expert <= backend.ONE_KERNEL_ROWS
        timed = []
        sizes = itertools.product((16, 32, 64, 128), (32, 64), (64, 128), (64, 128), (64,), (4, 8))
        for size, stages in itertools.product(sizes, (3, 4)):
            tiles = backend.Tiles(*size, stages)
            try:
                timed.append((microseconds(lambda: call.run(tiles, one_kernel)), tiles))  # noqa: B023
            except OutOfResources:
                continue
        for time, tiles in sorted(timed)[:3]:
            print(f"{model} T={T}, {call.rows_per_expert} rows an expert: {time:.1f} us {tiles}")


def roofline(dtype: torch.dtype) -> tuple[float, float]:
    """This device's limits: GB/s read and written by a copy, TFLOP/s of a square matmul."""
    data = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    copied = torch.empty_like(data)
    square = torch.randn(8192, 8192, device="cuda", dtype=dtype)
    return (
        2 * data.nbytes / microseconds(lambda: copied.copy_(data)) / 1e3,
        2 * 8192**3 / microseconds(lambda: square @ square) / 1e6,
    )


def main() -> None:
    """Parse arguments, print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--format", choices=["plain", *SCHEMES], default="plain")
    parser.add_argument("--tune", action="store_true", help="search tiles instead")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: this benchmark needs one")
    dtype = getattr(torch, options.dtype)
    if options.tune:
        for model in options.model:
            tune(model, dtype, options.tokens, options.format)
        return
    copy, matmul = roofline(dtype)
    device = torch.cuda.get_device_name()
    if not options.json:
        speed = f"copy {copy:.0f} GB/s, matmul {matmul:.0f} TFLOP/s"
        print(f"{device}, {options.dtype}, {options.format}: {speed}")
        print(f"{'model':18}    T pruned   kept  two us  one us  vs dense   mix   GB/s TFLOP/s")
    rows = []
    arguments = dtype, options.tokens, options.format
    for row in itertools.chain(*(measure(model, *arguments) for model in options.model)):
        rows.append(asdict(row))
        if not options.json:
            one = "" if row.one_kernel_us is None else f"{row.one_kernel_us:.1f}"
            mix = "" if row.mix is None else f"{row.mix:.2f}"
            print(
                f"{row.model:18} {row.tokens:4} {row.pruned:6.0%} {row.kept:6.3f} "
                f"{row.two_kernels_us:7.1f} {one:>7} {row.vs_dense:9.2f} {mix:>5} "
                f"{row.gb_per_s:6.0f} {row.tflop_per_s:7.1f}",
                flush=True,
            )
    if options.json:
        print(json.dumps({"device": device, "dtype": options.dtype, "format": options.format,
                          "copy_gb_per_s": copy, "matmul_tflop_per_s": matmul, "rows": rows},
                         indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
