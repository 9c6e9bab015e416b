"""Real servers: started as a user would, asked over HTTP, ended by their process group."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

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


@dataclass(frozen=True, slots=True)
class Server:
    """A running server.

    Attributes:
        url: http://host:port.
        log: file with what it printed.
        process: the process that was started; its children share its group.
    """

    url: str
    log: Path
    process: subprocess.Popen[bytes]


def free_port() -> int:
    """A TCP port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
    """Start `command` in `cwd`, wait until it is healthy, end its process group on exit."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=ENVIRONMENT,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_healthy(process, url, log)
        yield Server(url, log, process)
    finally:
        end_group(process)


def wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(
                f"server ended with {process.returncode}:\n{log.read_text()[-4000:]}"
            )
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise RuntimeError(f"server not healthy after {START_TIMEOUT_S} s:\n{log.read_text()[-4000:]}")


def end_group(process: subprocess.Popen[bytes]) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            continue
