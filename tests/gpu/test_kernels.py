"""The reference on a CUDA device. Needs torch only."""

from __future__ import annotations

import pytest
import torch

from tests.kernel_suite import KernelSuite

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


class TestReference(KernelSuite):
    """The slow loop, on the GPU."""

    backend = "reference"
    device = "cuda"
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
