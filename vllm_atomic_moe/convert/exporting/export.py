"""From a checkpoint and a profile to an exported checkpoint; `export` does it all.

Everything but the routed experts is copied byte for byte. The experts' rows are read from
memory-mapped tensors, one expert at a time, and streamed to disk: neither a shard nor a tensor must
fit into memory. The same input gives the same bytes, no matter how the source is sharded.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from vllm_atomic_moe.convert.exporting.packed import plan_packed
from vllm_atomic_moe.convert.exporting.place import (
    check_place,
    check_replaced,
    check_space,
    publish,
    working_directory,
)
from vllm_atomic_moe.convert.exporting.plain import check_plain, plan_plain
from vllm_atomic_moe.convert.exporting.plan import Plan
from vllm_atomic_moe.files.checkpoint import (
    CheckpointInfo,
    checkpoint_files,
    describe_checkpoint,
    resolve_model,
)
from vllm_atomic_moe.files.config import config_file
from vllm_atomic_moe.files.export_format import EXPORT_DIRECTORY
from vllm_atomic_moe.files.layouts import INDEX, quantized_tensor
from vllm_atomic_moe.files.plain_files import allow_reading
from vllm_atomic_moe.files.profiles import PruningProfile
from vllm_atomic_moe.files.shards import Shards
from vllm_atomic_moe.files.tensors import StreamedTensor, stream_safetensors

SHARD_BYTES = 5_000_000_000
WEIGHT_FILES = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|h5|msgpack|onnx|onnx_data|npz|ot|tflite|pkl)"
    r"|.*\.(safetensors|bin|h5|msgpack)\.index\.json"
)
FOLDERS_LEFT_OUT = ("original", "onnx", "atomic_profiles", EXPORT_DIRECTORY)

Progress = Callable[[int, int], None]
"""Called with (bytes written, bytes in all)."""


@dataclass(frozen=True, slots=True)
class ExportResult:
    """A finished export.

    Attributes:
        directory: the exported checkpoint.
        profile: name of its profile.
        kept: fraction of the original model's atoms in it.
        weight_bytes: size of its shards.
        source_bytes: size of the source checkpoint's shards.
        shards: number of its shards.
        experts: number of experts per layer.
        width: atoms per expert of an ordinary checkpoint; None for packed rows.
        warnings: one line each.
        refit: report of the refit, with the bytes of down_proj without and with it; None without
            one.
    """

    directory: Path
    profile: str
    kept: float
    weight_bytes: int
    source_bytes: int
    shards: int
    experts: int
    width: int | None
    warnings: list[str]
    refit: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Refitted:
    """Refitted down projections.

    Attributes:
        down_t_PH: layer index -> columns of down_proj of the kept atoms, experts ascending.
        report: an entry for the index of the shards; JSON.
    """

    down_t_PH: Mapping[int, torch.Tensor]
    report: Mapping[str, Any]


def export(
    model: str,
    profile: Path,
    output: Path,
    *,
    plain: bool = False,
    refit: Callable[[PruningProfile], Refitted] | None = None,
    shard_bytes: int = SHARD_BYTES,
    on_progress: Progress = lambda done, total: None,
) -> ExportResult:
    """Write a checkpoint that holds only the atoms of `profile`.

    Args:
        model: a local directory or a Hugging Face id; it may be an export itself.
        profile: the profile file.
        output: the directory to create; an export of the same model and profile is replaced.
        plain: write an ordinary checkpoint, in the layout of the model, for every engine.
        refit: returns new columns of down_proj; called after all checks.
        shard_bytes: maximum size of a shard, unless one tensor is larger.
        on_progress: called after every piece written.

    Raises:
        ValueError: the model, the profile or the output is refused, or the disk is too small;
            nothing is changed.
        OSError: a file cannot be read or written; nothing is left behind.
    """
    directory, output = resolve_model(model), output.resolve()
    check_place(directory, output)
    info = describe_checkpoint(directory)
    chosen = PruningProfile.read(profile)
    warnings = chosen.check(info)
    notes: dict[str, Any] = {}
    files = plan_files(directory)
    with Shards(directory) as source:
        settings = config_file(directory).name
        make_plan = partial(plan_plain if plain else plan_packed, directory, source, info, chosen)
        # Of a refit with its sizes, to refuse before the fit what cannot be written.
        plan = make_plan(refitted={} if refit is None else _placeholders(info, chosen))
        if not plain:
            files[f"atomic_profiles/{chosen.name}.safetensors"] = profile
        shards = split_shards(plan, shard_bytes)
        index = (Path(plan.folder) / INDEX).as_posix()
        with working_directory(output) as work:
            check_replaced(output, info, chosen, plan, {*shards, index, *files, settings})
            copied = sum(path.stat().st_size for path in files.values())
            check_space(output, sum(tensor.nbytes for tensor in plan.tensors) + copied)
            if refit is not None:
                refitted = refit(chosen)
                plan = make_plan(refitted=refitted.down_t_PH)
                shards = split_shards(plan, shard_bytes)
                sizes = [_down_bytes(info, it) for it in (make_plan(), plan)]
                notes = {"refit": {**refitted.report, "down_proj_bytes": sizes}}
            write_weights(work, shards, plan, on_progress, notes)
            for name, path in sorted(files.items()):
                _write_file(work / name, path)
            # Last, since a directory without it is not a checkpoint.
            _write_file(work / settings, plan.config)
            if plain:
                check_plain(work, plan)
            weight_bytes = sum((work / name).stat().st_size for name in shards)
            publish(work, output)
    return ExportResult(
        directory=output,
        profile=chosen.name,
        kept=chosen.kept,
        weight_bytes=weight_bytes,
        source_bytes=sum(path.stat().st_size for path in checkpoint_files(directory)),
        shards=len(shards),
        experts=plan.experts,
        width=plan.width,
        warnings=warnings,
        refit=notes.get("refit"),
    )


def _placeholders(info: CheckpointInfo, profile: PruningProfile) -> dict[int, torch.Tensor]:
    """Columns of down_proj without values, in 16 bits; a plan gives plain ones their own dtype."""
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": "meta"}
    return {
        layer: torch.empty(int(keep_EI.sum()), info.hidden_size, **options)
        for layer, keep_EI in profile.keep.items()
    }


def _down_bytes(info: CheckpointInfo, plan: Plan) -> int:
    """Bytes of all rows of down_proj and the tables that decode them, without prediction heads."""
    blocks, total = {*info.blocks.values()}, 0
    for tensor in plan.tensors:
        it = quantized_tensor(tensor.name)
        if it and it.block in blocks and it.part.startswith("down") and it.quantity != "bias":
            total += tensor.nbytes
    return total


def split_shards(plan: Plan, shard_bytes: int) -> dict[str, list[StreamedTensor]]:
    """Shard file, relative to the export -> its tensors; at most `shard_bytes` or one tensor."""
    shards: list[list[StreamedTensor]] = []
    room = -1
    for tensor in plan.tensors:
        if tensor.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
    folder = Path(plan.folder)
    return {
        (folder / f"model-{number:05}-of-{len(shards):05}.safetensors").as_posix(): shard
        for number, shard in enumerate(shards, start=1)
    }


def plan_files(directory: Path) -> dict[str, Path]:
    """File of the export -> its source, without weights, profiles and config.json.

    These are all other files in the model's directory and its folders that are not hidden:
    tokenizer, generation config, chat template, code, licenses.
    """
    files: dict[str, Path] = {}
    for root, folders, entries in os.walk(directory):
        left_out = FOLDERS_LEFT_OUT if Path(root) == directory else ()
        folders[:] = [f for f in folders if not f.startswith(".") and f not in left_out]
        for entry in entries:
            path = Path(root, entry)
            if not entry.startswith(".") and not WEIGHT_FILES.fullmatch(entry):
                files[path.relative_to(directory).as_posix()] = path
    del files[config_file(directory).name]
    return files


def write_weights(
    work: Path,
    shards: dict[str, list[StreamedTensor]],
    plan: Plan,
    on_progress: Progress = lambda done, total: None,
    notes: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write the shards and their index, which describes them.

    Args:
        work: the directory to write to.
        shards: from `split_shards`.
        plan: the checkpoint.
        on_progress: called after every piece written.
        notes: as of `export`.

    Raises:
        ValueError: the source changed while it was read.
    """
    total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors)
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        on_progress(done, total)

    (work / plan.folder).mkdir(exist_ok=True)
    for name, tensors in shards.items():
        stream_safetensors(tensors, work / name, count)
    weight_map = {
        tensor.name: Path(name).name for name, tensors in shards.items() for tensor in tensors
    }
    metadata = {**notes, **plan.metadata, "total_size": total}
    index = {"metadata": metadata, "weight_map": weight_map}
    _write_file(work / plan.folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())


def _write_file(path: Path, content: bytes | Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "xb") as file:
        if isinstance(content, Path):
            with open(content, "rb") as source:
                shutil.copyfileobj(source, file)
        else:
            file.write(content)
        file.flush()
        allow_reading(file.fileno())
        os.fsync(file.fileno())
