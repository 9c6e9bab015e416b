"""The statistics file: sums over calibration tokens, nothing larger than [D, E, I].

A few numbers per atom and per expert suffice for every method (see `scoring/`). Because they are
sums, statistics of shards of one run add up to those of the whole run. Sums are per domain, so that
one run can make masks for some of its domains.

Legend: D domains, E experts, H hidden size, I full intermediate size, K experts per token, S rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from vllm_atomic_moe import __version__
from vllm_atomic_moe.files.tensors import (
    check_layers,
    check_tensor,
    json_object,
    model_shape,
    open_safetensors,
    read_layers,
    shorten,
    write_safetensors,
)

FORMAT = "atomic-moe-statistics"
FORMAT_VERSION = "1"
# Axes of every float64 tensor; those with D are sums over tokens, the others norms of weights.
AXES = {
    "count": "DE",
    "output_norm": "DE",
    "output_change": "DE",
    "h2": "DEI",
    "contribution": "DEI",
    "g2": "DEI",
    "gate_norm": "EI",
    "up_norm": "EI",
    "down_norm": "EI",
}
SUMS = tuple(name for name, axes in AXES.items() if "D" in axes)
NORMS = tuple(name for name in AXES if name not in SUMS)
SIGNED = ("contribution",)
# Sums that a calibration leaves out, and the flag that makes it.
OPTIONAL = {"g2": "--no-gradients"}
# What calibration metadata say of the files that the text came from.
FILES = ("corpora", "field")
# Methods that score atoms by tokens do not trust an expert with fewer tokens.
MIN_TOKENS = 32


@dataclass(frozen=True, slots=True, eq=False)
class LayerSums:
    """Sums over the tokens that a layer routes to its experts; float64 unless noted.

    For one token and expert: x is the expert's input, h = act(gate·x) ⊙ (up·x), y its output, p
    the router weight, ℓ the language-model loss summed over a window, w_k column k of `down_proj`.

    Attributes:
        count: [D, E], tokens routed to the expert.
        output_norm: [D, E], Σ p‖y‖.
        output_change: [D, E], Σ p‖y‖(1 − cos(x, y)).
        h2: [D, E, I], Σ h².
        contribution: [D, E, I], Σ h_k⟨w_k, y⟩/‖y‖, signed.
        gate_norm, up_norm, down_norm: [E, I], L2 norms of every atom's vectors (not sums).
        sets: int16 [S, 1+K], the top-k sets that tokens chose: the domain's index, then the expert
            ids, ascending; rows are unique and sorted.
        set_counts: int64 [S], number of tokens that chose each set.
        g2: [D, E, I], Σ (∂ℓ/∂h)²; None after `--no-gradients`.
    """

    count: torch.Tensor
    output_norm: torch.Tensor
    output_change: torch.Tensor
    h2: torch.Tensor
    contribution: torch.Tensor
    gate_norm: torch.Tensor
    up_norm: torch.Tensor
    down_norm: torch.Tensor
    sets: torch.Tensor
    set_counts: torch.Tensor
    g2: torch.Tensor | None = None

    @classmethod
    def zeros(
        cls, shape: tuple[int, int, int], gradients: bool, device: torch.device | str = "cpu"
    ) -> LayerSums:
        """Sums of no tokens: all zero, the table of sets empty.

        Args:
            shape: (D, E, I).
            gradients: whether there is a `g2`.
            device: of the tensors.
        """
        tensors = {
            name: torch.zeros(_shape(axes, shape), dtype=torch.float64, device=device)
            for name, axes in AXES.items()
            if gradients or name not in OPTIONAL
        }
        sets = torch.zeros(0, 1, dtype=torch.int16)
        return cls(**tensors, sets=sets, set_counts=torch.zeros(0, dtype=torch.int64))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Field name -> tensor, as in the file."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def few_tokens(self) -> torch.Tensor:
        """Experts that saw fewer than MIN_TOKENS tokens of all domains together: bool [E]."""
        return self.count.sum(dim=0) < MIN_TOKENS


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """Sums over calibration tokens.

    Attributes:
        model: `CheckpointInfo.identity()` of the calibrated model.
        calibration: how the sums were made: `domains` (names, in the order of D), `corpora`
            (name, sha256, domain, documents and tokens of every file), `tokens` (run through the
            model), `experts_per_token` (K), `expert_groups` (the router's, null if it has none;
            version 0.1 does not tell), `seq_len`, `samples`, `seed`, `dtype`, `gradients`, `field`,
            `windows_sha256` (domain -> digest of all its windows; version 0.1 does not tell); and
            for a part of a run `shards`, {"of": N, "here": [1-based numbers]}.
        sums: MoE layer index -> sums.
    """

    model: Mapping[str, Any]
    calibration: Mapping[str, Any]
    sums: Mapping[int, LayerSums]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sums", MappingProxyType(dict(sorted(self.sums.items()))))
        layers, experts, size = model_shape(self.model)
        check_layers(list(self.sums), layers)
        top_k = self.calibration.get("experts_per_token")
        for name, kind, wanted in (
            ("domains", list, "a list of names"),
            ("experts_per_token", int, "a number"),
        ):
            value = self.calibration.get(name)
            if not isinstance(value, kind) or not value:
                raise ValueError(
                    f"calibration metadata `{name}` is {shorten(value)}, wanted {wanted}; "
                    "calibrate again"
                )
        _check_description(self.calibration)
        shape = (len(self.domains), experts, size)
        for layer, sums in self.sums.items():
            _check_sums(f"layers.{layer}", sums, shape)
            _check_table(f"layers.{layer}", sums, shape, int(top_k))  # type: ignore[arg-type]

    @property
    def domains(self) -> list[str]:
        """Names of the domains, in the order of D."""
        return list(self.calibration["domains"])

    @classmethod
    def read(cls, path: Path) -> Statistics:
        """Read and check the statistics file at `path`.

        Raises:
            ValueError: the file is broken or of another format or version, its tensors do not have
                the shapes of its own metadata, or a sum is negative or not finite.
        """
        required = tuple(field.name for field in fields(LayerSums) if field.name not in OPTIONAL)
        metadata, layers = read_layers(path, FORMAT, FORMAT_VERSION, required, tuple(OPTIONAL))
        sums = {layer: LayerSums(**tensors) for layer, tensors in layers.items()}
        model = json_object(path, metadata, "model")
        calibration = json_object(path, metadata, "calibration")
        try:
            return cls(model, calibration, sums)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def write(self, path: Path) -> None:
        """Write the statistics to `path`, complete or not at all."""
        tensors = {
            f"layers.{layer}.{name}": tensor.contiguous()
            for layer, sums in self.sums.items()
            for name, tensor in sums.tensors().items()
        }
        metadata = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "model": json.dumps(dict(self.model)),
            "calibration": json.dumps(dict(self.calibration)),
            "created_by": f"vllm-atomic-moe {__version__}",
        }
        write_safetensors(tensors, metadata, path)

    def select(self, domains: Sequence[str]) -> Statistics:
        """The statistics of some of the domains, as if only those had been calibrated.

        Raises:
            ValueError: a domain is unknown, or named twice.
        """
        for domain in domains:
            if domain not in self.domains or list(domains).count(domain) > 1:
                raise ValueError(
                    f"domain {shorten(domain)} is named twice or not calibrated; "
                    f"the statistics hold {', '.join(self.domains)}"
                )
        chosen = torch.tensor([self.domains.index(domain) for domain in domains])
        layers = {layer: _select_domains(sums, chosen) for layer, sums in self.sums.items()}
        counted = next(iter(layers.values())).count.sum()
        corpora = [
            corpus for corpus in self.calibration.get("corpora", ()) if corpus["domain"] in domains
        ]
        digests = self.calibration.get("windows_sha256") or {}
        calibration = {
            **self.calibration,
            "domains": list(domains),
            "corpora": corpora,
            "tokens": int(counted) // int(self.calibration["experts_per_token"]),
        }
        if digests:
            calibration["windows_sha256"] = {domain: digests[domain] for domain in domains}
        return replace(self, calibration=calibration, sums=layers)


def is_statistics(path: Path) -> bool:
    """Whether a file says that it is one of statistics.

    Raises:
        ValueError: it is not a complete safetensors file.
    """
    with open_safetensors(path) as (metadata, _):
        return metadata.get("format") == FORMAT


def data_digest(calibration: Mapping[str, Any]) -> str | None:
    """Sixteen hex digits for the windows of all domains, whatever files and order they came in.

    None if the calibration, of version 0.1, does not tell.
    """
    digests = calibration.get("windows_sha256")
    if not digests:
        return None
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:16]


def merge(shards: Sequence[Statistics]) -> Statistics:
    """Add the statistics of shards of one run.

    Args:
        shards: made with `--shard i/N` of one N, each i at most once; not modified. The result of
            an incomplete merge may be merged further.

    Raises:
        ValueError: a file is not a shard, a shard occurs twice, or model or settings differ.
    """
    first, done = shards[0], list[int]()
    for shard in shards:
        _check_mergeable(first, shard)
        here = shard.calibration["shards"]["here"]
        if twice := sorted(set(here) & set(done)):
            of = shard.calibration["shards"]["of"]
            raise ValueError(f"shard {twice[0]}/{of} occurs twice; give every shard once")
        done += here
    calibration = dict(first.calibration)
    calibration["tokens"] = sum(shard.calibration["tokens"] for shard in shards)
    calibration["shards"] = {"of": calibration["shards"]["of"], "here": sorted(done)}
    if len(done) == calibration["shards"]["of"]:
        del calibration["shards"]
    layers = {layer: _add_sums([shard.sums[layer] for shard in shards]) for layer in first.sums}
    return Statistics(first.model, calibration, layers)


def _check_description(calibration: Mapping[str, Any]) -> None:
    """Refuse metadata that `merge` and `select` cannot use."""
    shards, corpora = calibration.get("shards"), calibration.get("corpora", [])
    digests = calibration.get("windows_sha256")
    sound = {
        "windows_sha256": digests is None
        or (
            isinstance(digests, dict)
            and digests.keys() == set(calibration["domains"])
            and all(isinstance(digest, str) for digest in digests.values())
        ),
        "tokens": isinstance(calibration.get("tokens"), int),
        "corpora": isinstance(corpora, list)
        and all(isinstance(corpus, dict) and "domain" in corpus for corpus in corpora),
        "shards": shards is None
        or (
            isinstance(shards, dict)
            and isinstance(shards.get("of"), int)
            and isinstance(shards.get("here"), list)
            and all(isinstance(number, int) for number in shards["here"])
        ),
    }
    for name, good in sound.items():
        if not good:
            raise ValueError(
                f"calibration metadata `{name}` is {shorten(calibration.get(name))}, which no "
                "calibration writes; calibrate again"
            )


def _check_mergeable(first: Statistics, other: Statistics) -> None:
    if "shards" not in other.calibration:
        raise ValueError(
            "statistics of a whole run cannot be added to others; "
            "merge files made with `calibrate --shard i/N`"
        )
    for what, one, two in (
        ("model", first.model, other.model),
        ("calibration", first.calibration, other.calibration),
    ):
        # The same windows may come from other files; a setting that differs says more than both.
        last = ("windows_sha256", *FILES)
        keys = [key for key in dict.fromkeys([*one, *two]) if key not in last] + list(last)
        told = one.get("windows_sha256") and two.get("windows_sha256")
        for key in keys:
            seen, wanted = two.get(key), one.get(key)
            if key == "shards":
                seen, wanted = two[key]["of"], one[key]["of"]
            if key == "windows_sha256":
                seen, wanted = data_digest(two), data_digest(one)
            if key == "tokens" or (told and key in FILES):
                continue
            if seen != wanted:
                raise ValueError(
                    f"{what} `{key}` is {shorten(seen)} in one file and {shorten(wanted)} in "
                    "another; merge shards of one run (same model, text and options) only"
                )
    for layer, sums in other.sums.items():
        for name in NORMS:
            norms = getattr(sums, name), getattr(first.sums[layer], name)
            if not torch.allclose(*norms, rtol=1e-6, atol=0):
                raise ValueError(
                    f"layers.{layer}.{name} differs between the files: the checkpoints have "
                    "different expert weights; merge shards of one model only"
                )


def add_sets(
    tables: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """One table of sets: at least one pair (`sets`, `set_counts`) of one K -> their sum."""
    sets, position = torch.unique(
        torch.cat([sets for sets, _ in tables]), dim=0, return_inverse=True
    )
    counts = torch.zeros(sets.shape[0], dtype=torch.int64)
    counts.index_add_(0, position, torch.cat([counts for _, counts in tables]))
    return sets, counts


def _add_sums(parts: Sequence[LayerSums]) -> LayerSums:
    sets, set_counts = add_sets([(part.sets, part.set_counts) for part in parts])
    named = [part.tensors() for part in parts]
    added = {
        name: torch.stack([tensors[name] for tensors in named]).sum(dim=0)
        for name in SUMS
        if name in named[0]
    }
    return replace(parts[0], **added, sets=sets, set_counts=set_counts)


def _select_domains(sums: LayerSums, chosen_D: torch.Tensor) -> LayerSums:
    selected = {name: tensor[chosen_D] for name, tensor in sums.tensors().items() if name in SUMS}
    # Rows of the table: old domain index -> new one, rows of other domains left out.
    index_S = (sums.sets[:, :1] == chosen_D).int()
    here_S = index_S.any(dim=1)
    renamed = sums.sets[here_S].clone()
    renamed[:, 0] = index_S[here_S].argmax(dim=1).to(renamed.dtype)
    sets, set_counts = add_sets([(renamed, sums.set_counts[here_S])])
    return replace(sums, **selected, sets=sets, set_counts=set_counts)


def _shape(axes: str, shape: tuple[int, int, int]) -> tuple[int, ...]:
    return tuple(size for axis, size in zip("DEI", shape, strict=True) if axis in axes)


def _check_sums(label: str, sums: LayerSums, shape: tuple[int, int, int]) -> None:
    for name, tensor in sums.tensors().items():
        if name not in AXES:
            continue
        check_tensor(f"{label}.{name}", tensor, torch.float64, _shape(AXES[name], shape))
        sound = tensor.isfinite() if name in SIGNED else tensor.isfinite() & (tensor >= 0)
        if not bool(sound.all()):
            raise ValueError(f"{label}.{name} holds a negative or not finite sum; calibrate again")


def _check_table(label: str, sums: LayerSums, shape: tuple[int, int, int], top_k: int) -> None:
    sets, counts = sums.sets, sums.set_counts
    check_tensor(f"{label}.sets", sets, torch.int16, (counts.numel(), 1 + top_k))
    check_tensor(f"{label}.set_counts", counts, torch.int64, (sets.shape[0],))
    sound = (sets >= 0).all() and (sets[:, 0] < shape[0]).all() and (sets[:, 1:] < shape[1]).all()
    if not bool(sound and (counts > 0).all()):
        raise ValueError(
            f"{label}.sets names domains or experts that do not exist; calibrate again"
        )
