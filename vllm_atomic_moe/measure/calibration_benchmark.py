"""Time and memory of calibration: `atomic-moe calibrate` against HEAPr as the paper computes it.

The paper's method is one forward and backward that adds up G = Σ g gᵀ, an H×H matrix per expert,
and a second forward that adds up h². `tests/unit/test_scoring_heapr.py` shows that its scores are
ours. All ways run over the same random windows, in turn, each in a fresh process; `--stream` keeps
layers' inputs in memory.

Legend: E experts, H hidden size, I full intermediate size, N windows, S tokens per window.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from vllm_atomic_moe.calibration.accumulator import sum_of_squares
from vllm_atomic_moe.calibration.collect import collect
from vllm_atomic_moe.calibration.experts import ExpertRows, Routed, find_experts, observe
from vllm_atomic_moe.calibration.free_memory import free_bytes
from vllm_atomic_moe.calibration.kept import InMemory
from vllm_atomic_moe.calibration.layer_reader import LayerReader
from vllm_atomic_moe.calibration.model import check_model_code, load_model, loading_dtype
from vllm_atomic_moe.calibration.streamed import collect_streamed
from vllm_atomic_moe.calibration.text import CalibrationText
from vllm_atomic_moe.files.checkpoint import CheckpointInfo, describe_checkpoint
from vllm_atomic_moe.files.config import context_length, read_config
from vllm_atomic_moe.files.statistics import LayerSums
from vllm_atomic_moe.measure.server_report import Spread

PAPER = "two forwards"
STREAMED = "calibrate --stream"
WAYS = (PAPER, "calibrate", "calibrate --no-gradients", STREAMED)

Progress = Callable[[int, int, str], None]
"""Called with (runs done, runs in all, the next run)."""


@dataclass(frozen=True, slots=True)
class CalibrationPlan:
    """The settings that all ways share.

    Attributes:
        dtype: of the model, a name of torch's.
        windows: N, of random tokens.
        seq_len: S.
        rounds: how many times each way runs.
        seed: of the tokens.
        trust_remote_code: whether to run Python files of the model's directory.
    """

    dtype: str = "bfloat16"
    windows: int = 8
    seq_len: int = 512
    rounds: int = 3
    seed: int = 0
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True)
class CalibrationRun:
    """One run of one way.

    Attributes:
        seconds: excluding the reading of weights.
        reading_s: seconds of reading weights; 0 if the model is loaded beforehand.
        weight_bytes: of the weights that it holds from start to end.
        state_bytes: of the sums that it holds.
        peak_bytes: peak resident memory, less those weights and what the process took before.
    """

    seconds: float
    reading_s: float
    weight_bytes: int
    state_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class CalibrationSummary:
    """All runs of one way.

    Attributes:
        way: its name.
        seconds: see `CalibrationRun`.
        ratio: median seconds over those of the paper's method.
        reading_s: see `CalibrationRun`; the median.
        weight_bytes, state_bytes, peak_bytes: see `CalibrationRun`; the highest.
    """

    way: str
    seconds: Spread
    ratio: float
    reading_s: float
    weight_bytes: int
    state_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class CalibrationReport:
    """The result of `measure_calibration`.

    Attributes:
        model: directory.
        plan: the settings.
        ways: the paper's method first.
    """

    model: str
    plan: CalibrationPlan
    ways: tuple[CalibrationSummary, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)


def measure_calibration(
    model: Path, plan: CalibrationPlan, progress: Progress = lambda done, total, what: None
) -> CalibrationReport:
    """Calibrate the checkpoint in directory `model` in every way.

    Raises:
        ValueError: the model or the windows are refused, or memory ran out.
    """
    check_model_code(model, plan.trust_remote_code)
    context = context_length(read_config(model)) or plan.seq_len
    if plan.seq_len > context:
        raise ValueError(
            f"the model's context is {context} tokens, the benchmark's windows have {plan.seq_len}"
        )
    runs: dict[str, list[CalibrationRun]] = {way: [] for way in WAYS}
    steps = [way for _ in range(plan.rounds) for way in WAYS]
    for done, way in enumerate(steps):
        progress(done, len(steps), way)
        runs[way].append(_in_fresh_process(model, way, plan))
    progress(len(steps), len(steps), "")
    paper_s = statistics.median(run.seconds for run in runs[PAPER])
    summaries = []
    for way, found in runs.items():
        seconds = Spread.of([run.seconds for run in found])
        summaries.append(
            CalibrationSummary(
                way=way,
                seconds=seconds,
                ratio=seconds.median / paper_s,
                reading_s=statistics.median(run.reading_s for run in found),
                weight_bytes=max(run.weight_bytes for run in found),
                state_bytes=max(run.state_bytes for run in found),
                peak_bytes=max(run.peak_bytes for run in found),
            )
        )
    return CalibrationReport(str(model), plan, tuple(summaries))


def _in_fresh_process(model: Path, way: str, plan: CalibrationPlan) -> CalibrationRun:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(_run, model, way, plan).result()
        except BrokenProcessPool:
            raise ValueError(f"{way}: its process was ended; is there enough memory?") from None


def _run(directory: Path, way: str, plan: CalibrationPlan) -> CalibrationRun:
    """One way in this process."""
    disable_progress_bar()
    info = describe_checkpoint(directory)
    vocabulary = AutoConfig.from_pretrained(
        directory, trust_remote_code=plan.trust_remote_code
    ).vocab_size
    generator = torch.Generator().manual_seed(plan.seed)
    size = (plan.windows, plan.seq_len)
    windows = torch.randint(vocabulary, size, generator=generator, dtype=torch.int32)
    run = _run_streamed if way == STREAMED else _run_in_memory
    return run(directory, info, windows, way, plan)


def _run_in_memory(
    directory: Path, info: CheckpointInfo, windows: torch.Tensor, way: str, plan: CalibrationPlan
) -> CalibrationRun:
    before = _resident_bytes("VmRSS")
    model = load_model(directory, plan.dtype, {"": "cpu"}, plan.trust_remote_code)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    ours = partial(collect, model, find_experts(model, info), info, batch_size=1)
    ours(text=CalibrationText({"a": windows[:1]}, ()))  # warm up
    _start_peak()
    start = time.perf_counter()
    held: list[torch.Tensor]
    if way == PAPER:
        layers = two_forwards(model, info, windows)
        held = [sums for layer in layers.values() for sums in (layer.G, layer.h2, layer.count)]
    else:
        text = CalibrationText({"a": windows}, ())
        held = _tensors(ours(text=text, gradients="--no-gradients" not in way))
    return CalibrationRun(
        seconds=time.perf_counter() - start,
        reading_s=0.0,
        weight_bytes=weights,
        state_bytes=sum(tensor.nbytes for tensor in held),
        peak_bytes=_resident_bytes("VmHWM") - before - weights,
    )


class TimedReader(LayerReader):
    """A reader that measures its time of reading."""

    reading_s = 0.0

    def _load(self, weights: Mapping[str, Any]) -> PreTrainedModel:
        start = time.perf_counter()
        model = super()._load(weights)
        self.reading_s += time.perf_counter() - start
        return model


def _run_streamed(
    directory: Path, info: CheckpointInfo, windows: torch.Tensor, way: str, plan: CalibrationPlan
) -> CalibrationRun:
    dtype = loading_dtype(plan.dtype, directory, {"": "cpu"}, plan.trust_remote_code)
    cpu = torch.device("cpu")
    before = _resident_bytes("VmRSS")
    reader = TimedReader(directory, info, dtype, cpu, plan.trust_remote_code)
    ours = partial(collect_streamed, reader, batch_size=1)
    ours(InMemory(free_bytes(cpu)), CalibrationText({"a": windows[:1]}, ()))  # warm up
    _start_peak()
    reader.reading_s = 0.0
    start = time.perf_counter()
    held = _tensors(ours(InMemory(free_bytes(cpu)), CalibrationText({"a": windows}, ())))
    return CalibrationRun(
        seconds=time.perf_counter() - start - reader.reading_s,
        reading_s=reader.reading_s,
        weight_bytes=0,
        state_bytes=sum(tensor.nbytes for tensor in held),
        peak_bytes=_resident_bytes("VmHWM") - before,
    )


def _tensors(layers: Mapping[int, LayerSums]) -> list[torch.Tensor]:
    return [tensor for sums in layers.values() for tensor in sums.tensors().values()]


def _start_peak() -> None:
    """Reset VmHWM to the current resident memory."""
    Path("/proc/self/clear_refs").write_text("5")


def _resident_bytes(key: str) -> int:
    """VmRSS, the current resident memory, or VmHWM, its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no {key} in /proc/self/status; this benchmark needs Linux")


class PaperLayer:
    """The paper's sums over one layer: a matrix [H, H] and a row [I] per expert."""

    def __init__(self, info: CheckpointInfo) -> None:
        experts, hidden = info.num_experts, info.hidden_size
        self.G = torch.zeros(experts, hidden, hidden)
        self.h2 = torch.zeros(experts, info.intermediate_size, dtype=torch.float64)
        self.count = torch.zeros(experts, dtype=torch.float64)
        self.down: dict[int, torch.Tensor] = {}
        self.with_gradients = True

    def see_routing(self, module: nn.Module, routed: Routed) -> torch.Tensor:
        return routed.topk_ids_TK

    def see_expert(self, expert: int, rows: ExpertRows) -> torch.Tensor:
        if self.with_gradients:
            rows.y.register_hook(partial(self.see_gradient, expert))
            return rows.y
        self.count[expert] += rows.h.shape[0]
        self.h2[expert] += sum_of_squares(rows.h)
        self.down[expert] = rows.down_HI
        return rows.y

    def see_gradient(self, expert: int, g: torch.Tensor) -> None:
        # Tiny gradients would vanish in a bf16 product.
        g = g.float()
        self.G[expert].addmm_(g.T, g)

    def scores(self) -> torch.Tensor:
        """½ · mean(h_k²) · w_kᵀ Ḡ w_k: [E, I], zero for experts without tokens."""
        rows = torch.zeros_like(self.h2)
        for expert, down in self.down.items():
            w = down.float()
            quadratic = (w * (self.G[expert] @ w)).sum(dim=0).double()
            rows[expert] = 0.5 * self.h2[expert] * quadratic / self.count[expert] ** 2
        return rows


def two_forwards(
    model: PreTrainedModel, info: CheckpointInfo, windows: torch.Tensor
) -> dict[int, PaperLayer]:
    """The paper's method over windows [N, S], one at a time. Sees the experts as ours does."""
    model.eval().requires_grad_(False)
    experts = find_experts(model, info)
    layers = {layer: PaperLayer(info) for layer in experts}
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda *call: call[-1].requires_grad_())
    with observe(model, experts, layers):
        for ids in windows.long():
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            precise = logits if logits.dtype == torch.float64 else logits.float()
            torch.nn.functional.cross_entropy(precise, ids[1:], reduction="sum").backward()
        handle.remove()
        for layer in layers.values():
            layer.with_gradients = False
        with torch.no_grad():
            for ids in windows.long():
                model.base_model(input_ids=ids[None], use_cache=False)
    for layer in layers.values():
        layer.scores()
    return layers
