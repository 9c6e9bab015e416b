"""The description of a checkpoint before it is loaded."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from threading import Event

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.architectures import COMMON, MOE, PER_EXPERT, ROPE, VISION
from tests.checkpoints import make_checkpoint, uniform_profile
from vllm_atomic_moe.convert.exporting.export import export
from vllm_atomic_moe.files.checkpoint import describe_checkpoint, resolve_model
from vllm_atomic_moe.files.layouts import ExpertTensor, expert_tensor
from vllm_atomic_moe.files.router import ExpertGroups, expert_groups
from vllm_atomic_moe.files.shards import Shards


@pytest.mark.parametrize("architecture", PER_EXPERT)
def test_both_layouts_describe_the_same_experts(tmp_path, architecture):
    per_expert = make_checkpoint(architecture, tmp_path / "a")
    fused = make_checkpoint(architecture, tmp_path / "b", layout="fused")
    assert per_expert == fused
    layers = (1, 2) if architecture == "glm4_moe" else (0, 1, 2)
    assert (per_expert.num_experts, per_expert.intermediate_size) == (8, 64)
    assert (per_expert.layers, per_expert.experts_per_token) == (layers, 2)
    assert per_expert.atoms == len(layers) * 8 * 64


BLOCK = "model.layers.12.mlp"


@pytest.mark.parametrize(
    ("rest", "found"),
    [
        ("7.gate_proj.weight", ExpertTensor(BLOCK, 12, "gate", expert=7)),
        ("7.w2.weight", ExpertTensor(BLOCK, 12, "down", expert=7)),
        ("gate_up_proj", ExpertTensor(BLOCK, 12, "gate_up")),
        ("w2.weight", ExpertTensor(BLOCK, 12, "down")),
        ("packed.down_t", ExpertTensor(BLOCK, 12, "down_t", packed=True)),
        ("packed.keep", ExpertTensor(BLOCK, 12, "keep", packed=True)),
        ("7.w2.weight_scale", None),
        ("7.gate_up_proj.weight", None),
        ("down_proj.bias", None),
        ("packed.down", None),
    ],
)
def test_names_of_expert_tensors(rest, found):
    assert expert_tensor(f"{BLOCK}.experts.{rest}") == found
    assert expert_tensor(f"{BLOCK}.shared_experts.{rest}") is None


@pytest.mark.parametrize(
    "name", ["block_sparse_moe.down_proj", "moe.input_linear", "moe.shared.down_proj"]
)
def test_names_that_end_like_another_layouts(name):
    """Step's `moe.down_proj` has all experts; another block's name may end in the same way."""
    assert expert_tensor(f"model.layers.12.{name}.weight") is None


def test_digest_covers_only_the_router(tmp_path):
    info = make_checkpoint("qwen2_moe", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)

    def changed(name: str):
        save_file({**tensors, name: tensors[name] + 1}, path)
        return describe_checkpoint(tmp_path)

    assert changed("model.layers.1.mlp.experts.0.up_proj.weight") == info
    assert changed("model.layers.1.mlp.shared_expert_gate.weight") == info
    assert changed("model.layers.1.mlp.gate.weight") != info


def test_digest_does_not_depend_on_sharding(tmp_path):
    info = make_checkpoint("qwen3_moe", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    weight_map = {}
    for index, name in enumerate(tensors):
        weight_map[name] = f"model-{index % 3}.safetensors"
    for shard in set(weight_map.values()):
        part = {name: tensors[name] for name, file in weight_map.items() if file == shard}
        save_file(part, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    save_file({"stray": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    assert describe_checkpoint(tmp_path) == info
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names model-1.safetensors, which is not there"):
        describe_checkpoint(tmp_path)


def test_prediction_layers_are_left_out(tmp_path):
    """Also if they have fewer experts than the model, of another size."""
    info = make_checkpoint("qwen3_moe", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    extra = {
        name.replace("layers.1.", "layers.3."): tensor[: len(tensor) // 2].clone()
        for name, tensor in tensors.items()
        if "layers.1." in name and not re.search(r"experts\.[4-7]\.", name)
    }
    for prefix in ("mtp.", "model.mtp."):
        extra |= {
            f"{prefix}{name.removeprefix('model.').replace('.3.', '.0.')}": tensor.clone()
            for name, tensor in extra.items()
            if name.startswith("model.layers.")
        }
    config = json.loads((tmp_path / "config.json").read_text())
    save_file({**tensors, **extra}, path)
    for change in ({"num_nextn_predict_layers": 1}, {"num_mtp_modules": 3}):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        assert describe_checkpoint(tmp_path) == info
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"num_hidden_layers 3, the files hold .* of layer 3; is"):
        describe_checkpoint(tmp_path)
    extra["model.layers.3.eh_proj.weight"] = torch.zeros(128, 256)
    save_file({**tensors, **extra}, path)
    assert describe_checkpoint(tmp_path) == info


@pytest.mark.parametrize(
    ("architecture", "layers", "name"),
    [
        ("mixtral", range(3), "block_sparse_moe.e_score_correction_bias"),
        ("step3p5", range(1, 3), "moe.router_bias"),
    ],
)
def test_digest_covers_a_correction_bias_beside_the_gate(tmp_path, architecture, layers, name):
    make_checkpoint(architecture, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    digests = set()
    for value in (0.0, 1.0):
        bias = {f"model.layers.{layer}.{name}": torch.full((8,), value) for layer in layers}
        save_file({**tensors, **bias}, path)
        digests.add(describe_checkpoint(tmp_path).router.sha256)
    assert len(digests) == 2


def test_two_moe_blocks_in_one_layer_are_refused(tmp_path):
    make_checkpoint("qwen3_moe", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    twin = {f"thinker.{name}": t.clone() for name, t in tensors.items() if "experts" in name}
    save_file({**tensors, **twin}, path)
    with pytest.raises(ValueError, match="one MoE block per decoder layer"):
        describe_checkpoint(tmp_path)


def test_the_thinker_of_qwen3_omni_is_the_model(tmp_path):
    """Its talker has experts too: four in each of four layers, which vLLM leaves out."""
    model, out = tmp_path / "model", tmp_path / "out"
    save_qwen3_omni(model)
    info = describe_checkpoint(model)
    assert (info.num_experts, info.intermediate_size, info.hidden_size) == (8, 64, 128)
    assert info.blocks == {layer: f"thinker.model.layers.{layer}.mlp" for layer in range(3)}
    profile = tmp_path / "fewer.safetensors"
    uniform_profile(info, 6, 64).write(profile)
    export(str(model), profile, out, plain=True)
    assert describe_checkpoint(out).num_experts == 6
    [shard] = out.glob("*.safetensors")
    before, after = load_file(model / "model.safetensors"), load_file(shard)
    talker = [name for name in before if name.startswith("talker.")]
    assert any("experts" in name for name in talker)
    assert all(torch.equal(before[name], after[name]) for name in talker)


def save_qwen3_omni(directory) -> None:
    text = {
        **COMMON,
        **MOE,
        "head_dim": 32,
        "rope_parameters": {**ROPE, "mrope_section": [8, 4, 4]},
    }
    fewer = {"num_experts": 4, "num_hidden_layers": 4, "shared_expert_intermediate_size": 96}
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    audio = {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    config = transformers.Qwen3OmniMoeConfig(
        thinker_config={
            "text_config": text,
            "vision_config": {
                **VISION,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
            "audio_config": {
                **audio,
                "d_model": 32,
                "num_mel_bins": 16,
                "output_dim": 128,
                "downsample_hidden_size": 16,
            },
        },
        talker_config={
            "text_config": text | fewer,
            "thinker_hidden_size": 128,
            "accept_hidden_layer": 1,
            "spatial_merge_size": 2,
            "num_code_groups": 2,
            "code_predictor_config": {**COMMON, **small, "num_code_groups": 2},
        },
        code2wav_config={
            **small,
            "decoder_dim": 32,
            "codebook_size": 16,
            "num_quantizers": 2,
            "upsample_rates": [2],
            "upsampling_ratios": [2],
        },
    )
    model = transformers.Qwen3OmniMoeForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():  # transformers leaves some of them uninitialized
            parameter.normal_()
    model.save_pretrained(directory)


def test_hub_models_are_fetched_with_their_profiles(tmp_path, monkeypatch):
    """The patterns asked of the hub, matched by the hub's own rules."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_model("org/model", "main", "/cache") == tmp_path
    assert (asked["name"], asked["revision"], asked["cache_dir"]) == ("org/model", "main", "/cache")
    files = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "atomic_profiles/heapr-25.safetensors",
        "atomic_weights/model.safetensors.index.json",
        "atomic_weights/model-00001-of-00001.safetensors",
        "LICENSE",
        "pytorch_model.bin",
        "consolidated.safetensors",
        "original/consolidated.safetensors",
    ]
    fetched = filter_repo_objects(
        files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(fetched) == files[:8]
    # Where Mistral's own files are the only ones.
    (tmp_path / "params.json").touch()
    resolve_model("org/model")
    fetched = filter_repo_objects(
        ["params.json", *files[-2:]],
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    )
    assert list(fetched) == ["params.json", "consolidated.safetensors"]


def test_number_of_experts_may_have_either_name(tmp_path):
    info = make_checkpoint("qwen3_moe", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_experts_per_token"] = config.pop("num_experts_per_tok") + 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert describe_checkpoint(tmp_path) == replace(info, experts_per_token=3)


def test_expert_groups_of_the_router(tmp_path):
    assert make_checkpoint("qwen3_moe", tmp_path / "plain").groups is None
    assert make_checkpoint("glm4_moe", tmp_path / "m").groups == ExpertGroups(2, 1, biased=True)
    config = json.loads((tmp_path / "m" / "config.json").read_text())

    def groups_of(**change):
        (tmp_path / "m" / "config.json").write_text(json.dumps({**config, **change}))
        return describe_checkpoint(tmp_path / "m").groups

    for change in (
        {"n_group": 1},
        {"n_group": None, "topk_group": None},
        {"n_group": 3},
        {"use_grouped_topk": False},
    ):
        assert groups_of(**change) is None
    kimi = {"n_group": None, "num_expert_group": 4, "topk_group": 2}
    assert groups_of(**kimi) == ExpertGroups(4, 2, biased=True)
    for change, words in (
        ({"n_group": "2"}, "config.json: its router chooses 1 of '2' groups of experts"),
        ({"topk_group": 0}, "config.json: its router chooses 0 of 2 groups"),
        (
            {"num_experts_per_tok": 5},
            "use 5 experts, wanted 1 to 4 of the 1 groups that its router",
        ),
        ({"num_experts_per_tok": 9, "n_group": 1}, "a token use 9 experts, wanted 1 to 8; is this"),
        ({"num_experts_per_tok": 0}, "a token use 0 experts, wanted 1 to 4"),
    ):
        with pytest.raises(ValueError, match=words):
            groups_of(**change)


@pytest.mark.parametrize(
    ("counts", "chosen", "top_k", "biased", "words"),
    [
        ([4, 4, 4], 1, 4, False, None),
        (
            [4, 3, 4],
            1,
            4,
            False,
            r"leaves \[4, 3, 4\] experts .* the 1 it chooses may hold 3, a tok",
        ),
        ([4, 0, 4], 1, 4, False, None),
        ([4, 0, 1], 2, 4, False, None),
        ([4, 1, 2], 2, 4, False, r"the 2 it chooses may hold 3, a token uses 4"),
        ([1, 1, 1], 3, 3, True, None),
        ([3, 1, 3], 2, 3, True, r"leaves \[3, 1, 3\] .* scores by their two best; keep at least"),
        ([3, 1, 3], 2, 3, False, None),
        ([3, 1, 0], 2, 3, True, None),
        ([2, 2, 2], 1, 2, True, None),
    ],
)
def test_group_rule(counts, chosen, top_k, biased, words):
    routable = torch.cat([torch.arange(4) < count for count in counts])
    fault = ExpertGroups(len(counts), chosen, biased).fault(routable, top_k)
    assert (fault is None) == (words is None)
    assert words is None or re.search(words, fault)


@pytest.mark.parametrize(
    ("number", "chosen"),
    [(None, None), (8, None), (None, 4), (1, 1), (1, 0), (0, 0), (-1, 1), (3, 1), (8, 2), (16, 1)],
)
def test_configurations_without_groups(number, chosen):
    """As in vLLM's routers: too few groups, or groups of unequal size, mean none."""
    assert expert_groups(number, chosen, True, 8) is None


@pytest.mark.parametrize(
    ("number", "chosen"),
    [("2", 1), (2, "1"), (2.0, 1), (True, 1), (2, 0), (2, -1), (2, 3), (2, [1])],
)
def test_groups_that_no_router_can_use(number, chosen):
    with pytest.raises(ValueError, match=r"its router chooses .* groups of experts, wanted two"):
        expert_groups(number, chosen, True, 8)


def test_refusals(tmp_path, monkeypatch):
    make_checkpoint("qwen3_moe", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)

    def refused(words: str, kept) -> None:
        save_file({name: t for name, t in tensors.items() if kept(name)}, path)
        with pytest.raises(ValueError, match=words):
            describe_checkpoint(tmp_path)

    refused("no routed experts among", lambda name: "experts" not in name)
    refused("no router tensor under model.layers.0.mlp.gate", lambda name: "gate.w" not in name)
    refused(
        r"layers have \[7, 8\] experts",
        lambda name: not name.startswith("model.layers.1.mlp.experts.7."),
    )
    path.unlink()
    with pytest.raises(ValueError, match=r"holds no \*.safetensors file"):
        describe_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds list, wanted a JSON object"):
        describe_checkpoint(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="neither a directory nor on the Hugging Face Hub"):
        resolve_model(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": "x"}, "`num_hidden_layers` is 'x', wanted a number"),
        ({"architectures": 7}, "`architectures` is 7, wanted a list of names"),
        ({"hidden_size": None}, "`hidden_size` is None, wanted a number"),
    ],
)
def test_configurations_of_wrong_types_are_refused(tmp_path, change, words):
    make_checkpoint("qwen3_moe", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=words):
        describe_checkpoint(tmp_path)


def test_a_configuration_may_leave_the_number_of_layers_open(tmp_path):
    wanted = make_checkpoint("qwen3_moe", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": None}))
    assert describe_checkpoint(tmp_path) == wanted


def test_shards_are_closed_while_threads_read(tmp_path):
    """transformers' threads continue for a while after one of them fails."""
    save_file({f"t{index}": torch.ones(9, 9) for index in range(9)}, tmp_path / "model.safetensors")
    over = Event()

    def read(shards: Shards) -> None:
        with suppress(ValueError):
            while not over.is_set():
                for name in shards.where:
                    shards.tensor(name)

    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            over.clear()
            try:
                with Shards(tmp_path) as shards:
                    readers = [pool.submit(read, shards) for _ in range(4)]
            finally:
                over.set()
            for reader in readers:
                reader.result()
