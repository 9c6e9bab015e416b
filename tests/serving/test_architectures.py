"""Architectures beyond those of test_parity.py: served, and exported where the layout allows it.

A tiny random float32 checkpoint by transformers, two profiles in one batch; against vLLM's own
dense model with the pruned atoms zeroed.
"""

from __future__ import annotations

import pytest
import torch
import transformers

from tests.checkpoints import COMMON, write_profile, zero_pruned
from tests.serving.conftest import PROMPTS, engine, logprobs_of, mixed_logprobs
from vllm_atomic_moe.calibration.collect import collect
from vllm_atomic_moe.calibration.experts import find_experts
from vllm_atomic_moe.calibration.text import CalibrationText
from vllm_atomic_moe.convert.exporting.export import export
from vllm_atomic_moe.files.checkpoint import describe_checkpoint

NAMES = ["ragged", "second"]
# Architecture -> (configuration class, its own settings, what vLLM calls it).
ARCHITECTURES = {
    "granitemoe": (
        "GraniteMoeConfig",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 64},
        "GraniteMoeForCausalLM",
    ),
    "granitemoeshared": (
        "GraniteMoeSharedConfig",
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "intermediate_size": 64,
            "shared_intermediate_size": 96,
        },
        "GraniteMoeSharedForCausalLM",
    ),
    "gemma4": (
        "Gemma4TextConfig",
        {
            "num_experts": 8,
            "top_k_experts": 2,
            "moe_intermediate_size": 64,
            "intermediate_size": 96,
            "enable_moe_block": True,
            "head_dim": 32,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 256,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "tie_word_embeddings": True,
        },
        "Gemma4ForCausalLM",
    ),
    "llama4": (
        "Llama4TextConfig",
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 1,
            "intermediate_size": 64,
            "intermediate_size_mlp": 96,
            "head_dim": 32,
            "no_rope_layers": [1, 1, 1],
            "attention_chunk_size": 128,
            "pad_token_id": 0,
        },
        "Llama4ForCausalLM",
    ),
}


# `make test` takes one of a layout, one of an activation and a block of its own.
QUICK = ("granitemoe", "gemma4")


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.full) for name in ARCHITECTURES],
)
def test_served_and_exported(tmp_path, architecture):
    config_class, settings, name = ARCHITECTURES[architecture]
    model = tmp_path / "model"
    config = getattr(transformers, config_class)(**{**COMMON, **settings})
    torch.manual_seed(0)
    dense = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in dense.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    dense.save_pretrained(model)
    info = describe_checkpoint(model)
    assert (info.architecture, info.num_experts, info.intermediate_size) == (name, 8, 64)
    check_calibration(architecture, dense, info)
    wanted = {}
    for seed, profile_name in enumerate(NAMES, start=1):
        profile = write_profile(info, profile_name, model / "atomic_profiles", seed)
        zero_pruned(model, tmp_path / profile_name, profile)
        wanted[profile_name] = logprobs_of(tmp_path / profile_name)
    assert (wanted[NAMES[0]] - wanted[NAMES[1]]).abs().max() > 0.01
    extra = {"active": NAMES[0], "resident": NAMES[1:]}
    with engine(model, load_format="atomic-pruned", model_loader_extra_config=extra) as llm:
        found = mixed_logprobs(llm, NAMES)
    for profile_name in NAMES:
        difference = (found[profile_name] - wanted[profile_name]).abs().max()
        assert difference < 1e-4, profile_name
    export(str(model), model / "atomic_profiles" / f"{NAMES[0]}.safetensors", tmp_path / "out")
    exported = logprobs_of(tmp_path / "out", load_format="atomic-pruned")
    assert (exported - found[NAMES[0]]).abs().max() < 1e-5


def check_calibration(architecture, dense, info):
    """Every token counts in every layer; Llama-4 is refused, its experts see all tokens sorted."""
    if architecture == "llama4":
        with pytest.raises(ValueError, match="does not build its experts through the experts inte"):
            find_experts(dense, info)
        return
    text = CalibrationText({"a": torch.tensor(PROMPTS, dtype=torch.int32)}, ())
    sums = collect(dense, find_experts(dense, info), info, text, 2)
    assert tuple(sums) == info.layers
    for of_layer in sums.values():
        assert of_layer.count.sum() == text.num_tokens * info.experts_per_token
        assert of_layer.g2.sum() > 0
