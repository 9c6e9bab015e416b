"""In-process vLLM: one engine at a time, prompt log-probabilities as the measure."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_atomic_moe.calibration.model import auto_class
from vllm_atomic_moe.files.profiles import PruningProfile

# Before vLLM is imported: the engine in this process, a small cache, no downloads.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

DEMO = Path(__file__).parents[2] / "deploy/demo/model"
PROMPTS = [[3 + (7 * i + j * j * (i + 1)) % 250 for j in range(24)] for i in range(6)]


@contextmanager
def engine(model: Any, **options: Any) -> Iterator[Any]:
    """A small eager float32 engine in this process, shut down at the end."""
    from vllm_atomic_moe.measure import evaluation

    settings = {
        "enforce_eager": True,
        "dtype": "float32",
        "max_model_len": 128,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "seed": 0,
    }
    with evaluation.engine(model, **{**settings, **options}) as llm:
        yield llm


def prompt_logprobs(llm: Any, prompts: Sequence[Sequence[int]] = PROMPTS) -> torch.Tensor:
    """Log-probabilities of the prompts' tokens after their first, one vector."""
    from vllm_atomic_moe.measure import evaluation

    return torch.tensor(evaluation.prompt_logprobs(llm, prompts)).flatten()


def logprobs_of(model: Any, **options: Any) -> torch.Tensor:
    """Prompt log-probabilities of a model under vLLM with these options."""
    with engine(model, **options) as llm:
        return prompt_logprobs(llm)


def packed_layers_of(llm: Any) -> list[Any]:
    """The packed layers of the served model."""
    from vllm_atomic_moe.engine.loader import packed_layers

    return packed_layers(llm.llm_engine.model_executor.driver_worker.worker.model_runner.model)


def check_resident(layers: Sequence[Any], masks: Mapping[int, torch.Tensor]) -> int:
    """Check in bytes that layers hold exactly the masks' atoms, plus at most one per expert."""
    for layer in layers:
        weights, kept_EI = layer.packed.weights[0], masks[layer.index]
        atoms = layer.packed.weight_bytes / (3 * layer.packed.hidden_size * weights.itemsize)
        assert layer.packed.layout.num_rows == int(kept_EI.sum())
        assert 0 <= atoms - int(kept_EI.sum()) <= int(kept_EI.any(dim=1).sum())
    return sum(layer.packed.weight_bytes for layer in layers)


def core(llm: Any, question: str, **arguments: Any) -> dict[str, Any]:
    """The answer of this process's engine core; a change is published at once."""
    if question == "change":
        arguments = {"turn": uuid.uuid4().hex, "publish": True, **arguments}
    return llm.llm_engine.engine_core.engine_core.atomic_moe(question, arguments)


def activate(llm: Any, name: str) -> None:
    """Make another loaded profile active."""
    from vllm_atomic_moe.engine.requests import Served

    reply = core(llm, "change", verb="activate", profile=name)
    assert reply["ok"], reply
    llm.llm_engine.input_processor.atomic_moe_admission.served = Served.of(reply["served"])


def mixed_logprobs(llm: Any, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Prompt log-probabilities of every profile, all of them computed in one batch."""
    from vllm import SamplingParams

    jobs = [(prompt, name) for prompt in PROMPTS for name in names]
    settings = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": 0, "detokenize": False}
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt, _ in jobs],
        [SamplingParams(**settings, extra_args={"profile": name}) for _, name in jobs],
        use_tqdm=False,
    )
    found: dict[str, list[float]] = {name: [] for name in names}
    for (prompt, name), output in zip(jobs, outputs, strict=True):
        scores = zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
        found[name] += [score[token].logprob for score, token in scores]
    return {name: torch.tensor(values) for name, values in found.items()}


@torch.inference_mode()
def transformers_logprobs(directory: Path) -> torch.Tensor:
    """Prompt log-probabilities of the checkpoint under transformers, no vLLM involved."""
    kind = auto_class(AutoConfig.from_pretrained(directory))
    model = kind.from_pretrained(directory, dtype=torch.float32)
    tokens = torch.tensor(PROMPTS)
    logprobs = model(input_ids=tokens).logits[:, :-1].log_softmax(dim=-1)
    return logprobs.gather(-1, tokens[:, 1:, None]).flatten()


@torch.inference_mode()
def masked_transformers_logprobs(directory: Path, profile: PruningProfile) -> torch.Tensor:
    """Prompt log-probabilities of transformers' float32 model, atoms zeroed and routers masked."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for index, keep in profile.keep.items():
        block = model.model.layers[index].mlp
        block.experts.down_proj *= keep[:, None, :]
        if index in profile.routable:
            mask_transformers_router(block.gate, profile.routable[index])
    tokens = torch.tensor(PROMPTS)
    logprobs = model(input_ids=tokens).logits[:, :-1].log_softmax(dim=-1)
    return logprobs.gather(-1, tokens[:, 1:, None]).flatten()


def mask_transformers_router(router: torch.nn.Module, routable_E: torch.Tensor) -> None:
    """Keep transformers' router from choosing an expert: by its correction bias, or by a hook that
    chooses again from masked logits.
    """
    if hasattr(router, "e_score_correction_bias"):
        router.e_score_correction_bias[~routable_E] = -1e9
        return

    def choose_again(module: Any, arguments: Any, output: Any) -> Any:
        logits, weights, _ = output
        scores = logits.masked_fill(~routable_E, float("-inf")).softmax(dim=-1)
        top, chosen = scores.topk(weights.shape[-1])
        renormalize = getattr(module, "norm_topk_prob", True)  # Mixtral always does
        return logits, top / top.sum(dim=-1, keepdim=True) if renormalize else top, chosen

    router.register_forward_hook(choose_again)


@pytest.fixture(autouse=True)
def _all_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)


@pytest.fixture
def no_weights_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if any weight is read through vLLM's loader."""
    from vllm.model_executor.model_loader import DefaultModelLoader

    def read(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(DefaultModelLoader, "_get_weights_iterator", read)
