"""Quantized checkpoints calibrate like their decoded weights; decoding equals other libraries'."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.gated_delta_net import make_qwen3_5, save_random
from tests.quantized import FORMATS, quantize_checkpoint, quantize_gpt_oss
from tests.unit.tiny_models import make_model, random_text
from vllm_atomic_moe.calibration.collect import CalibrationOptions, calibrate
from vllm_atomic_moe.calibration.model import load_model

CPU = {"": "cpu"}
OPTIONS = CalibrationOptions(samples=2, seq_len=32, dtype="float32")
KINDS = (*FORMATS, "gpt-oss")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    directory = tmp_path_factory.mktemp("originals")
    make_model("qwen3_moe", directory / "qwen", moe_intermediate_size=96, num_hidden_layers=2)
    make_model("gpt_oss", directory / "gpt-oss", intermediate_size=96, num_hidden_layers=2)
    return directory


def quantized(originals, model, kind, linears=True):
    if kind == "gpt-oss":
        return quantize_gpt_oss(originals / kind, model)
    return quantize_checkpoint(originals / "qwen", model, kind, linears)


@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_those_of_the_plain_checkpoint(originals, tmp_path, kind):
    text = tmp_path / "letters.txt"
    text.write_text(random_text(400))
    model = tmp_path / "model"
    plain = quantized(originals, model, kind)
    found, warnings = calibrate(str(model), [str(text)], OPTIONS)
    wanted, wanted_warnings = calibrate(str(plain), [str(text)], OPTIONS)
    assert found.model == wanted.model
    assert warnings == wanted_warnings
    for layer, sums in wanted.sums.items():
        for field in dataclasses.fields(sums):
            one, two = getattr(found.sums[layer], field.name), getattr(sums, field.name)
            assert torch.equal(one, two), (layer, field.name)


def test_a_configuration_within_another(tmp_path):
    """For models that take images: transformers builds the text model from the inner part."""
    save_random(make_qwen3_5(), tmp_path / "original", fused=False)
    model = tmp_path / "model"
    plain = quantize_checkpoint(tmp_path / "original", model, "fp8-channel")
    found, wanted = (load_model(it, "float32", CPU).state_dict() for it in (model, plain))
    assert found.keys() == wanted.keys()
    # The plain one's are rounded.
    for name, tensor in wanted.items():
        assert torch.equal(found[name].bfloat16(), tensor.bfloat16()), name


@pytest.mark.parametrize("kind", ["fp8-block", "fp8-channel", "int4", "gpt-oss"])
def test_transformers_decodes_to_the_same_weights(originals, tmp_path, kind):
    """For the formats that it supports."""
    model = tmp_path / "model"
    quantized(originals, model, kind, linears=False)
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, device_map=CPU)
    found = load_model(model, "float32", CPU).state_dict()
    wanted = {name: tensor.float() for name, tensor in theirs.state_dict().items()}
    assert wanted.keys() == found.keys()
    # It rounds to bfloat16 on its way.
    tolerance = 0 if kind == "fp8-block" else 2**-7
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=0)


DOWN = "model.layers.1.mlp.experts.3.down_proj"


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        (
            "int4",
            lambda t: t[f"{DOWN}.weight_scale"].fill_(torch.nan),
            "3.down_proj.weight_packed: scales are not finite, or too large; fetch",
        ),
        (
            "fp8-channel",
            lambda t: t.pop("model.layers.0.self_attn.q_proj.weight_scale"),
            "self_attn.q_proj: weight is float8 and has no weight_scale",
        ),
        (
            "fp8-channel",
            lambda t: t.update(
                {"model.layers.0.self_attn.q_proj.weight": torch.ones(128, 4).int()}
            ),
            "q_proj: quantized in a way that is not known: weight I32",
        ),
    ],
    ids=["not finite", "no scale", "unknown"],
)
def test_what_cannot_be_decoded_is_refused_by_name(originals, tmp_path, kind, change, words):
    model = tmp_path / "model"
    quantized(originals, model, kind)
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=words) as error:
        load_model(model, "float32", CPU)
    assert len(str(error.value)) < 300


def test_a_dtype_missing_from_config_json(originals, tmp_path):
    quantized(originals, tmp_path / "model", "fp8-channel")
    path = tmp_path / "model/config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k != "dtype"}
    path.write_text(json.dumps(config))
    assert load_model(tmp_path / "model", "auto", CPU).dtype == torch.float32
