"""A repository in the Hugging Face Hub's cache, laid out by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import huggingface_hub
import pytest


def lay_out(cache: Path, repository: str, revision: str, files: Mapping[str, Path]) -> Path:
    """Write what a download leaves: a blob per file, a snapshot of links, and the revision's ref.

    Args:
        cache: the cache's directory.
        repository: "org/name".
        revision: branch or tag.
        files: path in the repository -> file.

    Returns:
        The snapshot.
    """
    folder = cache / f"models--{repository.replace('/', '--')}"
    commit = revision.encode().hex().ljust(40, "0")[:40]
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "blobs").mkdir(exist_ok=True)
    (folder / "refs" / revision).write_text(commit)
    snapshot = folder / "snapshots" / commit
    for number, (name, file) in enumerate(files.items()):
        blob = folder / "blobs" / f"{commit[:8]}{number}"
        blob.write_bytes(file.read_bytes())
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    return snapshot


def use(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process use only that cache, without a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
