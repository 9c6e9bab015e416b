"""Draw `routing.png` and fill the tables of the model card from `model_card.json`.

The figures in README.md stand between two marker lines and are written by this file only, so that
they cannot differ from what the recipe measured.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from layout import DEMO_DIR
from matplotlib.figure import Figure

BEGIN = "<!-- figures: written by recipe/card.py -->"
END = "<!-- end of figures -->"


def row(*cells: object) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def perplexity_table(card: dict) -> list[str]:
    """Tokens and perplexities by domain."""
    lines = [
        row("domain", "train tokens", "test tokens", "perplexity, test split", "heldout.txt"),
        row("---", "--:", "--:", "--:", "--:"),
    ]
    columns = (
        card["training"]["train_tokens"],
        card["test_tokens"],
        card["test_perplexity"],
        card["heldout_perplexity"],
    )
    for domain in card["domains"]:
        trained, tested, test, heldout = (column[domain] for column in columns)
        lines.append(row(domain, f"{trained:,}", f"{tested:,}", f"{test:.2f}", f"{heldout:.2f}"))
    trained, tested = (sum(column.values()) for column in columns[:2])
    test, heldout = (column["all"] for column in columns[2:])
    lines.append(row("**all**", f"{trained:,}", f"{tested:,}", f"{test:.2f}", f"{heldout:.2f}"))
    return lines


def training_line(card: dict) -> str:
    """The facts of the training run in a sentence."""
    training = card["training"]
    minutes, cpu_minutes = training["wall_seconds"] / 60, training["cpu_seconds"] / 60
    return (
        f"{training['parameters']:,} parameters, {training['plan']['steps']:,} steps, "
        f"{training['trained_tokens']:,} tokens, seed {training['plan']['seed']}, "
        f"{training['threads']} threads: {minutes:.0f} minutes ({cpu_minutes:.0f} minutes of CPU)."
    )


def routing_table(card: dict) -> list[str]:
    """The three experts that each domain uses most, by layer, with their share in per cent."""
    routing = card["routing"]
    shares_LDE = np.array(routing["share_by_layer_domain_expert"])
    layers = range(len(shares_LDE))
    lines = [
        row("domain", *(f"layer {layer}" for layer in layers)),
        row("---", *("---" for _ in layers)),
    ]
    for index, domain in enumerate(card["domains"]):
        cells = []
        for shares_E in shares_LDE[:, index]:
            most_used = np.argsort(-shares_E, kind="stable")[:3]
            cells.append(", ".join(f"{e}: {100 * shares_E[e]:.0f}" for e in most_used))
        lines.append(row(domain, *cells))
    information = (f"{bits:.2f} bits" for bits in routing["mutual_information_bits"])
    lines.append(row("**mutual information**", *information))
    return lines


def draw_routing(card: dict, path: Path) -> None:
    """A heat map for every layer: domains down, experts across."""
    shares_LDE = 100 * np.array(card["routing"]["share_by_layer_domain_expert"])
    information_L = card["routing"]["mutual_information_bits"]
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    axes = figure.subplots(2, 2)
    for layer, axis in enumerate(axes.flat):
        image = axis.imshow(shares_LDE[layer], cmap="viridis", vmin=0, vmax=shares_LDE.max())
        axis.set_title(f"layer {layer}: {information_L[layer]:.2f} bits", fontsize=10)
        axis.set_yticks(range(len(card["domains"])), card["domains"], fontsize=8)
        axis.set_xticks(range(shares_LDE.shape[-1]))
        axis.tick_params(axis="x", labelsize=8)
        axis.set_xlabel("expert", fontsize=8)
    uniform = 100 / shares_LDE.shape[-1]
    label = f"share of routed slots in % (uniform: {uniform:.2f})"
    figure.colorbar(image, ax=axes, label=label, shrink=0.9)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def fill_readme(card: dict, path: Path) -> None:
    """Replace what stands between the two markers."""
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{path}: expected one line '{BEGIN}' and one '{END}'; put them back")
    figures = [
        training_line(card),
        "",
        *perplexity_table(card),
        "",
        "![routing of the domains](routing.png)",
        "",
        *routing_table(card),
    ]
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    path.write_text("\n".join([before + BEGIN, "", *figures, "", END + after]), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=DEMO_DIR)
    demo_dir = parser.parse_args().demo
    card = json.loads((demo_dir / "model_card.json").read_text(encoding="utf-8"))
    draw_routing(card, demo_dir / "routing.png")
    if (demo_dir / "README.md").exists():  # a trial run writes to an empty folder
        fill_readme(card, demo_dir / "README.md")


if __name__ == "__main__":
    main()
