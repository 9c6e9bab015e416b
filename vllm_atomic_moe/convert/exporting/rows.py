"""The routed experts of a checkpoint as rows, in any layout of `files/layouts.py`.

Everything else is refused by name: biases, scales of quantized experts, projections fused
otherwise. Tensors are memory-mapped.

Legend: E experts, F_e atoms kept of one expert, H hidden size, I full intermediate size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from vllm_atomic_moe.files.checkpoint import CheckpointInfo, locate_tensors
from vllm_atomic_moe.files.export_format import packed_offsets
from vllm_atomic_moe.files.layouts import FUSED, PER_EXPERT
from vllm_atomic_moe.files.tensors import open_safetensors

PLAIN_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


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


def split_names(
    source: Shards, info: CheckpointInfo
) -> tuple[dict[int, dict[str, str]], list[str]]:
    """Tensor names: those of routed experts by layer, and all others.

    Returns:
        Layer index -> what follows `{block}.experts.` -> name; and the names of everything else,
        experts outside the decoder's MoE layers among them.
    """
    prefixes = {f"{block}.experts.": layer for layer, block in info.blocks.items()}
    experts: dict[int, dict[str, str]] = {layer: {} for layer in info.layers}
    others: list[str] = []
    for name in source.where:
        prefix = name[: name.find(".experts.") + len(".experts.")]
        if prefix in prefixes:
            experts[prefixes[prefix]][name.removeprefix(prefix)] = name
        else:
            others.append(name)
    return experts, others


def find_rows(
    source: Shards, info: CheckpointInfo, layer: int, names: Mapping[str, str]
) -> LayerRows:
    """How the experts of one layer are stored.

    Args:
        source: the shards.
        info: the checkpoint.
        layer: index of the layer.
        names: what follows `{block}.experts.` -> tensor name.

    Raises:
        ValueError: in a way that is not known here, or not completely.
    """
    index = ("packed.offsets", "packed.keep")
    dtypes = {source.dtype(name) for suffix, name in names.items() if suffix not in index}
    if len(dtypes) != 1 or not dtypes <= PLAIN_DTYPES.keys():
        raise ValueError(
            f"layer {layer}: experts are stored as {', '.join(sorted(dtypes))}; plain weights of "
            f"one dtype of {', '.join(PLAIN_DTYPES)} are exported, quantized experts are not"
        )
    dtype = dtypes.pop()
    if info.stored is not None:
        return _packed_rows(source, info.stored[layer], names, dtype)
    fused = {suffix.removesuffix(".weight"): name for suffix, name in names.items()}
    for spelling in FUSED:
        if fused.keys() == set(spelling.values()):
            gate_up, down = (fused[spelling[part]] for part in ("gate_up", "down"))
            return _fused_rows(source, info, gate_up, down, dtype)
    return _per_expert_rows(source, info, layer, names, dtype)


def _packed_rows(
    source: Shards, stored_EI: torch.Tensor, names: Mapping[str, str], dtype: str
) -> LayerRows:
    offsets = packed_offsets(stored_EI).tolist()

    def rows(part: str, expert: int) -> torch.Tensor:
        return source.tensor(names[f"packed.{part}"])[offsets[expert] : offsets[expert + 1]]

    return LayerRows(dtype, rows, stored_EI)


def _fused_rows(
    source: Shards, info: CheckpointInfo, gate_up: str, down: str, dtype: str
) -> LayerRows:
    """3-D tensors. Both shapes together say which way round, even where I = H or 2I = H."""
    experts, size, hidden = info.num_experts, info.intermediate_size, info.hidden_size
    shapes = [source.shape(gate_up), source.shape(down)]
    upright = [[experts, 2 * size, hidden], [experts, hidden, size]]
    transposed = [[experts, hidden, 2 * size], [experts, size, hidden]]
    if shapes not in (upright, transposed):
        raise ValueError(
            f"{gate_up} and {down} are {shapes[0]} and {shapes[1]}, wanted {upright[0]} and "
            f"{upright[1]}, or {transposed[0]} and {transposed[1]}; other layouts are not exported"
        )

    def rows(part: str, expert: int) -> torch.Tensor:
        matrix = source.tensor(down if part == "down_t" else gate_up)[expert]
        if (shapes == transposed) != (part == "down_t"):
            matrix = matrix.t()
        return {"gate": matrix[:size], "up": matrix[size:], "down_t": matrix}[part]

    return LayerRows(dtype, rows)


def _per_expert_rows(
    source: Shards, info: CheckpointInfo, layer: int, names: Mapping[str, str], dtype: str
) -> LayerRows:
    def expected(spelling: Mapping[str, str]) -> dict[str, list[int]]:
        upright = [info.intermediate_size, info.hidden_size]
        return {
            f"{expert}.{projection}.weight": upright[::-1] if part == "down" else upright
            for expert in range(info.num_experts)
            for part, projection in spelling.items()
        }

    spelling = max(PER_EXPERT, key=lambda one: len(expected(one).keys() & names.keys()))
    wanted, prefix = expected(spelling), f"{info.blocks[layer]}.experts."
    if unknown := sorted(names.keys() - wanted.keys(), key=natural):
        raise ValueError(
            f"{prefix}{unknown[0]} is not the plain weight of one expert's projection; quantized "
            "experts, expert biases and other layouts are not exported"
        )
    if missing := sorted(wanted.keys() - names.keys(), key=natural):
        raise ValueError(f"{prefix}{missing[0]} is missing; fetch the checkpoint again")
    for suffix, name in names.items():
        if source.shape(name) != wanted[suffix]:
            raise ValueError(
                f"{name} is {source.shape(name)}, wanted {wanted[suffix]}; other layouts are not "
                "exported"
            )

    def rows(part: str, expert: int) -> torch.Tensor:
        matrix = source.tensor(names[f"{expert}.{spelling[part.removesuffix('_t')]}.weight"])
        return matrix.t() if part == "down_t" else matrix

    return LayerRows(dtype, rows)


def natural(name: str) -> list[Any]:
    """Sort key that puts layers.2 before layers.10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
