"""An ordinary checkpoint of a profile, for every engine: the model's layout and names, but smaller.

Experts that the router may not choose are removed, with their router rows and correction biases; or
all experts get one narrower width. config.json gets the new numbers. A prediction head (MTP) shares
these numbers, so it is cut too. Calibration does not reach it: it keeps the experts with the
largest router rows, and their largest atoms, by ‖gate row‖ · ‖up row‖ · ‖down column‖.

Legend: E experts, R kept experts, F kept atoms of an expert, I full intermediate size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch

from vllm_atomic_moe.convert.exporting.plain_config import (
    changed_config,
    check_width_is_named,
    whole_experts,
)
from vllm_atomic_moe.convert.exporting.plan import Plan, copied
from vllm_atomic_moe.convert.exporting.rows import (
    PLAIN_DTYPES,
    LayerNames,
    are_transposed,
    find_rows,
    natural,
)
from vllm_atomic_moe.files.agreement import is_prediction
from vllm_atomic_moe.files.checkpoint import CheckpointInfo, describe_checkpoint
from vllm_atomic_moe.files.config import read_config
from vllm_atomic_moe.files.layouts import quantized_tensor
from vllm_atomic_moe.files.profiles import PruningProfile
from vllm_atomic_moe.files.router import (
    CORRECTION_BIAS,
    EXPERTS_OF_TOKENS,
    ExpertGroups,
    router_names,
)
from vllm_atomic_moe.files.shards import Shards
from vllm_atomic_moe.files.tensors import StreamedTensor

FORMAT, FORMAT_VERSION = "atomic-moe-plain", "1"


@dataclass(frozen=True, slots=True)
class Block:
    """The kept part of one MoE block.

    Attributes:
        names: of its expert tensors.
        routers: names of its router's tensors.
        routable_E: bool [E], R of them True.
        keep_EI: bool [E, I], F True in the row of every kept expert.
        down_t_PH: refitted columns of down_proj for all kept atoms; None without a refit.
    """

    names: LayerNames
    routers: list[str]
    routable_E: torch.Tensor
    keep_EI: torch.Tensor
    down_t_PH: torch.Tensor | None = None

    @property
    def experts(self) -> list[int]:
        """The kept experts, ascending."""
        return self.routable_E.nonzero().flatten().tolist()


def plan_plain(
    directory: Path,
    source: Shards,
    info: CheckpointInfo,
    profile: PruningProfile,
    refitted: Mapping[int, torch.Tensor] = MappingProxyType({}),
) -> Plan:
    """The ordinary checkpoint of a profile; arguments as of `plan_packed`.

    Raises:
        ValueError: the profile or the model does not allow one; one line with the reason, and the
            options that make a profile that does.
    """
    if info.stored is not None:
        raise ValueError(
            f"{directory}: holds packed rows of an earlier export; --plain needs the original model"
        )
    if profile.compensation:
        raise ValueError(
            f"profile {profile.name!r} is compensated, which an ordinary checkpoint cannot "
            "express; use one that is not, with --refit"
        )
    experts, width = one_shape(info, profile)
    config = read_config(directory)
    if width < info.intermediate_size or refitted:
        _check_plain_weights(info, profile, bool(refitted))
        check_width_is_named(directory, config, info, list(source.where))
    num_layers = config.get("num_hidden_layers", 1 << 30)
    blocks = _blocks(source, info, profile, num_layers, experts, width, refitted)
    for name in (name for block in blocks for name in block.names.all_of("weight").values()):
        if source.shape(name)[0] == info.num_experts * info.intermediate_size:
            raise ValueError(
                f"{name}: the experts are stacked in one matrix, which --plain does not export; "
                "leave --plain out"
            )
    expert_names = {
        name for block in blocks for of in block.names.known.values() for name in of.values()
    }
    router_tensors = {name for block in blocks for name in block.routers}
    tensors = [
        copied(source, name)
        for name in source.where
        if name not in expert_names and name not in router_tensors
    ]
    for block in blocks:
        tensors += _experts(source, info, block, width)
        tensors += [_router(source, info, name, block) for name in block.routers]
    return Plan(
        sorted(tensors, key=lambda tensor: natural(tensor.name)),
        changed_config(directory, config, info, experts, width),
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "profile": profile.name,
            "profile_sha256": profile.digest(),
            "router_sha256": info.router.sha256,
        },
        experts=experts,
        width=width,
    )


def check_plain(directory: Path, plan: Plan) -> None:
    """Refuse a checkpoint that differs from the plan, before it is published.

    Raises:
        ValueError: its tensors and its config.json do not fit together.
    """
    found = describe_checkpoint(directory)
    shape = (found.num_experts, found.intermediate_size)
    assert shape == (plan.experts, plan.width), shape


def one_shape(info: CheckpointInfo, profile: PruningProfile) -> tuple[int, int]:
    """R and F, the same in every layer.

    Raises:
        ValueError: layers, groups of a router or experts differ.
    """
    whole = whole_experts(info)
    routable = {layer: profile.routable_experts(layer) for layer in info.layers}
    counts = {layer: int(mask.sum()) for layer, mask in routable.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"profile {profile.name!r} leaves {min(counts.values())} to {max(counts.values())} "
            f"experts of a layer, an ordinary checkpoint has one number; prune {whole}, or shape"
        )
    groups = info.groups.number if info.groups else 1
    for layer, mask in routable.items():
        of_groups = mask.view(groups, -1).sum(dim=1).tolist()
        if len(set(of_groups)) > 1:
            raise ValueError(
                f"profile {profile.name!r} leaves {of_groups} experts in the router's groups of "
                f"layer {layer}, an ordinary checkpoint has one number; prune {whole}, or shape"
            )
    widths = torch.cat([profile.widths(layer)[mask] for layer, mask in routable.items()])
    fewest, most = int(widths.min()), int(widths.max())
    if fewest != most:
        raise ValueError(
            f"profile {profile.name!r} keeps {fewest} to {most} atoms of an expert, an ordinary "
            f"checkpoint has one width; prune with --scope expert (and --align 32, which other "
            f"engines want), or {whole}"
        )
    if not most:
        raise ValueError(
            f"profile {profile.name!r} keeps no atoms; an ordinary checkpoint has experts"
        )
    return counts[info.layers[0]], most


def _check_plain_weights(info: CheckpointInfo, profile: PruningProfile, refit: bool) -> None:
    if any(not info.scheme(layer).plain for layer in info.layers):
        if refit:
            raise ValueError(
                f"experts are quantized as {', '.join(info.row_formats)}, and other engines read "
                "no plain down_proj beside quantized gates; refit without --plain, or refit the "
                "16-bit original"
            )
        raise ValueError(
            f"profile {profile.name!r} narrows experts, which are quantized as "
            f"{', '.join(info.row_formats)}; narrow the 16-bit original, or prune "
            f"{whole_experts(info)}"
        )


def _blocks(
    source: Shards,
    info: CheckpointInfo,
    profile: PruningProfile,
    num_layers: int,
    experts: int,
    width: int,
    refitted: Mapping[int, torch.Tensor],
) -> list[Block]:
    """The decoder's MoE blocks, and those of a prediction head.

    Raises:
        ValueError: a tensor of experts or of a router is of an unknown kind.
    """
    names: dict[str, LayerNames] = {}
    heads: set[str] = set()
    for name in source.where:
        if (tensor := quantized_tensor(name)) is None:
            continue
        known = names.setdefault(tensor.block, LayerNames()).known
        known.setdefault((tensor.part, tensor.expert), {})[tensor.quantity] = name
        if is_prediction(name) or tensor.layer >= num_layers:
            heads.add(tensor.block)
    for name in source.where:
        block = name[: max(0, name.find(".experts."))]
        strange = quantized_tensor(name) is None and not name.endswith(CORRECTION_BIAS)
        if block in names and strange:
            raise ValueError(
                f"{name} is not a known part of an expert's projection; other layouts are not "
                "exported"
            )
    layers = {block: layer for layer, block in info.blocks.items()}
    blocks = []
    for block, of_block in names.items():
        routers = router_names(source.where, {layers.get(block, num_layers): block})
        [of_router] = routers.values()
        down_t_PH = refitted.get(layers.get(block, -1))
        if block in layers:
            layer = layers[block]
            routable_E, keep_EI = profile.routable_experts(layer), profile.keep[layer]
        elif block in heads:
            routable_E = torch.ones(info.num_experts, dtype=torch.bool)
            if experts < info.num_experts:
                routable_E = _largest(_row_norms(source, info, of_router), experts, info.groups)
            keep_EI = _largest_atoms(source, info, of_block, width)
        else:
            raise ValueError(f"{block}: experts outside of the decoder; they are not exported")
        blocks.append(Block(of_block, of_router, routable_E, keep_EI, down_t_PH))
    return blocks


def _row_norms(source: Shards, info: CheckpointInfo, routers: list[str]) -> torch.Tensor:
    """Norms of the rows of a router: float64 [E]."""
    wanted = [info.num_experts, info.hidden_size]
    [name] = [name for name in routers if source.shape(name) == wanted][:1] or [""]
    if not name:
        raise ValueError(f"{routers[0]}: no row per expert, {wanted}; this router is not exported")
    return source.tensor(name).double().norm(dim=1)


def _largest(score_E: torch.Tensor, count: int, groups: ExpertGroups | None) -> torch.Tensor:
    """The `count` highest scores, the same number in every group: bool [E]."""
    number = groups.number if groups else 1
    order = score_E.view(number, -1).argsort(dim=1, descending=True, stable=True)
    stays = torch.zeros(order.shape, dtype=torch.bool)
    return stays.scatter_(1, order[:, : count // number], True).flatten()


def _largest_atoms(
    source: Shards, info: CheckpointInfo, names: LayerNames, width: int
) -> torch.Tensor:
    """The `width` largest atoms of every expert of a prediction head: bool [E, I]."""
    keep_EI = torch.ones(info.num_experts, info.intermediate_size, dtype=torch.bool)
    if width == info.intermediate_size:
        return keep_EI
    rows = find_rows(source, info, info.layers[-1], names).rows
    for expert, keep_I in enumerate(keep_EI):
        norms = [rows(part, expert).float().norm(dim=1) for part in ("gate", "up", "down_t")]
        keep_I.copy_(_largest(norms[0] * norms[1] * norms[2], width, None))
    return keep_EI


def _experts(
    source: Shards, info: CheckpointInfo, block: Block, width: int
) -> list[StreamedTensor]:
    """The expert tensors of one block, cut."""
    known = block.names.known
    position = {expert: i for i, expert in enumerate(block.experts)}
    atoms = {expert: block.keep_EI[expert].nonzero().flatten() for expert in position}
    narrow = width < info.intermediate_size
    weights = block.names.all_of("weight")
    fused = weights and all(expert is None for _, expert in weights)
    transposed = False
    if fused and (narrow or block.down_t_PH is not None):
        transposed = are_transposed(source, info, {part: n for (part, _), n in weights.items()})
    interleaved = bool(block.names.all_of("bias"))
    tensors: list[StreamedTensor] = []
    for (part, expert), quantities in known.items():
        for quantity, name in quantities.items():
            if block.down_t_PH is not None and (part, quantity) == ("down", "weight"):
                if expert is None or expert in position:
                    tensors.append(_refitted(source, name, block, expert, transposed, position))
            elif expert is None:
                axis = _atom_axis(part, quantity, transposed) if narrow else None
                tensors.append(_fused(source, name, part, axis, atoms, interleaved))
            elif expert in position:
                new = _renumbered(name, expert, position[expert])
                if narrow:
                    axis = 1 if part == "down" else 0
                    tensors.append(_narrow(source, name, new, axis, atoms[expert]))
                else:
                    tensors.append(copied(source, name, new))
    return tensors


def _atom_axis(part: str, quantity: str, transposed: bool) -> int | None:
    """The axis of atoms in one expert's part of a tensor of all experts; None if it has none."""
    if quantity == "bias":
        return None if part == "down" else 0
    return int((part == "down") != transposed)


def _fused(
    source: Shards,
    name: str,
    part: str,
    axis: int | None,
    atoms: Mapping[int, torch.Tensor],
    interleaved: bool,
) -> StreamedTensor:
    """A tensor of all experts, written one expert at a time."""
    size = source.shape(name)[0 if axis is None else axis + 1] // 2

    def columns(atoms_F: torch.Tensor) -> torch.Tensor:
        if part != "gate_up":
            return atoms_F
        if interleaved:
            return torch.stack([2 * atoms_F, 2 * atoms_F + 1], dim=1).flatten()
        return torch.cat([atoms_F, size + atoms_F])

    def pieces() -> Iterator[torch.Tensor]:
        whole = source.tensor(name)
        for expert, atoms_F in atoms.items():
            piece = whole[expert]
            yield piece if axis is None else piece.index_select(axis, columns(atoms_F))

    _, *shape = source.shape(name)
    before = math.prod(shape)
    if axis is not None:
        shape[axis] = len(columns(next(iter(atoms.values()))))
    nbytes = source.tensor(name)[0].nbytes * math.prod(shape) // before * len(atoms)
    return StreamedTensor(name, source.dtype(name), (len(atoms), *shape), nbytes, pieces)


def _refitted(
    source: Shards,
    name: str,
    block: Block,
    expert: int | None,
    transposed: bool,
    position: Mapping[int, int],
) -> StreamedTensor:
    """The down projection of one expert, or of all, from refitted columns."""
    assert block.down_t_PH is not None
    columns = block.down_t_PH.to(PLAIN_DTYPES[source.dtype(name)])
    rows_RFH = columns.view(len(block.experts), -1, columns.shape[1])
    if expert is not None:
        name = _renumbered(name, expert, position[expert])
        matrix = rows_RFH[position[expert]].t()
    else:
        matrix = rows_RFH if transposed else rows_RFH.transpose(1, 2)
    shape = tuple(matrix.shape)
    pieces = [matrix.contiguous()]
    return StreamedTensor(name, source.dtype(name), shape, pieces[0].nbytes, partial(iter, pieces))


def _narrow(
    source: Shards, name: str, new_name: str, axis: int, kept: torch.Tensor
) -> StreamedTensor:
    """A tensor reduced to `kept` along one axis."""
    shape = source.shape(name)
    nbytes = source.tensor(name).nbytes // shape[axis] * len(kept)
    shape[axis] = len(kept)
    return StreamedTensor(
        new_name,
        source.dtype(name),
        tuple(shape),
        nbytes,
        lambda: iter([source.tensor(name).index_select(axis, kept)]),
    )


def _router(source: Shards, info: CheckpointInfo, name: str, block: Block) -> StreamedTensor:
    """A router's tensor, reduced to the rows or biases of the kept experts."""
    shape = source.shape(name)
    if len(block.experts) == info.num_experts:
        return copied(source, name)
    if name.endswith(EXPERTS_OF_TOKENS):
        raise ValueError(
            f"{name} names the experts of every token; a model with hash routing keeps all of "
            "them: export it without --plain"
        )
    if source.dtype(name) not in PLAIN_DTYPES:
        raise ValueError(f"{name} is {source.dtype(name)}; routers of plain floats are exported")
    if info.num_experts not in shape:
        # Scales of the router's input.
        if len(shape) == 1 and shape[0] == info.hidden_size:
            return copied(source, name)
        raise ValueError(
            f"{name} is {shape}, wanted a row or a value for each of {info.num_experts} experts; "
            "this router is not exported"
        )
    axis = 0 if shape[0] == info.num_experts else len(shape) - 1
    return _narrow(source, name, name, axis, torch.tensor(block.experts))


def _renumbered(name: str, expert: int, number: int) -> str:
    """The name of one expert's tensor under its new number."""
    before, mark, after = name.partition(f".experts.{expert}.")
    assert mark, name
    return f"{before}.experts.{number}.{after}"
