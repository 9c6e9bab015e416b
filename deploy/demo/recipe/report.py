"""The page of what pruning costs: the demo, a model of another kind, and profiles for some domains.

    .venv/bin/python deploy/demo/recipe/report.py

puts together what `atomic-moe quality` wrote about both models below build/, measures profiles of
the demo that are scored by some domains only, and writes deploy/demo/quality.md and its pictures.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kinds import KINDS
from layout import BUILD_DIR, DEMO_DIR, DOMAINS

from vllm_atomic_moe.files.statistics import Statistics
from vllm_atomic_moe.measure.card import perplexity_table
from vllm_atomic_moe.measure.quality import Candidate, make_profiles

COMMAND = Path(sys.executable).parent / "atomic-moe"
SPECIALIZED = {
    "code": ("python", "c", "json"),
    "prose": ("english", "spanish", "french", "man", "rst"),
}
RATIOS = (0.2, 0.4)
# Name of a picture -> title, what the model is, and where `atomic-moe quality` wrote.
MODELS = {
    "quality": (
        "The demo, a Qwen3-MoE",
        "Experts with a plain SwiGLU.",
        BUILD_DIR / "quality",
    ),
    "quality-gpt-oss": (
        "A small gpt-oss",
        f"The same recipe, corpus and sizes, but only {KINDS['gpt-oss'].steps} steps of training "
        f"(the demo: {KINDS['qwen3'].steps}).\nExperts with biases and a clamped SwiGLU, attention "
        "sinks, sliding windows. `make second-model`\nmakes it; it is not committed.",
        BUILD_DIR.parent / "gpt-oss/quality",
    ),
}
HEAD = """\
# Held-out perplexity, as served

Made by `make quality`: vLLM's prompt log-probabilities through the loader, in float32, on the
held-out texts in `data/`. Each domain has one text, cut into windows, so the intervals resample
windows and not documents.

What a refit wins back and budgets of layers tuned by measured loss (no gain on held-out text):
[measured.md](../measured.md#quality).
"""


def main() -> None:
    """Collect, measure, write."""
    sections = [HEAD]
    for picture, (title, what, directory) in MODELS.items():
        table = (directory / "quality.md").read_text().split("\n", 2)[2]
        table = table.replace("(quality.png)", f"({picture}.png)")
        shutil.copyfile(directory / "quality.png", DEMO_DIR / f"{picture}.png")
        sections.append(f"## {title}\n\n{what}\n\n{table}")
    statistics = Statistics.read(BUILD_DIR / "statistics.safetensors")
    profiles = BUILD_DIR / "quality/specialized"
    names = specialize(statistics, profiles)
    options = ("--profiles", profiles, "--dtype", "float32")
    rows = evaluate(DEMO_DIR / "model", names, *options)
    kinds = ", ".join(f"{kind} ({', '.join(of_kind)})" for kind, of_kind in SPECIALIZED.items())
    lines = ["## Specialized profiles of the demo", "", f"HEAPr, scored by some domains: {kinds}."]
    sections.append("\n".join([*lines, "", *perplexity_table(rows), ""]))
    (DEMO_DIR / "quality.md").write_text("\n".join(sections))


def specialize(statistics: Statistics, directory: Path) -> list[str]:
    """Make the profiles that are scored by some domains; their names."""
    names = []
    for kind, domains in SPECIALIZED.items():
        wanted = [Candidate(f"heapr {kind}", ratio, "heapr", {}) for ratio in RATIOS]
        made, refused = make_profiles(statistics.select(domains), wanted, directory)
        if refused:
            raise SystemExit("\n".join(refused))
        names += [candidate.name for candidate in made]
    return names


def evaluate(model: Path, names: Sequence[str], *options: object) -> list[dict[str, Any]]:
    """Rows of `atomic-moe eval --json` over all held-out text, dense first, then as `names`.

    Errors and progress go to the terminal.
    """
    texts = [(DEMO_DIR / f"data/{domain}.heldout.txt", domain) for domain in sorted(DOMAINS)]
    data = [part for text, domain in texts for part in ("--data", f"{text}:{domain}")]
    chosen = [part for name in names for part in ("--profile", name)]
    command = (COMMAND, "eval", model, *data, *chosen, *options, "--json")
    done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
