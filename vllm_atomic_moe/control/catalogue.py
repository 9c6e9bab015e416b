"""The profiles of the server's directory, read again for every question."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_atomic_moe.control.errors import AdminError
from vllm_atomic_moe.engine.options import missing_atoms, read_profile
from vllm_atomic_moe.engine.requests import Served
from vllm_atomic_moe.files.checkpoint import CheckpointInfo, describe_checkpoint
from vllm_atomic_moe.files.profiles import DENSE, ProfileStore, PruningProfile


def bytes_of(atoms: int, description: Mapping[str, Any]) -> int:
    """Bytes of that many atoms as the checkpoint encodes them; `description` as for `Catalogue`."""
    return atoms * description["dense_bytes"] // description["atoms"]


class Catalogue:
    """The profiles that could be served. Reads files: call it from a thread."""

    def __init__(self, description: Mapping[str, Any]) -> None:
        """Look up where the files are.

        Args:
            description: of `CoreProfiles.describe`.
        """
        self._directory = Path(description["directory"])
        self._checkpoint = Path(description["model"])
        self._description = description
        self._packed = description["union"]
        self._routing = description["routing"]

    def profiles(self, served: Served) -> list[dict[str, Any]]:
        """Every valid profile, by name."""
        found = {}
        store = self._store()
        for name in (*store.names(), DENSE):
            try:
                found[name] = self._read(store, name)
            except ValueError:  # invalid: `atomic-moe check` prints the reason
                continue
        return [self._entry(found[name], served) for name in sorted(found)]

    def profile(self, name: str, served: Served) -> dict[str, Any]:
        """One profile with its widths.

        Raises:
            AdminError: 404, unknown; 409, its file is not valid.
        """
        profile = self.read(name)
        widths = {str(layer): profile.widths(layer).tolist() for layer in profile.keep}
        return {**self._entry(profile, served), "widths": widths}

    def read(self, name: str) -> PruningProfile:
        """A profile with a valid file. Raises as `profile`."""
        store = self._store()
        known = [*store.names(), DENSE]
        if name not in known:
            broken = "".join(f"; not valid: {reason}" for reason in store.invalid.values())
            raise AdminError(
                404,
                "NotFoundError",
                f"profile {name[:80]!r} is unknown; known are {', '.join(known)}{broken}",
            )
        try:
            return self._read(store, name)
        except ValueError as error:
            raise AdminError(409, "ProfileNotValidError", str(error)) from None

    def servable(self, name: str) -> PruningProfile:
        """A profile that can be loaded.

        Raises:
            AdminError: as `profile`; 409, not all of its atoms are in memory, the routers were not
                prepared for the experts that it excludes, or nothing for its compensation.
        """
        profile = self.read(name)
        if (reason := self._obstacle(profile)) is None:
            return profile
        kind, words = reason
        remedy = "list it in `resident` and restart the server"
        raise AdminError(409, kind, f"profile {name!r} {words}; {remedy}")

    def _obstacle(self, profile: PruningProfile) -> tuple[str, str] | None:
        """Why a profile cannot be loaded: the error's kind, and words; None if it can."""
        if missing := missing_atoms(profile, self._union):
            return "AtomsNotResidentError", f"keeps {missing} atoms that are not in memory"
        if not self._can_route(profile):
            return "RoutingMaskError", "excludes experts that the routers were not prepared for"
        if profile.compensation and not self._description["compensated"]:
            return "CompensationError", "is compensated, and no profile listed at start is"
        return None

    def _can_route(self, profile: PruningProfile) -> bool:
        """Whether the routers can apply its masks; those with a correction bias know only some."""
        if not self._routing["masks"]:
            return not profile.masks_routing
        return not self._routing["biased"] or all(
            np.packbits(profile.routable_experts(layer).numpy()).tobytes()
            in self._routing["masks"][str(layer)]
            for layer in profile.keep
        )

    def _read(self, store: ProfileStore, name: str) -> PruningProfile:
        try:
            profile = read_profile(store, name, self._model)
        except OSError as error:  # it vanished meanwhile
            raise ValueError(f"profile {name!r} cannot be read: {error}") from None
        profile.check(self._model)
        return profile

    def _store(self) -> ProfileStore:
        try:
            return ProfileStore(self._directory)
        except (ValueError, OSError) as error:
            raise AdminError(409, "ProfileNotValidError", str(error)) from None

    def _entry(self, profile: PruningProfile, served: Served) -> dict[str, Any]:
        loaded = served.loaded.get(profile.name)
        return {
            "name": profile.name,
            "method": DENSE if profile.name == DENSE else profile.metadata.get("method", ""),
            "kept": profile.kept,
            "bytes": bytes_of(profile.kept_atoms, self._description),
            "loaded": loaded is not None and loaded.offered,
            "servable": self._obstacle(profile) is None,
            "active": profile.name == served.active,
        }

    @functools.cached_property
    def _model(self) -> CheckpointInfo:
        return describe_checkpoint(self._checkpoint)

    @functools.cached_property
    def _union(self) -> dict[int, torch.Tensor]:
        shape = self._model.num_experts, self._model.intermediate_size
        return {
            int(layer): torch.from_numpy(
                np.unpackbits(np.frombuffer(packed, np.uint8), count=shape[0] * shape[1])
            )
            .bool()
            .view(shape)
            for layer, packed in self._packed.items()
        }
