"""The score file: `layers.{i}.score` float32 [E, I] per MoE layer, higher = more important.

Methods that score experts beside atoms (tenp) add `layers.{i}.expert_score` float32 [E].

Legend: E experts, I full intermediate size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
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
        method: how they were made, a key of `scoring.METHODS`.
        options: that method's options (JSON object `method_options` in the file).
        model: identity of the model, as in a profile.
        calibration: what the statistics say about their text.
        scores: MoE layer index -> float32 [E, I]; +inf for atoms that are to stay, never NaN.
        expert_scores: MoE layer index -> float32 [E], for all layers or none; likewise.
    """

    method: str
    options: Mapping[str, Any]
    model: Mapping[str, Any]
    calibration: Mapping[str, Any]
    scores: Mapping[int, torch.Tensor]
    expert_scores: Mapping[int, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", MappingProxyType(dict(sorted(self.scores.items()))))
        layers, experts, size = model_shape(self.model)
        check_layers(list(self.scores), layers)
        if self.expert_scores:
            check_layers(sorted(self.expert_scores), layers)
        for name, tensors, shape in (
            ("score", self.scores, (experts, size)),
            ("expert_score", self.expert_scores, (experts,)),
        ):
            for layer, score in tensors.items():
                check_tensor(f"layers.{layer}.{name}", score, torch.float32, shape)
                if bool(score.isnan().any()):
                    raise ValueError(f"layers.{layer}.{name} holds NaN; calibrate and score again")

    @property
    def layers(self) -> dict[int, LayerScores]:
        """MoE layer index -> scores of that layer."""
        return {
            layer: LayerScores(score, self.expert_scores.get(layer))
            for layer, score in self.scores.items()
        }

    @classmethod
    def read(cls, path: Path) -> Scores:
        """Read and check the score file at `path`.

        Raises:
            ValueError: the file is broken, of another format or version, or its tensors do not
                have the shapes its own metadata promises.
        """
        metadata, layers = read_layers(path, FORMAT, FORMAT_VERSION, ("score",), ("expert_score",))
        if not metadata.get("method"):
            raise ValueError(f"{path}: metadata `method` is missing; score again")
        has_options = "method_options" in metadata
        options = json_object(path, metadata, "method_options") if has_options else {}
        model = json_object(path, metadata, "model")
        calibration = json_object(path, metadata, "calibration")
        scores = {layer: tensors["score"] for layer, tensors in layers.items()}
        experts = {
            layer: tensors["expert_score"]
            for layer, tensors in layers.items()
            if "expert_score" in tensors
        }
        try:
            return cls(metadata["method"], options, model, calibration, scores, experts)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def write(self, path: Path) -> None:
        """Write the scores to `path`, complete or not at all."""
        tensors = {f"layers.{layer}.score": score for layer, score in self.scores.items()}
        for layer, score in self.expert_scores.items():
            tensors[f"layers.{layer}.expert_score"] = score
        metadata = {"format": FORMAT, "format_version": FORMAT_VERSION, **self.metadata()}
        write_safetensors(tensors, metadata, path)

    def metadata(self) -> dict[str, str]:
        """What a profile made from these scores inherits."""
        options = {"method_options": json.dumps(dict(self.options))} if self.options else {}
        return {
            "method": self.method,
            **options,
            "model": json.dumps(dict(self.model)),
            "calibration": json.dumps(dict(self.calibration)),
            "created_by": f"vllm-atomic-moe {__version__}",
        }
