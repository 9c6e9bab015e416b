"""Load an exported checkpoint: packed rows go from its shards directly to the packed layers.

vLLM's loader reads the shards, and the model's own `load_weights` places the weights that the model
knows. Packed rows never get there: they have the layers' own form already, one tensor for all
experts of a layer, and vLLM's name mappings do not know them, so this file takes them out of the
stream. Codes of quantized rows wait for their tables; then each expert becomes what the original
checkpoint would have given.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import ModelConfig

from vllm_atomic_moe.engine.weight_stream import Weights, weights_through
from vllm_atomic_moe.experts.stored import StoredRows
from vllm_atomic_moe.files.layouts import expert_tensor
from vllm_atomic_moe.files.row_formats import PART_PROJECTIONS, Projection

if TYPE_CHECKING:
    from vllm_atomic_moe.engine.layer import AtomicRoutedExperts


def reading_from(folder: Path, model_config: ModelConfig) -> ModelConfig:
    """A copy of `model_config` with its weights in `folder`; does not modify the original."""
    moved = copy.copy(model_config)
    moved.model, moved.revision = str(folder), None
    # Where vLLM's streaming loader looks first.
    moved.model_weights = ""
    return moved


@contextmanager
def packed_rows_taken_by(
    layers: Sequence[AtomicRoutedExperts], model: Any, stored: Mapping[int, torch.Tensor]
) -> Iterator[None]:
    """While open, `model.load_weights` gives packed rows to `layers` and the rest to the model.

    Packed rows of layers on other pipeline ranks are skipped.

    Args:
        layers: this rank's packed layers.
        model: the model under construction.
        stored: layer index -> bool [E, I], the atoms that the checkpoint holds.
    """
    by_index = {layer.index: layer for layer in layers}
    gathered: dict[tuple[int, str], dict[str, torch.Tensor]] = defaultdict(dict)

    def others(weights: Weights) -> Weights:
        for name, tensor in weights:
            found = expert_tensor(name)
            if found is None or not found.packed or found.layer not in stored:
                yield name, tensor
                continue
            layer, projection = by_index.get(found.layer), PART_PROJECTIONS.get(found.part)
            if layer is None or projection is None:
                continue
            if found.quantity == "bias":
                _load_biases(layer, name, projection, tensor, stored[found.layer])
            elif layer.scheme.of(found.part).plain:
                layer.mark_loaded(f"{projection}_proj", name)
                layer.packed.load_rows(projection, tensor, stored[found.layer])
            else:
                parts = gathered[found.layer, found.part]
                wanted = {"weight", *layer.packed.row_format.stored_tables(projection)}
                if found.quantity not in wanted - parts.keys():
                    raise ValueError(
                        f"{name} arrives twice, or is not wanted; export the model again"
                    )
                parts[found.quantity] = tensor
                if parts.keys() == wanted:
                    layer.mark_loaded(f"{projection}_proj.weight", name)
                    _load_codes(layer, name, projection, parts, stored[found.layer])
                    # Remembered after loading, to detect a second arrival.
                    gathered[found.layer, found.part] = dict.fromkeys(wanted, tensor[:0])

    with weights_through(model, others):
        yield


def _load_codes(
    layer: AtomicRoutedExperts,
    name: str,
    projection: Projection,
    parts: Mapping[str, torch.Tensor],
    stored_EI: torch.Tensor,
) -> None:
    """Load one projection of all quantized experts; `stored_EI` says which atoms it has."""
    packed = layer.packed
    try:
        rows = StoredRows(parts, stored_EI, packed.row_format, projection, packed.hidden_size)
        for expert in layer.own_experts:
            packed.load_encoded(expert, projection, rows.expert(expert))
    except ValueError as error:
        raise ValueError(f"{name}: {error}; export the model again") from None


def _load_biases(
    layer: AtomicRoutedExperts,
    name: str,
    projection: Projection,
    biases: torch.Tensor,
    stored_EI: torch.Tensor,
) -> None:
    """Load the biases of one projection: of the stored atoms [P], or of down [E, H]."""
    experts, size = stored_EI.shape
    down = projection == "down"
    wanted = [experts, layer.packed.hidden_size] if down else [int(stored_EI.sum())]
    if list(biases.shape) != wanted:
        raise ValueError(f"{name} is {list(biases.shape)}, wanted {wanted}; export the model again")
    if not down:
        whole = torch.zeros(experts, size, dtype=biases.dtype)
        whole[stored_EI] = biases
        biases = whole
    for expert in layer.own_experts:
        layer.load_bias(expert, projection, biases[expert], name)
