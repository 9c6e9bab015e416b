"""Safetensors files, checked when read and written completely; no other module opens one.

A broken file raises a ValueError of one line. Files are memory-mapped; only headers are read if
that suffices. Our own files (profiles, statistics, scores) have the metadata strings `format` and
`format_version`.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vllm_atomic_moe.files.plain_files import (
    NotInPlaceError,
    allow_reading,
    check_not_pointer,
    one_line,
    onto_disk,
)


@contextmanager
def open_safetensors(path: Path) -> Iterator[tuple[dict[str, str], Any]]:
    """Metadata strings and the open file, which reads tensors on demand.

    Raises:
        ValueError: the file does not exist, or is not a complete safetensors file.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; check the path")
    try:
        with safe_open(path, framework="pt") as file:
            yield dict(file.metadata() or {}), file
    except (SafetensorError, OSError, RuntimeError, UnicodeDecodeError) as error:
        check_not_pointer(path)
        raise ValueError(
            f"{path}: not a complete safetensors file ({one_line(error)}); copy or make it again"
        ) from None


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """The tensor called `name`, memory-mapped."""
    with open_safetensors(path) as (_, file):
        return file.get_tensor(name)


def safetensors_files(directory: Path) -> list[Path]:
    """The safetensors files in a directory, by name, without hidden ones (`._x` of macOS)."""
    return sorted(path for path in directory.glob("*.safetensors") if not path.name.startswith("."))


def write_safetensors(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], path: Path
) -> None:
    """Write a safetensors file, complete or not at all, with mode 0644 if the mount has modes.

    If the path cannot be written, the file goes to the temporary directory or the working
    directory, so that long computations are not lost.

    Raises:
        ValueError: it cannot be written; one line with the path, and where the file is instead.
    """

    def write(path: Path) -> None:
        with replaced_file(path) as temporary:
            save_file(dict(tensors), temporary, metadata=dict(metadata))

    try:
        write(path)
    except NotInPlaceError:
        raise
    except ValueError as error:
        if rescued := _rescued(write, path.name):
            raise NotInPlaceError(
                f"{one_line(error, 140)}; what was computed is in {rescued}: move it"
            ) from error
        raise


def _rescued(write: Callable[[Path], None], name: str) -> Path | None:
    """A place to write a file that its own path has no room for, or None."""
    for place in (tempfile.gettempdir, os.getcwd):
        with suppress(OSError, ValueError):
            directory = Path(tempfile.mkdtemp(prefix="atomic-moe-", dir=place()))
            try:
                write(directory / name)
                return directory / name
            except ValueError:
                directory.rmdir()
    return None


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """A file to write that replaces `path` at the end, with mode 0644, or is removed.

    A complete file that cannot take that place stays, and the error names it.

    Raises:
        ValueError: it cannot be written.
        NotInPlaceError: it cannot take the place of `path`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise _cannot_write(path, error) from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError | SafetensorError):
            raise _cannot_write(path, error) from None
        raise
    allow_reading(temporary)
    try:
        onto_disk(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise NotInPlaceError(
            f"{path}: cannot be replaced ({error.strerror}); what was to be there is complete in "
            f"{temporary}: move it"
        ) from None
    with suppress(OSError):  # the directory's entry, if the mount can
        onto_disk(path.parent)


def _cannot_write(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path}: cannot be written ({one_line(error)}); make room, or name another place"
    )


@dataclass(frozen=True, slots=True)
class StreamedTensor:
    """A tensor that is written piece by piece, so that it need not fit into memory.

    Attributes:
        name: its name in the file.
        dtype: as safetensors spells it (BF16, F32, BOOL, …).
        shape: its shape.
        nbytes: its size.
        pieces: yields tensors; their bytes in order are the tensor's.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    pieces: Callable[[], Iterable[torch.Tensor]]


def stream_safetensors(
    tensors: Sequence[StreamedTensor], path: Path, on_bytes: Callable[[int], None]
) -> None:
    """Write a safetensors file from pieces, through to the disk, with mode 0644.

    The caller must make sure that nobody reads a half-written file.

    Args:
        tensors: the tensors; the file has the widest dtype first, so that all are aligned.
        path: a file that does not exist yet.
        on_bytes: called with the bytes written since the last call.

    Raises:
        ValueError: the pieces of a tensor have another number of bytes than announced.
    """
    tensors = sorted(tensors, key=lambda tensor: -_bits(tensor.dtype))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        entry = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
        header[tensor.name] = entry
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "xb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            written = 0
            for piece in tensor.pieces():
                written += file.write(piece.contiguous().view(-1).view(torch.uint8).numpy().data)
                on_bytes(piece.nbytes)
            if written != tensor.nbytes:
                raise ValueError(
                    f"{tensor.name}: {written} bytes were read, {tensor.nbytes} announced; "
                    "was the checkpoint changed meanwhile?"
                )
        file.flush()
        allow_reading(file.fileno())
        os.fsync(file.fileno())


def _bits(dtype: str) -> int:
    """Width of a safetensors dtype: 16 of BF16, 8 of F8_E4M3 and BOOL."""
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 8


def read_layers(
    path: Path, kind: str, version: str, names: tuple[str, ...], optional: tuple[str, ...] = ()
) -> tuple[dict[str, str], dict[int, dict[str, torch.Tensor]]]:
    """Metadata and tensors of a file that holds `layers.{i}.{name}` for every layer i.

    Args:
        path: the file.
        kind: the `format` wanted.
        version: the `format_version` wanted.
        names: the tensors that every layer must hold.
        optional: more tensors that a layer may hold.

    Returns:
        Metadata, and layer index -> name -> tensor, layers ascending.

    Raises:
        ValueError: another format or version, a missing or an unexpected tensor, a broken file.
    """
    wanted = re.compile(rf"layers\.(0|[1-9]\d{{0,8}})\.({'|'.join(names + optional)})")
    layers: dict[int, dict[str, torch.Tensor]] = {}
    with open_safetensors(path) as (metadata, file):
        check_format(path, metadata, kind, version)
        for tensor_name in file.keys():  # noqa: SIM118
            match = wanted.fullmatch(tensor_name)
            if match is None:
                raise ValueError(
                    f"{path}: unexpected tensor {shorten(tensor_name)}; an {kind} file holds "
                    f"layers.N.{{{','.join(names + optional)}}} only"
                )
            layers.setdefault(int(match[1]), {})[match[2]] = file.get_tensor(tensor_name)
    for layer, tensors in layers.items():
        for name in names:
            if name not in tensors:
                raise ValueError(f"{path}: layers.{layer}.{name} is missing; make the file again")
    return metadata, dict(sorted(layers.items()))


def check_format(path: Path, metadata: Mapping[str, str], kind: str, *versions: str) -> None:
    """Refuse a file of another format or version.

    Raises:
        ValueError: `format` is not `kind` or `format_version` is not one of `versions`.
    """
    for key, wanted in (("format", (kind,)), ("format_version", versions)):
        if metadata.get(key) not in wanted:
            seen = shorten(metadata[key]) if key in metadata else "missing"
            raise ValueError(
                f"{path}: metadata `{key}` is {seen}, wanted {' or '.join(map(repr, wanted))}; "
                "was it made by this version of atomic-moe?"
            )


def json_object(path: Path, metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    """The metadata entry `key`, a JSON object.

    Raises:
        ValueError: the entry is missing or holds another value.
    """
    try:
        value = json.loads(metadata[key])
    except (KeyError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        seen = shorten(metadata[key]) if key in metadata else "missing"
        raise ValueError(f"{path}: metadata `{key}` is {seen}, wanted a JSON object; make it again")
    return value


def model_shape(model: Mapping[str, Any]) -> tuple[list[int], int, int]:
    """MoE layers, number of experts and intermediate size of a model's identity.

    Raises:
        ValueError: an entry is missing or of another type.
    """
    layers, experts, size = (
        model.get(key) for key in ("layers", "num_experts", "intermediate_size")
    )
    if not (
        isinstance(layers, list)
        and all(isinstance(layer, int) for layer in layers)
        and isinstance(experts, int)
        and isinstance(size, int)
    ):
        raise ValueError(
            f"model metadata says layers {layers!r:.80}, num_experts {experts!r:.20}, "
            f"intermediate_size {size!r:.20}; wanted a list and two numbers; make it again"
        )
    return layers, experts, size


def check_layers(found: list[int], wanted: list[int]) -> None:
    """Refuse a file with other layers than its own model metadata says.

    Raises:
        ValueError: they differ.
    """
    if found != wanted:
        raise ValueError(
            f"holds layers {found}, its own model metadata says {wanted}; make it again"
        )


def check_tensor(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Refuse a tensor of another dtype or shape.

    Raises:
        ValueError: it is not of this dtype and shape.
    """
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        seen, wanted = (str(kind).removeprefix("torch.") for kind in (tensor.dtype, dtype))
        raise ValueError(
            f"{name} is {seen} {list(tensor.shape)}, wanted {wanted} {list(shape)}; make it again"
        )


def shorten(value: Any, limit: int = 80) -> str:
    """A foreign value, made safe for one line of a log: escaped and cut."""
    shown = repr(value)
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"
