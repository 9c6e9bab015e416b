"""The demo's evidence, domain by domain: methods, options and specialized profiles, as served.

    .venv/bin/python deploy/demo/recipe/report.py STATISTICS WORK_DIRECTORY

makes the profiles as `atomic-moe quality` does, measures their held-out perplexity with `atomic-moe
eval`, and writes deploy/demo/quality.md and deploy/demo/quality.png. A section that WORK_DIRECTORY
holds already (SECTION.md, from a run that was interrupted) is not measured again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_atomic_moe.files.statistics import Statistics
from vllm_atomic_moe.measure.card import perplexity_table
from vllm_atomic_moe.measure.quality import Candidate, candidates, make_profiles
from vllm_atomic_moe.scoring import known_methods

DEMO = Path(__file__).parents[1]
COMMAND = Path(sys.executable).parent / "atomic-moe"
DOMAINS = {
    "code": ("python", "c", "json"),
    "prose": ("english", "spanish", "french", "man", "rst"),
}
RATIOS = (0.2, 0.4)
BY_LAYER = ("heapr", "magnitude", "camera", "reap")

# Statistics and the profiles to make from them.
Wanted = tuple[Statistics, Sequence[Candidate]]


def sections(statistics: Statistics) -> dict[str, tuple[str, list[Wanted]]]:
    """Title -> what it shows, and its profiles."""
    defaults = [
        it
        for it in candidates((*RATIOS, 0.6), size=128)
        if it.label in known_methods().entries and (it.ratio in RATIOS or it.label == "heapr")
    ]
    options: list[tuple[str, str, dict[str, Any]]] = [
        *((f"{name} layer", name, {"scope": "layer"}) for name in BY_LAYER),
        ("heapr expert", "heapr", {"scope": "expert"}),
        ("heapr frequency", "heapr", {"weight_by_frequency": True}),
        ("heapr align 16", "heapr", {"align": 16}),
    ]
    return {
        "Methods": (
            "Every method with its default options; random ones with three seeds.",
            [(statistics, sorted(defaults, key=lambda it: (it.ratio, it.name)))],
        ),
        "Options": (
            "`--scope layer` and `--scope expert`, `--weight-by-frequency`, `--align 16`.",
            [
                (
                    statistics,
                    [Candidate(label, ratio, name, given) for label, name, given in options],
                )
                for ratio in RATIOS
            ],
        ),
        "Specialized profiles": (
            "HEAPr scored by some domains only: "
            + ", ".join(f"{kind} ({', '.join(domains)})" for kind, domains in DOMAINS.items())
            + ".",
            [
                (statistics.select(domains), [Candidate(f"heapr {kind}", ratio, "heapr", {})])
                for ratio in RATIOS
                for kind, domains in DOMAINS.items()
            ],
        ),
    }


def main() -> None:
    """Prune, measure, write."""
    statistics, work = Statistics.read(Path(sys.argv[1])), Path(sys.argv[2])
    document = [
        "# Held-out perplexity of the demo, as served",
        "",
        "Made by `make demo-report`: bf16, vLLM's prompt log-probabilities through the loader, the",
        "held-out texts in `data/`; percentages are against dense.",
        "",
        "![perplexity over kept fraction](quality.png)",
    ]
    for title, (what, wanted) in sections(statistics).items():
        directory = work / title.split()[0].lower()
        done = directory.with_suffix(".md")
        if not done.exists():
            names = prune(wanted, directory)
            plot = ("--plot", DEMO / "quality.png") if title == "Methods" else ()
            rows = evaluate(DEMO / "model", names, "--profiles", directory, *plot)
            done.write_text("\n".join(perplexity_table(rows)) + "\n")
        document += ["", f"## {title}", "", what, "", *done.read_text().splitlines()]
    (DEMO / "quality.md").write_text("\n".join(document) + "\n")


def prune(wanted: Sequence[Wanted], directory: Path) -> list[str]:
    """Make the profiles of one section; their names."""
    names = []
    for statistics, of_statistics in wanted:
        made, refused = make_profiles(statistics, of_statistics, directory)
        if refused:
            raise SystemExit("\n".join(refused))
        names += [candidate.name for candidate in made]
    return names


def evaluate(model: Path, names: Sequence[str], *options: object) -> list[dict[str, Any]]:
    """Rows of `atomic-moe eval --json` over all held-out text, dense first, then as `names`.

    Errors and progress go to the terminal.
    """
    texts = sorted((DEMO / "data").glob("*.heldout.txt"))
    data = [part for text in texts for part in ("--data", f"{text}:{text.name.split('.')[0]}")]
    chosen = [part for name in names for part in ("--profile", name)]
    command = (COMMAND, "eval", model, *data, *chosen, *options, "--json")
    done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
