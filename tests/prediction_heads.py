"""Tiny checkpoints with a multi-token-prediction head that is often right, by construction.

The next token is a permutation of the last one unless the random layers outweigh the embedding,
which they do often, so that profiles differ. The head knows the permutation.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import make_checkpoint
from vllm_atomic_moe.files.checkpoint import CheckpointInfo, describe_checkpoint

Tensors = dict[str, torch.Tensor]


def make_glm4_moe_with_head(directory: Path) -> CheckpointInfo:
    """Write a GLM-4-MoE with a head after its decoder layers, in the same file."""
    last = make_checkpoint("glm4_moe", directory).layers[-1]
    path = directory / "model.safetensors"
    tensors = load_file(path)
    embedding = "model.embed_tokens.weight"
    permute(tensors, embedding, scale=4)
    head = f"model.layers.{last + 1}."
    fuse = add_block(tensors, f"model.layers.{last}.", head)
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{head}{norm}.weight"] = torch.ones(len(fuse))
    tensors[f"{head}eh_proj.weight"] = fuse
    tensors[f"{head}embed_tokens.weight"] = tensors[embedding].clone()
    tensors[f"{head}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    return save(tensors, path, num_nextn_predict_layers=1)


def add_qwen_head(directory: Path) -> CheckpointInfo:
    """Give a Qwen3.5 a head beside its decoder layers, with the block of layer 1."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    permute(tensors, "model.language_model.embed_tokens.weight", scale=0.65)
    fuse = add_block(tensors, "model.language_model.layers.1.", "mtp.layers.0.")
    for norm in ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding"):
        tensors[f"mtp.{norm}.weight"] = fuse.new_zeros(len(fuse))  # of what is added to one
    tensors["mtp.fc.weight"] = fuse
    return save(tensors, path, mtp_num_hidden_layers=1)


def permute(tensors: Tensors, embedding: str, *, scale: float) -> None:
    """Make every token's logits largest at another token; `scale` is the weight of that."""
    generator = torch.Generator().manual_seed(5)
    old = tensors[embedding]
    new = torch.randn(old.shape, generator=generator).to(old.dtype)
    tensors[embedding] = scale * new
    tensors["lm_head.weight"][torch.randperm(len(new), generator=generator)] = new


def add_block(tensors: Tensors, decoder: str, head: str) -> torch.Tensor:
    """Add a decoder layer like another one, with small random weights.

    Returns:
        A projection [H, 2H] of embedding and hidden state that takes the embedding.
    """
    generator = torch.Generator().manual_seed(6)
    for name in [name for name in tensors if name.startswith(decoder)]:
        tensor = tensors[name].clone()
        if tensor.dim() > 1:
            tensor = (0.1 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        tensors[head + name.removeprefix(decoder)] = tensor
    hidden = tensors["lm_head.weight"].shape[1]
    both = torch.cat([torch.eye(hidden), torch.zeros(hidden, hidden)], dim=1)
    return both.to(tensors["lm_head.weight"].dtype)


def save(tensors: Tensors, path: Path, **settings: int) -> CheckpointInfo:
    """Write the weights, and `settings` into the text model's configuration."""
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((path.parent / "config.json").read_text())
    config.get("text_config", config).update(settings)
    (path.parent / "config.json").write_text(json.dumps(config))
    return describe_checkpoint(path.parent)
