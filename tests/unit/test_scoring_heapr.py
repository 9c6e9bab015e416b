"""HEAPr against the paper's formula computed the long way: an H×H matrix per expert."""

import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional
from transformers import AutoModelForCausalLM

from tests.unit.tiny_models import ARCHITECTURES, make_model, random_windows
from vllm_atomic_moe.calibration.collect import collect
from vllm_atomic_moe.calibration.experts import find_experts
from vllm_atomic_moe.calibration.text import CalibrationText
from vllm_atomic_moe.scoring.heapr import score_heapr

SEQ_LEN = 24
GATE, UP, DOWN = ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")


def read_matrix(directory: Path, layer: int, expert: int, names: tuple[str, str]) -> torch.Tensor:
    """One expert's matrix as it stands on disk."""
    pattern = re.compile(rf"layers\.{layer}\..*experts\.{expert}\.({'|'.join(names)})\.weight$")
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        (name,) = (key for key in file.keys() if pattern.search(key))  # noqa: SIM118
        return file.get_tensor(name)


class LongWay:
    """A layer's experts, one after another, with explicit outputs, and the paper's matrices."""

    def __init__(self, directory: Path, layer: int, info, dtype: torch.dtype) -> None:
        def matrices(names):
            return [
                read_matrix(directory, layer, expert, names).to(dtype)
                for expert in range(info.num_experts)
            ]

        self.gate, self.up, self.down = matrices(GATE), matrices(UP), matrices(DOWN)
        hidden, size, experts = info.hidden_size, info.intermediate_size, info.num_experts
        self.G = torch.zeros(experts, hidden, hidden, dtype=torch.float64)
        self.h2 = torch.zeros(experts, size, dtype=torch.float64)
        self.count = torch.zeros(experts, dtype=torch.float64)
        self.seen = []

    def forward(self, hidden, topk_ids, topk_weights):
        output = torch.zeros_like(hidden)
        for expert in range(len(self.gate)):
            for slot in range(topk_ids.shape[1]):
                tokens = (topk_ids[:, slot] == expert).nonzero().flatten()
                x = hidden[tokens]
                h = functional.silu(x @ self.gate[expert].T) * (x @ self.up[expert].T)
                y = h @ self.down[expert].T
                if tokens.numel():
                    y.retain_grad()
                    self.seen.append((expert, h, y))
                output = output.index_add(0, tokens, y * topk_weights[tokens, slot, None])
        return output

    def accumulate(self):
        for expert, h, y in self.seen:
            gradient = y.grad.double()
            self.G[expert] += gradient.T @ gradient
            self.h2[expert] += h.detach().double().square().sum(dim=0)
            self.count[expert] += h.shape[0]
        self.seen.clear()

    def scores(self):
        rows = []
        for expert, down in enumerate(self.down):
            mean_G = self.G[expert] / self.count[expert]
            w = down.double()
            rows.append(
                0.5
                * (self.h2[expert] / self.count[expert])
                * torch.einsum("hk,hg,gk->k", w, mean_G, w)
            )
        return torch.stack(rows)


def long_way_scores(directory: Path, info, windows: torch.Tensor, dtype: torch.dtype):
    """Every parameter trainable, one window at a time, the loss written out."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    layers = {}
    for layer, module in find_experts(model, info).items():
        layers[layer] = LongWay(directory, layer, info, dtype)
        module.forward = layers[layer].forward
    for ids in windows.long():
        log_probabilities = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
        loss = -sum(
            log_probabilities[position, ids[position + 1]] for position in range(len(ids) - 1)
        )
        loss.backward()
        for layer in layers.values():
            layer.accumulate()
    return {layer: long_way.scores() for layer, long_way in layers.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "olmoe", "glm4_moe"])
def test_heapr_is_the_papers_formula(architecture, dtype, tmp_path):
    info = make_model(architecture, tmp_path)
    windows = random_windows(6, SEQ_LEN)
    text = CalibrationText({"a": windows[:2], "b": windows[2:]}, ())

    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    sums = collect(model, find_experts(model, info), info, text, batch_size=2)
    wanted = long_way_scores(tmp_path, info, windows, dtype)

    assert set(sums) == set(wanted) == set(info.layers)
    for layer, tensors in sums.items():
        seen = tensors["count"].sum(dim=0) > 0
        score = score_heapr(tensors, layer)
        assert score.dtype == torch.float32
        assert seen.sum() >= 4
        error = (score.double() - wanted[layer]).abs() / wanted[layer]
        assert error[seen].max() < (1e-4 if dtype == torch.float32 else 1e-6)
        assert score[~seen].isposinf().all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_calibrates(architecture, tmp_path):
    info = make_model(architecture, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    windows = random_windows(2, SEQ_LEN)

    sums = collect(
        model, find_experts(model, info), info, CalibrationText({"a": windows}, ()), batch_size=1
    )

    assert tuple(sums) == info.layers
    for tensors in sums.values():
        assert tensors["count"].sum() == windows.numel() * info.experts_per_token
        seen = tensors["count"][0] > 4
        assert (tensors["h2"][0, seen] > 0).all()
        assert (tensors["g2"][0, seen] > 0).all()


def test_an_expert_without_tokens_is_kept_whole():
    sums = {
        "count": torch.tensor([[2.0, 0.0], [2.0, 0.0]], dtype=torch.float64),
        "h2": torch.tensor([[[2.0, 0.0], [0.0, 0.0]], [[2.0, 4.0], [0.0, 0.0]]]).double(),
        "g2": torch.tensor([[[4.0, 0.0], [0.0, 0.0]], [[4.0, 8.0], [0.0, 0.0]]]).double(),
    }

    score = score_heapr(sums, layer=0)

    assert score.tolist() == [[0.5 * 1.0 * 2.0, 0.5 * 1.0 * 2.0], [float("inf")] * 2]
