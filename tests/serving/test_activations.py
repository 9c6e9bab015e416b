"""What an expert computes: our formulas are vLLM's, and what vLLM asks a layer for is served."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.checkpoints import make_checkpoint, write_profile, zero_pruned
from tests.serving.conftest import PROMPTS, engine, logprobs_of, mixed_logprobs
from tests.unit.tiny_models import make_model
from vllm_atomic_moe.experts.activation import Activation

NAMES = ["ragged", "second"]


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


def test_what_vllm_calls_an_activation():
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


@pytest.mark.parametrize(
    "layer_options",
    [{"activation": "gelu_tanh"}, {"apply_router_weight_on_input": True}],
    ids=lambda it: next(iter(it)),
)
def test_pruned_equals_zeroed_dense(tmp_path, monkeypatch, layer_options):
    """Asked for where the model builds its experts; the dense model is vLLM's own."""
    from vllm.model_executor.models import qwen3_moe

    original = qwen3_moe.FusedMoEFactory
    monkeypatch.setattr(
        qwen3_moe, "FusedMoEFactory", lambda **given: original(**{**given, **layer_options})
    )
    model = tmp_path / "model"
    info = make_checkpoint("qwen3_moe", model, num_experts_per_tok=1, norm_topk_prob=False)
    wanted = {}
    for seed, name in enumerate(NAMES, start=1):
        profile = write_profile(info, name, model / "atomic_profiles", seed)
        zero_pruned(model, tmp_path / name, profile)
        wanted[name] = logprobs_of(tmp_path / name)
    with monkeypatch.context() as plain:
        plain.setattr(qwen3_moe, "FusedMoEFactory", original)
        usual = logprobs_of(tmp_path / NAMES[0])
    assert (usual - wanted[NAMES[0]]).abs().max() > 0.01, "the option changes nothing"
    extra = {"active": NAMES[0], "resident": NAMES[1:]}
    with engine(model, load_format="atomic-pruned", model_loader_extra_config=extra) as llm:
        found = mixed_logprobs(llm, NAMES)
    for name in NAMES:
        assert (found[name] - wanted[name]).abs().max() < 1e-4, name


def test_gpt_oss(tmp_path):
    """Biases, clamped SwiGLU, gate and up interleaved and transposed; against transformers."""
    model = tmp_path / "model"
    info = make_model("gpt_oss", model)
    wanted = {}
    for seed, name in enumerate(NAMES, start=1):
        profile = write_profile(info, name, model / "atomic_profiles", seed)
        dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        with torch.inference_mode():
            for layer, keep_EI in profile.keep.items():
                dense.model.layers[layer].mlp.experts.down_proj[~keep_EI] = 0
            tokens = torch.tensor(PROMPTS)
            logprobs = dense(input_ids=tokens).logits[:, :-1].log_softmax(dim=-1)
        wanted[name] = logprobs.gather(-1, tokens[:, 1:, None]).flatten()
    assert (wanted[NAMES[0]] - wanted[NAMES[1]]).abs().max() > 0.01
    extra = {"active": NAMES[0], "resident": NAMES[1:]}
    with engine(model, load_format="atomic-pruned", model_loader_extra_config=extra) as llm:
        found = mixed_logprobs(llm, NAMES)
    for name in NAMES:
        assert (found[name] - wanted[name]).abs().max() < 1e-4, name
