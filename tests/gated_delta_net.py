"""Tiny random Qwen3-Next and Qwen3.5: linear attention, in the latter also a vision tower.

In bfloat16, the only dtype of vLLM's linear attention on CPUs.
"""

from __future__ import annotations

import torch
import transformers
from safetensors.torch import save_file

from tests.architectures import COMMON
from vllm_atomic_moe.files.checkpoint import describe_checkpoint

TEXT = {
    **COMMON,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 96,
    "head_dim": 32,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
SPECIAL = {"image_pad": 250, "video_pad": 251, "vision_start": 252, "vision_end": 253}
VISION = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 4,
    "patch_size": 4,
    "out_hidden_size": 128,
    "num_position_embeddings": 64,
}


def make_qwen3_next():
    """Per-expert tensors, as transformers saves them."""
    config = transformers.Qwen3NextConfig(**TEXT, intermediate_size=96)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def make_qwen3_5():
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    rope |= {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
    config = transformers.Qwen3_5MoeConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config=VISION,
        image_token_id=SPECIAL["image_pad"],
        video_token_id=SPECIAL["video_pad"],
        vision_start_token_id=SPECIAL["vision_start"],
        vision_end_token_id=SPECIAL["vision_end"],
    )
    return transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)


def save_random(model, directory, *, fused):
    """Save random weights, large enough to matter, in the layout of real checkpoints."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    model.save_pretrained(directory)
    if fused:
        save_file(model.state_dict(), directory / "model.safetensors", metadata={"format": "pt"})
    return describe_checkpoint(directory)
