"""The op, the choice of its backend, and the reference, which is the other backends' oracle."""

from __future__ import annotations

import pytest
import torch

from tests.kernel_suite import KernelSuite, make_experts, ragged, routed
from vllm_atomic_moe.engine.options import LoaderOptions
from vllm_atomic_moe.experts import backends
from vllm_atomic_moe.experts.activation import SILU
from vllm_atomic_moe.experts.backends import choose_backend
from vllm_atomic_moe.experts.packing import with_slots
from vllm_atomic_moe.files.row_formats import PLAIN

CPU = torch.device("cpu")


class TestReference(KernelSuite):
    """The slow loop."""

    backend = "reference"
    dtypes = (torch.float32, torch.bfloat16, torch.float16)


def test_op_is_opaque_and_has_a_faithful_fake():
    experts = make_experts({"a": ragged()}, torch.float32, "reference")
    packed = experts.packed
    x, weights, ids = routed(3, 2, 9, torch.float32)
    rows = [weight.detach() for weight in packed.weights]
    arguments = (
        x,
        rows,
        packed.scales,
        packed.biases,
        *packed.index,
        weights,
        with_slots(ids, torch.zeros(1).int()),
        packed.widest,
        SILU.spec,
        PLAIN.spec,
        "reference",
    )
    torch.library.opcheck(torch.ops.atomic_moe.fused_experts.default, arguments)


def test_the_reference_runs_everywhere(monkeypatch):
    backend = choose_backend(torch.device("meta"), torch.float32)
    assert backend.name == "reference"
    monkeypatch.setitem(backends.BACKENDS, "cpu", ("broken", "reference"))
    reason = staticmethod(lambda device, dtype: "no compiler")
    broken = type("Broken", (), {"unavailable": reason})
    real = backends.backend_module
    monkeypatch.setattr(
        backends, "backend_module", lambda name: broken if name == "broken" else real(name)
    )
    backend = choose_backend(CPU, torch.float32)
    assert (backend.name, backend.fallback) == ("reference", True)
    assert backend.reason == "not broken: no compiler (decoding takes 10 to 30 times as long)"
    with pytest.raises(ValueError, match=r"kernel 'broken' cannot be used: no compiler; leave"):
        choose_backend(CPU, torch.float32, "broken")


def test_a_named_kernel_is_used_or_refused():
    assert choose_backend(CPU, torch.bfloat16, "reference").reason == "as the options ask"
    with pytest.raises(ValueError, match=r"kernel 'triton' does not run on cpu; wanted one of"):
        choose_backend(CPU, torch.bfloat16, "triton")


def test_the_option_names_a_kernel():
    assert LoaderOptions.parse({"kernel": "reference"}).kernel == "reference"
    with pytest.raises(ValueError, match=r"`kernel` is 'fast', wanted one of .*reference"):
        LoaderOptions.parse({"kernel": "fast"})
