"""Between the checkpoint and the model: what vLLM's loader reads, changed on its way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Weights = Iterable[tuple[str, torch.Tensor]]


@contextmanager
def weights_through(model: Any, change: Callable[[Weights], Weights]) -> Iterator[None]:
    """While open, `model.load_weights` gets what `change` makes of the checkpoint's tensors."""
    load_weights, before = model.load_weights, vars(model).get("load_weights")
    model.load_weights = lambda weights: load_weights(change(weights))
    try:
        yield
    finally:
        del model.load_weights
        if before is not None:
            model.load_weights = before
