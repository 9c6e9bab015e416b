"""Servers as child processes, which end after any failure."""

from __future__ import annotations

import os
import sys
import textwrap
import time

import pytest

from vllm_atomic_moe.measure import server_process
from vllm_atomic_moe.measure.server_benchmark import _loading, measure_servers
from vllm_atomic_moe.measure.server_process import (
    Sample,
    Server,
    failure_in,
    free_port,
    processes_of_group,
    running,
)

# Healthy, with a child that has to be killed.
STUBBORN = """
import http.server, subprocess, sys
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", deaf])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def start(code, tmp_path, timeout_s=30.0):
    port = free_port()
    command = [sys.executable, "-c", textwrap.dedent(code), str(port)]
    return running(command, port, tmp_path / "log", os.environ, timeout_s=timeout_s)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_whole_group_ends_when_the_block_is_left(error, tmp_path, monkeypatch):
    monkeypatch.setattr(server_process, "END_TIMEOUT_S", 1.0)
    groups = []

    def use_it():
        with start(STUBBORN, tmp_path) as server:
            groups.append(server.process.pid)
            assert len(processes_of_group(server.process.pid)) == 2
            assert max(sample.anonymous_bytes for sample in server.samples) > 2**20
            assert server.start_s > 0
            raise error

    with pytest.raises(error):
        use_it()
    assert processes_of_group(groups[0]) == []


def test_a_server_that_ends_reports_why(tmp_path):
    with (
        pytest.raises(ValueError, match=r"ended with code 1 .*: ValueError: no such thing \(log: "),
        start("raise ValueError('no such thing')", tmp_path),
    ):
        pass


def test_a_server_that_never_answers_is_stopped(tmp_path):
    code = "import time; print('thinking', flush=True); time.sleep(600)"
    begun = time.monotonic()
    with pytest.raises(ValueError, match="not healthy in time: thinking"):
        start(code, tmp_path, timeout_s=2.0).__enter__()
    assert time.monotonic() - begun < 60


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("", "it printed nothing"),
        ("INFO one\nINFO two\n", "INFO two"),
        (
            "(Worker pid=1) ERROR [loader.py:1] atomic-pruned: profile 'x' is not there\n"
            "(Worker pid=1) ValueError: profile 'x' is not there\n"
            "RuntimeError: Engine core initialization failed. See root cause above.\n",
            "atomic-pruned: profile 'x' is not there",
        ),
        (
            "(EngineCore pid=7) ValueError: no memory\n"
            "(APIServer pid=6) RuntimeError: Engine core initialization failed.\n",
            "ValueError: no memory",
        ),
        (
            "usage: vllm\nvllm: error: unrecognized arguments: --x\n",
            "error: unrecognized arguments: --x",
        ),
    ],
)
def test_the_line_that_says_why(log, line):
    assert failure_in(log) == line


@pytest.mark.parametrize("argument", ["--port", "--port=1", "--load_format=dummy"])
def test_flags_of_the_benchmark_are_refused(argument, tmp_path):
    with pytest.raises(ValueError, match="is set by the benchmark itself"):
        measure_servers(tmp_path, tmp_path, serve_arguments=[argument])


LOG = (
    "INFO starting\n",
    "INFO Starting to load model /m...\n",
    "INFO Loading weights took 0.10 seconds\n",
    "INFO Explicitly set (1.0/8.0) GiB for KV cache\n",
)


def test_load_time_is_between_two_lines_of_the_log(tmp_path):
    log = tmp_path / "log"
    log.write_text("".join(LOG))
    ends = [len("".join(LOG[:lines])) for lines in range(len(LOG) + 1)]
    moments = [(0, 0.0, 10), (1, 1.0, 20), (2, 2.0, 30), (3, 4.0, 90), (3, 5.0, 60), (4, 5.5, 99)]
    samples = [Sample(seconds, ends[lines], memory) for lines, seconds, memory in moments]
    assert _loading(Server("", log, None, samples=samples)) == (3.5, 90, 60)
    # A load between two samples.
    assert _loading(Server("", log, None, samples=[samples[1], samples[-1]])) == (0, 99, 99)


def test_a_gpu_worker_reports_its_load_time(tmp_path):
    log = tmp_path / "log"
    log.write_text("INFO one\nINFO Model loading took 2.5 GiB memory and 7.500000 seconds\n")
    samples = [Sample(0.0, 0, 10), Sample(1.0, 9, 40), Sample(9.0, log.stat().st_size, 99)]
    assert _loading(Server("", log, None, samples=samples)) == (7.5, 40, int(2.5 * 2**30))


def test_a_log_without_a_load_is_refused(tmp_path):
    log = tmp_path / "log"
    log.write_text("".join(LOG[:3]))
    with pytest.raises(ValueError, match="did not log when it loaded the model: "):
        _loading(Server("", log, None))
