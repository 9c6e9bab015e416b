"""An ordinary checkpoint answers like the profile: in stock vLLM and in transformers.

Legend: E = 8 experts, I = 64 intermediate size, as in `tests/architectures.py`.
"""

from __future__ import annotations

import pytest

from tests.architectures import ALONE, ARCHITECTURES, LAYER, NARROW, ROUTED_HERE, TRANSFORMERS
from tests.checkpoints import make_checkpoint, uniform_profile
from tests.prediction_heads import make_glm4_moe_with_head
from tests.serving.conftest import PROMPTS, engine, logprobs_of, transformers_logprobs
from tests.serving.test_speculation import HEAD_PROPOSES, accepted, answers, served
from vllm_atomic_moe.convert.exporting.export import export
from vllm_atomic_moe.files.checkpoint import describe_checkpoint

TOLERANCE = 1e-4
# What `make test` takes: a shared expert and a routed width of its own; groups with a correction
# bias; biases and interleaved rows.
QUICK = {("qwen2_moe", "narrow"), ("glm4_moe", "fewer"), ("gpt_oss", "narrow")}


SHAPES = {"fewer": (6, 64), "narrow": (8, 32), "both": (6, 32)}
CASES = [
    pytest.param(
        name, shape, marks=[] if (name, shape) in QUICK else pytest.mark.full, id=f"{name}-{shape}"
    )
    for name, it in ARCHITECTURES.items()
    for shape in SHAPES
    if it.tested not in (LAYER, ROUTED_HERE) and (shape == "fewer" or name in NARROW)
    if shape != "both" or name in ("qwen2_moe", "granitemoe")
]


@pytest.mark.parametrize(("architecture", "shape"), CASES)
def test_every_engine_reads_the_same_model(tmp_path, monkeypatch, architecture, shape):
    it, model = ARCHITECTURES[architecture], tmp_path / "model"
    monkeypatch.setenv("VLLM_MLA_DISABLE", "1")
    info = make_checkpoint(architecture, model)
    profile = uniform_profile(info, *SHAPES[shape])
    path = model / "atomic_profiles" / "uniform.safetensors"
    profile.write(path)
    extra = {"model_loader_extra_config": {"active": "uniform"}}
    wanted = logprobs_of(model, load_format="atomic-pruned", **extra, **it.options)

    output = tmp_path / "plain"
    result = export(str(model), path, output, plain=True)
    assert (result.experts, result.width) == SHAPES[shape]
    found = describe_checkpoint(output)
    assert (found.num_experts, found.intermediate_size) == SHAPES[shape]
    if it.tested != TRANSFORMERS:
        assert (logprobs_of(output, **it.options) - wanted).abs().max() < TOLERANCE
    # Of latent attention vLLM and transformers differ by themselves: see the unit tests.
    if it.tensors is None and it.tested != ALONE:
        assert (transformers_logprobs(output) - wanted).abs().max() < TOLERANCE
        assert (transformers_logprobs(model) - wanted).abs().max() > 0.01, "the test is blind"


@pytest.fixture(scope="module")
def with_head(tmp_path_factory):
    directory = tmp_path_factory.mktemp("head") / "model"
    directory.mkdir()
    info = make_glm4_moe_with_head(directory)
    profile = uniform_profile(info, 6, 64)
    profile.write(directory / "atomic_profiles" / "uniform.safetensors")
    return directory, info


def test_a_prediction_head_is_cut_too_and_proposes(with_head, tmp_path):
    directory, _ = with_head
    profile = directory / "atomic_profiles" / "uniform.safetensors"
    export(str(directory), profile, tmp_path / "plain", plain=True)
    with served(directory, "uniform") as llm:
        wanted = answers(llm, ["uniform"])["uniform"]
    options = {"speculative_config": HEAD_PROPOSES, "disable_log_stats": False}
    with engine(tmp_path / "plain", **options) as llm:
        assert plain_answers(llm) == wanted
        assert accepted(llm) > 25


def plain_answers(llm) -> list[int]:
    """As `answers`, without a profile."""
    from vllm import SamplingParams

    settings = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    outputs = llm.generate(prompts, settings, use_tqdm=False)
    return [token for output in outputs for token in output.outputs[0].token_ids]
