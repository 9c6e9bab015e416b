"""A random checkpoint, nearly all of it experts, to measure loading, serving and calibration.

It is a bf16 Qwen3-MoE with profiles of ragged widths. Its text is meaningless; its sizes, and so
its time and memory, are those of a real model.

Legend: E experts, H hidden size, I full intermediate size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from vllm_atomic_moe.files.checkpoint import CheckpointInfo, describe_checkpoint
from vllm_atomic_moe.files.layouts import atom_bytes
from vllm_atomic_moe.files.profiles import PruningProfile

RATIOS = {"pruned-25": 0.25, "pruned-50": 0.5}
# Standard deviation of an expert's width, as a fraction of the mean width.
SPREAD = 0.2
VOCABULARY = 4096
HEAD_SIZE = 128


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of the model. The defaults make 1.1 GiB of experts, 97 % of the weights."""

    layers: int = 6
    experts: int = 32
    experts_per_token: int = 4
    hidden: int = 1024
    intermediate: int = 1024

    @property
    def shard_bytes(self) -> int:
        """Expert weights of one layer."""
        return self.experts * self.intermediate * atom_bytes(self.hidden, itemsize=2)

    @property
    def expert_bytes(self) -> int:
        """Expert weights of all layers."""
        return self.layers * self.shard_bytes


def make_checkpoint(
    directory: Path, sizes: Sizes | None = None, ratios: Mapping[str, float] = RATIOS
) -> CheckpointInfo:
    """Write a checkpoint, one shard per layer, and its `atomic_profiles/`.

    Args:
        directory: where to write it; created if missing.
        sizes: of the model.
        ratios: name of each profile -> fraction of the atoms that it prunes.
    """
    import transformers

    sizes = sizes or Sizes()
    heads = sizes.hidden // HEAD_SIZE
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=heads,
        num_key_value_heads=min(2, heads),
        head_dim=HEAD_SIZE,
        num_experts=sizes.experts,
        num_experts_per_tok=sizes.experts_per_token,
        norm_topk_prob=True,
        moe_intermediate_size=sizes.intermediate,
        intermediate_size=sizes.intermediate,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        dtype="bfloat16",
    )
    config.architectures = ["Qwen3MoeForCausalLM"]
    with torch.device("meta"):
        state = transformers.AutoModelForCausalLM.from_config(config).state_dict()
    config.save_pretrained(directory)
    _write_tokenizer(directory)
    _write_shards(directory, {name: meta.shape for name, meta in state.items()}, sizes)
    info = describe_checkpoint(directory)
    for name, ratio in ratios.items():
        _write_profile(info, name, ratio, directory / "atomic_profiles")
    return info


def _write_tokenizer(directory: Path) -> None:
    """One word per token, so that any sequence of tokens survives a round trip through text."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    end, unknown = "<end>", "<unknown>"
    words = [end, unknown, *(f"w{number}" for number in range(2, VOCABULARY))]
    ids = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=unknown))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=unknown
    ).save_pretrained(directory)


def _write_shards(directory: Path, shapes: dict[str, torch.Size], sizes: Sizes) -> None:
    """One shard per layer and one for the rest, each drawn when it is needed."""
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        shard = f"model-{name.split('.')[2] if 'layers' in name else 'rest'}.safetensors"
        if name != "lm_head.weight":  # tied
            shards.setdefault(shard, {}).update(_as_stored(name, shape, sizes))
    for shard, stored in shards.items():
        tensors = {name: _draw(shape) for name, shape in stored.items()}
        save_file(tensors, directory / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, stored in shards.items() for name in stored}
    total = sum((directory / shard).stat().st_size for shard in shards)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _as_stored(name: str, shape: torch.Size, sizes: Sizes) -> dict[str, torch.Size]:
    """Names and shapes on disk: transformers holds the experts in two 3-D tensors."""
    if ".experts." not in name:
        return {name: shape}
    prefix, _, fused = name.rpartition(".")
    parts = ("gate_proj", "up_proj") if fused == "gate_up_proj" else ("down_proj",)
    matrix = torch.Size((shape[1] // len(parts), shape[2]))
    return {
        f"{prefix}.{expert}.{part}.weight": matrix
        for expert in range(sizes.experts)
        for part in parts
    }


def _draw(shape: torch.Size) -> torch.Tensor:
    """Weights that keep activations near one; norms are ones."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape).normal_(std=shape[1] ** -0.5).bfloat16()


def _write_profile(model: CheckpointInfo, name: str, ratio: float, directory: Path) -> None:
    """Write a profile that prunes about `ratio` of the atoms.

    Widths vary by expert, normally distributed, as after pruning. The atoms of a lower ratio
    include those of a higher one.
    """
    generator = torch.Generator().manual_seed(0)
    share = 1 - ratio
    keep = {}
    for layer in model.layers:
        drawn_E1 = torch.randn(model.num_experts, 1, generator=generator)
        # Centered, and cut equally on both sides, to keep the mean.
        limit = min(share, ratio)
        spread_E1 = (SPREAD * share * (drawn_E1 - drawn_E1.mean())).clamp(-limit, limit)
        width_E1 = share + spread_E1
        rank_EI = torch.rand(model.num_experts, model.intermediate_size, generator=generator)
        order_EI = rank_EI.argsort(dim=1).argsort(dim=1)
        keep[layer] = order_EI < (width_E1 * model.intermediate_size).round()
    metadata = {"model": json.dumps(model.identity()), "method": "random", "ratio": str(ratio)}
    PruningProfile(name, keep, metadata=metadata).write(directory / f"{name}.safetensors")
