"""Several ranks answer like one, in every resident profile, and share the memory."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import make_checkpoint, write_profile, write_routing_profiles
from tests.quantized import FORMATS, in_bfloat16, quantize_checkpoint, quantize_gpt_oss
from tests.serving.conftest import activate, core, engine, mixed_logprobs, prompt_logprobs
from tests.unit.tiny_models import make_model
from vllm_atomic_moe.convert.exporting.export import Refitted, export
from vllm_atomic_moe.files.profiles import PruningProfile

TOLERANCE = 1e-4
# vLLM serves other formats in float32 too.
IN_FLOAT16 = ("fp8-block", "gptq", "awq", "nvfp4-modelopt", "fp8-modelopt")
ATOM_BYTES = 3 * 128 * 4
# Ragged with widths 0 and 1; another, not nested; whole experts out of the router; ragged as well.
NAMES = ("narrow", "other", "whole", "ragged")
TENSOR = {"tensor_parallel_size": 2}
EXPERT = {**TENSOR, "enable_expert_parallel": True, "enable_ep_weight_filter": True}
# Eager pipelines are refused on CPU. Traced, not compiled: that is tested elsewhere.
PIPELINE = {
    "pipeline_parallel_size": 2,
    "enforce_eager": False,
    "compilation_config": {"mode": 2, "backend": "eager"},
}
RANKS: dict[str, dict[str, Any]] = {
    "tensor": TENSOR,
    "expert": EXPERT,
    "pipeline": PIPELINE,
    "tensor and pipeline": {**PIPELINE, **TENSOR},
    "expert and pipeline": {**PIPELINE, **EXPERT},
}


class Checkpoints:
    """Three layers of one architecture, in every layout and with the profiles NAMES.

    Attributes:
        union: layer index -> bool [E, I], the atoms of all profiles.
        wanted: profile name -> prompt log-probabilities of one rank.
    """

    def __init__(self, architecture: str, directory: Path, **settings: Any) -> None:
        self.layouts = {name: directory / name for name in ("per_expert", "fused", "exported")}
        self.profiles = directory / "profiles"
        plain = self.layouts["per_expert"]
        self.info = make_checkpoint(architecture, plain, **settings)
        make_checkpoint(architecture, self.layouts["fused"], layout="fused", **settings)
        for seed, name in enumerate(NAMES[:2], start=1):
            write_profile(self.info, name, self.profiles, seed)
        write_routing_profiles(self.info, self.profiles)
        keeps = [PruningProfile.read(self.profiles / f"{name}.safetensors").keep for name in NAMES]
        self.union = {
            layer: torch.stack([keep[layer] for keep in keeps]).any(dim=0)
            for layer in self.info.layers
        }
        PruningProfile("union", self.union).write(directory / "union.safetensors")
        export(str(plain), directory / "union.safetensors", self.layouts["exported"])
        self.wanted = {}
        with self.engine(plain) as llm:
            for name in NAMES:
                activate(llm, name)
                self.wanted[name] = prompt_logprobs(llm)

    def engine(self, checkpoint: Path, **options: Any) -> Any:
        """An engine that holds all profiles."""
        extra = {"profiles": str(self.profiles), "active": NAMES[0], "resident": list(NAMES)}
        return engine(
            checkpoint, load_format="atomic-pruned", model_loader_extra_config=extra, **options
        )


@pytest.fixture(scope="module")
def qwen2_moe(tmp_path_factory):
    """A model with shared experts, which ranks split and add up in their own way."""
    return Checkpoints("qwen2_moe", tmp_path_factory.mktemp("qwen2_moe"))


@pytest.fixture(autouse=True)
def _one_thread_per_rank(monkeypatch):
    """vLLM would bind each rank to its own NUMA node."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")


# --- parity and memory ----------------------------------------------------------------------------


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
                ("tensor and pipeline", "exported"),
                ("expert and pipeline", "per_expert"),
            )
        ),
    ],
)
def test_several_ranks_answer_like_one(qwen2_moe, ranks, layout):
    check_ranks(qwen2_moe, layout, ranks)


@pytest.mark.full
@pytest.mark.parametrize("architecture", ["glm4_moe", "mixtral", "qwen3_moe", "olmoe"])
def test_other_architectures(tmp_path, architecture):
    checkpoints = Checkpoints(architecture, tmp_path)
    for ranks in ("tensor", "expert", "pipeline"):
        check_ranks(checkpoints, "per_expert", ranks)


@pytest.mark.full
def test_biases_are_added_once(tmp_path):
    """gpt-oss: only the first tensor parallel rank, or the expert's rank, has the bias of down."""
    check_as_one(tmp_path, make_model("gpt_oss", tmp_path))


@pytest.mark.full
@pytest.mark.parametrize("name", FORMATS)
def test_quantized_experts(tmp_path, name):
    """Codes are split like plain rows; each rank has the groups of scales that it needs."""
    info = make_checkpoint(architecture_of(name), tmp_path / "original")
    model = tmp_path / "model"
    quantize_checkpoint(tmp_path / "original", model, name)
    check_as_one(model, info, dtype=dtype_of(name))


@pytest.mark.full
def test_gpt_oss_as_published(tmp_path):
    info = make_model("gpt_oss", tmp_path / "original", intermediate_size=96)
    in_bfloat16(tmp_path / "original")
    quantize_gpt_oss(tmp_path / "original", tmp_path / "model")
    check_as_one(tmp_path / "model", info, dtype="bfloat16")


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "refitted"),
    [("fp8-block", False), ("int4", False), ("gptq", False), ("int4", True), ("nvfp4", True)],
)
def test_exported_quantized_experts(tmp_path, name, refitted):
    """Export the union of two profiles, and serve both from it; also with plain columns of down."""
    info = make_checkpoint(architecture_of(name), tmp_path / "original")
    quantize_checkpoint(tmp_path / "original", tmp_path / "model", name)
    profiles = [write_profile(info, it, tmp_path, seed) for seed, it in enumerate(NAMES[:2], 1)]
    keep = {it: profiles[0].keep[it] | profiles[1].keep[it] for it in info.layers}
    PruningProfile("union", keep).write(tmp_path / "union.safetensors")
    columns = {
        layer: 0.02 * torch.randn(int(keep_EI.sum()), info.hidden_size)
        for layer, keep_EI in keep.items()
    }
    refit = (lambda chosen: Refitted(columns, {})) if refitted else None
    path = tmp_path / "union.safetensors"
    export(str(tmp_path / "model"), path, tmp_path / "exported", refit=refit)
    check_as_one(tmp_path / "exported", info, ("tensor", "expert"), dtype_of(name))


def architecture_of(name: str) -> str:
    """With a shared expert, unless vLLM takes that for a quantized one (AWQ)."""
    return "qwen3_moe" if name in IN_FLOAT16 else "qwen2_moe"


def dtype_of(name: str) -> str:
    return "float16" if name in IN_FLOAT16 else "float32"


def check_as_one(model, info, kinds=("tensor", "expert", "pipeline"), dtype="float32") -> None:
    """Two profiles in one batch, by one rank and by two of every kind.

    In 16 bits random layers carry rounding far: the median counts.
    """
    for seed, name in enumerate(NAMES[:2], start=1):
        write_profile(info, name, model / "atomic_profiles", seed)
    extra = {"active": NAMES[0], "resident": NAMES[1:2]}

    def serve(**options: Any) -> dict[str, torch.Tensor]:
        loader = {"load_format": "atomic-pruned", "model_loader_extra_config": extra}
        with engine(model, dtype=dtype, **loader, **options) as llm:
            return mixed_logprobs(llm, NAMES[:2])

    alone = serve()
    another = (alone[NAMES[0]] - alone[NAMES[1]]).abs().median()
    for ranks in kinds:
        together = serve(**RANKS[ranks])
        for name in NAMES[:2]:
            apart = (alone[name] - together[name]).abs()
            print(ranks, dtype, name, float(apart.median()), float(apart.max()))
            if dtype == "float32":
                assert apart.max() < TOLERANCE, (ranks, name)
            else:
                most = {"float16": 5e-3, "bfloat16": 5e-2}[dtype]
                assert apart.median() < most < another, (ranks, name)


@pytest.mark.full
def test_a_stage_without_experts(tmp_path, monkeypatch):
    checkpoints = Checkpoints("qwen2_moe", tmp_path, mlp_only_layers=[0])
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "1,2")
    check_ranks(checkpoints, "per_expert", "pipeline", first=1)
    check_ranks(checkpoints, "exported", "pipeline", first=1)


def check_ranks(checkpoints: Checkpoints, layout: str, ranks: str, first: int = 2) -> None:
    """All profiles in one batch; parity with one rank, and the memory of the union.

    Args:
        checkpoints: what to serve, and what to expect.
        layout: key of its layouts.
        ranks: key of RANKS.
        first: number of layers in the first stage of a pipeline.
    """
    wanted = checkpoints.wanted
    for name in NAMES[1:]:
        assert (wanted[name] - wanted[NAMES[0]]).abs().max() > 0.01, "the test is blind"
    with checkpoints.engine(checkpoints.layouts[layout], **RANKS[ranks]) as llm:
        found = mixed_logprobs(llm, NAMES)
        worst = {name: float((found[name] - wanted[name]).abs().max()) for name in NAMES}
        print(ranks, layout, worst)
        assert max(worst.values()) < TOLERANCE, worst
        check_memory(checkpoints.union, atoms_of_ranks(checkpoints, ranks, first), llm)


def check_memory(union: Mapping[int, torch.Tensor], shares: Sequence[float], llm: Any) -> None:
    """Each rank holds its share, up to one atom of padding per expert and one more per layer."""
    held = [rank["resident_bytes"] / ATOM_BYTES for rank in core(llm, "status")["ranks"]]
    print("atoms of each rank:", held, "of", shares)
    experts = sum(int(mask.any(dim=1).sum()) for mask in union.values())
    for atoms, share in zip(held, shares, strict=True):
        assert share - len(union) / 2 <= atoms <= share + len(union) / 2 + experts
    assert sum(shares) <= sum(held) <= sum(shares) + experts * len(held)
    sizes = [mask.numel() * ATOM_BYTES for mask in union.values()]
    assert core(llm, "describe")["dense_bytes"] == sum(sizes)


def atoms_of_ranks(checkpoints: Checkpoints, ranks: str, first: int) -> list[float]:
    """Each rank's share of the union's atoms; exactly half if tensors are split."""
    half = checkpoints.info.num_experts // 2
    kept = {layer: mask.sum(dim=1) for layer, mask in checkpoints.union.items()}
    stages = [[0, 1, 2][:first], [0, 1, 2][first:]] if "pipeline" in ranks else [[0, 1, 2]]
    shares = []
    for stage in stages:
        kept_E = sum((kept[layer] for layer in stage if layer in kept), torch.zeros(2 * half))
        total = float(kept_E.sum())
        if "expert" in ranks:
            shares += [float(kept_E[:half].sum()), float(kept_E[half:].sum())]
        else:
            shares += [total / 2] * 2 if "tensor" in ranks else [total]
    return shares


# --- what does not arrive -------------------------------------------------------------------------


@pytest.mark.full
def test_a_tensor_missing_on_one_rank_ends_the_start(qwen2_moe, tmp_path, capfd):
    """The others do not wait for it."""
    broken = tmp_path / "broken"
    shutil.copytree(qwen2_moe.layouts["per_expert"], broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.7.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Exception, match="initialization"), qwen2_moe.engine(broken, **EXPERT):
        pass
    printed = "".join(capfd.readouterr())
    assert "1 expert tensors are missing: layers.1.experts.7.up_proj" in printed
    assert "Expert weights:" not in printed
