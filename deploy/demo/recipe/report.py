"""The demo's evidence: every method at several ratios, measured as served, in one run.

    .venv/bin/python deploy/demo/recipe/report.py STATISTICS WORK_DIRECTORY

prunes the demo with `atomic-moe prune`, measures held-out perplexity with `atomic-moe eval`, and
writes deploy/demo/quality.md and deploy/demo/quality.png. Nothing here computes; it calls the two
commands and lays out what they print. A section that WORK_DIRECTORY holds already (SECTION.md,
from a run that was interrupted) is not measured again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

DEMO = Path(__file__).parents[1]
COMMAND = Path(sys.executable).parent / "atomic-moe"
CODE, PROSE = ("python", "c", "json"), ("english", "spanish", "french", "man", "rst")
SEEDS = (0, 1, 2)

# Section -> profile name -> (method, ratio, further options of `prune`).
Profiles = dict[str, tuple[str, float, tuple[str, ...]]]


def methods() -> Profiles:
    """Every method with its defaults; random with three seeds."""
    profiles: Profiles = {"heapr-60": ("heapr", 0.6, ())}
    for ratio in (0.2, 0.4):
        percent = f"{ratio * 100:g}"
        for method in ("heapr", "tenp", "shape", "magnitude", "camera", "reap"):
            profiles[f"{method}-{percent}"] = (method, ratio, ())
        for seed in SEEDS:
            profiles[f"random-{percent}-seed-{seed}"] = ("random", ratio, ("--seed", str(seed)))
    return dict(sorted(profiles.items(), key=lambda item: (item[1][1], item[0])))


def variants() -> Profiles:
    """What the options change."""
    profiles: Profiles = {}
    for ratio in (0.2, 0.4):
        percent = f"{ratio * 100:g}"
        for method in ("heapr", "magnitude", "camera", "reap"):
            profiles[f"{method}-{percent}-layer"] = (method, ratio, ("--scope", "layer"))
        profiles[f"heapr-{percent}-expert"] = ("heapr", ratio, ("--scope", "expert"))
        profiles[f"heapr-{percent}-frequency"] = ("heapr", ratio, ("--weight-by-frequency",))
        profiles[f"heapr-{percent}-align-16"] = ("heapr", ratio, ("--align", "16"))
    return profiles


def specialised() -> Profiles:
    """HEAPr scored by code alone and by prose alone."""
    return {
        f"heapr-{ratio * 100:g}-{name}": (
            "heapr",
            ratio,
            tuple(part for domain in domains for part in ("--domain", domain)),
        )
        for ratio in (0.2, 0.4)
        for name, domains in (("code", CODE), ("prose", PROSE))
    }


SECTIONS = {
    "Methods": (methods, "Every method with its default options; random with three seeds."),
    "Options": (
        variants,
        "`--scope layer` and `--scope expert`, `--weight-by-frequency`, `--align 16`.",
    ),
    "Specialised profiles": (
        specialised,
        f"HEAPr scored by some domains only: code ({', '.join(CODE)}), prose ({', '.join(PROSE)}).",
    ),
}


def main() -> None:
    """Prune, measure, write."""
    statistics, work = Path(sys.argv[1]), Path(sys.argv[2])
    document = [
        "# Held-out perplexity of the demo, as served",
        "",
        "Made by `make demo-report`: bf16, vLLM's prompt log-probabilities through the loader, the",
        "held-out texts in `data/`. `kept` is the fraction of routed-expert atoms; percentages are",
        "against dense.",
        "",
        "![perplexity over kept fraction](quality.png)",
    ]
    for title, (profiles, what) in SECTIONS.items():
        directory = work / title.split()[0].lower()
        done = directory.with_suffix(".md")
        if not done.exists():
            prune_all(profiles(), statistics, directory)
            plot = DEMO / "quality.png" if title == "Methods" else None
            done.write_text("\n".join(table(evaluate(directory, list(profiles()), plot))) + "\n")
        document += ["", f"## {title}", "", what, "", *done.read_text().splitlines()]
    (DEMO / "quality.md").write_text("\n".join(document) + "\n")


def prune_all(profiles: Profiles, statistics: Path, directory: Path) -> None:
    """Make the profiles of one section."""
    for name, (method, ratio, options) in profiles.items():
        call("prune", statistics, "--method", method, "--ratio", ratio, "--name", name,
             "-o", directory, *options)  # fmt: skip


def evaluate(directory: Path, names: list[str], plot: Path | None) -> list[dict[str, Any]]:
    """Rows of `atomic-moe eval --json`, dense first, then in the order of `names`."""
    texts = sorted((DEMO / "data").glob("*.heldout.txt"))
    data = [part for text in texts for part in ("--data", f"{text}:{text.name.split('.')[0]}")]
    chosen = [part for name in names for part in ("--profile", name)]
    draw = ("--plot", plot) if plot else ()
    printed = call("eval", DEMO / "model", "--profiles", directory, *data, *chosen, *draw, "--json")
    return json.loads(printed)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown table, one row a profile, one column a domain."""
    dense = rows[0]["perplexity"]
    lines = [
        "| profile | kept | " + " | ".join(dense) + " |",
        "|---|--:|" + "--:|" * len(dense),
    ]
    for row in rows:
        cells = [
            f"{value:.2f}" + ("" if row is rows[0] else f" ({value / dense[domain] - 1:+.0%})")
            for domain, value in row["perplexity"].items()
        ]
        lines.append(f"| {row['profile']} | {row['kept']:.1%} | " + " | ".join(cells) + " |")
    return lines


def call(*arguments: object) -> str:
    """Run `atomic-moe`; its errors and progress go to the terminal."""
    done = subprocess.run(
        [COMMAND, *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


if __name__ == "__main__":
    main()
