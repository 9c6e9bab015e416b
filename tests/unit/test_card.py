"""atomic-moe card: the README of a repository of profiles."""

import json
import shutil

import pytest
import torch
import yaml
from matplotlib.image import imread

from tests.documents import ROOT
from tests.unit.test_cli import refused, run
from vllm_atomic_moe.files.profiles import PruningProfile

DEMO = ROOT / "deploy/demo/model/atomic_profiles"
NAMES = ("heapr-20", "shape-40")


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "profiles").mkdir()
    for name in NAMES:
        shutil.copy(DEMO / f"{name}.safetensors", tmp_path / "profiles")
    return tmp_path / "profiles"


def row(name, kept, perplexity):
    method = name.partition("-")[0]
    by_domain = {"c": perplexity + 1, "all": perplexity}
    return {
        "profile": name, "method": method, "settings": "{}", "kept": kept, "kept_bytes": 1,
        "perplexity": by_domain, "tokens": dict.fromkeys(by_domain, 9),
        "delta": dict.fromkeys(by_domain, 0.0),
    }  # fmt: skip


def measure(directory, rows):
    path = directory.parent / "measured.json"
    path.write_text(json.dumps(rows))
    return path


def measurements(directory):
    kept = {name: PruningProfile.read(directory / f"{name}.safetensors").kept for name in NAMES}
    return [
        row("dense", 1.0, 10.0),
        row("heapr-20", kept["heapr-20"], 12.0),
        row("shape-40", kept["shape-40"], 20.0),
    ]


def test_a_card_tells_model_methods_kept_and_perplexities(directory):
    path = measure(directory, measurements(directory))
    result = run("card", "org/model", directory, "--measured", path)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"wrote {directory / 'README.md'}\n"
    _, front, text = (directory / "README.md").read_text().split("---\n", 2)
    told = yaml.safe_load(front)
    assert told["base_model"] == "org/model"
    assert "vllm-atomic-moe" in told["tags"]
    assert "Qwen3MoeForCausalLM, 4 layers of 16 experts of 128 atoms" in text
    heapr, shape = (PruningProfile.read(directory / f"{name}.safetensors") for name in NAMES)
    excluded = sum(int((~mask).sum()) for mask in shape.routable.values())
    assert f"| heapr-20 | heapr | {heapr.kept:.2%} | 0 |" in text
    assert f"| shape-40 | shape | {shape.kept:.2%} | {excluded} |" in text
    assert "tokens: english, spanish" in text
    assert "| dense | 100.00% | 11.00 | 10.00 |" in text
    assert f"| heapr-20 | {heapr.kept:.2%} | 13.00 (+18.2%) | 12.00 (+20.0%) |" in text
    for picture in ("widths.png", "perplexity.png"):
        assert f"]({picture})" in text
        assert imread(directory / picture).shape[0] > 100


def test_a_card_is_made_again_but_takes_no_place_of_another(directory):
    assert run("card", "org/model", directory).exit_code == 0
    text = (directory / "README.md").read_text()
    assert "Perplexity" not in text
    assert not (directory / "perplexity.png").exists()
    assert run("card", "org/model", directory).exit_code == 0
    assert (directory / "README.md").read_text() == text
    (directory / "README.md").write_text("my own words")
    assert "did not write it; move it elsewhere" in refused("card", "org/model", directory)
    assert (directory / "README.md").read_text() == "my own words"


def test_text_of_a_profile_stays_in_its_cell(directory):
    keep = {0: torch.ones(2, 4).bool()}
    metadata = {"method": "a|b\n# <script>", "calibration": "[]"}
    for path in directory.iterdir():
        path.unlink()
    PruningProfile("mine", keep, metadata=metadata).write(directory / "mine.safetensors")
    assert run("card", "org/model", directory).exit_code == 0
    assert (
        "| mine | a\\|b # &lt;script> | 100.00% | 0 |  |" in (directory / "README.md").read_text()
    )


def test_what_does_not_fit_is_refused(directory):
    assert "wanted the Hugging Face id" in refused("card", "/models/x", directory)
    rows = measurements(directory)
    for path, words in (
        (directory.parent / "none.json", "is not what `atomic-moe eval --json` prints"),
        (measure(directory, {"a": 1}), "is not what `atomic-moe eval --json` prints"),
    ):
        assert words in refused("card", "org/model", directory, "--measured", path)
    for wrong, words in (
        (rows[1:], "dense is not first"),
        ([], "is not what"),
        ([rows[0], {**rows[1], "kept": "all"}], "kept is 'all'"),
        ([rows[0], {**rows[1], "kept": 0.5}], "'heapr-20' that keeps 50.0000%, which is not in"),
        ([rows[0], {**rows[1], "perplexity": {"c": 1.0}}], "domains differ"),
    ):
        path = measure(directory, wrong)
        assert words in refused("card", "org/model", directory, "--measured", path)
    PruningProfile("other", {0: torch.ones(2, 4).bool()}).write(directory / "other.safetensors")
    assert "'heapr-20' and 'other' are of different models" in refused(
        "card", "org/model", directory
    )
    (directory / "other.safetensors").write_bytes(b"no")
    assert "not a complete safetensors file" in refused("card", "org/model", directory)
    (directory.parent / "empty").mkdir()
    assert "holds no *.safetensors profile" in refused(
        "card", "org/model", directory.parent / "empty"
    )
    assert not (directory / "README.md").exists()
