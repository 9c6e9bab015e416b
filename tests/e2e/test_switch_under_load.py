"""Switching while requests flow, with a KV cache so small that requests are preempted.

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
from tests.e2e.soak import CLIENTS, PROFILES, Soak, soak_server

ACTIVE, OTHER = PROFILES[:2]
LONG = {"max_tokens": 150, "ignore_eos": True}
PROMPT = "The moon was"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """18 blocks of 32 tokens: one long request, or four of the soak's six."""
    directory = tmp_path_factory.mktemp("server")
    with soak_server(directory, "--num-gpu-blocks-override=18") as server:
        yield server


@pytest.fixture(scope="module")
def soak(server):
    return Soak(server, prompts=8, tokens=64)


def check(server, report, requests, switches):
    """What every soak must show."""
    assert not report.mixed
    assert not report.errors
    assert report.requests >= requests
    assert sum(report.switches.values()) >= switches
    assert min(report.answers[profile] for profile in PROFILES) > 0
    assert report.prefix_hits > 0
    assert report.grown_files <= 2 * CLIENTS
    status = server.status()
    assert status["state"] == "serving"
    assert server.ask("GET", "/health").status_code == 200
    assert server.complete(PROMPT)["choices"][0]["finish_reason"] == "length"


def test_waiting_loses_and_mixes_nothing_though_requests_are_preempted(server, soak):
    report = soak.run(requests=40, switches=6, modes=["wait"])
    check(server, report, 40, 6)
    assert report.preemptions > 0
    assert report.aborted == 0


def test_cutting_mixes_nothing(server, soak):
    report = soak.run(requests=30, switches=6, modes=["abort", "wait"])
    check(server, report, 30, 6)
    assert report.aborted > 0


def test_switching_leaves_nothing_behind(server, soak):
    """No memory and no open files. Under load the worker's allocator grows for hundreds of requests
    whether the profile is switched or not; an idle server shows what switching takes.
    """
    before = soak.resources()
    for number in range(100):
        server.switched(PROFILES[number % len(PROFILES)])
    grown_bytes, grown_files = (b - a for a, b in zip(before, soak.resources(), strict=True))
    assert grown_bytes < 16 * 2**20
    assert grown_files <= 4


def test_a_long_request_outlasts_the_time_and_nothing_has_changed(server):
    server.switched(ACTIVE)
    reference = answer_of(server, **LONG)
    before = server.status()
    with running(server) as request:
        answer = server.switch(OTHER, timeout_s=0.2)
        assert answer.status_code == 503, answer.text
        error = answer.json()["error"]
        assert error["type"] == "SwitchTimeoutError"
        assert "requests were still running after 0.2 s; nothing changed" in error["message"]
        # Serving goes on at once, with the old profile.
        assert not request.done()
        assert answer_of(server, **LONG) == reference
        assert request.result() == reference
    after = server.status()
    assert after["last_switch"]["outcome"] == "timeout"
    assert after["last_switch"]["total_ms"] >= 200
    assert {**after, "last_switch": None} == {**before, "last_switch": None}


def test_waiting_lets_begun_requests_finish_and_queued_ones_begin_anew(server):
    server.switched(OTHER)
    other = answer_of(server, max_tokens=32)
    server.switched(ACTIVE)
    reference = answer_of(server, **LONG)
    with running(server) as begun, ThreadPoolExecutor() as pool:
        switch = pool.submit(server.switched, OTHER)
        while server.status()["state"] != "switching":
            assert not switch.done()
        assert not begun.done()
        queued = pool.submit(answer_of, server, max_tokens=32)
        assert begun.result() == reference
        assert queued.result() == other
        answer = switch.result()
    assert answer["total_ms"] >= answer["drain_ms"] > answer["commit_ms"] > 0


def test_cutting_ends_all_there_is_with_vllms_reason(server):
    """Those that run, and those that the small cache leaves queued. (Of a stream that is cut before
    its first token vLLM sends nothing but the end.)
    """
    server.switched(ACTIVE)
    with running(server) as stream, ThreadPoolExecutor() as pool:
        others = [pool.submit(answer_of, server, **LONG) for _ in range(5)]
        time.sleep(1)
        answer = server.switched(OTHER, mode="abort")
        reasons = [request.result()[1] for request in (stream, *others)]
    assert reasons == ["abort"] * 6
    assert answer["active"] == OTHER


def test_an_engine_that_dies_is_said_and_the_server_ends(server):
    server.switched(ACTIVE)
    with server.fault("commit", "exit"):
        answer = server.switch(OTHER)
        assert answer.status_code == 503, answer.text
        error = answer.json()["error"]
        assert error["type"] in ("SwitchFailedError", "EngineUnavailableError")
        try:
            assert server.ask("GET", "/health").status_code == 503
            status = server.ask("GET", "/atomic/v1/status")
            assert status.status_code == 503
            assert status.json()["error"]["type"] == "EngineUnavailableError"
        except httpx.TransportError:
            pass  # it has ended already
    deadline = time.monotonic() + 60
    while server.server.process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.2)


@contextmanager
def running(server):
    """A streaming request that has begun: a future of its text and reason. The engine is slow."""
    begun = threading.Event()

    def ask():
        body = {"model": "demo", "prompt": PROMPT, "temperature": 0, "stream": True, **LONG}
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


def answer_of(server, **settings):
    choice = server.complete(PROMPT, **settings)["choices"][0]
    return choice["text"], choice["finish_reason"]


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_a_thousand_requests_and_a_hundred_switches(tmp_path, eager):
    """Few blocks, so that no page of the cache is touched for the first time in the end."""
    with soak_server(tmp_path, "--num-gpu-blocks-override=64", eager=eager) as server:
        report = Soak(server).run(1000, 100, ["wait", "wait", "abort"])
        check(server, report, 1000, 100)
        assert report.aborted > 0
        assert report.grown_bytes < 128 * 2**20
