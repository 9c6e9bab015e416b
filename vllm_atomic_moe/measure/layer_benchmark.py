"""Time of one pruned MoE layer against vLLM's own dense op.

For every shape, pruned fraction and number of tokens three contestants compute the same routing in
turn: vLLM's dense op at full width, ours at the widths that pruning leaves, and vLLM's dense op at
the uniform width with as many bytes. The figure is a ratio within a round,

    ours ÷ (dense × mean kept width over the routed rows ÷ I),

1 for a kernel with a time in proportion to the remaining atoms. Then four profiles share one batch
in equal parts, against the union of their atoms under one profile: 1 for a kernel that reads shared
atoms once. Every round draws another routing, so that weights come from memory as in a model of
many layers, unless the used experts of a layer fit into the last-level cache three times over.

Legend: T tokens, K experts per token, E experts, H hidden size, I full intermediate size.
"""

from __future__ import annotations

import itertools
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, median, quantiles
from typing import Any, Literal

import torch
from vllm.platforms import current_platform

from vllm_atomic_moe.engine.compat import DenseExperts
from vllm_atomic_moe.experts.backends import Backend, choose_backend
from vllm_atomic_moe.experts.backends.cpu.library import cpu_flags
from vllm_atomic_moe.experts.op import fused_experts
from vllm_atomic_moe.experts.packing import PackedExperts, build_layout, with_slots
from vllm_atomic_moe.files.layouts import atom_bytes
from vllm_atomic_moe.measure.shapes import SHAPES, LayerShape

Routing = Literal["random", "skewed"]
Spread = Literal["spread", "half-empty"]
PROFILE = "bench"
MIXED_PROFILES = 4
# vLLM's CPU op takes widths in multiples of this.
UNIFORM_STEP = 32


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """The settings of a measurement.

    Attributes:
        shapes: layers.
        tokens: numbers of tokens T.
        pruned: fractions of atoms removed, 0 ≤ r < 1.
        dtype: of weights and activations.
        rounds: timed rounds per cell at most; at least 3 are made.
        seconds: time after which a cell has enough rounds.
        kernel: our backend; None means the fastest that runs.
        seed: of weights, widths and routings.
    """

    shapes: Sequence[LayerShape] = tuple(SHAPES.values())
    tokens: Sequence[int] = (1, 8, 64, 512, 2048)
    pruned: Sequence[float] = (0.0, 0.25, 0.5, 0.75)
    dtype: torch.dtype = torch.bfloat16
    rounds: int = 30
    seconds: float = 3.0
    kernel: str | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class LayerCell:
    """One measured cell; times are medians in milliseconds.

    Attributes:
        shape: name of the layer.
        tokens: T.
        pruned: fraction of atoms removed.
        routing: experts drawn uniformly, or by Zipf's law.
        spread: how the kept atoms are spread over experts: around their mean (standard deviation
            about 0.15 I), or one half of the experts empty and the other whole.
        kept: mean kept width over the routed rows ÷ I.
        dense_ms: vLLM's op at full width.
        ours_ms: ours.
        uniform_ms: vLLM's op at the uniform width with as many bytes; None if that is I.
        ratio: median over rounds of ours ÷ (dense × kept); None if no routed expert kept an atom.
        ratio_low, ratio_high: its quartiles.
        uniform_ratio: the same for `uniform_ms` and that width.
        bytes_per_s: weights that ours must read at least once, per second.
        flop_per_s: multiply-adds of the kept atoms, counted twice, per second.
        rounds: how many were timed.
    """

    shape: str
    tokens: int
    pruned: float
    routing: Routing
    spread: Spread
    kept: float
    dense_ms: float
    ours_ms: float
    uniform_ms: float | None
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    uniform_ratio: float | None
    bytes_per_s: float
    flop_per_s: float
    rounds: int


@dataclass(frozen=True, slots=True)
class MixCell:
    """A batch of four profiles in equal parts, each with the same fraction pruned, independently.

    Attributes:
        shape, tokens, pruned: as in `LayerCell`.
        union: fraction of atoms that at least one profile keeps.
        union_ms: median milliseconds with all tokens under one profile that keeps the union.
        mixed_ms: median milliseconds with a quarter of the tokens under each profile.
        ratio, ratio_low, ratio_high: median over rounds of mixed ÷ union, and its quartiles.
        rounds: how many were timed.
    """

    shape: str
    tokens: int
    pruned: float
    union: float
    union_ms: float
    mixed_ms: float
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    rounds: int


@dataclass(frozen=True, slots=True)
class LayerReport:
    """All cells of one run.

    Attributes:
        device: the processor's name.
        threads: CPU threads.
        dense: which of vLLM's ops.
        kernel: which of ours, and why.
        read_bytes_per_s: of summing a large tensor, the ceiling for few tokens.
        sgemm_flop_per_s: of torch's large square product in float32, the ceiling for many tokens on
            processors without instructions for the dtype.
        cells: one per measurement of one profile.
        mixes: one per measurement of four profiles in a batch.
    """

    device: str
    threads: int
    dense: str
    kernel: str
    read_bytes_per_s: float
    sgemm_flop_per_s: float
    cells: list[LayerCell] = field(default_factory=list)
    mixes: list[MixCell] = field(default_factory=list)


def measure_layers(
    plan: LayerPlan, on_progress: Callable[[int, int, str], None] | None = None
) -> LayerReport:
    """Measure every shape at every pruned fraction and number of tokens.

    Routing is random and widths are spread realistically; at half of the atoms pruned, skewed
    routing and half-empty layers are measured too.

    Args:
        on_progress: called with (layers done, layers in all, the next layer).

    Raises:
        ValueError: `plan.kernel` cannot run here, or vLLM is not built for CPUs.
    """
    if not current_platform.is_cpu():
        raise ValueError(
            "layers are measured against vLLM's CPU op, this vLLM is built for "
            f"{current_platform.device_name}; run `python -m tests.gpu.bench_kernels` there"
        )
    backend = choose_backend(torch.device("cpu"), plan.dtype, plan.kernel)
    report = LayerReport(
        device=processor_name(),
        threads=torch.get_num_threads(),
        dense=f"cpu_fused_moe ({DenseExperts.isa_for(plan.dtype)})",
        kernel=f"{backend.name}, {backend.reason}",
        read_bytes_per_s=_read_ceiling(),
        sgemm_flop_per_s=_sgemm_ceiling(),
    )
    layers = list(_layers(plan))
    for done, (shape, pruned, spread) in enumerate(layers):
        if on_progress:
            on_progress(done, len(layers), f"{shape.name}, {pruned:.0%} pruned, {spread}")
        trio = _Trio(plan, shape, pruned, spread, backend)
        routings: list[Routing] = ["random"]
        if pruned == 0.5 and spread == "spread":
            routings.append("skewed")
        for routing, tokens in itertools.product(routings, plan.tokens):
            report.cells.append(trio.measure(tokens, routing))
        del trio
        if pruned > 0 and spread == "spread":
            mix = _Mix(plan, shape, pruned, backend)
            counts = [tokens for tokens in plan.tokens if tokens >= MIXED_PROFILES]
            report.mixes.extend(map(mix.measure, counts))
            del mix
    if on_progress:
        on_progress(len(layers), len(layers), "")
    return report


def _layers(plan: LayerPlan) -> Iterator[tuple[LayerShape, float, Spread]]:
    for shape, pruned in itertools.product(plan.shapes, plan.pruned):
        yield shape, pruned, "spread"
        if pruned == 0.5:
            yield shape, pruned, "half-empty"


@dataclass(frozen=True, slots=True)
class _Round:
    """One routing, computed by all contestants.

    Attributes:
        dense, ours, uniform: seconds.
        kept: mean kept width over the routed rows ÷ I.
        used_bytes: weights of the experts that were chosen.
        flop: of the kept atoms.
    """

    dense: float
    ours: float
    uniform: float | None
    kept: float
    used_bytes: int
    flop: int


class _Trio:
    """The three contestants of one layer."""

    def __init__(
        self, plan: LayerPlan, shape: LayerShape, pruned: float, spread: Spread, backend: Backend
    ) -> None:
        self.plan, self.shape, self.pruned, self.spread = plan, shape, pruned, spread
        self.generator = torch.Generator().manual_seed(plan.seed)
        keep_EI = draw_mask(shape, pruned, spread, self.generator)
        self.widths_E = keep_EI.sum(dim=1)
        weights = _random_experts(shape, shape.intermediate, plan, self.generator)
        self.packed = _pack(weights, {PROFILE: keep_EI}, shape, plan, backend)
        self.slot_1 = torch.zeros(1, dtype=torch.int32)
        self.backend = backend
        self.dense = DenseExperts(*weights)
        del weights
        same = round(shape.intermediate * (1 - pruned) / UNIFORM_STEP) * UNIFORM_STEP
        self.uniform_width = max(UNIFORM_STEP, same)
        self.uniform = None
        if self.uniform_width != shape.intermediate:
            self.uniform = DenseExperts(
                *_random_experts(shape, self.uniform_width, plan, self.generator)
            )

    def measure(self, tokens: int, routing: Routing) -> LayerCell:
        """Time the three in turn until there are enough rounds."""
        x_TH = torch.randn(tokens, self.shape.hidden, generator=self.generator)
        x_TH = x_TH.to(self.plan.dtype)
        rounds: list[_Round] = []
        began = time.perf_counter()
        self._round(x_TH, routing, 0)
        while len(rounds) < self.plan.rounds and (
            len(rounds) < 3 or time.perf_counter() - began < self.plan.seconds
        ):
            rounds.append(self._round(x_TH, routing, len(rounds)))
        return self._cell(tokens, routing, rounds)

    def _round(self, x_TH: torch.Tensor, routing: Routing, turn: int) -> _Round:
        """One routing for all three, in an order that changes with `turn`."""
        ids_TK = draw_routing(self.shape, len(x_TH), routing, self.generator)
        arguments = (x_TH, torch.full(ids_TK.shape, 1 / self.shape.top_k), ids_TK)
        contestants: list[Callable[..., object]] = [self.dense, self._ours]
        if self.uniform is not None:
            contestants.append(self.uniform)
        seconds = [0.0] * len(contestants)
        for index in range(len(contestants)):
            which = (index + turn) % len(contestants)
            seconds[which] = timed(contestants[which], arguments)
        widths = self.widths_E[ids_TK.long()]
        used = int(self.widths_E[ids_TK.unique().long()].sum())
        return _Round(
            dense=seconds[0],
            ours=seconds[1],
            uniform=seconds[2] if self.uniform is not None else None,
            kept=float(widths.double().mean()) / self.shape.intermediate,
            used_bytes=used * atom_bytes(self.shape.hidden, self.plan.dtype.itemsize),
            flop=6 * self.shape.hidden * int(widths.sum()),
        )

    def _ours(
        self, x_TH: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor
    ) -> torch.Tensor:
        return compute(self.packed, x_TH, weights_TK, with_slots(ids_TK, self.slot_1), self.backend)

    def _cell(self, tokens: int, routing: Routing, rounds: Sequence[_Round]) -> LayerCell:
        ratios = [r.ours / (r.dense * r.kept) for r in rounds if r.kept > 0]
        low, middle, high = quartiles(ratios)
        part = self.uniform_width / self.shape.intermediate
        uniform = [(r.uniform, r.uniform / (r.dense * part)) for r in rounds if r.uniform]
        return LayerCell(
            shape=self.shape.name,
            tokens=tokens,
            pruned=self.pruned,
            routing=routing,
            spread=self.spread,
            kept=mean(r.kept for r in rounds),
            dense_ms=1e3 * median(r.dense for r in rounds),
            ours_ms=1e3 * median(r.ours for r in rounds),
            uniform_ms=1e3 * median(time for time, _ in uniform) if uniform else None,
            ratio=middle,
            ratio_low=low,
            ratio_high=high,
            uniform_ratio=median(ratio for _, ratio in uniform) if uniform else None,
            bytes_per_s=median(r.used_bytes / r.ours for r in rounds),
            flop_per_s=median(r.flop / r.ours for r in rounds),
            rounds=len(rounds),
        )


class _Mix:
    """Four profiles of one layer, and their union."""

    def __init__(self, plan: LayerPlan, shape: LayerShape, pruned: float, backend: Backend) -> None:
        self.plan, self.shape, self.pruned, self.backend = plan, shape, pruned, backend
        self.generator = torch.Generator().manual_seed(plan.seed)
        keep = {
            f"{PROFILE}{index}": draw_mask(shape, pruned, "spread", self.generator)
            for index in range(MIXED_PROFILES)
        }
        union_EI = torch.stack(list(keep.values())).any(dim=0)
        self.union = float(union_EI.double().mean())
        weights = _random_experts(shape, shape.intermediate, plan, self.generator)
        self.packed = _pack(weights, {**keep, "union": union_EI}, shape, plan, backend)

    def measure(self, tokens: int) -> MixCell:
        """Time both in turn until there are enough rounds."""
        x_TH = torch.randn(tokens, self.shape.hidden, generator=self.generator)
        x_TH = x_TH.to(self.plan.dtype)
        slots_T1 = (torch.arange(tokens, dtype=torch.int32) % MIXED_PROFILES)[:, None]
        contestants = [torch.full_like(slots_T1, MIXED_PROFILES), slots_T1]
        rounds: list[list[float]] = []
        began = time.perf_counter()
        while len(rounds) <= self.plan.rounds and (
            len(rounds) <= 3 or time.perf_counter() - began < self.plan.seconds
        ):
            ids_TK = draw_routing(self.shape, tokens, "random", self.generator)
            weights_TK = torch.full(ids_TK.shape, 1 / self.shape.top_k)
            seconds = [0.0, 0.0]
            for index in range(2):
                which = (index + len(rounds)) % 2
                ids = with_slots(ids_TK, contestants[which])
                call = (self.packed, x_TH, weights_TK, ids, self.backend)
                seconds[which] = timed(compute, call)
            rounds.append(seconds)
        union, mixed = zip(*rounds[1:], strict=True)  # the first warms up
        low, middle, high = quartiles([two / one for one, two in rounds[1:]])
        return MixCell(
            shape=self.shape.name,
            tokens=tokens,
            pruned=self.pruned,
            union=self.union,
            union_ms=1e3 * median(union),
            mixed_ms=1e3 * median(mixed),
            ratio=middle,
            ratio_low=low,
            ratio_high=high,
            rounds=len(rounds) - 1,
        )


def compute(
    packed: PackedExperts,
    x_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    ids_TK: torch.Tensor,
    backend: Backend,
) -> torch.Tensor:
    return fused_experts(
        x_TH,
        packed.weights,
        packed.scales,
        packed.biases,
        *packed.index,
        weights_TK,
        ids_TK,
        packed.widest,
        packed.activation.spec,
        packed.row_format.spec,
        backend.name,
    )


def quartiles(values: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    if len(values) < 2:
        return (values[0],) * 3 if values else (None, None, None)
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return low, middle, high


def draw_mask(
    shape: LayerShape, pruned: float, spread: Spread, generator: torch.Generator
) -> torch.Tensor:
    """bool [E, I]: atoms that stay, a fraction 1 − pruned of all.

    spread: the best of normal scores that share a normal part within an expert, as a global budget
    leaves them. half-empty: every other expert is empty; `pruned` is 0.5.
    """
    size = (shape.experts, shape.intermediate)
    if spread == "half-empty":
        return (torch.arange(shape.experts) % 2 == 0)[:, None].expand(size)
    score_EI = torch.randn(size, generator=generator)
    score_EI += 0.4 * torch.randn(shape.experts, 1, generator=generator)
    keep = torch.zeros(score_EI.numel(), dtype=torch.bool)
    keep[score_EI.flatten().topk(round(score_EI.numel() * (1 - pruned))).indices] = True
    return keep.view(size)


def draw_routing(
    shape: LayerShape, tokens: int, routing: Routing, generator: torch.Generator
) -> torch.Tensor:
    """int32 [T, K]: distinct experts per token, uniformly or by Zipf's law (1, 1/2, 1/3, …)."""
    chances_E = torch.ones(shape.experts)
    if routing == "skewed":
        order = torch.randperm(shape.experts, generator=generator)
        chances_E[order] = 1 / torch.arange(1, shape.experts + 1)
    rows = chances_E.expand(tokens, -1)
    return torch.multinomial(rows, shape.top_k, generator=generator).int()


def _random_experts(
    shape: LayerShape, width: int, plan: LayerPlan, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """w13 [E, 2·width, H] and w2 [E, H, width]; a few million random numbers, repeated."""
    w13 = torch.empty(shape.experts, 2 * width, shape.hidden, dtype=plan.dtype)
    w2 = torch.empty(shape.experts, shape.hidden, width, dtype=plan.dtype)
    drawn = torch.randn(1 << 22, generator=generator) * shape.hidden**-0.5
    for tensor in (w13, w2):
        for part in tensor.view(-1).split(len(drawn)):
            part.copy_(drawn[: len(part)])
    return w13, w2


def _pack(
    weights: tuple[torch.Tensor, torch.Tensor],
    keep: Mapping[str, torch.Tensor],
    shape: LayerShape,
    plan: LayerPlan,
    backend: Backend,
) -> PackedExperts:
    layout = build_layout(keep)
    packed = PackedExperts(layout, shape.hidden, plan.dtype, storage=backend.storage)
    for expert, (w13, w2) in enumerate(zip(*weights, strict=True)):
        packed.load_expert(expert, "gate", w13[: shape.intermediate])
        packed.load_expert(expert, "up", w13[shape.intermediate :])
        packed.load_expert(expert, "down", w2)
    return packed


def timed(function: Callable[..., object], arguments: tuple[Any, ...]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


def processor_name() -> str:
    """The processor's name, and its widest instructions that experts use."""
    with open("/proc/cpuinfo") as lines:
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    extensions = {
        "AMX": torch.cpu._is_amx_tile_supported(),
        "AVX-512 bf16": torch.cpu._is_avx512_bf16_supported(),
        "AVX-512": torch.cpu._is_avx512_supported(),
        "AVX2": "avx2" in cpu_flags(),
        platform.machine(): True,
    }
    return (
        f"{names[0] if names else 'CPU'}, {next(name for name, has in extensions.items() if has)}"
    )


def _read_ceiling() -> float:
    numbers = torch.ones(1 << 27)
    return numbers.nbytes / min(timed(numbers.sum, ()) for _ in range(7))


def _sgemm_ceiling() -> float:
    size = 2048
    matrix = torch.randn(size, size)
    return float(2 * size**3 / min(timed(torch.matmul, (matrix, matrix)) for _ in range(7)))
