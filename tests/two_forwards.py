"""HEAPr as the paper computes it, and what that costs beside `atomic-moe calibrate`.

    .venv/bin/python -m tests.two_forwards MODEL [--windows 8] [--seq-len 512] [--dtype bfloat16]

The paper's method: one forward and backward that adds up G = Σ g gᵀ, an H×H matrix per expert, and
a second forward that adds up h². `tests/unit/test_scoring_heapr.py` shows that its scores are ours.
MODEL is a checkpoint directory; `--make` writes a random Qwen3-MoE there first. Both ways run over
the same random windows in fresh processes, alternating; printed are the seconds of each, their
ratio, the bytes of the statistics, and the peak resident memory over that of the loaded model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from vllm_atomic_moe.calibration.accumulator import sum_of_squares
from vllm_atomic_moe.calibration.collect import collect
from vllm_atomic_moe.calibration.experts import ExpertRows, find_experts, observe
from vllm_atomic_moe.calibration.text import CalibrationText
from vllm_atomic_moe.files.checkpoint import CheckpointInfo, describe_checkpoint

CONFIG = {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 512,
    "intermediate_size": 512,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


class PaperLayer:
    """What the paper's method holds of one layer: a matrix [H, H] and a row [I] per expert."""

    def __init__(self, info: CheckpointInfo) -> None:
        experts, hidden = info.num_experts, info.hidden_size
        self.G = torch.zeros(experts, hidden, hidden)
        self.h2 = torch.zeros(experts, info.intermediate_size, dtype=torch.float64)
        self.count = torch.zeros(experts, dtype=torch.float64)
        self.down: dict[int, torch.Tensor] = {}
        self.with_gradients = True

    def see_routing(self, module, topk_ids_TK):
        return topk_ids_TK

    def see_expert(self, expert: int, rows: ExpertRows) -> None:
        if self.with_gradients:
            rows.y.register_hook(partial(self.see_gradient, expert))
            return
        self.count[expert] += rows.h.shape[0]
        self.h2[expert] += sum_of_squares(rows.h)
        self.down[expert] = rows.down_HI

    def see_gradient(self, expert: int, g: torch.Tensor) -> None:
        # Tiny gradients would vanish in a bf16 product.
        g = g.float()
        self.G[expert].addmm_(g.T, g)

    def scores(self) -> torch.Tensor:
        """½ · mean(h_k²) · w_kᵀ Ḡ w_k: [E, I], zero for experts without tokens."""
        rows = torch.zeros_like(self.h2)
        for expert, down in self.down.items():
            w = down.float()
            quadratic = (w * (self.G[expert] @ w)).sum(dim=0).double()
            rows[expert] = 0.5 * self.h2[expert] * quadratic / self.count[expert] ** 2
        return rows


def two_forwards(
    model: PreTrainedModel, info: CheckpointInfo, windows: torch.Tensor
) -> dict[int, PaperLayer]:
    """The paper's method over windows [N, S], one at a time, over the same experts seam as ours."""
    model.eval().requires_grad_(False)
    experts = find_experts(model, info)
    layers = {layer: PaperLayer(info) for layer in experts}
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda *call: call[-1].requires_grad_())
    with observe(model, experts, layers):
        for ids in windows.long():
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            precise = logits if logits.dtype == torch.float64 else logits.float()
            torch.nn.functional.cross_entropy(precise, ids[1:], reduction="sum").backward()
        handle.remove()
        for layer in layers.values():
            layer.with_gradients = False
        with torch.no_grad():
            for ids in windows.long():
                model.base_model(input_ids=ids[None], use_cache=False)
    for layer in layers.values():
        layer.scores()
    return layers


def resident_bytes(key: str) -> int:
    """VmRSS, the resident memory now, or VmHWM, its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def run_here(directory: Path, way: str, windows: torch.Tensor, dtype: str) -> dict[str, float]:
    """One way in this process: seconds, bytes of the state and of peak memory above the model."""
    info = describe_checkpoint(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
    text = CalibrationText({"a": windows[:1]}, ())
    collect(model, find_experts(model, info), info, text, 1)  # warm up
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    start = time.perf_counter()
    if way == "paper":
        layers = two_forwards(model, info, windows)
        held = [t for layer in layers.values() for t in (layer.G, layer.h2, layer.count)]
    else:
        text = CalibrationText({"a": windows}, ())
        sums = collect(
            model, find_experts(model, info), info, text, 1, gradients=way != "forward only"
        )
        held = [tensor for of_layer in sums.values() for tensor in of_layer.tensors().values()]
    return {
        "seconds": time.perf_counter() - start,
        "state": sum(tensor.nbytes for tensor in held),
        "peak": resident_bytes("VmHWM") - before,
    }


def make_model(directory: Path) -> None:
    """A random Qwen3-MoE checkpoint of about 0.4 GiB in bfloat16."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**CONFIG)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)


def main() -> None:
    """Measure both ways in turn, or, with --way, be the process that is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--make", action="store_true")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--way")
    arguments = parser.parse_args()
    if arguments.way:
        generator = torch.Generator().manual_seed(0)
        vocabulary = json.loads((arguments.directory / "config.json").read_text())["vocab_size"]
        shape = (arguments.windows, arguments.seq_len)
        windows = torch.randint(0, vocabulary, shape, generator=generator, dtype=torch.int32)
        found = run_here(arguments.directory, arguments.way, windows, arguments.dtype)
        print(json.dumps(found))
        return
    if arguments.make:
        make_model(arguments.directory)
    ways: dict[str, list[dict[str, float]]] = {"paper": [], "ours": [], "forward only": []}
    for _ in range(arguments.repeat):
        for way, runs in ways.items():
            command = [sys.executable, "-m", "tests.two_forwards", *sys.argv[1:], "--way", way]
            done = subprocess.run(
                [item for item in command if item != "--make"],
                stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parents[1],
            )  # fmt: skip
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    paper = statistics.median(run["seconds"] for run in ways["paper"])
    for way, runs in ways.items():
        seconds = sorted(run["seconds"] for run in runs)
        print(
            f"{way:13} {statistics.median(seconds):7.2f} s "
            f"({seconds[0]:.2f} to {seconds[-1]:.2f}), "
            f"{statistics.median(seconds) / paper:.2f} of the paper's; "
            f"state {runs[0]['state'] / 2**20:.1f} MiB; "
            f"peak over the model {max(run['peak'] for run in runs) / 2**20:.0f} MiB"
        )


if __name__ == "__main__":
    main()
