"""The profile file: which atoms of which experts stay.

A profile is one safetensors file with a bool mask `layers.{i}.keep` [E, I] per MoE layer and a few
strings of metadata; version 2 may add a `compensation`. The loader and `atomic-moe check` share the
checks here; an error is one line: the value seen, the value wanted, the remedy. Files are
memory-mapped, and listing a directory reads only headers.

Legend: E experts, I full intermediate size, K experts per token.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from vllm_atomic_moe.files.checkpoint import CheckpointInfo
from vllm_atomic_moe.files.compensation import (
    BIAS,
    SCALE,
    Compensation,
    check_compensation,
    gather,
)
from vllm_atomic_moe.files.plain_files import NAME, check_output
from vllm_atomic_moe.files.router import RouterIdentity, differ_by_rounding
from vllm_atomic_moe.files.tensors import (
    check_format,
    open_safetensors,
    safetensors_files,
    shorten,
    write_safetensors,
)

FORMAT = "atomic-moe-profile"
PLAIN_VERSION, COMPENSATED_VERSION = VERSIONS = ("1", "2")
DENSE = "dense"
TENSOR = re.compile(rf"layers\.(0|[1-9]\d{{0,8}})\.(keep|routable|{SCALE}|{BIAS})")
NAME_RULE = "a name is 1 to 64 of a-z 0-9 . _ - and starts with a letter or digit"
IDENTITY_KEYS = (
    "architecture",
    "num_experts",
    "intermediate_size",
    "hidden_size",
    "layers",
)


@dataclass(frozen=True, slots=True, eq=False)
class PruningProfile:
    """A named, validated set of masks.

    Attributes:
        name: matches `[a-z0-9][a-z0-9._-]{0,63}`; `dense` is reserved for "all atoms".
        keep: MoE layer index -> bool [E, I], True where an atom stays.
        routable: MoE layer index -> bool [E], experts the router may choose; an absent layer routes
            to all of its experts.
        compensation: MoE layer index -> scale and bias of its experts' outputs; an absent layer
            has none.
        metadata: the file's other strings (method, ratio, kept, model, calibration, created_by and
            unknown keys, which are kept as they are).
    """

    name: str
    keep: Mapping[int, torch.Tensor]
    routable: Mapping[int, torch.Tensor] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    compensation: Mapping[int, Compensation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for of_layers in ("keep", "routable", "compensation"):
            ordered = dict(sorted(getattr(self, of_layers).items()))
            object.__setattr__(self, of_layers, MappingProxyType(ordered))
        object.__setattr__(self, "metadata", MappingProxyType(dict(self.metadata)))
        if not NAME.fullmatch(self.name):
            raise ValueError(f"profile name {shorten(self.name)} is not allowed: {NAME_RULE}")
        _check_tensors(self.name, self.keep, self.routable)
        try:
            shapes = {layer: tuple(mask.shape) for layer, mask in self.keep.items()}
            check_compensation(self.compensation, shapes)
        except ValueError as error:
            raise ValueError(f"profile {self.name!r}: {error}") from None

    @classmethod
    def dense(cls, model: CheckpointInfo) -> PruningProfile:
        """The profile that keeps every atom of `model`. It exists in memory only."""
        mask = torch.ones(model.num_experts, model.intermediate_size, dtype=torch.bool)
        return cls(DENSE, dict.fromkeys(model.layers, mask))

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> PruningProfile:
        """Read and validate the profile file at `path`; the masks are memory-mapped.

        Raises:
            ValueError: the file has a fault that is visible without the model.
        """
        path = Path(path)
        with open_safetensors(path) as (metadata, file):
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        name = _check_header(path, metadata)
        version = metadata["format_version"]
        masks: dict[str, dict[int, torch.Tensor]] = {"keep": {}, "routable": {}}
        others: dict[int, dict[str, torch.Tensor]] = {}
        for tensor_name, tensor in tensors.items():
            match = TENSOR.fullmatch(tensor_name)
            if match is None or (match[2] not in masks and version == PLAIN_VERSION):
                more = f", layers.N.{SCALE} and layers.N.{BIAS}" * (version != PLAIN_VERSION)
                raise ValueError(
                    f"{path}: unexpected tensor {shorten(tensor_name)}; "
                    f"a profile holds layers.N.keep and layers.N.routable{more} only"
                )
            if match[2] in masks:
                masks[match[2]][int(match[1])] = tensor
            else:
                others.setdefault(int(match[1]), {})[match[2]] = tensor
        rest = {k: v for k, v in metadata.items() if k not in ("format", "format_version", "name")}
        try:
            return cls(name, masks["keep"], masks["routable"], rest, gather(others))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def write(self, path: Path) -> None:
        """Write the profile to `path`, complete or not at all (mode 0644).

        Raises:
            ValueError: the profile is called `dense`, which is reserved.
        """
        _check_not_reserved(self.name)
        tensors = {f"layers.{i}.keep": mask.contiguous() for i, mask in self.keep.items()}
        for i, mask in self.routable.items():
            tensors[f"layers.{i}.routable"] = mask.contiguous()
        for i, compensation in self.compensation.items():
            tensors |= {f"layers.{i}.{name}": it for name, it in compensation.tensors().items()}
        metadata = {
            **self.metadata,
            "format": FORMAT,
            "format_version": COMPENSATED_VERSION if self.compensation else PLAIN_VERSION,
            "name": self.name,
        }
        write_safetensors(tensors, metadata, path)

    def write_into(self, directory: Path) -> Path:
        """Write the profile as NAME.safetensors into `directory`, creating it; returns the file.

        Raises:
            ValueError: as `write`, or the file cannot be written there.
        """
        path = directory / f"{self.name}.safetensors"
        check_output(path)
        self.write(path)
        return path

    def digest(self) -> str:
        """SHA-256 (hex) over name, masks and compensation, which identifies what is computed."""
        digest = hashlib.sha256(self.name.encode())
        for layer, mask in self.keep.items():
            digest.update(f" {layer} {list(mask.shape)} ".encode())
            digest.update(mask.numpy().tobytes())
            digest.update(self.routable_experts(layer).numpy().tobytes())
            if layer in self.compensation:
                for name, tensor in self.compensation[layer].tensors().items():
                    digest.update(f" {name} {list(tensor.shape)} ".encode())
                    digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def in_memory(self) -> PruningProfile:
        """A copy that does not change with its file."""
        keep = {layer: mask.clone() for layer, mask in self.keep.items()}
        routable = {layer: mask.clone() for layer, mask in self.routable.items()}
        compensation = {layer: it.clone() for layer, it in self.compensation.items()}
        return PruningProfile(self.name, keep, routable, self.metadata, compensation)

    @property
    def kept(self) -> float:
        """Fraction of the atoms of all layers that are kept."""
        return self.kept_atoms / max(1, sum(mask.numel() for mask in self.keep.values()))

    @property
    def kept_atoms(self) -> int:
        """Number of kept atoms in all layers."""
        return sum(int(mask.sum()) for mask in self.keep.values())

    @property
    def model(self) -> dict[str, Any] | None:
        """The identity of the model the profile was made for; None if the file does not say.

        Raises:
            ValueError: the metadata entry `model` is not a JSON object.
        """
        if "model" not in self.metadata:
            return None
        try:
            model = json.loads(self.metadata["model"])
        except (ValueError, RecursionError):
            model = None
        if not isinstance(model, dict):
            raise ValueError(
                f"profile {self.name!r}: metadata `model` is not a JSON object; "
                "remove it or make the profile again"
            )
        return model

    @property
    def masks_routing(self) -> bool:
        """Whether the router may not choose some experts."""
        return not all(bool(mask.all()) for mask in self.routable.values())

    def routable_experts(self, layer: int) -> torch.Tensor:
        """Experts of one layer that the router may choose: bool [E], all of them by default."""
        everything = torch.ones(self.keep[layer].shape[0], dtype=torch.bool, device="cpu")
        return self.routable.get(layer, everything)

    def widths(self, layer: int) -> torch.Tensor:
        """Kept width of every expert of one layer: int64 [E]."""
        return self.keep[layer].sum(dim=1)

    def check(self, model: CheckpointInfo) -> list[str]:
        """Check the profile against a checkpoint.

        Returns:
            Warnings, one line each (an unknown origin is not an error).

        Raises:
            ValueError: a layer is missing or extra, a mask has the wrong shape, fewer than K
                experts are routable in a layer or too few in the router's groups, the profile was
                made for another model, or it keeps atoms that an exported checkpoint does not hold.
        """
        found, wanted = tuple(self.keep), model.layers
        if found != wanted:
            missing = sorted(set(wanted) - set(found))
            extra = sorted(set(found) - set(wanted))
            raise ValueError(
                f"profile {self.name!r}: "
                + " and ".join(
                    f"{word} layers {_shorten_list(layers)}"
                    for word, layers in (("lacks", missing), ("has unknown", extra))
                    if layers
                )
                + f"; the model's MoE layers are {_shorten_list(wanted)}; "
                "was it made for another model?"
            )
        shape = (model.num_experts, model.intermediate_size)
        for layer, mask in self.keep.items():
            if tuple(mask.shape) != shape:
                raise ValueError(
                    f"profile {self.name!r}: layers.{layer}.keep is {list(mask.shape)}, "
                    f"the model has {list(shape)}; was it made for another model?"
                )
        for layer, routable in self.routable.items():
            if int(routable.sum()) < model.experts_per_token:
                raise ValueError(
                    f"profile {self.name!r}: layers.{layer}.routable leaves {int(routable.sum())} "
                    f"experts, a token uses {model.experts_per_token}; keep at least as many"
                )
            fault = model.groups and model.groups.fault(routable, model.experts_per_token)
            if fault:
                raise ValueError(f"profile {self.name!r}: layers.{layer}.routable {fault}")
        for layer, compensation in self.compensation.items():
            if compensation.bias_EH.shape[1] != model.hidden_size:
                raise ValueError(
                    f"profile {self.name!r}: layers.{layer}.{BIAS} is "
                    f"{list(compensation.bias_EH.shape)}, the model's hidden size is "
                    f"{model.hidden_size}; was it made for another model?"
                )
        warnings = self._check_origin(model)
        self._check_stored(model)
        return warnings

    def _check_stored(self, model: CheckpointInfo) -> None:
        """Refuse a profile that keeps atoms which an exported checkpoint does not hold."""
        for layer, stored in (model.stored or {}).items():
            absent = int((self.keep[layer] & ~stored).sum())
            if absent:
                raise ValueError(
                    f"profile {self.name!r}: layers.{layer}.keep keeps {absent} atoms that the "
                    "exported checkpoint does not hold; use the original model, or a profile "
                    "within the one that was exported"
                )

    def _check_origin(self, model: CheckpointInfo) -> list[str]:
        if self.name == DENSE:
            return []
        origin, wanted = self.model, model.identity()
        if origin is None:
            return [
                f"profile {self.name!r} does not say which model it was made for; "
                "its masks fit, their origin is unknown"
            ]
        for key in IDENTITY_KEYS:
            if key in origin and origin[key] != wanted[key]:
                raise ValueError(
                    f"profile {self.name!r}: made for {key} {shorten(origin[key])}, "
                    f"the model has {shorten(wanted[key])}; "
                    "make a profile for this model (a fine-tuned sibling is another model)"
                )
        return self._check_router(model.router, origin)

    def _check_router(self, router: RouterIdentity, origin: Mapping[str, Any]) -> list[str]:
        digest = origin.get("router_sha256", router.sha256)
        # Version 0.1 wrote the digest of the stored bytes.
        if digest in (router.sha256, router.stored_sha256):
            return []
        if differ_by_rounding(origin.get("router_sample"), list(router.sample)):
            return [
                f"profile {self.name!r}: the model's router differs by rounding only from the one "
                "it was made for, as in a copy in another dtype; its masks fit"
            ]
        raise ValueError(
            f"profile {self.name!r}: made for router_sha256 {shorten(digest)}, the model has "
            f"{shorten(router.sha256)}; make a profile for this model (a fine-tuned sibling is "
            "another model)"
        )


class ProfileStore:
    """A directory of profile files, listed by the names inside them.

    Attributes:
        directory: the directory.
        paths: profile name -> file, for every file with a valid header.
        invalid: file -> one line that says what is wrong with its header.

    Raises:
        ValueError: the directory does not exist, or two files carry one name.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.paths: dict[str, Path] = {}
        self.invalid: dict[Path, str] = {}
        if not directory.is_dir():
            raise ValueError(
                f"profile directory {directory} does not exist; make profiles with "
                "`atomic-moe prune`, or name another directory"
            )
        for path in safetensors_files(directory):
            try:
                with open_safetensors(path) as (metadata, _):
                    name = _check_header(path, metadata)
            except ValueError as error:
                self.invalid[path] = str(error)
                continue
            if name in self.paths:
                raise ValueError(
                    f"{self.paths[name]} and {path} both carry the name {name!r}; "
                    "rename one (names are in the metadata) or remove it"
                )
            self.paths[name] = path

    def names(self) -> list[str]:
        """Names of the profiles with a valid header, sorted."""
        return sorted(self.paths)

    def load(self, name: str) -> PruningProfile:
        """Read the profile called `name`.

        Raises:
            ValueError: there is none, or its file is invalid.
        """
        if name not in self.paths:
            there = ", ".join(self.names()) or "none"
            broken = "".join(f"; unreadable: {reason}" for reason in self.invalid.values())
            raise ValueError(
                f"profile {shorten(name)} is not in {self.directory}; "
                f"profiles there: {there}{broken}"
            )
        return PruningProfile.read(self.paths[name])


def _check_header(path: Path, metadata: Mapping[str, str]) -> str:
    """The profile's name; refuses files that are not profiles of a known version."""
    check_format(path, metadata, FORMAT, *VERSIONS)
    name = metadata.get("name", "")
    if not NAME.fullmatch(name):
        raise ValueError(f"{path}: metadata `name` is {shorten(name)}: {NAME_RULE}")
    try:
        _check_not_reserved(name)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return name


def _check_not_reserved(name: str) -> None:
    if name == DENSE:
        raise ValueError(f"profile name {DENSE!r} is reserved for all atoms; choose another name")


def _check_tensors(
    name: str, keep: Mapping[int, torch.Tensor], routable: Mapping[int, torch.Tensor]
) -> None:
    if not keep:
        raise ValueError(f"profile {name!r}: holds no layers.N.keep mask; make it again")
    shapes = {tuple(mask.shape) for mask in keep.values()}
    for key, masks, rank in (("keep", keep, 2), ("routable", routable, 1)):
        for layer, mask in masks.items():
            if mask.dtype != torch.bool or mask.dim() != rank:
                raise ValueError(
                    f"profile {name!r}: layers.{layer}.{key} is {_dtype(mask)} {list(mask.shape)}, "
                    f"wanted bool of rank {rank}"
                )
    if len(shapes) != 1:
        raise ValueError(
            f"profile {name!r}: masks have shapes {sorted(map(list, shapes))}; "
            "one shape [E, I] for all layers is wanted"
        )
    for layer, mask in routable.items():
        if layer not in keep or mask.shape[0] != keep[layer].shape[0]:
            raise ValueError(
                f"profile {name!r}: layers.{layer}.routable is {list(mask.shape)}, "
                f"wanted [E] beside layers.{layer}.keep [E, I]"
            )
        if bool(keep[layer][~mask].any()):
            raise ValueError(
                f"profile {name!r}: layers.{layer}.keep keeps atoms of experts that "
                f"layers.{layer}.routable excludes; clear them"
            )


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shorten_list(layers: Any, limit: int = 8) -> str:
    items = [str(layer) for layer in layers]
    return "[" + ", ".join(items[:limit] + (["…"] if len(items) > limit else [])) + "]"
