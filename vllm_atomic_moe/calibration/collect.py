"""The calibration run: one forward and one backward per window, a few numbers per atom.

`calibrate` is the whole run, top to bottom; `collect` is the part that runs the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from vllm_atomic_moe.calibration.accumulator import Batch, LayerAccumulator
from vllm_atomic_moe.calibration.experts import ExpertsModule, find_experts, observe
from vllm_atomic_moe.calibration.findings import inspect_sums
from vllm_atomic_moe.calibration.layer_reader import LayerReader
from vllm_atomic_moe.calibration.model import (
    check_config,
    check_model_code,
    check_offload,
    check_tokenizer_code,
    check_vocabulary,
    load_model,
    load_tokenizer,
    loading_dtype,
    resolve_device,
)
from vllm_atomic_moe.calibration.passes import (
    batches,
    check_loss,
    failures_explained,
    not_finite,
    run_forward,
    run_forward_backward,
)
from vllm_atomic_moe.calibration.ranks import Ranks, joined
from vllm_atomic_moe.calibration.streamed import collect_streamed
from vllm_atomic_moe.calibration.streaming import keep, one_device, streaming_reason
from vllm_atomic_moe.calibration.text import (
    CalibrationText,
    DataFile,
    draw_windows,
    parse_files,
    parse_shard,
    take_shard,
)
from vllm_atomic_moe.files.checkpoint import CheckpointInfo, describe_checkpoint, resolve_model
from vllm_atomic_moe.files.statistics import LayerSums, Statistics

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
        device: `auto` (all CUDA devices through accelerate's device map; without any, the CPU),
            `cpu`, `cuda` or `cuda:N`.
        seed: for drawing windows.
        gradients: whether to run the backward pass, which `heapr` needs.
        shard: `i/N`, 1 <= i <= N, or None for the whole text.
        stream: whether to run layer by layer; None: if the weights do not fit the free memory.
        scratch: directory for layers' inputs; the run is then layer by layer and can resume after
            a kill. None keeps them in memory.
        field: field or column of the data files; None for `text`, else `messages`.
        trust_remote_code: whether Python files of the model's directory may run.
    """

    samples: int = 128
    seq_len: int = 2048
    batch_size: int = 1
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    gradients: bool = True
    shard: str | None = None
    stream: bool | None = None
    scratch: Path | None = None
    field: str | None = None
    trust_remote_code: bool = False


def calibrate(
    model: str,
    data: Sequence[str],
    options: CalibrationOptions,
    on_progress: Progress = lambda done, total: None,
    on_note: Callable[[str], None] = lambda line: None,
) -> tuple[Statistics, list[str]]:
    """Run a model over text and sum up what its experts do.

    Processes that torchrun started share the windows, and all return the same.

    Args:
        model: a local directory or a Hugging Face id.
        data: `PATH[:DOMAIN]` arguments, at least one.
        options: how.
        on_progress: called after every batch.
        on_note: called with a line that says how the run is done, before it starts.

    Returns:
        The statistics, and warnings of one line each.

    Raises:
        ValueError: the text, the model or an option is refused (one line, see the parts).
        OSError: the model's files cannot be read.
    """
    with joined() as ranks:
        return _calibrate(model, data, options, ranks, on_progress, on_note)


def _calibrate(
    model: str,
    data: Sequence[str],
    options: CalibrationOptions,
    ranks: Ranks,
    on_progress: Progress,
    on_note: Callable[[str], None],
) -> tuple[Statistics, list[str]]:
    files = parse_files(data)
    device_map = resolve_device(ranks.device(options.device))
    shard = parse_shard(options.shard) if options.shard else None
    directory, checkpoint = find_original(model)
    text = read_text(directory, files, options)
    trusted = options.trust_remote_code
    # The digests are of the whole text; all shards have the same.
    digests = text.digests
    if shard:
        text = take_shard(text, *shard)
    share = ranks.share(text)

    dtype = loading_dtype(options.dtype, directory, device_map, trusted)
    reason = streaming_reason(options.stream, options.scratch, directory, dtype, device_map, ranks)
    batch_size, gradients = options.batch_size, options.gradients
    if reason is None:
        loaded = load_model(directory, options.dtype, device_map, trusted)
        check_offload(loaded, gradients)
        check_vocabulary(text, loaded)
        experts = find_experts(loaded, checkpoint)
        own = collect(loaded, experts, checkpoint, share, batch_size, on_progress, gradients)
        sums = ranks.add(own)
    else:
        if reason:
            on_note(reason)
        reader = LayerReader(directory, checkpoint, dtype, one_device(device_map), trusted)
        check_vocabulary(text, reader.outline)
        experts = find_experts(reader.outline, checkpoint)
        with closing(keep(reader, share, batch_size, gradients, options.scratch, ranks)) as kept:
            own = collect_streamed(reader, kept, share, batch_size, on_progress, gradients)
            sums = ranks.add(own)
            kept.clear()
    calibration = describe_calibration(text, options, dtype)
    calibration["windows_sha256"] = digests
    calibration["experts_per_token"] = checkpoint.experts_per_token
    groups = checkpoint.groups
    calibration["expert_groups"] = None if groups is None else dataclasses.asdict(groups)
    if shard:
        calibration["shards"] = {"of": shard[1], "here": [shard[0]]}
    statistics = Statistics(checkpoint.identity(), calibration, sums)
    return statistics, text.warnings + inspect_sums(sums)


def find_original(model: str) -> tuple[Path, CheckpointInfo]:
    """The directory and the description of a model that holds all of its atoms.

    Raises:
        ValueError: there is no such model, its experts cannot be described, or it is an export.
    """
    directory = resolve_model(model)
    checkpoint = describe_checkpoint(directory)
    if checkpoint.stored is not None:
        raise ValueError(
            f"{directory}: an exported checkpoint, whose pruned atoms are gone; use the "
            "original model"
        )
    return directory, checkpoint


def read_text(
    directory: Path, files: Sequence[DataFile], options: CalibrationOptions
) -> CalibrationText:
    """The windows of text for a model.

    Raises:
        ValueError: the text, the model's configuration or its tokenizer is refused.
    """
    check_config(directory, options.seq_len)
    check_model_code(directory, options.trust_remote_code)
    check_tokenizer_code(directory, options.trust_remote_code)
    tokenizer = load_tokenizer(directory, options.trust_remote_code)
    return draw_windows(
        files, tokenizer, options.seq_len, options.samples, options.seed, options.field
    )


def collect(
    model: PreTrainedModel,
    experts: Mapping[int, ExpertsModule],
    checkpoint: CheckpointInfo,
    text: CalibrationText,
    batch_size: int,
    on_progress: Progress = lambda done, total: None,
    gradients: bool = True,
) -> dict[int, LayerSums]:
    """Sums over the windows of `text`, by layer. Padding never counts.

    The model is put into evaluation mode and its parameters are frozen: only the output of the
    embedding requires a gradient, which more than halves the time of the backward pass. The model
    may be spread over devices, or offloaded, by accelerate: each layer's sums are on the device
    that runs its experts.

    Raises:
        ValueError: a sum or the loss is not finite, the device is out of memory, or the model's
            own code fails; raised at the first such window.
    """
    model.eval().requires_grad_(False)
    shape = (len(text.windows), checkpoint.num_experts, checkpoint.intermediate_size)
    layers = {layer: LayerAccumulator(shape, gradients, Batch()) for layer in experts}
    run = run_forward_backward if gradients else run_forward
    names = {id(module): name for name, module in model.named_modules()}
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda *call: call[-1].requires_grad_(gradients))
    done = 0
    try:
        with observe(model, experts, layers):
            for domain, ids in batches(text, batch_size):
                batch = Batch.of(domain, ids)
                for accumulator in layers.values():
                    accumulator.batch = batch
                with failures_explained(model, names, ids):
                    loss = run(model, ids)
                _check_finite(layers, domain, loss, model.dtype)
                done += ids.shape[0]
                on_progress(done, text.num_windows)
    finally:
        handle.remove()
    return {layer: accumulator.result() for layer, accumulator in layers.items()}


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
        "field": options.field,
    }


def _check_finite(
    layers: Mapping[int, LayerAccumulator],
    domain: int,
    loss: torch.Tensor | None,
    dtype: torch.dtype,
) -> None:
    """Refuse the first window whose numbers leave the range of the dtype.

    Raises:
        ValueError: names the layer, what is not finite, and the dtype.
    """
    # Find the origin: overflows spread to higher layers with activations, to lower ones with
    # gradients.
    found = {layer: accumulator.not_finite(domain) for layer, accumulator in layers.items()}
    for what, order in (("activations", sorted(found)), ("gradients", sorted(found)[::-1])):
        for layer in order:
            if found[layer] == what:
                raise not_finite(layer, what, dtype)
    if loss is not None:
        check_loss(loss, dtype)
