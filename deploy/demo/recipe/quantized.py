"""Prune, quantize, or both? Quantized siblings of the demo, and their held-out perplexity.

    .venv/bin/python deploy/demo/recipe/quantized.py WORK_DIRECTORY

writes the demo with its experts in FP8, INT4 and MXFP4 (`quantize.py`) to WORK_DIRECTORY/FORMAT. Of
each, and of the bfloat16 original, it measures dense and HEAPr's profiles with `atomic-moe eval`,
and writes deploy/demo/quantized.md and deploy/demo/quantized.png. What WORK_DIRECTORY holds
measured already is not measured again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from layout import DEMO_DIR as DEMO
from quantize import FORMATS, quantize
from report import evaluate

PROFILES = ("heapr-20", "heapr-40", "heapr-60")
ORIGINAL = "bf16"


def main() -> None:
    """Quantize, measure, write."""
    work = Path(sys.argv[1])
    measured: dict[str, list[dict[str, Any]]] = {}
    for name in (ORIGINAL, *FORMATS):
        model = DEMO / "model" if name == ORIGINAL else work / name
        done = work / f"{name}.json"
        if not done.exists():
            if name != ORIGINAL:
                quantize(DEMO / "model", model, name)
            work.mkdir(parents=True, exist_ok=True)
            done.write_text(json.dumps(evaluate(model, PROFILES)))
        measured[name] = json.loads(done.read_text())
    (DEMO / "quantized.md").write_text("\n".join(document(measured)) + "\n")
    draw(measured, DEMO / "quantized.png")


def document(measured: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The page: one table, rows by bytes."""
    dense = measured[ORIGINAL][0]
    rows = [(name, row) for name, of in measured.items() for row in of]
    int4, pruned, both = (
        f"{overall(row) / overall(dense) - 1:+.1%}"
        for row in (measured["int4"][0], measured[ORIGINAL][1], measured["int4"][1])
    )
    lines = [
        "# Prune, quantize, or both?",
        "",
        "Made by `make demo-quantized`: the demo's held-out perplexity as served, its experts in",
        "bfloat16, FP8 (a scale per channel), INT4 and MXFP4 (groups of 32, rounded to nearest by",
        "compressed-tensors), dense and pruned by HEAPr. Bytes are the kept share of the experts,",
        "scales included; percentages are against the dense bfloat16 original.",
        "",
        f"What each costs, and both: INT4 {int4}, {PROFILES[0]} {pruned}, together {both}.",
        "",
        "![perplexity over bytes](quantized.png)",
        "",
        "| experts | profile | MiB | bytes | perplexity |",
        "|---|---|--:|--:|--:|",
    ]
    for name, row in sorted(rows, key=lambda it: -it[1]["kept_bytes"]):
        perplexity, first = overall(row), overall(dense)
        lines.append(
            f"| {name} | {row['profile']} | {row['kept_bytes'] / 2**20:.2f} "
            f"| {row['kept_bytes'] / dense['kept_bytes']:.1%} "
            f"| {perplexity:.2f} ({perplexity / first - 1:+.1%}) |"
        )
    return lines


def overall(row: dict[str, Any]) -> float:
    """Perplexity over all text."""
    return row["perplexity"]["all"]


def draw(measured: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Perplexity over bytes, one line a format."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for (name, rows), marker in zip(measured.items(), "os^D", strict=True):
        sizes = [row["kept_bytes"] / 2**20 for row in rows]
        axes.plot(sizes, [overall(row) for row in rows], marker=marker, label=name)
    axes.set(xlabel="bytes of the experts, MiB", ylabel="held-out perplexity")
    axes.set_title("The demo, dense and pruned by HEAPr, by format of its experts")
    axes.legend()
    axes.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(path)


if __name__ == "__main__":
    main()
