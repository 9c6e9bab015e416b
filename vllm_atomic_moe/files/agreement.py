"""Check that a checkpoint's tensors, its routers and its config.json describe the same experts.

Half a download, a sibling's config.json and an unknown layout all look like a smaller model at
first. Every function refuses with one line that says what disagrees.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_atomic_moe.files.config import (
    EXPERT_GROUPS,
    LATENT_EXPERTS,
    declared_experts,
    decoder_layers,
    dense_layers,
    prediction_layers,
)
from vllm_atomic_moe.files.layouts import FUSED, PER_EXPERT, decoder_layer, quantized_tensor
from vllm_atomic_moe.files.quantization import IGNORED, PLAIN_SCHEME, Scheme
from vllm_atomic_moe.files.router import CORRECTION_BIAS, ExpertGroups, expert_groups
from vllm_atomic_moe.files.tensors import open_safetensors, read_tensor

# Tensors that multi-token prediction adds to a layer that is otherwise a decoder layer.
PREDICTION = re.compile(r"\.(?:eh_proj|enorm|hnorm)\.")


@dataclass(slots=True)
class LayerFacts:
    """Facts gathered about one MoE layer while walking the tensor names.

    Attributes:
        block: name of the MoE block.
        parts: part -> number of its matrices.
        quantities: (part, quantity) -> number of tensors.
        scheme: how the experts are quantized.
        matrix: name of a down projection as quantization settings may spell it; "" in an exported
            checkpoint, which has lost those names.
        down: shape of each expert's own down projection; unpacked.
        whole: part -> shape of a tensor of all experts; unpacked.
    """

    block: str
    parts: Counter[str] = field(default_factory=Counter)
    quantities: Counter[tuple[str, str]] = field(default_factory=Counter)
    scheme: Scheme = PLAIN_SCHEME
    matrix: str = ""
    down: dict[int, tuple[int, ...]] = field(default_factory=dict)
    whole: dict[str, tuple[int, ...]] = field(default_factory=dict)


def check_latent_experts(directory: Path, config: Mapping[str, Any]) -> None:
    """Refuse experts in a latent space."""
    for key in LATENT_EXPERTS:
        if config.get(key) is not None:
            raise ValueError(
                f"not served by this version: experts in a latent space ({directory}/config.json: "
                f"{key} {config[key]!r:.40}); serve the model dense"
            )


def check_depth(
    directory: Path,
    config: Mapping[str, Any],
    where: Mapping[str, Path],
    layers: Mapping[int, LayerFacts],
) -> None:
    """Refuse files with more or fewer decoder layers than config.json says."""
    number = decoder_layers(config)
    if number is None or not layers:
        return
    of_prediction = {decoder_layer(name) for name in where if PREDICTION.search(name)}
    last = number + prediction_layers(config)
    if beyond := [layer for layer in layers if layer >= last and layer not in of_prediction]:
        raise ValueError(
            f"{directory}: config.json says num_hidden_layers {number}, the files hold routed "
            f"experts of layer {max(beyond)}; is this the right config.json?"
        )
    index, facts = next(iter(layers.items()))
    decoder = re.sub(rf"(\b(?:layers|blocks)\.){index}\b.*", r"\1", facts.block)
    there = {decoder_layer(name) for name in where if name.startswith(decoder)}
    if absent := sorted(set(range(number)) - there):
        raise ValueError(
            f"{directory}: config.json says num_hidden_layers {number}, the files hold nothing of "
            f"layer {absent[0]}; fetch the checkpoint again, or its config.json"
        )


def check_layout(
    directory: Path,
    config: Mapping[str, Any],
    where: Mapping[str, Path],
    layers: Mapping[int, LayerFacts],
    num_layers: int,
) -> None:
    """Refuse experts that are not in the table of layouts, by name."""
    strange = [
        name
        for name in where
        if "experts" in name.split(".") and quantized_tensor(name) is None
        if (layer := decoder_layer(name)) is not None
        and layer < num_layers
        and not is_prediction(name)
    ]
    strange = [name for name in strange if decoder_layer(name) not in layers]
    if not layers and not strange:
        counts = set(declared_experts(config).values()) - {0, 1}
        strange = [name for name in where if _is_fused_expert(where, name, counts, num_layers)]
    if strange:
        name = min(strange, key=lambda name: (decoder_layer(name), name))
        raise ValueError(
            f"{directory}: routed experts in a layout that is not known: {name} "
            f"{_shape(where, name)}"
        )
    if not layers:
        raise ValueError(
            f"{directory}: no routed experts among {len(where)} tensors; "
            "atomic profiles apply to Mixture-of-Experts checkpoints"
        )


def shape_by_expert(config: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape [E·N, K] of stacked matrices as [E, N, K]; others as they are."""
    number = next(iter(declared_experts(config).values()), 0)
    if len(shape) != 2 or not number or shape[0] % number:
        return shape
    return number, shape[0] // number, shape[1]


def is_prediction(name: str) -> bool:
    """Whether a tensor belongs to a multi-token-prediction head."""
    return "mtp" in name.split(".")


def _is_fused_expert(
    where: Mapping[str, Path], name: str, counts: set[int], num_layers: int
) -> bool:
    """Whether a tensor of a decoder layer is 3-D with the layer's number of experts as length."""
    layer = decoder_layer(name)
    if not counts or layer is None or layer >= num_layers or is_prediction(name):
        return False
    shape = _shape(where, name)
    return len(shape) == 3 and shape[0] in counts


def _shape(where: Mapping[str, Path], name: str) -> list[int]:
    with open_safetensors(where[name]) as (_, shard):
        return shard.get_slice(name).get_shape()


def count_experts(
    directory: Path, config: Mapping[str, Any], layers: Mapping[int, LayerFacts]
) -> int:
    """E, the same in every layer and in config.json; every expert must be complete."""
    counts = {index: _count(directory, index, layer) for index, layer in layers.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(
            f"{directory}: layers have {sorted(set(counts.values()))} experts; one number for all "
            "layers is supported: fetch the checkpoint again if some should not be missing"
        )
    number = next(iter(counts.values()))
    declared = declared_experts(config)
    if declared and number not in declared.values():
        key, value = next(iter(declared.items()))
        raise ValueError(
            f"{directory}: config.json says {key} {value}, the files hold {number} experts of a "
            "layer; fetch the checkpoint again"
        )
    for index, layer in sorted(layers.items()):
        _check_quantities(directory, index, layer)
        if layer.whole:
            continue
        if absent := sorted(set(range(number)) - layer.down.keys()):
            raise ValueError(
                f"{directory}: layer {index} has {number} experts, and expert {absent[0]} is not "
                "among them; fetch the checkpoint again"
            )
        for part in PER_EXPERT[0]:
            # Some experts have no gate.
            if layer.parts[part] != number and (part != "gate" or layer.parts[part]):
                raise ValueError(
                    f"{directory}: layer {index} has {number} experts and {layer.parts[part]} "
                    f"{part} projections; fetch the checkpoint again"
                )
            for quantity in layer.scheme.parts if layer.parts[part] else ():
                if layer.quantities[part, quantity] != number:
                    raise ValueError(
                        f"{directory}: layer {index} has {number} experts and "
                        f"{layer.quantities[part, quantity]} times {quantity} of {part}; fetch the "
                        "checkpoint again"
                    )
    return number


def _check_quantities(directory: Path, index: int, layer: LayerFacts) -> None:
    """Refuse projections that are quantized unlike down_proj, or only in part."""
    if "keep" in layer.whole:  # an export says so itself
        return
    for part, quantity in layer.quantities:
        if quantity not in (*layer.scheme.parts, *IGNORED, "bias"):
            raise ValueError(
                f"{directory}: layer {index}: {part} of its experts has {quantity}, down_proj is "
                f"{layer.scheme.name}; projections of one layer that are quantized in several ways "
                "are not served: use the checkpoint that it was made from"
            )


def check_activation_order(where: Mapping[str, Path], layers: Mapping[int, LayerFacts]) -> None:
    """Refuse GPTQ's activation order in gate and up; checks the first expert of every layer."""
    ordered = {
        it.block for it in layers.values() if not it.scheme.plain and it.scheme.facts.scattered
    }
    for name in where if ordered else ():
        found = quantized_tensor(name)
        if found is None or (found.quantity, found.expert) != ("g_idx", 0) or found.part == "down":
            continue
        if found.block in ordered and (read_tensor(where[name], name).diff() < 0).any():
            raise ValueError(
                f"not served by this version: activation order in {found.part}_proj ({name}); use "
                "the checkpoint that it was made from"
            )


def _count(directory: Path, index: int, layer: LayerFacts) -> int:
    """The number of experts of a layer; tensors of all experts must agree."""
    if not layer.whole:
        return len(layer.down)
    if layer.down:
        raise ValueError(
            f"{directory}: layer {index} holds experts one by one and all in one tensor; remove "
            "either, or fetch the checkpoint again"
        )
    if "keep" in layer.whole:
        return layer.whole["keep"][0]
    if not any(layer.whole.keys() == parts.keys() for parts in FUSED):
        raise ValueError(
            f"{directory}: layer {index} holds only {', '.join(sorted(layer.whole))} of its "
            "experts; fetch the checkpoint again"
        )
    down = layer.whole["down"]
    for part, shape in layer.whole.items():
        rows = 2 if part == "gate_up" else 1
        if shape[0] != down[0] or math.prod(shape) != rows * math.prod(down):
            raise ValueError(
                f"{directory}: layer {index}: {part} of its experts is {list(shape)}, down is "
                f"{list(down)}, the shapes disagree; fetch the checkpoint again"
            )
    return down[0]


def intermediate_size(
    directory: Path, config: Mapping[str, Any], layers: Mapping[int, LayerFacts]
) -> int:
    """I, the same for every expert of every layer."""
    hidden_size = config["hidden_size"]
    sizes = {layer.whole["keep"][1] for layer in layers.values() if "keep" in layer.whole}
    for index, layer in layers.items():
        fused = [layer.whole["down"]] if "down" in layer.whole else []
        for *_, rows, columns in {*layer.down.values(), *fused}:
            if hidden_size not in (rows, columns):
                raise ValueError(
                    f"{directory}: config.json says hidden_size {hidden_size}, the down "
                    f"projections of layer {index} are {rows} by {columns}; is this the right "
                    "config.json?"
                )
            sizes.add(columns if rows == hidden_size else rows)
    if len(sizes) != 1:
        raise ValueError(
            f"{directory}: experts of intermediate size {sorted(sizes)}; one size for all layers "
            "is supported"
        )
    return sizes.pop()


def check_dense_layers(
    directory: Path, config: Mapping[str, Any], layers: Mapping[int, LayerFacts]
) -> None:
    """Refuse files with experts in other layers than config.json says."""
    dense = dense_layers(config)
    if dense is None:
        return
    for layer in range(config["num_hidden_layers"]):
        key = dense.get(layer)
        if key and layer in layers:
            raise ValueError(
                f"{directory}: config.json makes layer {layer} dense ({key} "
                f"{config[key]!r:.60}), the files hold routed experts there; is this the right "
                "config.json?"
            )
        if not key and layer not in layers:
            raise ValueError(
                f"{directory}: config.json gives layer {layer} routed experts, the files hold none "
                "there; fetch the checkpoint again, or its config.json"
            )


def check_routers(
    directory: Path,
    config: Mapping[str, Any],
    where: Mapping[str, Path],
    names: Mapping[int, Sequence[str]],
    num_experts: int,
) -> None:
    """Refuse a router with another number of experts than the files."""
    # LongCat's router also chooses among experts that compute nothing.
    extra = config.get("zero_expert_num")
    wanted = {num_experts, num_experts + (extra if isinstance(extra, int) else 0)}
    for layer, of_layer in names.items():
        for name in of_layer:
            shape = _shape(where, name)
            if name.endswith(CORRECTION_BIAS):
                number = shape[-1] if shape else 1
            elif len(shape) == 2 and shape[1] == config["hidden_size"]:
                number = shape[0]
            else:
                continue
            if number not in wanted:
                raise ValueError(
                    f"{directory}: the router of layer {layer} chooses among {number} experts "
                    f"({name}), the files hold {num_experts}; fetch the checkpoint again"
                )


def router_groups(
    directory: Path, config: Mapping[str, Any], biased: bool, num_experts: int
) -> ExpertGroups | None:
    """The router's groups by config.json, with or without a correction bias."""
    told = (config[key] for key in EXPERT_GROUPS if config.get(key) is not None)
    if config.get("use_grouped_topk") is False:  # Kimi
        return None
    try:
        return expert_groups(next(told, None), config.get("topk_group"), biased, num_experts)
    except ValueError as error:
        raise ValueError(f"{directory}/config.json: {error}") from None


def check_choice(
    directory: Path, top_k: int, num_experts: int, groups: ExpertGroups | None
) -> None:
    """Refuse more experts per token than the router can choose."""
    most = groups.chosen * num_experts // groups.number if groups else num_experts
    if not 1 <= top_k <= most:
        of = f" of the {groups.chosen} groups that its router chooses" if groups else ""
        raise ValueError(
            f"{directory}: config.json lets a token use {top_k} experts, wanted 1 to {most}{of}; "
            "is this the right config.json?"
        )
