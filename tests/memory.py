"""Memory and time of loading a large checkpoint, dense and pruned, measured from outside vLLM.

    .venv/bin/python -m tests.memory DIRECTORY [--ratio 0.5]

makes a random Qwen3-MoE checkpoint with 1.1 GiB of bf16 expert weights in DIRECTORY (once), serves
it from one fresh process per way, and prints the worker's anonymous memory (RssAnon) before, at the
peak of and after loading, and the seconds that took, of which `weights` are the loader's
`load_weights` (the rest is building the model, imports, garbage collection). The last way is the
exported checkpoint of the same profile, made in DIRECTORY-exported (once).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vllm_atomic_moe.checkpoint import describe_checkpoint
from vllm_atomic_moe.exporting.export import export
from vllm_atomic_moe.profiles import PruningProfile

LAYERS, EXPERTS, HIDDEN, INTERMEDIATE = 6, 32, 1024, 1024
EXPERT_BYTES = LAYERS * EXPERTS * 3 * HIDDEN * INTERMEDIATE * 2
SHARD_BYTES = EXPERT_BYTES // LAYERS
CONFIG = {
    "vocab_size": 512,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": INTERMEDIATE,
    "intermediate_size": INTERMEDIATE,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def make_large_checkpoint(directory: Path, ratio: float) -> None:
    """A checkpoint of one shard per layer, and a profile `random` with ragged widths."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**CONFIG, dtype="bfloat16")
    config.architectures = ["Qwen3MoeForCausalLM"]
    with torch.device("meta"):
        state = transformers.AutoModelForCausalLM.from_config(config).state_dict()
    config.save_pretrained(directory)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, meta in state.items():
        shard = f"model-{name.split('.')[2] if 'layers' in name else 'rest'}.safetensors"
        if name == "lm_head.weight":
            continue
        if ".experts." in name:
            prefix, _, projection = name.rpartition(".")
            for expert in range(EXPERTS):
                rows = 0.02 * torch.randn(meta.shape[1:], dtype=torch.bfloat16)
                parts = {"down_proj": rows}
                if projection == "gate_up_proj":
                    parts = dict(zip(("gate_proj", "up_proj"), rows.chunk(2), strict=True))
                for part, tensor in parts.items():
                    key = f"{prefix}.{expert}.{part}.weight"
                    shards.setdefault(shard, {})[key] = tensor.contiguous()
        else:
            shards.setdefault(shard, {})[name] = 0.02 * torch.randn(meta.shape).bfloat16()
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    for shard, tensors in shards.items():
        save_file(tensors, directory / shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    info = describe_checkpoint(directory)
    shape = (info.num_experts, info.intermediate_size)
    share = (torch.rand(shape[0], 1) * 2 * (1 - ratio)).clamp(max=1)
    keep = {layer: torch.rand(shape) < share for layer in info.layers}
    PruningProfile("random", keep).write(directory / "atomic_profiles" / "random.safetensors")


def measure(directory: Path, load_format: str) -> dict[str, float]:
    """Load in a fresh process; anonymous memory in bytes and seconds."""
    command = [sys.executable, "-m", "tests.memory", str(directory), "--load", load_format]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1]
    )
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-4000:])
    return json.loads(done.stdout.splitlines()[-1])


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


def load_here(directory: Path, load_format: str) -> dict[str, float]:
    """Start an engine in this process; a thread samples the memory while its worker loads."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"
    from vllm import LLM
    from vllm.model_executor import model_loader
    from vllm.v1.worker import cpu_model_runner

    found: dict[str, float] = {}
    load = cpu_model_runner.get_model
    cpu_model_runner.get_model = lambda **options: observe(lambda: load(**options), found)
    make_loader = model_loader.get_model_loader
    model_loader.get_model_loader = lambda config: timed(make_loader(config), found)
    LLM(
        str(directory),
        load_format=load_format,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=128,
    )
    return found


def timed(loader: Any, found: dict[str, float]) -> Any:
    """`loader`, which writes the seconds of its `load_weights` to `found`."""
    load_weights = loader.load_weights

    def load(*arguments: Any) -> None:
        start = time.perf_counter()
        load_weights(*arguments)
        found["weights"] = time.perf_counter() - start

    loader.load_weights = load
    return loader


def observe(load: Callable[[], torch.nn.Module], found: dict[str, float]) -> torch.nn.Module:
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
    return model


def main() -> None:
    """Measure, or, with --load, be the process that is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--load")
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(load_here(arguments.directory, arguments.load)))
        return
    if not (arguments.directory / "model.safetensors.index.json").is_file():
        make_large_checkpoint(arguments.directory, arguments.ratio)
    print(f"expert weights: {EXPERT_BYTES / 2**20:.0f} MiB, shard {SHARD_BYTES / 2**20:.0f} MiB")
    exported = arguments.directory.with_name(f"{arguments.directory.name}-exported")
    if not exported.exists():
        profile = arguments.directory / "atomic_profiles" / "random.safetensors"
        export(str(arguments.directory), profile, exported)
    for directory, way in ((arguments.directory, "safetensors"), (exported, "atomic-pruned")):
        measure(directory, way)  # fills the page cache
    for way, directory in (
        ("safetensors", arguments.directory),
        ("atomic-pruned", arguments.directory),
        ("atomic-pruned", exported),
    ):
        found = measure(directory, way)
        print(
            f"{directory.name:20} {way:14}",
            *(
                f"{key} {value / 2**20:.0f} MiB" if value > 1000 else f"{key} {value:.2f} s"
                for key, value in found.items()
            ),
        )


if __name__ == "__main__":
    main()
