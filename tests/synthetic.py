"""A random checkpoint of some gigabytes, nearly all of it experts, to measure loading and serving.

    .venv/bin/python -m tests.synthetic DIRECTORY [--layers 8] [--experts 64] …

writes a bf16 Qwen3-MoE with the demo's tokenizer, one shard per layer and never more than one
tensor in memory beside the shard, and in DIRECTORY/atomic_profiles the profiles `quarter` and
`half`, named after what they prune. Widths spread as pruning spreads them: by expert, normally
around the mean with a fifth of it as the standard deviation.

Legend: E experts, H hidden size, I full intermediate size.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from vllm_atomic_moe.files.checkpoint import CheckpointInfo, describe_checkpoint
from vllm_atomic_moe.files.profiles import PruningProfile

TOKENIZER = Path(__file__).parents[1] / "deploy/demo/model"
RATIOS = {"quarter": 0.25, "half": 0.5}
SPREAD = 0.2
VOCABULARY = 4096  # of the demo's tokenizer


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the model. The defaults make 4.5 GiB of experts."""

    layers: int = 8
    experts: int = 64
    experts_per_token: int = 8
    hidden: int = 2048
    intermediate: int = 768

    @property
    def shard_bytes(self) -> int:
        """Expert weights of one layer."""
        return self.experts * 3 * self.hidden * self.intermediate * 2

    @property
    def expert_bytes(self) -> int:
        """Expert weights of all layers."""
        return self.layers * self.shard_bytes


def make_checkpoint(
    directory: Path, sizes: Sizes | None = None, ratios: dict[str, float] | None = None
) -> CheckpointInfo:
    """Write the checkpoint and its profiles, each pruned by its ratio."""
    import transformers

    sizes = sizes or Sizes()
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.hidden // 128,
        num_key_value_heads=2,
        head_dim=128,
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
    for path in TOKENIZER.glob("tokenizer*.json"):
        shutil.copy(path, directory)
    _write_shards(directory, {name: meta.shape for name, meta in state.items()}, sizes)
    info = describe_checkpoint(directory)
    for name, ratio in (RATIOS if ratios is None else ratios).items():
        write_profile(info, name, ratio, directory / "atomic_profiles")
    return info


def _write_shards(directory: Path, shapes: dict[str, torch.Size], sizes: Sizes) -> None:
    """One shard per layer and one for the rest, drawn when its turn comes."""
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        shard = f"model-{name.split('.')[2] if 'layers' in name else 'rest'}.safetensors"
        if name != "lm_head.weight":  # tied
            shards.setdefault(shard, {}).update(_as_stored(name, shape, sizes))
    for shard, stored in shards.items():
        tensors = {name: _draw(shape) for name, shape in stored.items()}
        save_file(tensors, directory / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, stored in shards.items() for name in stored}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


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
    """Weights under which activations stay of the order of one: norms are ones."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape).normal_(std=shape[1] ** -0.5).bfloat16()


def write_profile(model: CheckpointInfo, name: str, ratio: float, directory: Path) -> None:
    """Write a profile that prunes about `ratio` of the atoms; a lower ratio's holds a higher's."""
    generator = torch.Generator().manual_seed(0)
    share = 1 - ratio
    keep = {}
    for layer in model.layers:
        drawn_E1 = torch.randn(model.num_experts, 1, generator=generator)
        # Centred, and cut on both sides alike, so that the mean stays.
        limit = min(share, ratio)
        spread_E1 = (SPREAD * share * (drawn_E1 - drawn_E1.mean())).clamp(-limit, limit)
        width_E1 = share + spread_E1
        rank_EI = torch.rand(model.num_experts, model.intermediate_size, generator=generator)
        order_EI = rank_EI.argsort(dim=1).argsort(dim=1)
        keep[layer] = order_EI < (width_E1 * model.intermediate_size).round()
    metadata = {"model": json.dumps(model.identity()), "method": "synthetic", "ratio": str(ratio)}
    PruningProfile(name, keep, metadata=metadata).write(directory / f"{name}.safetensors")


def main() -> None:
    """Write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    for field in dataclasses.fields(Sizes):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, dest=field.name, type=int, default=field.default)
    arguments = vars(parser.parse_args())
    directory = arguments.pop("directory")
    directory.mkdir(parents=True, exist_ok=True)
    sizes = Sizes(**arguments)
    make_checkpoint(directory, sizes)
    print(f"{directory}: {sizes.expert_bytes / 2**30:.2f} GiB of experts")


if __name__ == "__main__":
    main()
