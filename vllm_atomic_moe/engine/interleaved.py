"""gpt-oss's experts, whose tensors hold all experts of a layer, one expert at a time.

By default vLLM copies a whole tensor into its parameter, and packed layers have none to copy into.
It calls `weight_loader` once per expert if the checkpoint's names carry an expert's number, so that
is how this module names them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from vllm_atomic_moe.engine.compat import KNOWN_EXPERTS
from vllm_atomic_moe.engine.weight_stream import Weights, weights_through

if TYPE_CHECKING:
    from vllm_atomic_moe.engine.layer import AtomicRoutedExperts

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

    def split(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            found = OF_ALL_EXPERTS.fullmatch(name)
            if found is None:
                yield name, tensor
                continue
            for expert, part in enumerate(tensor.unbind()):
                yield f"{found[1]}.{expert}.{found[2]}", part

    with weights_through(model, split):
        yield
