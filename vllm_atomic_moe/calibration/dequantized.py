"""A quantized checkpoint decoded to plain weights, one matrix at a time.

transformers reads some formats correctly, some not at all, and some silently without their scales.
So this file decodes all of them, for experts, attention and the rest, and gives transformers plain
weights under the usual names. They take as much memory as the unquantized original.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from vllm_atomic_moe.experts.encoding import encode
from vllm_atomic_moe.experts.formats import decode
from vllm_atomic_moe.files.layouts import FUSED_CODES, QUANTITIES
from vllm_atomic_moe.files.quantization import (
    IGNORED,
    KINDS,
    MATRICES,
    Part,
    Scheme,
    kind_of,
    scheme_of_down,
)
from vllm_atomic_moe.files.shards import Shards

_PARTS = "|".join({*QUANTITIES, *IGNORED, "weight"})
# A part of one matrix, or of gpt-oss's matrices of all experts.
_OF_A_MATRIX = re.compile(
    rf"(?P<one>.*)\.(?P<part>{_PARTS})|(?P<all>.*)_(?P<whole>{'|'.join(FUSED_CODES)})"
)


@dataclass(frozen=True, slots=True)
class Decoded:
    """A tensor that is decoded when transformers reads it, like a slice of a file.

    Attributes:
        shape: of the result.
        read: decodes it.
        on_failure: called with exceptions of `read`, which transformers hides.
    """

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    on_failure: Callable[[ValueError], None]

    def __getitem__(self, index: Any) -> torch.Tensor:
        try:
            return self.read()[index]
        except ValueError as error:
            self.on_failure(error)
            raise


def stored_weights(
    source: Shards,
    settings: Mapping[str, Any],
    names: Iterable[str],
    on_failure: Callable[[ValueError], None],
) -> dict[str, Decoded]:
    """Name -> tensor, except the parts that only describe the quantization of another tensor.

    Args:
        source: the checkpoint's shards; they stay open until all is read.
        settings: quantization settings of its configuration; empty if nothing is quantized.
        names: tensors of the checkpoint; all parts of a matrix, or none.
        on_failure: called with exceptions of reading.

    Returns:
        Plain tensors as they are; of quantized matrices `….weight`, float32 [N, K], and of
        gpt-oss's experts their matrices transposed, float32 [E, K, N].

    Raises:
        ValueError: a matrix has an unknown quantization. Reading raises it for broken codes or
            scales.
    """

    def plain(name: str) -> Decoded:
        return Decoded((*source.shape(name),), partial(source.tensor, name), on_failure)

    if not settings:
        return {name: plain(name) for name in names}
    weights: dict[str, Decoded] = {}
    matrices: dict[tuple[str, bool], dict[str, str]] = defaultdict(dict)
    for name in names:
        found = _OF_A_MATRIX.fullmatch(name)
        if found is None:
            weights[name] = plain(name)
        elif (part := found["part"] or found["whole"]) not in IGNORED:
            matrices[found["one"] or found["all"], found["one"] is None][part] = name
    for (stem, fused), parts in matrices.items():
        # Norms have a weight too; learned scales may be called like those of a matrix.
        alone = parts.keys() == {"weight"} and len(source.shape(parts["weight"])) != 2
        if alone or not parts.keys() & MATRICES.keys():
            weights |= {name: plain(name) for name in parts.values()}
            continue
        told = {part: (source.dtype(name), (*source.shape(name),)) for part, name in parts.items()}
        outputs = _outputs(told)
        scheme, inputs = scheme_of_down(stem, told, outputs, settings)
        if scheme.plain:
            weights[parts["weight"]] = plain(parts["weight"])
            continue
        read = partial(_decoded, source, parts, scheme, outputs, inputs)
        experts = told["blocks"][1][:1] if fused else ()
        shape = (*experts, inputs, outputs) if fused else (outputs, inputs)
        weights[stem if fused else f"{stem}.weight"] = Decoded(shape, read, on_failure)
    return weights


def _outputs(parts: Mapping[str, Part]) -> int:
    """N of a matrix; of a kind that is not known, which is refused later, any number."""
    name, shape = next((name, shape) for name, (_, shape) in parts.items() if name in MATRICES)
    try:
        if len(shape) == MATRICES[name]:
            return KINDS[kind_of(parts)].sizes(shape)[0]
    except KeyError:
        pass  # plain, or FP8 with the other spelling of its scales
    return shape[0] if shape else 0


def _decoded(
    source: Shards, names: Mapping[str, str], scheme: Scheme, outputs: int, inputs: int
) -> torch.Tensor:
    parts = {part: source.tensor(names[part]) for part in scheme.parts}
    row = scheme.row_format(outputs, inputs)

    def transposed(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        # As a down_proj, where the order of activations may be any.
        return decode(encode(scheme, "down", parts, outputs, inputs), row, "down")

    try:
        if not scheme.facts.fused:
            return transposed(parts).t()
        experts = [dict(zip(parts, of, strict=True)) for of in zip(*parts.values(), strict=True)]
        return torch.stack([transposed(expert) for expert in experts])
    except ValueError as error:
        raise ValueError(f"{names[scheme.parts[0]]}: {error}; fetch the checkpoint again") from None
