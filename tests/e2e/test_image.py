"""The CPU image, built and run by buildah without a Docker engine, on Debian's own Python.

Needs root and Debian's packages buildah and mmdebstrap. Prints the image's size and the time of a
start (`pytest -s`).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import ADMIN_KEY, BIN, ROOT, Server, free_port, running

TOOLS = ("buildah", "mmdebstrap")
BASE = "localhost/atomic-moe-test-base"
IMAGE = "localhost/atomic-moe-test:cpu"
KEY_FILE = "/run/secrets/atomic_moe_admin_key"

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, TOOLS)),
        reason=f"needs root and {' and '.join(TOOLS)}",
    ),
]


def buildah(*arguments: str | Path) -> str:
    return subprocess.run(
        ["buildah", *map(str, arguments)], check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ).stdout.strip()


def base_image(directory: Path) -> None:
    """In place of python:3.11-slim-bookworm: Debian's smallest system with Python 3.11."""
    packages = "python3,python3-venv,ca-certificates"
    archive = directory / "base.tar"
    subprocess.run(
        ["mmdebstrap", "--variant=minbase", f"--include={packages}", "bookworm", archive],
        check=True,
    )
    container = buildah("from", "scratch")
    buildah("add", container, archive, "/")
    buildah("config", "--env", "PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", container)
    buildah("commit", "--rm", container, BASE)


def pip_volumes(directory: Path) -> list[str]:
    """This machine's pip settings for the build: sources of wheels, and trusted hosts."""
    options = {
        name.removeprefix("PIP_").lower().replace("_", "-"): value
        for name, value in os.environ.items()
        if name.startswith("PIP_")
    }
    configuration = directory / "pip.conf"
    lines = [f"{name} = {value}" for name, value in options.items()]
    configuration.write_text("\n".join(["[global]", *lines, ""]))
    volumes = [f"{configuration}:/etc/pip.conf:ro", "/etc/ssl/certs:/etc/ssl/certs:ro"]
    links = options.get("find-links", "")
    return volumes + [f"{path}:{path}:ro" for path in links.split() if Path(path).is_dir()]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("image")
    base_image(directory)
    volumes = [f"--volume={volume}" for volume in pip_volumes(directory)]
    isolation = ["--isolation=chroot", "--format=docker", "--target=cpu"]
    arguments = [f"--build-arg=PYTHON_IMAGE={BASE}", "--build-arg=VERSION=1.2.3"]
    try:
        buildah("build", *isolation, *arguments, *volumes, "--tag", IMAGE, ".")
        yield IMAGE
    finally:
        subprocess.run(["buildah", "rmi", "--force", IMAGE, BASE], check=False)


@pytest.fixture(scope="module")
def configuration(image: str) -> dict[str, Any]:
    inspected = json.loads(buildah("inspect", "--type=image", image))
    return inspected["Docker"]["config"]


@pytest.fixture(scope="module")
def container(image: str) -> Iterator[str]:
    name = buildah("from", image)
    yield name
    buildah("rm", name)


@pytest.fixture(scope="module")
def server(
    container: str, configuration: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The image as `docker run` starts it with no volume, a secret, and two flags of the user's."""
    directory = tmp_path_factory.mktemp("server")
    key = directory / "key"
    key.write_text(ADMIN_KEY + "\n")
    port = free_port()
    flags = ["--port", str(port), "--max-model-len=256"]
    command = [
        *("buildah", "run", "--isolation=chroot", f"--user={configuration['User']}"),
        f"--env=ATOMIC_MOE_ADMIN_KEY_FILE={KEY_FILE}",
        f"--volume={key}:{KEY_FILE}:ro",
        *(container, "--", *configuration["Entrypoint"], *configuration["Cmd"], *flags),
    ]
    with running(command, port, directory / "log") as server:
        yield server


def inside(container: str, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["buildah", "run", "--isolation=chroot", container, "--", *command],
        capture_output=True,
        text=True,
    )


def test_demo_answers_and_is_switched(server: Server, image: str, tmp_path: Path) -> None:
    print(
        f"{image}: {buildah('images', '--format={{.Size}}', image)}, up in {server.start_s:.1f} s"
    )
    question = {"model": "demo", "prompt": "def main(", "max_tokens": 8, "temperature": 0}
    regex = {"structured_outputs": {"regex": r"[a-z]{3,8}\(\)"}}
    for body in (question, question | regex):
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
    key = tmp_path / "key"
    key.write_text(ADMIN_KEY)
    subprocess.run(
        [BIN / "atomic-moe", "activate", "heapr-40", "--url", server.url, "--key-file", key],
        check=True,
    )
    status = httpx.get(
        f"{server.url}/atomic/v1/status", headers={"Authorization": f"Bearer {ADMIN_KEY}"}
    ).json()
    assert (status["active"], status["generation"]) == ("heapr-40", 1)


def test_kernels_are_built_in_and_flags_override(server: Server) -> None:
    log = server.log.read_text()
    assert "Expert kernel: cpu" in log
    assert "'load_format': 'atomic-pruned'" in log
    assert "'max_model_len': 256" in log


def test_health_check_passes(server: Server, container: str, configuration: dict[str, Any]) -> None:
    kind, *command = configuration["Healthcheck"]["Test"]
    port = server.url.rpartition(":")[2]
    command = [argument.replace("8000", port) for argument in command]
    assert kind == "CMD"
    assert inside(container, *command).returncode == 0
    assert inside(container, *(part.replace(port, "1") for part in command)).returncode != 0


def test_neither_root_nor_build_tools(container: str, configuration: dict[str, Any]) -> None:
    assert configuration["User"] == "2000:0"
    assert inside(container, "id", "-u").stdout.strip() == "2000"
    for tool in ("gcc", "g++", "cc", "make"):
        assert inside(container, "sh", "-c", f"command -v {tool}").returncode != 0, tool
    assert inside(container, "touch", "/opt/atomic-moe/kernels/mine").returncode != 0


# Mounts of its own, seen by nobody else; the root file system is read-only from here on.
READ_ONLY = """
root=$1 user=$2
shift 2
mount --bind "$root" "$root"
mount -o remount,bind,ro "$root"
for place in dev proc sys; do mount --rbind "/$place" "$root/$place"; done
mount -t tmpfs tmpfs "$root/tmp"
exec chroot --userspec="$user" "$root" env --ignore-environment --chdir=/home/vllm "$@"
"""


def test_any_user_serves_from_a_read_only_root(
    container: str, configuration: dict[str, Any], tmp_path: Path
) -> None:
    """With another user and group than the image's, and only /tmp writable."""
    root = buildah("mount", container)
    port = free_port()
    command = [
        *("unshare", "--mount", "sh", "-euc", READ_ONLY, "sh", root, "12345:54321"),
        *(*configuration["Env"], f"ATOMIC_MOE_ADMIN_KEY={ADMIN_KEY}", "VLLM_CPU_KVCACHE_SPACE=1"),
        *(*configuration["Entrypoint"], *configuration["Cmd"]),
        *("--port", str(port), "--max-model-len=256"),
    ]
    try:
        with running(command, port, tmp_path / "log") as server:
            owner = Path(f"/proc/{server.process.pid}").stat()
            assert (owner.st_uid, owner.st_gid) == (12345, 54321)
            body = {"model": "demo:heapr-40", "prompt": "def main(", "max_tokens": 8}
            answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            assert "Expert kernel: cpu" in server.log.read_text()
    finally:
        buildah("umount", container)


def test_labels(configuration: dict[str, Any]) -> None:
    labels = configuration["Labels"]
    assert labels["org.opencontainers.image.version"] == "1.2.3"
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
