"""`atomic-moe show`, and the refusals of `--plot`."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from tests.unit.test_cli import refused, run
from vllm_atomic_moe.cli import eval as evaluation
from vllm_atomic_moe.cli.console import print_table
from vllm_atomic_moe.files.checkpoint import CheckpointInfo
from vllm_atomic_moe.files.profiles import PruningProfile
from vllm_atomic_moe.files.router import RouterIdentity
from vllm_atomic_moe.measure.likeness import Answers

MODEL = CheckpointInfo("PaperForCausalLM", 4, 2, 8, 1024, (1, 2), RouterIdentity("0" * 64))


def atoms(*widths):
    return torch.stack([torch.arange(8) < width for width in widths])


@pytest.fixture
def directory(tmp_path):
    metadata = {"model": json.dumps(MODEL.identity()), "method": "heapr", "ratio": "0.25"}
    keep = {1: atoms(8, 0, 1, 3), 2: atoms(8, 8, 8, 4)}
    PruningProfile("atoms", keep, metadata=metadata).write(tmp_path / "atoms.safetensors")
    keep = {1: atoms(8, 0, 8, 0), 2: atoms(8, 8, 8, 8)}
    routable = {1: torch.tensor([True, False, True, True])}
    PruningProfile("whole", keep, routable).write(tmp_path / "whole.safetensors")
    return tmp_path


def test_table_per_layer_and_total(directory):
    result = run("show", directory / "atoms.safetensors")
    assert result.exit_code == 0, result.output
    first, header, *rows = result.stdout.splitlines()
    assert first == (
        "atoms: method heapr, ratio 0.25, 62.50% of atoms kept, 0.14 MiB saved at 16 bits a weight"
    )
    assert " ".join(header.split()) == ("layer width min median max zero width kept MiB saved")
    # 20 and 4 atoms of 3 vectors of 1024 numbers of 2 bytes.
    assert [row.split() for row in rows] == [
        ["1", "0", "2", "8", "1", "37.50%", "0.12"],
        ["2", "4", "8", "8", "0", "87.50%", "0.02"],
        ["all", "0", "6", "8", "1", "62.50%", "0.14"],
    ]


def test_unroutable_experts_and_unknown_bytes(directory):
    result = run("show", directory / "whole.safetensors")
    first, _, *rows = result.stdout.splitlines()
    assert first == "whole: 75.00% of atoms kept"
    assert [row.split()[4:] for row in rows] == [
        ["2", "3/4", "50.00%", "-"],
        ["0", "4/4", "100.00%", "-"],
        ["2", "7/8", "75.00%", "-"],
    ]


def test_the_widest_table_fits_80_columns_and_no_table_is_cut(directory):
    result = run("show", directory / "whole.safetensors")
    assert len(result.stdout.splitlines()[-1]) <= 80
    assert "…" not in result.stdout


def test_tables_in_a_file_are_as_wide_as_they_need(capsys):
    print_table(["n" * 64] * 3, [["x" * 64] * 3])
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["n" * 64] * 3,
        ["x" * 64] * 3,
    ]


def test_json_and_directories(directory):
    result = run("show", directory, directory / "atoms.safetensors", "--json")
    assert result.exit_code == 0, result.output
    one, two = json.loads(result.stdout)["profiles"]
    assert (one["name"], one["method"], one["ratio"]) == ("atoms", "heapr", "0.25")
    assert (two["name"], two["method"], two["ratio"]) == ("whole", None, None)
    assert [row["layer"] for row in one["layers"]] == [1, 2]
    assert one["layers"][0]["widths"] == {
        "min": 0,
        "median": 2,
        "max": 8,
        "zero_width_experts": 1,
    }
    assert one["all"]["bytes_saved_16bit"] == 24 * 3 * 1024 * 2
    assert one["all"]["kept"] == 40 / 64
    assert one["all"]["routable_experts"] == 8
    assert two["all"]["bytes_saved_16bit"] is None
    assert two["layers"][0]["routable_experts"] == 3


def test_plot_is_written_beside_the_table(directory, tmp_path):
    plot = tmp_path / "new" / "widths.png"
    result = run("show", directory, "--plot", plot)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"wrote {plot}"
    assert plot.read_bytes().startswith(b"\x89PNG")
    result = run("show", directory, "--plot", plot, "--json")
    assert len(json.loads(result.stdout)["profiles"]) == 2


def test_refusals(directory, tmp_path):
    assert "does not exist" in refused("show", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "holds no *.safetensors profile" in refused("show", tmp_path / "empty")
    broken = directory / "zzz.safetensors"
    broken.write_bytes(b"not a profile")
    assert "zzz.safetensors: not a complete safetensors file" in refused("show", broken)
    PruningProfile("odd", {0: atoms(1)}, metadata={"model": "[1]"}).write(broken)
    assert "metadata `model` is not a JSON object" in refused("show", broken)


def test_an_unreadable_file_is_left_out_and_named(directory):
    """Hidden files are ignored: macOS puts `._x` beside every x on foreign disks."""
    (directory / "._atoms.safetensors").write_bytes(b"AppleDouble")
    assert run("show", directory).exit_code == 0
    (directory / "zzz.safetensors").write_bytes(b"not a profile")
    for output in ((), ("--json",)):
        result = run("show", directory, *output)
        assert result.exit_code == 1
        assert "atoms" in result.stdout
        assert "whole" in result.stdout
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: left out: ")
        assert "zzz.safetensors: not a complete safetensors file" in line


def test_a_failed_plot_leaves_the_table(directory, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no font")

    monkeypatch.setattr("vllm_atomic_moe.measure.plots.plot_widths", fail)
    result = run("show", directory, "--plot", tmp_path / "x.png")
    assert result.exit_code == 1
    assert "62.50%" in result.stdout
    assert "x.png was not drawn (RuntimeError: no font)" in result.stderr
    result = run("--debug", "show", directory, "--plot", tmp_path / "x.png")
    assert isinstance(result.exception, RuntimeError)


@pytest.mark.parametrize("command", [("show", "nothing"), ("eval", "model", "--data", "t.txt")])
def test_a_plot_that_cannot_be_written_is_refused_first(command, tmp_path):
    plot = ("--plot", tmp_path / "plot")
    assert "wanted a name that ends in .png, .pdf, .svg" in refused(*command, *plot)
    (tmp_path / "plot.png").mkdir()
    assert "is a directory" in refused(*command, "--plot", tmp_path / "plot.png")


def row(profile, *perplexities):
    domains = ("c", "english", "all")[-len(perplexities) :]
    return SimpleNamespace(
        profile=profile,
        kept=0.8,
        kept_bytes=2**20,
        perplexity=dict(zip(domains, perplexities, strict=True)),
        kl={"all": 0.0123},
        answers=Answers(135, 32, 0.25, 0.5),
    )


def test_evaluation_shows_the_change_of_every_domain(capsys):
    evaluation._print([row("dense", 4.0, 10.0, 6.0), row("heapr-20", 5.0, 10.1, 6.6)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    columns = ["profile", "kept", "MiB", "answers", "KL", "Δ", "all", "c", "english", "all"]
    assert lines[0] == columns
    told = ["heapr-20", "80.0%", "1.00", "25%", "0.0123", "+10.0%", "5.00", "10.10", "6.60"]
    assert lines[2] == told
    assert " ".join(lines[-2]) == (
        "answers: share of 135 greedy answers of 32 tokens that equal dense's"
    )
    assert lines[4:-3] == [
        ["against", "dense", "c", "english", "all"],
        ["heapr-20", "+25.0%", "+1.0%", "+10.0%"],
    ]


def test_evaluation_of_one_domain_needs_no_second_table(capsys):
    evaluation._print([row("dense", 6.0, 6.0), row("heapr-20", 6.6, 6.6)])
    assert len(capsys.readouterr().out.splitlines()) == 3 + 3


def test_hidden_sizes_that_are_not_numbers(directory):
    odd = dataclasses.replace(MODEL).identity() | {"hidden_size": "1024"}
    profile = PruningProfile("odd", {1: atoms(1, 2)}, metadata={"model": json.dumps(odd)})
    profile.write(directory / "odd.safetensors")
    result = run("show", directory / "odd.safetensors")
    assert result.stdout.splitlines()[-1].split()[-1] == "-"
