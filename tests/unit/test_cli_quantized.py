"""The command line on quantized checkpoints: calibrate, prune, show, check, import, export."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from tests.quantized import quantize_checkpoint
from tests.unit.test_cli import refused, run
from tests.unit.tiny_models import make_model, random_text
from vllm_atomic_moe.files.profiles import PruningProfile

SMALL = ("--samples", "4", "--seq-len", "32")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A float32 `original`, its sibling `fp8` and text."""
    directory = tmp_path_factory.mktemp("work")
    make_model("qwen3_moe", directory / "original")
    quantize_checkpoint(directory / "original", directory / "fp8", "fp8-block")
    (directory / "text.txt").write_text(random_text(3000))
    return directory


def test_from_text_to_an_export(work, tmp_path):
    model, text = work / "fp8", work / "text.txt"
    statistics, profiles = tmp_path / "stats.safetensors", tmp_path / "profiles"
    done = run("calibrate", model, "--data", text, "-o", statistics, *SMALL)
    assert done.exit_code == 0, done.output
    prune = ("prune", statistics, "--method", "heapr", "--ratio", 0.4, "-o", profiles)
    assert run(*prune).exit_code == 0
    profile = profiles / "heapr-40.safetensors"
    assert "of atoms kept, 0.45 MiB saved" in run("show", profile).stdout
    done = run("check", model, profile)
    assert done.stdout.startswith("experts: fp8 128x128\n\nprofile")
    told = json.loads(run("check", model, profile, "--json").stdout)
    assert told["row_formats"] == {"fp8 128x128": [0, 1, 2]}
    done = run("export", model, profile, "-o", tmp_path / "out", "--json")
    exported = json.loads(done.stdout)
    assert exported["weight_bytes"] < 0.9 * exported["source_bytes"]
    told = json.loads(run("check", tmp_path / "out", profile, "--json").stdout)
    assert told["row_formats"] == {"fp8 128x128": [0, 1, 2]}
    done = refused("calibrate", tmp_path / "out", "--data", text, "-o", statistics, *SMALL)
    assert "an exported checkpoint" in done

    fit = ("--refit", "--data", text, *SMALL)
    done = run("export", model, profile, "-o", tmp_path / "refitted", *fit)
    assert done.exit_code == 0, done.output
    costs = re.search(r"refitted down_proj: (.+) MiB of plain .+ instead of (.+) MiB", done.stdout)
    # 16 bits instead of 8, though config.json says float32.
    assert float(costs[1]) / float(costs[2]) == pytest.approx(2, rel=0.1)
    done = run("check", tmp_path / "refitted", profile)
    assert done.stdout.startswith("experts: fp8 128x128, down plain\n")


@pytest.mark.parametrize(("made_on", "checked_on"), [("original", "fp8"), ("fp8", "original")])
def test_profiles_fit_siblings_of_other_formats(work, tmp_path, made_on, checked_on):
    masks = {f"layers.{layer}.mask": torch.rand(8, 64) < 0.5 for layer in range(3)}
    save_file(masks, tmp_path / "half.safetensors")
    made = ("import", "mask", tmp_path / "half.safetensors", "--model", work / made_on)
    done = run(*made, "-o", tmp_path / "profiles")
    assert done.exit_code == 0, done.output
    profile = tmp_path / "profiles/half.safetensors"
    assert PruningProfile.read(profile).model["router_sha256"]
    done = run("check", work / checked_on, profile)
    assert (done.exit_code, done.stderr) == (0, "")


def test_layers_of_different_formats_are_listed(work, tmp_path):
    from safetensors.torch import load_file

    plain = load_file(work / "original/model.safetensors")
    fp8 = load_file(work / "fp8/model.safetensors")
    mixed = {name: t for name, t in fp8.items() if "layers.1.mlp.experts" not in name}
    mixed |= {name: t for name, t in plain.items() if "layers.1.mlp.experts" in name}
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_bytes((work / "fp8/config.json").read_bytes())
    save_file(mixed, model / "model.safetensors")
    keep = {layer: torch.ones(8, 64, dtype=torch.bool) for layer in range(3)}
    keep[1][3] = False
    PruningProfile("most", keep).write(tmp_path / "most.safetensors")
    done = run("check", model, tmp_path / "most.safetensors")
    assert done.stdout.startswith("experts: fp8 128x128 in layers 0, 2; plain in layer 1\n")
    assert (
        run("export", model, tmp_path / "most.safetensors", "-o", tmp_path / "out").exit_code == 0
    )
    done = run("check", tmp_path / "out", tmp_path / "most.safetensors", "--json")
    assert json.loads(done.stdout)["row_formats"] == {"fp8 128x128": [0, 2], "plain": [1]}
