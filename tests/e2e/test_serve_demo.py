"""`make serve`: the demo, pruned, answers an OpenAI client; another profile answers differently."""

from __future__ import annotations

import re

import httpx
import openai
import pytest

from tests.e2e.conftest import free_port, running

PROMPT = "import os\nimport sys\n\n\ndef main("


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Greedy answers and prompt scores of two servers, one after the other."""
    found = {}
    for profile in ("heapr-40", "heapr-20"):
        port = free_port()
        log = tmp_path_factory.mktemp("server") / f"{profile}.log"
        command = ["make", "serve", f"PORT={port}", f"PROFILE={profile}"]
        with running(command, port, log) as server:
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
            found[profile] = ask_everything(client, server)
            found[profile]["log"] = log.read_text()
    return found


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


@pytest.mark.parametrize(("profile", "kept"), [("heapr-20", 0.8), ("heapr-40", 0.6)])
def test_start_up_report_says_what_is_resident(answers, profile, kept):
    log = answers[profile]["log"]
    reports = re.findall(r"\((\d+) bytes\) dense, .* \((\d+) bytes\) resident", log)
    assert len(reports) == 1
    dense, resident = map(int, reports[0])
    assert dense == 4 * 16 * 3 * 128 * 128 * 2
    assert resident == pytest.approx(kept * dense, rel=0.02)
    assert re.search(rf"Profile {profile}: {100 * kept:.1f} % of atoms kept, .*, active", log)
