"""A refitted export is served as transformers computes the same refit in an ordinary checkpoint."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import uniform_profile, write_profile
from tests.quantized import quantize_checkpoint, quantize_gpt_oss
from tests.serving.conftest import logprobs_of, transformers_logprobs
from tests.unit.tiny_models import make_model, random_text
from vllm_atomic_moe import api
from vllm_atomic_moe.files.checkpoint import describe_checkpoint
from vllm_atomic_moe.files.export_format import EXPORT_DIRECTORY
from vllm_atomic_moe.files.profiles import PruningProfile

TOLERANCE = 1e-4


@pytest.mark.parametrize(
    "architecture",
    [
        "qwen3_moe",
        # Biases, transposed; a multiplier behind the experts; a shared expert; a norm there.
        *(
            pytest.param(name, marks=pytest.mark.full)
            for name in ("gpt_oss", "granitemoe", "qwen2_moe", "gemma4")
        ),
    ],
)
def test_served_logits_equal_transformers(tmp_path, architecture):
    model, text = tmp_path / "model", tmp_path / "text.txt"
    info = make_model(architecture, model)
    text.write_text(random_text(4000))
    profile = uniform_profile(info, info.num_experts, 32).write_into(model / "atomic_profiles")
    fit = {"refit": True, "data": [str(text)], "seq_len": 64, "samples": 32, "batch_size": 4}
    result = api.export(model, profile, tmp_path / "packed", **fit)
    errors = result.refit["held_out_error"].values()
    assert all(after <= before for before, after in errors), errors
    assert any(after < before for before, after in errors), errors
    api.export(model, profile, tmp_path / "plain", plain=True, **fit)
    wanted = transformers_logprobs(tmp_path / "plain")
    found = logprobs_of(tmp_path / "packed", load_format="atomic-pruned")
    if architecture == "granitemoe":
        # Of the same checkpoint stock vLLM and transformers differ by 2e-4 here.
        wanted = logprobs_of(tmp_path / "plain")
    assert (found - wanted).abs().max() < TOLERANCE
    masked = logprobs_of(model, load_format="atomic-pruned")
    assert (masked - wanted).abs().max() > 0.01, "the test is blind"


@pytest.mark.parametrize(
    "name",
    [
        "int4",
        pytest.param("fp8-block", marks=pytest.mark.full),
        pytest.param("mxfp4-blocks", marks=pytest.mark.full),
    ],
)
def test_plain_columns_beside_codes_equal_the_decoded_model(tmp_path, name):
    """The decoded model with the refitted columns: computed by transformers in float32; or, as vLLM
    serves the format in 16 bits only, served from plain weights. gpt-oss has biases.
    """
    original, model, text = tmp_path / "original", tmp_path / "model", tmp_path / "text.txt"
    if name == "mxfp4-blocks":
        make_model("gpt_oss", original, intermediate_size=96)
        decoded = quantize_gpt_oss(original, model)
    else:
        make_model("qwen3_moe", original)
        decoded = quantize_checkpoint(original, model, name)
    text.write_text(random_text(4000))
    info = describe_checkpoint(model)
    write_profile(info, "wide", tmp_path, seed=1)
    path = tmp_path / "wide.safetensors"
    fit = {"refit": True, "data": [str(text)], "seq_len": 64, "samples": 32, "batch_size": 4}
    result = api.export(model, path, tmp_path / "packed", **fit)
    errors = result.refit["held_out_error"].values()
    assert all(after <= before for before, after in errors), errors
    assert any(after < before for before, after in errors), errors
    [shard] = (tmp_path / "packed" / EXPORT_DIRECTORY).glob("*.safetensors")
    wanted = with_columns(decoded, PruningProfile.read(path).keep, load_file(shard))
    dtype = "float32" if name == "int4" else "bfloat16"
    of_wide = {"profiles": str(tmp_path), "active": "wide", "kernel": "reference"}

    def served(directory):
        told = {"load_format": "atomic-pruned", "model_loader_extra_config": of_wide}
        return logprobs_of(directory, dtype=dtype, **told)

    found, masked = served(tmp_path / "packed"), served(model)
    if dtype == "float32":
        assert (found - transformers_logprobs(wanted)).abs().max() < TOLERANCE
    else:
        assert torch.equal(found, served(wanted))
    assert (masked - found).abs().max() > 0.01, "the test is blind"


def with_columns(directory, keep, packed):
    """The checkpoint with an export's columns of down_proj; those of pruned atoms are zero."""
    refitted = directory.with_name("refitted")
    shutil.copytree(directory, refitted)
    tensors = load_file(refitted / "model.safetensors")
    for layer, keep_EI in keep.items():
        block = f"model.layers.{layer}.mlp.experts"
        rows_PH = packed[f"{block}.packed.down_t"]
        down_EIH = torch.zeros(*keep_EI.shape, rows_PH.shape[1], dtype=rows_PH.dtype)
        down_EIH[keep_EI] = rows_PH
        if f"{block}.down_proj" in tensors:  # gpt-oss's
            tensors[f"{block}.down_proj"] = down_EIH
            continue
        for expert, down_IH in enumerate(down_EIH):
            tensors[f"{block}.{expert}.down_proj.weight"] = down_IH.t().contiguous()
    save_file(tensors, refitted / "model.safetensors", metadata={"format": "pt"})
    return refitted
