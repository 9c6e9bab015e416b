"""Throughput, load time and memory of real servers: vLLM's own loader against every profile.

Starts one server after another with the same flags. vLLM's load generator (`vllm bench serve`)
drives each with the same random prompts, so its definitions of throughput, TTFT (time to first
token) and TPOT (time per output token) apply. Ratios are against the dense server of the same run.
One more server, the first, loads all profiles and activates one after another.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_atomic_moe.control.client import AdminClient
from vllm_atomic_moe.engine import LOAD_FORMAT
from vllm_atomic_moe.engine.options import dense_through_loader, profiles_to_measure
from vllm_atomic_moe.files.checkpoint import checkpoint_files, describe_checkpoint
from vllm_atomic_moe.files.plain_files import one_line
from vllm_atomic_moe.files.profiles import DENSE, ProfileStore
from vllm_atomic_moe.measure.incomplete import IncompleteError
from vllm_atomic_moe.measure.server_process import (
    HOST,
    Server,
    asking_directly,
    failure_in,
    free_port,
    running,
)
from vllm_atomic_moe.measure.server_report import (
    Changes,
    Latency,
    Phase,
    PhaseRun,
    ServerPlan,
    ServerReport,
    ServerRun,
    Spread,
    summarize,
)

VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")
# Flags that the benchmark sets itself; `serve_arguments` may hold any others.
OWN_FLAGS = ("--load-format", "--model-loader-extra-config", "--host", "--port", "--api-key")
# The GPU worker logs how long a load took. The CPU worker does not: its load starts with one line
# and ends before the first of several others.
LOADED_ON_GPU = re.compile(rb"Model loading took ([\d.]+) GiB memory and ([\d.]+) seconds")
LOAD_BEGINS = re.compile(rb"Starting to load model ")
LOAD_ENDS = re.compile(rb"Warming up model|Explicitly set \(|Auto set \(")
EXPERT_BYTES = re.compile(r"Expert weights: .*\((\d+) bytes\) dense, .*\((\d+) bytes\) resident")
KV_TOKENS = re.compile(r"KV cache size: ([\d,]+) tokens")
# The CPU worker's, fixed or measured; and the GPU worker's.
KV_GIB = re.compile(
    r"(?:Explicitly set|Auto set) \(([\d.]+)/|Available KV cache memory: ([\d.]+) GiB"
)

Progress = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, the next step)."""


def measure_servers(
    model: Path,
    profiles: Path,
    *,
    names: Sequence[str] = (),
    rounds: int = 1,
    plan: ServerPlan | None = None,
    serve_arguments: Sequence[str] = (),
    progress: Progress = lambda done, total, what: None,
) -> ServerReport:
    """Serve `model` dense and with each profile, one server after another, under the same load.

    Args:
        model: checkpoint directory.
        profiles: directory of profile files.
        names: profiles to measure; all, if it is empty.
        rounds: how many times all servers are started in turn.
        plan: the requests to every server.
        serve_arguments: more flags for every `vllm serve`.
        progress: called before every step and at the end.

    Raises:
        ValueError: a profile or flag is refused before any server starts.
        IncompleteError: a server or the load generator failed; with what was measured before.
    """
    plan = plan or ServerPlan()
    _check_arguments(serve_arguments)
    info = describe_checkpoint(model)
    chosen = profiles_to_measure(ProfileStore(profiles), info, names)
    pruned = [profile.name for profile in chosen if profile.name != DENSE]
    steps = rounds * len(chosen) * (1 + plan.repeats * len(plan.phases)) + (len(pruned) > 1)
    runs: list[ServerRun] = []
    # Kept if a server fails: the error names its log.
    directory = Path(tempfile.mkdtemp(prefix="atomic-moe-bench-"))
    own = dense_through_loader(info)
    bench = _Bench(model, profiles, plan, tuple(serve_arguments), directory, own)
    steps_done = itertools.count()

    def report(what: str) -> None:
        progress(next(steps_done), steps, what)

    changes = bench.change(pruned, report) if len(pruned) > 1 else None

    def measured() -> ServerReport:
        served = {run.profile for run in runs}
        return ServerReport(
            model=str(model),
            serve_arguments=tuple(serve_arguments),
            plan=plan,
            profiles=summarize([it for it in chosen if it.name in served], runs, plan),
            runs=tuple(runs),
            changes=changes,
        )

    for number in range(rounds):
        for profile in chosen:
            try:
                runs.append(bench.run(profile.name, number, report))
            except (ValueError, OSError) as error:
                raise IncompleteError(
                    f"{profile.name}: {one_line(error, 250)}", measured() if runs else None
                ) from error
    progress(steps, steps, "")
    shutil.rmtree(directory, ignore_errors=True)
    return measured()


def _check_arguments(serve_arguments: Sequence[str]) -> None:
    for argument in serve_arguments:
        flag = argument.partition("=")[0].replace("_", "-")
        if flag in OWN_FLAGS:
            raise ValueError(f"{flag} is set by the benchmark itself; leave it out")


@dataclass(frozen=True, slots=True)
class _Bench:
    """What the servers of one report have in common."""

    model: Path
    profiles: Path
    plan: ServerPlan
    serve_arguments: tuple[str, ...]
    directory: Path
    dense_through_loader: bool

    def run(self, profile: str, number: int, report: Callable[[str], None]) -> ServerRun:
        """Start a server for `profile`, ask everything, end it."""
        report(f"{profile}: starting the server")
        extra = {"active": profile} if profile != DENSE or self.dense_through_loader else {}
        with self._server(f"{number}-{profile}", extra) as server:
            phases = []
            for phase in self.plan.phases:
                for _ in range(self.plan.repeats):
                    report(f"{profile}: {phase.name}")
                    phases.append(self._load(server, phase))
            log, said = server.log, server.log.read_text(errors="replace")
        load_s, peak, rest = _loading(server)
        expert_bytes = EXPERT_BYTES.search(said)
        if profile != DENSE and not expert_bytes:
            raise ValueError(f"the server for {profile} did not log its expert weights: {log}")
        return ServerRun(
            profile=profile,
            round=number,
            load_s=load_s,
            start_s=server.start_s,
            dense_bytes=int(expert_bytes[1]) if expert_bytes else None,
            resident_bytes=int(expert_bytes[2]) if expert_bytes else None,
            peak_bytes=peak,
            rest_bytes=rest,
            kv_tokens=_kv_tokens(said),
            kv_gib=_kv_gib(said),
            phases=tuple(phases),
        )

    def change(self, profiles: Sequence[str], report: Callable[[str], None]) -> Changes:
        """Start a server with `profiles`, and activate one after another."""
        report(f"changing between {', '.join(profiles)}")
        key = secrets.token_hex(16)
        plugins = os.environ.get("VLLM_PLUGINS", "atomic_moe")
        environment = {
            "ATOMIC_MOE_ADMIN_KEY": key,
            "VLLM_PLUGINS": f"{plugins},atomic_moe_admin",
        }
        extra = {"active": profiles[0], "resident": list(profiles)}
        with (
            self._server("changes", extra, **environment) as server,
            AdminClient(server.url, key) as client,
        ):
            resident_bytes = client.status()["memory"]["resident_bytes"]
            times_ms = []
            for number in range(1, self.plan.changes + 1):
                start = time.perf_counter()
                client.activate(profiles[number % len(profiles)], "finish")
                times_ms.append(1000 * (time.perf_counter() - start))
        return Changes(tuple(profiles), resident_bytes, Spread.of(times_ms))

    def _server(
        self, name: str, extra: Mapping[str, Any], **environment: str
    ) -> AbstractContextManager[Server]:
        """A server with these options of our loader, or with vLLM's own loader if there are none;
        the checkpoint is in the page cache.
        """
        for path in checkpoint_files(self.model):
            with path.open("rb", buffering=0) as shard:
                while shard.read(2**26):
                    pass
        port = free_port()
        command = [*VLLM, "serve", str(self.model), f"--host={HOST}", f"--port={port}"]
        # A phase repeats its prompts.
        command += ["--no-enable-prefix-caching", *self.serve_arguments]
        if extra:
            options = json.dumps({"profiles": str(self.profiles), **extra})
            command += [f"--load-format={LOAD_FORMAT}", f"--model-loader-extra-config={options}"]
        return running(
            command,
            port,
            self.directory / f"{name}.log",
            _environment() | environment,
            timeout_s=self.plan.start_timeout_s,
        )

    def _load(self, server: Server, phase: Phase) -> PhaseRun:
        """Drive the server through one phase."""
        result = self.directory / "result.json"
        result.unlink(missing_ok=True)
        options: dict[str, Any] = {
            "backend": "openai",
            "base-url": server.url,
            "tokenizer": self.model,
            "dataset-name": "random",
            "random-input-len": phase.input_tokens,
            "random-output-len": phase.output_tokens,
            "num-prompts": phase.requests,
            "max-concurrency": phase.concurrency,
            "num-warmups": self.plan.warmups,
            "seed": self.plan.seed,
            "temperature": 0,
            "result-dir": self.directory,
            "result-filename": result.name,
        }
        flags = [f"--{name}={value}" for name, value in options.items()]
        flags += [flag for flag in self.serve_arguments if flag == "--trust-remote-code"]
        done = subprocess.run(
            [*VLLM, "bench", "serve", *flags, "--ignore-eos", "--save-result", "--disable-tqdm"],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env=_environment(),
        )
        if done.returncode or not result.is_file():
            raise ValueError(f"vllm bench serve failed: {failure_in(done.stdout + done.stderr)}")
        found = json.loads(result.read_text())
        if found["failed"] or found["completed"] != phase.requests:
            raise ValueError(
                f"{phase.name}: {found['completed']} of {phase.requests} requests were answered; "
                f"is the context long enough? (log: {server.log})"
            )
        return _phase_run(phase, found)


def _environment() -> dict[str, str]:
    # The figures are in vLLM's INFO lines, whatever this process itself logs.
    return {
        **asking_directly(os.environ),
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_CONFIGURE_LOGGING": "1",
    }


def _loading(server: Server) -> tuple[float, int, int]:
    """Seconds of the whole load, peak host memory during it, and the model's memory after it."""
    said, samples = server.log.read_bytes(), server.samples
    sizes = [sample.log_bytes for sample in samples]
    if on_gpu := LOADED_ON_GPU.search(said):
        peak = max(sample.anonymous_bytes for sample in samples[: bisect(sizes, on_gpu.start())])
        return float(on_gpu[2]), peak, int(float(on_gpu[1]) * 2**30)
    begin = LOAD_BEGINS.search(said)
    end = LOAD_ENDS.search(said, begin.end()) if begin else None
    if not begin or not end:
        raise ValueError(f"the server did not log when it loaded the model: {server.log}")
    first, last = bisect(sizes, begin.start()), bisect(sizes, end.start())
    memory = [sample.anonymous_bytes for sample in samples[first : max(last, first + 1)]]
    return samples[last].seconds - samples[first].seconds, max(memory), memory[-1]


def _kv_tokens(said: str) -> int | None:
    found = KV_TOKENS.search(said)
    return int(found[1].replace(",", "")) if found else None


def _kv_gib(said: str) -> float | None:
    found = KV_GIB.search(said)
    return float(found[1] or found[2]) if found else None


def _phase_run(phase: Phase, found: Mapping[str, Any]) -> PhaseRun:
    def latency(name: str) -> Latency:
        keys = (f"{kind}_{name}_ms" for kind in ("mean", "median", "p99"))
        return Latency(*(float(found[key]) for key in keys))

    return PhaseRun(
        phase=phase.name,
        requests_per_s=float(found["request_throughput"]),
        output_tokens_per_s=float(found["output_throughput"]),
        total_tokens_per_s=float(found["total_token_throughput"]),
        ttft_ms=latency("ttft"),
        tpot_ms=latency("tpot") if phase.output_tokens > 1 else None,
    )
