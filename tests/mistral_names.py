"""A DeepSeek-V3 in the form of Mistral's published models: Mistral's names, `params.json`."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.architectures import COMMON, LATENT, ROUTED
from tests.checkpoints import make_checkpoint
from vllm_atomic_moe.files.checkpoint import CheckpointInfo, describe_checkpoint

# Of a decoder layer.
NAMES = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_a_proj": "attention.wq_a",
    "self_attn.q_a_layernorm": "attention.q_a_norm",
    "self_attn.q_b_proj": "attention.wq_b",
    "self_attn.kv_a_proj_with_mqa": "attention.wkv_a_with_mqa",
    "self_attn.kv_a_layernorm": "attention.kv_a_norm",
    "self_attn.kv_b_proj": "attention.wkv_b",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.gate.": "gate.",
    "mlp.experts": "experts",
    "mlp.shared_experts": "shared_experts",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
}
OUTSIDE = {
    "model.norm.weight": "norm.weight",
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "lm_head.weight": "output.weight",
}
PARAMS = {
    "dim": COMMON["hidden_size"],
    "n_layers": COMMON["num_hidden_layers"],
    "n_heads": COMMON["num_attention_heads"],
    "n_kv_heads": COMMON["num_attention_heads"],
    "hidden_dim": ROUTED["intermediate_size"],
    "vocab_size": COMMON["vocab_size"],
    "max_position_embeddings": COMMON["max_position_embeddings"],
    "norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "llama_4_scaling": {"original_max_position_embeddings": 8192, "beta": 0.1},
    **{key: value for key, value in LATENT.items() if key != "num_key_value_heads"},
    "moe": {
        "num_experts": ROUTED["n_routed_experts"],
        "num_experts_per_tok": ROUTED["num_experts_per_tok"],
        "expert_hidden_dim": ROUTED["moe_intermediate_size"],
        "first_k_dense_replace": 1,
        "route_every_n": 1,
        "num_shared_experts": 1,
        "routed_scale": 1.0,
        "num_expert_groups": 1,
        "num_expert_groups_per_tok": 1,
    },
}


def make_mistral_checkpoint(directory: Path) -> CheckpointInfo:
    """Write a random float32 checkpoint; its router has no correction bias."""
    make_checkpoint("deepseek_v3", directory)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    for name in ("config.json", "generation_config.json"):
        (directory / name).unlink()
    renamed = {
        mistrals_name(name): tensor
        for name, tensor in tensors.items()
        if not name.endswith("e_score_correction_bias")
    }
    save_file(renamed, directory / "consolidated.safetensors", metadata={"format": "pt"})
    (directory / "params.json").write_text(json.dumps(PARAMS))
    return describe_checkpoint(directory)


def mistrals_name(name: str) -> str:
    """Mistral's name of one of transformers' tensors."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    name = name.removeprefix("model.")
    for old, new in NAMES.items():
        name = name.replace(old, new)
    return name
