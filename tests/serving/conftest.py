"""In-process vLLM: one engine at a time, prompt log-probabilities as the measure."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

# Before vLLM is imported: the engine in this process, a small cache, no downloads.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

DEMO = Path(__file__).parents[2] / "deploy/demo/model"
PROMPTS = [[3 + (7 * i + j * j * (i + 1)) % 250 for j in range(24)] for i in range(6)]


@contextmanager
def engine(model: Any, **options: Any) -> Iterator[Any]:
    """A small eager float32 engine in this process, shut down at the end."""
    from vllm_atomic_moe.serving import evaluation

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
    from vllm_atomic_moe.serving import evaluation

    return torch.tensor(evaluation.prompt_logprobs(llm, prompts)).flatten()


def logprobs_of(model: Any, **options: Any) -> torch.Tensor:
    """Prompt log-probabilities of a model under vLLM with these options."""
    with engine(model, **options) as llm:
        return prompt_logprobs(llm)


@pytest.fixture(autouse=True)
def _all_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
