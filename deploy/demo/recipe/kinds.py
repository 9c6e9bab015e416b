"""The architectures that the recipe can train; everything else about them is the same.

The first is the demo. The others show how far its figures hold for experts that compute something
else, and are not committed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from layout import WINDOW_TOKENS
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that decides the result, besides the kind, the corpus and the tokenizer."""

    steps: int
    learning_rate: float = 4e-3
    warmup_steps: int = 150
    final_learning_rate_share: float = 0.05
    weight_decay: float = 0.1
    gradient_norm: float = 1.0
    balance_weight: float = 0.01  # of the load-balancing loss
    layers: int = 4
    hidden_size: int = 128
    heads: int = 4
    key_value_heads: int = 2
    head_size: int = 32
    experts: int = 16
    experts_per_token: int = 4
    expert_width: int = 128
    initial_deviation: float = 0.03
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Kind:
    """One architecture.

    Attributes:
        model: its class in transformers.
        config: from a plan and what every kind shares to its configuration.
        router: name of the router in a layer's `mlp`; its third output is the chosen experts.
        steps: how long it is trained.
    """

    model: type[PreTrainedModel]
    config: Callable[[Plan, Mapping[str, Any]], PretrainedConfig]
    router: str
    steps: int


def qwen3(plan: Plan, shared: Mapping[str, Any]) -> Qwen3MoeConfig:
    """Gated experts without biases; the embeddings are tied."""
    return Qwen3MoeConfig(
        **shared,
        intermediate_size=plan.expert_width * plan.experts_per_token,
        moe_intermediate_size=plan.expert_width,
        num_experts=plan.experts,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    )


def gpt_oss(plan: Plan, shared: Mapping[str, Any]) -> GptOssConfig:
    """Experts with biases and a clamped SwiGLU, attention sinks, a window in every other layer.

    vLLM always scales the rotary embedding of this kind; a factor of 1 changes nothing.
    """
    scaling = {"factor": 1.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
    return GptOssConfig(
        **shared,
        intermediate_size=plan.expert_width,
        num_local_experts=plan.experts,
        sliding_window=WINDOW_TOKENS // 4,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": WINDOW_TOKENS,
            **scaling,
        },
    )


KINDS = {
    "qwen3": Kind(Qwen3MoeForCausalLM, qwen3, "gate", steps=4000),
    "gpt-oss": Kind(GptOssForCausalLM, gpt_oss, "router", steps=1500),
}


def model_config(
    kind: Kind, plan: Plan, vocabulary_size: int, end_of_text: int
) -> PretrainedConfig:
    """The configuration of a kind: every layer is a mixture of experts."""
    shared = {
        "vocab_size": vocabulary_size,
        "hidden_size": plan.hidden_size,
        "num_hidden_layers": plan.layers,
        "num_attention_heads": plan.heads,
        "num_key_value_heads": plan.key_value_heads,
        "head_dim": plan.head_size,
        "num_experts_per_tok": plan.experts_per_token,
        "max_position_embeddings": WINDOW_TOKENS,
        "router_aux_loss_coef": plan.balance_weight,
        "output_router_logits": False,
        "initializer_range": plan.initial_deviation,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": None,
        "use_cache": True,
    }
    return kind.config(plan, shared)
