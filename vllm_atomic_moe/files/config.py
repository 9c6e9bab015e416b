"""config.json of a checkpoint, and what it says about routed experts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vllm_atomic_moe.files.layouts import INDEX
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
# Hidden size of routed experts between two projections of their own: Nemotron's, Kimi-K3's.
LATENT_EXPERTS = ("moe_latent_size", "routed_expert_hidden_size")
# Router groups of experts; Kimi has its own names.
EXPERT_GROUPS = ("n_group", "num_expert_group")
# Layers of multi-token prediction, after the decoder's.
PREDICTION_LAYERS = (
    "num_nextn_predict_layers",
    "num_mtp_modules",
    "num_mtp_layers",
    "mtp_num_hidden_layers",
)
# Key -> whether its value makes a layer dense, as vLLM's models read it.
DENSE_LAYERS: dict[str, Callable[[Any, int], bool]] = {
    "mlp_layer_types": lambda types, layer: _kind(types[layer]) == "dense",
    "mlp_only_layers": lambda dense, layer: layer in dense,
    "decoder_sparse_step": lambda step, layer: (layer + 1) % step != 0,
    "first_k_dense_replace": lambda first, layer: layer < first,
    "num_dense_layers": lambda first, layer: layer < first,  # AFMoE, LFM2
    "dense_mlp_idx": lambda first, layer: layer < first,  # Inkling
    "moe_layer_freq": lambda every, layer: (
        not every[layer] if isinstance(every, list) else layer % every != 0
    ),
    "moe_layer_start_index": lambda first, layer: layer < first,  # Ernie
    "moe_layer_end_index": lambda last, layer: -1 < last < layer,
    "moe_layer_interval": lambda step, layer: (layer + 1) % step != 0,
    "interleave_moe_layer_step": lambda step, layer: step < 1 or (layer + 1) % step != 0,  # Llama 4
    "moe_layers": lambda sparse, layer: layer not in sparse,
    "moe_layers_enum": lambda sparse, layer: layer not in _numbers(sparse),  # Step
    "expert_layer_period": lambda pair, layer: layer % pair[0] != pair[1],  # Jamba, with its offset
    "hybrid_override_pattern": lambda kinds, layer: kinds[layer] != "E",  # Nemotron
    "layers_block_type": lambda kinds, layer: kinds[layer] != "moe",
    "layer_types": lambda kinds, layer: kinds[layer] != "moe",
}
# Models, by `model_type`, for which vLLM gives every decoder layer routed experts.
NEVER_DENSE = (
    *("aria_text", "dbrx", "flex_olmo", "gemma4_text", "gpt_oss", "granitemoe", "granitemoehybrid"),
    *("granitemoeshared", "minimax_m2", "mixtral", "olmoe", "phimoe", "qwen3_5_moe_text"),
)
# Files that quantizers write beside config.json: NVIDIA's ModelOpt, AutoGPTQ and AutoAWQ.
QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
# Mistral's own configuration, in the place of config.json.
MISTRAL = "params.json"
# JSON files that vLLM and transformers read.
READ_BY_OTHERS = (
    *("config.json", MISTRAL, "generation_config.json", INDEX, *QUANTIZATION_FILES),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "chat_template.json", "preprocessor_config.json", "processor_config.json"),
)
# Parts of a configuration that hold the text model's: Qwen3-Omni's thinker has a text model.
OF_TEXT = ("thinker_config", "text_config")
# Part of a configuration that describes experts: DBRX's, Mistral's.
OF_EXPERTS = ("ffn_config", "moe")
# DBRX's and Mistral's names -> the common ones.
OTHER_NAMES = {
    **{"d_model": "hidden_size", "dim": "hidden_size", "n_layers": "num_hidden_layers"},
    **{"num_expert_groups": "n_group", "num_expert_groups_per_tok": "topk_group"},
    **{"route_every_n": "moe_layer_freq", "max_seq_len": "max_position_embeddings"},
}
# Values for the whole model, found inside or beside the text model's part.
OF_THE_WHOLE = ("architectures", "quantization_config", "compression_config", "auto_map")


def config_file(directory: Path) -> Path:
    """config.json, or Mistral's params.json if that is the only one."""
    config, params = directory / "config.json", directory / MISTRAL
    return params if params.is_file() and not config.exists() else config


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of the text model, with the outer file's values for the whole model.

    Raises:
        ValueError: the file is missing, not a JSON object, or lacks `hidden_size`.
    """
    path = config_file(directory)
    config = read_json_object(path)
    if path.name == MISTRAL:
        config = _of_mistral(config)
    outer = {key: config[key] for key in OF_THE_WHOLE if config.get(key)}
    config = {**text_part(config), **outer}
    for part in OF_EXPERTS:
        if isinstance(config.get(part), dict):
            config = {**config[part], **config}
    for other, name in OTHER_NAMES.items():
        if config.get(other) is not None and config.get(name) is None:
            config[name] = config[other]
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


def text_part(config: dict[str, Any]) -> dict[str, Any]:
    """The text model's part of a configuration, itself if it has none; not a copy."""
    for key in OF_TEXT:
        if isinstance(part := config.get(key), dict):
            config = part
    return config


def _of_mistral(params: dict[str, Any]) -> dict[str, Any]:
    """params.json with vLLM's architecture for it, and its quantization settings."""
    experts, told = params.get("moe"), params.get("quantization")
    shared = isinstance(experts, dict) and experts.get("num_shared_experts")
    name = "MistralLarge3ForCausalLM" if shared else "MixtralForCausalLM"
    config = {**params, "architectures": [name]}
    if isinstance(told, dict) and told:
        fp8 = told.get("qformat_weight") == "fp8_e4m3"
        config["quantization_config"] = {**told, "quant_method": "fp8"} if fp8 else told
    return config


def quantization_name(settings: Mapping[str, Any]) -> str | None:
    """What `quantization_settings` call the quantization; None if there is none."""
    return (_method(settings) or "unknown") if settings else None


def quantization_settings(directory: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Quantization settings of a configuration, or of a quantizer's own file; may be empty."""
    for key in ("quantization_config", "compression_config"):
        told = config.get(key)
        if isinstance(told, dict) and told:
            return told
    for name in QUANTIZATION_FILES:
        path = directory / name
        if path.is_file():
            told = read_json_object(path)
            inner = told.get("quantization")
            told = inner if isinstance(inner, dict) else told
            if _method(told):
                return told
    return {}


def _method(told: Mapping[str, Any]) -> str | None:
    """The method's name, or the keys that vLLM wants without one."""
    if told.get("quant_method"):
        return str(told["quant_method"])
    if told.get("quant_algo"):
        return f"modelopt {told['quant_algo']}".lower()
    if told.keys() & {"w_bit", "zero_point"}:
        return "awq"
    return "gptq" if "bits" in told else None


def check_encodings(directory: Path) -> None:
    """Refuse JSON files that vLLM and transformers, which also read them, do not understand.

    Raises:
        ValueError: one starts with a byte order mark, or is in UTF-16 or 32.
    """
    for path in (directory / name for name in READ_BY_OTHERS):
        if not path.is_file():
            continue
        with path.open("rb") as file:
            encoding = json.detect_encoding(file.read(4))
        if encoding != "utf-8":
            what = "begins with a byte order mark" if "sig" in encoding else f"is {encoding}"
            raise ValueError(
                f"{path}: {what}, which vLLM and transformers cannot read; save it as UTF-8 "
                "without a byte order mark"
            )


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
    """The model's context in tokens; None if the configuration does not say."""
    context = config.get("max_position_embeddings")
    return context if isinstance(context, int) else None


def decoder_layers(config: Mapping[str, Any]) -> int | None:
    """Number of decoder layers; None if the configuration does not say, or says two (LongCat)."""
    number, other = config.get("num_hidden_layers"), config.get("num_layers")
    return number if other in (None, number) else None


def prediction_layers(config: Mapping[str, Any]) -> int:
    """Number of layers of multi-token prediction after the decoder's; 0 if not told."""
    told = [config.get(key) for key in PREDICTION_LAYERS]
    return max((number for number in told if isinstance(number, int)), default=0)


def dense_layers(config: Mapping[str, Any]) -> dict[int, str] | None:
    """Decoder layers without routed experts, with the key that says so.

    None if not told, or in an unknown form.
    """
    number = decoder_layers(config)
    told = _told_of_layers(config)
    if number is None or not (told or config.get("model_type") in NEVER_DENSE):
        return None
    dense: dict[int, str] = {}
    try:
        for layer in range(number):
            for key, value in told.items():
                if DENSE_LAYERS[key](value, layer):
                    dense.setdefault(layer, key)
    except (TypeError, ValueError, LookupError, ZeroDivisionError):
        return None
    return dense


def _told_of_layers(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of DENSE_LAYERS that count, with their values."""
    told = {key: config[key] for key in DENSE_LAYERS if config.get(key) is not None}
    # A word per layer has priority over the others, which may be defaults.
    if "mlp_layer_types" in told:
        return {"mlp_layer_types": told["mlp_layer_types"]}
    if "expert_layer_period" in told:
        told["expert_layer_period"] = (
            told["expert_layer_period"],
            config.get("expert_layer_offset", 1),
        )
    # In models other than Nemotron, these words are kinds of attention.
    for key in ("layers_block_type", "layer_types"):
        if not isinstance(kinds := told.get(key, []), list) or "moe" not in kinds:
            told.pop(key, None)
    return told


def _kind(word: str) -> str:
    """One of the words for a layer's feed-forward part.

    Raises:
        ValueError: it is another.
    """
    if word not in ("dense", "sparse", "moe", "hash_moe"):
        raise ValueError(word)
    return word


def _numbers(listed: str | list[int]) -> list[int]:
    return [int(it) for it in (listed.split(",") if isinstance(listed, str) else listed)]
