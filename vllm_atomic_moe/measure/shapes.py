"""Layers of well-known models, to measure kernels on."""

from __future__ import annotations

from typing import NamedTuple


class LayerShape(NamedTuple):
    """One MoE layer: experts E, hidden size H, intermediate size I, experts per token K."""

    name: str
    experts: int
    hidden: int
    intermediate: int
    top_k: int


SHAPES = {
    shape.name: shape
    for shape in (
        LayerShape("qwen3-30b-a3b", 128, 2048, 768, 8),
        LayerShape("qwen1.5-moe", 60, 2048, 1408, 4),
        LayerShape("deepseek-v2-lite", 64, 2048, 1408, 6),
        LayerShape("olmoe", 64, 2048, 1024, 8),
        LayerShape("mixtral", 8, 4096, 14336, 2),
    )
}
