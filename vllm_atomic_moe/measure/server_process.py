"""A vLLM server as a child process: started, watched from outside, and always ended.

The server and everything it starts form a process group of their own. Leaving `running`, also by an
exception or Ctrl-C, ends that group and nothing else.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

HOST = "127.0.0.1"
# Ignores proxies that the environment names.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
POLL_S = 0.1
SAMPLE_S = 0.025
END_TIMEOUT_S = 30.0
LOG_PREFIX = re.compile(r"^\(\w+ pid=\d+\) ")
# The API server's message when its engine did not start; the cause is further up.
CONSEQUENCES = ("Engine core initialization failed", "WorkerProc initialization failed")


class Sample(NamedTuple):
    """A server at one moment during its start.

    Attributes:
        seconds: on the monotonic clock.
        log_bytes: size of its log, which tells what it had printed.
        anonymous_bytes: anonymous memory (RssAnon) of its largest process, which holds the weights.
    """

    seconds: float
    log_bytes: int
    anonymous_bytes: int


@dataclass(slots=True)
class Server:
    """A running server.

    Attributes:
        url: http://host:port.
        log: file with what it printed.
        process: the process that was started; it leads its group.
        start_s: seconds from the start of the process to a healthy server.
        samples: one every 25 ms until it was healthy.
    """

    url: str
    log: Path
    process: subprocess.Popen[bytes]
    start_s: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def _watch(self) -> None:
        while True:
            # The log last: it may be newer than the memory, never older.
            memory = max(map(_anonymous_bytes, processes_of_group(self.process.pid)), default=0)
            self.samples.append(Sample(time.monotonic(), self.log.stat().st_size, memory))
            if self._stop.wait(SAMPLE_S):
                return


def free_port() -> int:
    """A free TCP port."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def asking_directly(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for child processes that ask servers on this machine without a proxy."""
    told = [environment.get(name, "") for name in ("NO_PROXY", "no_proxy")]
    without = ",".join(dict.fromkeys(filter(None, [*told, HOST, "localhost"])))
    return {**environment, "NO_PROXY": without, "no_proxy": without}


@contextmanager
def running(
    command: Sequence[str],
    port: int,
    log: Path,
    environment: Mapping[str, str],
    *,
    timeout_s: float,
    cwd: Path | None = None,
) -> Iterator[Server]:
    """Start `command`, wait until it is healthy, end its process group on the way out.

    Samples are taken until it is healthy.

    Raises:
        ValueError: it ended or was not healthy in time; one line with the reason from its log.
    """
    start = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(command),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=dict(environment),
            cwd=cwd,
            start_new_session=True,
        )
    server = Server(f"http://{HOST}:{port}", log, process)
    watcher = threading.Thread(target=server._watch, daemon=True)
    try:
        watcher.start()
        _wait_until_healthy(server, start + timeout_s)
        server.start_s = time.monotonic() - start
        server._stop.set()
        yield server
    finally:
        server._stop.set()
        end_group(process)


def _wait_until_healthy(server: Server, deadline: float) -> None:
    while time.monotonic() < deadline:
        code = server.process.poll()
        if code is not None:
            raise ValueError(
                f"the server ended with code {code} before it was healthy: "
                f"{failure_in(server.log.read_text(errors='replace'))} (log: {server.log})"
            )
        with suppress(OSError), DIRECT.open(f"{server.url}/health", timeout=5):
            return
        time.sleep(POLL_S)
    raise ValueError(
        f"the server was not healthy in time: "
        f"{failure_in(server.log.read_text(errors='replace'))} (log: {server.log})"
    )


def failure_in(log: str) -> str:
    """The line of a server's log that best explains why it failed."""
    lines = [LOG_PREFIX.sub("", line).strip() for line in log.splitlines() if line.strip()]
    for pattern in (r"atomic-pruned: .*", r"\b\w+(?:Error|Exception): .*", r"\berror: .*"):
        for line in reversed(lines):
            found = re.search(pattern, line)
            if found and not any(words in line for words in CONSEQUENCES):
                return found[0]
    return lines[-1] if lines else "it printed nothing"


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that was started in a session of its own, and its whole group."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        deadline = time.monotonic() + END_TIMEOUT_S
        while time.monotonic() < deadline:
            # Reaps the leader; unreaped orphans no longer belong to the group.
            if process.poll() is not None and not processes_of_group(process.pid):
                return
            time.sleep(POLL_S)


def processes_of_group(group: int) -> list[int]:
    """Ids of the living processes of a process group; empty without /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):
            # After the name, which may hold anything: state, parent, group.
            state, _, member_of = (path / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(member_of) == group and state not in "ZX":
                found.append(int(path.name))
    return found


def _anonymous_bytes(process: int) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0
