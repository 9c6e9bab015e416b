"""Checkpoints as their vendors publish them, where transformers reads them and writes others.

Each function takes the tensors and the configuration that transformers saves, and returns those of
a published checkpoint.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from vllm_atomic_moe.files.layouts import expert_tensor

Checkpoint = tuple[dict[str, torch.Tensor], dict[str, Any]]


def qwen3_vl_moe(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Checkpoint:
    """Transposed experts."""
    for name, tensor in tensors.items():
        if expert_tensor(name):
            tensors[name] = tensor.mT.contiguous()
    return tensors, config


def deepseek_v4(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Checkpoint:
    """DeepSeek's own names, of tensors and of settings."""
    names = {
        r"^model\.": "",
        r"^embed_tokens\.": "embed.",
        r"^hc_head\.hc_": "hc_head_",
        r"\.attn\.norm\.": ".attn.kv_norm.",
    }
    for old in ("mlp_layer_types", "layer_types", "rope_parameters"):
        config.pop(old)
    own = {"num_hash_layers": 1, "compress_ratios": [0, 4, 128], "topk_method": "noaux_tc"}
    return {_renamed(name, names): tensor for name, tensor in tensors.items()}, config | own


def longcat_flash(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Checkpoint:
    """Nothing of zero experts, which compute nothing; transformers saves gate and up of them."""
    own = {"zero_expert_type": "identity", "mla_scale_q_lora": True, "mla_scale_kv_lora": True}
    for name in list(tensors):
        found = expert_tensor(name)
        if found and found.expert is not None and found.expert >= config["n_routed_experts"]:
            del tensors[name]
    return tensors, config | own


def minimax_m3(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Checkpoint:
    """Dense layers under `mlp`; MiniMax's own names of settings."""
    names = {r"\.block_sparse_moe\.(gate|up|down)_proj\.": r".mlp.\1_proj."}
    index = {"sparse_num_index_heads": 2, "sparse_index_dim": 32, "sparse_topk_blocks": 16}
    sparse = {**index, "sparse_block_size": 128, "sparse_attention_freq": [0, 0, 0]}
    del config["text_config"]["mlp_layer_types"]
    config["text_config"] |= {
        "hidden_act": "swigluoai",
        "moe_layer_freq": [0, 1, 1],
        "sparse_attention_config": sparse,
    }
    config["vision_config"]["img_token_compression_config"] = {"spatial_merge_size": 2}
    return {_renamed(name, names): tensor for name, tensor in tensors.items()}, config


def _renamed(name: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        name = re.sub(old, new, name)
    return name
