"""One example file per format of `atomic-moe import`, with its masks.

For the import tests, and for serving tests that need an imported profile of every format.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from vllm_atomic_moe.files.checkpoint import CheckpointInfo


@dataclass(frozen=True, slots=True)
class Example:
    """A file to import.

    Attributes:
        format: FORMAT on the command line.
        path: the file.
        ratio: the --ratio it needs, if any.
        keep: its masks: layer -> bool [E, I].
        routable: the experts that the router may choose: layer -> bool [E], if some are excluded.
    """

    format: str
    path: Path
    ratio: float | None
    keep: dict[int, torch.Tensor]
    routable: dict[int, torch.Tensor] = field(default_factory=dict)

    def arguments(self) -> list[str]:
        """FORMAT FILE [--ratio R]."""
        ratio = [] if self.ratio is None else ["--ratio", str(self.ratio)]
        return [self.format, str(self.path), *ratio]


def write_examples(model: CheckpointInfo, directory: Path, seed: int = 0) -> dict[str, Example]:
    """Write one file per format for `model`, half of its experts or atoms pruned at random.

    Returns:
        Name of the example -> example; the names are the formats, and a few more for variants.
    """
    generator = torch.Generator().manual_seed(seed)
    half = max(model.experts_per_token, model.num_experts // 2)
    ranking = {
        layer: torch.randperm(model.num_experts, generator=generator).tolist()
        for layer in model.layers
    }
    kept = {layer: experts[:half] for layer, experts in ranking.items()}
    shape = (model.num_experts, model.intermediate_size)
    scores = {layer: torch.rand(shape, generator=generator) for layer in model.layers}
    masks = {layer: torch.rand(shape, generator=generator) < 0.5 for layer in model.layers}
    pruned = [
        [layer, expert] for layer, experts in sorted(ranking.items()) for expert in experts[half:]
    ]
    directory.mkdir(parents=True, exist_ok=True)

    def text(name: str, content: str) -> Path:
        path = directory / name
        path.write_text(content)
        return path

    def tensors(name: str, content: dict[str, torch.Tensor]) -> Path:
        save_file(content, directory / name)
        return directory / name

    ratio = 1 - half / model.num_experts
    keep, routable = whole(kept, model)
    notes = {
        "method": "shapley",
        "selected_experts": half * len(kept),
        "total_experts": model.num_experts * len(kept),
    }
    torch.save({layer: score.flatten() for layer, score in scores.items()}, directory / "sk.pt")
    riy = json.dumps({"version": 1, "model": "example", "pruned_experts": pruned})
    drop = json.dumps({"version": 2, "routing_mode": "post_topk_drop", "pruned_experts": pruned})
    selection = json.dumps({**{str(k): v for k, v in kept.items()}, "_metadata": notes})
    lines = "".join(json.dumps({str(k): v}) + "\n" for k, v in ranking.items())
    by_layer = {f"layers.{layer}.mask": mask for layer, mask in masks.items()}
    experts = {f"model.layers.{layer}.mlp.experts.mask": mask for layer, mask in routable.items()}
    return {
        "pruned-experts": Example("pruned-experts", text("riy.json", riy), None, keep, routable),
        "post-topk-drop": Example("pruned-experts", text("drop.json", drop), None, keep),
        "shape": Example("shape", text("shape.json", selection), None, keep, routable),
        "ranked": Example("ranked", text("ranked.jsonl", lines), ratio, keep, routable),
        "heapr": Example("heapr", directory / "sk.pt", 0.5, highest(scores, 0.5)),
        "mask": Example("mask", tensors("mask.safetensors", by_layer), None, masks),
        "expert-mask": Example(
            "mask", tensors("experts.safetensors", experts), None, keep, routable
        ),
    }


def whole(
    kept: dict[int, list[int]], model: CheckpointInfo
) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
    """Masks [E, I] and [E] of whole experts, written down the slow way; other layers keep all."""
    keep, routable = {}, {}
    for layer in model.layers:
        stays = [
            expert in kept.get(layer, range(model.num_experts))
            for expert in range(model.num_experts)
        ]
        keep[layer] = torch.tensor([[stay] * model.intermediate_size for stay in stays])
        if not all(stays):
            routable[layer] = torch.tensor(stays)
    return keep, routable


def highest(scores: dict[int, torch.Tensor], ratio: float) -> dict[int, torch.Tensor]:
    """Masks without the `ratio` of lowest scores of all layers together (no ties assumed)."""
    values = sorted(float(x) for score in scores.values() for x in score.flatten())
    threshold = values[round(ratio * len(values))]
    return {layer: score >= threshold for layer, score in scores.items()}
