"""Prune, quantize, or both? Quantized siblings of the demo, and their held-out perplexity.

    .venv/bin/python deploy/demo/recipe/quantized.py WORK_DIRECTORY

writes the demo with its experts in FP8 (a scale per channel), INT4 and MXFP4 (groups of 32), packed
by compressed-tensors itself, to WORK_DIRECTORY/FORMAT. Of each, and of the bfloat16 original, it
measures dense and HEAPr's profiles with `atomic-moe eval`, and writes deploy/demo/quantized.md and
deploy/demo/quantized.png. What WORK_DIRECTORY holds measured already is not measured again.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from report import DEMO, call
from safetensors.torch import load_file, save_file

PROFILES = ("heapr-20", "heapr-40", "heapr-60")
ORIGINAL = "bf16"
MATRIX = re.compile(r".*\.experts\.\d+\.(?:gate|up|down)_proj\.weight")
TOKENS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
# Format -> what compressed-tensors calls it, how it quantizes weights, and activations.
FORMATS: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "fp8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, TOKENS),
    "int4": (
        "pack-quantized",
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
        None,
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32,
         "scale_dtype": torch.uint8},
        None,
    ),
}  # fmt: skip


def main() -> None:
    """Quantize, measure, write."""
    work = Path(sys.argv[1])
    measured: dict[str, list[dict[str, Any]]] = {}
    for name in (ORIGINAL, *FORMATS):
        model = DEMO / "model" if name == ORIGINAL else work / name
        done = work / f"{name}.json"
        if not done.exists():
            if name != ORIGINAL:
                quantize(model, name)
            work.mkdir(parents=True, exist_ok=True)
            done.write_text(json.dumps(evaluate(model)))
        measured[name] = json.loads(done.read_text())
    (DEMO / "quantized.md").write_text("\n".join(document(measured)) + "\n")
    draw(measured, DEMO / "quantized.png")


def quantize(target: Path, name: str) -> None:
    """Write the sibling in one format, profiles and tokenizer beside it."""
    kind, arguments, activations = FORMATS[name]
    weights = QuantizationArgs(symmetric=True, **arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    compressor = BaseCompressor.get_value_from_registry(kind)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(DEMO / "model", target)
    tensors: dict[str, torch.Tensor] = {}
    for tensor_name, tensor in load_file(target / "model.safetensors").items():
        if not MATRIX.fullmatch(tensor_name):
            tensors[tensor_name] = tensor
            continue
        groups = tensor.unflatten(1, (-1, arguments.get("group_size", tensor.shape[1])))
        scale, zero = calculate_qparams(groups.amin(2), groups.amax(2), weights)
        state = {"weight": tensor, "weight_scale": scale, "weight_zero_point": zero}
        for part, value in compressor.compress(state, scheme).items():
            if part != "weight_zero_point":
                tensors[f"{tensor_name.removesuffix('weight')}{part}"] = value.contiguous()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    path = target / "config.json"
    told = {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "ignore": ["re:.*self_attn.*", "re:.*mlp.gate$", "lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**weights.model_dump(mode="json", exclude_none=True)},
                "input_activations": activations and {**activations, "symmetric": True},
            }
        },
    }
    config = {**json.loads(path.read_text()), "quantization_config": told}
    path.write_text(json.dumps(config, indent=2) + "\n")


def evaluate(model: Path) -> list[dict[str, Any]]:
    """Rows of `atomic-moe eval --json`, dense first, by domain and over all held-out text."""
    texts = sorted((DEMO / "data").glob("*.heldout.txt"))
    data = [part for text in texts for part in ("--data", f"{text}:{text.name.split('.')[0]}")]
    chosen = [part for name in PROFILES for part in ("--profile", name)]
    return json.loads(call("eval", model, *data, *chosen, "--json"))


def document(measured: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The page: one table, rows by bytes."""
    dense = measured[ORIGINAL][0]
    rows = [(name, row) for name, of in measured.items() for row in of]
    lines = [
        "# Prune, quantize, or both?",
        "",
        "Made by `make demo-quantized`: the demo's held-out perplexity as served, its experts in",
        "bfloat16, FP8 (a scale per channel), INT4 and MXFP4 (groups of 32, rounded to nearest by",
        "compressed-tensors), dense and pruned by HEAPr. Bytes are the kept share of the experts,",
        "scales included; percentages are against the dense bfloat16 original.",
        "",
        "![perplexity over bytes](quantized.png)",
        "",
        "| experts | profile | MiB | bytes | perplexity |",
        "|---|---|--:|--:|--:|",
    ]
    for name, row in sorted(rows, key=lambda it: -it[1]["kept_bytes"]):
        perplexity, first = overall(row), overall(dense)
        lines.append(
            f"| {name} | {row['profile']} | {row['kept_bytes'] / 2**20:.2f} "
            f"| {row['kept_bytes'] / dense['kept_bytes']:.1%} "
            f"| {perplexity:.2f} ({perplexity / first - 1:+.1%}) |"
        )
    return lines


def overall(row: dict[str, Any]) -> float:
    """Perplexity over all text."""
    return row["perplexity"]["all"]


def draw(measured: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Perplexity over bytes, one line a format."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for (name, rows), marker in zip(measured.items(), "os^D", strict=True):
        sizes = [row["kept_bytes"] / 2**20 for row in rows]
        axes.plot(sizes, [overall(row) for row in rows], marker=marker, label=name)
    axes.set(xlabel="bytes of the experts, MiB", ylabel="held-out perplexity", yscale="log")
    axes.set_title("The demo dense and pruned by HEAPr (20, 40, 60 %), by format of its experts")
    axes.legend()
    axes.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(path)


if __name__ == "__main__":
    main()
