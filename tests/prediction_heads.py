"""Tiny checkpoints with a multi-token-prediction head that is often right, by construction."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import make_checkpoint
from vllm_atomic_moe.files.checkpoint import CheckpointInfo, describe_checkpoint


def make_glm4_moe_with_head(directory: Path) -> CheckpointInfo:
    """Write a GLM-4-MoE whose head lies behind its decoder layers, in the same file.

    The next token is a permutation of the last one wherever the random layers do not outweigh the
    embedding, which they do often, so that profiles differ. The head knows the permutation.
    """
    generator = torch.Generator().manual_seed(5)
    last = make_checkpoint("glm4_moe", directory).layers[-1]
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    path = directory / "model.safetensors"
    tensors = load_file(path)
    vocabulary, hidden = tensors["model.embed_tokens.weight"].shape
    embedding = torch.randn(vocabulary, hidden, generator=generator)
    next_token = torch.randperm(vocabulary, generator=generator)
    tensors["model.embed_tokens.weight"] = 4 * embedding
    tensors["lm_head.weight"][next_token] = embedding
    decoder, head = (f"model.layers.{layer}." for layer in (last, last + 1))
    for name in [name for name in tensors if name.startswith(decoder)]:
        tensor = tensors[name].clone()
        if tensor.dim() > 1:
            tensor = 0.1 * torch.randn(tensor.shape, generator=generator)
        tensors[head + name.removeprefix(decoder)] = tensor
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{head}{norm}.weight"] = torch.ones(hidden)
    both = torch.cat([torch.eye(hidden), torch.zeros(hidden, hidden)], dim=1)
    tensors[f"{head}eh_proj.weight"] = both  # of the embedding and the hidden state
    tensors[f"{head}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"{head}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    return describe_checkpoint(directory)
