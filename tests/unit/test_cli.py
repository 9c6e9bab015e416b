"""The command line end to end on a tiny model: exit codes, one line on stderr, what is printed."""

import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

from tests.unit.tiny_models import make_model, random_text
from vllm_atomic_moe import __version__
from vllm_atomic_moe.cli import app
from vllm_atomic_moe.profiles import PruningProfile

SMALL = ("--samples", "4", "--seq-len", "32")


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    """The one line on stderr of a command that must exit with 1."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A directory with a model, text, and statistics made from them."""
    directory = tmp_path_factory.mktemp("work")
    make_model("qwen3_moe", directory / "model")
    for domain in ("one", "two"):
        (directory / f"{domain}.txt").write_text(random_text(1000, seed=len(domain)))
    result = run(
        "calibrate", directory / "model", "--data", directory / "one.txt",
        "--data", f"{directory / 'two.txt'}:second", "-o", directory / "stats.safetensors", *SMALL,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "256 tokens, domains one, second" in result.stdout
    return directory


@pytest.fixture
def profiles(work, tmp_path):
    for ratio in (0.2, 0.4):
        result = run(
            "prune", work / "stats.safetensors", "--method", "heapr", "--ratio", ratio,
            "-o", tmp_path,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
    return tmp_path


def test_version():
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"atomic-moe {__version__}\n")


@pytest.mark.parametrize(
    "arguments", [("nonsense",), ("score",), ("prune", "x", "--ratio", "many", "-o", "y")]
)
def test_usage_errors_exit_with_2(arguments):
    assert run(*arguments).exit_code == 2


def test_from_text_to_checked_profiles(work, profiles):
    result = run("check", work / "model", profiles)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    rows = [line.split() for line in result.stdout.splitlines()]
    assert rows[1][:4] == ["heapr-20", "ok", "80.01%", "heapr-20.safetensors"]
    assert rows[2][:4] == ["heapr-40", "ok", "60.03%", "heapr-40.safetensors"]


def test_score_and_prune_give_what_prune_alone_gives(work, profiles, tmp_path):
    scores = tmp_path / "scores" / "heapr.safetensors"
    result = run("score", work / "stats.safetensors", "--method", "heapr", "-o", scores)
    assert result.exit_code == 0, result.output
    result = run("prune", scores, "--ratio", "0.4", "-o", tmp_path / "again", "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    one = PruningProfile.read(profiles / "heapr-40.safetensors")
    two = PruningProfile.read(tmp_path / "again" / "heapr-40.safetensors")
    assert all((one.keep[layer] == two.keep[layer]).all() for layer in one.keep)
    assert printed["name"] == "heapr-40"
    assert printed["kept"] == two.kept
    assert printed["kept_atoms"] == two.kept_atoms
    assert printed["widths"].keys() == {"min", "median", "max", "zero_width_experts"}
    assert printed["widths"]["min"] == min(int(two.widths(layer).min()) for layer in two.keep)


def test_prune_prints_a_table_and_replaces_a_profile_of_the_same_name(work, tmp_path):
    for seed in (1, 2):
        result = run(
            "prune", work / "stats.safetensors", "--method", "random", "--seed", seed,
            "--ratio", "0.5", "--name", "mine", "-o", tmp_path,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        assert "50.00%" in result.stdout
        assert f"wrote {tmp_path / 'mine.safetensors'}" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["mine.safetensors"]
    profile = PruningProfile.read(tmp_path / "mine.safetensors")
    assert profile.metadata["method_options"] == '{"seed": 2}'


def test_check_names_every_refused_profile_and_exits_with_1(work, profiles):
    make_model("olmoe", profiles / "other")
    (profiles / "broken.safetensors").write_bytes(b"not a profile")
    (profiles / "other").rename(profiles.parent / "other-model")

    result = run("check", work / "model", profiles, "--json")
    assert result.exit_code == 1
    printed = json.loads(result.stdout)
    assert [entry["ok"] for entry in printed["profiles"]] == [False, True, True]
    (line,) = result.stderr.splitlines()
    assert "broken.safetensors: not a complete safetensors file" in line

    result = run("check", profiles.parent / "other-model", profiles / "heapr-20.safetensors")
    shutil.rmtree(profiles.parent / "other-model")
    assert result.exit_code == 1
    assert "refused" in result.stdout
    (line,) = result.stderr.splitlines()
    assert "heapr-20" in line
    assert "made for architecture" in line


def test_check_warns_about_profiles_of_unknown_origin(work, profiles, tmp_path):
    profile = PruningProfile.read(profiles / "heapr-20.safetensors")
    anonymous = PruningProfile("anonymous", profile.keep)
    anonymous.write(tmp_path / "anonymous" / "x.safetensors")
    result = run("check", work / "model", tmp_path / "anonymous")
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: profile 'anonymous' does not say which model")


def test_check_refuses_what_the_server_does_not_serve(work, profiles, tmp_path):
    profile = PruningProfile.read(profiles / "heapr-20.safetensors")
    layer, mask = next(iter(profile.keep.items()))
    routable = torch.ones(mask.shape[0], dtype=torch.bool)
    routable[0] = False
    keep = {**profile.keep, layer: mask & routable[:, None]}
    PruningProfile("whole", keep, {layer: routable}).write(tmp_path / "whole.safetensors")
    result = run("check", work / "model", tmp_path / "whole.safetensors")
    assert result.exit_code == 1
    assert "excludes experts from routing, which this version does not serve" in result.stderr


def test_export_is_smaller_checked_and_not_calibrated(work, profiles, tmp_path):
    output = tmp_path / "exported"
    result = run("export", work / "model", profiles / "heapr-20.safetensors", "-o", output)
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"{output}: heapr-20, 80.01% of atoms, " in result.stdout
    again = ("export", work / "model", profiles / "heapr-20.safetensors", "-o", output, "--json")
    printed = json.loads(run(*again).stdout)
    assert printed["directory"] == str(output)
    assert printed["weight_bytes"] < 0.9 * printed["source_bytes"]
    assert (output / "tokenizer.json").is_file()

    result = run("check", output, output / "atomic_profiles")
    assert result.exit_code == 0, result.output
    result = run("check", output, profiles / "heapr-40.safetensors")
    assert result.exit_code == 0, result.output
    other = ("--method", "random", "--ratio", "0.2", "-o", tmp_path / "other")
    assert run("prune", work / "stats.safetensors", *other).exit_code == 0
    result = run("check", output, tmp_path / "other")
    assert result.exit_code == 1
    assert "atoms that the exported checkpoint does not hold" in result.stderr

    stats = tmp_path / "stats"
    line = refused("calibrate", output, "--data", work / "one.txt", "-o", stats, *SMALL)
    assert "an exported checkpoint, whose pruned atoms are gone; calibrate the original" in line
    heapr_40 = profiles / "heapr-40.safetensors"
    line = refused("export", work / "model", heapr_40, "-o", output)
    assert "holds an export of another model or profile, 'heapr-20'" in line
    assert run("export", work / "model", heapr_40).exit_code == 2


def test_other_scopes_are_refused(work, tmp_path):
    result = run("prune", work / "statistics", "--ratio", 0.5, "--scope", "layer", "-o", tmp_path)
    assert result.exit_code == 1
    assert "scope 'layer': this version prunes with scope global only" in result.stderr


def test_check_refuses_two_files_of_one_name_in_a_directory(work, profiles):
    shutil.copy(profiles / "heapr-20.safetensors", profiles / "copy.safetensors")
    result = run("check", work / "model", profiles)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert "both carry the name 'heapr-20'" in line


def test_calibrate_refuses_in_one_line(work, tmp_path):
    model, text, out = work / "model", work / "one.txt", tmp_path / "s.safetensors"
    base = ("calibrate", model, "-o", out)
    assert "use --seq-len 128 or less" in refused(*base, "--data", text)
    assert "does not exist" in refused(*base, "--data", tmp_path / "no.txt", *SMALL)
    assert "is a directory" in refused("calibrate", model, "--data", text, "-o", tmp_path, *SMALL)
    assert "neither a directory nor" in refused(
        "calibrate", tmp_path / "nowhere/at/all", "--data", text, "-o", out, *SMALL
    )
    assert "config.json" in refused("calibrate", tmp_path, "--data", text, "-o", out, *SMALL)
    assert "wanted one of auto" in refused(*base, "--data", text, "--dtype", "int8", *SMALL)
    assert "wanted auto, cpu" in refused(*base, "--data", text, "--device", "abacus", *SMALL)
    assert not out.exists()


def test_a_model_without_a_tokenizer_is_refused_in_one_line(work, tmp_path):
    shutil.copytree(work / "model", tmp_path / "model")
    for file in (tmp_path / "model").glob("token*"):
        file.unlink()
    arguments = ("--data", work / "one.txt", "-o", tmp_path / "s", *SMALL)
    assert "tokenizer" in refused("calibrate", tmp_path / "model", *arguments)
    assert not (tmp_path / "s").exists()


def test_score_and_prune_refuse_in_one_line(work, tmp_path):
    stats, out = work / "stats.safetensors", tmp_path / "out"
    assert "not known" in refused("score", stats, "--method", "magic", "-o", out)
    assert "no option --seed" in refused(
        "score", stats, "--method", "heapr", "--seed", "1", "-o", out
    )
    assert "no such file" in refused("score", tmp_path / "no", "--method", "heapr", "-o", out)
    prune = ("prune", stats, "--method", "heapr", "-o", out)
    assert "25 percent is 0.25" in refused(*prune, "--ratio", "25")
    assert "give --method" in refused("prune", stats, "--ratio", "0.2", "-o", out)
    assert "is not allowed" in refused(*prune, "--ratio", "0.2", "--name", "No Good")
    assert "reserved" in refused(*prune, "--ratio", "0.2", "--name", "dense")
    assert not out.exists() or not list(out.iterdir())


def test_check_refuses_paths_that_are_not_there(work, tmp_path):
    assert "does not exist" in refused("check", work / "model", tmp_path / "nothing")
    assert "holds no *.safetensors profile" in refused("check", work / "model", tmp_path)
