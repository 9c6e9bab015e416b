"""Bad options end `vllm serve` with one clear line, before any weight is read."""

from __future__ import annotations

import subprocess

import pytest

from tests.e2e.conftest import DEMO, ENVIRONMENT, ROOT, free_port, serve_command

SHIPPED = sorted(path.stem for path in (DEMO / "atomic_profiles").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("extra", "flags", "line"),
    [
        (
            {"active": "heapr-99"},
            [],
            "atomic-pruned: profile 'heapr-99' is not in deploy/demo/model/atomic_profiles; "
            f"profiles there: {', '.join(SHIPPED)}",
        ),
        pytest.param(
            {"active": 7},
            [],
            "atomic-pruned: model_loader_extra_config: `active` is 7, wanted a string",
            marks=pytest.mark.full,
        ),
        pytest.param(
            {"active": "heapr-20"},
            ["--enable-expert-parallel", "--expert-placement-strategy=round_robin"],
            "atomic-pruned: not served by this version: round-robin expert placement "
            "(--expert-placement-strategy round_robin); use linear",
            marks=pytest.mark.full,
        ),
    ],
)
def test_refused_before_weights_are_read(extra, flags, line):
    command = serve_command(DEMO.relative_to(ROOT), extra, f"--port={free_port()}", *flags)
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=300
    )
    assert done.returncode != 0
    printed = done.stdout + done.stderr
    assert len([text for text in printed.splitlines() if text.endswith(line)]) == 1, printed[-4000:]
    assert "Loading weights took" not in printed
    assert "Loading safetensors checkpoint shards" not in printed
