"""From a checkpoint and a profile to an exported checkpoint; `export` is the whole of it.

Everything but the routed experts is copied byte for byte. The experts' rows are taken out of
memory-mapped tensors one expert at a time and streamed to disk, so that neither a shard nor a
tensor need fit into memory. The same input gives the same bytes, whatever the shards of the source.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch

from vllm_atomic_moe.convert.exporting.codes import find_codes
from vllm_atomic_moe.convert.exporting.place import (
    check_place,
    check_replaced,
    check_space,
    publish,
    working_directory,
)
from vllm_atomic_moe.convert.exporting.rows import (
    PLAIN_DTYPES,
    find_biases,
    find_rows,
    natural,
    split_names,
)
from vllm_atomic_moe.files.checkpoint import (
    CheckpointInfo,
    checkpoint_files,
    describe_checkpoint,
    resolve_model,
)
from vllm_atomic_moe.files.config import config_file
from vllm_atomic_moe.files.export_format import (
    EXPORT_DIRECTORY,
    EXPORT_FORMAT,
    EXPORT_VERSION,
    PLAIN_VERSION,
    ROW_FORMATS,
    packed_offsets,
)
from vllm_atomic_moe.files.layouts import INDEX, PACKED_ROWS, expert_tensor, packed_name
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
    """What was written.

    Attributes:
        directory: the exported checkpoint.
        profile: name of its profile.
        kept: fraction of the original model's atoms that it holds.
        weight_bytes: size of its shards.
        source_bytes: size of the shards of the checkpoint it was made from.
        shards: number of its shards.
        warnings: one line each.
    """

    directory: Path
    profile: str
    kept: float
    weight_bytes: int
    source_bytes: int
    shards: int
    warnings: list[str]


def export(
    model: str,
    profile: Path,
    output: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    on_progress: Progress = lambda done, total: None,
) -> ExportResult:
    """Write the checkpoint that holds the atoms of `profile` only.

    Args:
        model: a local directory or a Hugging Face id; it may be an export itself.
        profile: the profile file.
        output: the directory to make; an export of the same model and profile is replaced.
        shard_bytes: size of a shard at most, unless one tensor is larger.
        on_progress: called after every piece written.

    Raises:
        ValueError: the model, the profile or the output is refused, or the disk is too small;
            nothing is changed then.
        OSError: a file cannot be read or written; nothing is left behind.
    """
    directory, output = resolve_model(model), output.resolve()
    check_place(directory, output)
    info = describe_checkpoint(directory)
    chosen = PruningProfile.read(profile)
    warnings = chosen.check(info)
    with Shards(directory) as source:
        tensors = plan_tensors(source, info, chosen)
        files = plan_files(directory, profile, chosen.name)
        settings = config_file(directory)
        config = complete_config(settings.read_bytes(), source)
        shards = split_shards(tensors, shard_bytes)
        with working_directory(output) as work:
            made = {*shards, f"{EXPORT_DIRECTORY}/{INDEX}", *files, settings.name}
            check_replaced(output, info, chosen, made)
            copied = sum(path.stat().st_size for path in files.values())
            check_space(output, sum(tensor.nbytes for tensor in tensors) + copied)
            write_weights(work, shards, chosen.name, row_formats(info, tensors), on_progress)
            for name, path in files.items():
                _write_file(work / name, path)
            # Last: without it nothing takes the directory for a checkpoint.
            _write_file(work / settings.name, config)
            weight_bytes = sum((work / name).stat().st_size for name in shards)
            publish(work, output)
    return ExportResult(
        directory=output,
        profile=chosen.name,
        kept=chosen.kept,
        weight_bytes=weight_bytes,
        source_bytes=sum(path.stat().st_size for path in checkpoint_files(directory)),
        shards=len(shards),
        warnings=warnings,
    )


def plan_tensors(
    source: Shards, info: CheckpointInfo, profile: PruningProfile
) -> list[StreamedTensor]:
    """All tensors of the export, in the order of their names.

    Raises:
        ValueError: the experts are not stored in a way that is understood.
    """
    experts, others = split_names(source, info)
    planned = [_copied(source, name) for name in others]
    for layer, names in experts.items():
        find = find_rows if info.scheme(layer).kind == "plain" else find_codes
        for found in (find(source, info, layer, names), find_biases(source, info, layer, names)):
            if found is not None:
                naming = partial(packed_name, info.blocks[layer])
                planned += found.packed(naming, profile.keep[layer], info.hidden_size)
        planned += _index(info.blocks[layer], profile.keep[layer])
    return sorted(planned, key=lambda tensor: natural(tensor.name))


def _copied(source: Shards, name: str) -> StreamedTensor:
    shape, nbytes = tuple(source.shape(name)), source.tensor(name).nbytes
    return StreamedTensor(
        name, source.dtype(name), shape, nbytes, lambda: iter([source.tensor(name)])
    )


def _index(block: str, keep_EI: torch.Tensor) -> Iterator[StreamedTensor]:
    """Which atoms the packed rows of one layer are, and where."""
    for part, dtype, tensor in (
        ("offsets", "I64", packed_offsets(keep_EI)),
        ("keep", "BOOL", keep_EI),
    ):
        name, shape = packed_name(block, part), tuple(tensor.shape)
        yield StreamedTensor(name, dtype, shape, tensor.nbytes, partial(iter, [tensor]))


def row_formats(
    info: CheckpointInfo, tensors: Sequence[StreamedTensor]
) -> dict[str, dict[str, Any]] | None:
    """What the index says of rows, by layer and part; None where version 1 can hold them."""
    biased = any(
        found.packed and found.quantity == "bias"
        for tensor in tensors
        if (found := expert_tensor(tensor.name))
    )
    schemes = {layer: info.scheme(layer) for layer in info.layers}
    if not biased and all(scheme.kind == "plain" for scheme in schemes.values()):
        return None
    return {
        str(layer): {part: scheme.told() for part in PACKED_ROWS}
        for layer, scheme in schemes.items()
    }


def split_shards(
    tensors: Sequence[StreamedTensor], shard_bytes: int
) -> dict[str, list[StreamedTensor]]:
    """Shard file, relative to the export -> its tensors; at most `shard_bytes` or one tensor."""
    shards: list[list[StreamedTensor]] = []
    room = -1
    for tensor in tensors:
        if tensor.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
    return {
        f"{EXPORT_DIRECTORY}/model-{number:05}-of-{len(shards):05}.safetensors": shard
        for number, shard in enumerate(shards, start=1)
    }


def plan_files(directory: Path, profile: Path, name: str) -> dict[str, Path]:
    """File of the export -> where it comes from, without weights and configuration.

    Tokenizer, generation config, chat template, code and licences are whatever is in the model's
    directory and its folders and is not hidden, no weights and no other profile.
    """
    files = {f"atomic_profiles/{name}.safetensors": profile}
    for root, folders, entries in os.walk(directory):
        left_out = FOLDERS_LEFT_OUT if Path(root) == directory else ()
        folders[:] = [f for f in folders if not f.startswith(".") and f not in left_out]
        for entry in entries:
            path = Path(root, entry)
            if not entry.startswith(".") and not WEIGHT_FILES.fullmatch(entry):
                files[path.relative_to(directory).as_posix()] = path
    del files[config_file(directory).name]
    return dict(sorted(files.items()))


def complete_config(config_json: bytes, source: Shards) -> bytes:
    """config.json that says what vLLM otherwise reads off the headers of the shards.

    These are not where vLLM looks for them. Where the configuration gives no dtype, vLLM serves
    that of the tensors; where it calls the word embeddings tied, vLLM unties them if the checkpoint
    holds an lm_head of its own.
    """
    config = json.loads(config_json)
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    changes: dict[str, str | bool] = {}
    if not any(part.get(key) for part in parts for key in ("dtype", "torch_dtype")):
        stored = {source.dtype(name) for name in source.where} & PLAIN_DTYPES.keys()
        common = reduce(torch.promote_types, [PLAIN_DTYPES[dtype] for dtype in sorted(stored)])
        changes["dtype"] = str(common).removeprefix("torch.")
    own_head = any(name.endswith("lm_head.weight") for name in source.where)
    if own_head and config.get("tie_word_embeddings") is not False:
        changes["tie_word_embeddings"] = False
        if isinstance(config.get("text_config"), dict):
            config["text_config"]["tie_word_embeddings"] = False
    if not changes:
        return config_json
    return json.dumps({**config, **changes}, indent=2).encode() + b"\n"


def write_weights(
    work: Path,
    shards: Mapping[str, Sequence[StreamedTensor]],
    profile: str,
    formats: Mapping[str, Any] | None = None,
    on_progress: Progress = lambda done, total: None,
) -> None:
    """The shards and their index, which says what they are.

    Args:
        work: the directory to write to.
        shards: as `split_shards` gives them.
        profile: its name.
        formats: as `row_formats` gives them.
        on_progress: called after every piece written.

    Raises:
        ValueError: the source changed while it was read.
    """
    total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors)
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        on_progress(done, total)

    (work / EXPORT_DIRECTORY).mkdir()
    for name, tensors in shards.items():
        stream_safetensors(tensors, work / name, count)
    metadata = {
        "format": EXPORT_FORMAT,
        "format_version": EXPORT_VERSION if formats else PLAIN_VERSION,
        "profile": profile,
        "total_size": total,
        **({ROW_FORMATS: formats} if formats else {}),
    }
    weight_map = {
        tensor.name: Path(name).name for name, tensors in shards.items() for tensor in tensors
    }
    index = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n"
    _write_file(work / EXPORT_DIRECTORY / INDEX, index.encode())


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
