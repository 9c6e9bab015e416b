"""Several ranks answer as one does, in every resident profile, and share its memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import count
from typing import Any

import pytest
import torch

from tests.checkpoints import make_checkpoint, write_profile, write_routing_profiles
from tests.serving.conftest import activate, engine, prompt_logprobs
from vllm_atomic_moe.exporting.export import export
from vllm_atomic_moe.profiles import PruningProfile

TOLERANCE = 1e-4
ATOM_BYTES = 3 * 128 * 4
# Ragged with widths 0 and 1; another, not nested; whole experts out of the router; ragged as well.
NAMES = ("narrow", "other", "whole", "ragged")
RANKS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor_parallel_size": 2},
    "expert": {
        "tensor_parallel_size": 2,
        "enable_expert_parallel": True,
        "enable_ep_weight_filter": True,
    },
    # Eager pipelines are refused on CPU. Traced, not compiled: it is not what is tested here.
    "pipeline": {
        "pipeline_parallel_size": 2,
        "enforce_eager": False,
        "compilation_config": {"mode": 2, "backend": "eager"},
    },
}
RANKS["tensor and pipeline"] = {**RANKS["pipeline"], **RANKS["tensor"]}
RANKS["expert and pipeline"] = {**RANKS["pipeline"], **RANKS["expert"]}


class Checkpoints:
    """One architecture in every layout, with the profiles NAMES."""

    def __init__(self, architecture, directory):
        self.layouts = {name: directory / name for name in ("per_expert", "fused", "exported")}
        self.directory = directory / "profiles"
        self.info = make_checkpoint(architecture, self.layouts["per_expert"])
        make_checkpoint(architecture, self.layouts["fused"], layout="fused")
        for seed, name in enumerate(("narrow", "other"), start=1):
            write_profile(self.info, name, self.directory, seed)
        write_routing_profiles(self.info, self.directory)
        self.profiles = {name: self.read(name) for name in NAMES}
        keeps = [profile.keep for profile in self.profiles.values()]
        self.union = {
            layer: torch.stack([keep[layer] for keep in keeps]).any(dim=0)
            for layer in self.info.layers
        }
        union = PruningProfile("union", self.union)
        union.write(directory / "union.safetensors")
        source = str(self.layouts["per_expert"])
        export(source, directory / "union.safetensors", self.layouts["exported"])
        with self.engine("per_expert") as llm:
            self.wanted = {}
            for name in NAMES:
                activate(llm, name)
                self.wanted[name] = prompt_logprobs(llm)

    def read(self, name):
        return PruningProfile.read(self.directory / f"{name}.safetensors")

    def engine(self, layout, **options):
        extra = {"profiles": str(self.directory), "active": NAMES[0], "resident": list(NAMES)}
        return engine(
            self.layouts[layout],
            load_format="atomic-pruned",
            model_loader_extra_config=extra,
            **options,
        )


@pytest.fixture(scope="module")
def qwen2_moe(tmp_path_factory):
    """It has shared experts, whose sum with the routed ones the ranks add up too."""
    return Checkpoints("qwen2_moe", tmp_path_factory.mktemp("qwen2_moe"))


@pytest.fixture(autouse=True)
def _one_thread_per_rank(monkeypatch):
    """vLLM would bind ranks to NUMA nodes; more threads than cores starve each other."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")


def control(llm, verb: str, **arguments: Any) -> list[dict[str, Any]]:
    """What every rank answers."""
    ranks = llm.collective_rpc("atomic_moe_control", args=(verb, arguments))
    assert all(rank["ok"] for rank in ranks), ranks
    return ranks


_switches = count()


def switch(llm, name: str) -> None:
    """As `serving/switch.py` does on an idle engine."""
    owner, generation = f"switch {next(_switches)}", control(llm, "status")[0]["generation"]
    begin = {"profile": name, "generation": generation, "displaced": None, "lease_s": 60.0}
    control(llm, "begin", owner=owner, **begin)
    assert len({rank["digest"] for rank in control(llm, "prepare", owner=owner)}) == 1
    control(llm, "commit", owner=owner)
    assert llm.reset_prefix_cache()
    control(llm, "end", owner=owner, switched=True, record={})
    status = control(llm, "status")
    assert [(rank["active"], rank["generation"]) for rank in status] == [
        (name, generation + 1)
    ] * len(status)


def rank_atoms(checkpoints: Checkpoints, ranks: str) -> list[int]:
    """How many atoms of the union each rank should hold, one more or less where they are split."""
    union, experts = checkpoints.union, checkpoints.info.num_experts
    # vLLM gives the last stage a layer less where they do not divide.
    first = [layer for layer in union if layer < 2]
    stages = [first, [layer for layer in union if layer not in first]]
    if "pipeline" not in ranks:
        stages = [list(union)]
    atoms = []
    for stage in stages:
        masks = torch.stack([union[layer] for layer in stage])
        halves = [masks[:, : experts // 2], masks[:, experts // 2 :]]
        if "expert" in ranks:
            atoms += [int(half.sum()) for half in halves]
        elif "tensor" in ranks:
            atoms += [int(masks.sum()) // 2] * 2
        else:
            atoms.append(int(masks.sum()))
    return atoms


def check_memory(checkpoints: Checkpoints, status: list[dict[str, Any]], ranks: str) -> None:
    """The union once over all ranks, and each rank its share; up to one atom of padding each."""
    held = [rank["resident_bytes"] / ATOM_BYTES for rank in status]
    wanted = rank_atoms(checkpoints, ranks)
    print(ranks, "atoms on each rank", held, "of", wanted)
    experts = sum(int(mask.any(dim=1).sum()) for mask in checkpoints.union.values())
    total = sum(int(mask.sum()) for mask in checkpoints.union.values())
    assert total <= sum(held) <= total + experts * len(held)
    for atoms, share in zip(held, wanted, strict=True):
        assert abs(atoms - share) <= experts + len(checkpoints.union)
    assert {rank["dense_bytes"] for rank in status} == {checkpoints.info.atoms * ATOM_BYTES}


def check_parity(checkpoints: Checkpoints, layout: str, ranks: str) -> None:
    """Every profile in turn, in place, against one rank."""
    with checkpoints.engine(layout, **RANKS[ranks]) as llm:
        worst = {}
        for name in (*NAMES[1:], *NAMES):
            switch(llm, name)
            worst[name] = float((prompt_logprobs(llm) - checkpoints.wanted[name]).abs().max())
        print(ranks, layout, worst)
        assert max(worst.values()) < TOLERANCE, worst
        check_memory(checkpoints, control(llm, "status"), ranks)


def test_profiles_differ(qwen2_moe):
    """Or parity would be blind to which one is served."""
    wanted: Mapping[str, torch.Tensor] = qwen2_moe.wanted
    for name in NAMES[1:]:
        assert (wanted[name] - wanted[NAMES[0]]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        ("tensor", "per_expert"),
        ("expert", "per_expert"),
        ("pipeline", "exported"),
        *(
            pytest.param(ranks, layout, marks=pytest.mark.full)
            for ranks, layout in (
                ("tensor", "fused"),
                ("tensor", "exported"),
                ("expert", "fused"),
                ("expert", "exported"),
                ("pipeline", "per_expert"),
                ("tensor and pipeline", "per_expert"),
                ("expert and pipeline", "fused"),
            )
        ),
    ],
)
def test_ranks_answer_as_one(qwen2_moe, ranks, layout):
    check_parity(qwen2_moe, layout, ranks)
