"""The score file: `layers.{i}.score` float32 [E, I] per MoE layer, higher = more important.

Methods that also score experts (tenp) add `layers.{i}.expert_score` float32 [E].

Legend: E experts, I full intermediate size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from vllm_atomic_moe import __version__
from vllm_atomic_moe.files.tensors import (
    check_layers,
    check_tensor,
    json_object,
    model_shape,
    read_layers,
    write_safetensors,
)
from vllm_atomic_moe.scoring.masks import LayerScores

FORMAT = "atomic-moe-scores"
FORMAT_VERSION = "1"


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Scores of every atom.

    Attributes:
        method: the method that made them, a key of `scoring.known_methods().entries`.
        options: that method's options (JSON object `method_options` in the file).
        model: identity of the model, as in a profile.
        calibration: the statistics' description of their text.
        layers: MoE layer index -> scores, never NaN; all layers have `experts`, or none.
        package: "PACKAGE VERSION" of a method that is not ours.
    """

    method: str
    options: Mapping[str, Any]
    model: Mapping[str, Any]
    calibration: Mapping[str, Any]
    layers: Mapping[int, LayerScores]
    package: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", MappingProxyType(dict(sorted(self.layers.items()))))
        layers, experts, size = model_shape(self.model)
        check_layers(list(self.layers), layers)
        if beside := [i for i, of_layer in self.layers.items() if of_layer.experts is not None]:
            check_layers(beside, layers)
        shapes = {"score": (experts, size), "expert_score": (experts,)}
        for name, score in self._tensors().items():
            check_tensor(name, score, torch.float32, shapes[name.rpartition(".")[2]])
            if bool(score.isnan().any()):
                raise ValueError(f"{name} holds NaN; calibrate and score again")

    @classmethod
    def read(cls, path: Path) -> Scores:
        """Read and check the score file at `path`.

        Raises:
            ValueError: the file is broken, of another format or version, or its tensors do not
                have the shapes of its own metadata.
        """
        metadata, layers = read_layers(path, FORMAT, FORMAT_VERSION, ("score",), ("expert_score",))
        if not metadata.get("method"):
            raise ValueError(f"{path}: metadata `method` is missing; score again")
        has_options = "method_options" in metadata
        options = json_object(path, metadata, "method_options") if has_options else {}
        model = json_object(path, metadata, "model")
        calibration = json_object(path, metadata, "calibration")
        scores = {
            layer: LayerScores(tensors["score"], tensors.get("expert_score"))
            for layer, tensors in layers.items()
        }
        try:
            package = metadata.get("method_package")
            return cls(metadata["method"], options, model, calibration, scores, package)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def write(self, path: Path) -> None:
        """Write the scores to `path`, complete or not at all."""
        metadata = {"format": FORMAT, "format_version": FORMAT_VERSION, **self.metadata()}
        write_safetensors(self._tensors(), metadata, path)

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Name in the file -> tensor."""
        tensors = {f"layers.{i}.score": of_layer.atoms for i, of_layer in self.layers.items()}
        for i, of_layer in self.layers.items():
            if of_layer.experts is not None:
                tensors[f"layers.{i}.expert_score"] = of_layer.experts
        return tensors

    def metadata(self) -> dict[str, str]:
        """Metadata that a profile made from these scores inherits."""
        options = {"method_options": json.dumps(dict(self.options))} if self.options else {}
        package = {"method_package": self.package} if self.package else {}
        return {
            "method": self.method,
            **package,
            **options,
            "model": json.dumps(dict(self.model)),
            "calibration": json.dumps(dict(self.calibration)),
            "created_by": f"vllm-atomic-moe {__version__}",
        }
