"""Where an exported checkpoint keeps its shards, and whether it is complete.

`atomic-moe export` writes shards to the folder `atomic_weights/`, where other readers do not look:
they find no weights, instead of experts that they cannot place. The experts are packed (see
`layouts.py`). The index of the shards has format, version and profile; version 2 also has the
encoding of each projection's rows in every layer. An export of plain weights without biases has
version 1.

Legend: E experts, H hidden size, I full intermediate size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from vllm_atomic_moe.files.layouts import INDEX, PACKED, PACKED_ROWS, PACKED_TABLES, packed_name
from vllm_atomic_moe.files.plain_files import read_json_object
from vllm_atomic_moe.files.quantization import FLOATS, PLAIN_SCHEME, Scheme, stored_scheme
from vllm_atomic_moe.files.row_formats import PART_PROJECTIONS
from vllm_atomic_moe.files.tensors import open_safetensors, read_tensor, safetensors_files

EXPORT_DIRECTORY = "atomic_weights"
EXPORT_FORMAT = "atomic-moe-export"
PLAIN_VERSION, EXPORT_VERSION = VERSIONS = ("1", "2")
ROW_FORMATS = "row_formats"


def packed_offsets(keep_EI: torch.Tensor) -> torch.Tensor:
    """First packed row of every expert, and the number of rows: int64 [E+1]."""
    offsets_E1 = torch.zeros(keep_EI.shape[0] + 1, dtype=torch.int64)
    offsets_E1[1:] = keep_EI.sum(dim=1).cumsum(dim=0)
    return offsets_E1


def weights_directory(directory: Path) -> Path:
    """The directory of a checkpoint's shards: its own, or the folder of an exported one.

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
    if found[0] != EXPORT_FORMAT or found[1] not in VERSIONS:
        raise ValueError(
            f"{folder}: is of format {found[0]!r:.80} version {found[1]!r:.20}, wanted "
            f"{EXPORT_FORMAT!r} version {' or '.join(VERSIONS)}; was it made by this version of "
            "atomic-moe?"
        )
    if safetensors_files(directory):
        raise ValueError(
            f"{directory}: holds *.safetensors files beside the exported ones in {folder.name}/; "
            "remove either"
        )
    return folder


def stored_schemes(directory: Path, layers: Sequence[int]) -> dict[int, Scheme]:
    """How an exported checkpoint encodes the rows of its layers.

    Args:
        directory: the checkpoint.
        layers: indices of its MoE layers.

    Raises:
        ValueError: its index lacks a projection, or projections of one layer differ, except that
            down may be plain.
    """
    path = directory / EXPORT_DIRECTORY / INDEX
    metadata = read_json_object(path)["metadata"]
    if metadata["format_version"] == PLAIN_VERSION:
        return dict.fromkeys(layers, PLAIN_SCHEME)
    schemes: dict[int, Scheme] = {}
    for layer in layers:
        try:
            told = metadata[ROW_FORMATS][str(layer)]
            found = {part: stored_scheme(told[part]) for part in PACKED_ROWS}
        except (KeyError, TypeError):
            raise ValueError(
                f"{path}: does not say how the rows of layer {layer} are encoded; export the model "
                "again"
            ) from None
        except ValueError as error:
            raise ValueError(
                f"{path}: layer {layer}: {error}; was it made by this version of atomic-moe?"
            ) from None
        gate, up, down = (found[part] for part in PACKED_ROWS)
        if gate != up or down not in (gate, PLAIN_SCHEME):
            names = ", ".join(f"{part} {scheme.name}" for part, scheme in found.items())
            raise ValueError(
                f"not served by this version: layer {layer} of {path}: projections encoded "
                f"differently ({names}); export the model again"
            )
        schemes[layer] = gate if down == gate else replace(gate, plain_down=True)
    return schemes


def stored_masks(
    where: Mapping[str, Path],
    blocks: Mapping[int, str],
    schemes: Mapping[int, Scheme],
    hidden_size: int,
) -> dict[int, torch.Tensor]:
    """The atoms of an exported checkpoint: layer index -> bool [E, I].

    Args:
        where: tensor name -> shard.
        blocks: layer index -> name of its MoE block.
        schemes: layer index -> how its rows are encoded.
        hidden_size: H.

    Raises:
        ValueError: packed rows, offsets and mask of a layer do not fit together, or a table beside
            the rows is missing.
    """
    masks: dict[int, torch.Tensor] = {}
    for index, block in blocks.items():
        names = {part: packed_name(block, part) for part in PACKED}
        _check_present(index, names.values(), where)
        keep, offsets = (read_tensor(where[names[p]], names[p]) for p in ("keep", "offsets"))
        if keep.dtype != torch.bool or not torch.equal(offsets, packed_offsets(keep)):
            raise ValueError(
                f"layer {index}: {names['offsets']} does not count the atoms of {names['keep']}; "
                "export the model again"
            )
        row_format = schemes[index].row_format(hidden_size, keep.shape[1])
        for part, projection in PART_PROJECTIONS.items():
            tables = row_format.stored_tables(projection)
            _check_present(index, [packed_name(block, part, table) for table in tables], where)
            for table in {*PACKED_TABLES}.difference(tables, ["bias"]):
                if (other := packed_name(block, part, table)) in where:
                    raise ValueError(
                        f"layer {index}: {other} is not wanted; export the model again"
                    )
            name, bits = names[part], row_format.of(projection).bits
            wanted = [int(offsets[-1]), hidden_size * bits // 8 if bits else hidden_size]
            with open_safetensors(where[name]) as (_, shard):
                entry = shard.get_slice(name)
                shape, dtype = entry.get_shape(), entry.get_dtype()
            if shape != wanted or dtype not in (("U8",) if bits else (*FLOATS, "F64")):
                kind = "U8" if bits else "floats"
                raise ValueError(
                    f"layer {index}: {name} is {dtype} {shape}, wanted {kind} {wanted}; export the "
                    "model again"
                )
        masks[index] = keep
    return masks


def _check_present(layer: int, names: Iterable[str], where: Mapping[str, Path]) -> None:
    if missing := [name for name in names if name not in where]:
        raise ValueError(f"layer {layer}: {missing[0]} is missing; export the model again")
