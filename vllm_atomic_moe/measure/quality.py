"""The cost of pruning: every method and the baselines at several ratios, on the same text.

The profiles are made from one statistics file and measured as served. Only the measurement reads
the held-out text. An interval says how much a figure depends on the choice of the text: windows are
resampled with replacement, domain by domain, the same for a profile and for dense.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_atomic_moe.files.statistics import Statistics
from vllm_atomic_moe.files.tensors import replaced_file
from vllm_atomic_moe.measure.evaluation import ALL_DOMAINS, Progress, Row, evaluate
from vllm_atomic_moe.measure.incomplete import IncompleteError
from vllm_atomic_moe.measure.plots import PerplexityPoint, plot_perplexity
from vllm_atomic_moe.scoring import known_methods
from vllm_atomic_moe.scoring.pruning import make_profile, score_statistics
from vllm_atomic_moe.scoring.score_file import Scores

RATIOS = (0.2, 0.4, 0.6)
SEEDS = (0, 1, 2)
RESAMPLES, CONFIDENCE = 2000, 0.95
# Windows to compare with dense, which takes longer than all else: the report has perplexity alone.
COMPARED = 16
# Variants of the methods: name -> method, options. `floor` is an eighth of the full width.
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "heapr by frequency": ("heapr", {"weight_by_frequency": True}),
    "heapr, a floor of an eighth": ("heapr", {"min_width": "floor"}),
    "heapr per layer": ("heapr", {"scope": "layer"}),
    "uniform width, best atoms": ("heapr", {"scope": "expert"}),
    "uniform width, aligned to 32": ("heapr", {"scope": "expert", "align": 32}),
    "camera per layer": ("camera", {"scope": "layer"}),
    "magnitude per layer": ("magnitude", {"scope": "layer"}),
    "reap per layer": ("reap", {"scope": "layer"}),
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """One profile to measure.

    Attributes:
        label: name of its line in the report; the seeds of a method share one.
        ratio: fraction to remove.
        method: a key of `known_methods().entries`.
        options: of score and selection.
    """

    label: str
    ratio: float
    method: str
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name of the profile."""
        label = self.label.replace(",", "").replace(" ", "-")
        seed = f"-seed-{self.options['seed']}" if "seed" in self.options else ""
        return f"{label}-{self.ratio * 100:g}{seed}"


@dataclass(frozen=True, slots=True)
class Figure:
    """One cell of the report.

    Attributes:
        label: of the line.
        ratio: of the column.
        kept: fraction of atoms that are kept.
        delta: perplexity over dense, minus 1; of several seeds the mean.
        low, high: its interval; of several seeds the lowest and the highest.
        seeds: how many there are.
    """

    label: str
    ratio: float
    kept: float
    delta: float
    low: float
    high: float
    seeds: int


def candidates(ratios: Sequence[float], size: int) -> list[Candidate]:
    """Every method with its defaults, random ones with three seeds, and the variants.

    Those of the same scores follow each other.

    Args:
        ratios: fractions to remove.
        size: full width of an expert.
    """
    lines: list[tuple[str, str, Mapping[str, Any]]] = []
    for name, method in known_methods().entries.items():
        seeds = [{"seed": seed} for seed in SEEDS] if "seed" in method.options else [{}]
        lines += [(name, name, options) for options in seeds]
    for label, (name, told) in VARIANTS.items():
        options = {key: size // 8 if it == "floor" else it for key, it in told.items()}
        if size % options.get("align", 1) == 0:
            lines.append((label, name, options))
    return [
        Candidate(label, ratio, name, options) for label, name, options in lines for ratio in ratios
    ]


def make_profiles(
    source: Statistics, wanted: Sequence[Candidate], directory: Path
) -> tuple[list[Candidate], list[str]]:
    """Write the profiles to a directory.

    Returns:
        Those that could be made; and one line for each of the others.
    """
    made, refused = [], []
    for (method, options), of_scores in itertools.groupby(
        wanted, lambda candidate: (candidate.method, candidate.options)
    ):
        scores: Scores | None = None
        for candidate in of_scores:
            try:
                scores = scores or score_statistics(source, method, options)
                profile = make_profile(scores, candidate.ratio, candidate.name, **options)
            except ValueError as error:
                refused.append(f"{candidate.label} at {candidate.ratio:.0%}: {error}")
                continue
            profile.write_into(directory)
            made.append(candidate)
    return made, refused


def interval(row: Row, dense: Row) -> tuple[float, float]:
    """Bounds of a profile's perplexity over dense, minus 1: bootstrap over windows, by domain."""
    generator = torch.Generator().manual_seed(0)
    gained = torch.zeros(RESAMPLES, dtype=torch.float64)
    for domain, of_dense in dense.windows.items():
        gain = torch.tensor(row.windows[domain]).double() - torch.tensor(of_dense).double()
        drawn = torch.randint(len(gain), (RESAMPLES, len(gain)), generator=generator)
        gained += gain[drawn].sum(dim=1)
    deltas = torch.expm1(-gained / dense.tokens[ALL_DOMAINS])
    tail = (1 - CONFIDENCE) / 2
    low, high = deltas.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def figures(made: Sequence[Candidate], rows: Mapping[str, Row], dense: Row) -> list[Figure]:
    """One figure per label and ratio, in the order of the candidates."""
    groups: dict[tuple[str, float], list[Row]] = {}
    for candidate in made:
        if row := rows.get(candidate.name):
            groups.setdefault((candidate.label, candidate.ratio), []).append(row)
    found = []
    for (label, ratio), of_label in groups.items():
        deltas = [
            row.perplexity[ALL_DOMAINS] / dense.perplexity[ALL_DOMAINS] - 1 for row in of_label
        ]
        low, high = interval(of_label[0], dense) if len(deltas) == 1 else (min(deltas), max(deltas))
        kept, delta = statistics.fmean(row.kept for row in of_label), statistics.fmean(deltas)
        found.append(Figure(label, ratio, kept, delta, low, high, len(deltas)))
    return found


def report(found: Sequence[Figure], dense: Row, refused: Sequence[str]) -> str:
    """The table in Markdown, best first by the first column."""
    ratios = sorted({figure.ratio for figure in found})
    cells = {(figure.label, figure.ratio): figure for figure in found}

    labels = [label for label, ratio in cells if ratio == ratios[0]]
    labels.sort(key=lambda label: cells[label, ratios[0]].delta)
    lines = [
        "# Held-out perplexity, as served",
        "",
        f"Dense: {dense.perplexity[ALL_DOMAINS]:.3f} over {dense.tokens[ALL_DOMAINS]} tokens of "
        f"{len(dense.windows)} domains. Cells: change from",
        "dense; in brackets a 95 % interval by bootstrap over the windows of text, or the range of",
        "several seeds; and the atoms kept, where they are not what the column says.",
        "",
        "![perplexity over kept fraction](quality.png)",
        "",
        "| method | " + " | ".join(f"{ratio:.0%} pruned" for ratio in ratios) + " |",
        "|---|" + "--:|" * len(ratios),
    ]
    for label in labels:
        texts = [_cell(cells.get((label, ratio))) for ratio in ratios]
        lines.append(f"| {label} | " + " | ".join(texts) + " |")
    lines += ["", *(f"- Not made: {line}" for line in refused)] if refused else []
    return "\n".join(lines) + "\n"


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return ""
    seeds = f"; {figure.seeds} seeds" if figure.seeds > 1 else ""
    other = abs(figure.kept - (1 - figure.ratio)) > 0.005
    kept = f", {figure.kept:.1%} kept" if other else ""
    return f"{figure.delta:+.1%} ({figure.low:+.1%} to {figure.high:+.1%}{seeds}){kept}"


def measure_quality(
    model: str,
    source: Path,
    data: Sequence[str],
    output: Path,
    *,
    ratios: Sequence[float] = RATIOS,
    on_progress: Progress = lambda done, total, name: None,
    **options: Any,
) -> list[Figure]:
    """Make the profiles, measure them, and write quality.md, quality.json and quality.png.

    Args:
        model: a local directory or a Hugging Face id.
        source: statistics file of that model.
        data: `PATH[:DOMAIN]` arguments, held-out text.
        output: directory; the profiles go to `profiles/` in it.
        ratios: fractions to remove.
        on_progress: as in `evaluate`.
        options: of `evaluate`.

    Raises:
        ValueError: text, model, statistics or ratio is refused.
        IncompleteError: vLLM fails; the report of what was measured before is written.
    """
    sums = Statistics.read(source)
    size = next(iter(sums.sums.values())).h2.shape[2]
    made, refused = make_profiles(sums, candidates(ratios, size), output / "profiles")
    failure: IncompleteError | None = None
    try:
        rows = evaluate(
            model,
            str(output / "profiles"),
            data,
            names=[candidate.name for candidate in made],
            compared=COMPARED,
            on_progress=on_progress,
            **options,
        )
    except IncompleteError as error:
        failure, rows = error, error.measured
    if len(rows) > 1:
        _write(output, made, rows, refused)
    if failure:
        raise failure
    return figures(made, {row.profile: row for row in rows}, rows[0])


def _write(
    output: Path, made: Sequence[Candidate], rows: Sequence[Row], refused: Sequence[str]
) -> None:
    dense, by_name = rows[0], {row.profile: row for row in rows}
    found = figures(made, by_name, dense)
    told = {"figures": [asdict(figure) for figure in found], "rows": [asdict(row) for row in rows]}
    for name, text in (
        ("quality.md", report(found, dense, refused)),
        ("quality.json", json.dumps(told, indent=1) + "\n"),
    ):
        with replaced_file(output / name) as path:
            path.write_text(text)
    points = [PerplexityPoint(dense.method, 1.0, dense.perplexity[ALL_DOMAINS])] + [
        PerplexityPoint(it.label, by_name[it.name].kept, by_name[it.name].perplexity[ALL_DOMAINS])
        for it in made
        if it.name in by_name
    ]
    plot_perplexity(points, output / "quality.png")
