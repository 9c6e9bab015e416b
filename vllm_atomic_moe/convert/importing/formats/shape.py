"""`shape`: the selections that SHAPE (arXiv 2606.09886) and its baselines write.

    {"<layer>": [ids of the experts that stay, ...], ..., "_metadata": {"method": ..., ...}}

Keys with a leading underscore are notes. Two of them are counts, and are compared with the lists:
`selected_experts` (ids in all lists) and `total_experts` (experts of all layers named).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_atomic_moe.convert.importing.importer import Importer
from vllm_atomic_moe.convert.importing.reading import (
    expert_ids,
    keep_experts,
    layer_keys,
    parse_object,
    read_text,
)
from vllm_atomic_moe.files.checkpoint import CheckpointInfo
from vllm_atomic_moe.files.tensors import shorten
from vllm_atomic_moe.scoring.masks import Masks

# The tool's word for its own method; its baselines have their own names.
SHAPLEY = "shapley"


def read_shape(path: Path, model: CheckpointInfo) -> Masks:
    """Keep the listed experts; the others of that layer leave the router.

    Raises:
        ValueError: a key is not a MoE layer, a value not a list of experts, two keys name one
            layer, or the counts of `_metadata` are not those of the lists.
    """
    data = parse_object(read_text(path), str(path))
    keys = layer_keys((key for key in data if not key.startswith("_")), model, path)
    kept = {layer: expert_ids(data[key], model, f"{path}: {key!r}") for layer, key in keys.items()}
    if not kept:
        raise ValueError(
            f'{path}: names no layer; wanted a list of experts per layer, as in {{"0": [5, 2, 7]}}'
        )
    notes = data.get("_metadata", {})
    if not isinstance(notes, dict):
        raise ValueError(f"{path}: `_metadata` is {shorten(notes)}, wanted a JSON object")
    _check_counts(notes, kept, model, path)
    return keep_experts(kept, model, {"method": _method(notes)})


def _check_counts(
    notes: dict[str, Any], kept: dict[int, list[int]], model: CheckpointInfo, path: Path
) -> None:
    """Detect a truncated file, or one for a model with another number of experts."""
    counts = {
        "selected_experts": sum(map(len, kept.values())),
        "total_experts": len(kept) * model.num_experts,
    }
    for key, count in counts.items():
        if notes.get(key, count) != count:
            raise ValueError(
                f"{path}: `_metadata` says {key} {shorten(notes[key])}, its lists and the model "
                f"give {count}; is the file complete, and for this model?"
            )


def _method(notes: dict[str, Any]) -> str:
    method = notes.get("method", SHAPLEY)
    if not isinstance(method, str) or not method.isidentifier():
        return "shape"
    return "shape" if method == SHAPLEY else method


IMPORTER = Importer(read_shape, "SHAPE's JSON selection")
