"""The synthetic checkpoint of the benchmarks, and calibration measured on a small one."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from vllm_atomic_moe.calibration.layer_reader import weight_bytes
from vllm_atomic_moe.cli import app
from vllm_atomic_moe.files.checkpoint import checkpoint_files, describe_checkpoint
from vllm_atomic_moe.files.profiles import PruningProfile
from vllm_atomic_moe.measure import synthetic
from vllm_atomic_moe.measure.calibration_benchmark import CalibrationPlan, measure_calibration
from vllm_atomic_moe.measure.synthetic import RATIOS, Sizes, make_checkpoint

SMALL = Sizes(layers=2, experts=8, experts_per_token=2, hidden=128, intermediate=128)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "small"
    make_checkpoint(directory, SMALL)
    return directory


def test_the_default_model_is_nearly_all_experts():
    sizes = Sizes()
    assert (sizes.layers, sizes.experts, sizes.hidden, sizes.intermediate) == (6, 32, 1024, 1024)
    assert sizes.expert_bytes == 6 * 32 * 3 * 1024 * 1024 * 2


def test_checkpoint_is_read(directory):
    info = describe_checkpoint(directory)
    assert info.layers == (0, 1)
    assert (info.num_experts, info.experts_per_token) == (8, 2)
    stored = sum(path.stat().st_size for path in checkpoint_files(directory))
    assert stored > SMALL.expert_bytes


def test_profiles_are_ragged_and_nested(directory):
    info = describe_checkpoint(directory)
    low, high = (
        PruningProfile.read(directory / "atomic_profiles" / f"{name}.safetensors")
        for name in RATIOS
    )
    for profile, ratio in zip((low, high), RATIOS.values(), strict=True):
        assert profile.check(info) == []
        assert profile.kept == pytest.approx(1 - ratio, abs=0.01)
        assert all(len(set(profile.widths(layer).tolist())) > 4 for layer in info.layers)
    assert all((low.keep[layer] >= high.keep[layer]).all() for layer in info.layers)


def test_any_tokens_survive_decoding_and_encoding(directory):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = torch.randint(2, tokenizer.vocab_size, (300,)).tolist()
    assert tokenizer.encode(tokenizer.decode(ids)) == ids


def test_every_way_to_calibrate_is_measured(directory):
    plan = CalibrationPlan(dtype="float32", windows=2, seq_len=16, rounds=1)
    said = []
    report = measure_calibration(directory, plan, lambda *step: said.append(step))
    names = ["two forwards", "calibrate", "calibrate --no-gradients", "calibrate --stream"]
    assert [row.way for row in report.ways] == names
    assert [what for _, _, what in said] == [*names, ""]
    paper, ours, _, streamed = report.ways
    assert paper.ratio == 1
    assert paper.state_bytes > 2 * 8 * 128 * 128 * 4  # G
    assert 0 < ours.state_bytes < paper.state_bytes
    assert streamed.state_bytes == ours.state_bytes
    assert (streamed.weight_bytes, ours.reading_s) == (0, 0)
    assert streamed.reading_s > 0
    assert ours.weight_bytes == weight_bytes(directory, torch.float32)
    assert all(row.seconds.median > 0 for row in report.ways)


def test_windows_longer_than_the_context_are_refused(directory):
    with pytest.raises(ValueError, match="context is 4096 tokens, the benchmark's windows have"):
        measure_calibration(directory, CalibrationPlan(seq_len=5000))


@pytest.mark.full
def test_command_calibrates_a_synthetic_model_and_removes_it(monkeypatch):
    made = []

    def make_small(directory):
        made.append(directory)
        make_checkpoint(directory, SMALL)

    monkeypatch.setattr(synthetic, "make_checkpoint", make_small)
    command = "bench --synthetic --calibration --rounds 1 --dtype float32 --windows 2 --seq-len 32"
    result = CliRunner().invoke(app, [*command.split(), "--json"])
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["ways"]) == 4
    assert not made[0].parent.exists()
    printed = CliRunner().invoke(app, command.split()).stdout.splitlines()
    assert [line.split()[0] for line in printed] == ["way", "two", *["calibrate"] * 3]
