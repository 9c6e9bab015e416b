"""Resolve `--data`: a file, a directory or a glob -> files in a fixed order.

A directory holds shards, or the output of datasets' `save_to_disk`: Arrow files listed in
state.json, or one directory per split, listed in dataset_dict.json.
"""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

from vllm_atomic_moe.calibration.documents import SUFFIXES, split_name
from vllm_atomic_moe.files.plain_files import read_json_object

STATE, SPLITS = "state.json", "dataset_dict.json"


def exists(path: Path) -> bool:
    """Whether the path is a file, a directory, or a glob that matches a file."""
    return path.exists() or bool(_matches(path))


def files_of(path: Path) -> list[Path]:
    """The files, sorted by path.

    Raises:
        ValueError: no files, an unknown suffix, or a directory with several kinds of files or
            several splits.
    """
    if path.is_file():
        found = [path]
    elif path.is_dir():
        found = _files_in(path)
    elif not (found := _matches(path)):
        raise ValueError(f"{path} does not exist; wanted a file, a directory or a glob")
    for file in found:
        if not split_name(file)[1]:
            raise ValueError(
                f"{file}: suffix {file.suffix!r} is not known; wanted {', '.join(SUFFIXES)}, and "
                "the first three also with .gz"
            )
    return found


def domain_of(path: Path) -> str:
    """The default domain: the name of the file, the directory, or the directory of a glob."""
    if path.is_file():
        return split_name(path)[0]
    while not path.is_dir():
        path = path.parent
    return path.resolve().name or "root"


def _matches(pattern: Path) -> list[Path]:
    found = map(Path, glob.glob(str(pattern), recursive=True))
    return sorted(path for path in found if path.is_file())


def _files_in(directory: Path) -> list[Path]:
    if (directory / SPLITS).is_file():
        return _files_in(directory / _only_split(directory))
    if (directory / STATE).is_file():
        return _listed(directory)
    found = [
        path for path in _matches(Path(glob.escape(str(directory)), "*")) if split_name(path)[1]
    ]
    kinds = sorted({split_name(path)[1] for path in found})
    if not kinds:
        raise ValueError(
            f"{directory} is a directory without {', '.join(SUFFIXES)} files; name a file, or a "
            f"glob such as '{directory}/**/*.parquet'"
        )
    if len(kinds) > 1:
        raise ValueError(
            f"{directory} is a directory with {' and '.join(kinds)} files; name one kind by a "
            f"glob, such as '{directory}/*{kinds[-1]}'"
        )
    return found


def _only_split(directory: Path) -> str:
    splits = read_json_object(directory / SPLITS).get("splits")
    if not isinstance(splits, list) or not _are_names(splits):
        raise ValueError(f"{directory / SPLITS}: lists no splits; save the dataset again")
    if len(splits) > 1:
        raise ValueError(
            f"{directory} is a dataset with the splits {', '.join(splits)}; name one, as in "
            f"{directory / splits[0]}"
        )
    return str(splits[0])


def _listed(directory: Path) -> list[Path]:
    """The files of a saved dataset; other Arrow files in the directory are caches."""
    entries = read_json_object(directory / STATE).get("_data_files")
    listed = entries if isinstance(entries, list) else []
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in listed]
    if not _are_names(names):
        raise ValueError(f"{directory / STATE}: lists no files; save the dataset again")
    found = sorted(directory / str(name) for name in names)
    for path in found:
        if not path.is_file():
            raise ValueError(f"{path} does not exist, and {STATE} lists it; copy it again")
    return found


def _are_names(names: list[Any]) -> bool:
    """Whether the list has at least one entry, and all are plain file names."""
    return bool(names) and all(isinstance(name, str) and Path(name).name == name for name in names)
