"""The matrix of architectures (`tests/architectures.py`): served, and exported.

Two ragged profiles in one batch equal dense models whose pruned atoms are zeroed, and the export
equals what was served. Calibration is in `tests/unit/test_architectures.py`.
"""

from __future__ import annotations

import re
import traceback

import pytest
import torch

from tests.architectures import ARCHITECTURES, LAYER, PER_EXPERT, QUICK, ROUTED_HERE, TRANSFORMERS
from tests.checkpoints import make_checkpoint, write_profile, zero_pruned
from tests.mistral_names import make_mistral_checkpoint
from tests.serving.conftest import (
    engine,
    logprobs_of,
    mixed_logprobs,
    prompt_logprobs,
    transformers_logprobs,
)
from tests.unit.tiny_models import make_model
from vllm_atomic_moe.convert.exporting.export import export

NAMES = ["ragged", "second"]
TOLERANCE = 1e-4
PACKED = {
    "load_format": "atomic-pruned",
    "model_loader_extra_config": {"active": NAMES[0], "resident": NAMES[1:]},
}


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.full)
        for name, it in ARCHITECTURES.items()
        if it.tested != LAYER
    ],
)
def test_served_and_exported(tmp_path, monkeypatch, architecture):
    it, model = ARCHITECTURES[architecture], tmp_path / "model"
    if it.tested == ROUTED_HERE:
        route_zero_experts_here(monkeypatch)
    else:
        # In float32 on CPUs vLLM has no latent attention of its own; others have none at all.
        monkeypatch.setenv("VLLM_MLA_DISABLE", "1")
    info = make_checkpoint(architecture, model)
    assert (info.architecture, info.num_experts, info.intermediate_size) == (it.model, 8, 64)
    wanted = {}
    for seed, name in enumerate(NAMES, start=1):
        profile = write_profile(info, name, model / "atomic_profiles", seed)
        zero_pruned(model, tmp_path / name, profile)
        if it.tested == TRANSFORMERS:
            wanted[name] = transformers_logprobs(tmp_path / name)
        else:
            wanted[name] = logprobs_of(tmp_path / name, **it.options)
    assert (wanted[NAMES[0]] - wanted[NAMES[1]]).abs().max() > 0.01, "the test is blind"
    with engine(model, **PACKED, **it.options) as llm:
        found = mixed_logprobs(llm, NAMES)
    for name in NAMES:
        assert (found[name] - wanted[name]).abs().max() < TOLERANCE, name

    profile, output = model / "atomic_profiles" / f"{NAMES[0]}.safetensors", tmp_path / "exported"
    if it.not_exported:
        with pytest.raises(ValueError, match=it.not_exported):
            export(str(model), profile, output)
        return
    export(str(model), profile, output)
    exported = logprobs_of(output, load_format="atomic-pruned", **it.options)
    # In another batch; bit for bit in test_export.py.
    assert (exported - found[NAMES[0]]).abs().max() < TOLERANCE


def route_zero_experts_here(monkeypatch) -> None:
    """LongCat's router, whose two kernels vLLM has for GPUs alone."""
    from vllm.model_executor.layers.fused_moe.router import zero_expert_router

    def choose(*, gating_output, e_score_correction_bias, topk, indices_type, **settings):
        assert (settings["scoring_func"], settings["renormalize"]) == ("softmax", False)
        scores_TE = gating_output.float().softmax(dim=-1)
        ids_TK = (scores_TE + e_score_correction_bias).topk(topk).indices
        return scores_TE.gather(1, ids_TK), ids_TK.to(indices_type or torch.int32)

    def identity(*, expert_indices, expert_scales, num_experts, zero_expert_type, hidden_states):
        assert zero_expert_type == "identity"
        zero_TK = torch.where(expert_indices >= num_experts, expert_scales, 0)
        return hidden_states * zero_TK.sum(dim=1, keepdim=True)

    monkeypatch.setattr(zero_expert_router, "fused_topk_bias", choose)
    monkeypatch.setattr(zero_expert_router, "zero_experts_compute_triton", identity)


@pytest.mark.full
@pytest.mark.parametrize("architecture", PER_EXPERT)
def test_fused_tensors_are_served_as_the_same_model(tmp_path, architecture):
    found = []
    for layout in ("per_expert", "fused"):
        info = make_checkpoint(architecture, tmp_path / layout, layout=layout)
        for seed, name in enumerate(NAMES, start=1):
            write_profile(info, name, tmp_path / layout / "atomic_profiles", seed)
        with engine(tmp_path / layout, **PACKED) as llm:
            found.append(mixed_logprobs(llm, NAMES))
    for name in NAMES:
        assert torch.equal(found[0][name], found[1][name]), name


@pytest.mark.full
def test_mistrals_own_names(tmp_path, monkeypatch):
    """For a model that vLLM treats as a DeepSeek-V3, and for its export."""
    monkeypatch.setenv("VLLM_MLA_DISABLE", "1")
    model, alone = tmp_path / "model", {"max_num_seqs": 1}
    info = make_mistral_checkpoint(model)
    profile = write_profile(info, NAMES[0], model / "atomic_profiles", seed=1)
    zero_pruned(model, tmp_path / "zeroed", profile)
    wanted = logprobs_of(tmp_path / "zeroed", load_format="mistral", **alone)
    extra = {"active": NAMES[0]}
    packed = {"load_format": "atomic-pruned", "model_loader_extra_config": extra}
    with engine(model, **packed, **alone) as llm:
        found = prompt_logprobs(llm)
    assert (found - wanted).abs().max() < TOLERANCE
    export(str(model), model / f"atomic_profiles/{NAMES[0]}.safetensors", tmp_path / "exported")
    # vLLM knows the format by the names of shards, which an export has not.
    settings = {"load_format": "atomic-pruned", "config_format": "mistral", **alone}
    assert torch.equal(logprobs_of(tmp_path / "exported", **settings), found)


@pytest.mark.full
@pytest.mark.parametrize("architecture", [name for name, it in ARCHITECTURES.items() if it.no_cpu])
def test_what_stock_vllm_does_not_run_on_a_cpu(tmp_path, architecture):
    """If this changes, the matrix can compare log-probabilities."""
    it = ARCHITECTURES[architecture]
    make_model(architecture, tmp_path)
    with pytest.raises(Exception) as failure:  # noqa: PT011
        logprobs_of(tmp_path, skip_tokenizer_init=False, **it.options)
    [*_, raised] = traceback.extract_tb(failure.tb)
    assert re.search(it.no_cpu, f"{failure.value!r} {raised.line}")
