"""Profiles from the Hub: a repository, its revision, its folder; from a cache, no network."""

import json

import pytest

from tests.documents import ROOT
from tests.hub_cache import lay_out, use
from tests.unit.test_cli import refused, run
from vllm_atomic_moe.files.hub import REPOSITORY, resolve_profiles

DEMO = ROOT / "deploy/demo/model"
FILES = {name: DEMO / f"atomic_profiles/{name}.safetensors" for name in ("heapr-20", "shape-40")}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    card = tmp_path / "card"
    card.write_text("a card")
    first = {"heapr-20.safetensors": FILES["heapr-20"], "README.md": card}
    lay_out(tmp_path / "hub", "org/profiles", "main", first)
    second = {f"forty/{name}.safetensors": file for name, file in FILES.items()}
    lay_out(tmp_path / "hub", "org/profiles", "v2", second)
    use(tmp_path / "hub", monkeypatch)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("org/name", ("org/name", None, None)),
        ("org/name@v1.0", ("org/name", "v1.0", None)),
        ("org/name@refs/pr/7/a", ("org/name", "refs/pr/7", "a")),
        ("o-r.g/n_1@main/a/b-c", ("o-r.g/n_1", "main", "a/b-c")),
        *(
            (text, None)
            for text in ("name", "/org/name", "./org", "org/name/", "../name", "org/..")
        ),
        *((text, None) for text in ("org/name/../x", "org/name@", "org/na me", "org/name/a*")),
    ],
)
def test_names_of_repositories(text, wanted):
    match = REPOSITORY.fullmatch(text)
    assert (match and match.groups()) == wanted


def test_a_directory_comes_first(cache, tmp_path):
    (tmp_path / "org/profiles").mkdir(parents=True)
    assert str(resolve_profiles("org/profiles")) == "org/profiles"
    assert str(resolve_profiles("org/profiles/")) == "org/profiles"


def test_show_and_check_take_repositories(cache):
    shown = json.loads(run("show", "org/profiles", "--json").stdout)["profiles"]
    assert [entry["name"] for entry in shown] == ["heapr-20"]
    shown = json.loads(run("show", "org/profiles@v2/forty", "--json").stdout)["profiles"]
    assert [entry["name"] for entry in shown] == ["heapr-20", "shape-40"]
    result = run("check", DEMO, "org/profiles@v2/forty", "org/profiles")
    assert result.exit_code == 0, result.output
    assert result.stdout.count(" ok ") == 3


def test_what_cannot_be_found_is_one_line(cache):
    line = refused("show", "org/none")
    assert "'org/none' is neither a directory nor on the Hugging Face Hub" in line
    assert "'org/profiles' is neither" in refused("show", "org/profiles@v3")
    line = refused("show", "org/profiles@v2")
    assert (
        "profiles 'org/profiles@v2': 'org/profiles' holds no *.safetensors profile in its " in line
    )
    assert "no *.safetensors profile in fifty/; name the folder" in refused(
        "check", DEMO, "org/profiles@v2/fifty"
    )


def test_only_profiles_of_the_folder_are_requested(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        (tmp_path / "a").mkdir(exist_ok=True)
        for folder in ("a", "."):
            (tmp_path / folder / "x.safetensors").touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    files = [
        "README.md",
        "x.safetensors",
        "x.bin",
        "a/x.safetensors",
        "a/b/x.safetensors",
        "a/x.py",
    ]
    for text, wanted in (
        ("org/name@v1", ["README.md", "x.safetensors"]),
        ("org/name@v1/a", ["a/x.safetensors"]),
    ):
        resolve_profiles(text, "/cache")
        assert (asked["name"], asked["revision"], asked["cache_dir"]) == (
            "org/name",
            "v1",
            "/cache",
        )
        patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
        assert list(filter_repo_objects(files, **patterns)) == wanted
