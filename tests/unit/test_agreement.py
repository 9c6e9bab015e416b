"""Tensors, routers and config.json that disagree, and unknown layouts."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import make_checkpoint
from tests.unit.test_cli import refused
from vllm_atomic_moe.files.checkpoint import describe_checkpoint
from vllm_atomic_moe.files.config import quantization_name, quantization_settings, read_config
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


# Every form of every key: test_dense_layers.py.
@pytest.mark.parametrize(
    ("setting", "layer"),
    [
        ({"mlp_layer_types": ["sparse", "dense", "sparse"]}, 1),
        ({"num_dense_layers": 1}, 0),
        ({"moe_layers": [0, 2]}, 1),
        ({"mlp_only_layers": [1]}, 1),
        ({"decoder_sparse_step": 2}, 0),
        ({"first_k_dense_replace": 1}, 0),
        ({"moe_layer_freq": [1, 0, 1]}, 1),
        ({"moe_layer_freq": 2}, 1),
    ],
    ids=str,
)
def test_a_layer_that_the_configuration_calls_dense(checkpoint, setting, layer):
    (key,) = setting
    words = rf"config.json makes layer {layer} dense \({key} .*the files hold routed experts there"
    with pytest.raises(ValueError, match=words):
        describe_checkpoint(checkpoint(**setting))


def test_unknown_configurations_are_not_judged(checkpoint):
    types = {"mlp_layer_types": ["sparse"] * 3, "first_k_dense_replace": 1}
    assert describe_checkpoint(checkpoint(**types)).layers == (0, 1, 2)
    assert describe_checkpoint(checkpoint(moe_layer_freq="0,1,1")).layers == (0, 1, 2)
    left_over = {"quantization_config": {"quant_method": "fp8"}}
    assert describe_checkpoint(checkpoint(**left_over)).layers == (0, 1, 2)


def test_experts_without_a_gate(original, checkpoint):
    tensors = {n: t for n, t in original[0].items() if "gate_proj" not in n or ".mlp.e" not in n}
    assert describe_checkpoint(checkpoint(tensors)).num_experts == 8


@pytest.mark.parametrize(
    ("architecture", "key"),
    [("nemotron_h", "moe_latent_size"), ("kimi_linear", "routed_expert_hidden_size")],
)
def test_experts_in_a_latent_space_are_refused(tmp_path, architecture, key):
    words = rf"^not served by this version: experts in a latent space \(.*: {key} 32\); serve the m"
    with pytest.raises(ValueError, match=words):
        make_checkpoint(architecture, tmp_path, **{key: 32})
    profile = tmp_path / "p.safetensors"
    PruningProfile("p", {1: torch.ones(8, 64).bool()}).write(profile)
    line = refused("check", tmp_path, profile)
    assert f"config.json: {key} 32); serve the model dense" in line


def test_a_layer_whose_experts_are_missing(original, checkpoint):
    dense = {n: t for n, t in original[0].items() if not n.startswith("model.layers.1.mlp.")}
    with pytest.raises(ValueError, match="gives layer 1 routed experts, the files hold none there"):
        describe_checkpoint(checkpoint(dense))
    assert describe_checkpoint(checkpoint(dense, mlp_only_layers=[1])).layers == (0, 2)
    silent = {"decoder_sparse_step": None, "mlp_only_layers": None}
    assert describe_checkpoint(checkpoint(dense, **silent, model_type="x")).layers == (0, 2)
    with pytest.raises(ValueError, match="gives layer 1 routed experts, the files hold none there"):
        describe_checkpoint(checkpoint(dense, **silent, model_type="mixtral"))


def test_a_layout_that_is_not_known_is_named(original, checkpoint):
    name = "transformer.blocks.{}.ffn.experts.mlp.w9"
    tensors = {n: t for n, t in original[0].items() if expert_of(n) is None}
    tensors |= {name.format(layer): torch.zeros(512, 128) for layer in range(3)}
    tensors["model.layers.0.linear_attn.conv1d.weight"] = torch.zeros(16, 1, 4)
    with pytest.raises(ValueError, match="a layout that is not known: ") as refusal:
        describe_checkpoint(checkpoint(tensors))
    assert str(refusal.value).endswith(f"{name.format(0)} [512, 128]")


# Layout -> part -> name and shape, of 8 experts.
FUSED = {
    "qwen": {
        "gate_up": ("mlp.experts.gate_up_proj", (8, 128, 128)),
        "down": ("mlp.experts.down_proj", (8, 128, 64)),
    },
    "granite": {
        "gate_up": ("block_sparse_moe.input_linear.weight", (8, 128, 128)),
        "down": ("block_sparse_moe.output_linear.weight", (8, 128, 64)),
    },
    "aria": {
        "gate_up": ("mlp.experts.fc1.weight", (8, 128, 128)),
        "down": ("mlp.experts.fc2.weight", (8, 64, 128)),
    },
    "step": {
        "gate": ("moe.gate_proj.weight", (8, 64, 128)),
        "up": ("moe.up_proj.weight", (8, 64, 128)),
        "down": ("moe.down_proj.weight", (8, 128, 64)),
    },
}


@pytest.fixture
def fused(original, checkpoint):
    """Write the original with fused experts; shapes by part replace those of layer 1."""

    def write(layout, **changed):
        tensors = {n: t for n, t in original[0].items() if ".mlp." not in n}
        for layer in range(3):
            for part, (name, shape) in FUSED[layout].items():
                shape = changed.get(part, shape) if layer == 1 else shape
                block = f"model.layers.{layer}.{name.partition('.')[0]}"
                tensors[f"{block}.gate.weight"] = torch.zeros(8, 128)
                if shape is not None:
                    tensors[f"model.layers.{layer}.{name}"] = torch.zeros(shape)
        return checkpoint(tensors)

    return write


@pytest.mark.parametrize(
    ("layout", "part"), [(name, part) for name in FUSED for part in FUSED[name]]
)
def test_incomplete_fused_experts(fused, layout, part):
    info = describe_checkpoint(fused(layout))
    assert (info.num_experts, info.intermediate_size) == (8, 64)
    others = ", ".join(sorted(FUSED[layout].keys() - {part}))
    with pytest.raises(ValueError, match=f"layer 1 holds only {others} of its experts; fetch"):
        describe_checkpoint(fused(layout, **{part: None}))


@pytest.mark.parametrize(
    ("layout", "part", "shape"),
    [
        ("qwen", "gate_up", (4, 128, 128)),
        ("qwen", "gate_up", (8, 64, 128)),
        ("qwen", "down", (4, 128, 64)),
        ("granite", "gate_up", (7, 128, 128)),
        ("aria", "gate_up", (8, 128, 96)),
        ("step", "up", (4, 64, 128)),
        ("step", "gate", (8, 32, 128)),
    ],
)
def test_fused_experts_of_unequal_numbers_or_widths(fused, layout, part, shape):
    with pytest.raises(ValueError, match=r"layer 1: .* down is .*, the shapes disagree"):
        describe_checkpoint(fused(layout, **{part: shape}))


def test_experts_stored_in_two_layouts(original, checkpoint):
    tensors = {
        **original[0],
        "model.layers.1.mlp.experts.gate_up_proj": torch.zeros(8, 128, 128),
        "model.layers.1.mlp.experts.down_proj": torch.zeros(8, 128, 64),
    }
    with pytest.raises(ValueError, match="layer 1 holds experts one by one and all in one tensor"):
        describe_checkpoint(checkpoint(tensors))


def test_experts_of_another_hidden_size(checkpoint):
    words = "config.json says hidden_size 256, the down projections of layer 0 are 128 by 64; is"
    with pytest.raises(ValueError, match=words):
        describe_checkpoint(checkpoint(hidden_size=256))


@pytest.mark.parametrize("shape", [(4,), (1, 4), (9,), ()], ids=str)
def test_a_correction_bias_of_another_number_of_experts(original, checkpoint, shape):
    name = "model.layers.{}.mlp.moe_statics.e_score_correction_bias"
    tensors = {**original[0], name.format(1): torch.zeros(1, 8)}
    assert describe_checkpoint(checkpoint(tensors)).num_experts == 8
    tensors[name.format(1)] = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"layer 1 chooses among . experts \(.*_bias\), the files"):
        describe_checkpoint(checkpoint(tensors))


@pytest.mark.parametrize("number", [0, 1, 2, 4, 48])
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "of-somebody"])
def test_a_number_of_layers_that_the_files_contradict(checkpoint, number, kind):
    """With and without settings for dense layers."""
    silent = {"decoder_sparse_step": None, "mlp_only_layers": None}
    config = {"model_type": kind, **({} if kind == "qwen3_moe" else silent)}
    words = "routed experts of layer 2; is" if number < 3 else "nothing of layer 3; fetch"
    with pytest.raises(
        ValueError, match=f"says num_hidden_layers {number}, the files hold {words}"
    ):
        describe_checkpoint(checkpoint(num_hidden_layers=number, **config))
    assert describe_checkpoint(checkpoint(num_hidden_layers=3, **config)).layers == (0, 1, 2)


def test_longcat_has_twice_as_many_layers(checkpoint):
    """transformers counts every layer of it twice."""
    more = {"num_hidden_layers": 6, "num_layers": 3}
    assert describe_checkpoint(checkpoint(**more)).layers == (0, 1, 2)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_files_in_another_encoding(checkpoint, tmp_path_factory, name, encoding):
    """vLLM and transformers do not skip a byte order mark; every command refuses it in one line."""
    model = checkpoint()
    content = (model / name).read_text() if (model / name).exists() else "{}"
    (model / name).write_text(content, encoding=encoding)
    work = tmp_path_factory.mktemp("work")
    profile = work / "p.safetensors"
    PruningProfile("p", {i: torch.ones(8, 64).bool() for i in range(3)}).write(profile)
    text = work / "t.txt"
    text.write_text("text")
    what = "begins with a byte order mark" if encoding == "utf-8-sig" else "is utf-16"
    for command in (
        ("check", model, profile),
        ("calibrate", model, "--data", text, "-o", work / "s"),
        ("eval", model, "--profiles", profile, "--data", text),
        ("export", model, profile, "-o", work / "out"),
    ):
        line = refused(*command)
        assert f"{name}: {what}, which vLLM and transformers cannot read; save it as UTF-8" in line
        assert not (work / "out").exists()
    (model / name).write_text(content)
    assert describe_checkpoint(model).num_experts == 8


def test_a_dense_model_has_no_routed_experts(original, checkpoint):
    tensors = {n: t for n, t in original[0].items() if ".mlp." not in n}
    tensors["model.layers.0.conv1d.weight"] = torch.zeros(16, 1, 4)
    with pytest.raises(ValueError, match="no routed experts among"):
        describe_checkpoint(checkpoint(tensors))


@pytest.mark.parametrize("unquantized", [(), (0,)], ids=["all layers", "all but the first"])
@pytest.mark.parametrize("nested", [False, True], ids=["", "text_config"])
def test_quantized_experts_are_named(original, checkpoint, unquantized, nested):
    tensors = {}
    for name, tensor in original[0].items():
        if expert_of(name) is None or any(f".layers.{i}." in name for i in unquantized):
            tensors[name] = tensor
        else:
            stem = name.removesuffix("weight")
            tensors |= {f"{stem}{part}": torch.zeros(2, 2) for part in ("qweight", "scales")}
    how = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    config = {**how, "text_config": original[1]} if nested else how
    with pytest.raises(ValueError, match=r"model.layers.*down_proj: quantized in a way"):
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
        ({}, ("hf", {"quantization": {"quant_algo": "NVFP4"}}), "modelopt nvfp4"),
        ({}, ("hf", {"quantization": {"quant_algo": None}}), None),
        ({}, ("ize", {"bits": 4, "group_size": 128, "desc_act": False}), "gptq"),
        ({}, ("ize", {"bits": 4, "quant_method": "awq"}), "awq"),
        ({}, ("", {"zero_point": True, "q_group_size": 128, "w_bit": 4}), "awq"),
        ({}, ("ize", {"some": "thing"}), None),
        ({"quantization_config": {"quant_method": "fp8"}}, ("ize", {"bits": 4}), "fp8"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_how_a_checkpoint_is_quantized(original, tmp_path, config, file, found, nested):
    """Settings beside `text_config`, inside it, or in the quantizer's own file."""
    for told in (
        {**original[1], **config},
        {"text_config": original[1], **config},
        {"text_config": {**original[1], **config}, "architectures": ["X"]},
    ):
        (tmp_path / "config.json").write_text("\ufeff" + json.dumps(told))
        if file:
            name = {"hf": "hf_quant", "ize": "quantize", "": "quant"}[file[0]]
            (tmp_path / f"{name}_config.json").write_text(json.dumps(file[1]))
        settings = quantization_settings(tmp_path, read_config(tmp_path))
        assert quantization_name(settings) == found


def test_copies_in_other_dtypes_are_one_model(original, checkpoint):
    """The router's values decide, not their stored bytes."""
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
