"""The dense layers of config.json, compared with the models that transformers builds."""

import pytest
import torch
import transformers

from vllm_atomic_moe.files.config import DENSE_LAYERS, dense_layers, read_config
from vllm_atomic_moe.files.layouts import decoder_layer

SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
ATTENTION = {"layer_types": ["full_attention"] * 4}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Qwen3Moe", {"decoder_sparse_step": 2}),
        ("Qwen3Moe", {"mlp_only_layers": [1]}),
        ("Qwen3Next", {"decoder_sparse_step": 2}),
        ("DeepseekV3", {"first_k_dense_replace": 2}),
        ("DeepseekV32", {"first_k_dense_replace": 2}),
        ("Afmoe", {"num_dense_layers": 2}),
        ("Lfm2Moe", {"num_dense_layers": 2, **ATTENTION}),
        ("Ernie4_5_Moe", {"moe_layer_start_index": 1, "moe_layer_end_index": 2}),
        ("Ernie4_5_Moe", {"moe_layer_start_index": 0, "moe_layer_interval": 2}),
        ("Ernie4_5_Moe", {"moe_layer_start_index": 3, "moe_layer_end_index": -1}),
        ("Llama4Text", {"interleave_moe_layer_step": 2}),
        ("Llama4Text", {"moe_layers": [0, 3]}),
        ("Jamba", {"expert_layer_period": 3, "expert_layer_offset": 2}),
        ("ExaoneMoe", {"first_k_dense_replace": 2}),
        ("Cohere2Moe", {"first_k_dense_replace": 1}),
        ("Laguna", {}),
        ("KimiLinear", {}),
        ("InklingText", {"dense_mlp_idx": 2}),
        ("AriaText", {}),
        ("FlexOlmo", {}),
        ("Gemma4Text", {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}),
        ("GptOss", {}),
        ("GraniteMoe", {}),
        ("GraniteMoeHybrid", {}),
        ("GraniteMoeShared", {}),
        ("MiniMaxM2", {}),
        ("Mixtral", {}),
        ("Olmoe", {}),
        ("Phimoe", {}),
        ("Qwen3_5MoeText", {}),
    ],
    ids=str,
)
def test_dense_layers_are_those_of_the_model(tmp_path, name, settings):
    config_class = getattr(transformers, f"{name}Config", None)
    if config_class is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config = config_class(**{**SMALL, **settings})
    with torch.device("meta"):
        names = transformers.AutoModelForCausalLM.from_config(config).state_dict()
    config.save_pretrained(tmp_path)
    dense = dense_layers(read_config(tmp_path))
    assert dense is not None
    assert set(range(4)) - dense.keys() == {decoder_layer(n) for n in names if ".experts." in n}


# Of the published configurations that transformers rewrites, or does not know.
@pytest.mark.parametrize(
    ("settings", "dense"),
    [
        ({"moe_layers_enum": "1,3"}, [0, 2]),
        ({"moe_layers_enum": [1, 3]}, [0, 2]),
        ({"hybrid_override_pattern": "ME*E"}, [0, 2]),
        ({"layers_block_type": ["mamba", "moe", "attention", "moe"]}, [0, 2]),
        ({"layer_types": ["linear_attention", "moe", "mlp", "moe"]}, [0, 2]),
        ({"moe_layer_freq": [0, 1, 0, 1]}, [0, 2]),
        ({"moe_layer_freq": 2, "first_k_dense_replace": 1}, [0, 1, 3]),
        ({"interleave_moe_layer_step": 0}, [0, 1, 2, 3]),
        ({"dense_mlp_idx": 1}, [0]),
        ({"mlp_layer_types": ["hash_moe", "moe", "dense", "sparse"]}, [2]),
        ({"mlp_layer_types": ["sparse"] * 4, "first_k_dense_replace": 1}, []),
        ({"mlp_only_layers": []}, []),
        ({"expert_layer_period": 2, "expert_layer_offset": 1, "layers_block_type": ["x"]}, [0, 2]),
    ],
    ids=str,
)
def test_dense_layers_agree_with_vllm(settings, dense):
    found = dense_layers({"num_hidden_layers": 4, **settings})
    assert found is not None
    assert sorted(found) == dense


@pytest.mark.parametrize(
    "value", [["x"], {"a": 1}, "0,a", 0.5, [[1]], "", -2, 0, [], True], ids=str
)
@pytest.mark.parametrize("key", DENSE_LAYERS)
def test_no_value_makes_reading_fail(key, value):
    found = dense_layers({"num_hidden_layers": 4, key: value})
    assert found is None or set(found) <= set(range(4))


@pytest.mark.parametrize(
    "settings",
    [
        ATTENTION,
        {"moe_layer_freq": "0,1,1,1"},
        {"moe_layer_freq": [0, 1]},
        {"mlp_layer_types": ["dense", "strange", "sparse", "sparse"]},
        {"moe_layer_start_index": [1, 1], "moe_layer_end_index": [3, 3]},
        {"decoder_sparse_step": 0},
        {"moe_layers": 3},
        {"model_type": "mixtral", "num_hidden_layers": None},
        {"model_type": "of-somebody"},
        {"mlp_only_layers": [], "num_layers": 2},
    ],
    ids=str,
)
def test_unknown_ways_to_name_dense_layers_are_ignored(settings):
    assert dense_layers({"num_hidden_layers": 4, **settings}) is None
