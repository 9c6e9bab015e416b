"""The routed experts of a checkpoint as rows, in any layout of `files/layouts.py`.

Everything else is refused by name: biases, scales of quantized experts, projections fused
otherwise. Tensors are memory-mapped.

Legend: E experts, F_e atoms kept of one expert, H hidden size, I full intermediate size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from vllm_atomic_moe.files.checkpoint import CheckpointInfo, locate_tensors
from vllm_atomic_moe.files.export_format import packed_offsets
from vllm_atomic_moe.files.layouts import FUSED, PACKED, PACKED_ROWS, PER_EXPERT, expert_tensor
from vllm_atomic_moe.files.router import CORRECTION_BIAS
from vllm_atomic_moe.files.tensors import open_safetensors

PLAIN_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


# Of the packed layout: not weights.
INDEX_PARTS = tuple(part for part in PACKED if part not in PACKED_ROWS)


class Shards:
    """A checkpoint's shards, each memory-mapped from its first use on.

    Attributes:
        where: tensor name -> shard.
    """

    def __init__(self, directory: Path) -> None:
        self.where = locate_tensors(directory)
        self._files: dict[Path, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def shape(self, name: str) -> list[int]:
        """The tensor's shape, from the header."""
        return self._file(name).get_slice(name).get_shape()

    def dtype(self, name: str) -> str:
        """The tensor's dtype as safetensors spells it, from the header."""
        return self._file(name).get_slice(name).get_dtype()

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, backed by the file: pages are read as they are used.

        Raises:
            ValueError: torch has no such dtype.
        """
        try:
            return self._file(name).get_tensor(name)
        except (SafetensorError, RuntimeError, TypeError) as error:
            raise ValueError(f"{self.where[name]}: {name} cannot be read ({error})") from None

    def _file(self, name: str) -> Any:
        path = self.where[name]
        if path not in self._files:
            _, self._files[path] = self._stack.enter_context(open_safetensors(path))
        return self._files[path]


@dataclass(frozen=True, slots=True)
class LayerRows:
    """The experts of one layer.

    Attributes:
        dtype: key of PLAIN_DTYPES.
        rows: (one of PACKED_ROWS, expert) -> the rows that are stored, [I or F_e, H].
        stored_EI: which atoms the rows are; None for all.
    """

    dtype: str
    rows: Callable[[str, int], torch.Tensor]
    stored_EI: torch.Tensor | None = None

    def kept(self, part: str, expert: int, keep_I: torch.Tensor) -> torch.Tensor:
        """The rows of the atoms in `keep_I`, in checkpoint order: [F_e, H], contiguous."""
        rows = keep_I.nonzero().flatten()
        if self.stored_EI is not None:
            rows = (self.stored_EI[expert].cumsum(dim=0) - 1)[rows]
        return self.rows(part, expert).index_select(0, rows)


@dataclass(slots=True)
class LayerNames:
    """Names of the expert tensors of one layer.

    Attributes:
        known: (part, expert, or None for all of them) -> name.
        strange: others among them.
    """

    known: dict[tuple[str, int | None], str] = field(default_factory=dict)
    strange: list[str] = field(default_factory=list)


def split_names(source: Shards, info: CheckpointInfo) -> tuple[dict[int, LayerNames], list[str]]:
    """Tensor names: those of routed experts by layer, and all others.

    Returns:
        Layer index -> the names; and the names of everything else, experts outside the decoder's
        MoE layers among them.
    """
    prefixes = {f"{block}.experts.": layer for layer, block in info.blocks.items()}
    experts = {layer: LayerNames() for layer in info.layers}
    others: list[str] = []
    for name in source.where:
        tensor = expert_tensor(name)
        prefix = name[: name.find(".experts.") + len(".experts.")]
        if tensor is not None and info.blocks.get(tensor.layer) == tensor.block:
            experts[tensor.layer].known[tensor.part, tensor.expert] = name
        elif prefix in prefixes and not name.endswith(CORRECTION_BIAS):
            experts[prefixes[prefix]].strange.append(name)
        else:
            others.append(name)
    return experts, others


def find_rows(source: Shards, info: CheckpointInfo, layer: int, names: LayerNames) -> LayerRows:
    """How the experts of one layer are stored.

    Args:
        source: the shards.
        info: the checkpoint.
        layer: index of the layer.
        names: of its expert tensors.

    Raises:
        ValueError: in a way that is not known here, or not completely.
    """
    known = names.known
    dtypes = {source.dtype(name) for (part, _), name in known.items() if part not in INDEX_PARTS}
    if len(dtypes) != 1 or not dtypes <= PLAIN_DTYPES.keys():
        raise ValueError(
            f"layer {layer}: experts are stored as {', '.join(sorted(dtypes))}; plain weights of "
            f"one dtype of {', '.join(PLAIN_DTYPES)} are exported, quantized experts are not"
        )
    dtype = dtypes.pop()
    if info.stored is not None:
        return _packed_rows(source, info.stored[layer], known, dtype)
    for spelling in FUSED:
        if known.keys() == {(part, None) for part in spelling} and not names.strange:
            parts = {part: known[part, None] for part in spelling}
            return _fused_rows(source, info, parts, dtype)
    return _per_expert_rows(source, info, layer, names, dtype)


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


def _fused_rows(
    source: Shards, info: CheckpointInfo, names: Mapping[str, str], dtype: str
) -> LayerRows:
    """3-D tensors. Their shapes together say which way round, even where I = H or 2I = H."""
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

    def rows(part: str, expert: int) -> torch.Tensor:
        stored = {"down_t": "down"}.get(part, part if part in names else "gate_up")
        matrix = source.tensor(names[stored])[expert]
        if (shapes == transposed) != (part == "down_t"):
            matrix = matrix.t()
        if stored != "gate_up":
            return matrix
        return matrix[:size] if part == "gate" else matrix[size:]

    return LayerRows(dtype, rows)


def _per_expert_rows(
    source: Shards, info: CheckpointInfo, layer: int, names: LayerNames, dtype: str
) -> LayerRows:
    upright = [info.intermediate_size, info.hidden_size]
    wanted = {
        (part, expert): upright[::-1] if part == "down" else upright
        for expert in range(info.num_experts)
        for part in PER_EXPERT[0]
    }
    unknown = [*names.strange, *(names.known[key] for key in names.known.keys() - wanted.keys())]
    if unknown:
        raise ValueError(
            f"{min(unknown, key=natural)} is not the plain weight of one expert's projection; "
            "quantized experts, expert biases and other layouts are not exported"
        )
    for (part, expert), shape in wanted.items():
        name = names.known.get((part, expert))
        if name is None:
            raise ValueError(
                f"layer {layer}: {part}_proj of expert {expert} is missing; fetch the checkpoint "
                "again"
            )
        if source.shape(name) != shape:
            raise ValueError(
                f"{name} is {source.shape(name)}, wanted {shape}; other layouts are not exported"
            )

    def rows(part: str, expert: int) -> torch.Tensor:
        matrix = source.tensor(names.known[part.removesuffix("_t"), expert])
        return matrix.t() if part == "down_t" else matrix

    return LayerRows(dtype, rows)


def natural(name: str) -> list[Any]:
    """Sort key that puts layers.2 before layers.10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
