"""Shared by the readers: keys, expert ids, JSON, and masks of whole experts.

Legend: E experts, I full intermediate size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vllm_atomic_moe.files.checkpoint import CheckpointInfo
from vllm_atomic_moe.files.tensors import shorten
from vllm_atomic_moe.scoring.masks import Masks

BARE_INDEX = re.compile(r"[0-9]{1,9}")
LAYER = re.compile(r"(?<![A-Za-z])layers?[._]?([0-9]{1,9})(?![0-9])", re.IGNORECASE)


def keep_experts(
    kept: Mapping[int, Collection[int]],
    model: CheckpointInfo,
    metadata: Mapping[str, str],
    *,
    leave_routable: bool = False,
) -> Masks:
    """Masks that keep whole experts: `kept` in the layers it has, all experts in the others.

    Args:
        kept: MoE layer index -> experts that stay.
        model: the checkpoint.
        metadata: strings for the profile.
        leave_routable: pruned experts stay in the router and contribute zero.
    """
    stays = {layer: torch.ones(model.num_experts, dtype=torch.bool) for layer in model.layers}
    for layer, experts in kept.items():
        stays[layer][:] = False
        stays[layer][sorted(experts)] = True
    masks = Masks.whole(stays, model.intermediate_size)
    routable = {} if leave_routable else {i: mask for i, mask in stays.items() if not mask.all()}
    return replace(masks, routable=routable, metadata=metadata)


def layer_index(key: Any, model: CheckpointInfo, where: str) -> int:
    """The decoder layer that `key` names: 3, "3", "layer_3", "model.layers.3.mlp".

    Raises:
        ValueError: it names none or several, or one without routed experts.
    """
    if type(key) is int:
        found = [key]
    elif not isinstance(key, str):
        found = []
    elif BARE_INDEX.fullmatch(key):
        found = [int(key)]
    else:
        found = [int(index) for index in LAYER.findall(key)]
    if len(found) != 1:
        raise ValueError(
            f"{where}: {shorten(key)} names {'no layer' if not found else f'layers {found}'}; "
            "wanted the index of one decoder layer, as in 3, 'layer_3' or 'model.layers.3.mlp'"
        )
    if found[0] not in model.layers:
        raise ValueError(
            f"{where}: layer {found[0]} is not among the model's MoE layers "
            f"{shorten(list(model.layers))}; wanted indices of decoder layers in the checkpoint "
            "(was it made for another model?)"
        )
    return found[0]


def layer_keys(found: Iterable[Any], model: CheckpointInfo, path: Path) -> dict[int, Any]:
    """The keys of a file by their decoder layer.

    Raises:
        ValueError: a key names no MoE layer, or two name one.
    """
    keys: dict[int, Any] = {}
    for key in found:
        layer = layer_index(key, model, str(path))
        if layer in keys:
            raise ValueError(
                f"{path}: keys {keys[layer]!r} and {key!r} both name layer {layer}; keep one"
            )
        keys[layer] = key
    return keys


def expert_ids(value: Any, model: CheckpointInfo, where: str) -> list[int]:
    """A list of different expert ids.

    Raises:
        ValueError: not a list, or an entry is not an expert of the model or occurs twice; the
            message names the position.
    """
    if not isinstance(value, list):
        raise ValueError(f"{where}: {shorten(value)}, wanted a list of expert ids")
    first: dict[int, int] = {}
    for position, expert in enumerate(value):
        check_expert(expert, model, f"{where}[{position}]")
        if expert in first:
            raise ValueError(
                f"{where}[{position}]: expert {expert} occurs twice, first at [{first[expert]}]; "
                "wanted every expert once"
            )
        first[expert] = position
    return value


def check_expert(expert: Any, model: CheckpointInfo, where: str) -> None:
    """Refuse anything but an expert id of the model.

    Raises:
        ValueError: it is not an integer (true and false are not) or out of range.
    """
    if type(expert) is not int or not 0 <= expert < model.num_experts:
        raise ValueError(
            f"{where}: expert {shorten(expert)}, wanted an integer from 0 to "
            f"{model.num_experts - 1}; was it made for another model?"
        )


def check_every_layer(found: Iterable[int], model: CheckpointInfo, path: Path) -> None:
    """Refuse a file that does not cover every MoE layer.

    Raises:
        ValueError: a layer is missing.
    """
    missing = sorted(set(model.layers) - set(found))
    if missing:
        raise ValueError(
            f"{path}: says nothing about layers {shorten(missing)}; the model's MoE layers are "
            f"{shorten(list(model.layers))}, and this format needs all of them"
        )


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a UTF-8 text file (byte {error.start})") from None


def parse_object(text: str, where: str) -> dict[str, Any]:
    """A JSON object without duplicate keys.

    Raises:
        ValueError: the text is not a JSON object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value: dict[str, Any] = {}
        for key, item in pairs:
            if key in value:
                raise ValueError(f"key {shorten(key)} occurs twice")
            value[key] = item
        return value

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not a JSON object ({error}); make the file again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {shorten(value)}, wanted a JSON object")
    return value
