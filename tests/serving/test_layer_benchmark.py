"""The layer benchmark: its random draws, its three contestants, the command."""

from __future__ import annotations

import json
from statistics import median

import pytest
import torch
from typer.testing import CliRunner

from tests.kernel_suite import TOLERANCE
from tests.serving.conftest import DEMO
from vllm_atomic_moe.cli import app
from vllm_atomic_moe.engine.compat import DenseExperts
from vllm_atomic_moe.measure import layer_benchmark
from vllm_atomic_moe.measure.layer_benchmark import LayerPlan, draw_mask, draw_routing
from vllm_atomic_moe.measure.shapes import SHAPES, LayerShape
from vllm_atomic_moe.measure.variant_benchmark import ACTIVATIONS

SMALL = LayerShape("small", 8, 64, 128, 2)


@pytest.fixture(autouse=True)
def _log_level(monkeypatch):
    """The command reduces vLLM's log, which later tests need."""
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "WARNING")


def generator():
    return torch.Generator().manual_seed(0)


def test_masks_hold_the_fraction_and_spread():
    keep = draw_mask(SMALL, 0.25, "spread", generator())
    assert int(keep.sum()) == 8 * 128 * 3 // 4
    assert len(set(keep.sum(dim=1).tolist())) > 3
    halves = draw_mask(SMALL, 0.5, "half-empty", generator()).sum(dim=1).tolist()
    assert halves == [128, 0] * 4


def test_routings_choose_different_experts_and_zipf_prefers_some():
    for routing in ("random", "skewed"):
        ids = draw_routing(SMALL, 200, routing, generator())
        assert all(len(set(row)) == 2 for row in ids.tolist())
    random, skewed = (
        draw_routing(SMALL, 2000, routing, generator()).flatten().bincount().max()
        for routing in ("random", "skewed")
    )
    assert skewed > 1.5 * random


def test_the_contestants_compute_the_same_layer():
    """Without pruning, our op and vLLM's agree, so the comparison is fair."""
    plan = LayerPlan(shapes=[SMALL], pruned=[0.0])
    backend = layer_benchmark.choose_backend(torch.device("cpu"), plan.dtype)
    trio = layer_benchmark._Trio(plan, SMALL, 0.0, "spread", backend)
    x = torch.randn(9, 64, generator=generator()).bfloat16()
    ids, weights = draw_routing(SMALL, 9, "random", generator()), torch.full((9, 2), 0.5)
    found, wanted = trio._ours(x, weights, ids).double(), trio.dense(x, weights, ids).double()
    assert (found - wanted).norm() < 2 * TOLERANCE[torch.bfloat16] * wanted.norm()
    assert isinstance(trio.dense, DenseExperts)


def trio(pruned, backend="cpu"):
    plan = LayerPlan(shapes=[SMALL], pruned=[pruned], rounds=6, seconds=60)
    backend = layer_benchmark.choose_backend(torch.device("cpu"), plan.dtype)
    return layer_benchmark._Trio(plan, SMALL, pruned, "spread", backend)


def test_a_mix_computes_every_token_under_its_own_profile(monkeypatch):
    plan = LayerPlan(shapes=[SMALL], rounds=3, seconds=60)
    backend = layer_benchmark.choose_backend(torch.device("cpu"), plan.dtype)
    mix, calls = layer_benchmark._Mix(plan, SMALL, 0.5, backend), []
    assert mix.union > 0.7
    timed = layer_benchmark.timed
    monkeypatch.setattr(
        layer_benchmark,
        "timed",
        lambda function, arguments: calls.append(arguments[3]) or timed(function, arguments),
    )
    assert mix.measure(8).rounds == 3
    slots = [sorted((ids & 15)[:, 0].tolist()) for ids in calls]
    assert slots[:4] == [[4] * 8, [0, 0, 1, 1, 2, 2, 3, 3], [0, 0, 1, 1, 2, 2, 3, 3], [4] * 8]
    assert torch.equal(calls[0] >> 4, calls[1] >> 4)


def test_the_ratio_is_within_a_round_and_over_the_kept_fraction():
    def one(dense, ours, uniform, kept):
        return layer_benchmark._Round(dense, ours, uniform, kept, used_bytes=100, flop=200)

    half = trio(0.5)
    assert half.uniform_width == 64
    rounds = [one(2, 1, 1, 0.5), one(4, 1, 3, 0.5), one(2, 3, 1, 0.5), one(9, 9, 9, 0.0)]
    cell = half._cell(1, "random", rounds)
    assert cell.ratio == 1.0
    assert (cell.ratio_low, cell.ratio_high) == (0.75, 2.0)
    assert cell.uniform_ratio == median([1.0, 1.5, 1.0, 2.0])
    assert (cell.dense_ms, cell.ours_ms, cell.uniform_ms) == (3000, 2000, 2000)
    assert cell.bytes_per_s == pytest.approx(median([100, 100, 100 / 3, 100 / 9]))
    assert cell.flop_per_s == pytest.approx(2 * cell.bytes_per_s)
    assert half._cell(1, "random", [one(1, 1, 1, 0.0)] * 3).ratio is None
    assert trio(0.0).uniform is None


def test_rounds_take_turns_and_count_what_they_route(monkeypatch):
    half, calls = trio(0.5), []
    monkeypatch.setattr(
        layer_benchmark,
        "timed",
        lambda function, arguments: calls.append((function, arguments)) or 1,
    )
    cell = half.measure(3, "random")
    assert cell.rounds == 6
    order = [function for function, _ in calls]
    players = [half.dense, half._ours, half.uniform]
    assert order[:9] == players + players + [*players[1:], players[0]]
    ids = [arguments[2] for _, arguments in calls[3::3]]
    assert len({str(one) for one in ids}) > 1
    widths = [half.widths_E[one.long()] for one in ids]
    assert cell.kept == pytest.approx(float(torch.stack(widths).double().mean()) / 128)
    used = [
        sum(int(half.widths_E[expert]) for expert in set(one.flatten().tolist())) for one in ids
    ]
    assert cell.bytes_per_s == median(used) * 3 * 64 * 2
    assert cell.flop_per_s == median([6 * 64 * int(one.sum()) for one in widths])


def test_layers_are_refused_without_vllm_for_cpus(monkeypatch):
    monkeypatch.setattr(layer_benchmark.current_platform, "is_cpu", lambda: False)
    with pytest.raises(
        ValueError, match=r"measured against vLLM's CPU op.*tests.gpu.bench_kernels"
    ):
        layer_benchmark.measure_layers(LayerPlan())


def test_command(monkeypatch, tmp_path):
    monkeypatch.setitem(SHAPES, "small", SMALL)
    monkeypatch.setattr(layer_benchmark, "_read_ceiling", lambda *_: 1e9)
    monkeypatch.setattr(layer_benchmark, "_sgemm_ceiling", lambda *_: 1e9)
    options = "bench --shape small --tokens 1 --tokens 9 --pruned 0.25 --pruned 0.5 --rounds 3"
    plot = tmp_path / "layers.png"
    result = CliRunner().invoke(app, [*options.split(), "--json", "--plot", str(plot)])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    kinds = [
        (c["pruned"], c["spread"], c["routing"], c["tokens"], c["rounds"]) for c in report["cells"]
    ]
    assert kinds == [
        (0.25, "spread", "random", 1, 3),
        (0.25, "spread", "random", 9, 3),
        (0.5, "spread", "random", 1, 3),
        (0.5, "spread", "random", 9, 3),
        (0.5, "spread", "skewed", 1, 3),
        (0.5, "spread", "skewed", 9, 3),
        (0.5, "half-empty", "random", 1, 3),
        (0.5, "half-empty", "random", 9, 3),
    ]
    assert all(cell["dense_ms"] > 0 and cell["ours_ms"] > 0 for cell in report["cells"])
    mixes = [(mix["pruned"], mix["tokens"], mix["rounds"]) for mix in report["mixes"]]
    assert mixes == [(0.25, 9, 3), (0.5, 9, 3)]
    assert all(mix["ratio"] > 0 and mix["union"] > 1 - mix["pruned"] for mix in report["mixes"])
    formats, activations = ("fp8", "int4", "mxfp4"), (*ACTIVATIONS,)
    found = [(it["variant"], it["tokens"], it["rounds"]) for it in report["variants"]]
    assert found[:14] == [(name, t, 3) for t in (1, 9) for name in (*formats, *activations)]
    assert len(found) == 28
    for cell in report["variants"]:
        assert cell["ratio"] > 0
        assert cell["plain_ms"] > 0
        assert (0.25 < cell["size"] < 0.6) == (cell["variant"] in formats)
    assert plot.stat().st_size > 1000
    table = CliRunner().invoke(app, options.split())
    assert "small" in table.stdout
    assert (
        "other rows and activations, against plain rows and SiLU of the same atoms:" in table.stdout
    )
    assert "ceilings: reading 1.0 GB/s, sgemm 1 GFLOP/s" in table.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shape", "gpt"], "shape 'gpt' is unknown; wanted one of qwen3-30b-a3b, "),
        (["--dtype", "int8"], "dtype 'int8' is unknown; wanted one of bfloat16, "),
        (["--kernel", "quick"], "kernel 'quick' does not run on cpu; wanted one of "),
        (["--profile", "heapr-20"], "--profile does not apply to layers"),
        (["model", "--tokens", "8", "--dtype", "float32"], "--tokens, --dtype does not apply to s"),
        (["model", "--calibration", "--plot", "p.png"], "--plot does not apply to calibration"),
        (["model", "--synthetic"], "--synthetic replaces MODEL"),
        (["--calibration"], "--calibration needs a MODEL, or --synthetic"),
        ([str(DEMO), "--serve", "--port=1"], "--port is set by the benchmark itself"),
        (["/no/such/model"], "/no/such/model"),
        (["--plot", "p.txt"], "plot p.txt: wanted a name that ends in"),
    ],
)
def test_bad_options_are_one_line(options, words):
    result = CliRunner().invoke(app, ["bench", *options])
    assert result.exit_code == 1
    assert words in result.stderr
