"""An exported checkpoint of packed rows, for the loader of this project.

`files/export_format.py` describes it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from vllm_atomic_moe.convert.exporting.codes import find_codes
from vllm_atomic_moe.convert.exporting.plan import Plan, copied
from vllm_atomic_moe.convert.exporting.rows import (
    PLAIN_DTYPES,
    find_biases,
    find_rows,
    natural,
    refitted_rows,
    split_names,
)
from vllm_atomic_moe.files.checkpoint import CheckpointInfo
from vllm_atomic_moe.files.config import config_file, text_part
from vllm_atomic_moe.files.export_format import (
    EXPORT_DIRECTORY,
    EXPORT_FORMAT,
    EXPORT_VERSION,
    PLAIN_VERSION,
    ROW_FORMATS,
    packed_offsets,
)
from vllm_atomic_moe.files.layouts import PACKED_ROWS, expert_tensor, packed_name
from vllm_atomic_moe.files.profiles import PruningProfile
from vllm_atomic_moe.files.shards import Shards
from vllm_atomic_moe.files.tensors import StreamedTensor


def plan_packed(
    directory: Path,
    source: Shards,
    info: CheckpointInfo,
    profile: PruningProfile,
    refitted: Mapping[int, torch.Tensor] = MappingProxyType({}),
) -> Plan:
    """The checkpoint that holds the packed rows of a profile.

    Args:
        directory, source, info: the model.
        profile: the profile.
        refitted: layer index -> new columns of down_proj for the kept atoms, [P, H]; plain beside
            codes, if gate and up are quantized.

    Raises:
        ValueError: the experts are not stored in a way that is understood.
    """
    tensors = plan_tensors(source, info, profile, refitted)
    formats = row_formats(info, tensors, refitted)
    metadata = {
        "format": EXPORT_FORMAT,
        "format_version": EXPORT_VERSION if formats else PLAIN_VERSION,
        "profile": profile.name,
        **({ROW_FORMATS: formats} if formats else {}),
    }
    config = complete_config(config_file(directory).read_bytes(), source)
    return Plan(tensors, config, metadata, EXPORT_DIRECTORY, info.num_experts)


def plan_tensors(
    source: Shards,
    info: CheckpointInfo,
    profile: PruningProfile,
    refitted: Mapping[int, torch.Tensor] = MappingProxyType({}),
) -> list[StreamedTensor]:
    """All tensors of the export, in the order of their names; arguments as of `plan_packed`.

    Raises:
        ValueError: the experts are not stored in a way that is understood.
    """
    experts, others = split_names(source, info)
    planned = [copied(source, name) for name in others]
    for layer, names in experts.items():
        naming = partial(packed_name, info.blocks[layer])
        kept = naming, profile.keep[layer], info.hidden_size
        scheme = info.scheme(layer)
        plain = {part: scheme.of(part).plain for part in PACKED_ROWS}
        rows = find_rows(source, info, layer, names) if any(plain.values()) else None
        codes = None if all(plain.values()) else find_codes(source, info, layer, names)
        for part in PACKED_ROWS:
            if part == "down_t" and layer in refitted:
                columns = refitted[layer]
                columns = columns if rows is None else columns.to(PLAIN_DTYPES[rows.dtype])
                planned.append(refitted_rows(naming(part, "weight"), columns))
            elif found := rows if plain[part] else codes:
                planned += found.packed(part, *kept)
        if biases := find_biases(source, info, layer, names):
            planned += biases.packed(*kept)
        planned += _index(info.blocks[layer], profile.keep[layer])
    return sorted(planned, key=lambda tensor: natural(tensor.name))


def _index(block: str, keep_EI: torch.Tensor) -> Iterator[StreamedTensor]:
    """The index of one layer's packed rows: their atoms, and where experts begin."""
    for part, dtype, tensor in (
        ("offsets", "I64", packed_offsets(keep_EI)),
        ("keep", "BOOL", keep_EI),
    ):
        name, shape = packed_name(block, part), tuple(tensor.shape)
        yield StreamedTensor(name, dtype, shape, tensor.nbytes, partial(iter, [tensor]))


def row_formats(
    info: CheckpointInfo, tensors: Sequence[StreamedTensor], refitted: Collection[int]
) -> dict[str, dict[str, Any]] | None:
    """The index's entry for row formats, by layer and part; None if version 1 suffices."""
    biased = any(
        found.packed and found.quantity == "bias"
        for tensor in tensors
        if (found := expert_tensor(tensor.name))
    )
    schemes = {layer: info.scheme(layer) for layer in info.layers}
    if not biased and all(scheme.plain for scheme in schemes.values()):
        return None
    return {
        str(layer): {
            part: replace(scheme, plain_down=scheme.plain_down or layer in refitted).of(part).told()
            for part in PACKED_ROWS
        }
        for layer, scheme in schemes.items()
    }


def complete_config(config_json: bytes, source: Shards) -> bytes:
    """config.json, completed with what vLLM would read from the headers of the shards.

    vLLM does not find these shards. If the configuration gives no dtype, vLLM takes the tensors'
    dtype; if it ties the word embeddings, vLLM unties them if the checkpoint holds an lm_head.
    """
    config = json.loads(config_json)
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    changes: dict[str, str | bool] = {}
    if not any(part.get(key) for part in parts for key in ("dtype", "torch_dtype")):
        stored = {source.dtype(name) for name in source.where} & PLAIN_DTYPES.keys()
        common = reduce(torch.promote_types, [PLAIN_DTYPES[dtype] for dtype in sorted(stored)])
        changes["dtype"] = str(common).removeprefix("torch.")
    own_head = any(name.endswith("lm_head.weight") for name in source.where)
    if own_head and config.get("tie_word_embeddings") is not False:
        changes["tie_word_embeddings"] = False
        text_part(config)["tie_word_embeddings"] = False
    if not changes:
        return config_json
    return json.dumps({**config, **changes}, indent=2).encode() + b"\n"
