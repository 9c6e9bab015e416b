"""Do the tensors of a checkpoint, its routers and its config.json tell of the same experts?

Half a download, config.json of a sibling and a layout that is not known all look like a smaller
model at first. Every function refuses in one line that says which of them disagree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_atomic_moe.files.config import declared_experts, dense_layers
from vllm_atomic_moe.files.layouts import PER_EXPERT, decoder_layer, quantized_tensor
from vllm_atomic_moe.files.quantization import PLAIN_SCHEME, Scheme
from vllm_atomic_moe.files.tensors import open_safetensors


@dataclass(slots=True)
class LayerFacts:
    """Facts gathered about one MoE layer while walking the tensor names."""

    block: str
    experts: set[int] = field(default_factory=set)
    parts: Counter[str] = field(default_factory=Counter)
    quantities: Counter[tuple[str, str]] = field(default_factory=Counter)
    scheme: Scheme = PLAIN_SCHEME
    num_fused: int = 0
    intermediate_sizes: set[int] = field(default_factory=set)


def check_layout(
    directory: Path,
    config: Mapping[str, Any],
    where: Mapping[str, Path],
    layers: Mapping[int, LayerFacts],
    num_layers: int,
) -> None:
    """Refuse experts that the table of layouts does not know, by name."""
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


def is_prediction(name: str) -> bool:
    """Whether a tensor is of a multi-token-prediction head."""
    return "mtp" in name.split(".")


def _is_fused_expert(
    where: Mapping[str, Path], name: str, counts: set[int], num_layers: int
) -> bool:
    """Whether a tensor of a decoder layer is 3-D and as long as the layer has experts."""
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
    """E, the same in every layer and in config.json, and every expert whole."""
    counts = {index: layer.num_fused or len(layer.experts) for index, layer in layers.items()}
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
        if layer.num_fused:
            continue
        if absent := sorted(set(range(number)) - layer.experts):
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


def check_dense_layers(
    directory: Path, config: Mapping[str, Any], layers: Mapping[int, LayerFacts]
) -> None:
    """Refuse files that hold experts in other layers than config.json says."""
    dense = dense_layers(config)
    if dense is None:
        return
    for layer in range(config["num_hidden_layers"]):
        key = dense.get(layer)
        if key and layer in layers:
            raise ValueError(
                f"{directory}: config.json makes layer {layer} dense ({key} "
                f"{config[key]!r:.60}), the files hold routed experts there; is config.json of "
                "this checkpoint?"
            )
        if not key and layer not in layers:
            raise ValueError(
                f"{directory}: config.json gives layer {layer} routed experts, the files hold none "
                "there; fetch the checkpoint again, or is config.json of another one?"
            )


def check_routers(
    directory: Path,
    config: Mapping[str, Any],
    where: Mapping[str, Path],
    names: Mapping[int, Sequence[str]],
    num_experts: int,
) -> None:
    """Refuse a router that chooses among another number of experts than the files hold."""
    # LongCat's router also chooses among experts that compute nothing.
    extra = config.get("zero_expert_num")
    wanted = {num_experts, num_experts + (extra if isinstance(extra, int) else 0)}
    for layer, of_layer in names.items():
        for name in of_layer:
            shape = _shape(where, name)
            if len(shape) == 2 and shape[1] == config["hidden_size"] and shape[0] not in wanted:
                raise ValueError(
                    f"{directory}: the router of layer {layer} chooses among {shape[0]} experts "
                    f"({name}), the files hold {num_experts}; fetch the checkpoint again"
                )
