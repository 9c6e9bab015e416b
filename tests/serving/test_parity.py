"""Two profiles in one batch equal dense models whose pruned atoms are zeroed, in float32."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.checkpoints import ARCHITECTURES, make_checkpoint, write_profile, zero_pruned
from tests.serving.conftest import PROMPTS, engine, logprobs_of, mixed_logprobs

TOLERANCE = 1e-4
NAMES = ["ragged", "second"]


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
    wanted = {}
    for seed, name in enumerate(NAMES, start=1):
        profile = write_profile(info, name, model / "atomic_profiles", seed)
        zero_pruned(model, tmp_path / name, profile)
        wanted[name] = logprobs_of(tmp_path / name)

    alike = (transformers_logprobs(model), *wanted.values())
    for one, other in combinations(alike, 2):
        assert (one - other).abs().max() > 0.01, "the masks change nothing: the test is blind"
    extra = {"profiles": str(model / "atomic_profiles"), "active": NAMES[0], "resident": NAMES[1:]}
    for layout in (model, fused):
        with engine(layout, load_format="atomic-pruned", model_loader_extra_config=extra) as llm:
            found = mixed_logprobs(llm, NAMES)
        for name in NAMES:
            assert (found[name] - wanted[name]).abs().max() < TOLERANCE, (layout.name, name)


@torch.inference_mode()
def transformers_logprobs(directory) -> torch.Tensor:
    """Prompt log-probabilities of the checkpoint under transformers, no vLLM involved."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokens = torch.tensor(PROMPTS)
    logprobs = model(input_ids=tokens).logits[:, :-1].log_softmax(dim=-1)
    return logprobs.gather(-1, tokens[:, 1:, None]).flatten()
