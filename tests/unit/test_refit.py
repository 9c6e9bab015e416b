"""Fits that offset the error of pruning: exact least squares, never worse than no fit.

Legend: T tokens, E experts, H hidden size, F kept atoms of an expert, I all of them.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.checkpoints import uniform_profile
from tests.unit.test_cli import run
from tests.unit.tiny_models import character_tokenizer, make_model, random_text
from vllm_atomic_moe import api
from vllm_atomic_moe.calibration import fitting
from vllm_atomic_moe.calibration.corrections import Columns, ScaleAndBias
from vllm_atomic_moe.calibration.experts import ExpertRows
from vllm_atomic_moe.calibration.fitting import fit
from vllm_atomic_moe.files.export_format import EXPORT_DIRECTORY, INDEX
from vllm_atomic_moe.files.profiles import PruningProfile

T, E, H, I = 60, 3, 6, 8  # noqa: E741
RIDGE = 1e-3


def some_rows(seed: int, tokens: int = T) -> dict[int, ExpertRows]:
    """Random rows of experts 0 and 1; expert 2 saw no tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = {}
    for expert in (0, 1):
        chosen = (torch.rand(tokens, generator=generator) < 0.7).nonzero().flatten()
        x, h, y, p = (torch.randn(len(chosen), size, generator=generator) for size in (H, I, H, 1))
        rows[expert] = ExpertRows(x, h, y, p[:, 0].abs(), torch.zeros(H, I), chosen)
    return rows


@pytest.fixture
def exact(monkeypatch):
    """With one ridge, and steps until convergence."""
    monkeypatch.setattr(fitting, "RIDGES", (RIDGE,))
    monkeypatch.setattr(fitting, "STEPS", 300)
    monkeypatch.setattr(fitting, "ENOUGH", 1e-12)


def keep_mask() -> torch.Tensor:
    keep_EI = torch.ones(E, I, dtype=torch.bool)
    keep_EI[0, 3:] = False
    keep_EI[1, ::2] = False
    return keep_EI


def test_columns_are_the_least_squares_of_all_experts_at_once(exact):
    keep_EI, rows = keep_mask(), some_rows(0)
    errors = torch.randn(T, H, generator=torch.Generator().manual_seed(9))
    # The held-out batch is like the other: what is best for one is best for both.
    found = fit(Columns(keep_EI), lambda: iter([rows, rows]), [errors, errors], [False, True])

    features, penalties = [], []
    for expert, of_expert in rows.items():
        kept = of_expert.h[:, keep_EI[expert]] * of_expert.p[:, None]
        features.append(torch.zeros(T, kept.shape[1]).index_copy(0, of_expert.tokens, kept))
        penalty = (RIDGE * (kept.T @ kept).diagonal().mean()).sqrt()
        penalties += [float(penalty)] * kept.shape[1]
    system = np.concatenate([torch.cat(features, dim=1).double().numpy(), np.diag(penalties)])
    wanted = np.concatenate([errors.double().numpy(), np.zeros((len(penalties), H))])
    solution = np.linalg.lstsq(system, wanted, rcond=None)[0]
    mine = torch.cat([found.parameters[expert] for expert in rows]).numpy()
    np.testing.assert_allclose(mine, solution, rtol=1e-3, atol=1e-4)
    left = ((errors.numpy() - torch.cat(features, dim=1).numpy() @ solution) ** 2).sum()
    assert found.after == pytest.approx(float(left), rel=1e-4)
    assert found.before == pytest.approx(float(errors.square().sum()))
    assert 2 not in found.parameters


def test_scale_and_bias_are_the_least_squares_of_all_experts_at_once(exact):
    rows = some_rows(1)
    errors = torch.randn(T, H, generator=torch.Generator().manual_seed(9))
    found = fit(ScaleAndBias(), lambda: iter([rows, rows]), [errors, errors], [False, True])

    columns, penalties = [], []
    for of_expert in rows.values():
        p, place = of_expert.p.double(), of_expert.tokens
        scaled = torch.zeros(T, H, dtype=torch.float64)
        scaled[place] = of_expert.y.double() * p[:, None]
        columns.append(scaled.flatten())
        penalties.append(float((RIDGE * scaled.square().sum()).sqrt()))
        for h in range(H):
            biased = torch.zeros(T, H, dtype=torch.float64)
            biased[place, h] = p
            columns.append(biased.flatten())
            penalties.append(float((RIDGE * p.square().sum()).sqrt()))
    system = np.concatenate([torch.stack(columns, dim=1).numpy(), np.diag(penalties)])
    wanted = np.concatenate([errors.double().numpy().flatten(), np.zeros(len(penalties))])
    solution = np.linalg.lstsq(system, wanted, rcond=None)[0]
    mine = torch.cat([found.parameters[expert] for expert in rows]).numpy()
    np.testing.assert_allclose(mine, solution, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["columns", "scale and bias"])
def test_a_fit_is_never_worse_on_what_is_held_out(seed, kind):
    """Random errors cannot be predicted; predictable ones are corrected."""
    correction = Columns(keep_mask()) if kind == "columns" else ScaleAndBias()
    rows = [some_rows(10 + seed), some_rows(20 + seed)]
    generator = torch.Generator().manual_seed(seed)
    errors = [torch.randn(T, H, generator=generator) for _ in rows]
    found = fit(correction, lambda: iter(rows), errors, [False, True])
    assert found.after <= found.before
    true = {
        expert: torch.randn(3 + expert, H, generator=generator)
        if kind == "columns"
        else torch.randn(1 + H, generator=generator)
        for expert in (0, 1)
    }
    errors = [torch.zeros(T, H) for _ in rows]
    for error, of_batch in zip(errors, rows, strict=True):
        for expert, of_expert in of_batch.items():
            added = correction.apply(expert, true[expert], of_expert) * of_expert.p[:, None]
            error.index_add_(0, of_expert.tokens, added)
    found = fit(correction, lambda: iter(rows), errors, [False, True])
    assert found.after < 0.05 * found.before


def test_errors_of_zero_are_left_alone():
    errors = [torch.zeros(T, H)] * 2
    rows = [some_rows(0), some_rows(1)]
    found = fit(Columns(keep_mask()), lambda: iter(rows), errors, [False, True])
    assert (found.parameters, found.before, found.after, found.steps) == ({}, 0, 0, 0)


# --- of a model -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model of narrow experts, a profile without a quarter of their atoms, and a text."""
    directory = tmp_path_factory.mktemp("models") / "model"
    info = make_model("qwen3_moe", directory, moe_intermediate_size=32, num_hidden_layers=2)
    generator = torch.Generator().manual_seed(4)
    keep = {}
    for layer in info.layers:
        keep[layer] = torch.rand(info.num_experts, 32, generator=generator) > 0.25
        keep[layer][0], keep[layer][1] = False, True
    profile = PruningProfile("wide", keep, metadata={"model": json.dumps(info.identity())})
    profile.write(directory / "atomic_profiles" / "wide.safetensors")
    uniform_profile(info, info.num_experts, 24).write_into(directory / "atomic_profiles")
    (directory / "text.txt").write_text(random_text(4000))
    return directory


FIT = {"seq_len": 64, "samples": 40, "batch_size": 4}


def letters() -> torch.Tensor:
    """Other text of the same kind: token ids [2, 64]."""
    ids = character_tokenizer()(random_text(128, seed=7))["input_ids"]
    return torch.tensor(ids[:128]).view(2, 64)


def fitted_logits(directory, profile, refitted):
    """Logits of the model with these columns and without the pruned atoms."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        for layer, keep_EI in profile.keep.items():
            down_EHI = model.model.layers[layer].mlp.experts.down_proj
            down_EIH = torch.zeros_like(down_EHI.transpose(1, 2))
            down_EIH[keep_EI] = refitted[layer]
            down_EHI.copy_(down_EIH.transpose(1, 2))
        return model(input_ids=letters()).logits


def test_exports_hold_the_fitted_columns_and_are_nearer_to_the_dense_model(tiny, tmp_path):
    """Packed and ordinary exports."""
    profile = PruningProfile.read(tiny / "atomic_profiles" / "uniform.safetensors")
    path, lines = tiny / "atomic_profiles" / "uniform.safetensors", []
    told = {"refit": True, "data": [str(tiny / "text.txt")], "on_note": lines.append, **FIT}
    result = api.export(tiny, path, tmp_path / "out", **told)
    errors = result.refit["held_out_error"]
    assert all(after < before for before, after in errors.values()), errors
    assert [line.split(":")[0] for line in lines] == ["layer 0 of 1", "layer 1 of 1"]
    index = json.loads((tmp_path / "out" / EXPORT_DIRECTORY / INDEX).read_text())
    assert index["metadata"]["refit"] == json.loads(json.dumps(result.refit))
    api.export(tiny, path, tmp_path / "plain-export")
    [shard] = (tmp_path / "out" / EXPORT_DIRECTORY).glob("*.safetensors")
    tensors = load_file(shard)
    untouched = load_file(tmp_path / "plain-export" / EXPORT_DIRECTORY / shard.name)
    changed = {name for name, it in tensors.items() if not torch.equal(it, untouched[name])}
    names = {layer: f"model.layers.{layer}.mlp.experts.packed.down_t" for layer in profile.keep}
    assert changed == set(names.values())

    fitted = fitted_logits(tiny, profile, {layer: tensors[it] for layer, it in names.items()})
    api.export(tiny, path, tmp_path / "ordinary", plain=True, **told)
    ordinary = AutoModelForCausalLM.from_pretrained(tmp_path / "ordinary", dtype=torch.float32)
    ids = letters()
    with torch.no_grad():
        torch.testing.assert_close(ordinary(input_ids=ids).logits, fitted, rtol=1e-4, atol=1e-4)
        dense = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)(input_ids=ids)
    masked = fitted_logits(tiny, profile, {k: untouched[it] for k, it in names.items()})
    assert (fitted - dense.logits).norm() < (masked - dense.logits).norm()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "a fit needs text; name it with --data"),
        (("--data", "text.txt", "--seq-len", 64, "--samples", 1), "at least 2 are needed"),
        (("--data", "text.txt", "--seq-len", 9999), "exceeds the model's context"),
    ],
)
def test_bad_fits_are_refused_in_one_line(tiny, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tiny)
    profile = tiny / "atomic_profiles" / "wide.safetensors"
    result = run("export", tiny, profile, "-o", tmp_path / "out", "--refit", *options)
    assert result.exit_code == 1
    assert words in result.output
    assert not (tmp_path / "out").exists()


def test_what_is_not_fitted_is_refused(tiny, tmp_path):
    profile, text = tiny / "atomic_profiles" / "wide.safetensors", [str(tiny / "text.txt")]
    with pytest.raises(ValueError, match="--data is for --refit"):
        api.export(tiny, profile, tmp_path / "out", data=text)
    read = PruningProfile.read(profile)
    routable = {layer: mask.any(dim=1) for layer, mask in read.keep.items()}
    PruningProfile("masking", read.keep, routable, read.metadata).write_into(tmp_path)
    with pytest.raises(ValueError, match="'masking' excludes experts from routing"):
        api.export(tiny, tmp_path / "masking.safetensors", tmp_path / "out", refit=True, data=text)
    api.export(tiny, profile, tmp_path / "exported")
    with pytest.raises(ValueError, match="an exported checkpoint, whose pruned atoms are gone"):
        api.export(tmp_path / "exported", profile, tmp_path / "out", refit=True, data=text)
