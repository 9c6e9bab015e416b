"""What makes up for what is pruned: the demo's held-out perplexity, refitted and compensated.

    .venv/bin/python deploy/demo/recipe/refit.py [PROFILE ...]

fits profiles (the demo's of HEAPr, or the named files) to the calibration texts as `atomic-moe
export --refit` and `prune --compensate` do, and prints the perplexity of each over all held-out
text: float32, by transformers, no vLLM involved.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from perplexity import encode, perplexities
from tokenizers import Tokenizer
from transformers import Qwen3MoeForCausalLM
from transformers.utils import logging

from vllm_atomic_moe.calibration.collect import CalibrationOptions
from vllm_atomic_moe.calibration.experts import ExpertRows, find_experts, observe
from vllm_atomic_moe.calibration.refit import LayerFit, Watcher, fit_model, prune
from vllm_atomic_moe.files.checkpoint import describe_checkpoint
from vllm_atomic_moe.files.profiles import PruningProfile

DEMO = Path(__file__).parents[1]
MODEL = DEMO / "model"
WINDOW_TOKENS = 512


def main() -> None:
    """Fit, measure, print."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dense = perplexity()
    print(f"dense: {dense:.2f}", flush=True)
    heapr = [MODEL / f"atomic_profiles/heapr-{percent}.safetensors" for percent in (20, 40, 60)]
    for path in map(Path, sys.argv[1:] or heapr):
        profile = PruningProfile.read(path)
        show = partial(report, profile.name, dense)
        show("as it is", perplexity(profile))
        for kind, words in (("scale and bias", "compensated"), ("columns", "refitted")):
            show(words, perplexity(profile, fit(profile, kind)))


def report(name: str, dense: float, words: str, found: float) -> None:
    """One line."""
    print(f"{name} {words}: {found:.2f} ({found / dense - 1:+.2%})", flush=True)


def fit(profile: PruningProfile, kind: str) -> dict[int, LayerFit]:
    """What the commands fit to all calibration text."""
    texts = sorted((DEMO / "data").glob("*.calibration.txt"))
    data = [f"{text}:{text.name.split('.')[0]}" for text in texts]
    options = CalibrationOptions(seq_len=WINDOW_TOKENS, batch_size=2, gradients=False)
    note: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    return dict(fit_model(str(MODEL), profile, kind, data, options, note).layers)


def perplexity(
    profile: PruningProfile | None = None, fitted: dict[int, LayerFit] | None = None
) -> float:
    """Over all held-out text."""
    model = Qwen3MoeForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    experts = find_experts(model, describe_checkpoint(MODEL))
    watchers = {layer: Watcher() for layer in experts}
    for layer, module in experts.items():
        if profile is None:
            continue
        prune(module, profile.keep[layer])
        if fitted and fitted[layer].down_t_PH is not None:
            down_EIH = module.down_proj.detach().transpose(1, 2)
            down_EIH[profile.keep[layer]] = fitted[layer].down_t_PH.float()
        elif fitted:
            watchers[layer].correct = partial(compensated, fitted[layer])
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    texts = sorted((DEMO / "data").glob("*.heldout.txt"))
    tokens = {text.name: encode(tokenizer, text.read_text()) for text in texts}
    with observe(model, experts, watchers):
        return perplexities(model, tokens)["all"]


def compensated(fitted: LayerFit, expert: int, rows: ExpertRows) -> torch.Tensor:
    """The output of one expert with its scale and bias."""
    made = fitted.compensation
    return made.scale_E[expert] * rows.y + made.bias_EH[expert]


if __name__ == "__main__":
    main()
