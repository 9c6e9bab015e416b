"""What one worker knows of the profiles: the place where a switch happens.

The truth lives here, on every rank alike, since several API servers may stand before one engine.
The engine delivers the calls of all of them in one order to all ranks, and what a call does depends
on its arguments and on this state alone: ranks decide alike without asking each other. Only time is
not theirs to judge: a lease is reported, and whoever displaces its owner names that owner.

Calls come through `collective_rpc` as `atomic_moe_control(verb, arguments)` and never raise: an
exception, or a call that ends early, would leave the other ranks' replies in the queue for the
next one. Every reply is plain data, `{"ok": true, …}` or `{"ok": false, "error": "…"}`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger

if TYPE_CHECKING:
    from vllm_atomic_moe.engine.layer import AtomicRoutedExperts
    from vllm_atomic_moe.engine.options import ResidentProfiles

logger = init_logger(f"vllm.{__name__}")

CONTROL = "atomic_moe_control"
ATTRIBUTE = "atomic_moe_profiles"
NOT_OURS = "the model was not loaded with --load-format atomic-pruned"
VERBS = (
    *("status", "profiles", "profile"),
    *("begin", "prepare", "commit", "rollback", "settle", "release", "fail"),
)

Reply = dict[str, Any]


class DisplacedError(Exception):
    """Another switch took the place of the one that calls."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A switch under way.

    Attributes:
        owner: who began it; every further call names it.
        profile: what it switches to.
        expires: `time.monotonic()` of this process after which others may displace the owner.
    """

    owner: str
    profile: str
    expires: float


class WorkerProfiles:
    """The profiles of one rank's layers, and the switch that is under way.

    Attributes:
        active: name of the profile that the last settled switch, or the start, made active.
        generation: number of settled switches.
        lease: the switch under way, or None.
        failure: why a switch could neither finish nor go back, or None. Then it stays so.
        last_switch: what `settle` was told about the last switch that began, or None.
    """

    def __init__(
        self, resident: ResidentProfiles, layers: Sequence[AtomicRoutedExperts], atom_bytes: int
    ) -> None:
        """Describe what is loaded.

        Args:
            resident: the profiles held in memory, and the catalogue of all there are.
            layers: this rank's packed layers, loaded.
            atom_bytes: of one atom in the serving dtype.
        """
        self._resident = resident
        self._layers = layers
        self._atom_bytes = atom_bytes
        self._digests = {name: resident.digest(name) for name in resident.profiles}
        self.active = resident.active
        self.generation = 0
        self.lease: Lease | None = None
        self.failure: str | None = None
        self.last_switch: dict[str, Any] | None = None

    def status(self) -> Reply:
        """The state, and this rank's share of the memory in bytes."""
        lease = self.lease
        profiles = self._resident.profiles
        return {
            "active": self.active,
            "generation": self.generation,
            "state": "failed" if self.failure else "switching" if lease else "serving",
            "failure": self.failure,
            "owner": lease and lease.owner,
            "lease_s": lease and lease.expires - time.monotonic(),
            "resident": list(profiles),
            "known": list(self._resident.catalogue),
            "dense_bytes": self._resident.model.atoms * self._atom_bytes,
            "active_bytes": profiles[self.active].kept_atoms * self._atom_bytes,
            "resident_bytes": sum(layer.packed.weight_bytes for layer in self._layers),
            "index_bytes": sum(layer.index_bytes for layer in self._layers),
            "last_switch": self.last_switch,
        }

    def profiles(self) -> Reply:
        """Every valid profile, resident or not."""
        return {
            "profiles": [
                {
                    "name": name,
                    "method": summary.method,
                    "kept": summary.kept,
                    "bytes": summary.kept_atoms * self._atom_bytes,
                    "resident": name in self._resident.profiles,
                    "active": name == self.active,
                }
                for name, summary in self._resident.catalogue.items()
            ]
        }

    def profile(self, name: str) -> Reply:
        """Widths of one profile: layer index -> per expert."""
        summary = self._resident.catalogue[name]
        return {"widths": {str(layer): list(widths) for layer, widths in summary.widths.items()}}

    def begin(
        self, owner: str, profile: str, generation: int, displaced: str | None, lease_s: float
    ) -> Reply:
        """Take the switch: compare and swap on generation and owner.

        Args:
            owner: name of the switch, never used before.
            profile: resident profile to switch to.
            generation: what the caller saw.
            displaced: the owner that the caller saw, whose lease has run out; None for nobody.
            lease_s: seconds that the switch may take.
        """
        if self.failure:
            raise ValueError(f"an earlier switch failed: {self.failure}")
        holder = self.lease and self.lease.owner
        if (self.generation, holder) != (generation, displaced):
            return {"ok": False, "error": "another switch came first"}
        if profile not in self._resident.profiles:
            raise ValueError(f"profile {profile!r} is not resident")
        self.lease = Lease(owner, profile, time.monotonic() + lease_s)
        return {}

    def prepare(self, owner: str) -> Reply:
        """Check that the profile can be made active here; gives the digest that ranks compare."""
        profile = self._held_by(owner).profile
        for layer in self._layers:
            layer.check_prepared(profile)
        return {"digest": self._digests[profile]}

    def commit(self, owner: str) -> Reply:
        """Make the profile the one that this rank computes. No weight moves."""
        self._activate(self._held_by(owner).profile)
        return {}

    def rollback(self, owner: str) -> Reply:
        """Go back to the active profile, wherever the switch was interrupted."""
        self._held_by(owner)
        self._activate(self.active)
        return {}

    def settle(self, owner: str, switched: bool, record: dict[str, Any]) -> Reply:
        """Decide the switch: the profile is active from now on, or still the one before.

        Args:
            owner: of the switch.
            switched: whether it was committed on every rank.
            record: what `last_switch` shows from now on.
        """
        profile = self._held_by(owner).profile
        if switched:
            self.active = profile
            self.generation += 1
        self.last_switch = record
        return {}

    def release(self, owner: str) -> Reply:
        """End the switch: another may begin."""
        self._held_by(owner)
        self.lease = None
        return {}

    def fail(self, owner: str, failure: str, record: dict[str, Any]) -> Reply:
        """Remember that a switch could neither finish nor go back, for every API server to see."""
        if self.lease is not None:
            self._held_by(owner)
        self.failure = failure
        self.last_switch = record
        return {}

    def _held_by(self, owner: str) -> Lease:
        if self.lease is None or self.lease.owner != owner:
            raise DisplacedError(f"the switch of {owner} was displaced by another")
        return self.lease

    def _activate(self, profile: str) -> None:
        for layer in self._layers:
            layer.activate(profile)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()


def control(worker: Any, verb: str, arguments: Mapping[str, Any]) -> Reply:
    """`atomic_moe_control` of vLLM's workers: answer one call; never raises."""
    try:
        assert verb in VERBS, verb
        profiles = getattr(worker.get_model(), ATTRIBUTE, None)
        if profiles is None:
            return {"ok": False, "error": NOT_OURS}
        return {"ok": True, **getattr(profiles, verb)(**arguments)}
    except DisplacedError as error:
        return {"ok": False, "error": str(error), "displaced": True}
    except Exception as error:
        logger.exception("Profile switch: %s failed", verb)
        return {"ok": False, "error": f"{type(error).__name__}: {error}"}
