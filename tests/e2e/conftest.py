"""Real servers: started like a user's, asked over HTTP, ended by their process group."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.e2e import faults
from vllm_atomic_moe.measure import server_process
from vllm_atomic_moe.measure.server_process import Server, free_port

__all__ = ["AdminServer", "Server", "admin_server", "free_port", "running", "serve_command"]

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
ADMIN_KEY = "admin-key-of-the-tests"
SERVING_KEY = "serving-key-of-the-tests"


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
def running(
    command: list[str], port: int, log: Path, cwd: Path = ROOT, **environment: str
) -> Iterator[Server]:
    """A healthy server in `cwd`, with the environment of these tests and `environment`."""
    with server_process.running(
        command,
        port,
        log,
        {**ENVIRONMENT, **environment},
        timeout_s=START_TIMEOUT_S,
        cwd=cwd,
    ) as server:
        yield server


@dataclass(frozen=True)
class AdminServer:
    """A running server with the admin endpoint, its log, and the faults that can be injected."""

    server: Server
    faults: Path

    @property
    def url(self) -> str:
        """http://host:port."""
        return self.server.url

    def log(self) -> str:
        """Its output so far."""
        return self.server.log.read_text(errors="replace")

    def ask(self, method: str, path: str, key: str | None = ADMIN_KEY, **options: Any) -> Any:
        """One request, on its own connection."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        options = {"timeout": 120, **options}
        return httpx.request(method, f"{self.url}{path}", headers=headers, **options)

    def status(self) -> dict[str, Any]:
        """The status; asserts that there is one."""
        answer = self.ask("GET", "/atomic/v1/status")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def activate(self, profile: str, timeout: float = 120, **body: Any) -> Any:
        """The answer to a change of the active profile."""
        body = {"profile": profile, **body}
        return self.ask("PUT", "/atomic/v1/active", json=body, timeout=timeout)

    def changed(self, profile: str, **body: Any) -> dict[str, Any]:
        """The answer to a change of the active profile that must succeed."""
        answer = self.activate(profile, **body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def load(self, profile: str) -> Any:
        """The answer to loading a profile."""
        return self.ask("PUT", f"/atomic/v1/profiles/{profile}")

    def unload(self, profile: str) -> Any:
        """The answer to unloading a profile."""
        return self.ask("DELETE", f"/atomic/v1/profiles/{profile}")

    def complete(self, prompt: str, profile: str | None = None, **settings: Any) -> dict[str, Any]:
        """The API's answer: one greedy completion by a profile, or by the active one."""
        model = f"demo:{profile}" if profile else "demo"
        body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 8, **settings}
        answer = self.ask("POST", "/v1/completions", key=SERVING_KEY, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def scores(self, prompt: str, profile: str | None = None) -> list[float]:
        """Log-probabilities of the prompt's tokens and of one more."""
        answer = self.complete(prompt, profile, max_tokens=1, echo=True, logprobs=0)
        return answer["choices"][0]["logprobs"]["token_logprobs"][1:]

    def metrics(self) -> dict[str, float]:
        """Metrics of ours, with their labels, and their values."""
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line.startswith("atomic_moe"))
        return {name: float(value) for name, value in pairs}

    @contextmanager
    def fault(self, where: str, what: str) -> Iterator[None]:
        """Within the context, a call fails; see tests/e2e/faults.py."""
        path = self.faults / where
        path.write_text(what)
        try:
            yield
        finally:
            path.unlink()


@contextmanager
def admin_server(
    directory: Path,
    extra: dict[str, object],
    *flags: str,
    model: Path = DEMO,
    eager: bool = True,
    max_model_len: int = 512,
    port: int | None = None,
    **environment: str,
) -> Iterator[AdminServer]:
    """The demo with the admin endpoint, keys for both, faults, and vLLM's development routes.

    Args:
        directory: empty; for the log and the faults.
        extra: options of the loader.
        flags: more flags of `vllm serve`; the dtype is float32, so that answers can be compared.
        model: checkpoint.
        eager: whether compilation is off.
        max_model_len: tokens of a request.
        port: where it listens; None for a free one.
        environment: more variables.
    """
    port = port or free_port()
    command = serve_command(
        model,
        extra,
        "--dtype=float32",
        f"--max-model-len={max_model_len}",
        "--served-model-name=demo",
        f"--api-key={SERVING_KEY}",
        f"--port={port}",
        *flags,
    )
    if not eager:
        command.remove("--enforce-eager")
    environment = {
        "VLLM_PLUGINS": "atomic_moe,atomic_moe_admin,faults",
        "VLLM_SERVER_DEV_MODE": "1",
        "ATOMIC_MOE_ADMIN_KEY": ADMIN_KEY,
        **faults.installed(directory),
        **environment,
    }
    with running(command, port, directory / "log", **environment) as server:
        yield AdminServer(server, directory)
