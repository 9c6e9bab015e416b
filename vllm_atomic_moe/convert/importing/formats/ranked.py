"""`ranked`: the ordered expert lists of vllm-ascend pull request 12525, JSON lines.

    {"0": [106, 65, 113, ...]}
    {"1": [86, 48, 18, ...]}

One layer per line, best expert first. With --ratio, the fraction of experts removed, the first
floor(E · (1 − ratio)) of every layer stay, the same number in each. A list may end after those.
"""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

from vllm_atomic_moe.convert.importing.importer import Importer
from vllm_atomic_moe.convert.importing.reading import (
    check_every_layer,
    expert_ids,
    keep_experts,
    layer_index,
    parse_object,
    read_text,
)
from vllm_atomic_moe.files.checkpoint import CheckpointInfo
from vllm_atomic_moe.scoring.masks import Masks


def read_ranked(path: Path, model: CheckpointInfo, ratio: float) -> Masks:
    """Keep the best-ranked experts of every layer; the others leave the router.

    Raises:
        ValueError: a line is not an object of layers and expert lists, a layer is missing or occurs
            twice, or a list is shorter than what stays.
    """
    # Decimal arithmetic: of 10 experts a ratio of 0.9 leaves 1 (binary floats give 0).
    count = math.floor(model.num_experts * (1 - Fraction(str(ratio))))
    kept: dict[int, list[int]] = {}
    lines: dict[int, int] = {}
    # Not splitlines(): it also splits at characters that a JSON string may contain.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        for key, value in parse_object(line, f"{path}: line {number}").items():
            where = f"{path}: line {number}"
            layer = layer_index(key, model, where)
            if layer in lines:
                raise ValueError(
                    f"{where}: layer {layer} is ranked already, in line {lines[layer]}; keep one"
                )
            lines[layer] = number
            ranking = expert_ids(value, model, f"{where}, layer {layer}")
            if len(ranking) < count:
                raise ValueError(
                    f"{where}: layer {layer} ranks {len(ranking)} experts, --ratio {ratio} keeps "
                    f"{count} of {model.num_experts}; rank at least as many"
                )
            kept[layer] = ranking[:count]
    check_every_layer(kept, model, path)
    return keep_experts(kept, model, {})


IMPORTER = Importer(
    read_ranked,
    "vllm-ascend's ordered expert lists, JSON lines",
    needs_ratio="each layer's experts",
)
