"""Many profiles under load, with a KV cache so small that requests are preempted.

The tests share one server, in this order; the last one ends it. The long soaks are at the end.
"""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

from tests.e2e.conftest import SERVING_KEY
from tests.e2e.soak import (
    CLIENTS,
    EXTRA,
    PROFILES,
    Soak,
    clear_answers,
    fresh_references,
    references_of,
    soak_server,
    summary,
)

ACTIVE, OTHER = PROFILES[0], "heapr-40"
LONG = {"max_tokens": 150, "ignore_eos": True}
PROMPT = "The moon was"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """18 blocks of 32 tokens: one long request, or four of the soak's six."""
    directory = tmp_path_factory.mktemp("server")
    with soak_server(directory, "--num-gpu-blocks-override=18") as server:
        yield server


def check(server, report, requests, changes):
    """Checks for every soak."""
    print(json.dumps(summary(report), indent=1))
    assert not report.wrong
    assert not report.errors
    assert report.requests >= requests
    assert report.changes >= changes
    assert min(report.answers[profile] for profile in PROFILES) > 0
    assert report.unnamed > 0
    assert report.loads > 0
    assert report.unknown > 0
    assert report.prefix_hits > 0
    assert report.grown_files <= 2 * CLIENTS
    status = server.status()
    assert status["agreed"]
    assert list(status["profiles"]) == list(PROFILES)
    assert server.ask("GET", "/health").status_code == 200
    # Requests of disconnected clients are gone too.
    assert all(not it["running"] + it["waiting"] for it in status["profiles"].values())


def test_answers_are_right_even_if_requests_are_preempted(server):
    assert server.load(EXTRA).status_code == 200
    answers = {name: clear_answers(server, name, 32, 18) for name in (*PROFILES, EXTRA)}
    assert server.unload(EXTRA).status_code == 200
    report = Soak(server, references_of(answers, 4), 32).run(requests=40, changes=5)
    check(server, report, 40, 5)
    assert report.preemptions > 0


def test_changes_leave_nothing_behind(server):
    """No memory, no open files."""
    soak = Soak(server, {})
    before = soak.resources()
    for number in range(100):
        server.changed(PROFILES[number % len(PROFILES)])
        if number % 10 == 0:
            assert server.load(EXTRA).status_code == 200
            assert server.unload(EXTRA).status_code == 200
    grown_bytes, grown_files = (b - a for a, b in zip(before, soak.resources(), strict=True))
    assert grown_bytes < 16 * 2**20
    assert grown_files <= 4


def test_a_change_interrupts_nothing(server):
    server.changed(ACTIVE)
    reference = answer_of(server, None, **LONG)
    other = answer_of(server, OTHER, max_tokens=32)
    with running(server, None) as request:
        answer = server.changed(OTHER)
        assert answer["running"][ACTIVE] == 1
        assert not request.done()
        assert answer_of(server, None, max_tokens=32) == other
        assert not request.done()
        assert request.result() == reference


def test_abort_ends_the_requests_of_other_profiles_with_vllms_reason(server):
    """Those that run, and those that the small cache leaves queued."""
    server.changed(ACTIVE)
    reference = answer_of(server, OTHER, **LONG)
    with running(server, None) as stream, ThreadPoolExecutor(8) as pool:
        others = [pool.submit(answer_of, server, ACTIVE, **LONG) for _ in range(4)]
        stays = [pool.submit(answer_of, server, OTHER, **LONG) for _ in range(2)]
        time.sleep(1)
        answer = server.changed(OTHER, running="abort")
        assert answer["active"] == OTHER
        assert [request.result()[1] for request in (stream, *others)] == ["abort"] * 5
        assert [request.result() for request in stays] == [reference] * 2
    assert answer["running"][ACTIVE] == 0


def test_a_profile_in_use_is_not_unloaded(server):
    server.changed(ACTIVE)
    before = server.status()
    with running(server, OTHER) as request:
        answer = server.unload(OTHER)
        assert (answer.status_code, answer.json()["error"]["type"]) == (409, "ProfileInUseError")
        assert not request.done()
        assert server.complete(PROMPT, OTHER)["model"] == f"demo:{OTHER}"
        request.result()
    assert server.status()["profiles"].keys() == before["profiles"].keys()
    assert server.unload(OTHER).status_code == 200
    assert server.load(OTHER).status_code == 200


def test_a_dead_engine_is_reported_and_the_server_ends(server):
    with server.fault("load", "exit"):
        answer = server.load(EXTRA)
    assert answer.status_code == 503, answer.text
    assert answer.json()["error"]["type"] == "EngineUnavailableError"
    deadline = time.monotonic() + 60
    while server.server.process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.2)


@contextmanager
def running(server, profile):
    """A started streaming request: a future of its text and reason. The engine is slow."""
    begun = threading.Event()

    def ask():
        model = f"demo:{profile}" if profile else "demo"
        body = {"model": model, "prompt": PROMPT, "temperature": 0, "stream": True, **LONG}
        text, reason = "", None
        headers = {"Authorization": f"Bearer {SERVING_KEY}"}
        url = f"{server.url}/v1/completions"
        with httpx.stream("POST", url, json=body, headers=headers, timeout=120) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    choice = json.loads(line.removeprefix("data: "))["choices"][0]
                    text, reason = text + choice["text"], choice["finish_reason"]
                    begun.set()
        return text, reason

    with server.fault("step", "0.02"), ThreadPoolExecutor() as pool:
        future = pool.submit(ask)
        assert begun.wait(60)
        yield future


def answer_of(server, profile, **settings):
    choice = server.complete(PROMPT, profile, **settings)["choices"][0]
    return choice["text"], choice["finish_reason"]


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """Reference answers from servers with one profile each."""
    return fresh_references(tmp_path_factory.mktemp("references"))


@pytest.mark.full
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    ("eager", "blocks"), [(True, 64), (False, 64), (True, 24)], ids=["eager", "compiled", "preempt"]
)
def test_five_thousand_answers_and_two_hundred_changes(tmp_path, references, eager, blocks):
    """64 blocks are few enough that all pages of the cache are touched early."""
    with soak_server(tmp_path, f"--num-gpu-blocks-override={blocks}", eager=eager) as server:
        report = Soak(server, references).run(5000, 200)
        check(server, report, 5000, 200)
        assert report.hung_up > 0
        assert report.grown_bytes < 256 * 2**20
        if blocks < 64:
            assert report.preemptions > 0
