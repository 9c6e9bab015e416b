"""Pruned serving equals a dense model whose pruned atoms are zeroed, in float32."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.checkpoints import ARCHITECTURES, make_checkpoint, write_profile, zero_pruned
from tests.serving.conftest import PROMPTS, logprobs_of

TOLERANCE = 1e-4


# `make test` takes two: a plain one, and one with groups, correction bias and shared experts.
QUICK = ("qwen3_moe", "glm4_moe")


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.full) for name in ARCHITECTURES],
)
def test_pruned_equals_zeroed_dense(tmp_path, architecture):
    model, fused = tmp_path / "model", tmp_path / "fused"
    info = make_checkpoint(architecture, model)
    assert make_checkpoint(architecture, fused, layout="fused") == info
    profile = write_profile(info, "ragged", model / "atomic_profiles", seed=1)
    zero_pruned(model, tmp_path / "zeroed", profile)

    wanted = logprobs_of(tmp_path / "zeroed")

    unpruned = transformers_logprobs(model)
    assert (unpruned - wanted).abs().max() > 0.01, "the masks change nothing: the test is blind"
    for layout in (model, fused):
        found = logprobs_of(
            layout,
            load_format="atomic-pruned",
            model_loader_extra_config={"profiles": str(model / "atomic_profiles")},
        )
        assert (found - wanted).abs().max() < TOLERANCE, layout.name


@torch.inference_mode()
def transformers_logprobs(directory) -> torch.Tensor:
    """Prompt log-probabilities of the checkpoint under transformers, no vLLM involved."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokens = torch.tensor(PROMPTS)
    logprobs = model(input_ids=tokens).logits[:, :-1].log_softmax(dim=-1)
    return logprobs.gather(-1, tokens[:, 1:, None]).flatten()
