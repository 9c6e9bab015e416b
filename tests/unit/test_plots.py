"""Properties of plots that a test can check. Look at the plots as well."""

import dataclasses
import subprocess
import sys
from xml.etree import ElementTree

import matplotlib
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from vllm_atomic_moe.files.profiles import PruningProfile
from vllm_atomic_moe.measure.plots import (
    LINES,
    NOT_ROUTABLE,
    LayerPoint,
    PerplexityPoint,
    ServerPoint,
    _lines,
    _ticks,
    plot_layers,
    plot_perplexity,
    plot_servers,
    plot_widths,
)


def profile(name="p", layers=4, experts=16, size=32, seed=0, first=0, excluded=0):
    """Random widths from 1 to `size`; the first `excluded` experts of every layer not routable."""
    generator = torch.Generator().manual_seed(seed)
    keep, routable = {}, {}
    for layer in range(first, first + layers):
        widths = torch.randint(1, size + 1, (experts, 1), generator=generator)
        keep[layer] = torch.arange(size) < widths
        if excluded:
            keep[layer][:excluded] = False
            routable[layer] = torch.arange(experts) >= excluded
    return PruningProfile(name, keep, routable)


def share(path, color):
    """Fraction of the picture's pixels that have this color."""
    pixels = torch.from_numpy(imread(path).copy())[..., :3]
    return float(((pixels - torch.tensor(color)).abs() < 0.01).all(dim=-1).float().mean())


@pytest.mark.parametrize("count", [1, 3, 6, 9])
def test_grids(count, tmp_path):
    path = tmp_path / "plot.png"
    plot_widths([profile(f"p{index}", seed=index) for index in range(count)], path)
    height, width = imread(path).shape[:2]
    assert 0.15 < height / width < 1.2
    assert [file.name for file in tmp_path.iterdir()] == ["plot.png"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(("layers", "experts"), [(1, 1), (60, 256), (61, 8)])
def test_shapes(layers, experts, tmp_path):
    shape = profile("n" * 64, layers, experts, first=3, excluded=experts // 4)
    plot_widths([shape, profile()], tmp_path / "plot.png")
    assert max(imread(tmp_path / "plot.png").shape) < 4000


def test_zero_width_and_not_routable_have_colors_of_their_own(tmp_path):
    paths = [tmp_path / f"{name}.png" for name in ("plain", "zero", "excluded")]
    plain, excluded = profile(experts=128, layers=48), profile(experts=128, layers=48, excluded=64)
    zero = PruningProfile("p", excluded.keep)
    for one, path in zip((plain, zero, excluded), paths, strict=True):
        plot_widths([one], path)
    white = [share(path, (1.0, 1.0, 1.0)) for path in paths]
    red = [share(path, NOT_ROUTABLE) for path in paths]
    # The legend alone shows a little of both; half of the cells is far more.
    assert white[1] > white[0] + 0.2
    assert abs(white[2] - white[0]) < 0.05
    assert max(red[:2]) < 0.01
    assert red[2] > 0.15
    # White lines cross the red.
    assert red[2] < 0.9 * (white[1] - white[0])


def test_one_scale_for_all_panels(tmp_path):
    """A profile of full width is brightest alone, and half as bright beside one twice as wide."""
    narrow = PruningProfile("narrow", {0: torch.ones(8, 16, dtype=torch.bool)})
    wide = PruningProfile("wide", {0: torch.ones(8, 32, dtype=torch.bool)})
    top, middle = (0.993248, 0.906157, 0.143936), (0.127568, 0.566949, 0.550556)
    plot_widths([narrow], tmp_path / "one.png")
    plot_widths([narrow, wide], tmp_path / "two.png")
    assert share(tmp_path / "one.png", middle) < 0.02
    assert share(tmp_path / "one.png", top) > 0.2
    assert share(tmp_path / "two.png", middle) > 0.1
    assert share(tmp_path / "two.png", top) > 0.1


@pytest.mark.parametrize("suffix", ["PNG", "pdf", "svg"])
def test_formats(suffix, tmp_path):
    path = tmp_path / f"plot.{suffix}"
    plot_widths([profile()], path)
    start = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix.lower()]
    assert path.read_bytes().startswith(start)


def test_a_failure_leaves_the_old_picture(tmp_path):
    path = tmp_path / "plot.xyz"
    path.write_text("old")
    with pytest.raises(ValueError, match="xyz"):
        plot_widths([profile()], path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["plot.xyz"]


@pytest.mark.parametrize(
    ("indices", "wanted", "positions"),
    [
        (range(16), 8, list(range(0, 16, 2))),
        (range(128), 8, list(range(0, 128, 16))),
        (range(256), 8, list(range(0, 256, 32))),
        (range(4), 6, [0, 1, 2, 3]),
        (range(3, 61), 6, [13, 29, 45]),
        ([1, 3, 5], 1, [0]),
        ([7], 6, [0]),
    ],
)
def test_ticks_stand_at_round_numbers(indices, wanted, positions):
    assert _ticks(list(indices), wanted) == positions


def points(method, *pairs):
    return [PerplexityPoint(method, kept, perplexity) for kept, perplexity in pairs]


SEEDS = points("random", (0.8, 23.9), (0.8001, 22.5), (0.8, 23.6), (0.6, 50.8), (0.6, 43.7))
HEAPR = points("heapr", (0.6, 18.5), (0.8, 16.0))


def test_one_line_per_method_and_one_point_per_seeds():
    lines = _lines(HEAPR + SEEDS)
    # The legend reads from the highest end of a line to the lowest.
    assert [method for method, _ in lines] == ["random", "heapr"]
    (_, random), (_, heapr) = lines
    assert [len(group) for group in random] == [3, 2]
    assert [[point.kept for point in group] for group in heapr] == [[0.8], [0.6]]


def test_other_settings_make_another_line_named_by_profile():
    layer = PerplexityPoint("heapr", 0.8, 16.4, '{"scope": "layer"}', "heapr-20-layer")
    named = [dataclasses.replace(point, name=f"heapr-{point.kept}") for point in HEAPR]
    lines = dict(_lines([*named, layer, *SEEDS]))
    assert set(lines) == {"random", "heapr-0.8", "heapr-20-layer"}
    assert [len(group) for group in lines["heapr-0.8"]] == [1, 1]


@pytest.mark.parametrize(
    "rows",
    [
        points("dense", (1, 15.1)),
        HEAPR,
        points("dense", (1, 15.1)) + HEAPR + SEEDS,
        points("dense", (1, 15.1)) + points("", (0.8, 15.0)),
        points("dense", (1, 15.1)) + [p for m in "abcdefghi" for p in points(m, (0.5, 99999.0))],
    ],
)
def test_perplexity_plots(rows, tmp_path):
    plot_perplexity(rows, tmp_path / "plot.png")
    assert imread(tmp_path / "plot.png").shape[:2] == (750, 1200)
    assert [file.name for file in tmp_path.iterdir()] == ["plot.png"]


def test_methods_keep_their_colors_from_picture_to_picture(tmp_path):
    """Colors go by name, not by rank: the line that ends on top is another, its color too."""
    top = {}
    for first, alpha, beta in (("beta", 20, 30), ("alpha", 30, 20)):
        rows = points("alpha", (0.8, 16), (0.5, alpha)) + points("beta", (0.8, 16), (0.5, beta))
        plot_perplexity(points("dense", (1, 15)) + rows, tmp_path / "plot.png")
        upper = torch.from_numpy(imread(tmp_path / "plot.png").copy())[:200, :, :3]
        shown = [
            color
            for color, _ in LINES
            if ((upper - torch.tensor(to_rgb(color))).abs() < 0.01).all(dim=-1).any()
        ]
        top[first] = [color for color in shown if color != "#000000"]
    assert top == {"alpha": [LINES[0][0]], "beta": [LINES[1][0]]}


def test_labels_are_verbatim(tmp_path):
    """No formulas and no hidden labels, whatever another tool calls its method."""
    methods = [r"a$\foo$b", "_mine", r"c\$d", "$$", "e_1^{2}", "<&>"]
    rows = [PerplexityPoint(method, 0.8, 16.0 + i) for i, method in enumerate(methods)]
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot_perplexity(points("dense", (1, 15.1)) + rows, tmp_path / "plot.svg")
    texts = ElementTree.parse(tmp_path / "plot.svg").getroot().itertext()
    assert set(methods) <= {text.strip("\u200b") for text in texts}


def test_no_pyplot_and_no_display(tmp_path):
    code = """
import sys, torch
from pathlib import Path
from vllm_atomic_moe.measure.plots import PerplexityPoint, plot_perplexity, plot_widths
from vllm_atomic_moe.files.profiles import PruningProfile
assert "matplotlib" not in sys.modules
plot_widths([PruningProfile("p", {0: torch.ones(2, 2, dtype=torch.bool)})], Path("w.png"))
plot_perplexity([PerplexityPoint("dense", 1, 2.0)], Path("p.png"))
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["p.png", "w.png"]


def test_layers(tmp_path):
    points = [
        LayerPoint(shape, tokens, pruned, 0.9 + pruned / 4, 0.8, 1.2)
        for shape in ("one", "two")
        for tokens in (1, 8, 512)
        for pruned in (0.25, 0.5)
    ]
    plot_layers(points, tmp_path / "plot.png")
    assert share(tmp_path / "plot.png", to_rgb(LINES[0][0])) > 0
    assert share(tmp_path / "plot.png", to_rgb(LINES[1][0])) > 0
    plot_layers(points[:1], tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 1000


def test_servers(tmp_path):
    points = [
        ServerPoint(name, kept, phase, 1 / kept - 0.1)
        for name, kept in (("dense", 1.0), ("half", 0.5))
        for phase in ("prefill", "decode")
    ]
    plot_servers(points, tmp_path / "plot.png")
    assert share(tmp_path / "plot.png", to_rgb(LINES[0][0])) > 0
    assert share(tmp_path / "plot.png", to_rgb(LINES[1][0])) > 0
    plot_servers([ServerPoint("nothing", 0.0, "prefill", 3.0)], tmp_path / "plot.svg")
