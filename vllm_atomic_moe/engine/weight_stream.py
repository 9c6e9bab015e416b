"""Change the tensors that vLLM's loader reads on their way from the checkpoint to the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Weights = Iterable[tuple[str, torch.Tensor]]


@contextmanager
def weights_through(model: Any, change: Callable[[Weights], Weights]) -> Iterator[None]:
    """While open, `model.load_weights` gets the checkpoint's tensors through `change`."""
    load_weights, before = model.load_weights, vars(model).get("load_weights")
    model.load_weights = lambda weights: load_weights(change(weights))
    try:
        yield
    finally:
        del model.load_weights
        if before is not None:
            model.load_weights = before
