"""The model and its tokenizer, through transformers: loaded, or refused in one line.

transformers raises exceptions of many types and any length; here each becomes one line with the
directory and a remedy.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
)

from vllm_atomic_moe.calibration.dequantized import stored_weights
from vllm_atomic_moe.calibration.text import CalibrationText
from vllm_atomic_moe.files.checkpoint import locate_tensors
from vllm_atomic_moe.files.config import (
    config_file,
    context_length,
    quantization_settings,
    read_config,
)
from vllm_atomic_moe.files.plain_files import check_not_pointer, one_line, read_json_object
from vllm_atomic_moe.files.shards import Shards
from vllm_atomic_moe.files.tensors import read_tensor, shorten

# Ends a message that was cut short, or whose cause is only in the libraries' log.
ALL_OF_IT = " (all of it: atomic-moe --debug)"
DTYPES = ("auto", "float32", "bfloat16", "float16")


def resolve_device(device: str) -> str | dict[str, str]:
    """`auto`, `cpu`, `cuda` or `cuda:N` as transformers' `device_map`.

    Raises:
        ValueError: the name is malformed, or torch sees no such device.
    """
    if device == "auto":
        return "auto" if torch.cuda.is_available() else {"": "cpu"}
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise ValueError(f"device {device!r}: wanted auto, cpu, cuda or cuda:N")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device!r}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA "
            "devices; use --device cpu"
        )
    return {"": device}


def check_config(directory: Path, seq_len: int) -> None:
    """Check config.json before weights are read.

    Raises:
        ValueError: `seq_len` exceeds the model's context.
    """
    context = context_length(read_config(directory))
    if context is not None and seq_len > context:
        raise ValueError(
            f"sequence length {seq_len} exceeds the model's context of {context} tokens; "
            f"use --seq-len {context} or less"
        )


def check_model_code(directory: Path, trusted: bool) -> None:
    """Refuse a model that brings its own Python files, unless trusted.

    Raises:
        ValueError: one line that names them.
    """
    if trusted:
        return
    config = read_json_object(config_file(directory))
    told = config.get("auto_map")
    classes = told if isinstance(told, dict) else {}
    kind = str(config.get("model_type"))
    has_model = kind in CONFIG_MAPPING and any(
        CONFIG_MAPPING[kind] in known
        for known in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    )
    code = classes.get("AutoModelForCausalLM") or classes.get("AutoConfig")
    if code and not has_model:
        raise ValueError(
            f"{directory}: its config.json runs code of its own ({shorten(code)}); read that code, "
            "then allow it with --trust-remote-code"
        )


def check_tokenizer_code(directory: Path, trusted: bool) -> None:
    """Refuse a tokenizer that needs its own Python files, unless trusted.

    Raises:
        ValueError: one line that names them.
    """
    path = directory / "tokenizer_config.json"
    if trusted or not path.is_file() or (directory / "tokenizer.json").is_file():
        return
    told = read_json_object(path).get("auto_map")
    code = told.get("AutoTokenizer") if isinstance(told, dict) else told
    if code:
        raise ValueError(
            f"{directory}: its tokenizer runs code of its own ({shorten(code)}), and transformers "
            "would take another in its place; read that code, then allow it with "
            "--trust-remote-code"
        )


def resolve_dtype(
    dtype: str, directory: Path, device_map: str | dict[str, str], trusted: bool = False
) -> str | torch.dtype:
    """The dtype to load the checkpoint in; `auto` leaves the choice to transformers.

    Raises:
        ValueError: it is not one of DTYPES.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: wanted one of {', '.join(DTYPES)}")
    if dtype != "auto":
        return getattr(torch, dtype)
    on_cpu = device_map == {"": "cpu"}
    return torch.float32 if on_cpu and slow_on_cpu(stored_dtype(directory, trusted)) else "auto"


def loading_dtype(
    dtype: str, directory: Path, device_map: str | dict[str, str], trusted: bool = False
) -> torch.dtype:
    """As `resolve_dtype`, but with the checkpoint's dtype where transformers would choose it."""
    wanted = resolve_dtype(dtype, directory, device_map, trusted)
    return wanted if isinstance(wanted, torch.dtype) else stored_dtype(directory, trusted)


def stored_dtype(directory: Path, trusted: bool = False) -> torch.dtype:
    """The dtype in config.json, else that of the checkpoint's first float tensor."""
    with failures_explained(directory):
        told = AutoConfig.from_pretrained(directory, trust_remote_code=trusted).dtype
    tensors = (read_tensor(path, name) for name, path in locate_tensors(directory).items())
    plain = (it.dtype for it in tensors if it.is_floating_point() and it.itemsize > 1)
    return told or next(plain)


def slow_on_cpu(dtype: torch.dtype) -> bool:
    """Whether this CPU lacks instructions for `dtype`, so that float32 is much faster."""
    if dtype == torch.bfloat16:
        return not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    # torch does not say whether a CPU has AVX512-FP16.
    return dtype == torch.float16


def load_model(
    directory: Path, dtype: str, device_map: str | dict[str, str], trusted: bool = False
) -> PreTrainedModel:
    """The model of a checkpoint, for inference, placed by `device_map` (see `resolve_device`).

    Quantized weights are decoded.

    Raises:
        ValueError: the dtype is unknown, transformers refuses or fails, or the checkpoint lacks
            weights (transformers would make them up).
    """
    wanted = resolve_dtype(dtype, directory, device_map, trusted)
    with _weights(directory, trusted) as (kind, options), failures_explained(directory):
        # Given explicitly, since transformers would guess it from names of the weights.
        told = stored_dtype(directory, trusted) if options and wanted == "auto" else wanted
        model, loading = kind.from_pretrained(
            None if options else directory,
            dtype=told,
            device_map=device_map,
            output_loading_info=True,
            trust_remote_code=trusted,
            **options,
        )
    check_missing(directory, model, loading["missing_keys"])
    return model


def check_missing(directory: Path, model: PreTrainedModel, missing: Collection[str]) -> None:
    """Refuse a checkpoint that lacks weights, which transformers makes up.

    Raises:
        ValueError: names the first one.
    """
    if not missing:
        return
    remedy = "fetch the checkpoint again"
    if all("lm_head" in name for name in missing):
        remedy += (
            ", or, if its head is the word embedding, say so in config.json: "
            '"tie_word_embeddings": true'
        )
    raise ValueError(
        f"{directory}: lacks {len(missing)} weights of {type(model).__name__}, the first is "
        f"{min(missing)}; {remedy}"
    )


def auto_class(config: Any) -> Any:
    """transformers' class for models of a configuration.

    The text class, or the image-text class if the model has no text class (Aria).
    """
    mappings = MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    reads, sees = (type(config) in mapping for mapping in mappings)
    return AutoModelForImageTextToText if sees and not reads else AutoModelForCausalLM


@contextmanager
def _weights(directory: Path, trusted: bool) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The class to load a checkpoint with; for quantized ones, also configuration and weights.

    Raises:
        ValueError: the weights cannot be decoded; it replaces what transformers raises then.
    """
    if not quantization_settings(directory, read_config(directory)):
        with failures_explained(directory):
            config = AutoConfig.from_pretrained(directory, trust_remote_code=trusted)
        yield auto_class(config), {}
        return
    settings, empty = empty_model(directory, trusted)
    failures: list[ValueError] = []
    with Shards(directory) as shards:
        weights = stored_weights(shards, settings, shards.where, failures.append)
        try:
            yield type(empty), {"config": empty.config, "state_dict": weights}
        except ValueError as error:
            raise (failures[0] if failures else error) from None


def empty_model(
    directory: Path, trusted: bool = False
) -> tuple[Mapping[str, Any], PreTrainedModel]:
    """A checkpoint's quantization (empty if none), and its model on the meta device.

    The model's `config` is that of its class, without quantization: for a checkpoint that takes
    images, the text model's part of config.json.

    Raises:
        ValueError: transformers cannot build it.
    """
    settings = quantization_settings(directory, read_config(directory))
    with failures_explained(directory):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trusted)
        for part in (config, config.get_text_config()):
            if hasattr(part, "quantization_config"):
                del part.quantization_config
        with torch.device("meta"):
            empty = auto_class(config).from_config(config, trust_remote_code=trusted)
    return settings or {}, empty


@contextmanager
def failures_explained(directory: Path) -> Iterator[None]:
    """Turn whatever transformers raises into one line."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{directory}: transformers cannot load it ({type(error).__name__}: "
            f"{one_line(error)}); is config.json of this checkpoint?{ALL_OF_IT}"
        ) from error


def load_tokenizer(directory: Path, trusted: bool = False) -> Any:
    """A checkpoint's tokenizer.

    Raises:
        ValueError: there is none, or its files are broken.
    """
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trusted)
    except Exception as error:  # The tokenizers library raises plain Exception.
        for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
            check_not_pointer(directory / name)
        raise ValueError(f"{directory}: no tokenizer can be read ({one_line(error)})") from None


def check_offload(model: PreTrainedModel, gradients: bool) -> None:
    """Refuse a backward pass through offloaded weights: it would keep all of them on the device.

    Raises:
        ValueError: the model does not fit the devices, and gradients are wanted.
    """
    offloaded = sum(parameter.device.type == "meta" for parameter in model.parameters())
    if offloaded and gradients:
        raise ValueError(
            f"{offloaded} weights do not fit the devices and are offloaded to host memory, where a "
            "backward pass cannot use them; use more or larger devices, --device cpu, or "
            "--no-gradients (every method but heapr)"
        )


def check_vocabulary(text: CalibrationText, model: PreTrainedModel) -> None:
    """Refuse token ids without an embedding.

    Raises:
        ValueError: the tokenizer belongs to another model.
    """
    largest = max(int(ids.max()) for ids in text.windows.values() if ids.numel())
    rows = model.get_input_embeddings().num_embeddings
    if largest >= rows:
        raise ValueError(
            f"the tokenizer gives token id {largest}, the model has {rows} embeddings; "
            "is the tokenizer of another model?"
        )
