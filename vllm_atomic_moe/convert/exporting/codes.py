"""Quantized experts of a checkpoint as packed codes and the tables that decode them.

Codes and scales keep their bits. Experts are read one at a time; tables can be read without codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import torch

from vllm_atomic_moe.convert.exporting.rows import (
    LayerNames,
    Naming,
    by_expert,
    check_names,
    tables_of,
)
from vllm_atomic_moe.experts.encoding import encode, encode_scales
from vllm_atomic_moe.experts.formats import Encoded
from vllm_atomic_moe.experts.stored import StoredRows, stored_shapes, taken
from vllm_atomic_moe.files.checkpoint import CheckpointInfo
from vllm_atomic_moe.files.layouts import PACKED_ROWS
from vllm_atomic_moe.files.quantization import IGNORED, Scheme
from vllm_atomic_moe.files.row_formats import PART_PROJECTIONS, RowFormat
from vllm_atomic_moe.files.shards import Shards
from vllm_atomic_moe.files.tensors import StreamedTensor

# As safetensors spells dtypes of tables; scales have the checkpoint's own.
SPELLED = {torch.uint8: "U8", torch.int32: "I32", torch.float32: "F32"}
# (one of PACKED_ROWS, expert, whether to read codes) -> the expert's rows.
Rows = Callable[[str, int, bool], Encoded]


@dataclass(frozen=True, slots=True)
class LayerCodes:
    """The experts of one layer, quantized.

    Attributes:
        scheme: the checkpoint's quantization.
        row_format: the encoding of the packed rows.
        rows: returns the rows of one expert.
    """

    scheme: Scheme
    row_format: RowFormat
    rows: Rows

    def packed(
        self, part: str, naming: Naming, keep_EI: torch.Tensor, hidden_size: int
    ) -> Iterator[StreamedTensor]:
        """Codes and tables of the atoms in `keep_EI`, of one of PACKED_ROWS."""
        projection = PART_PROJECTIONS[part]
        shapes = stored_shapes(self.row_format, projection, keep_EI, hidden_size)
        for quantity, (dtype, shape) in shapes.items():

            def piece(expert: int, keep_I: torch.Tensor, name: str = quantity) -> torch.Tensor:
                encoded = self.rows(part, expert, name == "weight")
                atoms_F = keep_I.nonzero().flatten()
                return taken(name, encoded, self.row_format, projection, atoms_F)

            name = naming(part, quantity)
            spelled = self.scheme.scale if quantity == "scales" else SPELLED[dtype]
            yield by_expert(name, spelled, shape, dtype.itemsize, keep_EI, piece)


def find_codes(source: Shards, info: CheckpointInfo, layer: int, names: LayerNames) -> LayerCodes:
    """The experts of one layer, as `find_rows` for plain weights.

    Raises:
        ValueError: a part of an expert is missing or does not fit the scheme.
    """
    scheme, sizes = info.scheme(layer), (info.hidden_size, info.intermediate_size)
    form = scheme.row_format(*sizes)
    if info.stored is not None:
        check_names(names, {"weight", "bias", *tables_of(form)})
        return LayerCodes(scheme, form, _stored(source, info, layer, names, form))
    check_names(names, (*scheme.parts, "bias", *IGNORED))
    for part in PACKED_ROWS:
        for expert in range(info.num_experts):
            _, found = _parts(names, part, expert)
            if absent := [quantity for quantity in scheme.parts if quantity not in found]:
                raise ValueError(
                    f"layer {layer}: {absent[0]} of {part.removesuffix('_t')}_proj of expert "
                    f"{expert} is missing; fetch the checkpoint again"
                )

    def rows(part: str, expert: int, with_codes: bool) -> Encoded:
        of_all, found = _parts(names, part, expert)
        tensors = {quantity: source.tensor(found[quantity]) for quantity in scheme.parts}
        if of_all:
            tensors = {name: _of_expert(whole, part, expert) for name, whole in tensors.items()}
        read = encode if with_codes else encode_scales
        try:
            return read(scheme, PART_PROJECTIONS[part], tensors, *sizes)
        except ValueError as error:
            raise ValueError(
                f"{found[scheme.parts[0]]}, expert {expert}: {error}; fetch the checkpoint again"
            ) from None

    return LayerCodes(scheme, form, rows)


def _stored(
    source: Shards, info: CheckpointInfo, layer: int, names: LayerNames, form: RowFormat
) -> Rows:
    """Reads the rows of an exported checkpoint's layer."""
    assert info.stored is not None
    stored_EI = info.stored[layer]

    @cache
    def stored(part: str) -> StoredRows:
        projection = PART_PROJECTIONS[part]
        wanted = ("weight", *form.stored_tables(projection))
        parts = {name: source.tensor(names.known[part, None][name]) for name in wanted}
        return StoredRows(parts, stored_EI, form, projection, info.hidden_size)

    def rows(part: str, expert: int, with_codes: bool) -> Encoded:
        try:
            return stored(part).expert(expert)
        except ValueError as error:
            raise ValueError(f"layer {layer}: {part}: {error}; export the model again") from None

    return rows


def _parts(names: LayerNames, part: str, expert: int) -> tuple[bool, Mapping[str, str]]:
    """Whether a tensor holds all experts, and the name of each part of one projection."""
    projection = part.removesuffix("_t")
    if found := names.known.get((projection, expert)):
        return False, found
    whole = "down" if part == "down_t" else "gate_up"
    return True, names.known.get((whole, None), {})


def _of_expert(whole: torch.Tensor, part: str, expert: int) -> torch.Tensor:
    """One expert's part of a tensor of all experts; gate and up alternate."""
    return whole[expert] if part == "down_t" else whole[expert][("gate", "up").index(part) :: 2]
