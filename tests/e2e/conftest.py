"""Real servers: started as a user would, asked over HTTP, ended by their process group."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_atomic_moe.serving import server_process
from vllm_atomic_moe.serving.server_process import Server, free_port

__all__ = ["Server", "free_port", "running", "serve_command"]

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "deploy/demo/model"
BIN = Path(sys.executable).parent
ENVIRONMENT = {
    **{key: value for key, value in os.environ.items() if key not in ("VLLM_PLUGINS",)},
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
START_TIMEOUT_S = 400


def serve_command(model: Path, extra: dict[str, object], *flags: str) -> list[str]:
    """`vllm serve` with the load format and these loader options."""
    return [
        str(BIN / "vllm"),
        "serve",
        str(model),
        "--load-format=atomic-pruned",
        f"--model-loader-extra-config={json.dumps(extra)}",
        "--enforce-eager",
        *flags,
    ]


@contextmanager
def running(command: list[str], port: int, log: Path, cwd: Path = ROOT) -> Iterator[Server]:
    """A healthy server in `cwd`, with the environment of these tests."""
    with server_process.running(
        command, port, log, ENVIRONMENT, timeout_s=START_TIMEOUT_S, cwd=cwd
    ) as server:
        yield server
