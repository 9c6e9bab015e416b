"""The admin endpoint without an engine: a render server starts in seconds."""

from __future__ import annotations

import subprocess

import httpx
import pytest

from tests.e2e.conftest import ADMIN_KEY, BIN, DEMO, ENVIRONMENT, ROOT, free_port, running

ROUTES = [
    ("GET", "/atomic/v1/status"),
    ("GET", "/atomic/v1/profiles"),
    ("GET", "/atomic/v1/profiles/heapr-20"),
    ("PUT", "/atomic/v1/active"),
    ("PUT", "/atomic/v1/profiles/heapr-20"),
    ("DELETE", "/atomic/v1/profiles/heapr-20"),
]
PLUGINS = {"VLLM_PLUGINS": "atomic_moe,atomic_moe_admin"}


def render_command(port, *flags):
    return [str(BIN / "vllm"), "launch", "render", str(DEMO), f"--port={port}", *flags]


def answers(url, key):
    headers = {"Authorization": f"Bearer {key}"}
    return [
        httpx.request(method, url + path, headers=headers, content=b'{"profile": "heapr-20"}')
        for method, path in ROUTES
    ]


@pytest.mark.parametrize(
    ("configured", "status", "kind"),
    [
        ({"ATOMIC_MOE_ADMIN_KEY": ""}, 403, "AdminKeyNotConfiguredError"),
        ({"ATOMIC_MOE_ADMIN_KEY_FILE": "{file}"}, 503, "EngineUnavailableError"),
    ],
    ids=["no key", "key in a file"],
)
def test_codes_without_engine(tmp_path, configured, status, kind):
    file = tmp_path / "key"
    file.write_text(f"{ADMIN_KEY}\n")
    configured = {name: value.format(file=file) for name, value in configured.items()}
    port = free_port()
    with running(render_command(port), port, tmp_path / "log", **PLUGINS, **configured) as server:
        for answer in answers(server.url, ADMIN_KEY):
            assert answer.status_code == status, answer.text
            assert answer.json()["error"]["type"] == kind
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_serving_key_is_refused_at_start():
    done = subprocess.run(
        render_command(free_port(), "--api-key", "other", "same"),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**ENVIRONMENT, **PLUGINS, "ATOMIC_MOE_ADMIN_KEY": "same"},
        timeout=300,
    )
    assert done.returncode != 0
    line = (
        "atomic-moe admin: ATOMIC_MOE_ADMIN_KEY equals a serving key (--api-key, VLLM_API_KEY); "
        "choose another admin key"
    )
    printed = done.stdout + done.stderr
    assert len([text for text in printed.splitlines() if line in text]) == 1, printed[-4000:]


def test_no_routes_without_the_plug_in(tmp_path):
    port = free_port()
    with running(render_command(port), port, tmp_path / "log", ATOMIC_MOE_ADMIN_KEY="x") as server:
        assert [answer.status_code for answer in answers(server.url, "x")] == [404] * len(ROUTES)
