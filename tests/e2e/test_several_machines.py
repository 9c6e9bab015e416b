"""vLLM's own support of several machines: two of them on this machine's loopback, one core each.

Compiled: on CPU vLLM's eager pipelines fail, and a rank of tensor parallelism over machines talks
over gloo. Node 1 has no API server; changes reach its ranks through the engine.
"""

from __future__ import annotations

import subprocess
from contextlib import contextmanager

import pytest

from tests.e2e.conftest import (
    ADMIN_KEY,
    DEMO,
    ENVIRONMENT,
    ROOT,
    admin_server,
    free_port,
    serve_command,
)

PROFILES = {"active": "heapr-20", "resident": ["heapr-40", "shape-20"]}
NAMES = ["heapr-20", "heapr-40", "shape-20"]
EXTRA = "heapr-60"
PROMPT = "import os\nimport sys\n\n\ndef main("
CORES = {"OMP_NUM_THREADS": "1", "VLLM_HOST_IP": "127.0.0.1"}


@contextmanager
def second_node(log, *flags):
    """A node without an API server, stopped at the end."""
    command = serve_command(DEMO, PROFILES, "--dtype=float32", "--max-model-len=512", *flags)
    command.remove("--enforce-eager")
    environment = {**ENVIRONMENT, **CORES, "VLLM_CPU_OMP_THREADS_BIND": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment
        )
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    """Scores from one machine."""
    with admin_server(tmp_path_factory.mktemp("one"), PROFILES) as server:
        assert server.load(EXTRA).status_code == 200
        return {name: server.scores(PROMPT, name) for name in [*NAMES, EXTRA]}


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["pipeline", "tensor"])
def test_two_machines_answer_as_one(tmp_path, scores, kind):
    shared = (
        f"--{kind}-parallel-size=2",
        "--nnodes=2",
        "--master-addr=127.0.0.1",
        f"--master-port={free_port()}",
    )
    directory = tmp_path / "first"
    directory.mkdir()
    with (
        second_node(tmp_path / "second", *shared, "--node-rank=1", "--headless"),
        admin_server(
            directory,
            PROFILES,
            *shared,
            "--node-rank=0",
            eager=False,
            VLLM_CPU_OMP_THREADS_BIND="0",
            **CORES,
        ) as server,
    ):
        for name in NAMES:
            assert server.scores(PROMPT, name) == pytest.approx(scores[name], abs=1e-4), name
        assert server.changed("heapr-40")["active"] == "heapr-40"
        assert server.scores(PROMPT) == pytest.approx(scores["heapr-40"], abs=1e-4)
        assert server.load(EXTRA).status_code == 200
        assert server.scores(PROMPT, EXTRA) == pytest.approx(scores[EXTRA], abs=1e-4)
        assert server.unload(EXTRA).status_code == 200
        memory = server.status()["memory"]
        assert len(memory["rank_resident_bytes"]) == 2
        assert ADMIN_KEY not in (tmp_path / "second").read_text(errors="replace")
