"""The command line end to end on a tiny model: exit codes, one line on stderr, what is printed."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from tests.prediction_heads import make_glm4_moe_with_head
from tests.unit.tiny_models import make_model, random_text
from vllm_atomic_moe import __version__
from vllm_atomic_moe.cli import app
from vllm_atomic_moe.cli.console import (
    MESSAGE_LENGTH,
    ProgressLines,
    print_error,
    print_warning,
)
from vllm_atomic_moe.files.profiles import PruningProfile
from vllm_atomic_moe.files.statistics import Statistics
from vllm_atomic_moe.scoring import known_methods

SMALL = ("--samples", "64", "--seq-len", "32")


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
        (directory / f"{domain}.txt").write_text(random_text(3000, seed=len(domain)))
    result = run(
        "calibrate", directory / "model", "--data", directory / "one.txt",
        "--data", f"{directory / 'two.txt'}:second", "-o", directory / "stats.safetensors", *SMALL,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "4096 tokens, domains one, second" in result.stdout
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
    last = result.stdout.splitlines()[-1]
    assert last.startswith("only the server can tell: whether vLLM has a model of its own for Qwen")


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


def test_check_knows_routing_masks_and_expert_groups(work, profiles, tmp_path):
    profile = PruningProfile.read(profiles / "heapr-20.safetensors")
    layer, mask = next(iter(profile.keep.items()))
    routable = torch.ones(mask.shape[0], dtype=torch.bool)
    routable[1 : mask.shape[0] // 2] = False
    keep = {**profile.keep, layer: mask & routable[:, None]}
    PruningProfile("whole", keep, {layer: routable}).write(tmp_path / "whole.safetensors")
    assert run("check", work / "model", tmp_path / "whole.safetensors").exit_code == 0

    grouped = tmp_path / "grouped"
    shutil.copytree(work / "model", grouped)
    config = json.loads((grouped / "config.json").read_text())
    (grouped / "config.json").write_text(json.dumps({**config, "n_group": 2, "topk_group": 1}))
    result = run("check", grouped, tmp_path / "whole.safetensors")
    assert result.exit_code == 1
    assert (
        f"layers.{layer}.routable leaves [1, {mask.shape[0] // 2}] experts in the router's gr"
        in (result.stderr)
    )


def test_every_method_scope_and_option_prunes(work, tmp_path):
    stats = work / "stats.safetensors"
    data = re.search("data [0-9a-f]{16}", run("show", stats).stdout)[0]
    for method in known_methods().entries:
        result = run("prune", stats, "--method", method, "--ratio", 0.25, "-o", tmp_path)
        assert result.exit_code == 0, result.output
        shown = run("show", tmp_path / f"{method}-25.safetensors").stdout.splitlines()[1]
        assert shown.startswith("calibrated on 4096 tokens, domains one, second, windows of 32, ")
        assert shown.endswith(data)
        assert PruningProfile.read(tmp_path / f"{method}-25.safetensors").kept == 0.75
    base = ("prune", stats, "--ratio", 0.25, "-o", tmp_path, "--name", "mine")
    for options in (
        ("--method", "heapr", "--scope", "expert", "--allow-unseen"),
        ("--method", "heapr", "--scope", "layer", "--align", 16, "--min-width", 16),
        ("--method", "heapr", "--weight-by-frequency", "--domain", "one", "--allow-unseen"),
        ("--method", "tenp", "--alpha", 0.5, "--trapezoid", "1:1", "--align", 8),
        ("--method", "reap", "--scope", "layer"),
    ):
        result = run(*base, *options)
        assert result.exit_code == 0, result.output
    profile = PruningProfile.read(tmp_path / "mine.safetensors")
    assert json.loads(profile.metadata["selection"]) == {"scope": "layer"}


def test_what_prune_writes_for_a_router_with_groups_passes_check(tmp_path):
    """Two groups of four experts; a token uses one group."""
    make_model("deepseek_v3", tmp_path / "model")
    (tmp_path / "t.txt").write_text(random_text(3000))
    command = ("calibrate", tmp_path / "model", "--data", tmp_path / "t.txt", "-o", tmp_path / "s")
    result = run(*command, *SMALL, "--no-gradients")
    assert result.exit_code == 0, result.output
    for method in ("shape", "reap"):
        for ratio in (0.25, 0.5):
            command = ("prune", tmp_path / "s", "--method", method, "--ratio", ratio)
            result = run(*command, "-o", tmp_path / "profiles")
            assert (result.exit_code, result.stderr) == (0, ""), result.output
    result = run("check", tmp_path / "model", tmp_path / "profiles")
    assert result.exit_code == 0, result.output
    # Version 0.1 did not write the groups.
    statistics = Statistics.read(tmp_path / "s")
    old = {k: v for k, v in statistics.calibration.items() if k != "expert_groups"}
    replace(statistics, calibration=old).write(tmp_path / "old")
    command = ("prune", tmp_path / "old", "--method", "reap", "--ratio", 0.5, "--name", "old")
    result = run(*command, "-o", tmp_path / "profiles")
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("warning: profile 'old': the calibration is of an earlier ver")


def test_calibrate_shows_experts_with_few_tokens(work, tmp_path):
    base = ("calibrate", work / "model", "--data", work / "one.txt", "-o", tmp_path / "s")
    result = run(*base, "--samples", 1, "--seq-len", 32)
    assert result.exit_code == 0, result.output
    assert "experts saw fewer than 32 tokens" in result.stderr
    header, *rows = result.stdout.split("experts with fewer than 32 tokens:\n")[1].splitlines()
    assert header.split() == ["layer", "expert", "tokens"]
    assert rows[-1].startswith("… and ")
    tokens = [int(row.split()[2]) for row in rows[:-1]]
    assert tokens == sorted(tokens)
    assert max(tokens) < 32

    printed = json.loads(run(*base, "--samples", 1, "--seq-len", 32, "--json").stdout)
    assert printed["calibration"]["tokens"] == 32
    few = printed["experts_with_few_tokens"]
    assert [entry["tokens"] for entry in few][: len(tokens)] == tokens
    assert len(few) > 20


def test_shards_are_merged(work, tmp_path):
    for number in (1, 2):
        result = run(
            "calibrate", work / "model", "--data", work / "one.txt", "--no-gradients",
            "--shard", f"{number}/2", "-o", tmp_path / f"{number}", *SMALL,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        assert f"shards [{number}] of 2" in result.stdout
    result = run("merge", tmp_path / "1", tmp_path / "2", "-o", tmp_path / "both")
    assert result.exit_code == 0, result.output
    digests = set(re.findall("data [0-9a-f]{16}", result.stdout))
    words = "2048 tokens, domains one, windows of 32, at most 64 a domain, seed 0, "
    assert f"{words}{digests.copy().pop()}; " in result.stdout
    # The digest is of the whole run, so that its parts have the same.
    for file in (tmp_path / "1", tmp_path / "both"):
        digests |= set(re.findall("data [0-9a-f]{16}", run("show", file).stdout))
    assert len(digests) == 1
    told = json.loads(run("show", tmp_path / "1", "--json").stdout)
    assert [f"data {it['data']}" for it in told["statistics"]] == [*digests]
    other = ("--data", work / "two.txt", "--shard", "2/2", "--no-gradients")
    other = ("calibrate", work / "model", *other, "-o", tmp_path / "other", *SMALL)
    assert run(*other).exit_code == 0
    merge = ("merge", tmp_path / "1", tmp_path / "other", "-o", tmp_path / "twice")
    assert "calibration `domains` is ['two'] in one file and ['one']" in refused(*merge)
    # Every method but the one that needs gradients does without them.
    prune = ("prune", tmp_path / "both", "--ratio", 0.25, "-o", tmp_path, "--method")
    for method, kind in known_methods().entries.items():
        if kind.needs:
            assert method == "heapr"
            assert "g2, which heapr needs (made with --no-gradients)" in refused(*prune, method)
        else:
            unseen = ["--allow-unseen"] if "allow_unseen" in kind.options else []
            assert run(*prune, method, *unseen).exit_code == 0, method
    merge = ("merge", tmp_path / "1", tmp_path / "1", "-o", tmp_path / "twice")
    assert "shard 1/2 occurs twice" in refused(*merge)
    assert not (tmp_path / "twice").exists()


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
    assert "an exported checkpoint, whose pruned atoms are gone; use the original model" in line
    heapr_40 = profiles / "heapr-40.safetensors"
    line = refused("export", work / "model", heapr_40, "-o", output)
    assert "holds an export of another model or profile, 'heapr-20'" in line
    assert run("export", work / "model", heapr_40).exit_code == 2


def test_check_refuses_two_files_of_one_name_in_a_directory(work, profiles):
    shutil.copy(profiles / "heapr-20.safetensors", profiles / "copy.safetensors")
    result = run("check", work / "model", profiles)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert "both carry the name 'heapr-20'" in line


def test_prediction_head_is_left_alone(tmp_path):
    make_model("glm4_moe", tmp_path / "model")
    make_glm4_moe_with_head(tmp_path / "model")
    (tmp_path / "text.txt").write_text(random_text(3000))
    stats, out = tmp_path / "stats.safetensors", tmp_path / "profiles"
    for command in (
        ("calibrate", tmp_path / "model", "--data", tmp_path / "text.txt", "-o", stats, *SMALL),
        ("prune", stats, "--method", "heapr", "--ratio", 0.25, "--allow-unseen", "-o", out),
        ("check", tmp_path / "model", out),
        ("show", out),
    ):
        result = run(*command)
        assert result.exit_code == 0, result.output
    assert list(PruningProfile.read(out / "heapr-25.safetensors").keep) == [1, 2]
    assert re.findall(r"^(\w+) .* \d+\.\d\d%", result.stdout, re.MULTILINE) == ["1", "2", "all"]


def test_calibrate_streams_with_the_same_sums(work, tmp_path):
    """From the command line, with the same output."""
    command = (
        "calibrate", work / "model", "--data", work / "one.txt",
        "--data", f"{work / 'two.txt'}:second", "-o", tmp_path / "streamed", *SMALL,
    )  # fmt: skip
    result = run(*command, "--scratch", tmp_path / "scratch")
    assert result.exit_code == 0, result.output
    assert "4096 tokens, domains one, second" in result.stdout
    found = Statistics.read(tmp_path / "streamed")
    wanted = Statistics.read(work / "stats.safetensors")
    assert found.calibration == wanted.calibration
    for layer, sums in wanted.sums.items():
        for name, tensor in sums.tensors().items():
            limit = 1e-6 * float(tensor.abs().max())
            torch.testing.assert_close(getattr(found.sums[layer], name), tensor, rtol=0, atol=limit)
    line = refused(*command, "--scratch", tmp_path / "scratch", "--no-stream")
    assert "--scratch is for calibration layer by layer; leave out --no-stream" in line
    assert "one.txt/rank-0: cannot be written" in refused(*command, "--scratch", work / "one.txt")


def test_progress_off_a_terminal_is_a_line_a_minute():
    """The time left is estimated from steps of this run, not from those before it resumed."""
    times = iter([0.0, 10.0, 40.0, 70.0, 100.0, 131.0, 200.0])
    lines = ProgressLines("calibrating", lambda: next(times))
    found = [lines.line(done, 1000) for done in (400, 430, 460, 490, 521, 1000)]
    assert found == [
        *(None, None),
        "calibrating: 46%, 0:09:00 left",
        None,
        "calibrating: 52%, 0:07:59 left",
        None,
    ]


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
    assert "wanted one of global" in refused(*prune, "--ratio", "0.2", "--scope", "model")
    assert "no option --alpha" in refused(*prune, "--ratio", "0.2", "--alpha", "0.1")
    assert "is not allowed" in refused(*prune, "--ratio", "0.2", "--name", "No Good")
    assert "reserved" in refused(*prune, "--ratio", "0.2", "--name", "dense")
    assert not out.exists() or not list(out.iterdir())


def test_check_refuses_paths_that_are_not_there(work, tmp_path):
    assert "does not exist" in refused("check", work / "model", tmp_path / "nothing")
    assert "holds no *.safetensors profile" in refused("check", work / "model", tmp_path)


def test_messages_are_short_and_keep_their_ends(capsys):
    print_error(ValueError("/a/path: " + "what another library says " * 100 + "; do this"))
    print_warning("x" * 300)
    first, second = capsys.readouterr().err.splitlines()
    assert len(first) == len("error: ") + MESSAGE_LENGTH
    assert first.startswith("error: /a/path: what another")
    assert first.endswith("says ; do this")
    assert second == "warning: " + "x" * 300


def test_names_that_the_terminal_cannot_show(tmp_path):
    keep = {0: torch.ones(2, 4).bool()}
    PruningProfile("p", keep).write(tmp_path / "caf\xe9" / "p.safetensors")
    command = [sys.executable, "-c", "from vllm_atomic_moe.cli import app; app()", "show"]
    for name, code in (("caf\xe9", 0), (os.fsdecode(b"none \xe9"), 1)):
        done = subprocess.run(
            [*command, tmp_path / name],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONIOENCODING": "ascii:strict"},
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
