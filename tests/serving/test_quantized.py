"""Quantized checkpoints are served unchanged: the same bits as plain ones with their values."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import make_checkpoint, ragged_masks, write_profile
from tests.quantized import FORMATS, in_bfloat16, quantize_checkpoint, quantize_gpt_oss
from tests.serving.conftest import engine, mixed_logprobs, packed_layers_of
from tests.unit.tiny_models import make_model
from vllm_atomic_moe.convert.exporting.export import export
from vllm_atomic_moe.engine.expert_tensors import experts_taken_by
from vllm_atomic_moe.experts.encoding import encode
from vllm_atomic_moe.experts.formats import decode
from vllm_atomic_moe.files.checkpoint import describe_checkpoint
from vllm_atomic_moe.files.profiles import PruningProfile
from vllm_atomic_moe.files.quantization import scheme_of_down
from vllm_atomic_moe.files.row_formats import RowFormat

NAMES = ["ragged", "second"]
# Neither is a multiple of 128.
SIZES = {"hidden_size": 192, "moe_intermediate_size": 96, "num_hidden_layers": 2}
# What `make test` takes: a kind each of codes, scales and factors.
QUICK = ("fp8-block", "int4", "awq", "nvfp4")
UP = "model.layers.1.mlp.experts.3.up_proj"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A small Qwen3-MoE checkpoint in bfloat16; sizes differ and are not multiples of 128."""
    directory = tmp_path_factory.mktemp("quantized") / "original"
    make_checkpoint("qwen3_moe", directory, **SIZES)
    in_bfloat16(directory)
    return directory


def answers(model, info, dtype, **options) -> tuple[dict[str, torch.Tensor], list[RowFormat]]:
    for seed, name in enumerate(NAMES, start=1):
        write_profile(info, name, model / "atomic_profiles", seed)
    extra = {"active": NAMES[0], "resident": NAMES[1:], **options}
    settings = {"load_format": "atomic-pruned", "model_loader_extra_config": extra}
    with engine(model, dtype=dtype, **settings) as llm:
        formats = [layer.packed.row_format for layer in packed_layers_of(llm)]
        return mixed_logprobs(llm, NAMES), formats


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.full) for name in FORMATS],
)
def test_serves_the_decoded_weights(original, tmp_path, name):
    plain = quantize_checkpoint(original, tmp_path / "bits", name)
    check_bits(tmp_path / "bits", plain)
    make_checkpoint("qwen3_moe", tmp_path / "original", **SIZES)
    plain = quantize_checkpoint(tmp_path / "original", tmp_path / "model", name)
    check_kernel(tmp_path / "model", plain, "float16")


def test_gpt_oss_as_published(tmp_path):
    """MXFP4 blocks of all experts at once, gate and up interleaved, biases."""
    original = tmp_path / "original"
    make_model("gpt_oss", original, intermediate_size=96)
    in_bfloat16(original)
    plain = quantize_gpt_oss(original, tmp_path / "model")
    check_bits(tmp_path / "model", plain)
    check_kernel(tmp_path / "model", plain, "bfloat16")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "awq" else pytest.mark.full) for name in FORMATS],
)
def test_a_plain_layer_before_quantized_ones(original, tmp_path, name):
    """As published: config.json lists what is not quantized. The same bits from an export."""
    model = tmp_path / "model"
    plain = quantize_checkpoint(original, model, name, left=[0])
    found = check_bits(model, plain, left=[0])
    info = describe_checkpoint(model)
    ragged, second = (ragged_masks(info, seed) for seed in (1, 2))
    union = {layer: ragged[layer] | second[layer] for layer in info.layers}
    PruningProfile("union", union).write(tmp_path / "union.safetensors")
    export(str(model), tmp_path / "union.safetensors", tmp_path / "exported")
    again, formats = answers(tmp_path / "exported", info, "bfloat16", kernel="reference")
    assert [it.plain for it in formats] == [True, False]
    for profile in NAMES:
        assert torch.equal(again[profile], found[profile]), profile


def check_bits(model, plain, left=()) -> dict[str, torch.Tensor]:
    """The reference kernel in bfloat16 gives the bits of the plain checkpoint; returns them.

    Args:
        left: layers that are plain in both.
    """
    info = describe_checkpoint(model)
    assert info.identity() == describe_checkpoint(plain).identity()
    found, formats = answers(model, info, "bfloat16", kernel="reference")
    assert [it.plain for it in formats] == [index in left for index in info.layers]
    wanted, formats = answers(plain, info, "bfloat16", kernel="reference")
    assert all(it.plain for it in formats)
    for profile in NAMES:
        assert torch.equal(found[profile], wanted[profile]), profile
    assert not torch.equal(*found.values())
    return found


def check_kernel(model, plain, dtype) -> None:
    """The fastest kernel agrees with itself on the plain checkpoint.

    It may decode to more bits than plain weights have, and random layers amplify rounding: bfloat16
    has too few bits for some of them, and vLLM serves some formats in 16 bits only.
    """
    info = describe_checkpoint(model)
    (found, _), (wanted, _) = answers(model, info, dtype), answers(plain, info, dtype)
    for profile in NAMES:
        assert (found[profile] - wanted[profile]).abs().max() < 2e-2, profile


def test_a_prediction_heads_experts_stay_unchanged(original, tmp_path):
    """Their blocks are not the decoder's, whatever their number."""
    quantize_checkpoint(original, tmp_path / "model", "fp8-channel")
    taken: list[str] = []
    left: list[str] = []
    layer = SimpleNamespace(index=0, special="", global_num_experts=8)
    layer.load_part = lambda name, *_: taken.append(name)
    model = SimpleNamespace(load_weights=lambda weights: left.extend(name for name, _ in weights))
    own, head = (f"{it}.mlp.experts.1.up_proj.weight" for it in ("model.layers.0", "mtp.layers.0"))
    with experts_taken_by([layer], model, describe_checkpoint(tmp_path / "model")):
        model.load_weights([(head, torch.zeros(1)), (own, torch.zeros(1))])
    assert (taken, left) == ([own], [head])


def test_nvfp4_equals_vllms_emulation():
    from vllm.model_executor.layers.quantization.utils import nvfp4_emulation_utils

    parts, _ = FORMATS["nvfp4-modelopt"](torch.randn(96, 192))
    told = {"weight": ("U8", (96, 96)), "weight_scale": ("F8_E4M3", (96, 12))}
    scheme, _ = scheme_of_down("down", {**told, "weight_scale_2": ("F32", ())}, 96, {})
    found = decode(encode(scheme, "up", parts, 192, 96), scheme.row_format(192, 96), "up")
    wanted = nvfp4_emulation_utils.dequantize_to_dtype(
        *(parts[name] for name in scheme.parts), torch.float32, swizzle=False
    )
    torch.testing.assert_close(found, wanted, rtol=2e-7, atol=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda one, two: one[f"{UP}.weight_scale"].fill_(torch.inf), "not finite, or too large"),
        (lambda one, two: one[f"{UP}.weight_scale"].zero_(), "a scale is zero, the codes"),
        (lambda one, two: two.update({f"{UP}.weight_scale": one[f"{UP}.weight_scale"]}), "twice"),
    ],
    ids=["not finite", "zero", "twice"],
)
def test_broken_parts_are_named_and_nothing_is_served(original, tmp_path, change, words):
    quantize_checkpoint(original, tmp_path / "model", "int4")
    write_profile(
        describe_checkpoint(tmp_path / "model"), "a", tmp_path / "model/atomic_profiles", 1
    )
    path = tmp_path / "model/model.safetensors"
    tensors, more = load_file(path), {}
    change(tensors, more)
    save_file(tensors, path, metadata={"format": "pt"})
    if more:
        save_file(more, path.with_name("more.safetensors"), metadata={"format": "pt"})
    extra = {"active": "a", "kernel": "reference"}
    options = {"load_format": "atomic-pruned", "model_loader_extra_config": extra}
    with pytest.raises(ValueError, match=words) as refused, engine(tmp_path / "model", **options):
        pass
    assert UP in str(refused.value)
    assert len(str(refused.value)) < 300
