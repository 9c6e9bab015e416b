"""Loading quantized experts: codes and scales go from the checkpoint to the packed layers directly.

vLLM's quantization methods for experts are not built: their constructors choose a kernel, and raise
where there is none. What vLLM's models would make of these tensors' names is not needed either; the
table of layouts knows them, so that they are taken out of the stream on the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from vllm_atomic_moe.engine.weight_stream import Weights, weights_through
from vllm_atomic_moe.experts.formats import Projection
from vllm_atomic_moe.files.layouts import ExpertTensor, quantized_tensor
from vllm_atomic_moe.files.quantization import IGNORED, Scheme

if TYPE_CHECKING:
    from vllm_atomic_moe.engine.layer import AtomicRoutedExperts


@contextmanager
def codes_taken_by(
    layers: Sequence[AtomicRoutedExperts], model: Any, schemes: Mapping[int, Scheme]
) -> Iterator[None]:
    """While open, `model.load_weights` gives quantized experts to `layers`, the rest to the model.

    Experts of layers that another pipeline rank holds are left out.

    Args:
        layers: this rank's packed layers.
        model: the model under construction.
        schemes: layer index -> how its experts are quantized; plain ones go to the model.
    """
    by_index = {layer.index: layer for layer in layers}
    quantized = {index for index, scheme in schemes.items() if scheme.kind != "plain"}
    if not quantized:
        yield
        return

    def others(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            found = quantized_tensor(name)
            if found is None or found.layer not in quantized:
                yield name, tensor
            elif found.layer in by_index and found.quantity not in IGNORED:
                layer = by_index[found.layer]
                for expert, projection, part in _of_each_expert(found, tensor):
                    layer.load_part(name, expert, projection, found.quantity, part)

    with weights_through(model, others):
        yield


def _of_each_expert(
    found: ExpertTensor, tensor: torch.Tensor
) -> Iterator[tuple[int, Projection, torch.Tensor]]:
    """A tensor of one expert, or one of all experts taken apart, gate and up interleaved."""
    if found.expert is not None:
        assert found.part in ("gate", "up", "down")
        yield found.expert, found.part, tensor  # type: ignore[misc]
        return
    for expert, part in enumerate(tensor.unbind()):
        if found.part == "gate_up":
            yield expert, "gate", part[0::2]
            yield expert, "up", part[1::2]
        else:
            yield expert, "down", part
