"""The calibration run: one forward and one backward per window, two numbers per atom.

`calibrate` is the whole of it, top to bottom; `collect` is the part that runs the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from vllm_atomic_moe.calibration.experts import ExpertsModule, find_experts, observe, serving_notes
from vllm_atomic_moe.calibration.findings import inspect_sums
from vllm_atomic_moe.calibration.statistics import Statistics, StatisticsAccumulator
from vllm_atomic_moe.calibration.text import CalibrationText, draw_windows, parse_data
from vllm_atomic_moe.checkpoint import (
    CheckpointInfo,
    describe_checkpoint,
    read_config,
    resolve_model,
)

DTYPES = ("auto", "float32", "bfloat16", "float16")

Progress = Callable[[int, int], None]
"""Called with (windows done, windows in all)."""


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """How to calibrate.

    Attributes:
        samples: windows per domain.
        seq_len: tokens per window.
        batch_size: windows per forward; it changes memory and time, not the sums.
        dtype: one of DTYPES; `auto` is what the checkpoint says.
        device: `auto` (cuda if there is one), `cpu`, `cuda` or `cuda:N`.
        seed: of the drawing of windows.
    """

    samples: int = 128
    seq_len: int = 2048
    batch_size: int = 1
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0


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
    device = resolve_device(options.device)
    directory = resolve_model(model)
    checkpoint = describe_checkpoint(directory)
    if checkpoint.stored is not None:
        raise ValueError(
            f"{directory}: an exported checkpoint, whose pruned atoms are gone; calibrate the "
            "original model"
        )
    check_config(directory, options.seq_len)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = draw_windows(files, tokenizer, options.seq_len, options.samples, options.seed)

    loaded = load_model(directory, options.dtype, device)
    check_vocabulary(text, loaded)
    experts = find_experts(loaded, checkpoint)
    sums = collect(loaded, experts, checkpoint, text, options.batch_size, on_progress)
    statistics = Statistics(
        model=checkpoint.identity(),
        calibration=describe_calibration(text, options, loaded.dtype),
        sums=sums,
    )
    return statistics, serving_notes(experts) + inspect_sums(sums)


def collect(
    model: PreTrainedModel,
    experts: Mapping[int, ExpertsModule],
    checkpoint: CheckpointInfo,
    text: CalibrationText,
    batch_size: int,
    on_progress: Progress = lambda done, total: None,
) -> dict[int, dict[str, torch.Tensor]]:
    """Sums over the windows of `text`, as in `Statistics.sums`.

    The model is put into evaluation mode and its parameters are frozen: only the output of the
    embedding requires a gradient, which more than halves the time of the backward pass.

    Raises:
        ValueError: the loss is not finite, or the device's memory does not suffice.
    """
    model.eval().requires_grad_(False)
    accumulator = StatisticsAccumulator(
        checkpoint.layers,
        len(text.windows),
        checkpoint.num_experts,
        checkpoint.intermediate_size,
        model.device,
    )
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda *call: call[-1].requires_grad_())
    done = 0
    try:
        with observe(model, experts, partial(_watch, accumulator)):
            for domain, ids in _batches(text, batch_size):
                accumulator.domain = domain
                _run_batch(model, ids)
                done += ids.shape[0]
                on_progress(done, text.num_windows)
    finally:
        handle.remove()
    return accumulator.sums()


def resolve_device(device: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a device that exists.

    Raises:
        ValueError: it is something else, or torch sees no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise ValueError(f"device {device!r}: wanted auto, cpu, cuda or cuda:N")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device!r}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA "
            "devices; use --device cpu"
        )
    return torch.device(device)


def check_config(directory: Path, seq_len: int) -> None:
    """Refuse, before weights are read, what config.json already rules out.

    Raises:
        ValueError: `seq_len` exceeds the model's context, or the checkpoint is quantised.
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
            f"{directory}: quantised checkpoint ({method}), calibration needs a gradient through "
            "plain weights; calibrate the original checkpoint"
        )


def load_model(directory: Path, dtype: str, device: torch.device) -> PreTrainedModel:
    """The model of a checkpoint, for inference, on `device`.

    Raises:
        ValueError: an unknown dtype, an architecture transformers does not know, or weights that
            the checkpoint lacks (transformers would make them up).
        OSError: the files cannot be read.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: wanted one of {', '.join(DTYPES)}")
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    model, loading = AutoModelForCausalLM.from_pretrained(
        directory, dtype=wanted, output_loading_info=True
    )
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"{directory}: lacks {len(missing)} weights of {type(model).__name__}, the first is "
            f"{missing[0]}; fetch the checkpoint again"
        )
    return model.to(device)


def check_vocabulary(text: CalibrationText, model: PreTrainedModel) -> None:
    """Refuse token ids the model has no embedding for.

    Raises:
        ValueError: the tokenizer is of another model.
    """
    largest = max(int(ids.max()) for ids in text.windows.values())
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
    }


def _batches(text: CalibrationText, batch_size: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(domain index, int32 [windows, seq_len]); no batch mixes domains."""
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size}: wanted at least 1")
    for domain, windows in enumerate(text.windows.values()):
        for ids in windows.split(batch_size):
            yield domain, ids


def _run_batch(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """One forward, one backward. Windows are independent, so the losses of a batch just add up."""
    ids = ids.to(model.device, torch.int64)
    try:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        # float32 at least: a bf16 sum over thousands of tokens would be coarse.
        precise = logits if logits.dtype == torch.float64 else logits.float()
        loss = functional.cross_entropy(precise, ids[:, 1:].flatten(), reduction="sum")
        if not bool(loss.isfinite()):
            raise ValueError(
                f"the loss of a window is {loss.item()} in {model.dtype}; use --dtype float32"
            )
        loss.backward()
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{model.device} ran out of memory with {ids.shape[0]} windows of {ids.shape[1]} "
            "tokens; use a smaller --batch-size or --seq-len"
        ) from error


def _watch(accumulator: StatisticsAccumulator, layer: int, expert: int, h: torch.Tensor) -> None:
    accumulator.add_activation(layer, expert, h)
    h.register_hook(partial(accumulator.add_gradient, layer, expert))
