"""A checkpoint with its experts quantized: FP8, a scale per channel; INT4 or MXFP4, groups of 32.

    .venv/bin/python deploy/demo/recipe/quantize.py SOURCE TARGET FORMAT

rounds to nearest and packs with compressed-tensors' own library. For checkpoints of plain weights
with one tensor per expert and projection. Everything beside the experts stays as it is.
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
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
MATRIX = re.compile(r".*\.experts\.\d+\.(?:gate|up|down)_proj\.weight")
TOKENS = {
    "num_bits": 8,
    "type": "float",
    "strategy": "token",
    "dynamic": True,
    "symmetric": True,
}
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


def quantize(source: Path, target: Path, name: str) -> None:
    """Write `source` in one of FORMATS to `target`, in the place of what was there."""
    kind, arguments, activations = FORMATS[name]
    weights = QuantizationArgs(symmetric=True, **arguments)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    weight_map: dict[str, str] = {}
    for path in sorted(target.glob("*.safetensors")):
        tensors: dict[str, torch.Tensor] = {}
        for tensor_name, tensor in load_file(path).items():
            if MATRIX.fullmatch(tensor_name):
                stem = tensor_name.removesuffix("weight")
                parts = compressed(kind, weights, tensor).items()
                tensors |= {f"{stem}{part}": value.contiguous() for part, value in parts}
            else:
                tensors[tensor_name] = tensor
        save_file(tensors, path, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, path.name)
    if (target / INDEX).exists():
        (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((target / "config.json").read_text())
    group = {
        "targets": ["Linear"],
        "weights": weights.model_dump(mode="json", exclude_none=True),
        "input_activations": activations,
    }
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "ignore": ["re:.*self_attn.*", "re:.*mlp.gate$", "lm_head"],
        "config_groups": {"group_0": group},
    }
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def compressed(
    kind: str, weights: QuantizationArgs, matrix: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Parts of a matrix [N, K], as compressed-tensors saves them."""
    groups = matrix.unflatten(1, (-1, weights.group_size or matrix.shape[1]))
    scale, zero = calculate_qparams(groups.amin(2), groups.amax(2), weights)
    state = {"weight": matrix, "weight_scale": scale, "weight_zero_point": zero}
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    saved = BaseCompressor.get_value_from_registry(kind).compress(state, scheme)
    return {part: value for part, value in saved.items() if part != "weight_zero_point"}


if __name__ == "__main__":
    quantize(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
