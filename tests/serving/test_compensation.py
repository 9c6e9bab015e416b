"""Compensated profiles answer as transformers computes them, beside others, and come and go."""

from __future__ import annotations

from dataclasses import replace
from types import MethodType, SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.checkpoints import make_checkpoint, write_profile
from tests.serving.conftest import (
    PROMPTS,
    activate,
    core,
    engine,
    logprobs_of,
    mixed_logprobs,
)
from tests.serving.test_parallel import RANKS
from tests.serving.test_profiles_of_requests import load, unload
from vllm_atomic_moe.control.catalogue import Catalogue
from vllm_atomic_moe.control.errors import AdminError
from vllm_atomic_moe.convert.exporting.export import export
from vllm_atomic_moe.engine.requests import Served
from vllm_atomic_moe.files.compensation import Compensation
from vllm_atomic_moe.files.profiles import PruningProfile

TOLERANCE = 1e-4
NAMES = ("better", "plain", "other")


def compensated(profile: PruningProfile, name: str, hidden_size: int, seed: int) -> PruningProfile:
    """The same masks, with random scales and biases in all layers but the first."""
    generator = torch.Generator().manual_seed(seed)
    compensation = {}
    for layer, mask in list(profile.keep.items())[1:]:
        scale_E = 1 + torch.randn(len(mask), generator=generator) / 4
        bias_EH = torch.randn(len(mask), hidden_size, generator=generator) / 2
        compensation[layer] = Compensation(scale_E, bias_EH)
    return replace(profile, name=name, compensation=compensation)


@torch.inference_mode()
def wanted_logprobs(directory, profile: PruningProfile) -> torch.Tensor:
    """Log-probabilities by transformers, computed expert by expert."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    def forward(self, hidden_TH, ids_TK, weights_TK):
        out_TH = torch.zeros_like(hidden_TH)
        for expert, down in enumerate(self.down_proj):
            tokens, ks = torch.where(ids_TK == expert)
            gate, up = (hidden_TH[tokens] @ self.gate_up_proj[expert].T).chunk(2, dim=-1)
            y = (self.act_fn(gate) * up) @ down.T
            if self.compensation:
                y = self.compensation.scale_E[expert] * y + self.compensation.bias_EH[expert]
            out_TH.index_add_(0, tokens, y * weights_TK[tokens, ks, None])
        return out_TH

    for layer, keep_EI in profile.keep.items():
        experts = model.model.layers[layer].mlp.experts
        experts.down_proj *= keep_EI[:, None, :]
        experts.compensation = profile.compensation.get(layer)
        experts.forward = MethodType(forward, experts)
    tokens = torch.tensor(PROMPTS)
    logprobs = model(input_ids=tokens).logits[:, :-1].log_softmax(dim=-1)
    return logprobs.gather(-1, tokens[:, 1:, None]).flatten()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Two profiles of one mask, one of them compensated, and another."""
    directory = tmp_path_factory.mktemp("models") / "model"
    info = make_checkpoint("qwen3_moe", directory)
    files = directory / "atomic_profiles"
    plain = write_profile(info, "plain", files, seed=1)
    profiles = {
        "plain": plain,
        "better": compensated(plain, "better", info.hidden_size, seed=1),
        "other": write_profile(info, "other", files, seed=2),
        "later": compensated(plain, "later", info.hidden_size, seed=2),
    }
    for profile in profiles.values():
        profile.write_into(files)
    wanted = {name: wanted_logprobs(directory, it) for name, it in profiles.items()}
    assert (wanted["better"] - wanted["plain"]).abs().max() > 0.1, "the test is blind"
    return SimpleNamespace(directory=directory, info=info, profiles=profiles, wanted=wanted)


def served(model, names, **options):
    extra = {"active": names[0], "resident": list(names[1:])}
    return engine(
        model.directory, load_format="atomic-pruned", model_loader_extra_config=extra, **options
    )


def check_same(found, model):
    for name, logprobs in found.items():
        assert (logprobs - model.wanted[name]).abs().max() < TOLERANCE, name


def test_one_batch_with_and_without_and_profiles_that_come_and_go(model):
    with served(model, NAMES) as llm:
        check_same(mixed_logprobs(llm, NAMES), model)
        [memory] = core(llm, "status")["ranks"]
        biases = model.info.num_experts * model.info.hidden_size * 4 * len(model.info.layers)
        refused = load(llm, model.profiles["later"])
        assert "room for the biases of 1 compensated profiles" in refused["error"]
        # Its place is free when the other one is gone.
        activate(llm, "plain")
        assert unload(llm, "better")["ok"]
        assert load(llm, model.profiles["later"])["ok"]
        check_same(mixed_logprobs(llm, ["plain", "later", "other"]), model)
    with served(model, ["plain", "other"]) as llm:
        [less] = core(llm, "status")["ranks"]
        assert memory["resident_bytes"] - less["resident_bytes"] == biases
        state = core(llm, "status")["served"]
        refused = load(llm, model.profiles["better"])
        assert "it is compensated and no profile listed at start is" in refused["error"]
        catalogue = Catalogue(core(llm, "describe"))
        with pytest.raises(AdminError, match="is compensated, and no profile listed") as caught:
            catalogue.servable("better")
        assert (caught.value.status, caught.value.kind) == (409, "CompensationError")
        listed = {it["name"]: it["servable"] for it in catalogue.profiles(Served.of(state))}
        assert (listed["plain"], listed["better"]) == (True, False)
        check_same(mixed_logprobs(llm, ["plain", "other"]), model)


@pytest.mark.full
def test_an_export_carries_it(model, tmp_path):
    path = model.directory / "atomic_profiles" / "better.safetensors"
    export(str(model.directory), path, tmp_path / "exported")
    found = logprobs_of(tmp_path / "exported", load_format="atomic-pruned")
    assert (found - model.wanted["better"]).abs().max() < TOLERANCE


@pytest.mark.full
@pytest.mark.parametrize("kernel", ["reference", "cpu"])
def test_compiled(model, kernel):
    extra = {"active": "better", "resident": ["plain", "other"], "kernel": kernel}
    options = {"enforce_eager": False, "model_loader_extra_config": extra}
    with engine(model.directory, load_format="atomic-pruned", **options) as llm:
        check_same(mixed_logprobs(llm, NAMES), model)


@pytest.mark.full
@pytest.mark.parametrize("ranks", ["tensor", "expert", "pipeline"])
def test_several_ranks(model, monkeypatch, ranks):
    """A bias is added once, however its expert is split."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    with served(model, NAMES, **RANKS[ranks]) as llm:
        check_same(mixed_logprobs(llm, NAMES), model)
        biases = model.info.num_experts * model.info.hidden_size * 4
        held = [rank["resident_bytes"] for rank in core(llm, "status")["ranks"]]
    if ranks == "tensor":  # the first alone has room
        assert held[0] - held[1] > 0.9 * len(model.info.layers) * biases
