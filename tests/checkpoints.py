"""Tiny random checkpoints of real architectures, and the masks to prune them with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.architectures import ARCHITECTURES, COMMON
from vllm_atomic_moe.calibration.model import auto_class
from vllm_atomic_moe.files.checkpoint import CheckpointInfo, describe_checkpoint
from vllm_atomic_moe.files.layouts import expert_tensor
from vllm_atomic_moe.files.profiles import PruningProfile
from vllm_atomic_moe.files.router import CORRECTION_BIAS


def make_checkpoint(
    architecture: str,
    directory: Path,
    *,
    layout: str = "per_expert",
    seed: int = 0,
    **more_settings: Any,
) -> CheckpointInfo:
    """Write a random float32 checkpoint.

    Args:
        architecture: key of ARCHITECTURES.
        directory: where to write it.
        layout: "per_expert", as transformers saves; or "fused", one 3-D tensor per projection (for
            those of PER_EXPERT).
        seed: of the random weights.
        more_settings: of the configuration.
    """
    import transformers

    it = ARCHITECTURES[architecture]
    settings = {**COMMON, **it.settings, **more_settings}
    kind = it.kind or architecture
    generator = torch.Generator().manual_seed(seed)
    path = directory / "config.json"
    if it.tensors is None:
        built = transformers.CONFIG_MAPPING[kind](**settings)
        # Qwen3.5's text model has a class of its own.
        images = transformers.AutoModelForImageTextToText
        model_class = images if "vision_config" in settings else auto_class(built)
        model = model_class.from_config(built, dtype=torch.float32)
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                _randomize(name, tensor, generator)
        model.save_pretrained(directory)
        tensors = model.state_dict()
    else:
        tensors = {name: torch.ones(shape) for name, shape in it.tensors.items()}
        for name, tensor in tensors.items():
            _randomize(name, tensor, generator)
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"model_type": kind, **settings}))
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {**json.loads(path.read_text()), "architectures": [it.model]}
    if it.published:
        tensors, config = it.published(load_file(directory / "model.safetensors"), config)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    path.write_text(json.dumps(config))
    if layout == "fused":
        state = {
            _fused_name(architecture, name): tensor.contiguous() for name, tensor in tensors.items()
        }
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return describe_checkpoint(directory)


def _randomize(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Matrices, some of which transformers leaves zero, correction biases and experts by token."""
    if name.endswith(CORRECTION_BIAS):
        tensor.normal_(std=0.3, generator=generator)
    elif name.endswith("tid2eid"):
        order = torch.rand(len(tensor), 8, generator=generator).argsort(dim=1)
        tensor.copy_(order[:, : tensor.shape[1]])
    elif tensor.dim() > 1 and tensor.is_floating_point():
        tensor.normal_(std=0.2, generator=generator)


def _fused_name(architecture: str, name: str) -> str:
    """transformers' name in memory -> the name vLLM reads a 3-D tensor by."""
    if architecture == "mixtral":
        for old, new in (
            (".mlp.", ".block_sparse_moe."),
            (".gate_up_proj", ".w13"),
            (".down_proj", ".w2"),
        ):
            name = name.replace(old, new)
    return name


def ragged_masks(model: CheckpointInfo, seed: int) -> dict[int, torch.Tensor]:
    """Random masks [E, I]: in every layer one expert of width 0, one of 1, one of I."""
    generator = torch.Generator().manual_seed(seed)
    shape = (model.num_experts, model.intermediate_size)
    masks = {}
    for layer in model.layers:
        keep = torch.rand(shape, generator=generator) < torch.rand(shape[0], 1, generator=generator)
        order = torch.randperm(shape[0], generator=generator)
        keep[order[0]] = False
        keep[order[1]] = False
        keep[order[1], int(torch.randint(shape[1], (), generator=generator))] = True
        keep[order[2]] = True
        masks[layer] = keep
    return masks


def write_profile(model: CheckpointInfo, name: str, directory: Path, seed: int) -> PruningProfile:
    """Write a ragged profile for `model` to directory/name.safetensors."""
    metadata = {"model": json.dumps(model.identity())}
    profile = PruningProfile(name, ragged_masks(model, seed), metadata=metadata)
    profile.write(directory / f"{name}.safetensors")
    return profile


def uniform_profile(
    info: CheckpointInfo, experts: int, width: int, seed: int = 1
) -> PruningProfile:
    """Random masks: the same number of experts per layer and group, and of atoms per expert."""
    generator = torch.Generator().manual_seed(seed)
    groups = info.groups.number if info.groups else 1
    keep, routable = {}, {}
    for layer in info.layers:
        stays = torch.rand(groups, info.num_experts // groups, generator=generator)
        mask = torch.zeros_like(stays, dtype=torch.bool)
        mask.scatter_(1, stays.argsort(dim=1)[:, : experts // groups], True)
        order = torch.rand(info.num_experts, info.intermediate_size, generator=generator)
        atoms = torch.zeros_like(order, dtype=torch.bool)
        atoms.scatter_(1, order.argsort(dim=1)[:, :width], True)
        routable[layer] = mask.flatten()
        keep[layer] = atoms & mask.flatten()[:, None]
    return PruningProfile(
        "uniform",
        keep,
        routable if experts < info.num_experts else {},
        {"model": json.dumps(info.identity())},
    )


def routing_masks(model: CheckpointInfo) -> dict[int, torch.Tensor]:
    """Masks [E] of routable experts: in the first layer half of them (a group of two) is excluded,
    in the others two of the first half and one of the second.
    """
    half = model.num_experts // 2
    masks = {}
    for layer in model.layers:
        excluded = range(half) if layer == model.layers[0] else (0, layer, half + 1)
        masks[layer] = torch.ones(model.num_experts, dtype=torch.bool)
        masks[layer][list(excluded)] = False
    return masks


def write_routing_profiles(model: CheckpointInfo, directory: Path) -> dict[str, PruningProfile]:
    """Write three profiles for `model`, the second and third held in the first one's atoms.

    whole: experts excluded from routing, the others whole; ragged: one more expert excluded, the
    others of any width; zeroed: the atoms of `whole`, every expert routable.
    """
    routable = routing_masks(model)
    fewer = {layer: mask.clone() for layer, mask in routable.items()}
    ragged = ragged_masks(model, seed=3)
    for layer, mask in fewer.items():
        mask[-1] = False
        ragged[layer] &= mask[:, None]
    ones = torch.ones(model.num_experts, model.intermediate_size, dtype=torch.bool)
    whole = {layer: ones & mask[:, None] for layer, mask in routable.items()}
    metadata = {"model": json.dumps(model.identity())}
    profiles = {
        "whole": PruningProfile("whole", whole, routable, metadata),
        "ragged": PruningProfile("ragged", ragged, fewer, metadata),
        "zeroed": PruningProfile("zeroed", whole, metadata=metadata),
    }
    for name, profile in profiles.items():
        profile.write(directory / f"{name}.safetensors")
    return profiles


def zero_pruned(source: Path, target: Path, profile: PruningProfile) -> None:
    """Copy a checkpoint, I unlike H, with the down-projection of every pruned atom set to zero."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("atomic_profiles"))
    [path] = target.glob("*.safetensors")
    tensors = load_file(path)
    for name, tensor in tensors.items():
        found = expert_tensor(name)
        if found is None or found.part != "down" or found.layer not in profile.keep:
            continue
        keep = profile.keep[found.layer]
        if found.expert is not None:
            tensors[name] = tensor * keep[found.expert]
        elif tensor.dim() == 2:  # DBRX's, one expert below another
            tensors[name] = tensor * keep.reshape(-1, 1)
        elif tensor.shape[2] == keep.shape[1]:
            tensors[name] = tensor * keep[:, None, :]
        else:  # transposed
            tensors[name] = tensor * keep[:, :, None]
    save_file(tensors, path, metadata={"format": "pt"})
