"""In-process vLLM: one engine at a time, prompt log-probabilities as the measure."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

# Before vLLM is imported: the engine in this process, a small cache, no downloads.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

PROMPTS = [[3 + (7 * i + j * j * (i + 1)) % 250 for j in range(24)] for i in range(6)]


@contextmanager
def engine(model: Any, **options: Any) -> Iterator[Any]:
    """A float32 vLLM engine in this process, shut down at the end."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    settings = {
        "enforce_eager": True,
        "dtype": "float32",
        "max_model_len": 128,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "seed": 0,
    }
    llm = None
    try:
        llm = LLM(str(model), **{**settings, **options})
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        torch._dynamo.reset()
        gc.collect()


def prompt_logprobs(llm: Any, prompts: list[list[int]] = PROMPTS) -> torch.Tensor:
    """Log-probabilities of the prompts' tokens after their first, one vector."""
    from vllm import SamplingParams

    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False),
        use_tqdm=False,
    )
    return torch.tensor(
        [
            position[token].logprob
            for output in outputs
            for position, token in zip(
                output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True
            )
        ]
    )


def logprobs_of(model: Any, **options: Any) -> torch.Tensor:
    """Prompt log-probabilities of a model under vLLM with these options."""
    with engine(model, **options) as llm:
        return prompt_logprobs(llm)


@pytest.fixture(autouse=True)
def _no_compile_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
