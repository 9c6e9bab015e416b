"""Where an exported checkpoint keeps its shards, and whether one is whole.

`atomic-moe export` writes shards to the folder `atomic_weights/`, where other readers do not look:
they find no weights, instead of experts that they cannot place. The experts are packed (see
`layouts.py`). The index of the shards names format, version and profile.

Legend: E experts, H hidden size, I full intermediate size.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from vllm_atomic_moe.files.layouts import PACKED, PACKED_ROWS, packed_name
from vllm_atomic_moe.files.plain_files import read_json_object
from vllm_atomic_moe.files.tensors import open_safetensors, read_tensor, safetensors_files

EXPORT_DIRECTORY = "atomic_weights"
EXPORT_FORMAT = "atomic-moe-export"
EXPORT_VERSION = "1"
INDEX = "model.safetensors.index.json"


def packed_offsets(keep_EI: torch.Tensor) -> torch.Tensor:
    """First packed row of every expert, and the number of rows: int64 [E+1]."""
    offsets_E1 = torch.zeros(keep_EI.shape[0] + 1, dtype=torch.int64)
    offsets_E1[1:] = keep_EI.sum(dim=1).cumsum(dim=0)
    return offsets_E1


def weights_directory(directory: Path) -> Path:
    """Where a checkpoint's shards are: in the directory, or in the folder of an exported one.

    Raises:
        ValueError: the folder exists but is not a finished export of a known version, or both
            places hold shards.
    """
    folder = directory / EXPORT_DIRECTORY
    if not folder.exists():
        return directory
    try:
        metadata = read_json_object(folder / INDEX)["metadata"]
        found = (metadata["format"], metadata["format_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder}: holds no readable {INDEX} of an export ({type(error).__name__}); "
            "export the model again"
        ) from None
    if found != (EXPORT_FORMAT, EXPORT_VERSION):
        raise ValueError(
            f"{folder}: is of format {found[0]!r:.80} version {found[1]!r:.20}, wanted "
            f"{EXPORT_FORMAT!r} version {EXPORT_VERSION!r}; was it made by this version of "
            "atomic-moe?"
        )
    if safetensors_files(directory):
        raise ValueError(
            f"{directory}: holds *.safetensors files beside the exported ones in {folder.name}/; "
            "remove either"
        )
    return folder


def stored_masks(
    where: Mapping[str, Path], blocks: Mapping[int, str], hidden_size: int
) -> dict[int, torch.Tensor]:
    """The atoms an exported checkpoint holds: layer index -> bool [E, I].

    Args:
        where: tensor name -> shard.
        blocks: layer index -> name of its MoE block.
        hidden_size: H.

    Raises:
        ValueError: packed rows, offsets and mask of a layer do not fit together.
    """
    masks: dict[int, torch.Tensor] = {}
    for index, block in blocks.items():
        names = {part: packed_name(block, part) for part in PACKED}
        if missing := [name for name in names.values() if name not in where]:
            raise ValueError(f"layer {index}: {missing[0]} is missing; export the model again")
        keep, offsets = (read_tensor(where[names[p]], names[p]) for p in ("keep", "offsets"))
        if keep.dtype != torch.bool or not torch.equal(offsets, packed_offsets(keep)):
            raise ValueError(
                f"layer {index}: {names['offsets']} does not count the atoms of {names['keep']}; "
                "export the model again"
            )
        for name in (names[part] for part in PACKED_ROWS):
            with open_safetensors(where[name]) as (_, shard):
                shape = shard.get_slice(name).get_shape()
            if shape != [int(offsets[-1]), hidden_size]:
                raise ValueError(
                    f"layer {index}: {name} is {shape}, wanted "
                    f"{[int(offsets[-1]), hidden_size]}; export the model again"
                )
        masks[index] = keep
    return masks
