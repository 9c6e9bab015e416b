"""The routed experts of a checkpoint as rows, in any layout of `files/layouts.py`.

All other layouts are refused by name. Tensors are memory-mapped.

Legend: E experts, F_e atoms kept of one expert, H hidden size, I full intermediate size, P atoms
kept of a layer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from vllm_atomic_moe.files.checkpoint import CheckpointInfo
from vllm_atomic_moe.files.export_format import packed_offsets
from vllm_atomic_moe.files.layouts import FUSED, PACKED_ROWS, PER_EXPERT, quantized_tensor
from vllm_atomic_moe.files.router import CORRECTION_BIAS
from vllm_atomic_moe.files.row_formats import PROJECTIONS, RowFormat
from vllm_atomic_moe.files.shards import Shards
from vllm_atomic_moe.files.tensors import StreamedTensor

PLAIN_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


# (part, quantity) -> name of a packed tensor.
Naming = Callable[[str, str], str]


@dataclass(frozen=True, slots=True)
class LayerRows:
    """The experts of one layer, in plain weights.

    Attributes:
        dtype: key of PLAIN_DTYPES.
        rows: (one of PACKED_ROWS, expert) -> the stored rows, [I or F_e, H].
        stored_EI: the stored atoms; None for all.
    """

    dtype: str
    rows: Callable[[str, int], torch.Tensor]
    stored_EI: torch.Tensor | None = None

    def kept(self, part: str, expert: int, keep_I: torch.Tensor) -> torch.Tensor:
        """The rows of the atoms in `keep_I`, in checkpoint order: [F_e, H], contiguous."""
        return self.rows(part, expert).index_select(0, among(self.stored_EI, expert, keep_I))

    def packed(
        self, part: str, naming: Naming, keep_EI: torch.Tensor, hidden_size: int
    ) -> Iterator[StreamedTensor]:
        """The rows of the atoms in `keep_EI`, of one of PACKED_ROWS."""
        yield by_expert(
            naming(part, "weight"),
            self.dtype,
            (int(keep_EI.sum()), hidden_size),
            PLAIN_DTYPES[self.dtype].itemsize,
            keep_EI,
            partial(self.kept, part),
        )


@dataclass(frozen=True, slots=True)
class LayerBiases:
    """The biases of one layer.

    Attributes:
        dtype: key of PLAIN_DTYPES.
        biases: (one of PACKED_ROWS, expert) -> the biases of its stored atoms; for down_t [H].
        stored_EI: the stored atoms; None for all.
    """

    dtype: str
    biases: Callable[[str, int], torch.Tensor]
    stored_EI: torch.Tensor | None = None

    def kept(self, part: str, expert: int, keep_I: torch.Tensor) -> torch.Tensor:
        """The biases of the atoms in `keep_I`; for down_t [1, H], whatever is kept."""
        stored = self.biases(part, expert)
        if part == "down_t":
            return stored[None]
        return stored.index_select(0, among(self.stored_EI, expert, keep_I))

    def packed(
        self, naming: Naming, keep_EI: torch.Tensor, hidden_size: int
    ) -> Iterator[StreamedTensor]:
        """The biases of the atoms in `keep_EI`, of every projection."""
        for part in PACKED_ROWS:
            down = part == "down_t"
            yield by_expert(
                naming(part, "bias"),
                self.dtype,
                (len(keep_EI), hidden_size) if down else (int(keep_EI.sum()),),
                PLAIN_DTYPES[self.dtype].itemsize,
                keep_EI,
                partial(self.kept, part),
            )


def refitted_rows(name: str, down_t_PH: torch.Tensor) -> StreamedTensor:
    """Plain rows of down_t with new values.

    Args:
        name: of the tensor.
        down_t_PH: the values of the kept atoms, in the dtype to write.
    """
    [dtype] = (key for key, dtype in PLAIN_DTYPES.items() if dtype == down_t_PH.dtype)
    shape = tuple(down_t_PH.shape)
    return StreamedTensor(name, dtype, shape, down_t_PH.nbytes, lambda: [down_t_PH])


def among(stored_EI: torch.Tensor | None, expert: int, keep_I: torch.Tensor) -> torch.Tensor:
    """Positions of the atoms in `keep_I` among an expert's stored atoms: int64 [F_e]."""
    rows = keep_I.nonzero().flatten()
    return rows if stored_EI is None else (stored_EI[expert].cumsum(dim=0) - 1)[rows]


def by_expert(
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    itemsize: int,
    keep_EI: torch.Tensor,
    piece: Callable[[int, torch.Tensor], torch.Tensor],
) -> StreamedTensor:
    """A tensor that is written one expert at a time; `piece` returns its part."""
    return StreamedTensor(
        name,
        dtype,
        shape,
        math.prod(shape) * itemsize,
        lambda: (piece(expert, keep_I) for expert, keep_I in enumerate(keep_EI)),
    )


@dataclass(slots=True)
class LayerNames:
    """Names of the expert tensors of one layer.

    Attributes:
        known: (part, expert, or None for all of them) -> quantity -> name.
        strange: names of unknown kinds.
    """

    known: dict[tuple[str, int | None], dict[str, str]] = field(default_factory=dict)
    strange: list[str] = field(default_factory=list)

    def all_of(self, quantity: str) -> dict[tuple[str, int | None], str]:
        """(part, expert) -> name, for one quantity."""
        return {key: of[quantity] for key, of in self.known.items() if quantity in of}


def split_names(source: Shards, info: CheckpointInfo) -> tuple[dict[int, LayerNames], list[str]]:
    """Split tensor names: those of routed experts by layer, and all others.

    Returns:
        Layer index -> the names; and all other names, including experts outside the decoder's MoE
        layers.
    """
    prefixes = {f"{block}.experts.": layer for layer, block in info.blocks.items()}
    experts = {layer: LayerNames() for layer in info.layers}
    others: list[str] = []
    for name in source.where:
        tensor = quantized_tensor(name)
        prefix = name[: name.find(".experts.") + len(".experts.")]
        if tensor is not None and info.blocks.get(tensor.layer) == tensor.block:
            known = experts[tensor.layer].known
            known.setdefault((tensor.part, tensor.expert), {})[tensor.quantity] = name
        elif prefix in prefixes and not name.endswith(CORRECTION_BIAS):
            experts[prefixes[prefix]].strange.append(name)
        else:
            others.append(name)
    return experts, others


def check_names(names: LayerNames, quantities: Collection[str]) -> None:
    """Refuse expert tensors that an export would omit, and experts without a gate.

    Raises:
        ValueError: one line, which names the first such tensor.
    """
    parts = {part for part, _ in names.known}
    if "up" in parts and "gate" not in parts:
        raise ValueError(
            "experts without a gate are not exported; serve the original checkpoint with the "
            "profile"
        )
    unknown = names.strange + [
        name
        for of in names.known.values()
        for quantity, name in of.items()
        if quantity not in quantities
    ]
    if unknown:
        raise ValueError(
            f"{min(unknown, key=natural)} is not a known part of an expert's projection; "
            "other layouts, and biases of single experts, are not exported"
        )


def tables_of(row_format: RowFormat) -> set[str]:
    """The tables beside the packed rows of a layer."""
    return {table for name in PROJECTIONS for table in row_format.stored_tables(name)}


def find_rows(source: Shards, info: CheckpointInfo, layer: int, names: LayerNames) -> LayerRows:
    """The experts of one layer, in plain weights; of an export maybe only those of down.

    Args:
        source: the shards.
        info: the checkpoint.
        layer: index of the layer.
        names: of its expert tensors.

    Raises:
        ValueError: their layout is unknown, or tensors are missing.
    """
    known, scheme = names.all_of("weight"), info.scheme(layer)
    matrices = {
        name
        for (part, _), name in known.items()
        if part not in ("offsets", "keep") and scheme.of(part).plain
    }
    dtypes = {source.dtype(name) for name in matrices}
    if len(dtypes) != 1 or not dtypes <= PLAIN_DTYPES.keys():
        raise ValueError(
            f"layer {layer}: experts are stored as {', '.join(sorted(dtypes))}; weights of one "
            f"dtype of {', '.join(PLAIN_DTYPES)} are exported, and quantized ones as published"
        )
    dtype = dtypes.pop()
    form = scheme.row_format(info.hidden_size, info.intermediate_size)
    check_names(names, ("weight", "bias", *tables_of(form)))
    if info.stored is not None:
        return _packed_rows(source, info.stored[layer], known, dtype)
    for spelling in FUSED:
        if known.keys() == {(part, None) for part in spelling}:
            parts = {part: known[part, None] for part in spelling}
            return _fused_rows(source, info, parts, dtype, bool(names.all_of("bias")))
    return _per_expert_rows(source, info, layer, known, dtype)


def find_biases(
    source: Shards, info: CheckpointInfo, layer: int, names: LayerNames
) -> LayerBiases | None:
    """The biases of one layer, if it has any: gpt-oss's, or those of an exported checkpoint.

    Raises:
        ValueError: some of them are missing or have another dtype or shape.
    """
    known = {part: name for (part, _), name in names.all_of("bias").items()}
    if not known:
        return None
    experts, size, hidden = info.num_experts, info.intermediate_size, info.hidden_size
    stored_EI = None if info.stored is None else info.stored[layer]
    if stored_EI is None:
        wanted = {"gate_up": [experts, 2 * size], "down": [experts, hidden]}
    else:
        rows = int(stored_EI.sum())
        wanted = {"gate": [rows], "up": [rows], "down_t": [experts, hidden]}
    found = {part: source.shape(name) for part, name in known.items()}
    dtypes = {source.dtype(name) for name in known.values()}
    if found != wanted or len(dtypes) != 1 or not dtypes <= PLAIN_DTYPES.keys():
        raise ValueError(
            f"layer {layer}: biases of experts are {found}, {', '.join(sorted(dtypes))}; wanted "
            f"{wanted}, floats of one dtype; fetch the checkpoint again"
        )

    def biases(part: str, expert: int) -> torch.Tensor:
        if part == "down_t":
            return source.tensor(known[part if stored_EI is not None else "down"])[expert]
        if stored_EI is None:
            return source.tensor(known["gate_up"])[expert][("gate", "up").index(part) :: 2]
        offsets = packed_offsets(stored_EI)[expert : expert + 2].tolist()
        return source.tensor(known[part])[slice(*offsets)]

    return LayerBiases(dtypes.pop(), biases, stored_EI)


def _packed_rows(
    source: Shards,
    stored_EI: torch.Tensor,
    known: Mapping[tuple[str, int | None], str],
    dtype: str,
) -> LayerRows:
    offsets = packed_offsets(stored_EI).tolist()

    def rows(part: str, expert: int) -> torch.Tensor:
        return source.tensor(known[part, None])[offsets[expert] : offsets[expert + 1]]

    return LayerRows(dtype, rows, stored_EI)


def are_transposed(source: Shards, info: CheckpointInfo, names: Mapping[str, str]) -> bool:
    """Whether 3-D tensors are transposed: their shapes together decide, even if I = H or 2I = H.

    Args:
        source: the shards.
        info: the checkpoint.
        names: part -> name, of one layer.

    Raises:
        ValueError: the shapes fit neither way.
    """
    experts, size, hidden = info.num_experts, info.intermediate_size, info.hidden_size
    shapes = {part: source.shape(name) for part, name in names.items()}
    sizes = {"gate_up": 2 * size, "gate": size, "up": size}
    upright = {part: [experts, sizes.get(part, hidden), hidden] for part in names}
    upright["down"] = [experts, hidden, size]
    transposed = {part: [shape[0], *shape[:0:-1]] for part, shape in upright.items()}
    if shapes not in (upright, transposed):
        raise ValueError(
            f"{' and '.join(names.values())} are {' and '.join(map(str, shapes.values()))}, "
            f"wanted {' and '.join(map(str, upright.values()))}, or "
            f"{' and '.join(map(str, transposed.values()))}; other layouts are not exported"
        )
    return shapes == transposed


def _fused_rows(
    source: Shards, info: CheckpointInfo, names: Mapping[str, str], dtype: str, interleaved: bool
) -> LayerRows:
    """Rows of 3-D tensors, or of DBRX's, where experts are stacked in 2-D tensors.

    Args:
        interleaved: whether gate and up alternate, as in gpt-oss, which its biases reveal.
    """
    size = info.intermediate_size
    if {(*source.shape(name),) for name in names.values()} == {
        (info.num_experts * size, info.hidden_size)
    }:
        return LayerRows(dtype, partial(_rows_below, source, names, size))
    transposed = are_transposed(source, info, names)

    def rows(part: str, expert: int) -> torch.Tensor:
        stored = {"down_t": "down"}.get(part, part if part in names else "gate_up")
        matrix = source.tensor(names[stored])[expert]
        if transposed != (part == "down_t"):
            matrix = matrix.t()
        if stored != "gate_up":
            return matrix
        if interleaved:
            return matrix[("gate", "up").index(part) :: 2]
        return matrix[:size] if part == "gate" else matrix[size:]

    return LayerRows(dtype, rows)


def _rows_below(
    source: Shards, names: Mapping[str, str], size: int, part: str, expert: int
) -> torch.Tensor:
    """Rows of DBRX's 2-D tensors of stacked experts, down transposed."""
    return source.tensor(names[part.removesuffix("_t")])[expert * size : (expert + 1) * size]


def _per_expert_rows(
    source: Shards,
    info: CheckpointInfo,
    layer: int,
    known: Mapping[tuple[str, int | None], str],
    dtype: str,
) -> LayerRows:
    upright = [info.intermediate_size, info.hidden_size]
    wanted: dict[tuple[str, int | None], list[int]] = {
        (part, expert): upright[::-1] if part == "down" else upright
        for expert in range(info.num_experts)
        for part in PER_EXPERT[0]
    }
    if unknown := known.keys() - wanted.keys():
        name = min((known[key] for key in unknown), key=natural)
        raise ValueError(
            f"{name} is not the weight of one expert's projection; other layouts are not exported"
        )
    for (part, expert), shape in wanted.items():
        name = known.get((part, expert), "")
        if not name:
            raise ValueError(
                f"layer {layer}: {part}_proj of expert {expert} is missing; fetch the checkpoint "
                "again"
            )
        if source.shape(name) != shape:
            raise ValueError(
                f"{name} is {source.shape(name)}, wanted {shape}; other layouts are not exported"
            )

    def rows(part: str, expert: int) -> torch.Tensor:
        matrix = source.tensor(known[part.removesuffix("_t"), expert])
        return matrix.t() if part == "down_t" else matrix

    return LayerRows(dtype, rows)


def natural(name: str) -> list[Any]:
    """Sort key that puts layers.2 before layers.10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
