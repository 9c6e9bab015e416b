"""Our formulas of activations equal vLLM's, and the names match."""

from __future__ import annotations

import math

import pytest
import torch

from vllm_atomic_moe.experts.activation import Activation


@pytest.mark.parametrize(
    ("activation", "theirs", "arguments"),
    [
        (Activation(), "SiluAndMul", ()),
        (Activation(limit=1.5), "SiluAndMulWithClamp", (1.5,)),
        (Activation(limit=7.0, alpha=1.702, beta=1.0), "SiluAndMulWithClamp", (7.0, 1.702, 1.0)),
        (Activation("gelu_tanh"), "GeluAndMul", ("tanh",)),
        (Activation("swiglustep", limit=0.75), "SwigluStepAndMul", (0.75,)),
        (Activation("situ", alpha=2.0), "SituAndMul", (2.0,)),
        (Activation("situ", alpha=0.5, beta=3.0), "SituAndMul", (0.5, 3.0)),
        (Activation("relu2"), "ReLUSquaredActivation", ()),
    ],
    ids=lambda it: it.spec if isinstance(it, Activation) else "",
)
def test_formulas_are_those_of_vllm(activation, theirs, arguments):
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers import activation as layers

    gate, up = 4 * torch.randn(2, 50, 20, generator=torch.Generator().manual_seed(0))
    with set_current_vllm_config(VllmConfig()):
        op = getattr(layers, theirs)(*arguments)
    wanted = op.forward_native(torch.cat([gate, up], dim=-1) if activation.gated else up)
    found = activation(gate, up) if activation.gated else activation(None, up)
    torch.testing.assert_close(found, wanted)
    assert Activation.parse(activation.spec) == activation


def test_vllms_names_of_activations():
    from types import SimpleNamespace

    from vllm_atomic_moe.engine.compat import MoEActivation, activation_of

    def of(kind, **numbers):
        names = ("limit", "alpha", "beta")
        swiglu = {f"swiglu_{name}": numbers.get(name) for name in names}
        situ = {"activation_situ_beta": numbers.get("situ")}
        situ["activation_situ_linear_beta"] = numbers.get("linear")
        return activation_of(SimpleNamespace(activation=kind, **swiglu, **situ))

    kinds = MoEActivation
    gpt_oss = Activation(limit=7.0, alpha=1.702, beta=1.0)
    assert of(kinds.SILU) == Activation()
    assert of(kinds.SILU, limit=10.0) == Activation(limit=10.0)
    assert of(kinds.SWIGLUOAI) == gpt_oss
    assert of(kinds.SWIGLUOAI_UNINTERLEAVE, limit=7.0, alpha=1.702, beta=1.0) == gpt_oss
    assert of(kinds.SWIGLUOAI_UNINTERLEAVE) is None
    assert of(kinds.SITU, situ=2.0, linear=3.0) == Activation("situ", math.inf, 2.0, 3.0)
    assert of(kinds.SITU) is None
    known = {kind for kind in kinds if of(kind, limit=1.0, situ=1.0) is not None}
    assert known == {
        *(kinds.SILU, kinds.SWIGLUOAI, kinds.SWIGLUOAI_UNINTERLEAVE, kinds.GELU_TANH),
        *(kinds.SWIGLUSTEP, kinds.SITU, kinds.RELU2_NO_MUL),
    }
