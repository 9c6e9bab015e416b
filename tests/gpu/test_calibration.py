"""Calibration on a CUDA device gives the same sums as on the CPU. Needs transformers."""

from __future__ import annotations

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("stream", [False, True], ids=["memory", "stream"])
@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_cuda_equals_cpu(device, stream, tmp_path):
    pytest.importorskip("transformers")
    from tests.unit.tiny_models import make_model, random_text
    from vllm_atomic_moe.calibration.collect import CalibrationOptions, calibrate

    make_model("qwen3_moe", tmp_path / "model")
    (tmp_path / "text.txt").write_text(random_text(2000))
    found, wanted = (
        calibrate(
            str(tmp_path / "model"),
            [str(tmp_path / "text.txt")],
            CalibrationOptions(samples=8, seq_len=32, batch_size=2, device=where, stream=streamed),
        )[0]
        for where, streamed in ((device, stream), ("cpu", False))
    )
    assert found.calibration == wanted.calibration
    for layer, sums in wanted.sums.items():
        for name, tensor in sums.tensors().items():
            scale = float(tensor.abs().max())
            torch.testing.assert_close(
                getattr(found.sums[layer], name),
                tensor,
                rtol=1e-3,
                atol=1e-5 * scale,
                msg=name,
            )
