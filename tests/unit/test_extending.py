"""Methods and formats of other packages: the documents' example, and faulty packages."""

from __future__ import annotations

import inspect
import json
import os
import re
import sys

import pytest
import torch

from tests.documents import ROOT, blocks, files_of, run
from tests.unit.test_calibration_statistics import CALIBRATION, MODEL, make_sums
from tests.unit.test_cli import refused
from tests.unit.test_cli import run as command
from vllm_atomic_moe import api
from vllm_atomic_moe.cli.prune import prune as cli_prune
from vllm_atomic_moe.cli.score import score as cli_score
from vllm_atomic_moe.convert.importing import known_importers
from vllm_atomic_moe.files.profiles import PruningProfile
from vllm_atomic_moe.files.statistics import Statistics
from vllm_atomic_moe.scoring import RESERVED, known_methods
from vllm_atomic_moe.scoring.pruning import load_scores, make_profile

DEMO = ROOT / "deploy/demo/model"
# pip installs into a directory beside the interpreter's own, from what is here.
PIP = """
pip() {
  command "$PYTHON" -m pip --quiet --disable-pip-version-check "$1" --no-index --no-deps \
    --no-build-isolation --target site "${@:2}"
}
atomic-moe() { command "$PYTHON" -c "from vllm_atomic_moe.cli import app; app()" "$@"; }
"""


@pytest.fixture
def statistics(tmp_path):
    path = tmp_path / "stats.safetensors"
    Statistics(MODEL, CALIBRATION, make_sums()).write(path)
    return path


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Install a package: its metadata as pip would leave it, and a module."""

    def install(name, module, **points):
        site = tmp_path / "site"
        info = site / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = [f"{key} = {name.replace('-', '_')}:{value}" for key, value in points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[atomic_moe.methods]", *lines]) + "\n")
        (site / f"{name.replace('-', '_')}.py").write_text(module)
        monkeypatch.syspath_prepend(site)
        known_methods.cache_clear()

    yield install
    known_methods.cache_clear()
    for name in [name for name in sys.modules if name.startswith("atomic_moe_test_")]:
        del sys.modules[name]


def test_the_documents_package_is_installed_and_used(tmp_path, statistics):
    for name, text in files_of("docs/extending.md").items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        assert len([line for line in text.splitlines() if line]) <= 30
    (tmp_path / "MODEL").symlink_to(DEMO)
    kept = {layer: [0, 1, 2, 3, layer + 8] for layer in range(4)}
    lines = [f"{layer} {' '.join(map(str, experts))}" for layer, experts in kept.items()]
    (tmp_path / "kept.txt").write_text("\n".join(lines))
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}",
    }
    printed = run(blocks("docs/extending.md"), tmp_path, 0, environment, prelude=PIP)
    assert "wrote profiles/busy-25.safetensors" in printed

    busy = PruningProfile.read(tmp_path / "profiles/busy-25.safetensors")
    assert busy.kept == 0.75
    assert json.loads(busy.metadata["method_options"]) == {"power": 0.5, "allow_unseen": False}
    assert busy.metadata["method_package"] == "atomic-moe-example 1.0"
    listed = PruningProfile.read(tmp_path / "profiles/kept.safetensors")
    for layer, experts in kept.items():
        assert listed.routable[layer].nonzero().flatten().tolist() == experts
    assert json.loads(listed.metadata["source"])["package"] == "atomic-moe-example 1.0"


HALF = """
import torch
from vllm_atomic_moe.scoring.masks import LayerScores
from vllm_atomic_moe.scoring.method import Method, Option
def score(sums, layer, **options):
    shape = sums.h2.shape[1:]
    return LayerScores(torch.arange(shape.numel()).float().view(shape))
"""


def test_a_method_appears_in_the_help_with_its_options(installed, statistics, tmp_path):
    installed(
        "atomic-moe-test-good",
        HALF + 'METHOD = Method(score, "in order", options={"pace": Option(3, "How fast.")})',
        order="METHOD",
    )
    for name in ("prune", "score"):
        shown = re.sub(r"[\s│]+", " ", command(name, "--help").stdout)
        assert "order: in order" in shown
        assert "How fast (order). [default: (3)]" in shown
        # An option of several methods is one option.
        assert shown.count("--allow-unseen") == 1
    prune = ("prune", statistics, "--ratio", 0.5, "-o", tmp_path, "--pace", 5)
    result = command(*prune, "--method", "order")
    assert (result.exit_code, result.stderr) == (0, "")
    keep = PruningProfile.read(tmp_path / "order-50.safetensors").keep
    assert all(torch.equal(mask.flatten(), torch.arange(24) >= 12) for mask in keep.values())
    assert "method 'heapr' has no option --pace" in refused(*prune, "--method", "heapr")


def test_no_option_of_a_method_takes_a_name_of_the_commands_or_functions():
    used = set()
    for function in (api.prune, cli_prune, cli_score):
        used |= {*inspect.signature(function).parameters}
    assert used <= {*RESERVED}


@pytest.mark.parametrize(
    ("module", "points", "words"),
    [
        ("import nothing_of_that_name", {"new": "METHOD"}, "ModuleNotFoundError: No module named"),
        ("METHOD = 7", {"new": "METHOD"}, "is int, wanted Method"),
        (HALF + 'METHOD = Method(score, "x")', {"heapr": "METHOD"}, "another one has that name"),
        (HALF + 'METHOD = Method(score, "x")', {"N_W": "METHOD"}, "a name is 1 to 64 of"),
        (
            HALF + 'METHOD = Method(score, "x", options={"ratio": Option(1, "y")})',
            {"new": "METHOD"},
            "its option 'ratio' cannot have that name",
        ),
        (
            HALF + 'METHOD = Method(score, "x", options={"samples": Option(1, "y")})',
            {"new": "METHOD"},
            "its option 'samples' cannot have that name",
        ),
        (
            HALF + 'METHOD = Method(score, "x", options={"scope": Option(1, "y")}, selection={})',
            {"new": "METHOD"},
            "its option 'scope' is of another type than that of camera",
        ),
        (HALF + 'METHOD = Method(score, "x", options={"a": Option([], "y")})', {"new": "METHOD"},
         "an option of kind list; wanted bool, int"),
    ],
)  # fmt: skip
def test_a_package_at_fault_is_left_out(installed, statistics, tmp_path, module, points, words):
    installed("atomic-moe-test-bad", module, **points)
    base = ("prune", statistics, "--ratio", 0.5, "-o", tmp_path, "--method")
    result = command(*base, "heapr", "--allow-unseen")
    assert result.exit_code == 0
    (line,) = result.stderr.splitlines()
    (name,) = points
    assert line.startswith(f"warning: method '{name}' of the package atomic-moe-test-bad 1.0 canno")
    assert words in line
    assert line.endswith("update or uninstall the package")
    if name != "heapr":
        lines = command(*base, name).stderr.splitlines()
        assert lines == [line, line.replace("warning: ", "error: ", 1)]


def test_scores_of_a_package_that_is_gone_are_refused(installed, statistics, tmp_path):
    installed("atomic-moe-test-gone", HALF + 'METHOD = Method(score, "in order")', order="METHOD")
    scores = tmp_path / "scores.safetensors"
    assert command("score", statistics, "--method", "order", "-o", scores).exit_code == 0
    assert make_profile(load_scores(scores, None, {}), 0.5).kept == 0.5
    for file in (tmp_path / "site").rglob("entry_points.txt"):
        file.unlink()
    known_methods.cache_clear()
    line = refused("prune", scores, "--ratio", 0.5, "-o", tmp_path)
    assert "method 'order' of the package atomic-moe-test-gone 1.0, which is not installed" in line


def test_every_format_has_its_file():
    assert not known_importers().refused
    directory = ROOT / "vllm_atomic_moe/convert/importing/formats"
    names = {path.stem.replace("_", "-") for path in directory.glob("[a-z]*.py")}
    assert set(known_importers().entries) == names
