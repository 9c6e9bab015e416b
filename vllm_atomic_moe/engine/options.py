"""From `--model-loader-extra-config` to the profiles in memory.

Everything here runs before any weight is read, and without vLLM, except `dense_through_loader`,
which asks vLLM for the platform.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vllm_atomic_moe.experts.backends import BACKENDS
from vllm_atomic_moe.experts.packing import SLOTS
from vllm_atomic_moe.files.checkpoint import CheckpointInfo
from vllm_atomic_moe.files.hub import resolve_profiles
from vllm_atomic_moe.files.profiles import DENSE, ProfileStore, PruningProfile

logger = logging.getLogger(f"vllm.{__name__}")

ALL = "all"
OPTION_KEYS = ("profiles", "active", "resident", "inner_format", "kernel")
KERNELS = tuple(dict.fromkeys(name for names in BACKENDS.values() for name in names))
# Formats that pass weights to the layers' weight loaders, one checkpoint tensor at a time.
INNER_FORMATS = ("safetensors", "auto", "hf")


@dataclass(frozen=True, slots=True)
class LoaderOptions:
    """The options of the load format `atomic-pruned`, checked.

    Attributes:
        profiles: directory of profile files, or a Hub repository of them (`resolve_profiles`); None
            means MODEL/atomic_profiles.
        active: the profile served first; None means the only one.
        resident: names held in memory besides `active`, or "all".
        inner_format: how vLLM reads the checkpoint.
        kernel: the backend that computes the experts; None means the fastest that runs.
        inner: the rest of the extra config, for vLLM's loader of `inner_format`.
    """

    profiles: str | None = None
    active: str | None = None
    resident: tuple[str, ...] | str = ()
    inner_format: str = "safetensors"
    kernel: str | None = None
    inner: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, extra_config: Any) -> LoaderOptions:
        """Check the extra config's types and values.

        Raises:
            ValueError: an option has the wrong type or an unknown value.
        """
        if not isinstance(extra_config, Mapping):
            raise ValueError(
                f"model_loader_extra_config is {type(extra_config).__name__}, wanted a JSON object "
                'such as {"active": "heapr-25"}'
            )
        inner = dict(extra_config)
        options = {name: inner.pop(name) for name in OPTION_KEYS if name in inner}
        for name in ("profiles", "active", "inner_format"):
            if name in options and not (isinstance(options[name], str) and options[name]):
                raise ValueError(
                    f"model_loader_extra_config: `{name}` is {options[name]!r}, wanted a string"
                )
        resident = options.get("resident", ())
        if resident != ALL:
            named = isinstance(resident, list | tuple)
            if not named or not all(isinstance(name, str) for name in resident):
                raise ValueError(
                    f"model_loader_extra_config: `resident` is {resident!r}, "
                    f'wanted a list of profile names or "{ALL}"'
                )
            options["resident"] = tuple(resident)
        inner_format = options.get("inner_format", cls.__dataclass_fields__["inner_format"].default)
        if inner_format not in INNER_FORMATS:
            raise ValueError(
                f"model_loader_extra_config: `inner_format` is {inner_format!r}, "
                f"wanted one of {', '.join(INNER_FORMATS)}"
            )
        if options.get("kernel", KERNELS[0]) not in KERNELS:
            raise ValueError(
                f"model_loader_extra_config: `kernel` is {options['kernel']!r}, "
                f"wanted one of {', '.join(KERNELS)}"
            )
        return cls(**options, inner=inner)


@dataclass(frozen=True, slots=True)
class ResidentProfiles:
    """The profiles held in memory, checked against the checkpoint.

    Attributes:
        model: the checkpoint they apply to.
        active: name of the initially active profile.
        profiles: name -> profile, `active` among them; they take slots in this order.
    """

    model: CheckpointInfo
    active: str
    profiles: Mapping[str, PruningProfile]

    def masks(self, layer: int) -> dict[str, torch.Tensor]:
        """Profile name -> bool mask [E, I] of one layer."""
        return {name: profile.keep[layer] for name, profile in self.profiles.items()}

    def routing_masks(self, layer: int) -> dict[str, torch.Tensor]:
        """Profile name -> bool mask [E] of one layer, experts the router may choose."""
        return {name: profile.routable_experts(layer) for name, profile in self.profiles.items()}

    @property
    def masking(self) -> list[str]:
        """Names of the profiles that exclude experts from routing."""
        return [name for name, profile in self.profiles.items() if profile.masks_routing]

    @property
    def compensated(self) -> list[str]:
        """Names of the profiles that have a compensation."""
        return [name for name, profile in self.profiles.items() if profile.compensation]

    def union(self) -> dict[int, torch.Tensor]:
        """Layer index -> bool [E, I], the atoms of any profile."""
        return {
            layer: torch.stack(list(self.masks(layer).values())).any(dim=0)
            for layer in self.model.layers
        }

    def digest(self) -> str:
        """SHA-256 (hex) over all profiles: the key that vLLM's compile caches lack."""
        digest = hashlib.sha256(b"packed rows 4")
        for name in sorted(self.profiles):
            digest.update(self.profiles[name].digest().encode())
        return digest.hexdigest()


def missing_atoms(profile: PruningProfile, union: Mapping[int, torch.Tensor]) -> int:
    """Number of atoms of `profile` outside `union` (layer index -> bool [E, I])."""
    return sum(int((mask & ~union[layer]).sum()) for layer, mask in profile.keep.items())


def select_profiles(
    options: LoaderOptions, directory: Path, model: CheckpointInfo
) -> ResidentProfiles:
    """Find, read and check the profiles of `directory` that `options` list.

    Raises:
        ValueError: a name is unknown, a listed file is invalid, there are more profiles than
            slots, or `active` is needed and missing.
    """
    store = ProfileStore(directory)
    active = options.active or _only_profile(store)
    everything = options.resident == ALL
    names = dict.fromkeys([active, *(store.names() if everything else options.resident)])
    profiles: dict[str, PruningProfile] = {}
    for name in names:
        try:
            profile = read_profile(store, name, model)
            warnings = profile.check(model)
        except ValueError as error:
            if name == active or not everything:
                raise
            logger.warning("left out: %s", error)
            continue
        profiles[name] = profile
        for warning in warnings:
            logger.warning("%s", warning)
    for reason in store.invalid.values():
        logger.warning("left out: %s", reason)
    if len(profiles) > SLOTS:
        raise ValueError(
            f"{len(profiles)} profiles are listed, a server has {SLOTS} slots; list fewer in "
            "`resident`, more can be loaded while it serves"
        )
    return ResidentProfiles(model, active, profiles)


def profile_directory(profiles: str | None, model_directory: Path, cache_dir: str | None) -> Path:
    """The directory of the profile files: a Hub repository's snapshot, else as the option says.

    Raises:
        ValueError: the repository cannot be fetched, or has no profiles there.
    """
    if profiles is None:
        return model_directory / "atomic_profiles"
    return resolve_profiles(profiles, cache_dir)


def read_profile(store: ProfileStore, name: str, model: CheckpointInfo) -> PruningProfile:
    """Read a profile of the directory, or make `dense`.

    Raises:
        ValueError: it is unknown, or its file is invalid.
    """
    if name == DENSE:
        return PruningProfile.dense(model)
    return store.load(name).in_memory()


def _only_profile(store: ProfileStore) -> str:
    names = store.names()
    if len(names) != 1:
        there = ", ".join(names) or "none"
        raise ValueError(
            f"{store.directory} holds {len(names)} profiles ({there}); name the one to serve: "
            """--model-loader-extra-config '{"active": "NAME"}'"""
        )
    return names[0]


def dense_through_loader(model: CheckpointInfo) -> bool:
    """Whether measurements must serve the dense model through our loader too.

    vLLM has kernels for quantized experts on few CPUs.
    """
    from vllm.platforms import current_platform

    return current_platform.is_cpu() and model.row_formats.keys() != {"plain"}


def profiles_to_measure(
    store: ProfileStore, model: CheckpointInfo, names: Sequence[str] = ()
) -> list[PruningProfile]:
    """The dense model, then the named profiles, or all; checked, with warnings logged.

    Raises:
        ValueError: a profile is unknown, invalid or does not fit.
    """
    wanted = dict.fromkeys(names or store.names())
    chosen = [store.load(name) for name in wanted if name != DENSE]
    for profile in chosen:
        for warning in profile.check(model):
            logger.warning("%s", warning)
    for reason in store.invalid.values():
        logger.warning("left out: %s", reason)
    return [PruningProfile.dense(model), *chosen]
