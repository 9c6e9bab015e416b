"""HEAPr: two numbers per atom against the paper's H×H matrices, in float32 and float64."""

import itertools

import pytest
import torch

from tests.unit.long_way import load, run_the_long_way
from tests.unit.test_scoring_methods import SEQ_LEN, heapr
from tests.unit.tiny_models import make_model, random_windows
from vllm_atomic_moe.calibration.collect import collect
from vllm_atomic_moe.calibration.experts import find_experts
from vllm_atomic_moe.calibration.text import CalibrationText
from vllm_atomic_moe.measure.calibration_benchmark import two_forwards
from vllm_atomic_moe.scoring.methods.heapr import score_heapr

# What `make test` takes: of every kind one, in one dtype.
QUICK = {
    *(("qwen3_moe", torch.float32), ("hy_v4", torch.float32), ("gpt_oss", torch.float64)),
    *(("minimax_m3_vl", torch.float64), ("gemma4", torch.float32), ("nemotron_h", torch.float32)),
    ("llama4", torch.float32),
}
# Two models of each kind of expert where the matrix has two. GELU: gemma4 alone; ReLU² without a
# gate: nemotron_h alone; router weights on the input: llama4 alone; biases: gpt_oss alone.
KINDS = (
    *("qwen3_moe", "olmoe", "qwen2_moe", "deepseek_v3"),  # SiLU
    *("deepseek_v4", "hy_v4"),  # SiLU with a limit
    *("gpt_oss", "minimax_m3_vl"),  # clamped SwiGLU
    *("gemma4", "nemotron_h", "llama4"),
)


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        pytest.param(*case, marks=[] if case in QUICK else pytest.mark.full)
        for case in itertools.product(KINDS, (torch.float32, torch.float64))
    ],
    ids=str,
)
def test_heapr_follows_the_papers_formula(architecture, dtype, tmp_path):
    info = make_model(architecture, tmp_path)
    windows = random_windows(4, SEQ_LEN)

    model = load(tmp_path, dtype)
    text = CalibrationText({"a": windows[:1], "b": windows[1:]}, ())
    sums = collect(model, find_experts(model, info), info, text, batch_size=2)
    long_way = run_the_long_way(tmp_path, info, [windows], dtype)

    assert set(sums) == set(long_way) == set(info.layers)
    for layer, of_layer in sums.items():
        seen = of_layer.count.sum(dim=0) > 0
        score = score_heapr(of_layer, layer, weight_by_frequency=False).atoms
        wanted = heapr(long_way[layer])
        assert seen.sum() >= 4
        _check(score.double()[seen], wanted[seen], 1e-4 if dtype == torch.float32 else 1e-6)


def _check(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    """Relative error, except for atoms with negligible scores."""
    torch.testing.assert_close(
        found, wanted, rtol=tolerance, atol=float(wanted.max()) * tolerance / 100
    )


def test_the_timed_reference_is_the_papers_method(tmp_path):
    info = make_model("qwen3_moe", tmp_path)
    windows = random_windows(2, SEQ_LEN)
    model = load(tmp_path, torch.float32)
    layers = two_forwards(model, info, windows)
    long_way = run_the_long_way(tmp_path, info, [windows], torch.float64)
    for layer, paper in layers.items():
        _check(paper.scores(), heapr(long_way[layer]), 1e-4)
