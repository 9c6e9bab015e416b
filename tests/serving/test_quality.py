"""`atomic-moe quality`: its candidates, its intervals, and one run on a tiny model."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from typer.testing import CliRunner

from tests.documents import ROOT
from tests.unit.test_calibration_statistics import CALIBRATION, MODEL, SETS
from tests.unit.tiny_models import make_model, random_text
from vllm_atomic_moe.cli import app
from vllm_atomic_moe.files.profiles import PruningProfile
from vllm_atomic_moe.files.statistics import LayerSums, Statistics
from vllm_atomic_moe.scoring import known_methods


def row(name, windows, kept=1.0):
    from vllm_atomic_moe.measure.evaluation import Row
    from vllm_atomic_moe.measure.likeness import Answers

    tokens = {domain: 10 * len(values) for domain, values in windows.items()}
    tokens["all"] = sum(tokens.values())
    total = sum(sum(values) for values in windows.values())
    perplexity = {"all": math.exp(-total / tokens["all"])}
    answers = Answers(1, 32, 1.0, 1.0)
    return Row(name, name, "", kept, 0, perplexity, tokens, windows, {"all": 0.0}, answers)


def test_intervals_hold_the_figure_and_follow_the_spread_of_windows():
    from vllm_atomic_moe.measure.quality import interval

    generator = torch.Generator().manual_seed(0)
    base = (-20 - torch.rand(50, generator=generator)).tolist()
    noise = torch.randn(50, generator=generator)
    dense = row("dense", {"a": base[:30], "b": base[30:]})

    def pruned(spread):
        values = [it - 1 - spread * more for it, more in zip(base, noise.tolist(), strict=True)]
        return row("heapr-20", {"a": values[:30], "b": values[30:]})

    # Every window loses the same: nothing depends on which are drawn.
    low, high = interval(pruned(0.0), dense)
    assert low == pytest.approx(math.expm1(0.1)) == high
    wide, narrow = interval(pruned(1.0), dense), interval(pruned(0.1), dense)
    assert wide[1] - wide[0] > 5 * (narrow[1] - narrow[0]) > 0
    for spread, (low, high) in ((1.0, wide), (0.1, narrow)):
        delta = pruned(spread).perplexity["all"] / dense.perplexity["all"] - 1
        assert low < delta < high
    # Of the mean of 50 windows of 10 tokens: about 2 · 1.96 · σ / √50 / 10.
    expected = 2 * 1.96 * float(noise.std()) / 50**0.5 / 10 * math.exp(0.1)
    assert wide[1] - wide[0] == pytest.approx(expected, rel=0.2)


def test_every_method_is_measured_and_random_ones_with_three_seeds():
    from vllm_atomic_moe.measure.quality import candidates

    found = candidates((0.2, 0.4), 64)
    assert {it.label for it in found} >= known_methods().entries.keys()
    assert len({it.name for it in found}) == len(found)
    for method in known_methods().entries:
        of_method = [it for it in found if it.label == method and it.ratio == 0.2]
        assert len(of_method) == (3 if method.startswith("random") else 1)
    [floor] = [it for it in found if "floor" in it.label and it.ratio == 0.4]
    assert floor.options == {"min_width": 8}
    assert not any("aligned" in it.label for it in candidates((0.2,), 48))


def test_specialized_profiles_of_the_demos_report(tmp_path, monkeypatch):
    """They are scored by different domains and told apart by their names."""
    monkeypatch.syspath_prepend(ROOT / "deploy/demo/recipe")
    import report

    generator = torch.Generator().manual_seed(0)
    domains = [domain for kind in report.SPECIALIZED.values() for domain in kind]
    assert sorted(domains) == sorted(report.DOMAINS)

    def positive(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1

    experts, atoms = (len(domains), 16), (16, 128)
    sums = LayerSums(
        count=torch.full(experts, 50.0, dtype=torch.float64),
        **{name: positive(*experts) for name in ("output_norm", "output_change")},
        **{name: positive(len(domains), *atoms) for name in ("h2", "g2", "contribution")},
        **{name: positive(*atoms) for name in ("gate_norm", "up_norm", "down_norm")},
        sets=SETS,
        set_counts=torch.tensor([9, 4, 5, 2, 1]),
    )
    model = {**MODEL, "num_experts": 16, "intermediate_size": 128, "layers": [0]}
    told = {**CALIBRATION, "domains": domains, "windows_sha256": dict.fromkeys(domains, "0" * 64)}
    names = report.specialize(Statistics(model, told, {0: sums}), tmp_path)
    assert sorted(names) == sorted(
        f"heapr-{it}-{at}" for it in report.SPECIALIZED for at in (20, 40)
    )
    profiles = [PruningProfile.read(tmp_path / f"{name}.safetensors") for name in names]
    assert len({tuple(profile.keep[0].flatten().tolist()) for profile in profiles}) == len(names)


def test_the_demos_page_has_every_method_for_both_models():
    from vllm_atomic_moe.measure.quality import candidates

    page = (ROOT / "deploy/demo/quality.md").read_text()
    for label in {it.label for it in candidates((0.2,), 128)}:
        assert page.count(f"\n| {label} | ") == 2, label


@pytest.mark.full
def test_report_of_a_tiny_model(tmp_path):
    model, statistics, text = tmp_path / "model", tmp_path / "statistics", tmp_path / "text.txt"
    make_model("qwen3_moe", model)
    text.write_text(random_text(1500))
    run = CliRunner().invoke
    command = ["calibrate", model, "--data", text, "--samples", 1, "--seq-len", 64]
    assert run(app, [*map(str, command), "-o", str(statistics)]).exit_code == 0
    command = ["quality", model, statistics, "--data", text, "--ratio", 0.9, "--seq-len", 100]
    out = tmp_path / "out"
    result = run(app, [*map(str, command), "-o", str(out), "--dtype", "float32"])
    assert result.exit_code == 0, result.output
    report = (out / "quality.md").read_text()
    assert report.rstrip() in result.stdout
    assert (out / "quality.png").stat().st_size > 10_000
    told = json.loads((out / "quality.json").read_text())
    assert all(0 <= row["answers"]["equal"] <= 1 for row in told["rows"])
    by_label = {figure["label"]: figure for figure in told["figures"]}
    assert by_label["random"]["seeds"] == 3
    assert len(list((out / "profiles").iterdir())) == len(told["rows"]) - 1
    [dense] = [it for it in told["rows"] if it["profile"] == "dense"]
    for label, method in (("magnitude", "magnitude-90"),):
        [measured] = [it for it in told["rows"] if it["profile"] == method]
        delta = measured["perplexity"]["all"] / dense["perplexity"]["all"] - 1
        assert by_label[label]["delta"] == pytest.approx(delta)
        assert by_label[label]["low"] < delta < by_label[label]["high"]
        assert re.search(rf"\| {label} \| \{delta:+.1%} \(", report)
    # Two of eight experts must stay, so the methods of whole experts cannot remove 90 %.
    assert re.search(r"Not made: reap at 90%: ratio 0.9 removes \d+ of \d+ experts", report)
    # The tiny model's experts saw too few tokens to be narrowed.
    assert "heapr at 90%" in report
