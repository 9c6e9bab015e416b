"""Tensors, routers and config.json that disagree, and layouts that are not known."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import make_checkpoint
from tests.unit.test_cli import refused
from vllm_atomic_moe.files.checkpoint import describe_checkpoint
from vllm_atomic_moe.files.config import quantization, read_config
from vllm_atomic_moe.files.profiles import PruningProfile


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    directory = tmp_path_factory.mktemp("original")
    make_checkpoint("qwen3_moe", directory, seed=1)
    return load_file(directory / "model.safetensors"), json.loads(
        (directory / "config.json").read_text()
    )


@pytest.fixture
def checkpoint(original, tmp_path):
    """Write the original with other tensors and other settings."""

    def write(tensors=None, /, **config):
        save_file(original[0] if tensors is None else tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({**original[1], **config}))
        return tmp_path

    return write


def expert_of(name):
    parts = name.split(".")
    return int(parts[parts.index("experts") + 1]) if "experts" in parts else None


@pytest.mark.parametrize("kept", [(0, 1, 2, 3), (0, 2, 4, 6)], ids=["half", "even"])
def test_half_of_the_experts_is_not_a_smaller_model(original, checkpoint, kept, tmp_path_factory):
    tensors = {n: t for n, t in original[0].items() if expert_of(n) in (None, *kept)}
    work = tmp_path_factory.mktemp("work")
    profile = work / "p.safetensors"
    PruningProfile("p", {i: torch.ones(4, 64).bool() for i in range(3)}).write(profile)
    model = checkpoint(tensors)
    line = "config.json says num_local_experts 8, the files hold 4 experts of a layer"
    assert line in refused("check", model, profile)
    assert line in refused("export", model, profile, "-o", work / "out")
    # A configuration that does not say: by the numbers, else by the router.
    config = {"num_experts": None, "num_local_experts": None}
    words = (
        "chooses among 8 experts .*, the files hold 4"
        if kept[-1] == 3
        else "expert 1 is not among them"
    )
    with pytest.raises(ValueError, match=words):
        describe_checkpoint(checkpoint(tensors, **config))


def test_an_expert_lacks_a_projection(original, checkpoint):
    tensors = dict(original[0])
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    with pytest.raises(ValueError, match="layer 1 has 8 experts and 7 up projections; fetch"):
        describe_checkpoint(checkpoint(tensors))


@pytest.mark.parametrize(
    ("setting", "layer"),
    [
        ({"mlp_only_layers": [1]}, 1),
        ({"decoder_sparse_step": 2}, 0),
        ({"first_k_dense_replace": 1}, 0),
        ({"moe_layer_freq": [1, 0, 1]}, 1),
        ({"moe_layer_freq": 2}, 1),
    ],
    ids=str,
)
def test_a_layer_that_the_configuration_makes_dense(checkpoint, setting, layer):
    (key,) = setting
    words = rf"config.json makes layer {layer} dense \({key} .*the files hold routed experts there"
    with pytest.raises(ValueError, match=words):
        describe_checkpoint(checkpoint(**setting))


def test_what_is_said_in_another_way_is_not_judged(checkpoint):
    types = {"mlp_layer_types": ["sparse"] * 3, "first_k_dense_replace": 1}
    assert describe_checkpoint(checkpoint(**types)).layers == (0, 1, 2)
    assert describe_checkpoint(checkpoint(moe_layer_freq="0,1,1")).layers == (0, 1, 2)
    left_over = {"quantization_config": {"quant_method": "fp8"}}
    assert describe_checkpoint(checkpoint(**left_over)).layers == (0, 1, 2)


def test_experts_without_a_gate(original, checkpoint):
    tensors = {n: t for n, t in original[0].items() if "gate_proj" not in n or ".mlp.e" not in n}
    assert describe_checkpoint(checkpoint(tensors)).num_experts == 8


def test_a_layer_whose_experts_are_missing(original, checkpoint):
    dense = {n: t for n, t in original[0].items() if not n.startswith("model.layers.1.mlp.")}
    with pytest.raises(ValueError, match="gives layer 1 routed experts, the files hold none there"):
        describe_checkpoint(checkpoint(dense))
    assert describe_checkpoint(checkpoint(dense, mlp_only_layers=[1])).layers == (0, 2)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.language_model.layers.{}.experts.gate_up_proj", (8, 128, 128)),
        ("model.layers.{}.block_sparse_moe.input_linear.weight", (8, 128, 128)),
        ("model.layers.{}.mlp.experts.fc1.weight", (8, 128, 128)),
        ("model.layers.{}.moe.gate_proj.weight", (8, 64, 128)),
        ("transformer.blocks.{}.ffn.experts.mlp.w1", (512, 128)),
    ],
)
def test_a_layout_that_is_not_known_is_named(original, checkpoint, name, shape):
    tensors = {n: t for n, t in original[0].items() if expert_of(n) is None}
    tensors |= {name.format(layer): torch.zeros(shape) for layer in range(3)}
    tensors["model.layers.0.linear_attn.conv1d.weight"] = torch.zeros(16, 1, 4)
    with pytest.raises(ValueError, match="a layout that is not known: ") as refusal:
        describe_checkpoint(checkpoint(tensors))
    assert str(refusal.value).endswith(f"{name.format(0)} {list(shape)}")


def test_a_dense_model_has_no_routed_experts(original, checkpoint):
    tensors = {n: t for n, t in original[0].items() if ".mlp." not in n}
    tensors["model.layers.0.conv1d.weight"] = torch.zeros(16, 1, 4)
    with pytest.raises(ValueError, match="no routed experts among"):
        describe_checkpoint(checkpoint(tensors))


@pytest.mark.parametrize("unquantized", [(), (0,)], ids=["all layers", "all but the first"])
@pytest.mark.parametrize("nested", [False, True], ids=["", "text_config"])
def test_quantized_experts_are_called_so(original, checkpoint, unquantized, nested):
    tensors = {}
    for name, tensor in original[0].items():
        if expert_of(name) is None or any(f".layers.{i}." in name for i in unquantized):
            tensors[name] = tensor
        else:
            stem = name.removesuffix("weight")
            tensors |= {f"{stem}{part}": torch.zeros(2, 2) for part in ("qweight", "scales")}
    how = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    config = {**how, "text_config": original[1]} if nested else how
    with pytest.raises(ValueError, match=r"its experts are quantized \(awq\), as in model.layers"):
        describe_checkpoint(checkpoint(tensors, **config))


@pytest.mark.parametrize(
    ("config", "file", "found"),
    [
        ({}, None, None),
        ({"quantization_config": {}}, None, None),
        ({"quantization_config": {"quant_method": "fp8"}}, None, "fp8"),
        (
            {"compression_config": {"quant_method": "compressed-tensors"}},
            None,
            "compressed-tensors",
        ),
        ({}, {"quantization": {"quant_algo": "NVFP4"}}, "modelopt nvfp4"),
        ({}, {"quantization": {"quant_algo": None}}, None),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_how_a_checkpoint_is_quantized(original, tmp_path, config, file, found, nested):
    """Whatever of it is said beside `text_config`, inside it, or in ModelOpt's own file."""
    for told in (
        {**original[1], **config},
        {"text_config": original[1], **config},
        {"text_config": {**original[1], **config}, "architectures": ["X"]},
    ):
        (tmp_path / "config.json").write_text("\ufeff" + json.dumps(told))
        if file:
            (tmp_path / "hf_quant_config.json").write_text(json.dumps(file))
        assert quantization(tmp_path, read_config(tmp_path)) == found


def test_copies_in_other_dtypes_are_one_model(original, checkpoint):
    """The router's values decide, not the bytes that they are stored in."""
    routed = {
        name: t.bfloat16().float() if ".gate." in name else t for name, t in original[0].items()
    }
    info = describe_checkpoint(checkpoint(routed))
    for dtype in (torch.bfloat16, torch.float16):
        copy = describe_checkpoint(checkpoint({n: t.to(dtype) for n, t in routed.items()}))
        assert copy == info
        assert copy.router.stored_sha256 != info.router.stored_sha256
    made = PruningProfile(
        "p",
        dict.fromkeys(info.layers, torch.ones(8, 64).bool()),
        metadata={"model": json.dumps(describe_checkpoint(checkpoint()).identity())},
    )
    assert made.check(describe_checkpoint(checkpoint())) == []
    (warning,) = made.check(info)
    assert "differs by rounding only" in warning
    for change in (1.003, 1.05):
        tuned = {n: t * change if ".gate." in n else t for n, t in original[0].items()}
        with pytest.raises(ValueError, match="made for router_sha256"):
            made.check(describe_checkpoint(checkpoint(tuned)))
