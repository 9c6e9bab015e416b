"""Models with their own code, or that transformers cannot load: one line, at once."""

import json
import shutil
import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.qwen3_moe import modeling_qwen3_moe

from tests import checkpoints
from tests.mistral_names import make_mistral_checkpoint
from tests.unit.test_cli import refused, run
from tests.unit.tiny_models import make_model, random_text, random_windows
from vllm_atomic_moe.calibration.collect import collect
from vllm_atomic_moe.calibration.experts import find_experts
from vllm_atomic_moe.calibration.model import check_model_code, check_tokenizer_code, load_model
from vllm_atomic_moe.calibration.text import CalibrationText

SHORT = ("--samples", "2", "--seq-len", "16")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    directory = tmp_path_factory.mktemp("original")
    make_model("qwen3_moe", directory)
    (directory / "text.txt").write_text(random_text(200))
    return directory


@pytest.fixture
def model(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


def edit(path, **changes):
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, **changes}))


def calibrate(model, *more, before=()):
    return (*before, "calibrate", model, "--data", model / "text.txt", "-o", "s", *SHORT, *more)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)


def test_a_model_with_its_own_code(model, tmp_path):
    """It does not run and does not prompt; with the option it runs."""
    ran = tmp_path / "ran"
    config, name = f"open({str(ran)!r}, 'w')\n", "transformers.models.qwen3_moe"
    config += f"from {name} import Qwen3MoeConfig\n"
    config += "class OwnConfig(Qwen3MoeConfig):\n    model_type = 'own_moe'\n"
    code = f"from {name} import Qwen3MoeForCausalLM\nfrom .configuration_own import OwnConfig\n"
    code += "class OwnForCausalLM(Qwen3MoeForCausalLM):\n    config_class = OwnConfig\n"
    (model / "configuration_own.py").write_text(config)
    (model / "modeling_own.py").write_text(code)
    checkpoints.make_checkpoint("qwen3_moe", model, layout="fused")
    auto_map = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    edit(model / "config.json", model_type="own_moe", auto_map=auto_map)
    line = refused(*calibrate(model))
    assert "its config.json runs code of its own ('modeling_own.OwnForCausalLM')" in line
    assert line.endswith("then allow it with --trust-remote-code")
    assert "allow it with --trust-remote-code" in refused("bench", model, "--calibration")
    assert not ran.exists()
    result = run(*calibrate(model, "--trust-remote-code"))
    assert result.exit_code == 0, result.output
    assert ran.exists()


def test_code_beside_a_model_that_transformers_knows_is_not_needed(model):
    edit(model / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"})
    result = run(*calibrate(model))
    assert result.exit_code == 0, result.output


def test_a_tokenizer_with_its_own_code(model):
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Tokenizer", None]})
    check_tokenizer_code(model, False)  # tokenizer.json says it all
    (model / "tokenizer.json").unlink()
    line = refused(*calibrate(model))
    assert "its tokenizer runs code of its own (['own.Tokenizer', None])" in line
    check_tokenizer_code(model, True)


def test_an_architecture_without_a_language_model(model):
    """transformers' message has thousands of characters."""
    text = json.loads((model / "config.json").read_text())
    outer = {"model_type": "qwen3_vl_moe_vision", "architectures": ["X"], "text_config": text}
    (model / "config.json").write_text(json.dumps(outer))
    reason = "transformers cannot load it (ValueError: Unrecognized configuration class"
    line = refused(*calibrate(Path("model")))
    assert reason in line
    assert "atomic-moe --debug" in line
    assert len(line) <= 320
    # The path of a Hub snapshot leaves room for the same.
    snapshot = model.with_name(f"models--{'n' * (110 - len(str(model.parent)))}")
    assert f"{snapshot}: {reason}" in refused(*calibrate(model.rename(snapshot)))


def test_code_beside_a_model_that_takes_images_is_not_needed(model):
    """For a model whose text model transformers has."""
    auto_map = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    edit(model / "config.json", model_type="aria", auto_map=auto_map)
    check_model_code(model, trusted=False)
    edit(model / "config.json", model_type="aria_of_its_own")
    with pytest.raises(ValueError, match="runs code of its own"):
        check_model_code(model, trusted=False)


@pytest.mark.parametrize("error", [KeyError("past"), AttributeError("no x"), RuntimeError("mat")])
def test_exceptions_of_model_code_become_one_line(model, monkeypatch, error):
    def forward(self, *args, **kwargs):
        raise error

    monkeypatch.setattr(modeling_qwen3_moe.Qwen3MoeAttention, "forward", forward)
    line = refused(*calibrate(model))
    assert "Qwen3MoeAttention model.layers.0.self_attn: transformers" in line
    assert f"({type(error).__name__}: " in line
    trace = run(*calibrate(model, before=["--debug"])).exception
    assert trace.__cause__ is error
    assert "modeling_qwen3_moe.py" in "".join(traceback.format_exception(trace))


@pytest.mark.parametrize("error", [KeyError("x"), ImportError("no timm"), OSError("gone")])
def test_exceptions_of_loading_become_one_line(model, monkeypatch, error):
    def fail(self, *args, **kwargs):
        raise error

    monkeypatch.setattr(modeling_qwen3_moe.Qwen3MoeForCausalLM, "__init__", fail)
    assert f"transformers cannot load it ({type(error).__name__}: " in refused(*calibrate(model))


def test_an_untied_head_missing_from_the_files(model):
    path = model / "model.safetensors"
    tensors = load_file(path)
    del tensors["lm_head.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r'lm_head.weight; .* "tie_word_embeddings": true'):
        load_model(model, "float32", {"": "cpu"})


def in_half_precision(original, change):
    """The model in float16 with changed weights, its experts, and its checkpoint's description."""
    from vllm_atomic_moe.files.checkpoint import describe_checkpoint

    model = load_model(original, "float16", {"": "cpu"})
    for layer in model.model.layers:
        change(layer)
    info = describe_checkpoint(original)
    return model, find_experts(model, info), info


def test_a_gradient_beyond_float16_ends_the_run_at_its_window(original):
    """The loss is finite: experts output zero, and the residual stream is small."""

    def change(layer):
        with torch.no_grad():
            layer.mlp.experts.gate_up_proj.zero_()
            layer.mlp.experts.down_proj.mul_(1000)
            layer.self_attn.o_proj.weight.zero_()

    model, experts, info = in_half_precision(original, change)
    model.model.embed_tokens.weight.data.mul_(1e-4)
    text = CalibrationText({"a": random_windows(3, 8)}, ())
    done = []
    words = (
        "layer 2: gradients of a window are not finite in float16; use --dtype bfloat16 or "
        "--dtype float32"
    )
    with pytest.raises(ValueError, match=words):
        collect(model, experts, info, text, 1, lambda *step: done.append(step))
    assert done == []


def test_an_activation_beyond_float16_ends_the_run_at_its_window(original):
    def change(layer):
        layer.mlp.experts.gate_up_proj.data.mul_(1000)

    model, experts, info = in_half_precision(original, change)
    text = CalibrationText({"a": random_windows(3, 8)}, ())
    words = "layer 0: activations of a window are not finite in float16; use --dtype bfloat16"
    for gradients in (True, False):
        with pytest.raises(ValueError, match=words):
            collect(model, experts, info, text, 1, gradients=gradients)


def test_a_model_in_mistrals_own_format_has_no_code(tmp_path):
    """Its `params.json` is read instead of config.json."""
    make_mistral_checkpoint(tmp_path)
    check_model_code(tmp_path, trusted=False)
