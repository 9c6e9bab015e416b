"""The matrix of architectures without vLLM: calibrated, pruned, checked; layers; README's table."""

from __future__ import annotations

import re
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig
from typer.testing import CliRunner

from tests.architectures import ARCHITECTURES, LAYER, QUICK
from tests.checkpoints import write_profile
from tests.documents import ROOT
from tests.unit.tiny_models import make_model, random_text
from vllm_atomic_moe.calibration.experts import find_experts
from vllm_atomic_moe.calibration.model import auto_class
from vllm_atomic_moe.cli import app
from vllm_atomic_moe.convert.exporting.export import export
from vllm_atomic_moe.experts.backends.reference import fused_experts
from vllm_atomic_moe.experts.packing import PackedExperts, build_layout, with_slots
from vllm_atomic_moe.files.layouts import PACKED_ROWS, expert_tensor
from vllm_atomic_moe.files.profiles import PruningProfile


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.full)
        for name, it in ARCHITECTURES.items()
        if it.tensors is None
    ],
)
def test_calibrated_pruned_and_checked(tmp_path, architecture):
    it, model, statistics = ARCHITECTURES[architecture], tmp_path / "model", tmp_path / "statistics"
    info = make_model(architecture, model)
    text = tmp_path / "text.txt"
    text.write_text(random_text(1200))
    command = ("calibrate", model, "--data", text, "--samples", 16, "--seq-len", 64)
    result = run(*command, "-o", statistics)
    if it.not_calibrated:
        assert result.exit_code == 1
        assert it.not_calibrated in " ".join(result.stderr.split())
        return
    assert result.exit_code == 0, result.output
    prune = ("prune", statistics, "--method", "heapr", "--ratio", 0.25, "--allow-unseen")
    result = run(*prune, "-o", tmp_path / "profiles")
    assert result.exit_code == 0, result.output
    result = run("check", model, tmp_path / "profiles")
    assert result.exit_code == 0, result.output
    assert "warning" not in result.stderr
    [profile] = map(PruningProfile.read, (tmp_path / "profiles").iterdir())
    assert abs(profile.kept - 0.75) < 0.001
    widths = torch.stack([profile.widths(layer) for layer in info.layers])
    assert len(widths.unique()) > 2


@pytest.mark.parametrize(
    "architecture", [name for name, it in ARCHITECTURES.items() if it.tested == LAYER]
)
def test_a_layer_computes_what_transformers_computes(tmp_path, architecture):
    """For models that stock vLLM does not run on a CPU: original tensors and exported rows."""
    model = tmp_path / "model"
    info = make_model(architecture, model)
    profile = write_profile(info, "ragged", tmp_path, seed=1)
    it = ARCHITECTURES[architecture]
    kind = auto_class(AutoConfig.from_pretrained(model))
    dense = kind.from_pretrained(model, dtype=torch.float32)
    stored = {"model": load_file(model / "model.safetensors")}
    refusal = it.not_exported
    with pytest.raises(ValueError, match=refusal) if refusal else nullcontext():
        export(str(model), tmp_path / "ragged.safetensors", tmp_path / "out")
        [shard] = (tmp_path / "out" / "atomic_weights").glob("*.safetensors")
        stored["exported"] = load_file(shard)
    for layer, module in find_experts(dense, info).items():
        with torch.no_grad():
            module.down_proj *= profile.keep[layer][:, None, :]
        for tensors in stored.values():
            check_layer(module, packed_layer(it, info, tensors, layer, profile.keep[layer]))


def packed_layer(it, info, tensors, layer, keep_EI) -> PackedExperts:
    """A layer's atoms that `keep_EI` keeps, in the first slot."""
    layout = build_layout({"ragged": keep_EI})
    packed = PackedExperts(layout, info.hidden_size, torch.float32, activation=it.activation)
    for name, tensor in tensors.items():
        found = expert_tensor(name)
        if found is None or found.layer != layer:
            continue
        if found.part == "gate_up":
            for part, matrices in zip(("gate", "up"), tensor.chunk(2, dim=1), strict=True):
                load_all(packed, part, matrices)
        elif found.expert is None and not found.packed:
            load_all(packed, found.part, tensor)
        elif not found.packed:
            packed.load_expert(found.expert, found.part, tensor)
        elif found.part in PACKED_ROWS:
            packed.load_rows(found.part.removesuffix("_t"), tensor, keep_EI)
    packed.set_slot(0, keep_EI)
    return packed


def load_all(packed: PackedExperts, part, matrices) -> None:
    for expert, matrix in enumerate(matrices):
        packed.load_expert(expert, part, matrix)


@torch.inference_mode()
def check_layer(module, packed: PackedExperts) -> None:
    """Both compute the same for random tokens."""
    generator = torch.Generator().manual_seed(0)
    x_TH = torch.randn(24, packed.hidden_size, generator=generator)
    weights_TK = torch.rand(24, 2, generator=generator)
    ids_TK = torch.arange(48).view(24, 2) % module.num_experts
    wanted = module(x_TH, ids_TK, weights_TK)
    ids = with_slots(ids_TK.int(), torch.zeros(24, 1, dtype=torch.int32))
    of_layer = (packed.weights, packed.scales, packed.biases, *packed.index)
    activation, rows = packed.activation.spec, packed.row_format.spec
    found = fused_experts(x_TH, *of_layer, weights_TK, ids, packed.widest, activation, rows)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def table() -> str:
    """README's table: architectures of one verdict share a row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for it in ARCHITECTURES.values():
        served = "not tried: vLLM needs other hardware" if it.tested == LAYER else "yes"
        verdict = (
            served,
            "no" if it.not_calibrated or it.tensors else "yes",
            "no" if it.not_exported else "yes",
            it.tested,
        )
        rows.setdefault(verdict, []).append(re.sub("For(CausalLM|Cond.*)", "", it.model))
    lines = ["| architectures | served | calibrated | exported | tested |", "|---|---|---|---|---|"]
    lines += [
        f"| {', '.join(sorted(names))} | {' | '.join(verdict)} |" for verdict, names in rows.items()
    ]
    return "\n".join(lines)


def test_readme_has_the_matrix():
    assert table() in (ROOT / "README.md").read_text()
