"""A change of the active profile while an answer of 2,000 tokens streams; two API servers."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.e2e.conftest import ADMIN_KEY, SERVING_KEY, admin_server
from vllm_atomic_moe.measure.synthetic import Sizes, make_checkpoint

SIZES = Sizes(layers=2, experts=8, experts_per_token=2, hidden=128, intermediate=64)
ACTIVE, OTHER = "pruned-25", "pruned-50"
TOKENS = 2000


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = tmp_path_factory.mktemp("model") / "model"
    make_checkpoint(model, SIZES)
    extra = {"active": ACTIVE, "resident": [OTHER]}
    directory = tmp_path_factory.mktemp("server")
    flags = ("--api-server-count=2",)
    with admin_server(directory, extra, *flags, model=model, max_model_len=4096) as server:
        yield server


def body(**more):
    settings = {"temperature": 0, "ignore_eos": True, "max_tokens": TOKENS}
    return {"model": "demo", "prompt": "w5 w6 w7", **settings, **more}


def stream(server, times):
    """The text of a long answer; appends when each of its tokens arrived."""
    text = []
    url, headers = f"{server.url}/v1/completions", {"Authorization": f"Bearer {SERVING_KEY}"}
    settings = body(stream=True, return_token_ids=True)
    with httpx.stream("POST", url, json=settings, headers=headers, timeout=300) as answer:
        assert answer.headers["x-atomic-moe-profile"] == ACTIVE
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                choice = json.loads(line.removeprefix("data: "))["choices"][0]
                times += [time.monotonic()] * len(choice["token_ids"])
                text.append(choice["text"])
    return "".join(text)


@pytest.mark.full
def test_a_long_answer_is_unchanged_by_changes(server):
    """At most three of its tokens arrive between the request for the change and the answer.

    The engine is slowed to the pace of a real model: this client could not keep up with it.
    """
    reference = stream(server, [])
    connections = [
        httpx.Client(headers={"Authorization": f"Bearer {SERVING_KEY}"}) for _ in range(8)
    ]
    # Connected before: the time that this client takes to set itself up is not the server's.
    operator = httpx.Client(headers={"Authorization": f"Bearer {ADMIN_KEY}"}, timeout=60)
    assert operator.get(f"{server.url}/atomic/v1/status").status_code == 200
    times: list[float] = []
    during = []
    with server.fault("step", "0.015"), ThreadPoolExecutor() as pool:
        answer = pool.submit(stream, server, times)
        for number in range(10):
            while len(times) < 100 * (number + 1):
                assert not answer.done()
                threading.Event().wait(0.005)
            wanted = (OTHER, ACTIVE)[number % 2]
            start = time.monotonic()
            changed = operator.put(f"{server.url}/atomic/v1/active", json={"profile": wanted})
            end = time.monotonic()
            assert changed.status_code == 200, changed.text
            for connection in connections:  # at either API server
                found = connection.post(
                    f"{server.url}/v1/completions", json=body(max_tokens=1), timeout=60
                )
                assert found.headers["x-atomic-moe-profile"] == wanted
            during.append((start, end))
        assert answer.result() == reference
    tokens = [sum(start <= at <= end for at in times) for start, end in during]
    print(
        "tokens during each change:",
        tokens,
        "milliseconds:",
        [round(1000 * (end - start), 1) for start, end in during],
    )
    assert len(times) == TOKENS
    assert max(tokens) <= 3
