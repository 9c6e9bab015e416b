"""Tiny checkpoints that can be calibrated: a random model with a tokenizer, and text for it."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

from tests import checkpoints
from vllm_atomic_moe.files.checkpoint import CheckpointInfo, describe_checkpoint

CONTEXT = checkpoints.COMMON["max_position_embeddings"]
EOS_ID = checkpoints.COMMON["eos_token_id"]
# Architectures that transformers implements with the experts interface, beside those of
# tests/checkpoints.py. Their own settings; one dense layer first.
MORE_ARCHITECTURES = {
    "deepseek_v3": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 64,
        "moe_intermediate_size": 16,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
    "ernie4_5_moe": {
        "moe_num_experts": 8,
        "moe_k": 2,
        "intermediate_size": 64,
        "moe_intermediate_size": 16,
        "moe_layer_start_index": 1,
    },
    "gpt_oss": {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 48,
        "head_dim": 32,
    },
    "minimax_m2": {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 16,
        "head_dim": 32,
    },
}
ARCHITECTURES = (*checkpoints.ARCHITECTURES, *MORE_ARCHITECTURES)


def make_model(architecture: str, directory: Path, **more_settings: int) -> CheckpointInfo:
    """Write a random float32 checkpoint with a tokenizer to `directory`."""
    character_tokenizer().save_pretrained(directory)
    if architecture in checkpoints.ARCHITECTURES:
        return checkpoints.make_checkpoint(architecture, directory, **more_settings)
    settings = {**checkpoints.COMMON, **MORE_ARCHITECTURES[architecture], **more_settings}
    config = CONFIG_MAPPING[architecture](**settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        # Some routers start at zero; then all tokens would go the same way.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2, generator=generator)
    model.save_pretrained(directory)
    return describe_checkpoint(directory)


def character_tokenizer(eos: str | None = "<eos>") -> PreTrainedTokenizerFast:
    """One token per printable ASCII character; EOS is id 1, anything else id 0."""
    vocabulary = {"<unknown>": 0, "<eos>": EOS_ID}
    for character in string.printable:
        vocabulary[character] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unknown>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, unk_token="<unknown>")


def random_text(length: int, seed: int = 0) -> str:
    """Lower-case letters and spaces."""
    generator = torch.Generator().manual_seed(seed)
    letters = torch.randint(0, 27, (length,), generator=generator).tolist()
    return "".join(" abcdefghijklmnopqrstuvwxyz"[letter] for letter in letters)


def random_windows(count: int, seq_len: int, seed: int = 0) -> torch.Tensor:
    """Token ids: int32 [count, seq_len]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 102, (count, seq_len), generator=generator, dtype=torch.int32)
