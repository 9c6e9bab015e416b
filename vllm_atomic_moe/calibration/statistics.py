"""Statistics: what calibration leaves behind, sums over tokens and nothing larger than [D, E, I].

Two numbers per atom carry HEAPr (see `scoring/heapr.py`). Because they are sums, statistics of two
runs over different text can be added. They are kept per domain, so that a mask can be made for
some of the domains from one run.

Legend: D domains, E experts, I full intermediate size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from vllm_atomic_moe import __version__
from vllm_atomic_moe.tensor_files import (
    check_layers,
    check_tensor,
    json_object,
    model_shape,
    read_layers,
    write_safetensors,
)

FORMAT = "atomic-moe-statistics"
FORMAT_VERSION = "1"
SUMS = ("count", "h2", "g2")


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """Sums over calibration tokens.

    Attributes:
        model: `CheckpointInfo.identity()` of the calibrated model.
        calibration: how the sums came about: `domains` (names, in the order of D), `corpora`
            (name, sha256, domain, documents and tokens of every file), `tokens` (run through the
            model), `seq_len`, `samples`, `seed`, `dtype`.
        sums: MoE layer index -> name -> float64 tensor:
            `count` [D, E], tokens routed to the expert;
            `h2` [D, E, I], Σ h² over those tokens, h = act(gate·x) ⊙ (up·x);
            `g2` [D, E, I], Σ (∂ℓ/∂h)², ℓ the language-model loss summed over a window.
    """

    model: Mapping[str, Any]
    calibration: Mapping[str, Any]
    sums: Mapping[int, Mapping[str, torch.Tensor]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sums", MappingProxyType(dict(sorted(self.sums.items()))))
        layers, experts, size = model_shape(self.model)
        check_layers(list(self.sums), layers)
        domains = self.calibration.get("domains")
        if not isinstance(domains, list) or not domains:
            raise ValueError("calibration metadata has no list `domains`; calibrate again")
        shape = (len(domains), experts, size)
        for layer, tensors in self.sums.items():
            for name in SUMS:
                label = f"layers.{layer}.{name}"
                wanted = shape[:2] if name == "count" else shape
                check_tensor(label, tensors[name], torch.float64, wanted)
                if not bool((tensors[name].isfinite() & (tensors[name] >= 0)).all()):
                    raise ValueError(f"{label} holds a negative or not finite sum; calibrate again")

    @classmethod
    def read(cls, path: Path) -> Statistics:
        """Read and check the statistics file at `path`.

        Raises:
            ValueError: the file is broken, of another format or version, its tensors do not have
                the shapes its own metadata promises, or a sum is negative or not finite.
        """
        metadata, sums = read_layers(path, FORMAT, FORMAT_VERSION, SUMS)
        model = json_object(path, metadata, "model")
        calibration = json_object(path, metadata, "calibration")
        try:
            return cls(model, calibration, sums)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def write(self, path: Path) -> None:
        """Write the statistics to `path`, complete or not at all."""
        tensors = {
            f"layers.{layer}.{name}": tensor.contiguous()
            for layer, named in self.sums.items()
            for name, tensor in named.items()
        }
        metadata = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "model": json.dumps(dict(self.model)),
            "calibration": json.dumps(dict(self.calibration)),
            "created_by": f"vllm-atomic-moe {__version__}",
        }
        write_safetensors(tensors, metadata, path)


class StatisticsAccumulator:
    """Adds up what a run shows, in float64 on the model's device; moved once, at the end.

    Attributes:
        domain: index of the domain whose windows are running; set it before each batch.
    """

    def __init__(
        self,
        layers: Sequence[int],
        num_domains: int,
        num_experts: int,
        intermediate_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.domain = 0
        shape = (num_domains, num_experts, intermediate_size)
        self._sums = {
            layer: {
                "count": torch.zeros(shape[:2], dtype=torch.float64, device=device),
                "h2": torch.zeros(shape, dtype=torch.float64, device=device),
                "g2": torch.zeros(shape, dtype=torch.float64, device=device),
            }
            for layer in layers
        }

    def add_activation(self, layer: int, expert: int, h: torch.Tensor) -> None:
        """Add the activations h [rows, I] of one expert; `h` is not modified."""
        self._sums[layer]["count"][self.domain, expert] += h.shape[0]
        self._sums[layer]["h2"][self.domain, expert] += _sum_of_squares(h)

    def add_gradient(self, layer: int, expert: int, g: torch.Tensor) -> None:
        """Add the gradients ∂ℓ/∂h [rows, I] of one expert; `g` is not modified."""
        self._sums[layer]["g2"][self.domain, expert] += _sum_of_squares(g)

    def sums(self) -> dict[int, dict[str, torch.Tensor]]:
        """Layer index -> name -> float64 sum, on the CPU."""
        return {
            layer: {name: tensor.cpu() for name, tensor in named.items()}
            for layer, named in self._sums.items()
        }


def _sum_of_squares(rows: torch.Tensor) -> torch.Tensor:
    """Σ over rows of the square, in float64: [rows, I] -> [I]."""
    return rows.detach().double().square().sum(dim=0)
