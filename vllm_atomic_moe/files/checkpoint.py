"""The routed experts of a checkpoint on disk, without building the model.

The loader and `atomic-moe check` check profiles against this description before they read any
expert weight. It reads only safetensors headers, `config.json` and the (small) router tensors, and
knows the layouts of `layouts.py`.

Legend: E experts, H hidden size, I full intermediate size, K experts per token, L layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import torch

from vllm_atomic_moe.files.agreement import (
    LayerFacts,
    check_activation_order,
    check_choice,
    check_dense_layers,
    check_depth,
    check_latent_experts,
    check_layout,
    check_routers,
    count_experts,
    intermediate_size,
    is_prediction,
    router_groups,
    shape_by_expert,
)
from vllm_atomic_moe.files.config import (
    MISTRAL,
    check_encodings,
    experts_per_token,
    quantization_settings,
    read_config,
)
from vllm_atomic_moe.files.export_format import (
    INDEX,
    stored_masks,
    stored_schemes,
    weights_directory,
)
from vllm_atomic_moe.files.hub import fetch
from vllm_atomic_moe.files.layouts import ExpertTensor, quantized_tensor
from vllm_atomic_moe.files.plain_files import read_json_object
from vllm_atomic_moe.files.quantization import (
    IGNORED,
    MATRICES,
    PLAIN_SCHEME,
    Part,
    Scheme,
    check_told,
    scheme_of_down,
)
from vllm_atomic_moe.files.router import (
    CORRECTION_BIAS,
    ExpertGroups,
    RouterIdentity,
    identify_router,
    router_names,
)
from vllm_atomic_moe.files.tensors import open_safetensors, safetensors_files, shorten

# Files to fetch for a hub model; the last line is for the copies that `atomic-moe export` makes.
HUB_PATTERNS = (
    *("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"),
    *("*.tiktoken", "*.py", "LICENSE*", "NOTICE*", "README.md"),
)


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """The routed experts of a checkpoint.

    Attributes:
        architecture: first entry of `architectures` in config.json.
        num_experts: E, the same in every MoE layer.
        experts_per_token: K.
        intermediate_size: I, atoms per expert.
        hidden_size: H.
        layers: indices of decoder layers with routed experts, ascending.
        router: identifies its routers.
        groups: the router's expert groups; None if it chooses among all experts.
        blocks: layer index -> name of its MoE block; its experts are under `{block}.experts.`.
        schemes: layer index -> how its experts are quantized.
        stored: layer index -> bool [E, I], the atoms of an exported checkpoint; None for an
            original. It is not part of the model's identity.
    """

    architecture: str
    num_experts: int
    experts_per_token: int
    intermediate_size: int
    hidden_size: int
    layers: tuple[int, ...]
    router: RouterIdentity
    groups: ExpertGroups | None = None
    blocks: Mapping[int, str] = field(default_factory=dict, compare=False)
    schemes: Mapping[int, Scheme] = field(default_factory=dict, compare=False)
    stored: Mapping[int, torch.Tensor] | None = field(default=None, compare=False)

    @property
    def atoms(self) -> int:
        """Atoms of all experts of all layers: L·E·I."""
        return len(self.layers) * self.num_experts * self.intermediate_size

    def scheme(self, layer: int) -> Scheme:
        """How the experts of a layer are quantized."""
        return self.schemes.get(layer, PLAIN_SCHEME)

    @property
    def row_formats(self) -> dict[str, list[int]]:
        """Description of a quantization -> layers that have it."""
        found: dict[str, list[int]] = defaultdict(list)
        for layer in self.layers:
            found[self.scheme(layer).name].append(layer)
        return dict(found)

    def identity(self) -> dict[str, Any]:
        """The part that goes into a profile's `model` metadata."""
        return {
            "architecture": self.architecture,
            "num_experts": self.num_experts,
            "intermediate_size": self.intermediate_size,
            "hidden_size": self.hidden_size,
            "layers": list(self.layers),
            "router_sha256": self.router.sha256,
            "router_sample": list(self.router.sample),
        }


def resolve_model(model: str, revision: str | None = None, cache_dir: str | None = None) -> Path:
    """The directory of MODEL: itself if it is one, else the Hugging Face snapshot of that id.

    For a hub model it fetches the safetensors checkpoint, configuration, tokenizer and
    `atomic_profiles/` into `cache_dir` or the default cache.

    Raises:
        ValueError: MODEL is neither a directory nor a model of the hub (or its cache), or the hub
            cannot be asked (for example, httpx does not accept a proxy of the environment).
    """
    if Path(model).is_dir():
        return Path(model)
    wanted = f"model {model!r}", model, revision, cache_dir, HUB_PATTERNS
    directory = fetch(*wanted, ("original/*", "consolidated*"))
    if (directory / MISTRAL).is_file() and not safetensors_files(directory):
        directory = fetch(*wanted, ("original/*",))
    return directory


def checkpoint_files(directory: Path) -> list[Path]:
    """The safetensors shards of a checkpoint; those of the index, if it has one.

    Raises:
        ValueError: the directory has no safetensors file, or the index names a missing one, or one
            outside the directory.
    """
    directory = weights_directory(directory)
    index = directory / INDEX
    if index.is_file():
        content = read_json_object(index)
        try:
            names = sorted(set(content["weight_map"].values()))
        except (KeyError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{index}: no index with a weight_map ({type(error).__name__}); fetch it again"
            ) from None
        for name in names:
            place = PurePath(name) if isinstance(name, str) else None
            if place is None or place.is_absolute() or ".." in place.parts:
                raise ValueError(
                    f"{index}: names {shorten(name)}, wanted files of this directory; fetch it "
                    "again"
                )
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise ValueError(f"{index}: names {missing[0]}, which is not there; fetch it again")
        return [directory / name for name in names]
    files = safetensors_files(directory)
    if not files:
        raise ValueError(
            f"{directory}: holds no *.safetensors file; atomic profiles need a safetensors "
            "checkpoint (convert it with transformers' save_pretrained)"
        )
    return files


def describe_checkpoint(directory: Path) -> CheckpointInfo:
    """Describe the routed experts of the checkpoint in `directory`.

    Raises:
        ValueError: no routed experts; experts in a latent space, in an unknown layout, with an
            unknown quantization or another than config.json says, of unequal width, in another
            number than the router or config.json say, or in other layers; no router tensors; an
            exported checkpoint with packed rows, offsets and masks that do not fit together.
    """
    check_encodings(directory)
    config = read_config(directory)
    check_latent_experts(directory, config)
    where = locate_tensors(directory)
    settings = quantization_settings(directory, config)
    layers = _gather_layers(where, config, settings)
    check_depth(directory, config, where, layers)
    num_layers = config.get("num_hidden_layers", 1 << 30)
    layers = {index: layer for index, layer in layers.items() if index < num_layers}
    check_layout(directory, config, where, layers, num_layers)
    exported = weights_directory(directory) != directory
    if exported:
        for index, scheme in stored_schemes(directory, sorted(layers)).items():
            layers[index].scheme = scheme
    num_experts = count_experts(directory, config, layers)
    for layer in layers.values():
        check_told(directory, settings, layer.scheme, layer.matrix)
    check_activation_order(where, layers)
    size = intermediate_size(directory, config, layers)
    check_dense_layers(directory, config, layers)
    blocks = {index: layer.block for index, layer in sorted(layers.items())}
    routers = router_names(where, blocks)
    check_routers(directory, config, where, routers, num_experts)
    top_k = experts_per_token(directory, config)
    biased = any(name.endswith(CORRECTION_BIAS) for name in where)
    groups = router_groups(directory, config, biased, num_experts)
    check_choice(directory, top_k, num_experts, groups)
    schemes = {index: layer.scheme for index, layer in sorted(layers.items())}
    return CheckpointInfo(
        architecture=(config.get("architectures") or ["unknown"])[0],
        num_experts=num_experts,
        experts_per_token=top_k,
        intermediate_size=size,
        hidden_size=config["hidden_size"],
        layers=tuple(sorted(layers)),
        router=identify_router(where, [name for names in routers.values() for name in names]),
        groups=groups,
        blocks=blocks,
        schemes=schemes,
        stored=stored_masks(where, blocks, schemes, config["hidden_size"]) if exported else None,
    )


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


def _gather_layers(
    where: Mapping[str, Path], config: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[int, LayerFacts]:
    """MoE layers by index, including those of multi-token prediction after the decoder's.

    Args:
        settings: the quantization settings of its configuration.
    """
    hidden_size = config["hidden_size"]
    layers: dict[int, LayerFacts] = {}
    by_file: dict[Path, list[tuple[str, ExpertTensor]]] = defaultdict(list)
    for name, path in where.items():
        tensor = quantized_tensor(name)
        if tensor is None or is_prediction(name):
            continue
        layer = layers.setdefault(tensor.layer, LayerFacts(tensor.block))
        if layer.block != tensor.block:
            raise ValueError(
                f"layer {tensor.layer}: routed experts under {layer.block} and {tensor.block}; "
                "one MoE block per decoder layer is supported"
            )
        layer.parts[tensor.part] += tensor.quantity in MATRICES
        layer.quantities[tensor.part, tensor.quantity] += 1
        # The per-expert layout has the most tensors; its down projections suffice.
        known = tensor.quantity not in (*IGNORED, "bias")
        if known and (tensor.expert is None or tensor.part == "down"):
            by_file[path].append((name, tensor))
    matrices: dict[tuple[int, str, int | None], dict[str, Part]] = defaultdict(dict)
    stems: dict[tuple[int, int], str] = {}  # of down, as the checkpoint spells it
    for path, entries in by_file.items():
        with open_safetensors(path) as (_, shard):
            for name, tensor in entries:
                entry = shard.get_slice(name)
                shape = tuple(entry.get_shape())
                if tensor.expert is None and not tensor.packed:
                    shape = shape_by_expert(config, shape)
                told = (entry.get_dtype(), shape)
                matrices[tensor.layer, tensor.part, tensor.expert][tensor.quantity] = told
                if tensor.expert is not None:
                    stems[tensor.layer, tensor.expert] = name.rpartition(".")[0]
    for (index, part, expert), parts in matrices.items():
        layer = layers[index]
        if part == "down":
            if expert is None:
                matrix = f"{layer.block}.experts.down_proj"
            else:
                matrix = layer.matrix = stems[index, expert]
            scheme, size = scheme_of_down(matrix, parts, hidden_size, settings)
            if layer.scheme not in (scheme, PLAIN_SCHEME):
                raise ValueError(
                    f"{matrix}: quantized as {scheme.name}, others of its layer as "
                    f"{layer.scheme.name}; fetch the checkpoint again"
                )
            layer.scheme = scheme
        if "blocks" in parts:
            experts, rows, groups, _ = parts["blocks"][1]
            layer.whole[part] = (experts, rows, groups * 32)
        elif expert is None:
            layer.whole[part] = next(iter(parts.values()))[1]
        else:
            plain = scheme.plain
            layer.down[expert] = parts["weight"][1] if plain else (hidden_size, size)
    return layers
