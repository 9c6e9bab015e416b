"""Time of an MoE layer of quantized rows or another activation, against our own plain SiLU layer.

All keep the same atoms and compute the same routing in turn; the figure is the ratio of their times
within a round.

Legend: T tokens, E experts, H hidden size, I full intermediate size, G scale rows and C scale
columns of one expert's projection.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from vllm_atomic_moe.experts.activation import Activation
from vllm_atomic_moe.experts.backends import Backend, choose_backend
from vllm_atomic_moe.experts.formats import Encoded
from vllm_atomic_moe.experts.packing import PackedExperts, PackedLayout, build_layout, with_slots
from vllm_atomic_moe.files.row_formats import PLAIN, PROJECTIONS, Block, RowFormat
from vllm_atomic_moe.measure.layer_benchmark import (
    PROFILE,
    LayerPlan,
    compute,
    draw_mask,
    draw_routing,
    quartiles,
    timed,
)
from vllm_atomic_moe.measure.shapes import LayerShape

FORMATS = {
    "fp8": RowFormat("e4m3", Block(128, 128), Block(128, 128)),
    "int4": RowFormat("int4", Block(1, 32), Block(32, 1), torch.bfloat16),
    "mxfp4": RowFormat("e2m1", Block(1, 32), Block(32, 1), torch.float8_e8m0fnu),
}
# With a gate: without one a layer has two matrices instead of three.
ACTIVATIONS = {
    "clamped swiglu": Activation("swish", 7.0, 1.702, 1.0),
    "gelu_tanh": Activation("gelu_tanh"),
    "swiglustep": Activation("swiglustep", 7.0),
    "situ": Activation("situ", alpha=4.0, beta=25.0),
}
BASE = "plain"


@dataclass(frozen=True, slots=True)
class VariantCell:
    """One row format or activation; times are medians in milliseconds.

    Attributes:
        shape, tokens, pruned: as in `LayerCell`.
        variant: key of FORMATS or ACTIVATIONS.
        size: bytes of its layer ÷ bytes of the plain layer.
        plain_ms: ours, of plain rows and SiLU.
        ours_ms: ours, of this variant.
        ratio, ratio_low, ratio_high: median over rounds of ours ÷ plain, and its quartiles.
        rounds: how many were timed.
    """

    shape: str
    tokens: int
    pruned: float
    variant: str
    size: float
    plain_ms: float
    ours_ms: float
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    rounds: int


def measure_variants(
    plan: LayerPlan, on_progress: Callable[[int, int, str], None] | None = None
) -> list[VariantCell]:
    """Measure every format and activation at every shape, pruned fraction and T.

    Args:
        plan: what to measure.
        on_progress: called with (layers done, layers in all, the next layer).
    """
    backend = choose_backend(torch.device("cpu"), plan.dtype, plan.kernel)
    cells: list[VariantCell] = []
    combinations = [*itertools.product(plan.shapes, plan.pruned)]
    for done, (shape, pruned) in enumerate(combinations):
        if on_progress:
            on_progress(done, len(combinations), f"variants of {shape.name}, {pruned:.0%} pruned")
        generator = torch.Generator().manual_seed(plan.seed)
        layout = build_layout({PROFILE: draw_mask(shape, pruned, "spread", generator)})
        layers = {
            name: random_layer(layout, shape, rows, plan.dtype, backend, generator)
            for name, rows in {BASE: PLAIN, **FORMATS}.items()
        }
        for name, activation in ACTIVATIONS.items():
            layers[name] = copy.copy(layers[BASE])  # the same weights
            layers[name].activation = activation
        for tokens in plan.tokens:
            cells.extend(_measure(plan, shape, pruned, layers, backend, tokens, generator))
    if on_progress:
        on_progress(len(combinations), len(combinations), "")
    return cells


def _measure(
    plan: LayerPlan,
    shape: LayerShape,
    pruned: float,
    layers: dict[str, PackedExperts],
    backend: Backend,
    tokens: int,
    generator: torch.Generator,
) -> list[VariantCell]:
    """Time all layers in turn until there are enough rounds."""
    x_TH = torch.randn(tokens, shape.hidden, generator=generator).to(plan.dtype)
    rounds: list[dict[str, float]] = []
    names, began = list(layers), time.perf_counter()
    while len(rounds) <= plan.rounds and (
        len(rounds) <= 3 or time.perf_counter() - began < plan.seconds
    ):
        ids_TK = draw_routing(shape, tokens, "random", generator)
        weights_TK = torch.full(ids_TK.shape, 1 / shape.top_k)
        ids = with_slots(ids_TK, torch.zeros(1, dtype=torch.int32))
        turn = len(rounds) % len(names)
        rounds.append(
            {
                name: timed(compute, (layers[name], x_TH, weights_TK, ids, backend))
                for name in [*names[turn:], *names[:turn]]
            }
        )
    del rounds[0]  # which warms up
    cells = []
    for name in names[1:]:
        low, middle, high = quartiles([times[name] / times[BASE] for times in rounds])
        cells.append(
            VariantCell(
                shape=shape.name,
                tokens=tokens,
                pruned=pruned,
                variant=name,
                size=layers[name].weight_bytes / layers[BASE].weight_bytes,
                plain_ms=1e3 * median(times[BASE] for times in rounds),
                ours_ms=1e3 * median(times[name] for times in rounds),
                ratio=middle,
                ratio_low=low,
                ratio_high=high,
                rounds=len(rounds),
            )
        )
    return cells


def random_layer(
    layout: PackedLayout,
    shape: LayerShape,
    rows: RowFormat,
    dtype: torch.dtype,
    backend: Backend,
    generator: torch.Generator,
) -> PackedExperts:
    """A layer of random rows, the same for all experts."""
    packed = PackedExperts(layout, shape.hidden, dtype, storage=backend.storage, row_format=rows)
    for projection in PROJECTIONS:
        size = (shape.intermediate, shape.hidden)
        if rows.plain:
            drawn = torch.randn(size, generator=generator) * shape.hidden**-0.5
            encoded = Encoded(drawn.to(dtype))
        else:
            atoms, columns = rows.block(projection)
            # The highest codes of e4m3 are NaN.
            codes_IH = torch.randint(0, 120 if rows.bits == 8 else 16, size, generator=generator)
            scales = torch.rand(-(-size[0] // atoms), -(-size[1] // columns), generator=generator)
            scales_GC = ((scales + 0.1) * shape.hidden**-0.5 / 100).to(rows.scale)
            encoded = Encoded(codes_IH.to(torch.uint8), scales_GC)
        for expert in range(shape.experts):
            packed.load_encoded(expert, projection, encoded)
    return packed
