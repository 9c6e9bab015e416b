"""The calibration run: one forward and one backward per window, a few numbers per atom.

`calibrate` is the whole of it, top to bottom; `collect` is the part that runs the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from vllm_atomic_moe.calibration.accumulator import Batch, LayerAccumulator
from vllm_atomic_moe.calibration.experts import ExpertsModule, find_experts, observe, serving_notes
from vllm_atomic_moe.calibration.findings import inspect_sums
from vllm_atomic_moe.calibration.text import (
    CalibrationText,
    draw_windows,
    parse_data,
    parse_shard,
    take_shard,
)
from vllm_atomic_moe.files.checkpoint import (
    CheckpointInfo,
    describe_checkpoint,
    locate_tensors,
    read_config,
    resolve_model,
)
from vllm_atomic_moe.files.statistics import LayerSums, Statistics
from vllm_atomic_moe.files.tensors import one_line, read_tensor

DTYPES = ("auto", "float32", "bfloat16", "float16")
IGNORED = -100  # the target that cross_entropy leaves out

Progress = Callable[[int, int], None]
"""Called with (windows done, windows in all)."""


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """How to calibrate.

    Attributes:
        samples: windows per domain.
        seq_len: tokens per window.
        batch_size: windows per forward; it changes memory and time, not the sums.
        dtype: one of DTYPES; `auto` is the checkpoint's, or float32 on a CPU that is slow in it.
        device: `auto` (all CUDA devices there are, through accelerate's device map, else the
            CPU), `cpu`, `cuda` or `cuda:N`.
        seed: of the drawing of windows.
        gradients: whether to run the backward pass, which `heapr` needs.
        shard: `i/N`, 1 <= i <= N, or None for the whole text.
    """

    samples: int = 128
    seq_len: int = 2048
    batch_size: int = 1
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    gradients: bool = True
    shard: str | None = None


def calibrate(
    model: str,
    data: Sequence[str],
    options: CalibrationOptions,
    on_progress: Progress = lambda done, total: None,
) -> tuple[Statistics, list[str]]:
    """Run a model over text and sum up what its experts do.

    Args:
        model: a local directory or a Hugging Face id.
        data: `FILE[:DOMAIN]` arguments, at least one.
        options: how.
        on_progress: called after every batch.

    Returns:
        The statistics, and warnings of one line each.

    Raises:
        ValueError: the text, the model or an option is refused (one line, see the parts).
        OSError: the model's files cannot be read.
    """
    files = [parse_data(argument) for argument in data]
    device_map = resolve_device(options.device)
    shard = parse_shard(options.shard) if options.shard else None
    directory = resolve_model(model)
    checkpoint = describe_checkpoint(directory)
    if checkpoint.stored is not None:
        raise ValueError(
            f"{directory}: an exported checkpoint, whose pruned atoms are gone; calibrate the "
            "original model"
        )
    check_config(directory, options.seq_len)
    tokenizer = load_tokenizer(directory)
    text = draw_windows(files, tokenizer, options.seq_len, options.samples, options.seed)
    if shard:
        text = take_shard(text, *shard)

    loaded = load_model(directory, options.dtype, device_map)
    check_offload(loaded, options.gradients)
    check_vocabulary(text, loaded)
    experts = find_experts(loaded, checkpoint)
    sums = collect(
        loaded, experts, checkpoint, text, options.batch_size, on_progress, options.gradients
    )
    calibration = describe_calibration(text, options, loaded.dtype)
    calibration["experts_per_token"] = checkpoint.experts_per_token
    if shard:
        calibration["shards"] = {"of": shard[1], "here": [shard[0]]}
    statistics = Statistics(checkpoint.identity(), calibration, sums)
    return statistics, serving_notes(experts) + inspect_sums(sums)


def collect(
    model: PreTrainedModel,
    experts: Mapping[int, ExpertsModule],
    checkpoint: CheckpointInfo,
    text: CalibrationText,
    batch_size: int,
    on_progress: Progress = lambda done, total: None,
    gradients: bool = True,
) -> dict[int, LayerSums]:
    """Sums over the windows of `text`, layer by layer. Padding never counts.

    The model is put into evaluation mode and its parameters are frozen: only the output of the
    embedding requires a gradient, which more than halves the time of the backward pass. The model
    may be spread over devices, or offloaded, by accelerate: every layer's sums live where its
    experts run.

    Raises:
        ValueError: the loss is not finite, or the device's memory does not suffice.
    """
    model.eval().requires_grad_(False)
    batch = Batch()
    shape = (len(text.windows), checkpoint.num_experts, checkpoint.intermediate_size)
    layers = {layer: LayerAccumulator(shape, gradients, batch) for layer in experts}
    run = _run_forward_backward if gradients else _run_forward
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda *call: call[-1].requires_grad_(gradients))
    done = 0
    try:
        with observe(model, experts, layers):
            for batch.domain, ids in _batches(text, batch_size):
                batch.padding_T = (ids < 0).flatten() if bool((ids < 0).any()) else None
                with _out_of_memory_explained(ids):
                    run(model, ids)
                done += ids.shape[0]
                on_progress(done, text.num_windows)
    finally:
        handle.remove()
    return {layer: accumulator.result() for layer, accumulator in layers.items()}


def resolve_device(device: str) -> str | dict[str, str]:
    """`auto`, `cpu`, `cuda` or `cuda:N` as transformers' `device_map`.

    Raises:
        ValueError: it is something else, or torch sees no such device.
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
    """Refuse, before weights are read, what config.json already rules out.

    Raises:
        ValueError: `seq_len` exceeds the model's context, or the checkpoint is quantized.
    """
    config = read_config(directory)
    context = config.get("max_position_embeddings")
    if isinstance(context, int) and seq_len > context:
        raise ValueError(
            f"sequence length {seq_len} exceeds the model's context of {context} tokens; "
            f"use --seq-len {context} or less"
        )
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ValueError(
            f"{directory}: quantized checkpoint ({method}), calibration needs a gradient through "
            "plain weights; calibrate the original checkpoint"
        )


def resolve_dtype(
    dtype: str, directory: Path, device_map: str | dict[str, str]
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
    return torch.float32 if on_cpu and slow_on_cpu(stored_dtype(directory)) else "auto"


def stored_dtype(directory: Path) -> torch.dtype:
    """The dtype in config.json, else that of the checkpoint's first float tensor."""
    told = AutoConfig.from_pretrained(directory).dtype
    tensors = (read_tensor(path, name) for name, path in locate_tensors(directory).items())
    return told or next(tensor.dtype for tensor in tensors if tensor.is_floating_point())


def slow_on_cpu(dtype: torch.dtype) -> bool:
    """Whether this CPU lacks instructions for `dtype`, so that float32 is much faster."""
    if dtype == torch.bfloat16:
        return not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    # torch does not say whether a CPU has AVX512-FP16.
    return dtype == torch.float16


def load_model(directory: Path, dtype: str, device_map: str | dict[str, str]) -> PreTrainedModel:
    """The model of a checkpoint, for inference, placed by `device_map` (see `resolve_device`).

    Raises:
        ValueError: an unknown dtype, an architecture transformers does not know, or weights that
            the checkpoint lacks (transformers would make them up).
        OSError: the files cannot be read.
    """
    wanted = resolve_dtype(dtype, directory, device_map)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            directory, dtype=wanted, device_map=device_map, output_loading_info=True
        )
    except RuntimeError as error:
        raise ValueError(
            f"{directory}: transformers cannot load it ({one_line(error)}); is config.json of this "
            "checkpoint?"
        ) from error
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"{directory}: lacks {len(missing)} weights of {type(model).__name__}, the first is "
            f"{missing[0]}; fetch the checkpoint again"
        )
    return model


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer beside a checkpoint.

    Raises:
        ValueError: there is none, or its files are broken.
    """
    try:
        return AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # The tokenizers library raises plain Exception.
        raise ValueError(f"{directory}: no tokenizer can be read ({one_line(error)})") from None


def check_offload(model: PreTrainedModel, gradients: bool) -> None:
    """Refuse a backward pass through offloaded weights: it would keep them all on the device.

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
        ValueError: the tokenizer is of another model.
    """
    largest = max(int(ids.max()) for ids in text.windows.values() if ids.numel())
    rows = model.get_input_embeddings().num_embeddings
    if largest >= rows:
        raise ValueError(
            f"the tokenizer gives token id {largest}, the model has {rows} embeddings; "
            "is the tokenizer of another model?"
        )


def describe_calibration(
    text: CalibrationText, options: CalibrationOptions, dtype: torch.dtype
) -> dict[str, Any]:
    """The `calibration` metadata: what a reader needs to repeat the run."""
    return {
        "domains": list(text.windows),
        "corpora": [dataclasses.asdict(corpus) for corpus in text.corpora],
        "tokens": text.num_tokens,
        "seq_len": options.seq_len,
        "samples": options.samples,
        "seed": options.seed,
        "dtype": str(dtype).removeprefix("torch."),
        "gradients": options.gradients,
    }


def _batches(text: CalibrationText, batch_size: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(domain index, int32 [windows, seq_len]); no batch mixes domains."""
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size}: wanted at least 1")
    for domain, windows in enumerate(text.windows.values()):
        for ids in windows.split(batch_size) if windows.numel() else ():
            yield domain, ids


def _model_inputs(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, Any]:
    """What the model takes: padding becomes token 0 that no other token attends to."""
    # The first parameter's device is `meta` if accelerate offloads it; its hooks move the input.
    device = torch.device("cpu") if model.device.type == "meta" else model.device
    inputs: dict[str, Any] = {"input_ids": ids.clamp_min(0).to(device, torch.int64)}
    if bool((ids < 0).any()):
        inputs["attention_mask"] = (ids >= 0).to(device, torch.int64)
    return {**inputs, "use_cache": False}


@torch.no_grad()
def _run_forward(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """One forward of the layers; the language-model head is not needed."""
    model.base_model(**_model_inputs(model, ids))


def _run_forward_backward(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """One forward, one backward. Windows are independent, so the losses of a batch just add up."""
    logits = model(**_model_inputs(model, ids)).logits[:, :-1].flatten(0, 1)
    # float32 at least: a bf16 sum over thousands of tokens would be coarse.
    precise = logits if logits.dtype == torch.float64 else logits.float()
    targets = ids[:, 1:].flatten().to(logits.device, torch.int64)
    # Padding is neither predicted nor predicts.
    padding = ((ids[:, 1:] < 0) | (ids[:, :-1] < 0)).flatten().to(logits.device)
    targets = targets.masked_fill(padding, IGNORED)
    loss = functional.cross_entropy(precise, targets, ignore_index=IGNORED, reduction="sum")
    if not bool(loss.isfinite()):
        raise ValueError(
            f"the loss of a window is {loss.item()} in {model.dtype}; use --dtype float32"
        )
    loss.backward()


@contextmanager
def _out_of_memory_explained(ids: torch.Tensor) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"out of memory with {ids.shape[0]} windows of {ids.shape[1]} tokens; "
            "use a smaller --batch-size or --seq-len"
        ) from error
