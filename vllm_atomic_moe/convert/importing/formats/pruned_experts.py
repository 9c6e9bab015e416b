"""`pruned-experts`: the JSON profile of vLLM pull requests 37824 (RIY) and 42613.

    {"version": 1, "pruned_experts": [[layer, expert], ...], ...}

Version 1 removes the pruned experts from the router before top-k. Version 2 has a `routing_mode`:
`pre_topk_mask` does the same, `post_topk_drop` lets the router choose them and drops their output
without renormalization, as an expert of width zero does here. Other keys (model, workload, ...) are
notes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_atomic_moe.convert.importing.importer import Importer
from vllm_atomic_moe.convert.importing.reading import (
    check_expert,
    keep_experts,
    layer_index,
    parse_object,
    read_text,
)
from vllm_atomic_moe.files.checkpoint import CheckpointInfo
from vllm_atomic_moe.files.tensors import shorten
from vllm_atomic_moe.scoring.masks import Masks

BEFORE_TOPK, AFTER_TOPK = "pre_topk_mask", "post_topk_drop"


def read_pruned_experts(path: Path, model: CheckpointInfo) -> Masks:
    """Keep the experts that are not listed.

    Raises:
        ValueError: an unknown version or routing mode, or an entry that is not a pair of a MoE
            layer and an expert, or occurs twice.
    """
    data = parse_object(read_text(path), str(path))
    mode = _routing_mode(data, path)
    pairs = data.get("pruned_experts")
    if not isinstance(pairs, list):
        seen = shorten(pairs) if "pruned_experts" in data else "missing"
        raise ValueError(
            f"{path}: `pruned_experts` is {seen}, wanted a list of [layer, expert] pairs"
        )
    first: dict[tuple[int, int], int] = {}
    for position, pair in enumerate(pairs):
        where = f"{path}: pruned_experts[{position}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"{where}: {shorten(pair)}, wanted a pair [layer, expert]")
        layer, expert = layer_index(pair[0], model, where), pair[1]
        check_expert(expert, model, where)
        if (layer, expert) in first:
            raise ValueError(
                f"{where}: {pair} occurs twice, first at [{first[layer, expert]}]; "
                "wanted every pair once"
            )
        first[layer, expert] = position
    kept = {layer: set(range(model.num_experts)) for layer in model.layers}
    for layer, expert in first:
        kept[layer].discard(expert)
    return keep_experts(kept, model, {}, leave_routable=mode == AFTER_TOPK)


def _routing_mode(data: dict[str, Any], path: Path) -> str:
    version = data.get("version", 1)
    if type(version) is not int or version not in (1, 2):
        raise ValueError(f"{path}: `version` is {shorten(version)}, wanted 1 or 2")
    mode = data.get("routing_mode", BEFORE_TOPK if version == 1 else None)
    known = (BEFORE_TOPK,) if version == 1 else (BEFORE_TOPK, AFTER_TOPK)
    if not isinstance(mode, str) or mode not in known:
        seen = shorten(mode) if "routing_mode" in data else "missing"
        raise ValueError(
            f"{path}: `routing_mode` is {seen}, version {version} wants {' or '.join(known)}"
        )
    return mode


IMPORTER = Importer(read_pruned_experts, "vLLM's JSON profile (pull requests 37824 and 42613)")
