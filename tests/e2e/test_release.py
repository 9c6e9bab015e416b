"""Released files: wheel and sdist have the same bytes for the same files, and they serve."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import ADMIN_KEY, DEMO, ROOT, free_port, running, serve_command
from vllm_atomic_moe import __version__

PIP = [sys.executable, "-m", "pip", "--python"]


def build(source: Path, output: Path) -> dict[str, str]:
    """Build both; name -> SHA-256."""
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        str(output),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in output.iterdir()}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files as they are now, with other times and modes of another umask."""
    directory = tmp_path_factory.mktemp("clone")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if name.startswith(("deploy/", "tests/")) or not (ROOT / name).exists():
            continue
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, directory / name)
        os.utime(directory / name, (1_000_000_000, 1_000_000_000))
    return directory


@pytest.fixture(scope="module")
def built(clone: Path) -> Path:
    """Both files: those that `make release-check` has just built, else built here."""
    if (given := os.environ.get("ATOMIC_MOE_DIST")) is not None:
        return ROOT / given
    output = clone / "first"
    build(clone, output)
    return output


def test_two_builds_are_the_same_bytes(clone: Path, built: Path, tmp_path: Path) -> None:
    for path in clone.rglob("*.py"):
        path.touch()
    again = build(clone, tmp_path)
    first = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in built.iterdir()}
    assert first == again
    names = {f"vllm_atomic_moe-{__version__}{end}" for end in ("-py3-none-any.whl", ".tar.gz")}
    assert first.keys() == names


def test_they_hold_what_they_need_and_no_more(built: Path) -> None:
    wheel = zipfile.ZipFile(next(built.glob("*.whl")))
    sources = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "vllm_atomic_moe").rglob("*.*")
        if path.suffix in (".py", ".typed", ".cpp", ".h", ".html", ".css", ".js", ".svg")
    }
    in_wheel = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert in_wheel == sources
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    root = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "PKG-INFO", ".gitignore"}
    assert in_sdist == sources | root


def test_changelog_knows_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[([^]]+)\]", text, re.MULTILINE)
    assert versions[0] == "Unreleased"
    release, _, development = __version__.partition(".dev")
    assert (release in versions) == (not development)


def install(wheel: Path, directory: Path) -> Path:
    """The programs of the wheel in a clean environment, which borrows the pinned packages.

    A plain path in a .pth file: the .pth files over there, which name this working tree, are not
    read.
    """
    venv.create(directory)
    subprocess.run([*PIP, directory, "install", "--quiet", "--no-deps", wheel], check=True)
    [packages] = directory.glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return directory / "bin"


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_wheel_serves_the_demo_from_a_clean_environment(built: Path, tmp_path: Path) -> None:
    programs = install(next(built.glob("*.whl")), tmp_path / "venv")
    environment = {
        "PATH": f"{programs}:/usr/bin:/bin",
        "PYTHONPATH": "",
        "VLLM_PLUGINS": "atomic_moe,atomic_moe_admin",
        "ATOMIC_MOE_ADMIN_KEY": ADMIN_KEY,
    }

    def run(*command: str | Path) -> str:
        return subprocess.run(
            command, check=True, capture_output=True, text=True, env=environment, cwd=tmp_path
        ).stdout

    where = "import vllm, vllm_atomic_moe as it; print(it.__file__, it.__version__)"
    path, version = run(programs / "python", "-c", where).split()
    assert Path(path).is_relative_to(tmp_path / "venv")
    assert version == __version__
    # vLLM itself wants torch's companions, which serving on CPUs does without.
    checked = subprocess.run([*PIP, programs.parent, "check"], capture_output=True, text=True)
    assert "vllm-atomic-moe" not in checked.stdout
    (tmp_path / "model").symlink_to(DEMO)
    port = free_port()
    options = {"active": "heapr-20", "resident": ["heapr-40"]}
    flags = ("--served-model-name=demo", "--max-model-len=512", f"--port={port}")
    _, *arguments = serve_command(tmp_path / "model", options, *flags)
    command = [str(programs / "python"), "-m", "vllm.entrypoints.cli.main", *arguments]
    with running(command, port, tmp_path / "log", tmp_path, **environment) as server:
        for name in ("heapr-20", "heapr-40"):
            body = {"model": f"demo:{name}", "prompt": "def main(", "max_tokens": 8}
            answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
            assert answer.headers["x-atomic-moe-profile"] == name
        client = (programs / "atomic-moe", "activate", "heapr-40", "--url", server.url)
        assert " changed " in run(*client)
