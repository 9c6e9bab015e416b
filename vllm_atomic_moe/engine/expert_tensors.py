"""Load experts that vLLM's models cannot pass to packed layers directly from the stream.

These are quantized experts: vLLM's quantization methods for experts are not built, since their
constructors choose a kernel and raise if there is none. And experts of a model's own class
(gpt-oss, DBRX), which copies a whole tensor into a parameter that packed layers do not have. The
table of layouts knows the tensors' names, so that this file takes them out of the stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from vllm_atomic_moe.engine.weight_stream import Weights, weights_through
from vllm_atomic_moe.files.checkpoint import CheckpointInfo
from vllm_atomic_moe.files.layouts import ExpertTensor, quantized_tensor
from vllm_atomic_moe.files.quantization import IGNORED
from vllm_atomic_moe.files.row_formats import Projection

if TYPE_CHECKING:
    from vllm_atomic_moe.engine.layer import AtomicRoutedExperts


@contextmanager
def experts_taken_by(
    layers: Sequence[AtomicRoutedExperts], model: Any, checkpoint: CheckpointInfo
) -> Iterator[None]:
    """While open, `model.load_weights` gives such experts to `layers`, the rest to the model.

    Experts of layers on other pipeline ranks are skipped; those of prediction heads, which are in
    other blocks, go to the model.

    Args:
        layers: this rank's packed layers.
        model: the model under construction.
        checkpoint: the checkpoint of these tensors.
    """
    by_index = {layer.index: layer for layer in layers}
    special = any(layer.special for layer in layers)
    blocks = {
        index: checkpoint.blocks[index]
        for index, scheme in checkpoint.schemes.items()
        if special or not scheme.plain
    }
    if not blocks:
        yield
        return

    def others(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            found = quantized_tensor(name)
            if found is None or found.block != blocks.get(found.layer):
                yield name, tensor
            elif found.layer in by_index and found.quantity not in IGNORED:
                layer = by_index[found.layer]
                experts = layer.global_num_experts
                for expert, projection, part in _of_each_expert(found, tensor, experts):
                    layer.load_part(name, expert, projection, found.quantity, part)

    with weights_through(model, others):
        yield


def _of_each_expert(
    found: ExpertTensor, tensor: torch.Tensor, num_experts: int
) -> Iterator[tuple[int, Projection, torch.Tensor]]:
    """A tensor of one expert, or the parts of a tensor of all experts: gpt-oss's, with transposed
    weights and interleaved gate and up; or DBRX's stacked ones, with down transposed.
    """
    if found.expert is not None:
        assert found.part in ("gate", "up", "down")
        yield found.expert, found.part, tensor  # type: ignore[misc]
        return
    weight = found.quantity == "weight"
    below = weight and tensor.dim() == 2
    if below and tensor.shape[0] % num_experts == 0:
        tensor = tensor.view(num_experts, -1, tensor.shape[1])
    for expert, part in enumerate(tensor.unbind()):
        matrix = part.t() if weight and (not below or found.part == "down") else part
        if found.part == "gate_up":
            yield expert, "gate", matrix[0::2]
            yield expert, "up", matrix[1::2]
        else:
            yield expert, found.part, matrix  # type: ignore[misc]
