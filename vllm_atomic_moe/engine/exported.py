"""Loading an exported checkpoint: packed rows go from its shards to the packed layers directly.

vLLM's loader reads the shards and the model's own `load_weights` places what the model knows. The
packed rows never get there: they are already what the layers hold, one tensor for all experts of a
layer, and no name mapping of vLLM's knows them. They are taken out of the stream on the way.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import ModelConfig

from vllm_atomic_moe.engine.weight_stream import Weights, weights_through
from vllm_atomic_moe.files.layouts import expert_tensor

if TYPE_CHECKING:
    from vllm_atomic_moe.engine.layer import AtomicRoutedExperts
    from vllm_atomic_moe.experts.packing import Projection

PART_PROJECTIONS: dict[str, Projection] = {"gate": "gate", "up": "up", "down_t": "down"}


def reading_from(folder: Path, model_config: ModelConfig) -> ModelConfig:
    """A copy of `model_config` whose weights are in `folder`; the original is not modified."""
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

    Packed rows of layers that another pipeline rank holds are left out.

    Args:
        layers: this rank's packed layers.
        model: the model under construction.
        stored: layer index -> bool [E, I], the atoms whose rows the checkpoint holds.
    """
    by_index = {layer.index: layer for layer in layers}

    def others(weights: Weights) -> Weights:
        for name, tensor in weights:
            found = expert_tensor(name)
            if found is None or not found.packed or found.layer not in stored:
                yield name, tensor
                continue
            index, projection = found.layer, PART_PROJECTIONS.get(found.part)
            if index in by_index and projection is not None:
                by_index[index].load_packed(name, projection, tensor, stored[index])

    with weights_through(model, others):
        yield
