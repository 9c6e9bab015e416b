"""What the checkpoint on disk says about its routed experts, without building the model.

The loader and `atomic-moe check` check profiles against this description before they read any
expert weight. It reads only safetensors headers, `config.json` and the (small) router tensors, and
knows the layouts of `layouts.py`.

Legend: E experts, H hidden size, I full intermediate size, K experts per token, L layers.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vllm_atomic_moe.files.export_format import (
    INDEX,
    stored_masks,
    weights_directory,
)
from vllm_atomic_moe.files.layouts import ExpertTensor, expert_tensor
from vllm_atomic_moe.files.tensors import open_safetensors, read_tensor

# Files to fetch from a hub model; the last line is for the copies that `atomic-moe export` makes.
HUB_PATTERNS = (
    *("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"),
    *("*.tiktoken", "*.py", "LICENSE*", "NOTICE*", "README.md"),
)
# Inside a MoE block: modules of the router, and the correction bias where it stands beside them.
ROUTER_MODULES = ("gate.", "router.", "moe_statics.", "e_score_correction_bias", "expert_bias")
EXPERTS_PER_TOKEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
)

# The correction bias among them: it takes part in the choice of experts, not in their weights.
CORRECTION_BIAS = ("e_score_correction_bias", "expert_bias")


@dataclass(frozen=True, slots=True)
class ExpertGroups:
    """A router that first chooses groups of neighboring experts, then experts inside them.

    Attributes:
        number: groups; each holds E / number experts.
        chosen: groups a token may use.
        biased: a group's score is the sum of its two best scores, correction bias included; without
            a bias it is the best score.
    """

    number: int
    chosen: int
    biased: bool

    def fault(self, routable_E: torch.Tensor, experts_per_token: int) -> str | None:
        """What a routing mask leaves too little of, in words; None if every choice is right.

        Groups without routable experts score lowest, so that they are chosen only where fewer than
        `chosen` others exist. Wrong is a choice of groups that holds fewer than K routable experts
        (the rest would be pruned ones), and a group whose score counts a pruned expert.
        """
        if routable_E.numel() % self.number:
            return None
        counts = routable_E.view(self.number, -1).sum(dim=1).tolist()
        selectable = sorted(count for count in counts if count)
        if self.biased and len(selectable) > self.chosen and selectable[0] == 1:
            return (
                f"leaves {counts} experts in the router's groups, which it scores by their two "
                "best; keep at least two of a group, or none"
            )
        fewest = sum(selectable[: self.chosen])
        if fewest < experts_per_token:
            return (
                f"leaves {counts} experts in the router's groups; the {self.chosen} it chooses may "
                f"hold {fewest}, a token uses {experts_per_token}: keep at least as many"
            )
        return None


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """The routed experts of a checkpoint.

    Attributes:
        architecture: first entry of `architectures` in config.json.
        num_experts: E, the same in every MoE layer.
        experts_per_token: K.
        intermediate_size: I, atoms per expert.
        hidden_size: H.
        layers: decoder layer indices that hold routed experts, ascending.
        router_sha256: SHA-256 (hex) over the router tensors' stored bytes, in layer order.
        groups: the router's expert groups; None where it chooses among all experts.
        blocks: layer index -> name of its MoE block; its experts are under `{block}.experts.`.
        stored: of an exported checkpoint, layer index -> bool [E, I], the atoms it holds; None for
            an original. It is not part of the model's identity.
    """

    architecture: str
    num_experts: int
    experts_per_token: int
    intermediate_size: int
    hidden_size: int
    layers: tuple[int, ...]
    router_sha256: str
    groups: ExpertGroups | None = None
    blocks: Mapping[int, str] = field(default_factory=dict, compare=False)
    stored: Mapping[int, torch.Tensor] | None = field(default=None, compare=False)

    @property
    def atoms(self) -> int:
        """Atoms of all experts of all layers: L·E·I."""
        return len(self.layers) * self.num_experts * self.intermediate_size

    def identity(self) -> dict[str, Any]:
        """The part that goes into a profile's `model` metadata."""
        return {
            "architecture": self.architecture,
            "num_experts": self.num_experts,
            "intermediate_size": self.intermediate_size,
            "hidden_size": self.hidden_size,
            "layers": list(self.layers),
            "router_sha256": self.router_sha256,
        }


@dataclass(slots=True)
class _Layer:
    """Facts gathered about one MoE layer while walking the tensor names."""

    block: str
    experts: set[int] = field(default_factory=set)
    num_fused: int = 0
    intermediate_sizes: set[int] = field(default_factory=set)


def resolve_model(model: str, revision: str | None = None, cache_dir: str | None = None) -> Path:
    """The directory of MODEL: itself if it is one, else the Hugging Face snapshot of that id.

    Of a hub model the safetensors checkpoint, configuration, tokenizer and `atomic_profiles/` are
    fetched, into `cache_dir` or the default cache.

    Raises:
        ValueError: MODEL is neither a directory nor a model the hub (or its cache) has.
    """
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                cache_dir=cache_dir,
                allow_patterns=[*HUB_PATTERNS],
                ignore_patterns=["original/*", "consolidated*"],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"model {model!r} is neither a directory nor a model on the Hugging Face Hub "
            f"({type(error).__name__}); check the path or the id"
        ) from error


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of the text model, with `architectures` of the outer one.

    Raises:
        ValueError: the file is missing, not a JSON object, or does not say `hidden_size`.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a model configuration ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: holds {type(config).__name__}, wanted a JSON object")
    text = config.get("text_config")
    if isinstance(text, dict):
        config = {**text, "architectures": config.get("architectures", text.get("architectures"))}
    if not isinstance(config.get("hidden_size"), int):
        raise ValueError(f"{path}: `hidden_size` is {config.get('hidden_size')!r}, wanted a number")
    for key, kind, wanted in (
        ("num_hidden_layers", int, "a number"),
        ("architectures", list, "a list of names"),
    ):
        if config.get(key) is None:
            config.pop(key, None)
        elif not isinstance(config[key], kind):
            raise ValueError(f"{path}: `{key}` is {config[key]!r:.80}, wanted {wanted}")
    return config


def checkpoint_files(directory: Path) -> list[Path]:
    """The safetensors shards of a checkpoint: those of the index, if there is one.

    Raises:
        ValueError: the directory holds no safetensors file, or the index names a missing one.
    """
    directory = weights_directory(directory)
    index = directory / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{index}: no index with a weight_map ({type(error).__name__}); fetch it again"
            ) from None
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise ValueError(f"{index}: names {missing[0]}, which is not there; fetch it again")
        return [directory / name for name in names]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{directory}: holds no *.safetensors file; atomic profiles need a safetensors "
            "checkpoint (convert it with transformers' save_pretrained)"
        )
    return files


def describe_checkpoint(directory: Path) -> CheckpointInfo:
    """Describe the routed experts of the checkpoint in `directory`.

    Raises:
        ValueError: no routed experts, experts of unequal number or width, no router tensors, or a
            configuration that does not say how many experts a token uses; an exported checkpoint
            whose packed rows, offsets and masks do not fit together.
    """
    config = read_config(directory)
    where = locate_tensors(directory)
    num_layers = int(config.get("num_hidden_layers", 1 << 30))
    layers = _gather_layers(where, config["hidden_size"], num_layers)
    if not layers:
        raise ValueError(
            f"{directory}: no routed experts among {len(where)} tensors; "
            "atomic profiles apply to Mixture-of-Experts checkpoints"
        )
    num_experts = {layer.num_fused or len(layer.experts) for layer in layers.values()}
    sizes = {size for layer in layers.values() for size in layer.intermediate_sizes}
    if len(num_experts) != 1 or len(sizes) != 1:
        raise ValueError(
            f"{directory}: layers have {sorted(num_experts)} experts of intermediate size "
            f"{sorted(sizes)}; one number and one size for all layers are supported"
        )
    blocks = {index: layer.block for index, layer in sorted(layers.items())}
    return CheckpointInfo(
        architecture=(config.get("architectures") or ["unknown"])[0],
        num_experts=num_experts.pop(),
        experts_per_token=_experts_per_token(config, directory),
        intermediate_size=sizes.pop(),
        hidden_size=config["hidden_size"],
        layers=tuple(sorted(layers)),
        router_sha256=_router_digest(where, layers),
        groups=_expert_groups(config, where),
        blocks=blocks,
        stored=(
            stored_masks(where, blocks, config["hidden_size"])
            if weights_directory(directory) != directory
            else None
        ),
    )


def _experts_per_token(config: dict[str, Any], directory: Path) -> int:
    for key in EXPERTS_PER_TOKEN:
        if isinstance(config.get(key), int):
            return config[key]
    raise ValueError(
        f"{directory}/config.json: none of {', '.join(EXPERTS_PER_TOKEN)} says how many experts "
        "a token uses"
    )


def _expert_groups(config: dict[str, Any], where: dict[str, Path]) -> ExpertGroups | None:
    number, chosen = config.get("n_group"), config.get("topk_group")
    if not isinstance(number, int) or not isinstance(chosen, int) or number < 2:
        return None
    return ExpertGroups(number, chosen, any(name.endswith(CORRECTION_BIAS) for name in where))


def locate_tensors(directory: Path) -> dict[str, Path]:
    """Tensor name -> shard that holds it.

    Raises:
        ValueError: as `checkpoint_files`, or a shard cannot be read.
    """
    where: dict[str, Path] = {}
    for path in checkpoint_files(directory):
        with open_safetensors(path) as (_, shard):
            where.update(dict.fromkeys(shard.keys(), path))
    return where


def _gather_layers(where: dict[str, Path], hidden_size: int, num_layers: int) -> dict[int, _Layer]:
    """MoE layers by index, without multi-token-prediction layers (index too high, or `mtp.`)."""
    layers: dict[int, _Layer] = {}
    by_file: dict[Path, list[tuple[str, ExpertTensor]]] = defaultdict(list)
    for name, path in where.items():
        tensor = expert_tensor(name)
        # In every layout one of these shapes says how many experts there are, and their size.
        if tensor is None or tensor.part not in ("down", "keep"):
            continue
        if tensor.layer < num_layers and "mtp" not in name.split("."):
            by_file[path].append((name, tensor))
    for path, entries in by_file.items():
        with open_safetensors(path) as (_, shard):
            for name, tensor in entries:
                layer = layers.setdefault(tensor.layer, _Layer(tensor.block))
                if layer.block != tensor.block:
                    raise ValueError(
                        f"layer {tensor.layer}: routed experts under {layer.block} and "
                        f"{tensor.block}; one MoE block per decoder layer is supported"
                    )
                shape = shard.get_slice(name).get_shape()
                if tensor.expert is not None:
                    layer.experts.add(tensor.expert)
                else:
                    layer.num_fused = shape[0]
                rows, columns = shape[-2:]
                upright = tensor.part == "keep" or rows == hidden_size
                layer.intermediate_sizes.add(columns if upright else rows)
    return layers


def _router_digest(where: dict[str, Path], layers: dict[int, _Layer]) -> str:
    """SHA-256 over the stored bytes of the router tensors, layers ascending, names ascending."""
    digest = hashlib.sha256()
    for index in sorted(layers):
        block = layers[index].block
        prefixes = tuple(f"{block}.{module}" for module in ROUTER_MODULES)
        names = sorted(name for name in where if name.startswith(prefixes))
        if not names:
            raise ValueError(
                f"layer {index}: no router tensor under {block}.gate or {block}.router; "
                "this architecture's router is not known"
            )
        for name in names:
            stored = read_tensor(where[name], name).contiguous().view(-1).view(torch.uint8)
            digest.update(stored.numpy().tobytes())
    return digest.hexdigest()
