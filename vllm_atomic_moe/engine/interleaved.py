"""gpt-oss's experts, whose tensors hold all experts of a layer, one expert at a time.

vLLM loads them as a whole by narrowing and copying, which packed rows are no target for; or expert
by expert through `weight_loader`, if the checkpoint names them so. Here it does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from vllm_atomic_moe.engine.compat import KNOWN_EXPERTS

if TYPE_CHECKING:
    from vllm_atomic_moe.engine.layer import AtomicRoutedExperts

Weights = Iterable[tuple[str, torch.Tensor]]
OF_ALL_EXPERTS = re.compile(r"(.*\.mlp\.experts)\.((?:gate_up|down)_proj(?:_bias)?)")


@contextmanager
def interleaved_experts_split(layers: Sequence[AtomicRoutedExperts], model: Any) -> Iterator[None]:
    """While open, `model.load_weights` gets gpt-oss's tensors split by expert; others as they are.

    Args:
        layers: this rank's packed layers.
        model: the model under construction.
    """
    if not any(type(layer).__name__ in KNOWN_EXPERTS for layer in layers):
        yield
        return
    load_weights = model.load_weights

    def split(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            found = OF_ALL_EXPERTS.fullmatch(name)
            if found is None:
                yield name, tensor
                continue
            for expert, part in enumerate(tensor.unbind()):
                yield f"{found[1]}.{expert}.{found[2]}", part

    model.load_weights = lambda weights: load_weights(split(weights))
    try:
        yield
    finally:
        del model.load_weights
