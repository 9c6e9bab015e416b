"""Switching several ranks: all of them, or none.

The tests share one server, in this order; the last one ends it.
"""

from __future__ import annotations

import time

import pytest

from tests.e2e.conftest import admin_server

ACTIVE, OTHER = "heapr-20", "heapr-40"
PROMPT = "import os\nimport sys\n\n\ndef main("
RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
PROFILES = {"active": ACTIVE, "resident": [OTHER, "shape-20"]}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("server")
    with admin_server(directory, PROFILES, "--tensor-parallel-size=2", **RANKS) as server:
        yield server


@pytest.fixture(scope="module")
def scores(server):
    return {name: switched_scores(server, name) for name in (OTHER, "shape-20", ACTIVE)}


def switched_scores(server, name):
    """What a profile makes of a prompt."""
    assert server.switched(name)["active"] == name
    return server.scores(PROMPT)


def test_ranks_share_the_memory(server):
    memory = server.status()["memory"]
    assert len(memory["rank_resident_bytes"]) == 2
    assert sum(memory["rank_resident_bytes"]) == memory["resident_bytes"]
    one, two = memory["rank_resident_bytes"]
    assert abs(one - two) < 0.02 * memory["resident_bytes"]


def test_all_ranks_switch(server, scores):
    assert scores[OTHER] != pytest.approx(scores[ACTIVE], abs=1e-2)
    assert scores["shape-20"] != pytest.approx(scores[ACTIVE], abs=1e-2)
    assert switched_scores(server, OTHER) == pytest.approx(scores[OTHER], abs=1e-4)
    assert switched_scores(server, ACTIVE) == pytest.approx(scores[ACTIVE], abs=1e-4)


@pytest.mark.parametrize(
    ("verb", "what"),
    [("begin", "fail"), ("prepare", "fail"), ("commit", "fail"), ("commit", "half")],
)
def test_one_rank_that_fails_takes_all_back(server, scores, verb, what):
    before = server.status()
    with server.fault(verb, f"{what}@1"):
        answer = server.switch(OTHER)
    error = answer.json()["error"]
    if verb == "begin":
        assert (answer.status_code, error["type"]) == (409, "SwitchInProgressError")
    else:
        assert (answer.status_code, error["type"]) == (503, "SwitchFailedError")
        assert f"{verb} failed on rank 1: injected: {what}" in error["message"]
    after = server.status()
    assert (after["active"], after["state"]) == (ACTIVE, "serving")
    assert after["generation"] == before["generation"]
    assert server.scores(PROMPT) == pytest.approx(scores[ACTIVE], abs=1e-4)


def test_ranks_with_different_profiles_do_not_switch(server, scores):
    with server.fault("prepare", "digest@1"):
        answer = server.switch(OTHER)
    assert answer.status_code == 503
    assert "the ranks hold different profiles" in answer.json()["error"]["message"]
    assert server.status()["active"] == ACTIVE
    assert server.scores(PROMPT) == pytest.approx(scores[ACTIVE], abs=1e-4)


def test_ranks_that_disagree_are_a_failure(server):
    """As a lost call would leave them: one rank ends a switch that the other never began."""
    generation = server.status()["generation"]
    call = {"owner": "lost", "profile": OTHER, "generation": generation, "displaced": None}
    with server.fault("begin", "fail@1"):
        body = {"method": "atomic_moe_control", "args": ["begin", {**call, "lease_s": 100}]}
        results = server.ask("POST", "/collective_rpc", json=body).json()["results"]
    assert [result["ok"] for result in results] == [True, False]
    status = server.status()
    assert status["state"] == "failed"
    assert "ranks disagree" in status["failure"]
    server.wait_for_health(503)
    assert server.switch(OTHER).json()["error"]["type"] == "SwitchFailedError"
    body = {"method": "atomic_moe_control", "args": ["release", {"owner": "lost"}]}
    server.ask("POST", "/collective_rpc", json=body)
    assert server.status()["state"] == "serving"
    server.wait_for_health(200)


def test_a_rank_that_dies_ends_the_server(server):
    with server.fault("commit", "exit@1"):
        answer = server.switch(OTHER)
    assert answer.status_code == 503, answer.text
    assert answer.json()["error"]["type"] == "SwitchFailedError"
    deadline = time.monotonic() + 60
    while server.server.process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.full
@pytest.mark.parametrize(
    ("flags", "eager"),
    [
        (["--tensor-parallel-size=2", "--enable-expert-parallel"], True),
        (["--pipeline-parallel-size=2"], False),
    ],
    ids=["expert parallel", "pipeline parallel"],
)
def test_other_ways_to_share_a_model_switch_too(tmp_path, scores, flags, eager):
    with admin_server(tmp_path, PROFILES, *flags, eager=eager, **RANKS) as server:
        for name in (OTHER, "shape-20", ACTIVE):
            assert switched_scores(server, name) == pytest.approx(scores[name], abs=1e-4)
        assert len(server.status()["memory"]["rank_resident_bytes"]) == 2
