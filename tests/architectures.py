"""The matrix of architectures: a tiny model of each; what is served, calibrated, exported.

README's table is compared with it. A reason that no longer holds fails a test.

Legend: E = 8 experts, K = 2 of them per token, H = 128 hidden size, I = 64 intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests import listed_tensors, published
from vllm_atomic_moe.experts.activation import Activation

COMMON = {
    "vocab_size": 256,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
MOE = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "intermediate_size": 128,
}
ROUTED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "intermediate_size": 128,
}
# With linear attention, which on CPUs is for bfloat16 alone, in no layer.
GATED_DELTA_NET = {
    **MOE,
    "shared_expert_intermediate_size": 96,
    "head_dim": 32,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["full_attention"] * 3,
}
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 64}
GROUPS = {"n_group": 2, "topk_group": 1}
# Ling's and its relatives'.
BAILING = {
    **MOE,
    "head_dim": 32,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "use_bias": False,
    "use_qkv_bias": False,
    "embedding_dropout": 0.0,
    "partial_rotary_factor": 0.5,
}
BIASED = {
    **GROUPS,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "routed_scaling_factor": 1.5,
}
STEP = {
    "moe_num_experts": 8,
    "moe_top_k": 2,
    "moe_intermediate_size": 64,
    "intermediate_size": 128,
    "share_expert_dim": 96,
    "moe_layers_enum": "1,2",
}
# Multi-head latent attention.
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
# Sparse attention, of as many tokens as there are at most.
INDEXED = {"index_topk": 128, "index_n_heads": 2, "index_head_dim": 32}
# Rotary positions, also of images.
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 128,
}
FIRST_DENSE = ["dense", "sparse", "sparse"]
MIXED = ["sliding_attention", "sliding_attention", "full_attention"]


SILU = Activation()
VLLM = "against vLLM's dense model, two profiles in one batch"
ALONE = "against vLLM's dense model, prompt by prompt"
ROUTED_HERE = "against vLLM's dense model, both routed by the test: vLLM's router needs a GPU"
TRANSFORMERS = "against transformers, two profiles in one batch"
LAYER = "against transformers, layer by layer"


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture.

    Attributes:
        model: its class in vLLM.
        settings: of its configuration, beside COMMON.
        kind: transformers' model type, or one that takes such settings; "": the table's key.
        tested: one of the five above. ALONE where stock vLLM's answers on a CPU depend on the rest
            of a batch; TRANSFORMERS where stock vLLM on a CPU does not compute such experts; LAYER
            where it does not start (`no_cpu`).
        no_cpu: pattern of stock vLLM's own error on a CPU, and the line that raises it.
        not_calibrated, not_exported: "", or a pattern of the refusal.
        tensors: the checkpoint's tensors, where transformers has no class of that name.
        published: makes a published checkpoint of the one that transformers saves, if they differ.
        activation: of its experts, where layers are compared; in vLLM's it is the layer's own.
        engine: more options of vLLM's engines.
    """

    model: str
    settings: Mapping[str, Any]
    kind: str = ""
    tested: str = VLLM
    no_cpu: str = ""
    not_calibrated: str = ""
    not_exported: str = ""
    tensors: Mapping[str, tuple[int, ...]] | None = None
    published: Callable[..., published.Checkpoint] | None = None
    activation: Activation = SILU
    engine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """Of vLLM's engines that are compared; of a model that takes images, with text alone."""
        alone = {"max_num_seqs": 1} if self.tested in (ALONE, ROUTED_HERE) else {}
        text = {"language_model_only": True} if "text_config" in self.settings else {}
        return {**alone, **text, **self.engine}


ARCHITECTURES = {
    "qwen3_moe": Architecture(
        "Qwen3MoeForCausalLM", {**MOE, "head_dim": 32, "norm_topk_prob": True}
    ),
    "qwen2_moe": Architecture(
        "Qwen2MoeForCausalLM", {**MOE, "shared_expert_intermediate_size": 96}
    ),
    "qwen3_next": Architecture("Qwen3NextForCausalLM", GATED_DELTA_NET),
    "qwen3_5_moe": Architecture(
        "Qwen3_5MoeForConditionalGeneration",
        {
            "text_config": {
                **COMMON,
                **GATED_DELTA_NET,
                "rope_parameters": {
                    **ROPE,
                    "mrope_section": [2, 1, 1],
                    "mrope_interleaved": True,
                    "partial_rotary_factor": 0.25,
                },
            },
            "vision_config": {**VISION, "num_position_embeddings": 16},
        },
        # Prefix caching of a model of this class wants a layer of linear attention.
        engine={"enable_prefix_caching": False},
    ),
    "mixtral": Architecture("MixtralForCausalLM", {**LOCAL, "sliding_window": None}),
    "olmoe": Architecture(
        "OlmoeForCausalLM", {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 64}
    ),
    "deepseek_v2": Architecture(
        "DeepseekV2ForCausalLM",
        {
            **ROUTED,
            **GROUPS,
            **LATENT,
            "q_lora_rank": None,
            "first_k_dense_replace": 0,
            "n_shared_experts": 1,
            "topk_method": "group_limited_greedy",
        },
        tested=ALONE,
    ),
    "deepseek_v3": Architecture(
        "DeepseekV3ForCausalLM",
        {
            **ROUTED,
            **GROUPS,
            **LATENT,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "topk_method": "noaux_tc",
        },
        tested=ALONE,
    ),
    "glm4_moe": Architecture(
        "Glm4MoeForCausalLM",
        {
            **ROUTED,
            **GROUPS,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
            "routed_scaling_factor": 1.5,
            "norm_topk_prob": True,
            "head_dim": 32,
            "use_qk_norm": True,
        },
    ),
    "glm4_moe_lite": Architecture(
        "Glm4MoeLiteForCausalLM",
        {
            **ROUTED,
            **LATENT,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "topk_method": "noaux_tc",
            "mlp_layer_types": FIRST_DENSE,
        },
        tested=ALONE,
    ),
    "deepseek_v32": Architecture(
        "DeepseekV32ForCausalLM",
        {
            **ROUTED,
            **GROUPS,
            **LATENT,
            **INDEXED,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
        },
        tested=LAYER,
        no_cpu="Sparse Attention is not supported on CPU",
    ),
    "glm_moe_dsa": Architecture(
        "GlmMoeDsaForCausalLM",
        {
            **ROUTED,
            **LATENT,
            **INDEXED,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
        },
        tested=LAYER,
        no_cpu="Sparse Attention is not supported on CPU",
    ),
    "axk1": Architecture(
        "AXK1ForCausalLM",
        {
            **ROUTED,
            **GROUPS,
            **LATENT,
            "n_shared_experts": 1,
            "first_k_dense_replace": 0,
            "topk_method": "noaux_tc",
        },
        tested=ALONE,
    ),
    # Stock vLLM's own loading of it fails: `KeyError: 'w13_weight'` (0.32).
    "dbrx": Architecture(
        "DbrxForCausalLM",
        {
            **{"d_model": 128, "n_layers": 3, "n_heads": 4, "max_seq_len": 128},
            "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 8, "moe_top_k": 2},
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        },
        tested=TRANSFORMERS,
        not_calibrated="does not build its experts through the experts interface",
    ),
    "gpt_oss": Architecture(
        "GptOssForCausalLM",
        {**LOCAL, "head_dim": 32},
        tested=TRANSFORMERS,
    ),
    "gemma4": Architecture(
        "Gemma4ForCausalLM",
        {
            "num_experts": 8,
            "top_k_experts": 2,
            "moe_intermediate_size": 64,
            "intermediate_size": 96,
            "enable_moe_block": True,
            "head_dim": 32,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 256,
            "layer_types": MIXED,
            "tie_word_embeddings": True,
        },
        kind="gemma4_text",
    ),
    "llama4": Architecture(
        "Llama4ForCausalLM",
        {
            **LOCAL,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 96,
            "head_dim": 32,
            "no_rope_layers": [1, 1, 1],
            "attention_chunk_size": 128,
        },
        kind="llama4_text",
    ),
    "granitemoe": Architecture("GraniteMoeForCausalLM", LOCAL),
    "granitemoeshared": Architecture(
        "GraniteMoeSharedForCausalLM", {**LOCAL, "shared_intermediate_size": 96}
    ),
    "granitemoe_swa": Architecture(
        "GraniteMoeSWAForCausalLM",
        {
            **LOCAL,
            "shared_intermediate_size": 96,
            "layer_types": MIXED,
            "layer_rope_theta": [10000.0] * 3,
        },
    ),
    "granitemoehybrid": Architecture(
        "GraniteMoeHybridForCausalLM",
        {
            **LOCAL,
            "shared_intermediate_size": 96,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
            "mamba_n_heads": 8,
            "mamba_d_head": 32,
            "mamba_d_state": 16,
            "mamba_chunk_size": 16,
            "position_embedding_type": "rope",
        },
    ),
    "aria": Architecture(
        "AriaForConditionalGeneration",
        {
            "text_config": {
                "model_type": "aria_text",
                **COMMON,
                "intermediate_size": 64,
                "moe_num_experts": 8,
                "moe_topk": 2,
                "moe_num_shared_experts": 1,
                "head_dim": 32,
            },
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 4,
            },
            "projector_patch_to_query_dict": {16: 4},
        },
    ),
    "qwen3_vl_moe": Architecture(
        "Qwen3VLMoeForConditionalGeneration",
        {
            "text_config": {
                **COMMON,
                **MOE,
                "hidden_size": 96,  # unlike the rows of gate and up
                "head_dim": 32,
                "norm_topk_prob": True,
                "rope_parameters": {**ROPE, "mrope_section": [8, 4, 4]},
            },
            "vision_config": {
                **VISION,
                "out_hidden_size": 96,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
        },
        published=published.qwen3_vl_moe,
    ),
    "glm4v_moe": Architecture(
        "Glm4vMoeForConditionalGeneration",
        {
            "text_config": {
                **COMMON,
                **ROUTED,
                **GROUPS,
                "head_dim": 32,
                "first_k_dense_replace": 1,
                "n_shared_experts": 1,
                "routed_scaling_factor": 1.5,
                "use_qk_norm": False,
                "rope_parameters": {
                    **ROPE,
                    "mrope_section": [4, 2, 2],
                    "partial_rotary_factor": 0.5,
                },
            },
            "vision_config": {**VISION, "image_size": 16},
        },
    ),
    "ernie4_5_moe": Architecture(
        "Ernie4_5_MoeForCausalLM",
        {
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_intermediate_size": 64,
            "intermediate_size": 128,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 2,
        },
    ),
    "exaone_moe": Architecture(
        "ExaoneMoeForCausalLM",
        {
            **MOE,
            **GROUPS,
            "num_shared_experts": 1,
            "head_dim": 32,
            "sliding_window": 64,
            "layer_types": MIXED,
            "mlp_layer_types": FIRST_DENSE,
        },
    ),
    "cohere2_moe": Architecture(
        "Cohere2MoeForCausalLM",
        {
            **MOE,
            "intermediate_size": 64,
            "head_dim": 32,
            "num_shared_experts": 1,
            "sliding_window": 64,
            "layer_types": MIXED,
            "mlp_layer_types": ["sparse"] * 3,
        },
    ),
    "lfm2_moe": Architecture(
        "Lfm2MoeForCausalLM",
        {**MOE, "num_dense_layers": 1, "layer_types": ["conv", "conv", "full_attention"]},
        tested=ALONE,
    ),
    "minimax_m2": Architecture(
        "MiniMaxM2ForCausalLM",
        # By sigmoid its router asserts on a CPU.
        {
            **LOCAL,
            "head_dim": 32,
            "rotary_dim": 32,
            "scoring_func": "softmax",
            "use_routing_bias": True,
        },
    ),
    "afmoe": Architecture(
        "AfmoeForCausalLM",
        {
            **MOE,
            "num_dense_layers": 1,
            "num_shared_experts": 1,
            "head_dim": 32,
            "sliding_window": 64,
            "layer_types": MIXED,
            "score_func": "sigmoid",
            "route_norm": True,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "hy_v3": Architecture(
        "HYV3ForCausalLM",
        {
            **MOE,
            "head_dim": 32,
            "num_shared_experts": 1,
            "first_k_dense_replace": 1,
            "route_norm": True,
            "qk_norm": True,
            "expert_hidden_dim": 64,
            "mlp_layer_types": FIRST_DENSE,
        },
    ),
    "laguna": Architecture(
        "LagunaForCausalLM",
        {
            **MOE,
            "head_dim": 32,
            "shared_expert_intermediate_size": 96,
            "layer_types": MIXED,
            "num_attention_heads_per_layer": [4, 4, 4],
            "mlp_layer_types": FIRST_DENSE,
        },
        tested=LAYER,
        no_cpu='AssertionError.*assert self.scoring_func == "softmax"',  # its router's
    ),
    "mimo_v2_flash": Architecture(
        "MiMoV2FlashForCausalLM",
        {
            **ROUTED,
            "head_dim": 32,
            "v_head_dim": 32,
            "sliding_window": 64,
            "layer_types": MIXED,
            "mlp_layer_types": FIRST_DENSE,
            "hybrid_layer_pattern": [1, 1, 0],
            "moe_layer_freq": [0, 1, 1],
            "n_group": 1,
            "topk_group": 1,
            "layernorm_epsilon": 1e-5,
            "sliding_window_size": 64,
            "swa_head_dim": 32,
            "swa_v_head_dim": 32,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
        },
    ),
    "kimi_linear": Architecture(
        "KimiLinearForCausalLM",
        {
            **{key: value for key, value in LATENT.items() if key != "q_lora_rank"},
            "num_experts": 8,
            "num_experts_per_token": 2,
            "moe_intermediate_size": 64,
            "intermediate_size": 128,
            "num_shared_experts": 1,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
            "mlp_layer_types": FIRST_DENSE,
            "linear_head_dim": 32,
            "linear_num_heads": 4,
            "model_max_length": 128,
        },
        tested=LAYER,
        no_cpu="mamba-block-size|cutlass",
    ),
    "jamba": Architecture(
        "JambaForCausalLM",
        {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "intermediate_size": 64,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "attn_layer_period": 3,
            "attn_layer_offset": 2,
            "mamba_dt_rank": 8,
            "use_mamba_kernels": False,
        },
        tested=LAYER,
        no_cpu="_lib_fn_wrapper|selective_scan_fwd",
    ),
    "nemotron_h": Architecture(
        "NemotronHForCausalLM",
        {
            **ROUTED,
            "layers_block_type": ["linear_attention", "moe", "full_attention"],
            "moe_shared_expert_intermediate_size": 96,
            "head_dim": 32,
            "ssm_state_size": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 32,
            "n_groups": 2,
            "chunk_size": 16,
            "use_mamba_kernels": False,
        },
        tested=LAYER,
        no_cpu="_lib_fn_wrapper|is_act_and_mul=False is supported only",
        activation=Activation("relu2"),
        not_exported="experts without a gate are not exported; serve the original checkpoint",
    ),
    "hy_v4": Architecture(
        "HYV4ForCausalLM",
        {
            **ROUTED,
            **LATENT,
            **INDEXED,
            "n_shared_experts": 1,
            "hc_mult": 2,
            "swiglu_limit": 2.0,
            "mlp_layer_types": FIRST_DENSE,
            # vLLM's own names.
            "num_experts": 8,
            "expert_hidden_dim": 64,
            "num_shared_experts": 1,
            "route_norm": True,
        },
        tested=LAYER,
        no_cpu="no valid sparse MLA backend",
        activation=Activation(limit=2.0),
    ),
    "glm5_next": Architecture(
        "Glm5NextForConditionalGeneration",
        {
            "text_config": {
                **COMMON,
                **ROUTED,
                **LATENT,
                **INDEXED,
                "qk_rope_head_dim": 0,
                "n_shared_experts": 1,
                "index_kpool": 4,
                "linear_head_dim": 32,
                "linear_num_heads": 4,
                "hc_mult": 2,
                "swiglu_limit": 2.0,
                "mlp_layer_types": FIRST_DENSE,
                "layer_types": ["linear_attention", "linear_attention", "indexed_attention"],
                "indexer_types": ["full"] * 3,
            },
            "vision_config": {**VISION, "image_size": 16, "projection_intermediate_size": 64},
        },
        tested=LAYER,
        no_cpu="mamba-block-size",
        activation=Activation(limit=2.0),
    ),
    "deepseek_v4": Architecture(
        "DeepseekV4ForCausalLM",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "num_key_value_heads": 1,
            "head_dim": 512,
            "qk_rope_head_dim": 64,
            "q_lora_rank": 32,
            "o_lora_rank": 32,
            "o_groups": 2,
            "index_topk": 128,
            "index_n_heads": 2,
            "index_head_dim": 128,
            "hc_mult": 4,
            "swiglu_limit": 2.0,
            "sliding_window": 64,
            "num_hash_layers": 1,
            "compress_ratios": [0, 4, 128],
        },
        tested=LAYER,
        no_cpu="convert_weight_packed",  # of CPUs with AVX-512
        published=published.deepseek_v4,
        activation=Activation(limit=2.0),
    ),
    # transformers loads no published checkpoint: it wants gate and up of zero experts.
    "longcat_flash": Architecture(
        "LongcatFlashForCausalLM",
        {
            **LATENT,
            # The sizes that vLLM's latent attention takes.
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "head_dim": 64,
            "num_hidden_layers": 6,  # of attention: two in a layer
            "n_routed_experts": 8,
            "zero_expert_num": 4,
            "moe_topk": 2,
            "expert_ffn_hidden_size": 64,
            "ffn_hidden_size": 128,
        },
        tested=ROUTED_HERE,
        no_cpu="topk_softmax",
        not_calibrated="transformers cannot load it",
        published=published.longcat_flash,
    ),
    "minimax_m3_vl": Architecture(
        "MiniMaxM3SparseForConditionalGeneration",
        {
            "text_config": {
                **COMMON,
                **LOCAL,
                "head_dim": 32,
                "rotary_dim": 16,
                "dense_intermediate_size": 128,
                "shared_intermediate_size": 96,
                "swiglu_limit": 2.0,
                "moe_layer_freq": [0, 1, 1],
            },
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 4,
            },
            "projector_hidden_size": 64,
        },
        tested=LAYER,
        no_cpu="No Unquantized MoE backend supports the deployment configuration",
        published=published.minimax_m3,
        activation=Activation(limit=2.0, alpha=1.702, beta=1.0),
    ),
    "phimoe": Architecture(
        "PhiMoEForCausalLM", {**LOCAL, "attention_bias": True, "lm_head_bias": True}
    ),
    "bailing": Architecture(
        "BailingMoeForCausalLM",
        {**BAILING, "norm_head": True},
        kind="qwen3_moe",
        tensors=listed_tensors.bailing(),
    ),
    "bailing_v2": Architecture(
        "BailingMoeV2ForCausalLM",
        {**BAILING, **BIASED},
        kind="qwen3_moe",
        tensors=listed_tensors.bailing("gate.expert_bias"),
    ),
    "sarvam": Architecture(
        "SarvamMoEForCausalLM",
        {**BAILING, **BIASED},
        kind="qwen3_moe",
        tensors=listed_tensors.bailing("gate.expert_bias"),
    ),
    "param2moe": Architecture(
        "Param2MoEForCausalLM",
        {**BAILING, **BIASED, "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        kind="step3p5",  # keeps `rope_theta`, which vLLM's class reads
        tensors=listed_tensors.bailing("gate.expert_bias"),
    ),
    "pangu_ultra_moe": Architecture(
        "PanguUltraMoEForCausalLM",
        {
            **ROUTED,
            "head_dim": 32,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.5,
            "router_enable_expert_bias": True,
            "sandwich_norm": True,
        },
        kind="glm4_moe",
        tensors=listed_tensors.pangu(),
    ),
    "k2_horizon": Architecture(
        "K2HorizonForCausalLM",
        {
            **MOE,
            "head_dim": 32,
            "num_shared_experts": 1,
            "mlp_only_layers": [0],
            "norm_topk_prob": True,
            "attention_gate_func": "silu",
            "layernorm_num_groups": 1,
            "mova_num_experts": 0,
            "moe_gate_bias": True,
            "query_key_norm": True,
            "rope_head_dim": 16,
            # By sigmoid its router asserts on a CPU.
            "router_score_func": "softmax",
            "router_scaling_factor": 1.0,
        },
        kind="qwen3_moe",
        tensors=listed_tensors.horizon(),
    ),
    "step3": Architecture(
        "Step3TextForCausalLM",
        {
            **STEP,
            "norm_expert_weight": True,
            "head_dim": 32,
            "share_q_dim": 64,
            "num_key_value_heads": 1,
            "num_attention_groups": 1,
            "max_position_embedding": 128,
            "rope_parameters": ROPE,
        },
        kind="step3_text",
        tensors=listed_tensors.step3(),
    ),
    "step3p5": Architecture(
        "Step3p5ForCausalLM",
        {
            **STEP,
            "head_dim": 32,
            "use_head_wise_attn_gate": True,
            "layer_types": MIXED,
            "sliding_window": 64,
            # Stock vLLM has no limit of routed experts on a CPU: see test_activations.py.
            "swiglu_limits": [0, 0, 0],
            "swiglu_limits_shared": [0, 16, 0],
            "num_attention_groups": 2,
            # By sigmoid its router asserts on a CPU.
            "moe_router_activation": "softmax",
        },
        tensors=listed_tensors.step(),
    ),
}
# Those whose 3-D tensors transformers saves one by one: both layouts are served.
PER_EXPERT = ("qwen3_moe", "qwen2_moe", "olmoe", "mixtral", "glm4_moe")
# Those that `make test` takes: groups, correction bias and a shared expert; biases; an activation
# and a block of its own; router weights on the input.
QUICK = ("glm4_moe", "gpt_oss", "gemma4", "llama4")
# Those of which config.json names the routed width apart from other widths.
NARROW = (
    *("qwen3_moe", "qwen2_moe", "qwen3_next", "mixtral", "olmoe", "gpt_oss", "gemma4"),
    *("granitemoe", "granitemoeshared", "granitemoe_swa", "granitemoehybrid", "lfm2_moe"),
    *("minimax_m2", "mimo_v2_flash", "phimoe", "laguna", "nemotron_h"),
)
