"""Several engines: all of them agree, or the answer names those that do not.

vLLM's CPU ranks lack two collectives for data parallel MoE; a plug-in of these tests adds them. The
tests share one server with two engines and two API servers, in this order; the last one ends it.
"""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.conftest import DEMO, ENVIRONMENT, ROOT, admin_server, free_port, serve_command
from tests.e2e.faults import GATHERS
from tests.quantized import quantize_checkpoint
from vllm_atomic_moe.measure.server_process import processes_of_group

ACTIVE, OTHER, EXTRA = "heapr-20", "heapr-40", "heapr-60"
PROFILES = {"active": ACTIVE, "resident": [OTHER, "shape-20"]}
NAMES = [ACTIVE, OTHER, "shape-20"]
PROMPTS = ["import os\nimport sys\n\n\ndef main(", "The moon was", '{\n  "name":']
RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", GATHERS: "1"}
SMALL_GROUPS = ("int4", "nvfp4", "awq")
FLAGS = ("--data-parallel-size=2", "--api-server-count=2")
pytestmark = pytest.mark.full


def same_scores(found, wanted):
    return found == pytest.approx(wanted, abs=1e-4)


def same_in_float16(found, wanted):
    """Rounding sends a token to other experts now and then, so the median counts."""
    return statistics.median(abs(a - b) for a, b in zip(found, wanted, strict=True)) < 5e-3


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    """(profile, prompt) -> log-probabilities, from one engine."""
    with admin_server(tmp_path_factory.mktemp("one"), PROFILES) as server:
        assert server.load(EXTRA).status_code == 200
        return scores_of(server, [*NAMES, EXTRA])


def scores_of(server, names, same=same_scores):
    """All profiles and prompts at once, several times, so that every engine gets some of each."""
    jobs = [(name, prompt) for name in names for prompt in PROMPTS] * 3
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda job: server.scores(job[1], job[0]), jobs))
    first = dict(zip(jobs, found, strict=False))
    for job, values in zip(jobs, found, strict=True):
        assert same(values, first[job]), job
    return first


@pytest.mark.parametrize("encoding", ["fp8", "int4", "mxfp4", "nvfp4", "awq"])
def test_engines_share_quantized_experts(tmp_path, encoding):
    """Every engine holds the codes and scales of its share, and both answer like one."""
    model = tmp_path / "model"
    # AWQ is for float16 in vLLM.
    same, dtype = same_scores, ()
    if encoding == "awq":
        same, dtype = same_in_float16, ("--dtype=float16",)
    if encoding in ("nvfp4", "awq"):
        quantize_checkpoint(DEMO, model, encoding)
        shutil.copytree(DEMO / "atomic_profiles", model / "atomic_profiles")
    else:
        recipe = ROOT / "deploy/demo/recipe/quantize.py"
        subprocess.run([sys.executable, recipe, DEMO, model, encoding], check=True)
    (tmp_path / "one").mkdir()
    with admin_server(tmp_path / "one", PROFILES, *dtype, model=model) as server:
        alone = server.status()["memory"]["resident_bytes"]
        wanted = scores_of(server, NAMES, same)
    for prompt in PROMPTS:
        assert not same(wanted[ACTIVE, prompt], wanted[OTHER, prompt]), "the test is blind"
    (tmp_path / "two").mkdir()
    with admin_server(tmp_path / "two", PROFILES, *FLAGS, *dtype, model=model, **RANKS) as server:
        check(server, wanted, NAMES, same)
        memory = server.status()["memory"]
    assert len(memory["rank_resident_bytes"]) == 2
    # Scales of a group whose atoms are split are held twice: 2.0 % of the demo in INT4.
    assert memory["resident_bytes"] < (1.03 if encoding in SMALL_GROUPS else 1.02) * alone
    shutil.rmtree(model)


@pytest.fixture(scope="module")
def server(tmp_path_factory, scores):
    directory = tmp_path_factory.mktemp("server")
    with admin_server(directory, PROFILES, *FLAGS, **RANKS) as server:
        yield server


def check(server, scores, names, same=same_scores):
    found = scores_of(server, names, same)
    for job, values in found.items():
        assert same(values, scores[job]), job


def test_several_engines_answer_like_one(server, scores):
    status = server.status()
    assert (status["engines"], status["agreed"]) == (2, True)
    check(server, scores, NAMES)
    status = server.status()
    assert {it["admitted"] for it in status["profiles"].values()} == {9}
    memory = status["memory"]
    assert len(memory["rank_resident_bytes"]) == 2
    # Without expert parallelism vLLM splits every expert over the engines.
    one, two = memory["rank_resident_bytes"]
    assert abs(one - two) < 0.02 * memory["resident_bytes"]
    assert memory["resident_bytes"] < 1.02 * memory["dense_bytes"]


def test_changes_reach_all_engines_and_api_servers(server, scores):
    server.changed(OTHER)
    for _ in range(8):  # connections to either API server, requests to either engine
        found = server.scores(PROMPTS[0])
        assert found == pytest.approx(scores[OTHER, PROMPTS[0]], abs=1e-4)
    assert server.load(EXTRA).status_code == 200
    check(server, scores, [*NAMES, EXTRA])
    assert server.unload(EXTRA).status_code == 200
    assert list(server.status()["profiles"]) == NAMES
    server.changed(ACTIVE)


def test_operators_at_once_leave_one_outcome_everywhere(server, scores):
    names = [OTHER, "shape-20", ACTIVE] * 4
    with ThreadPoolExecutor(len(names)) as pool:
        answers = list(pool.map(server.changed, names))
    status = server.status()
    assert status["agreed"]
    last = max(answers, key=lambda answer: answer["generation"])
    assert (status["generation"], status["active"]) == (last["generation"], last["active"])
    for _ in range(8):
        found = server.scores(PROMPTS[0])
        assert found == pytest.approx(scores[status["active"], PROMPTS[0]], abs=1e-4)
    server.changed(ACTIVE)


def test_one_engine_that_cannot_load_takes_all_back(server, scores):
    before = server.status()
    with server.fault("load", "fail@1"):
        answer = server.load(EXTRA)
    assert answer.status_code in (409, 503)
    assert "injected: fail" in answer.json()["error"]["message"]
    after = server.status()
    assert after["agreed"]
    assert after["profiles"] == before["profiles"]
    assert server.load(EXTRA).status_code == 200
    check(server, scores, [EXTRA])
    assert server.unload(EXTRA).status_code == 200


def engine(server, number):
    """The process of one engine core."""
    for process in processes_of_group(server.server.process.pid):
        title = Path(f"/proc/{process}/cmdline").read_text().rstrip("\0")
        if title == f"VLLM::EngineCore_DP{number}":
            return process
    raise AssertionError(f"no process of engine {number}")


@pytest.mark.parametrize("number", [0, 1])
def test_an_engine_that_is_stopped_is_named_and_agrees_afterwards(server, scores, number):
    process = engine(server, number)
    os.kill(process, signal.SIGSTOP)
    try:
        answer = server.activate(OTHER)
        assert answer.status_code == 503, answer.text
        error = answer.json()["error"]
        assert error["type"] == "EngineUnavailableError"
        assert f"engine {number} does not answer within 30 s" in error["message"]
    finally:
        os.kill(process, signal.SIGCONT)
    deadline = time.monotonic() + 30
    while not (status := server.status())["agreed"]:
        assert time.monotonic() < deadline
    assert status["active"] == ACTIVE
    check(server, scores, NAMES)
    assert server.changed(OTHER)["previous"] == ACTIVE
    server.changed(ACTIVE)


def test_an_engine_that_dies_ends_the_server(server):
    """As in stock vLLM."""
    os.kill(engine(server, 1), signal.SIGKILL)
    deadline = time.monotonic() + 90
    while server.server.process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_experts_on_several_engines(tmp_path, scores):
    """Eager: on CPUs vLLM traces MoE layers into its graph, and with them how many tokens each rank
    had in the first batch. On GPUs they are an operator of their own.
    """
    flags = ("--data-parallel-size=2", "--enable-expert-parallel")
    with admin_server(tmp_path, PROFILES, *flags, **RANKS) as server:
        check(server, scores, NAMES)
        assert server.load(EXTRA).status_code == 200
        check(server, scores, [*NAMES, EXTRA])


def test_stock_vllm_on_cpus_is_refused():
    port = free_port()
    done = subprocess.run(
        serve_command(DEMO, PROFILES, f"--port={port}", "--data-parallel-size=2"),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT,
        timeout=300,
    )
    assert done.returncode != 0
    printed = done.stdout + done.stderr
    line = "not served by this version: data parallelism on CPU (vLLM's own: its CPU ranks cannot"
    assert line in printed, printed[-4000:]
