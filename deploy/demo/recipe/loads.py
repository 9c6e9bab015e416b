"""Seconds in which the loader reads, checks and packs experts, in bf16 and quantized.

    .venv/bin/python deploy/demo/recipe/loads.py DIRECTORY

makes the model of `atomic-moe bench --synthetic` (1.1 GiB of experts) in DIRECTORY, quantizes it,
and loads each format in a process of its own, pruned by half, on one thread. Prints processor time,
and the same per byte over that of bf16.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from quantize import FORMATS, quantize

from vllm_atomic_moe.measure.synthetic import make_checkpoint

ORIGINAL, PROFILE = "bf16", "pruned-50"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}


def main() -> None:
    """Make the models that are not there; load each."""
    directory = Path(sys.argv[1])
    if not (directory / ORIGINAL / "model.safetensors.index.json").exists():
        make_checkpoint(directory / ORIGINAL)
    took = {}
    for name in (ORIGINAL, *FORMATS):
        model = directory / name
        if not (model / "config.json").exists():
            quantize(directory / ORIGINAL, model, name)
        seconds = measured(model)
        size = sum(shard.stat().st_size for shard in model.glob("*.safetensors"))
        took[name] = seconds / size
        ratio = took[name] / took[ORIGINAL]
        print(f"{name}: {seconds:.2f} s, {ratio:.1f} of bf16 per byte", flush=True)


def measured(model: Path) -> float:
    """Processor time of one load, in a process of its own."""
    command = [sys.executable, __file__, "--one", model]
    environment = os.environ | ONE_THREAD | IN_PROCESS
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True)
    return float(done.stdout.splitlines()[-1])


def load(model: str) -> None:
    """Start an engine, and print what its `load_weights` took."""
    from vllm_atomic_moe.engine.loader import AtomicPrunedModelLoader
    from vllm_atomic_moe.measure.evaluation import engine

    load_weights = AtomicPrunedModelLoader.load_weights
    took = []

    def timed(self, *arguments) -> None:  # type: ignore[no-untyped-def]
        begun = time.process_time()
        load_weights(self, *arguments)
        took.append(time.process_time() - begun)

    AtomicPrunedModelLoader.load_weights = timed  # type: ignore[method-assign]
    extra = {"active": PROFILE}
    settings = {"load_format": "atomic-pruned", "model_loader_extra_config": extra}
    with engine(model, enforce_eager=True, max_model_len=256, max_num_seqs=2, **settings):
        pass
    [seconds] = took
    print(f"\n{seconds}")


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        load(sys.argv[2])
    else:
        main()
