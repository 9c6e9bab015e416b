"""Decides whether a calibration runs layer by layer, on which device, and where it keeps inputs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers

from vllm_atomic_moe import __version__
from vllm_atomic_moe.calibration.free_memory import free_bytes
from vllm_atomic_moe.calibration.kept import InMemory, Kept, Scratch
from vllm_atomic_moe.calibration.layer_reader import LayerReader, weight_bytes
from vllm_atomic_moe.calibration.ranks import Ranks
from vllm_atomic_moe.calibration.text import CalibrationText
from vllm_atomic_moe.files.checkpoint import locate_tensors
from vllm_atomic_moe.files.config import config_file

CPU = torch.device("cpu")


def streaming_reason(
    stream: bool | None,
    scratch: Path | None,
    directory: Path,
    dtype: torch.dtype,
    device_map: str | dict[str, str],
    ranks: Ranks,
) -> str | None:
    """The reason to run layer by layer, for people; empty if they asked for it; None to load the
    whole model.

    Args:
        stream, scratch: see `CalibrationOptions`.
        directory: of the checkpoint.
        dtype: of the computation.
        device_map: see `resolve_device`.
        ranks: this process; those on the same machine share its memory.

    Raises:
        ValueError: a scratch directory is given although `stream` is False.
    """
    if scratch is not None and stream is False:
        raise ValueError("--scratch is for calibration layer by layer; leave out --no-stream")
    if stream or scratch is not None:
        return ""
    if stream is False:
        return None
    if device_map == "auto":
        devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    else:
        devices = [one_device(device_map)]
    needed, free = weight_bytes(directory, dtype), sum(map(free_bytes, devices))
    if devices == [CPU]:
        free //= ranks.local_world
    if needed <= free:
        return None
    return (
        f"the weights take {needed / 2**30:.1f} GiB in {str(dtype).removeprefix('torch.')}, "
        f"{free / 2**30:.1f} GiB are free: calibrating layer by layer"
    )


def one_device(device_map: str | dict[str, str]) -> torch.device:
    """The device of `resolve_device`; the first one if that means all CUDA devices."""
    return torch.device("cuda:0" if isinstance(device_map, str) else device_map[""])


def keep(
    reader: LayerReader,
    text: CalibrationText,
    batch_size: int,
    gradients: bool,
    scratch: Path | None,
    ranks: Ranks,
) -> Kept:
    """The store of layers' inputs: a directory per process in `scratch`, or memory.

    Raises:
        ValueError: as `Scratch`.
    """
    if scratch is None:
        free = free_bytes(CPU) // ranks.local_world
        return InMemory(free - (reader.largest_layer_bytes if reader.device == CPU else 0))
    run: dict[str, Any] = {
        "model": reader.checkpoint.identity(),
        "files": _files(reader.directory),
        "text": text.digests,
        "batch size": batch_size,
        "dtype": str(reader.dtype),
        "device": reader.device.type,
        "gradients": gradients,
        "software": [__version__, torch.__version__, transformers.__version__],
    }
    return Scratch(scratch / f"rank-{ranks.rank}", run)


def _files(directory: Path) -> str:
    """Digest of names, sizes and times of a checkpoint's shards, and of its configuration."""
    shards = sorted(set(locate_tensors(directory).values()))
    told = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in shards]
    config = config_file(directory).read_bytes()
    return hashlib.sha256(json.dumps(told).encode() + config).hexdigest()
