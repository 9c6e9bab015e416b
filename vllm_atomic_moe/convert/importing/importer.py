"""What an importer is. `formats/` has ours; installed packages bring others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vllm_atomic_moe.scoring.masks import Masks


@dataclass(frozen=True, slots=True)
class Importer:
    """A format that can be imported.

    Attributes:
        read: (file, `CheckpointInfo` of the model) -> Masks; with `needs_ratio`, (file, model,
            ratio) -> Masks. It raises ValueError, with the place in the file, for what does not fit
            the model.
        help: one line: whose file it is.
        needs_ratio: the file ranks, and --ratio says which fraction of this goes ("all atoms"); ""
            for formats that carry their own selection.
    """

    read: Callable[..., Masks]
    help: str
    needs_ratio: str = ""
