"""After a clone and `make install` the tools work, with nothing installed by hand."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.e2e.conftest import ROOT, free_port, running


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_fresh_clone_installs_and_serves(tmp_path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    environment = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"}
    subprocess.run(["make", "install"], check=True, cwd=clone, env=environment)
    profiles = "deploy/demo/model/atomic_profiles"
    checked = subprocess.run(
        [".venv/bin/atomic-moe", "check", "deploy/demo/model", profiles],
        check=True,
        cwd=clone,
        capture_output=True,
        text=True,
    )
    shipped = list((clone / profiles).glob("*.safetensors"))
    assert checked.stdout.count(" ok ") == len(shipped) > 1
    port = free_port()
    with running(["make", "serve", f"PORT={port}"], port, tmp_path / "log", cwd=clone):
        pass
