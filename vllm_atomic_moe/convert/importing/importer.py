"""The definition of an importer. `formats/` has ours; installed packages add others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vllm_atomic_moe.scoring.masks import Masks


@dataclass(frozen=True, slots=True)
class Importer:
    """A format that can be imported.

    Attributes:
        read: (file, `CheckpointInfo` of the model) -> Masks; with `needs_ratio`, (file, model,
            ratio) -> Masks. If the file does not fit the model, it raises ValueError with the place
            in the file.
        help: one line that says whose file it is.
        needs_ratio: what --ratio is a fraction of ("all atoms"), for files that rank; "" for
            formats with their own selection.
    """

    read: Callable[..., Masks]
    help: str
    needs_ratio: str = ""
