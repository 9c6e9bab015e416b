"""The oracle of calibration: explicit experts, one token after another, formulas written out.

Slow on purpose, and independent of the code under test: it reads the expert matrices from the
checkpoint, replaces the experts' forward, and keeps every routed row.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch.nn import functional
from transformers import AutoConfig, PreTrainedModel

from vllm_atomic_moe.calibration.experts import find_experts
from vllm_atomic_moe.calibration.model import auto_class
from vllm_atomic_moe.files.checkpoint import CheckpointInfo

GATE, UP, DOWN = ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")
# Limit of gate and up; tests/architectures.py has those of 2.
LIMITS = {
    "GptOssForCausalLM": 7.0,
    "DeepseekV4ForCausalLM": 2.0,
    "HYV4ForCausalLM": 2.0,
    "MiniMaxM3SparseForConditionalGeneration": 2.0,
}
SWIGLU_OAI = ("GptOssForCausalLM", "MiniMaxM3SparseForConditionalGeneration")
# All experts in one tensor, gate before up.
FUSED = ("Llama4ForCausalLM", "Gemma4ForCausalLM", "HYV4ForCausalLM")


def load(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model, in transformers."""
    return auto_class(AutoConfig.from_pretrained(directory)).from_pretrained(directory, dtype=dtype)


def read_matrix(directory: Path, layer: int, expert: int, names: tuple[str, str]) -> torch.Tensor:
    """One expert's matrix, as stored."""
    pattern = re.compile(rf"layers\.{layer}\..*experts\.{expert}\.({'|'.join(names)})\.weight$")
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        (name,) = (key for key in file.keys() if pattern.search(key))  # noqa: SIM118
        return file.get_tensor(name)


@dataclass
class RoutedToken:
    """One token in one expert."""

    domain: int
    expert: int
    x: torch.Tensor
    h: torch.Tensor
    y: torch.Tensor
    p: torch.Tensor
    g: torch.Tensor | None = None  # ∂ℓ/∂y


class LongWay:
    """A layer's experts, one after another, with explicit outputs, and a record of all rows."""

    def __init__(self, directory: Path, layer: int, info: CheckpointInfo, dtype: torch.dtype):
        def matrices(names):
            return [
                read_matrix(directory, layer, expert, names).to(dtype)
                for expert in range(info.num_experts)
            ]

        self.ungated = info.architecture == "NemotronHForCausalLM"
        self.biased = info.architecture == "GptOssForCausalLM"
        self.weighted_input = info.architecture == "Llama4ForCausalLM"
        if self.biased:
            self._read_gpt_oss(directory, layer, dtype)
        elif info.architecture in FUSED:
            self._read_fused(directory, info.blocks[layer], dtype)
        else:
            self.up, self.down = matrices(UP), matrices(DOWN)
            self.gate = self.up if self.ungated else matrices(GATE)
        self.info = info
        self.domain = 0
        self.tokens: list[RoutedToken] = []
        self.chosen: list[tuple[int, frozenset[int]]] = []
        self.pending: list = []

    def _read_gpt_oss(self, directory: Path, layer: int, dtype: torch.dtype) -> None:
        """All experts in one tensor, [E, H, 2I] and [E, I, H], gate and up interleaved; biases."""
        with safe_open(directory / "model.safetensors", framework="pt") as file:
            of_layer = {
                part: file.get_tensor(f"model.layers.{layer}.mlp.experts.{part}").to(dtype)
                for part in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
            }
        gate_up, bias = of_layer["gate_up_proj"], of_layer["gate_up_proj_bias"]
        self.gate = list(gate_up[:, :, ::2].transpose(1, 2))
        self.up = list(gate_up[:, :, 1::2].transpose(1, 2))
        self.down = list(of_layer["down_proj"].transpose(1, 2))
        self.bias = list(zip(bias[:, ::2], bias[:, 1::2], of_layer["down_proj_bias"], strict=True))

    def _read_fused(self, directory: Path, block: str, dtype: torch.dtype) -> None:
        """All experts in one tensor, [E, 2I, H], gate before up, and [E, H, I]; Llama-4's are
        transposed.
        """
        with safe_open(directory / "model.safetensors", framework="pt") as file:
            gate_up, down = (
                file.get_tensor(f"{block}.experts.{part}").to(dtype)
                for part in ("gate_up_proj", "down_proj")
            )
        if self.weighted_input:
            gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
        size = down.shape[2]
        self.gate, self.up, self.down = list(gate_up[:, :size]), list(gate_up[:, size:]), list(down)

    def expert(self, expert: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """h and y for rows x."""
        gate, up = x @ self.gate[expert].T, x @ self.up[expert].T
        if self.ungated:
            h = functional.relu(up) ** 2
            return h, h @ self.down[expert].T
        if not self.biased:
            h = self.activate(gate, up)
            return h, h @ self.down[expert].T
        gate_bias, up_bias, down_bias = self.bias[expert]
        h = self.activate(gate + gate_bias, up + up_bias)
        return h, h @ self.down[expert].T + down_bias

    def activate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """h, with a gate."""
        if limit := LIMITS.get(self.info.architecture):
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        if self.info.architecture in SWIGLU_OAI:
            return gate * torch.sigmoid(1.702 * gate) * (up + 1)
        if self.info.architecture == "Gemma4ForCausalLM":
            return functional.gelu(gate, approximate="tanh") * up
        return functional.silu(gate) * up

    def forward(self, hidden, topk_ids, topk_weights):
        output = torch.zeros_like(hidden)
        self.chosen += [(self.domain, frozenset(ids)) for ids in topk_ids.tolist()]
        for expert in range(len(self.gate)):
            for slot in range(topk_ids.shape[1]):
                tokens = (topk_ids[:, slot] == expert).nonzero().flatten()
                x, p = hidden[tokens], topk_weights[tokens, slot]
                h, y = self.expert(expert, x)
                if tokens.numel():
                    y.retain_grad()
                    self.pending.append((expert, x, h, y, p))
                output = output.index_add(0, tokens, y * p[:, None])
        return output

    def forward_weighted_input(self, every_input):
        """Llama-4: every token once per expert, times its router weight, which is 0 elsewhere."""
        x_ETH = every_input.view(len(self.gate), -1, every_input.shape[1])
        routed_ET = (x_ETH != 0).any(dim=2)
        self.chosen += [
            (self.domain, frozenset(chosen.nonzero().flatten().tolist())) for chosen in routed_ET.T
        ]
        output = torch.zeros_like(x_ETH)
        for expert, routed in enumerate(routed_ET):
            tokens = routed.nonzero().flatten()
            x = x_ETH[expert, tokens]
            h, y = self.expert(expert, x)
            if tokens.numel():
                y.retain_grad()
                self.pending.append((expert, x, h, y, torch.ones(len(tokens))))
            output = output.index_put((torch.full_like(tokens, expert), tokens), y)
        return output.view_as(every_input)

    def accumulate(self):
        """After the backward pass: note every token with its gradient."""
        for expert, x, h, y, p in self.pending:
            parts = (tensor.detach().double() for tensor in (x, h, y, p, y.grad))
            self.tokens += [
                RoutedToken(self.domain, expert, *row) for row in zip(*parts, strict=True)
            ]
        self.pending.clear()

    def of_expert(self, expert: int) -> list[RoutedToken]:
        return [token for token in self.tokens if token.expert == expert]


def run_the_long_way(
    directory: Path, info: CheckpointInfo, domains: list[torch.Tensor], dtype: torch.dtype
) -> dict[int, LongWay]:
    """Every parameter trainable, one window at a time, the loss written out."""
    model = load(directory, dtype).eval()
    layers = {}
    for layer, module in find_experts(model, info).items():
        layers[layer] = LongWay(directory, layer, info, dtype)
        way = layers[layer]
        module.forward = way.forward_weighted_input if way.weighted_input else way.forward
    for domain, windows in enumerate(domains):
        for ids in windows.long():
            for layer in layers.values():
                layer.domain = domain
            log_probabilities = (
                model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
            )
            loss = -sum(
                log_probabilities[position, ids[position + 1]] for position in range(len(ids) - 1)
            )
            loss.backward()
            for layer in layers.values():
                layer.accumulate()
    return layers
