"""The parts of quantized checkpoints, and the packed rows made from them."""

from __future__ import annotations

import functools
import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile

from tests.checkpoints import make_checkpoint
from tests.kernel_suite import SPELLED, make_experts, ragged, routed
from tests.quantized import FORMATS, SCHEMES, SETTINGS, quantize_checkpoint
from vllm_atomic_moe.experts.encoding import encode
from vllm_atomic_moe.experts.formats import TABLES, decode
from vllm_atomic_moe.experts.packing import PackedExperts, build_layout
from vllm_atomic_moe.files.checkpoint import describe_checkpoint
from vllm_atomic_moe.files.quantization import IGNORED, Scheme, scheme_of_down
from vllm_atomic_moe.files.row_formats import PROJECTIONS

H, FULL = 192, 96


def parts_of(quantized: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: part for name, part in quantized.items() if name not in IGNORED}


def scheme_of(name: str, hidden: int = H, full: int = FULL) -> Scheme:
    down = parts_of(FORMATS[name](torch.randn(hidden, full))[0])
    told = {part: (SPELLED[value.dtype], (*value.shape,)) for part, value in down.items()}
    scheme, size = scheme_of_down("down", told, hidden, {})
    assert size == full
    return scheme


@pytest.mark.parametrize("name", FORMATS)
def test_decodes_to_the_meanings_of_codes(name):
    generator = torch.Generator().manual_seed(0)
    for projection in PROJECTIONS:
        shape = (H, FULL) if projection == "down" else (FULL, H)
        parts, dense = FORMATS[name](torch.randn(shape, generator=generator))
        scheme = scheme_of(name)
        rows = encode(scheme, projection, parts_of(parts), H, FULL)
        found = decode(rows, scheme.row_format(H, FULL), projection)
        assert torch.equal(found.t() if projection == "down" else found, dense)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_reference_gives_the_bits_of_plain_rows(name, dtype):
    masks = {"a": ragged(), "b": ragged(1)}
    codes = make_experts(masks, dtype, "reference", hidden_size=96, quantize=FORMATS[name])
    plain = make_experts(masks, dtype, "reference", hidden_size=96)
    for expert in range(len(ragged())):
        for projection, dense in zip(PROJECTIONS, codes.dense, strict=True):
            matrix = dense[expert]
            plain.packed.load_expert(
                expert, projection, matrix.t() if projection == "down" else matrix
            )
    x, weights, ids = routed(20, 4, 9, dtype, hidden_size=96)
    names = ["a", "b"] * 10
    assert torch.equal(codes(x, weights, ids, names), plain(x, weights, ids, names))


def test_default_dtype_changes_nothing():
    """vLLM builds layers while torch's default dtype is the model's."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = make_experts(
            {"a": ragged()}, torch.float32, "reference", hidden_size=96, quantize=FORMATS["nvfp4"]
        )
    finally:
        torch.set_default_dtype(torch.float32)
    factors = made.packed.scales[TABLES.index("factors") :: len(TABLES)]
    assert [factor.dtype for factor in factors] == [torch.float32] * 3


@pytest.mark.parametrize("name", ["plain", *FORMATS])
def test_temporary_memory_of_a_matrix_that_loads(name):
    """Next to none for plain rows; 2.5 bytes per code, less than half an expert in 16 bits."""
    hidden, full, quantize = 512, 256, FORMATS.get(name)
    whole = {"a": torch.ones(1, full, dtype=torch.bool)}
    packed = make_experts(
        whole, torch.bfloat16, "cpu", hidden_size=hidden, quantize=quantize
    ).packed
    for projection in PROJECTIONS:
        matrix = torch.randn((hidden, full) if projection == "down" else (full, hidden))
        if quantize is None:
            load = functools.partial(packed.load_expert, 0, projection, matrix.bfloat16())
        else:
            scheme = scheme_of(name, hidden, full)
            load = functools.partial(
                _load, packed, scheme, projection, parts_of(quantize(matrix)[0])
            )
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            load()
        events = profiler.profiler.kineto_results.events()
        changes = [it.nbytes() for it in events if it.name() == "[memory]"]
        peak = max(itertools.accumulate(changes), default=0)
        assert (peak > hidden) == (quantize is not None)
        assert peak < 2.6 * hidden * full, peak / (hidden * full)


def _load(packed, scheme, projection, parts):
    sizes = packed.hidden_size, packed.layout.intermediate_size
    packed.load_encoded(0, projection, encode(scheme, projection, parts, *sizes))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    directory = tmp_path_factory.mktemp("quantized") / "original"
    sizes = {"hidden_size": H, "moe_intermediate_size": FULL, "num_hidden_layers": 2}
    make_checkpoint("qwen3_moe", directory, **sizes)
    return directory


@pytest.mark.parametrize("name", FORMATS)
def test_describes_quantized_checkpoints_as_their_originals(original, tmp_path, name):
    plain = quantize_checkpoint(original, tmp_path / "model", name)
    found, wanted = describe_checkpoint(tmp_path / "model"), describe_checkpoint(plain)
    assert found.identity() == wanted.identity()
    assert {scheme.kind for scheme in wanted.schemes.values()} == {"plain"}
    (kind,) = {scheme.kind for scheme in found.schemes.values()}
    assert kind != "plain"


@pytest.mark.parametrize("scales", [torch.float32, torch.float8_e8m0fnu])
def test_deepseek_v4_spells_scales_otherwise(original, tmp_path, scales):
    model = tmp_path / "model"
    quantize_checkpoint(original, model, "fp8-block")
    wanted = describe_checkpoint(model).identity()
    path = model / "model.safetensors"
    tensors = {
        name.replace("weight_scale_inv", "scale"): (
            tensor.to(scales) if name.endswith("_inv") else tensor
        )
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path)
    if scales == torch.float32:
        assert describe_checkpoint(model).identity() == wanted
    else:
        words = "in a way that is not known: .*weight_scale_inv F8_E8M0"
        with pytest.raises(ValueError, match=words):
            describe_checkpoint(model)


DOWN = "model.layers.1.mlp.experts.3.down_proj"
FIRST_UP = "model.layers.1.mlp.experts.0.up_proj.g_idx"


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (
            "fp8-block",
            lambda tensors: tensors.pop(f"{DOWN}.weight_scale_inv"),
            r"experts.3.down_proj: weight is float8 and has no weight_scale",
        ),
        (
            "fp8-block",
            lambda tensors: tensors.pop(DOWN.replace("down", "up") + ".weight_scale_inv"),
            r"layer 1 has 8 experts and 7 times weight_scale_inv of up",
        ),
        (
            "fp8-block",
            lambda tensors: tensors.update({f"{DOWN}.weight_scale_inv": torch.ones(3, 3)}),
            r"weight_scale_inv is \[3, 3\], wanted \[2, 1\] for blocks of 128x128",
        ),
        (
            "int4",
            lambda tensors: tensors.update(
                {f"{DOWN}.weight_packed": torch.zeros(H, 6, dtype=torch.int32)}
            ),
            r"down_proj: quantized as int4 g16, others of its layer as int4 g32",
        ),
        (
            "int4",
            lambda tensors: tensors.update(
                {f"{DOWN}.weight_packed": torch.zeros(H, FULL, dtype=torch.int8)}
            ),
            r"quantized in a way that is not known: .*weight_packed I8",
        ),
        (
            "fp8-channel",
            lambda tensors: [
                tensors.update({name.removesuffix("_scale"): torch.zeros(H, FULL)})
                for name in list(tensors)
                if name.endswith("down_proj.weight_scale") and tensors.pop(name) is not None
            ],
            r"layer 0: (gate|up) of its experts has weight_scale, down_proj is plain",
        ),
        (
            "gptq",
            lambda tensors: tensors.update({FIRST_UP: tensors[FIRST_UP].flip(0).contiguous()}),
            r"not served by this version: activation order in up_proj \(model.layers.1",
        ),
    ],
    ids=["no scale", "no scale of up", "shape", "size", "dtype", "plain down", "order"],
)
def test_checkpoints_that_contradict_themselves(original, tmp_path, name, change, words):
    quantize_checkpoint(original, tmp_path / "model", name)
    path = tmp_path / "model/model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=words) as refused:
        describe_checkpoint(tmp_path / "model")
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("int4", None, "config.json has no quantization_config"),
        ("int4", {"quant_method": "awq"}, "quantized as int4 .*, config.json says awq"),
        ("gptq", {"quant_method": "gptq", "sym": False}, "GPTQ with sym False"),
        (
            "awq",
            {"quant_method": "awq", "group_size": 128},
            "of 128 inputs, .* scales of 32",
        ),
        (
            "int4",
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"a": {"weights": {"num_bits": 4, "strategy": "channel"}}},
            },
            "groups of all inputs, the files hold scales of 32",
        ),
        ("fp8-block", {**SETTINGS["fp8-block"], "weight_block_size": [64, 64]}, "wanted .* 64x64"),
        ("fp8-block", {**SETTINGS["fp8-block"], "weight_block_size": 128}, "blocks of 128, wanted"),
        ("fp8-channel", SETTINGS["fp8-block"], "a scale per block, the files hold one per channel"),
        ("fp8-tensor", SETTINGS["fp8-block"], "a scale per block, the files hold one per tensor"),
        ("fp8-block", SETTINGS["fp8-channel"], "per channel, the files hold one per block"),
        (
            "fp8-channel",
            {"quant_method": "fbgemm_fp8"},
            "the quantization method fbgemm_fp8",
        ),
        ("awq", {"quant_method": "awq", "q_group_size": 64}, "of 64 inputs, .* scales of 32"),
        ("fp8-block", ["fp8"], "config.json has no quantization_config"),
        ("nvfp4-modelopt", {"quant_method": "modelopt", "quant_algo": ["FP8"]}, r"says \['FP8'\]"),
        ("fp8-block", SETTINGS["fp8-modelopt"], "per tensor, the files hold one per block"),
    ],
)
def test_config_must_agree_with_the_tensors(original, tmp_path, name, settings, words):
    quantize_checkpoint(original, tmp_path / "model", name)
    path = tmp_path / "model/config.json"
    config = json.loads(path.read_text()) | {"quantization_config": settings}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words):
        describe_checkpoint(tmp_path / "model")


SAME = {("fp8-tensor", "fp8-modelopt"), ("fp8-modelopt", "fp8-tensor")}


@pytest.mark.parametrize("name", FORMATS)
def test_settings_of_every_other_format_are_refused(original, tmp_path, name):
    quantize_checkpoint(original, tmp_path / "model", name)
    path = tmp_path / "model/config.json"
    config = json.loads(path.read_text())
    for other, settings in SETTINGS.items():
        path.write_text(json.dumps(config | {"quantization_config": settings}))
        if other == name or (name, other) in SAME:
            describe_checkpoint(tmp_path / "model")
            continue
        with pytest.raises(ValueError, match=r"config.json says|^not served|wanted .* blocks"):
            describe_checkpoint(tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("int4", {"symmetric": False}, "not served by this version: asymmetric weights"),
        ("int4", {"num_bits": 8}, "not served by this version: integers of 8 bits"),
        ("gptq", {"checkpoint_format": "marlin"}, "GPTQ with checkpoint_format 'marlin'"),
        ("awq", {"zero_point": False}, "AWQ with zero_point False"),
        ("awq", {"bits": 8}, "AWQ with bits 8"),
        ("awq", {"version": "gemv"}, "AWQ with version 'gemv'"),
        ("fp8-block", {"fmt": "e5m2"}, "FP8 with fmt 'e5m2'"),
    ],
)
def test_settings_that_are_not_served(original, tmp_path, name, change, words):
    quantize_checkpoint(original, tmp_path / "model", name)
    path = tmp_path / "model/config.json"
    config = json.loads(path.read_text())
    settings = config["quantization_config"]
    groups = settings.get("config_groups")
    (groups["group_0"]["weights"] if groups else settings).update(change)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words):
        describe_checkpoint(tmp_path / "model")


@pytest.mark.parametrize(
    ("targets", "bits_of_experts"),
    [
        ({"4": [r"re:.*self_attn.*"], "8": [r"re:.*mlp\.experts.*"]}, 8),
        ({"8": [r"re:.*self_attn.*"], "4": [r"re:.*mlp\.experts.*"]}, 4),
        # A pattern goes before a class, in either order.
        ({"4": ["Linear"], "8": [r"re:.*experts\.\d+\.(gate|up|down)_proj$"]}, 8),
        (
            {
                "4": [
                    f"model.layers.{layer}.mlp.experts.{expert}.down_proj"
                    for layer in range(2)
                    for expert in range(8)
                ],
                "8": ["Linear"],
            },
            4,
        ),
        ({"4": ["re:("], "8": ["Linear"]}, 8),
        # The first pattern counts; the class of attention is not that of experts.
        ({"8": ["re:.*mlp.*"], "4": ["re:.*experts.*"]}, 8),
        ({"4": ["Qwen3MoeAttention"], "8": ["Linear"]}, 8),
    ],
)
def test_groups_for_other_matrices_do_not_count(original, tmp_path, targets, bits_of_experts):
    """Attention of 4 bits beside experts of 8, and the reverse."""
    bits = {"4": {"num_bits": 4, "group_size": 32}, "8": {"num_bits": 8, "group_size": 64}}
    groups = {
        key: {
            "targets": targets[key],
            "weights": {"type": "int", "strategy": "group", "symmetric": True, **bits[key]},
        }
        for key in targets
    }
    quantize_checkpoint(original, tmp_path / "model", "int4")
    config, model = tmp_path / "model/config.json", tmp_path / "model/model.safetensors"
    told = json.loads(config.read_text())
    told["quantization_config"]["config_groups"] = groups
    config.write_text(json.dumps(told))
    if bits_of_experts == 4:
        assert describe_checkpoint(tmp_path / "model").scheme(0).name == "int4 g32"
        return
    tensors = load_file(model)
    for name, tensor in tensors.items():
        if name.endswith("weight_packed"):  # 4 of 8 bits in an element
            tensors[name] = torch.cat([tensor, tensor], dim=1)
    save_file(tensors, model)
    with pytest.raises(ValueError, match="not served by this version: integers of 8 bits"):
        describe_checkpoint(tmp_path / "model")


def test_groups_go_by_the_names_of_the_checkpoint(tmp_path):
    """Mixtral's down_proj is w2."""
    make_checkpoint("mixtral", tmp_path / "original", hidden_size=H, intermediate_size=FULL)
    quantize_checkpoint(tmp_path / "original", tmp_path / "model", "int4")
    path = tmp_path / "model/config.json"
    config = json.loads(path.read_text())
    groups = config["quantization_config"]["config_groups"]
    pattern = r"re:.*block_sparse_moe\.experts\.\d+\.w[123]$"
    attention = {"num_bits": 8, "type": "float", "strategy": "channel"}
    config["quantization_config"]["config_groups"] = {
        "a": {"targets": ["Linear"], "weights": attention},
        "b": {**groups["group_0"], "targets": [pattern]},
    }
    path.write_text(json.dumps(config))
    assert describe_checkpoint(tmp_path / "model").scheme(0).name == "int4 g32"


@pytest.mark.parametrize("first", [64, 32])
def test_every_layer_is_held_to_its_own_settings(original, tmp_path, first):
    quantize_checkpoint(original, tmp_path / "model", "int4")
    path = tmp_path / "model/config.json"
    config = json.loads(path.read_text())
    [group] = config["quantization_config"]["config_groups"].values()
    config["quantization_config"]["config_groups"] = {
        str(layer): {
            **group,
            "targets": [rf"re:.*layers\.{layer}\..*"],
            "weights": {**group["weights"], "group_size": size},
        }
        for layer, size in ((0, first), (1, 96 - first))
    }
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="groups of 64 inputs, the files hold scales of 32"):
        describe_checkpoint(tmp_path / "model")


@pytest.mark.parametrize("name", ["nvfp4-modelopt", "fp8-modelopt"])
def test_modelopt_may_describe_its_weights_as_compressed_tensors_does(original, tmp_path, name):
    quantize_checkpoint(original, tmp_path / "model", name)
    path = tmp_path / "model/config.json"
    config = json.loads(path.read_text())
    bits = 4 if name.startswith("nvfp4") else 8
    weights = {"dynamic": False, "num_bits": bits, "type": "float"}
    if bits == 4:
        weights["group_size"] = 16
    groups = {"group_0": {"weights": weights, "targets": ["Linear"]}}
    config["quantization_config"]["config_groups"] = groups
    path.write_text(json.dumps(config))
    assert describe_checkpoint(tmp_path / "model").scheme(0).kind.startswith(name[:3])
    weights["num_bits"] = 12 - bits
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"config.json says {12 - bits} bits, type 'float'"):
        describe_checkpoint(tmp_path / "model")


def test_both_versions_of_gptq_are_served(original, tmp_path):
    """Of symmetric weights, only the stored zero points differ: 7, or 8 in version 2."""
    quantize_checkpoint(original, tmp_path / "model", "gptq")
    path = tmp_path / "model/config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    path.write_text(json.dumps(config))
    scheme = describe_checkpoint(tmp_path / "model").scheme(0)
    one, _ = FORMATS["gptq"](torch.randn(FULL, H))
    two = {**one, "qzeros": torch.full_like(one["qzeros"], -0x77777778)}
    assert torch.equal(
        *(
            decode(encode(scheme, "up", parts, H, FULL), scheme.row_format(H, FULL), "up")
            for parts in (one, two)
        )
    )


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ("weight_zero_point", "asymmetric weights"),
        ("weight_g_idx", r"activation order \(model.layers.0.mlp.experts.0.down_proj"),
    ],
)
def test_other_parts_of_compressed_tensors_are_refused_by_name(original, tmp_path, part, reason):
    quantize_checkpoint(original, tmp_path / "model", "int4")
    path = tmp_path / "model/model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith("down_proj.weight_scale")]:
        tensors[name.replace("weight_scale", part)] = torch.zeros(24, 3, dtype=torch.int32)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=f"not served by this version: {reason}"):
        describe_checkpoint(tmp_path / "model")


@pytest.mark.parametrize("name", ["int4", "gptq", "awq"])
def test_one_group_of_down_is_one_of_many_of_gate(tmp_path, name):
    """If I is the group size, scales of gate are still one per group of inputs."""
    make_checkpoint("qwen3_moe", tmp_path / "original", moe_intermediate_size=32)
    quantize_checkpoint(tmp_path / "original", tmp_path / "model", name)
    scheme = describe_checkpoint(tmp_path / "model").scheme(0)
    assert (scheme.rows, scheme.columns) == (1, 32)
    parts, dense = FORMATS[name](torch.randn(32, 128))
    rows = encode(scheme, "gate", parts_of(parts), 128, 32)
    assert torch.equal(decode(rows, scheme.row_format(128, 32), "gate"), dense)


def test_a_truncated_shard(original, tmp_path):
    quantize_checkpoint(original, tmp_path / "model", "nvfp4")
    path = tmp_path / "model/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        describe_checkpoint(tmp_path / "model")


@pytest.mark.parametrize("ratio", [0.25, 0.5])
@pytest.mark.parametrize("name", SCHEMES)
def test_resident_bytes_follow_the_kept_atoms(name, ratio):
    """At most two points more, for scales that atoms share, at a real model's sizes."""
    hidden, size, experts = 2048, 768, 4
    keep = torch.rand(experts, size, generator=torch.Generator().manual_seed(0)) >= ratio
    rows = SCHEMES[name].row_format(hidden, size)
    packed = PackedExperts(build_layout({"a": keep}), hidden, torch.bfloat16, row_format=rows)
    whole = experts * rows.expert_bytes(hidden, size, itemsize=2)
    assert -1e-6 < packed.weight_bytes / whole - keep.double().mean() < 0.02
