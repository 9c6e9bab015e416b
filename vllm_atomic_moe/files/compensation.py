"""Compensation: a scale and a bias for every expert's output, which offset the error of pruning.

Profiles of format version 2 hold them as `layers.{i}.output_scale` [E] and
`layers.{i}.output_bias` [E, H]. An expert's output becomes scale · (output of its kept atoms) +
bias, before the router weight.

Legend: E experts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

SCALE, BIAS = "output_scale", "output_bias"
RANKS = {SCALE: 1, BIAS: 2}


@dataclass(frozen=True, slots=True, eq=False)
class Compensation:
    """The compensation of one layer.

    Attributes:
        scale_E: float32 [E].
        bias_EH: float32 [E, H].
    """

    scale_E: torch.Tensor
    bias_EH: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by the last part of their names in the file."""
        return {SCALE: self.scale_E.contiguous(), BIAS: self.bias_EH.contiguous()}

    def clone(self) -> Compensation:
        """A copy that does not share memory with the file."""
        return Compensation(self.scale_E.clone(), self.bias_EH.clone())


def gather(tensors: Mapping[int, Mapping[str, torch.Tensor]]) -> dict[int, Compensation]:
    """The compensation of each layer that has one.

    Args:
        tensors: layer index -> last part of the name -> tensor.

    Raises:
        ValueError: a layer has only one of the two.
    """
    found = {}
    for layer, named in tensors.items():
        if missing := sorted(RANKS.keys() - named.keys()):
            raise ValueError(
                f"layers.{layer}.{missing[0]} is missing beside {', '.join(named)}; a compensated "
                "layer has both: make the profile again"
            )
        found[layer] = Compensation(named[SCALE], named[BIAS])
    return found


def check_compensation(
    compensation: Mapping[int, Compensation], shapes: Mapping[int, tuple[int, ...]]
) -> None:
    """Refuse tensors that are not finite float32 of all experts of a layer.

    Args:
        compensation: by layer.
        shapes: layer index -> shape of its mask, [E, I].

    Raises:
        ValueError: one line without the profile's name.
    """
    widths = {it.bias_EH.shape[-1] for it in compensation.values() if it.bias_EH.dim()}
    for layer, of_layer in compensation.items():
        for name, tensor in of_layer.tensors().items():
            where = f"layers.{layer}.{name}"
            if tensor.dtype != torch.float32 or tensor.dim() != RANKS[name]:
                dtype = str(tensor.dtype).removeprefix("torch.")
                raise ValueError(
                    f"{where} is {dtype} {list(tensor.shape)}, wanted float32 of rank {RANKS[name]}"
                )
            if layer not in shapes or tensor.shape[0] != shapes[layer][0] or len(widths) > 1:
                raise ValueError(
                    f"{where} is {list(tensor.shape)}, wanted one of every expert beside "
                    f"layers.{layer}.keep [E, I], and one hidden size"
                )
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"{where} is not finite; make the profile again")
