"""Layer budgets tuned by measured loss: what a search finds beyond HEAPr's own budgets.

    .venv/bin/python deploy/demo/recipe/budgets.py STATISTICS DIRECTORY

HEAPr's scores of each layer are multiplied by a weight before all layers compete. A (1 + 1)
evolution draws new weights and keeps them where the loss on a part of the calibration text falls.
Writes the profiles tuned-20, tuned-40 and tuned-60 to DIRECTORY and prints a table in Markdown. The
held-out text is read by neither: measure with `atomic-moe eval`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from vllm_atomic_moe.calibration.text import draw_windows, parse_files
from vllm_atomic_moe.files.profiles import PruningProfile
from vllm_atomic_moe.files.statistics import Statistics
from vllm_atomic_moe.scoring.masks import LayerScores
from vllm_atomic_moe.scoring.pruning import make_profile, score_statistics
from vllm_atomic_moe.scoring.score_file import Scores

DEMO = Path(__file__).parents[1]
RATIOS = (0.2, 0.4, 0.6)
STEPS, WINDOWS, TOKENS = 60, 2, 256
DEVIATION = 0.3  # of the logarithm of a weight, in one step


class Search:
    """The demo in float32 on a part of its calibration text, and the loss under a profile."""

    def __init__(self) -> None:
        texts = sorted((DEMO / "data").glob("*.calibration.txt"))
        files = parse_files([f"{text}:{text.name.split('.')[0]}" for text in texts])
        tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
        windows = draw_windows(files, tokenizer, TOKENS, WINDOWS, 1, None).windows
        self.ids = torch.cat(list(windows.values())).long()
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            DEMO / "model", dtype=torch.float32
        )
        layers = self.model.get_decoder().layers
        self.down = {index: layer.mlp.experts.down_proj for index, layer in enumerate(layers)}
        self.whole = {index: weight.detach().clone() for index, weight in self.down.items()}

    @torch.inference_mode()
    def loss(self, keep: Mapping[int, torch.Tensor]) -> float:
        """Mean negative log-likelihood in nats, with bool [E, I] per layer applied."""
        for layer, mask_EI in keep.items():
            self.down[layer].copy_(self.whole[layer] * mask_EI[:, None, :])
        logits = self.model(self.ids[:, :-1], use_cache=False).logits
        return functional.cross_entropy(logits.flatten(0, 1), self.ids[:, 1:].flatten()).item()


def tuned(search: Search, scores: Scores, ratio: float) -> tuple[PruningProfile, float, float]:
    """The profile of the best weights found, and its loss behind that of equal weights."""
    generator = torch.Generator().manual_seed(0)
    layers = list(scores.layers)

    def profile(log_weights: torch.Tensor) -> PruningProfile:
        weighted = {
            layer: LayerScores(scores.layers[layer].atoms * weight)
            for layer, weight in zip(layers, log_weights.exp().tolist(), strict=True)
        }
        name = f"tuned-{ratio * 100:g}"
        return make_profile(dataclasses.replace(scores, layers=weighted), ratio, name)

    best = torch.zeros(len(layers))
    found = profile(best)
    first = least = search.loss(found.keep)
    for _ in range(STEPS):
        drawn = best + DEVIATION * torch.randn(len(layers), generator=generator)
        candidate = profile(drawn)
        loss = search.loss(candidate.keep)
        if loss < least:
            best, found, least = drawn, candidate, loss
    return found, first, least


def main() -> None:
    """Search at every ratio."""
    source, directory = Path(sys.argv[1]), Path(sys.argv[2])
    scores = score_statistics(Statistics.read(source), "heapr", {})
    search = Search()
    dense = search.loss(
        {it: torch.ones(mask.atoms.shape).bool() for it, mask in scores.layers.items()}
    )
    print(
        "| pruned | loss over dense, HEAPr's budgets | tuned | kept per layer |\n|--:|--:|--:|---|"
    )
    for ratio in RATIOS:
        profile, first, least = tuned(search, scores, ratio)
        profile.write_into(directory)
        kept = " ".join(f"{mask.float().mean():.0%}" for mask in profile.keep.values())
        print(f"| {ratio:.0%} | {first - dense:.4f} | {least - dense:.4f} | {kept} |", flush=True)


if __name__ == "__main__":
    main()
