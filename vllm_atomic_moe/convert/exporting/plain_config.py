"""config.json of an ordinary checkpoint: its new numbers, and models that cannot have any."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_atomic_moe.files.checkpoint import CheckpointInfo
from vllm_atomic_moe.files.config import (
    MISTRAL,
    config_file,
    declared_experts,
    quantization_settings,
    text_part,
)

# Keys of the width of routed experts alone.
ROUTED_WIDTH = (
    *("moe_intermediate_size", "expert_hidden_dim", "expert_intermediate_size"),
    *("moe_ffn_hidden_size", "expert_ffn_hidden_size", "expert_dim"),
)
# Key of that width if those are absent; it is also the width of dense layers.
ANY_WIDTH = "intermediate_size"
# Keys of the width of shared experts alone; without one it is a multiple of the routed width.
SHARED_WIDTH = (
    *("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
    *("shared_intermediate_size", "share_expert_dim"),
)
SHARED_EXPERTS = re.compile(r"\.shared?_(?:experts?|mlp)\.")
EXPERT_BY_NUMBER = re.compile(r"\bexperts\\*\.\d+")


def whole_experts(info: CheckpointInfo) -> str:
    """Options of `prune` that keep the same number of experts everywhere."""
    return f"whole experts: --method reap --scope {'group' if info.groups else 'layer'}"


def check_width_is_named(
    directory: Path, config: Mapping[str, Any], info: CheckpointInfo, names: Sequence[str]
) -> None:
    """Refuse a model if its config.json cannot give routed experts another width.

    Args:
        directory: the checkpoint.
        config: from `read_config`.
        info: the checkpoint.
        names: of all tensors.

    Raises:
        ValueError: one line with the other use of the routed width, and the remedy.
    """
    whole = f"prune {whole_experts(info)}"
    keys = _routed_width_keys(config, info)
    if not keys:
        raise ValueError(
            f"{directory}/config.json: no known key gives the width of routed experts, "
            f"{info.intermediate_size}; {whole}"
        )
    if any(SHARED_EXPERTS.search(name) for name in names) and not any(
        type(config.get(key)) is int and config[key] > 0 for key in SHARED_WIDTH
    ):
        raise ValueError(
            f"{directory}/config.json: {keys[0]} is also the width of the shared experts, which "
            f"stay whole; {whole}"
        )
    if keys == [ANY_WIDTH] and len(info.layers) != config.get("num_hidden_layers"):
        raise ValueError(
            f"{directory}/config.json: {ANY_WIDTH} is also the width of the dense layers; {whole}"
        )


def changed_config(
    directory: Path, config: Mapping[str, Any], info: CheckpointInfo, experts: int, width: int
) -> bytes:
    """config.json with another number or another width of experts.

    Args:
        directory: the checkpoint.
        config: from `read_config`.
        info: the checkpoint.
        experts: kept experts of a layer.
        width: atoms of each.

    Raises:
        ValueError: it lacks the number of experts, or names single experts.
    """
    path = config_file(directory)
    if path.name == MISTRAL:
        raise ValueError(f"{path}: Mistral's own format; export a checkpoint with a config.json")
    changes: dict[str, int] = {}
    if experts < info.num_experts:
        declared = declared_experts(config)
        changes |= {key: experts for key, told in declared.items() if told == info.num_experts}
        if not changes:
            raise ValueError(
                f"{directory}/config.json: no known key gives the number of experts, "
                f"{info.num_experts}; an ordinary checkpoint of fewer needs one"
            )
        quantized = json.dumps(quantization_settings(directory, config))
        if found := EXPERT_BY_NUMBER.search(quantized):
            raise ValueError(
                f"{directory}: its quantization settings name {found[0]}, and experts get other "
                "numbers; such a model is not exported with --plain"
            )
    if width < info.intermediate_size:
        changes |= dict.fromkeys(_routed_width_keys(config, info), width)
    told = json.loads(path.read_bytes())
    text_part(told).update(changes)
    return json.dumps(told, indent=2).encode() + b"\n"


def _routed_width_keys(config: Mapping[str, Any], info: CheckpointInfo) -> list[str]:
    keys = [key for key in ROUTED_WIDTH if config.get(key) == info.intermediate_size]
    if not keys and config.get(ANY_WIDTH) == info.intermediate_size:
        keys = [ANY_WIDTH]
    return keys
