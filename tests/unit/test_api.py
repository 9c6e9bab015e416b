"""The Python functions: the same names, options, defaults and results as the commands."""

import inspect

import pytest
import torch
from safetensors.torch import load_file
from typer.main import get_command

from tests.unit.test_cli import SMALL, run
from tests.unit.tiny_models import make_model, random_text
from vllm_atomic_moe import api
from vllm_atomic_moe.cli import app
from vllm_atomic_moe.files.tensors import open_safetensors
from vllm_atomic_moe.scoring import known_methods

PRINTED = {"as_json", "plot", "help"}
CALLBACKS = {"on_progress", "on_note", "on_warning"}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A directory with a model, a text and statistics that the command wrote."""
    directory = tmp_path_factory.mktemp("work")
    make_model("qwen3_moe", directory / "model")
    (directory / "one.txt").write_text(random_text(3000))
    command = ("calibrate", directory / "model", "--data", f"{directory / 'one.txt'}:text")
    result = run(*command, "-o", directory / "stats.safetensors", *SMALL)
    assert result.exit_code == 0, result.output
    return directory


def same(left, right) -> bool:
    """Whether two safetensors files hold the same; their metadata are in any order."""
    with open_safetensors(left) as (one, _), open_safetensors(right) as (other, _):
        tensors, others = load_file(left), load_file(right)
        equal = tensors.keys() == others.keys() and one == other
        return equal and all(torch.equal(tensors[name], others[name]) for name in tensors)


@pytest.mark.parametrize(
    ("command", "function"),
    [
        ("calibrate", api.calibrate),
        ("prune", api.prune),
        ("export", api.export),
        ("eval", api.evaluate),
    ],
)
def test_functions_have_the_options_of_commands(command, function):
    typed = get_command(app).commands[command]
    with typed.make_context(command, [], resilient_parsing=True) as context:
        wanted = {p.name: p for p in typed.get_params(context) if p.name not in PRINTED}
    found = dict(inspect.signature(function).parameters)
    assert all(it.annotation is not inspect.Parameter.empty for it in found.values())
    if found.pop("options", None):
        for method in known_methods().entries.values():
            for name in (*method.options, *method.selection):
                found[name] = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
    assert found.keys() - CALLBACKS == wanted.keys()
    for name, parameter in wanted.items():
        if not parameter.required:
            assert found[name].default == parameter.default, name


def test_functions_write_the_same_as_commands(work, tmp_path):
    statistics = api.calibrate(
        str(work / "model"),
        [f"{work / 'one.txt'}:text"],
        str(tmp_path / "stats.safetensors"),
        samples=64,
        seq_len=32,
    )
    assert same(tmp_path / "stats.safetensors", work / "stats.safetensors")

    options = ("--scope", "layer", "--align", 8, "--allow-unseen", "--weight-by-frequency")
    command = ("prune", work / "stats.safetensors", "--method", "heapr", "--ratio", 0.25)
    assert run(*command, *options, "-o", tmp_path / "command").exit_code == 0
    told = {"scope": "layer", "align": 8, "allow_unseen": True, "weight_by_frequency": True}
    profile = api.prune(statistics, 0.25, tmp_path / "function", method="heapr", **told)
    pair = [tmp_path / name / "heapr-25.safetensors" for name in ("command", "function")]
    assert same(*pair)
    assert api.Profile.read(str(pair[1])).digest() == profile.digest()
    again = api.prune(work / "stats.safetensors", 0.25, method="heapr", **told)
    assert again.digest() == profile.digest()

    sizes = []
    result = api.export(
        work / "model",
        pair[1],
        tmp_path / "out",
        on_progress=lambda done, total: sizes.append(done),
    )
    assert (result.profile, sizes[-1] > 0) == ("heapr-25", True)
    command = ("export", work / "model", pair[0], "-o", tmp_path / "again")
    assert run(*command).exit_code == 0
    for file in (tmp_path / "out").rglob("*.safetensors"):
        assert same(file, tmp_path / "again" / file.relative_to(tmp_path / "out"))


def test_warnings_and_refusals(work, tmp_path):
    few = {"samples": 1, "seq_len": 32}
    data = [f"{work / 'one.txt'}:text"]
    with pytest.warns(UserWarning, match="experts saw fewer than 32 tokens") as caught:
        api.calibrate(work / "model", data, **few)
    assert caught[0].filename == __file__
    lines = []
    api.calibrate(work / "model", data, on_warning=lines.append, **few)
    assert len(lines) == len(caught)
    with pytest.raises(ValueError, match="is a directory; name a file in it"):
        api.calibrate(work / "model", data, tmp_path)
    statistics = api.Statistics.read(work / "stats.safetensors")
    for method, options, words in (
        (None, {}, "give --method, one of camera"),
        ("heapr", {"alpha": 0.5}, "method 'heapr' has no option --alpha"),
        ("heapr", {"align": "8"}, "method 'heapr': align is '8', wanted int"),
        ("random", {"seed": True}, "method 'random': seed is True, wanted int"),
        ("heapr", {"nonsense": 1}, "method 'heapr' has no option --nonsense"),
    ):
        with pytest.raises(ValueError, match=words):
            api.prune(statistics, 0.25, method=method, **options)
