"""Statistics: small state, files that come back equal, broken files that are refused."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vllm_atomic_moe.calibration.findings import inspect_sums
from vllm_atomic_moe.calibration.statistics import Statistics, StatisticsAccumulator

MODEL = {
    "architecture": "Qwen3MoeForCausalLM",
    "num_experts": 4,
    "intermediate_size": 6,
    "hidden_size": 8,
    "layers": [1, 3],
    "router_sha256": "0" * 64,
}
CALIBRATION = {"domains": ["a", "b"], "tokens": 10, "seed": 0}


def make_sums(count: float = 50.0) -> dict[int, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def positive(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1

    return {
        layer: {
            "count": torch.full((2, 4), count, dtype=torch.float64),
            "h2": positive(2, 4, 6),
            "g2": positive(2, 4, 6),
        }
        for layer in (3, 1)
    }


@pytest.fixture
def path(tmp_path):
    Statistics(MODEL, CALIBRATION, make_sums()).write(tmp_path / "stats.safetensors")
    return tmp_path / "stats.safetensors"


def rewrite(path, tensors=None, **metadata):
    """Change tensors or metadata of a file; None removes an entry."""
    with safe_open(path, framework="pt") as file:
        strings = dict(file.metadata())
    named = {**load_file(path), **(tensors or {})}
    strings.update(metadata)
    save_file(
        {name: tensor for name, tensor in named.items() if tensor is not None},
        path,
        metadata={key: value for key, value in strings.items() if value is not None},
    )


def test_a_file_comes_back_equal(path):
    read = Statistics.read(path)
    assert list(read.sums) == [1, 3]
    assert read.model == MODEL
    assert read.calibration == CALIBRATION
    for layer, tensors in make_sums().items():
        for name, tensor in tensors.items():
            assert torch.equal(read.sums[layer][name], tensor)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "atomic-moe-statistics"
    assert metadata["format_version"] == "1"
    assert metadata["created_by"].startswith("vllm-atomic-moe ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "atomic-moe-profile"}, "`format` is 'atomic-moe-profile'"),
        ({"format": None}, "`format` is missing, wanted 'atomic-moe-statistics'"),
        ({"format_version": "2"}, "`format_version` is '2', wanted '1'"),
        ({"model": None}, "`model` is missing, wanted a JSON object"),
        ({"model": "[]"}, r"`model` is '\[\]', wanted a JSON object"),
        ({"calibration": "{"}, "`calibration` is '{', wanted a JSON object"),
        ({"calibration": "{}"}, "no list `domains`"),
        ({"model": json.dumps({**MODEL, "layers": [1]})}, r"holds layers \[1, 3\]"),
        ({"model": json.dumps({**MODEL, "layers": "all"})}, "wanted a list and two numbers"),
        ({"model": json.dumps({**MODEL, "num_experts": 5})}, r"\[2, 4\], wanted float64 \[2, 5\]"),
    ],
)
def test_wrong_metadata_is_refused(change, message, path):
    rewrite(path, **change)
    with pytest.raises(ValueError, match=message) as refusal:
        Statistics.read(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"layers.1.h2": None}, "layers.1.h2 is missing"),
        ({"layers.1.hessian": torch.zeros(1)}, "unexpected tensor 'layers.1.hessian'"),
        ({"layers.1.g2": torch.ones(2, 4, 6)}, "layers.1.g2 is float32"),
        ({"layers.1.g2": torch.ones(2, 4, 7).double()}, r"layers.1.g2 is float64 \[2, 4, 7\]"),
        ({"layers.1.count": -torch.ones(2, 4).double()}, "negative or not finite"),
        ({"layers.3.h2": torch.full((2, 4, 6), torch.nan).double()}, "negative or not finite"),
    ],
)
def test_wrong_tensors_are_refused(tensors, message, path):
    rewrite(path, tensors)
    with pytest.raises(ValueError, match=message):
        Statistics.read(path)


def test_broken_files_are_refused(path, tmp_path):
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a complete safetensors file"):
            Statistics.read(path)
    with pytest.raises(ValueError, match="no such file"):
        Statistics.read(tmp_path / "missing.safetensors")


def test_state_is_two_numbers_per_atom_and_one_per_expert():
    accumulator = StatisticsAccumulator((0, 1, 2), 2, 8, 16)
    held = sum(tensor.numel() for named in accumulator.sums().values() for tensor in named.values())
    assert held == 3 * 2 * (2 * 8 * 16 + 8)


def test_the_accumulator_adds_in_float64_and_leaves_its_input_alone():
    accumulator = StatisticsAccumulator((5,), 2, 3, 2)
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16)
    accumulator.domain = 1
    accumulator.add_activation(5, 2, rows)
    accumulator.add_activation(5, 2, rows)
    accumulator.add_gradient(5, 2, rows)
    sums = accumulator.sums()[5]
    assert sums["count"].tolist() == [[0, 0, 0], [0, 0, 4]]
    assert sums["h2"][1, 2].tolist() == [20, 40]
    assert sums["g2"][1, 2].tolist() == [10, 20]
    assert sums["h2"].sum() == 60
    assert rows.tolist() == [[1, 2], [3, 4]]
    assert all(tensor.dtype == torch.float64 for tensor in sums.values())


def test_sound_sums_raise_no_warning():
    assert inspect_sums(make_sums()) == []


@pytest.mark.parametrize("name", ["h2", "g2"])
def test_dead_atoms_look_like_a_mask(name):
    sums = make_sums()
    sums[1][name][:, 0, :2] = 0
    (warning,) = inspect_sums(sums)
    assert "2 of 48 atoms (4.2%)" in warning
    assert "already masked or pruned" in warning


def test_experts_with_few_tokens_are_counted_and_do_not_look_masked():
    sums = make_sums()
    sums[3]["count"][:, 2] = torch.tensor([3, 4])
    sums[1]["count"][:, 1] = 0
    sums[3]["g2"][:, 2] = 0
    (warning,) = inspect_sums(sums)
    assert "2 of 8 experts saw fewer than 32 tokens" in warning
    assert "layer 1 expert 1: 0, layer 3 expert 2: 7" in warning
