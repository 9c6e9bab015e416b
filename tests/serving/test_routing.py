"""Profiles that exclude experts from routing: what is served equals transformers with that mask."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.checkpoints import make_checkpoint, write_routing_profiles
from tests.serving.conftest import PROMPTS, engine, prompt_logprobs
from vllm_atomic_moe.profiles import PruningProfile

TOLERANCE = 1e-4
ARCHITECTURES = ("qwen3_moe", "olmoe", "mixtral", "glm4_moe")
NAMES = ("whole", "ragged", "zeroed")
RESIDENT = {"active": "whole", "resident": list(NAMES)}


@torch.inference_mode()
def masked_transformers_logprobs(directory, profile: PruningProfile) -> torch.Tensor:
    """Prompt log-probabilities of transformers' float32 model with atoms zeroed, routers masked."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for index, keep in profile.keep.items():
        block = model.model.layers[index].mlp
        block.experts.down_proj *= keep[:, None, :]
        if index in profile.routable:
            mask_router(block.gate, profile.routable[index])
    tokens = torch.tensor(PROMPTS)
    logprobs = model(input_ids=tokens).logits[:, :-1].log_softmax(dim=-1)
    return logprobs.gather(-1, tokens[:, 1:, None]).flatten()


def mask_router(router: torch.nn.Module, routable: torch.Tensor) -> None:
    """Keep transformers' router from choosing an expert, by its bias or by its output."""
    if hasattr(router, "e_score_correction_bias"):
        router.e_score_correction_bias[~routable] = -1e9
        return

    def choose_again(module, arguments, output):
        logits, weights, _ = output
        scores = logits.masked_fill(~routable, float("-inf")).softmax(dim=-1)
        top, chosen = scores.topk(weights.shape[-1])
        renormalise = getattr(module, "norm_topk_prob", True)  # Mixtral always does
        return logits, top / top.sum(dim=-1, keepdim=True) if renormalise else top, chosen

    router.register_forward_hook(choose_again)


def layers_of(llm):
    from vllm_atomic_moe.serving.loader import packed_layers

    return packed_layers(llm.llm_engine.model_executor.driver_worker.worker.model_runner.model)


def activate(llm, name):
    for layer in layers_of(llm):
        layer.activate(name)
    llm.reset_prefix_cache()


def addresses(llm):
    return [buffer.data_ptr() for layer in layers_of(llm) for buffer in layer.buffers()]


def chosen_experts(llm, monkeypatch):
    """Layer -> ids of the experts that the prompts' tokens were sent to."""
    from vllm_atomic_moe.serving.layer import AtomicExpertsMethod

    apply, seen = AtomicExpertsMethod.apply, {}

    def spy(self, layer, x, topk_weights, topk_ids, **rest):
        assert torch.isfinite(topk_weights).all()
        seen.setdefault(layer.index, set()).update(topk_ids.flatten().tolist())
        return apply(self, layer, x, topk_weights, topk_ids, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(AtomicExpertsMethod, "apply", spy)
        prompt_logprobs(llm)
    return seen


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_served_equals_masked_dense(tmp_path, monkeypatch, architecture):
    model = tmp_path / "model"
    info = make_checkpoint(architecture, model)
    profiles = write_routing_profiles(info, model / "atomic_profiles")
    wanted = {name: masked_transformers_logprobs(model, profiles[name]) for name in NAMES}
    for name in ("ragged", "zeroed"):
        assert (wanted["whole"] - wanted[name]).abs().max() > 0.01, "blind: the masks are alike"

    with engine(model, load_format="atomic-pruned", model_loader_extra_config=RESIDENT) as llm:
        before = addresses(llm)
        for name in ("whole", "ragged", "zeroed", "whole"):
            activate(llm, name)
            found = prompt_logprobs(llm)
            assert (found - wanted[name]).abs().max() < TOLERANCE, name
            chosen = chosen_experts(llm, monkeypatch)
            for layer, mask in profiles[name].routable.items():
                assert chosen[layer] <= set(mask.nonzero().flatten().tolist()), (name, layer)
        assert addresses(llm) == before
        held = sum(layer.packed.weight_bytes for layer in layers_of(llm))
        assert held == profiles["whole"].kept_atoms * 3 * 128 * 4 < info.atoms * 3 * 128 * 4
        for layer in layers_of(llm):
            rows = layer.packed.layout.offsets_E1.diff()
            assert (rows > 0).tolist() == profiles["whole"].routable[layer.index].tolist()
