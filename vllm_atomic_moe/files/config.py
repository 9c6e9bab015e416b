"""config.json of a checkpoint, and what it says about routed experts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_atomic_moe.files.plain_files import read_json_object

EXPERTS_PER_TOKEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
)
NUM_EXPERTS = (
    "num_experts",
    "n_routed_experts",
    "num_local_experts",
    "num_routed_experts",
    "moe_num_experts",
)
# Said of the whole model, and found inside or beside the text model's part.
OF_THE_WHOLE = ("architectures", "quantization_config", "compression_config", "auto_map")


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of the text model, with what the outer one says of the whole.

    Raises:
        ValueError: the file is missing, not a JSON object, or does not say `hidden_size`.
    """
    path = directory / "config.json"
    config = read_json_object(path)
    text = config.get("text_config")
    if isinstance(text, dict):
        outer = {key: config[key] for key in OF_THE_WHOLE if config.get(key)}
        config = {**text, **outer}
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


def quantization(directory: Path, config: Mapping[str, Any]) -> str | None:
    """How a checkpoint is quantized, as its configuration calls it; None if it is not."""
    for key in ("quantization_config", "compression_config"):
        told = config.get(key)
        if isinstance(told, dict) and told:
            return str(told.get("quant_method") or told.get("quant_algo") or "unknown")
    # NVIDIA's ModelOpt writes a file of its own.
    path = directory / "hf_quant_config.json"
    if not path.is_file():
        return None
    told = read_json_object(path).get("quantization")
    method = told.get("quant_algo") if isinstance(told, dict) else None
    return f"modelopt {method}".lower() if method else None


def experts_per_token(directory: Path, config: Mapping[str, Any]) -> int:
    """K.

    Raises:
        ValueError: config.json does not say it.
    """
    for key in EXPERTS_PER_TOKEN:
        if isinstance(config.get(key), int):
            return config[key]
    raise ValueError(
        f"{directory}/config.json: none of {', '.join(EXPERTS_PER_TOKEN)} says how many experts "
        "a token uses"
    )


def declared_experts(config: Mapping[str, Any]) -> dict[str, int]:
    """Every key that says how many routed experts a layer has, with its value."""
    return {key: config[key] for key in NUM_EXPERTS if type(config.get(key)) is int}


def context_length(config: Mapping[str, Any]) -> int | None:
    """The model's context in tokens; None where the configuration does not say."""
    context = config.get("max_position_embeddings")
    return context if isinstance(context, int) else None


def dense_layers(config: Mapping[str, Any]) -> dict[int, str] | None:
    """Decoder layers without routed experts, with the key that says so; None where it is not told.

    Knows the keys of Qwen's and DeepSeek's configurations, which many others use.
    """
    number, only = config.get("num_hidden_layers"), config.get("mlp_only_layers")
    step, first = config.get("decoder_sparse_step"), config.get("first_k_dense_replace")
    every = config.get("moe_layer_freq")
    # Layer by layer in words, which comes before the others' defaults; or in a form not known.
    if number is None or config.get("mlp_layer_types") or not isinstance(every, int | list | None):
        return None
    if all(value is None for value in (only, step, first, every)):
        return None
    dense: dict[int, str] = {}
    for layer in range(number):
        if isinstance(only, list) and layer in only:
            dense[layer] = "mlp_only_layers"
        elif isinstance(step, int) and step > 0 and (layer + 1) % step:
            dense[layer] = "decoder_sparse_step"
        elif isinstance(first, int) and layer < first:
            dense[layer] = "first_k_dense_replace"
        elif isinstance(every, list):
            if layer < len(every) and not every[layer]:
                dense[layer] = "moe_layer_freq"
        elif every and every > 0 and layer % every:
            dense[layer] = "moe_layer_freq"
    return dense
