"""`mask`: any safetensors file of masks, True (or 1) for what stays.

Every tensor's name has its decoder layer: `layers.3.mask`, `model.layers.3.mlp.experts.mask`, `3`.
Its shape tells the rest: [E, I] or flat [E·I], atoms; [E], whole experts, and the removed ones
leave the router. Or one tensor [I] per expert, with the expert in its name:
`model.layers.3.mlp.experts.7.mask`. Every MoE layer, and every expert of a layer that is given by
experts, must occur once.

Legend: E experts, I full intermediate size.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from vllm_atomic_moe.convert.importing.importer import Importer
from vllm_atomic_moe.convert.importing.reading import (
    check_every_layer,
    check_expert,
    layer_index,
)
from vllm_atomic_moe.files.checkpoint import CheckpointInfo
from vllm_atomic_moe.files.profiles import FORMAT
from vllm_atomic_moe.files.tensors import open_safetensors, shorten
from vllm_atomic_moe.scoring.masks import Masks

EXPERT = re.compile(r"(?<![A-Za-z])experts?[._]?([0-9]{1,9})(?![0-9])")
# A name with one of these means what is removed, so that it would be read inverted.
INVERTED = re.compile(r"(?<![a-z])(prun|drop|remov|discard|delet|zero|masked)[a-z]*", re.IGNORECASE)

Slot = tuple[int, int | None]
"""A layer, and the expert if the tensor is of one expert."""


def read_mask(path: Path, model: CheckpointInfo) -> Masks:
    """Keep what is True.

    Raises:
        ValueError: a name has no layer, several, or means what is removed; two tensors cover the
            same; a layer or an expert is missing; a tensor is neither bool nor 0 and 1, or has
            another shape.
    """
    with open_safetensors(path) as (metadata, file):
        if metadata.get("format") == FORMAT:
            raise ValueError(f"{path}: is a profile already; use it as it is, no import is needed")
        # Check all names before reading a tensor, in case it is a checkpoint by mistake.
        names = _slots(list(file.keys()), model, path)
        tensors = {name: file.get_tensor(name) for name in names.values()}
    keep: dict[int, torch.Tensor] = {}
    routable: dict[int, torch.Tensor] = {}
    for layer in model.layers:
        if (layer, None) not in names:
            keep[layer] = _by_expert(layer, names, tensors, model, path)
            continue
        name = names[layer, None]
        _check_no_experts_beside(name, layer, names, path)
        mask = _whole_layer(tensors[name], model, f"{path}: {name!r}")
        if mask.dim() == 2:
            keep[layer] = mask
            continue
        keep[layer] = mask.unsqueeze(1).repeat(1, model.intermediate_size)
        if not bool(mask.all()):
            routable[layer] = mask
    return Masks(keep, routable)


def _slots(tensor_names: list[str], model: CheckpointInfo, path: Path) -> dict[Slot, str]:
    """The layer and expert of every tensor; every MoE layer must occur."""
    names: dict[Slot, str] = {}
    for name in tensor_names:
        slot = _slot(name, model, path)
        if slot in names:
            raise ValueError(
                f"{path}: {names[slot]!r} and {name!r} are both masks of {_describe(slot)}; "
                "keep one"
            )
        names[slot] = name
    check_every_layer({layer for layer, _ in names}, model, path)
    return names


def _slot(name: str, model: CheckpointInfo, path: Path) -> Slot:
    if INVERTED.search(name):
        raise ValueError(
            f"{path}: {shorten(name)} says what goes; wanted masks that are True where an atom "
            "stays: invert and rename it"
        )
    layer = layer_index(name, model, str(path))
    experts = EXPERT.findall(name)
    if len(experts) > 1:
        raise ValueError(f"{path}: {shorten(name)} names experts {', '.join(experts)}; wanted one")
    if not experts:
        return layer, None
    check_expert(int(experts[0]), model, f"{path}: {shorten(name)}")
    return layer, int(experts[0])


def _check_no_experts_beside(name: str, layer: int, names: dict[Slot, str], path: Path) -> None:
    for (other_layer, expert), other in names.items():
        if other_layer == layer and expert is not None:
            raise ValueError(
                f"{path}: {name!r} is a mask of layer {layer}, {other!r} of one of its experts; "
                "keep one or the other"
            )


def _whole_layer(tensor: torch.Tensor, model: CheckpointInfo, where: str) -> torch.Tensor:
    """Bool [E, I], or bool [E] for a mask of whole experts."""
    experts, size = model.num_experts, model.intermediate_size
    if tuple(tensor.shape) not in ((experts, size), (experts,), (experts * size,)):
        raise ValueError(
            f"{where} is {list(tensor.shape)}, wanted [{experts}, {size}], [{experts * size}] or "
            f"[{experts}]; was it made for another model?"
        )
    mask = _as_bool(tensor, where)
    return mask if tuple(mask.shape) == (experts,) else mask.reshape(experts, size)


def _by_expert(
    layer: int,
    names: dict[Slot, str],
    tensors: dict[str, torch.Tensor],
    model: CheckpointInfo,
    path: Path,
) -> torch.Tensor:
    """Bool [E, I] from one tensor [I] per expert."""
    rows = []
    for expert in range(model.num_experts):
        name = names.get((layer, expert))
        if name is None:
            raise ValueError(
                f"{path}: no mask of {_describe((layer, expert))}, though there are some of others "
                "of that layer; wanted one per expert"
            )
        if tuple(tensors[name].shape) != (model.intermediate_size,):
            raise ValueError(
                f"{path}: {name!r} is {list(tensors[name].shape)}, "
                f"wanted [{model.intermediate_size}]; was it made for another model?"
            )
        rows.append(_as_bool(tensors[name], f"{path}: {name!r}"))
    return torch.stack(rows)


def _as_bool(tensor: torch.Tensor, where: str) -> torch.Tensor:
    if tensor.dtype not in (torch.bool, torch.uint8):
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{where} is {dtype}, wanted bool, or uint8 of 0 and 1")
    if tensor.dtype == torch.uint8 and tensor.numel() and int(tensor.max()) > 1:
        raise ValueError(f"{where} holds {int(tensor.max())}, wanted 0 and 1 only")
    return tensor.bool()


def _describe(slot: Slot) -> str:
    layer, expert = slot
    return f"layer {layer}" if expert is None else f"layer {layer}, expert {expert}"


IMPORTER = Importer(read_mask, "bool safetensors, True where something stays")
