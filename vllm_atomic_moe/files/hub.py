"""Repositories of the Hugging Face Hub, cached or fetched; every failure is one line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from vllm_atomic_moe.files.plain_files import one_line

# The Hub's own form of paths. A segment of dots alone would leave the snapshot.
_SEGMENT = r"(?!\.+(?:/|$))[\w.-]+"
REPOSITORY = re.compile(
    rf"(?P<name>{_SEGMENT}/{_SEGMENT})(?:@(?P<revision>refs/pr/\d+|[^/@\s]+))?"
    rf"(?:/(?P<folder>{_SEGMENT}(?:/{_SEGMENT})*))?",
    re.ASCII,
)


def fetch(
    what: str,
    repository: str,
    revision: str | None,
    cache_dir: str | None,
    allow: Sequence[str],
    ignore: Sequence[str],
) -> Path:
    """The snapshot of a repository.

    Args:
        what: its purpose, for messages: "model 'org/name'".
        repository: its id.
        revision: branch, tag or commit; None means `main`.
        cache_dir: where snapshots are kept; None means the default cache.
        allow: patterns of files to fetch.
        ignore: patterns of files among these to skip.

    Raises:
        ValueError: neither the hub nor its cache has it, or the hub cannot be asked (for example,
            httpx does not accept a proxy of the environment).
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                cache_dir=cache_dir,
                allow_patterns=[*allow],
                ignore_patterns=[*ignore],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"{what} is neither a directory nor on the Hugging Face Hub "
            f"({type(error).__name__}); check the path or the id, or set HF_TOKEN for a gated "
            "or private one"
        ) from error
    except OSError as error:
        raise ValueError(
            f"{what} cannot be fetched from the Hugging Face Hub ({one_line(error)}); "
            "make room, or check the path"
        ) from error
    except Exception as error:  # httpx: ImportError of a SOCKS library, InvalidURL, ValueError.
        raise ValueError(
            f"{what} is not a directory, and the Hugging Face Hub cannot be asked "
            f"({type(error).__name__}: {one_line(error)}); check the path, or HTTP_PROXY, "
            "ALL_PROXY and NO_PROXY"
        ) from error


def resolve_profiles(profiles: str, cache_dir: str | None = None) -> Path:
    """The directory of profiles: itself if it is one, else a folder of a Hub repository.

    Repositories are written `org/name`, `org/name@revision`, `org/name/folder` or
    `org/name@revision/folder`. Only that folder's profile files and README.md are fetched.
    Any other string is returned as a path.

    Args:
        profiles: path or repository.
        cache_dir: where snapshots are kept; None means the default cache.

    Raises:
        ValueError: as `fetch`, or the repository has no such folder with profile files.
    """
    match = None if Path(profiles).exists() else REPOSITORY.fullmatch(profiles)
    if match is None:
        return Path(profiles)
    prefix = f"{match['folder']}/" if match["folder"] else ""
    what = f"profiles {profiles!r}: {match['name']!r}"
    allow, ignore = [f"{prefix}*.safetensors", f"{prefix}README.md"], [f"{prefix}*/*"]
    snapshot = fetch(what, match["name"], match["revision"], cache_dir, allow, ignore)
    directory = snapshot / prefix
    if not any(directory.glob("*.safetensors")):
        raise ValueError(
            f"{what} holds no *.safetensors profile in {prefix or 'its first level'}; name the "
            "folder that has them, as in org/name/folder"
        )
    return directory
