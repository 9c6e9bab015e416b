"""`make serve`: the demo, pruned, answers an OpenAI client; another profile answers differently.

One server, switched as the README says; it answers with both profiles.
"""

from __future__ import annotations

import os
import re
import subprocess

import httpx
import openai
import pytest

from tests.documents import DOCUMENTS, blocks, run
from tests.e2e.conftest import ADMIN_KEY, BIN, free_port, running

PROMPT = "import os\nimport sys\n\n\ndef main("


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Greedy answers and prompt scores with two profiles, and the log."""
    port = free_port()
    log = tmp_path_factory.mktemp("server") / "log"
    command = ["make", "serve", f"PORT={port}", 'RESIDENT=["heapr-40"]']
    with running(command, port, log, ATOMIC_MOE_ADMIN_KEY=ADMIN_KEY) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        found = {"documents": run_documents(port, tmp_path_factory.mktemp("documents"))}
        found["heapr-20"] = ask_everything(client, server)
        subprocess.run(
            [str(BIN / "atomic-moe"), "activate", "heapr-40", "--url", server.url],
            check=True,
            env={**os.environ, "ATOMIC_MOE_ADMIN_KEY": ADMIN_KEY},
        )
        found["heapr-40"] = ask_everything(client, server)
    return {**found, "log": log.read_text()}


def run_documents(port: int, directory) -> str:
    """What the documents' commands for the demo print."""
    (directory / "admin-key").write_text(ADMIN_KEY)
    chosen = [block for name in DOCUMENTS for block in blocks(name) if "demo" in block.needs]
    return run(chosen, directory, port, {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"})


def ask_everything(client: openai.OpenAI, server) -> dict:
    settings = {"model": "demo", "max_tokens": 24, "temperature": 0}
    streamed = client.completions.create(prompt=PROMPT, stream=True, **settings)
    messages = [{"role": "user", "content": "The moon was"}]
    return {
        "models": [model.id for model in client.models.list()],
        "health": httpx.get(f"{server.url}/health").status_code,
        "completion": client.completions.create(prompt=PROMPT, logprobs=2, **settings),
        "streamed": "".join(part.choices[0].text for part in streamed if part.choices),
        "scored": client.completions.create(
            model="demo", prompt=PROMPT, max_tokens=1, temperature=0, echo=True, logprobs=0
        ),
        "chat": client.chat.completions.create(messages=messages, logprobs=True, **settings),
        "chat_streamed": "".join(
            part.choices[0].delta.content or ""
            for part in client.chat.completions.create(messages=messages, stream=True, **settings)
            if part.choices
        ),
    }


@pytest.mark.parametrize("profile", ["heapr-20", "heapr-40"])
def test_openai_client_is_answered(answers, profile):
    found = answers[profile]
    assert (found["models"], found["health"]) == (["demo"], 200)
    choice = found["completion"].choices[0]
    assert choice.text == found["streamed"]
    assert found["completion"].usage.completion_tokens == len(choice.logprobs.tokens) > 1
    assert all(logprob <= 0 for logprob in choice.logprobs.token_logprobs)
    assert all(1 <= len(top) <= 3 for top in choice.logprobs.top_logprobs)
    chat = found["chat"].choices[0]
    assert chat.message.content == found["chat_streamed"] != ""
    assert len(chat.logprobs.content) == found["chat"].usage.completion_tokens


def test_two_profiles_answer_differently(answers):
    scores = [
        answers[profile]["scored"].choices[0].logprobs.token_logprobs[1:]
        for profile in ("heapr-20", "heapr-40")
    ]
    assert len(scores[0]) == len(scores[1]) > 5
    difference = max(abs(a - b) for a, b in zip(*scores, strict=True))
    assert difference > 0.05


def test_start_up_report_says_what_is_resident(answers):
    """heapr-40 lies within heapr-20: the union is heapr-20."""
    log = answers["log"]
    reports = re.findall(r"\((\d+) bytes\) dense, .* \((\d+) bytes\) resident", log)
    assert len(reports) == 1
    dense, resident = map(int, reports[0])
    assert dense == 4 * 16 * 3 * 128 * 128 * 2
    assert resident == pytest.approx(0.8 * dense, rel=0.02)
    assert re.search(r"Profile heapr-20: 80.0 % of atoms kept, .*, active", log)
    assert re.search(r"Profile heapr-40: 60.0 % of atoms kept, .* bytes\)\n", log)


def test_documents_commands_for_the_demo(answers):
    """They switch to heapr-40 and back."""
    printed = answers["documents"]
    assert printed.count('"object":"text_completion"') == 3
    assert '"active":"heapr-40","previous":"heapr-20"' in printed
    assert '"active": "heapr-20"' in printed
