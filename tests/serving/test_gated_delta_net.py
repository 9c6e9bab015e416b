"""Qwen3-Next and Qwen3.5: linear attention (gated delta net), in the latter also a vision tower.

Tiny random checkpoints by transformers, in bfloat16, the only dtype of vLLM's linear attention on
CPUs; against vLLM's own dense model with the pruned atoms zeroed.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.checkpoints import write_profile, zero_pruned
from tests.gated_delta_net import SPECIAL, make_qwen3_5, make_qwen3_next, save_random
from tests.serving.conftest import PROMPTS, engine, mixed_logprobs
from vllm_atomic_moe.calibration.collect import collect
from vllm_atomic_moe.calibration.experts import find_experts
from vllm_atomic_moe.calibration.model import load_model
from vllm_atomic_moe.calibration.text import CalibrationText
from vllm_atomic_moe.convert.exporting.export import export

NAMES = ["ragged", "second"]
IMAGE_PROMPT = "5 <|vision_start|> <|image_pad|> <|vision_end|> 7 9"


def processor():
    """Words that are numbers are token ids; images of at most 16 tokens."""
    special = {f"<|{name}|>": token for name, token in SPECIAL.items()}
    vocabulary = {str(token): token for token in range(min(SPECIAL.values()))} | special
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="1", unk_token="0", additional_special_tokens=[*special]
    )
    size = {"shortest_edge": 8 * 8, "longest_edge": 32 * 32}
    return transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(patch_size=4, size=size),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen3VLVideoProcessor(patch_size=4),
    )


def image_logprobs(llm, name=None):
    """Prompt log-probabilities of a request with an image, and the greedy tokens after it."""
    from PIL import Image
    from vllm import SamplingParams

    pixels = torch.randint(256, (24, 32, 3), generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(pixels.to(torch.uint8).numpy())
    params = SamplingParams(
        max_tokens=4, temperature=0, prompt_logprobs=0, extra_args=name and {"profile": name}
    )
    prompt = {"prompt": IMAGE_PROMPT, "multi_modal_data": {"image": image}}
    (answer,) = llm.generate([prompt], params, use_tqdm=False)
    assert answer.prompt_token_ids.count(SPECIAL["image_pad"]) > 4
    scores = [next(iter(score.values())).logprob for score in answer.prompt_logprobs[1:]]
    return torch.tensor(scores), answer.outputs[0].token_ids


def close(found, wanted):
    """Equal up to rounding in bfloat16, which depends on the instruction set.

    A few tokens may differ more: those that rounding sends to another expert. Another profile
    differs by 0.25 or more in the median.
    """
    difference = (found - wanted).abs()
    return difference.median() < 3e-2 and difference.mean() < 0.1


@pytest.mark.full
def test_qwen3_next(tmp_path):
    model = tmp_path / "model"
    info = save_random(make_qwen3_next(), model, fused=False)
    assert info.architecture == "Qwen3NextForCausalLM"
    check_served_calibrated_and_exported(model, info, tmp_path, dtype="bfloat16")


def test_qwen3_5_with_its_vision_tower(tmp_path):
    model = tmp_path / "model"
    processor().save_pretrained(model)
    info = save_random(make_qwen3_5(), model, fused=True)
    assert info.architecture == "Qwen3_5MoeForConditionalGeneration"
    options = {
        "dtype": "bfloat16",
        "skip_tokenizer_init": False,
        "limit_mm_per_prompt": {"image": 1, "video": 0},
    }
    check_served_calibrated_and_exported(model, info, tmp_path, **options)


def check_served_calibrated_and_exported(model, info, tmp_path, **options):
    """Two profiles in one batch; with an image too if the model takes images."""
    sees = "limit_mm_per_prompt" in options
    ragged = write_profile(info, NAMES[0], model / "atomic_profiles", seed=1)
    write_profile(info, NAMES[1], model / "atomic_profiles", seed=2)
    zero_pruned(model, tmp_path / "zeroed", ragged)
    with engine(tmp_path / "zeroed", **options) as llm:
        wanted = mixed_logprobs(llm, NAMES)[NAMES[0]]
        wanted_image, wanted_tokens = image_logprobs(llm) if sees else (None, None)
    options["load_format"] = "atomic-pruned"
    extra = {"active": NAMES[1], "resident": NAMES[:1]}
    with engine(model, model_loader_extra_config=extra, **options) as llm:
        found = mixed_logprobs(llm, NAMES)
        if sees:
            image, tokens = image_logprobs(llm, NAMES[0])
            other_image, _ = image_logprobs(llm)
            assert close(image, wanted_image)
            assert tokens == wanted_tokens
            assert not close(other_image, wanted_image)
    assert close(found[NAMES[0]], wanted)
    assert not close(found[NAMES[1]], wanted)
    export(str(model), model / "atomic_profiles" / f"{NAMES[0]}.safetensors", tmp_path / "out")
    with engine(tmp_path / "out", **options) as llm:
        assert close(mixed_logprobs(llm, [NAMES[0]])[NAMES[0]], wanted)
        if sees:
            assert close(image_logprobs(llm)[0], wanted_image)
    check_calibration(model, info)


def check_calibration(model, info):
    """Every token counts in every layer, and every layer has gradients."""
    dense = load_model(model, "float32", {"": "cpu"})
    text = CalibrationText({"a": torch.tensor(PROMPTS, dtype=torch.int32)}, ())
    sums = collect(dense, find_experts(dense, info), info, text, 2)
    assert tuple(sums) == info.layers
    for of_layer in sums.values():
        assert of_layer.count.sum() == text.num_tokens * info.experts_per_token
        assert of_layer.g2.sum() > 0
