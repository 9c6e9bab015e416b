"""Time and memory of loading a checkpoint: vLLM's loader dense, ours pruned, ours exported.

    .venv/bin/python -m tests.load_time DIRECTORY [--rounds 3] [--cold]

DIRECTORY is a checkpoint with profiles, as `python -m tests.synthetic` writes it; each profile is
also exported to DIRECTORY-NAME (once). Every round loads every way in a fresh process, one after
another. The shards are in the page cache before a process starts, or with --cold they are not; the
bytes that it then read from the disk tell whether that held.

Printed are medians and spreads of the seconds of `load_weights`, by the clock and of processor
time, and of the whole load (which also builds the model, and repacks weights for vLLM's CPU
kernels), with their ratios to the dense loader's, for exported checkpoints to the kept fraction of
it; and the worker's anonymous memory (RssAnon) above what it was before, at the peak of loading and
after it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_atomic_moe.convert.exporting.export import export
from vllm_atomic_moe.files.export_format import weights_directory
from vllm_atomic_moe.files.profiles import DENSE, ProfileStore

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Way:
    """One way to load.

    Attributes:
        name: for the table.
        directory: the checkpoint.
        profile: `dense` stands for vLLM's own loader.
        kept: fraction of atoms kept.
        exported: whether the checkpoint holds those atoms only.
    """

    name: str
    directory: Path
    profile: str
    kept: float
    exported: bool


def ways_to_load(directory: Path) -> list[Way]:
    """Dense, every profile, and every profile exported, which is done here if it is not there."""
    ways = [Way(DENSE, directory, DENSE, 1.0, exported=False)]
    store = ProfileStore(directory / "atomic_profiles")
    profiles = [store.load(name) for name in store.names()]
    ways += [Way(one.name, directory, one.name, one.kept, exported=False) for one in profiles]
    for one in profiles:
        target = directory.with_name(f"{directory.name}-{one.name}")
        if not target.exists():
            export(str(directory), store.paths[one.name], target)
        ways.append(Way(f"{one.name} exported", target, one.name, one.kept, exported=True))
    return ways


def measure(directory: Path, profile: str) -> dict[str, float]:
    """Load in a fresh process; anonymous memory in bytes and seconds."""
    command = [sys.executable, "-m", "tests.load_time", str(directory), "--load", profile]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1]
    )
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-4000:])
    return json.loads(done.stdout.splitlines()[-1])


def set_page_cache(directory: Path, *, cold: bool) -> None:
    """Put the checkpoint's shards into the page cache, or out of it."""
    for path in weights_directory(directory).glob("*.safetensors"):
        with path.open("rb", buffering=0) as shard:
            if cold:
                os.fsync(shard.fileno())
                os.posix_fadvise(shard.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while shard.read(64 * MIB):
                    pass


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    return 1024 * _number_in("/proc/self/status", "RssAnon:")


def read_bytes() -> int:
    """What this process has caused to be read from disks."""
    return _number_in("/proc/self/io", "read_bytes:")


def _number_in(path: str, key: str) -> int:
    for line in Path(path).read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    raise RuntimeError(f"no {key} in {path}")


def load_here(directory: Path, profile: str) -> dict[str, float]:
    """Start an engine in this process, up to the loaded model; a thread samples the memory."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"
    from vllm import LLM
    from vllm.model_executor import model_loader
    from vllm.v1.worker import cpu_model_runner

    class LoadedError(Exception):
        """Ends the start of the engine: the rest of it is not measured."""

    found: dict[str, float] = {}
    load = cpu_model_runner.get_model

    def load_and_stop(**options: Any) -> None:
        observe(lambda: load(**options), found)
        raise LoadedError

    cpu_model_runner.get_model = load_and_stop
    make_loader = model_loader.get_model_loader
    model_loader.get_model_loader = lambda config: timed(make_loader(config), found)
    options: dict[str, Any] = {}
    if profile != DENSE:
        options["load_format"] = "atomic-pruned"
        options["model_loader_extra_config"] = {"active": profile}
    with suppress(LoadedError):
        LLM(str(directory), enforce_eager=True, skip_tokenizer_init=True, **options)
    return found


def timed(loader: Any, found: dict[str, float]) -> Any:
    """`loader`, which writes the seconds of its `load_weights` to `found`."""
    load_weights = loader.load_weights

    def load(*arguments: Any) -> None:
        start, busy, read = time.perf_counter(), time.process_time(), read_bytes()
        load_weights(*arguments)
        found["weights"] = time.perf_counter() - start
        found["busy"] = time.process_time() - busy
        found["read"] = read_bytes() - read

    loader.load_weights = load
    return loader


def observe(load: Callable[[], torch.nn.Module], found: dict[str, float]) -> None:
    """Call `load` and write memory and seconds to `found`."""
    samples = [anonymous_bytes()]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            samples.append(anonymous_bytes())

    thread = threading.Thread(target=sample)
    thread.start()
    start = time.perf_counter()
    model = load()
    found["seconds"] = time.perf_counter() - start
    done.set()
    thread.join()
    found["before"], found["peak"], found["rest"] = samples[0], max(samples), anonymous_bytes()
    found["parameters"] = sum(parameter.nbytes for parameter in model.parameters())


def print_table(ways: list[Way], found: dict[str, list[dict[str, float]]]) -> None:
    """One line per way: seconds with their ratio to dense, then MiB."""
    times = {"weights": "load_weights", "busy": "processor time of it", "seconds": "whole load"}
    print(
        f"{'':18} {'kept':>6}", *(f"{title:>24} {'ratio':>6}" for title in times.values()), end=""
    )
    print(*(f"{title:>8}" for title in ("", "read", "params", "peak", "rest")))
    for way in ways:
        runs = found[way.name]
        cells = [f"{way.name:18} {way.kept:6.3f}"]
        for key in times:
            dense = statistics.median(run[key] for run in found[DENSE])
            seconds = sorted(run[key] for run in runs)
            median = statistics.median(seconds)
            cells.append(f"{median:8.2f} ({seconds[0]:5.2f} to {seconds[-1]:5.2f})")
            cells.append(f"{median / dense / (way.kept if way.exported else 1):6.2f}")
        cells += [f"{max(run['read'] for run in runs) / MIB:8.0f}"]
        cells += [f"{runs[0]['parameters'] / MIB:8.0f}"]
        for key in ("peak", "rest"):
            cells += [f"{max(run[key] - run['before'] for run in runs) / MIB:8.0f}"]
        print(*cells)


def main() -> None:
    """Measure, or, with --load, be the process that is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="shards out of the page cache")
    parser.add_argument("--ways", nargs="*", help="these only; dense is always measured")
    parser.add_argument("--load", metavar="PROFILE")
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(load_here(arguments.directory, arguments.load)))
        return
    ways = [
        way
        for way in ways_to_load(arguments.directory)
        if not arguments.ways or way.name in (DENSE, *arguments.ways)
    ]
    found: dict[str, list[dict[str, float]]] = {way.name: [] for way in ways}
    for _ in range(arguments.rounds):
        for way in ways:
            set_page_cache(way.directory, cold=arguments.cold)
            found[way.name].append(measure(way.directory, way.profile))
            print(way.name, json.dumps(found[way.name][-1]), file=sys.stderr)
    print_table(ways, found)


if __name__ == "__main__":
    main()
