"""`make serve`: the demo answers an OpenAI client with several profiles at once, each differently.

One server; its key is made at the first start only.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import httpx
import openai
import pytest

from tests.documents import DOCUMENTS, blocks, run
from tests.e2e.conftest import BIN, ROOT, free_port, running

PROMPT = "import os\nimport sys\n\n\ndef main("
PROFILES = ["heapr-20", "dense", "heapr-40", "tenp-40", "shape-40", "camera-40"]
# Two names of models -> the profiles that answer.
MODELS = {"demo": "heapr-20", "demo:shape-40": "shape-40"}
LOOPBACK = "0100007F"  # 127.0.0.1, as the kernel writes it


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Greedy answers and prompt scores with two profiles, the key's file and the log."""
    port, directory = free_port(), tmp_path_factory.mktemp("server")
    key, log = directory / "build/admin-key", directory / "log"
    with running(["make", "serve", f"PORT={port}", f"ADMIN_KEY={key}"], port, log) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        found = {model: ask_everything(client, server, model) for model in MODELS}
        found["listening"] = listening(port)
        found["documents"] = run_documents(port, key, tmp_path_factory.mktemp("documents"))
    return {**found, "log": log.read_text(), "key": key}


def listening(port: int) -> set[str]:
    """Addresses on which somebody listens to a port, in the kernel's hexadecimal."""
    sockets = [
        line.split()
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for line in Path(table).read_text().splitlines()[1:]
    ]
    addresses = [fields[1].split(":") for fields in sockets if fields[3] == "0A"]
    return {address for address, number in addresses if int(number, 16) == port}


def run_documents(port: int, key: Path, directory: Path) -> str:
    """What the documents' commands for the demo print."""
    (directory / "admin-key").write_text(key.read_text())
    chosen = [block for name in DOCUMENTS for block in blocks(name) if "demo" in block.needs]
    return run(chosen, directory, port, {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"})


def ask_everything(client: openai.OpenAI, server, model: str) -> dict:
    settings = {"model": model, "max_tokens": 24, "temperature": 0}
    streamed = client.completions.create(prompt=PROMPT, stream=True, **settings)
    messages = [{"role": "user", "content": "The moon was"}]
    raw = client.completions.with_raw_response.create(prompt=PROMPT, logprobs=2, **settings)
    return {
        "models": [model.id for model in client.models.list()],
        "health": httpx.get(f"{server.url}/health").status_code,
        "profile": raw.headers["x-atomic-moe-profile"],
        "completion": raw.parse(),
        "streamed": "".join(part.choices[0].text for part in streamed if part.choices),
        "scored": client.completions.create(
            model=model, prompt=PROMPT, max_tokens=1, temperature=0, echo=True, logprobs=0
        ),
        "chat": client.chat.completions.create(messages=messages, logprobs=True, **settings),
        "chat_streamed": "".join(
            part.choices[0].delta.content or ""
            for part in client.chat.completions.create(messages=messages, stream=True, **settings)
            if part.choices
        ),
    }


@pytest.mark.parametrize("model", MODELS)
def test_openai_client_is_answered(answers, model):
    found = answers[model]
    assert sorted(found["models"]) == sorted(["demo", *(f"demo:{name}" for name in PROFILES)])
    assert (found["health"], found["profile"]) == (200, MODELS[model])
    assert found["completion"].model == model
    choice = found["completion"].choices[0]
    assert choice.text == found["streamed"]
    assert found["completion"].usage.completion_tokens == len(choice.logprobs.tokens) > 1
    assert all(logprob <= 0 for logprob in choice.logprobs.token_logprobs)
    assert all(1 <= len(top) <= 3 for top in choice.logprobs.top_logprobs)
    chat = found["chat"].choices[0]
    assert chat.message.content == found["chat_streamed"] != ""
    assert len(chat.logprobs.content) == found["chat"].usage.completion_tokens


def test_two_profiles_answer_differently(answers):
    scores = [answers[model]["scored"].choices[0].logprobs.token_logprobs[1:] for model in MODELS]
    assert len(scores[0]) == len(scores[1]) > 5
    difference = max(abs(a - b) for a, b in zip(*scores, strict=True))
    assert difference > 0.05


def test_start_up_report_says_what_is_resident(answers):
    """`dense` is among the profiles: all atoms are."""
    log = answers["log"]
    reports = re.findall(r"\((\d+) bytes\) dense, .* \((\d+) bytes\) resident", log)
    assert len(reports) == 1
    dense, resident = map(int, reports[0])
    assert dense == 4 * 16 * 3 * 128 * 128 * 2
    assert resident == pytest.approx(dense, rel=0.02)
    assert re.search(r"Profile heapr-20: 80.0 % of atoms kept, .*, active", log)
    assert re.search(r"Profile heapr-40: 60.0 % of atoms kept, .* bytes\)\n", log)
    assert re.findall(r"Profile (\S+): .* of atoms kept", log) == PROFILES


def test_key_is_made_and_printed_at_the_first_start_only(answers):
    path, log = answers["key"], answers["log"]
    key = path.read_text().strip()
    assert re.fullmatch(r"[0-9a-f]{64}", key)
    assert path.stat().st_mode & 0o777 == 0o600
    assert log.count(key) == 1
    again = subprocess.run(
        ["make", "--dry-run", "serve", f"ADMIN_KEY={path}"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert f"> {path}" not in again
    assert f"ATOMIC_MOE_ADMIN_KEY_FILE={path}" in again
    ignored = ["git", "check-ignore", "--quiet", "build/admin-key"]
    assert subprocess.run(ignored, cwd=ROOT, check=False).returncode == 0


def test_nobody_else_reaches_it(answers):
    assert answers["listening"] == {LOOPBACK}


def test_documents_commands_for_the_demo(answers):
    """They ask four profiles by name, make heapr-40 active, then heapr-20,
    and load and unload heapr-60."""
    printed = answers["documents"]
    assert printed.count('"object":"text_completion"') == 5
    named = re.findall(r'"model":"(demo[^"]*)"', printed)
    assert named == ["demo:heapr-20", "demo:shape-40", "demo:heapr-20", "demo:heapr-40", "demo"]
    assert '"active":"heapr-40","previous":"heapr-20"' in printed
    assert '"active": "heapr-20"' in printed
    assert re.search(r"heapr-60 .* servable", printed)
    assert len(re.findall(r" changed ", printed)) == 3  # heapr-20 active; heapr-60 loaded, unloaded
