"""Calibration layer by layer sums up what calibration in memory does."""

from __future__ import annotations

import pytest
import torch

from tests.architectures import QUICK
from tests.unit.tiny_models import ARCHITECTURES, make_model, random_windows
from vllm_atomic_moe.calibration.collect import collect
from vllm_atomic_moe.calibration.experts import find_experts
from vllm_atomic_moe.calibration.kept import InMemory
from vllm_atomic_moe.calibration.layer_reader import LayerReader
from vllm_atomic_moe.calibration.model import load_model
from vllm_atomic_moe.calibration.streamed import collect_streamed
from vllm_atomic_moe.calibration.text import CalibrationText

CPU = torch.device("cpu")
ROOM = 1 << 40


def text_of(*counts, seq_len=24):
    windows = {f"d{n}": random_windows(count, seq_len, seed=n) for n, count in enumerate(counts)}
    return CalibrationText(windows, ())


def in_memory(directory, info, text, batch_size=2, gradients=True, dtype="float32"):
    model = load_model(directory, dtype, {"": "cpu"})
    return collect(model, find_experts(model, info), info, text, batch_size, gradients=gradients)


def streamed(directory, info, text, batch_size=2, gradients=True, dtype="float32", kept=None):
    reader = LayerReader(directory, info, dtype, CPU)
    return collect_streamed(reader, kept or InMemory(ROOM), text, batch_size, gradients=gradients)


def check_equal(found, wanted, tolerance=1e-6):
    """Within `tolerance` of the largest sum of a layer; what is counted is the same."""
    assert found.keys() == wanted.keys()
    for layer, sums in wanted.items():
        named = found[layer].tensors()
        assert named.keys() == sums.tensors().keys()
        for name, tensor in sums.tensors().items():
            if name in ("count", "sets", "set_counts"):
                assert torch.equal(named[name], tensor), (layer, name)
                continue
            limit = tolerance * float(tensor.abs().max())
            torch.testing.assert_close(
                named[name], tensor, rtol=0, atol=limit, msg=f"{layer} {name}"
            )


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.full) for name in ARCHITECTURES],
)
@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "forward"])
def test_sums_are_those_of_memory(architecture, gradients, tmp_path):
    info = make_model(architecture, tmp_path)
    text = text_of(3, 2)
    wanted = in_memory(tmp_path, info, text, gradients=gradients)
    check_equal(streamed(tmp_path, info, text, gradients=gradients), wanted)
