"""Compensated profiles: their files, and what slots add to a layer's output.

Legend: T tokens, K experts per token, E experts, H hidden size.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from tests.unit.test_cli import run
from tests.unit.test_profiles import HEADER, MODEL, keep_masks, profile, refusal
from tests.unit.tiny_models import make_model, random_text
from vllm_atomic_moe import api
from vllm_atomic_moe.experts.compensation import SlotCompensation
from vllm_atomic_moe.files.compensation import Compensation
from vllm_atomic_moe.files.profiles import PruningProfile
from vllm_atomic_moe.files.tensors import open_safetensors

E, H = MODEL.num_experts, MODEL.hidden_size


def some(seed: int, experts: int = E, hidden: int = H) -> Compensation:
    generator = torch.Generator().manual_seed(seed)
    scale_E = 1 + torch.randn(experts, generator=generator) / 4
    return Compensation(scale_E, torch.randn(experts, hidden, generator=generator))


# --- the file -------------------------------------------------------------------------------------


def test_compensated_profiles_are_version_2_and_others_version_1(tmp_path):
    plain, compensated = profile(), profile(compensation={3: some(0)})
    for written, version in ((plain, "1"), (compensated, "2")):
        written.write(tmp_path / "file.safetensors")
        with open_safetensors(tmp_path / "file.safetensors") as (metadata, _):
            assert metadata["format_version"] == version
        for found in (PruningProfile.read(tmp_path / "file.safetensors"), written.in_memory()):
            assert found.digest() == written.digest()
            assert found.compensation.keys() == written.compensation.keys()
            for layer, wanted in written.compensation.items():
                assert torch.equal(found.compensation[layer].scale_E, wanted.scale_E)
                assert torch.equal(found.compensation[layer].bias_EH, wanted.bias_EH)
            assert found.check(MODEL) == []
    others = [profile(compensation={3: some(1)}), profile(compensation={1: some(0)}), plain]
    assert len({compensated.digest(), *(other.digest() for other in others)}) == 4


@pytest.mark.parametrize(
    ("version", "changes", "words"),
    [
        ("1", {}, "unexpected tensor 'layers.1.output_"),
        ("2", {"layers.1.output_bias": None}, "layers.1.output_bias is missing beside output_s"),
        ("2", {"layers.1.output_scale": None}, "layers.1.output_scale is missing beside output_b"),
        ("2", {"layers.1.output_scale": torch.ones(E).half()}, "is float16 [4], wanted float32"),
        ("2", {"layers.1.output_bias": torch.ones(E)}, "is float32 [4], wanted float32 of rank 2"),
        ("2", {"layers.1.output_scale": torch.ones(5)}, "is [5], wanted one of every expert"),
        ("2", {"layers.1.output_scale": torch.full((E,), torch.inf)}, "scale is not finite"),
        (
            "2",
            {"layers.2.output_scale": torch.ones(E), "layers.2.output_bias": torch.ones(E, H)},
            "layers.2.output_scale is [4], wanted one of every expert beside layers.2.keep",
        ),
        (
            "2",
            {"layers.3.output_scale": torch.ones(E), "layers.3.output_bias": torch.ones(E, 9)},
            "one hidden size",
        ),
        ("3", {}, "`format_version` is '3', wanted '1' or '2'"),
    ],
)
def test_wrong_compensations_are_refused(tmp_path, version, changes, words):
    tensors = {f"layers.{layer}.keep": mask for layer, mask in keep_masks().items()}
    tensors |= {f"layers.1.{name}": it for name, it in some(0).tensors().items()}
    tensors = {name: it for name, it in (tensors | changes).items() if it is not None}
    save_file(tensors, tmp_path / "x.safetensors", metadata=HEADER | {"format_version": version})
    assert words in refusal(lambda: PruningProfile.read(tmp_path / "x.safetensors"))


def test_another_models_compensation_is_refused():
    wide = profile(metadata={}, compensation={3: some(0, hidden=9)})
    words = "layers.3.output_bias is [4, 9], the model's hidden size is 8"
    assert words in refusal(lambda: wide.check(MODEL))


# --- in memory ------------------------------------------------------------------------------------


def test_slots_scale_router_weights_and_add_biases():
    own_E = torch.tensor([True, True, False, True])
    made = SlotCompensation(2, own_E, H, torch.float32)
    by_slot = {3: some(3), 5: some(5)}
    for slot, compensation in by_slot.items():
        made.set_slot(slot, compensation)
    generator = torch.Generator().manual_seed(0)
    ids_TK = torch.randint(-1, E + 1, (40, 3), generator=generator, dtype=torch.int32)
    weights_TK = torch.rand(40, 3, generator=generator)
    slots_T1 = torch.randint(2, 6, (40, 1), generator=generator, dtype=torch.int32)
    scaled_TK, added_TH = made(weights_TK, ids_TK, slots_T1)
    for t, (ids_K, slot) in enumerate(zip(ids_TK.tolist(), slots_T1[:, 0].tolist(), strict=True)):
        wanted_H = torch.zeros(H)
        for k, expert in enumerate(ids_K):
            if not 0 <= expert < E:
                continue
            compensation = by_slot.get(slot)
            scale = compensation.scale_E[expert] if compensation else 1
            assert scaled_TK[t, k] == weights_TK[t, k] * scale
            if compensation and own_E[expert]:
                wanted_H += weights_TK[t, k] * compensation.bias_EH[expert]
        torch.testing.assert_close(added_TH[t], wanted_H)


def test_slots_are_filled_and_freed_as_room_allows():
    made = SlotCompensation(1, torch.ones(E, dtype=torch.bool), H, torch.float32)
    assert made.weight_bytes == E * H * 4
    made.set_slot(2, some(2))
    made.set_slot(4, None)
    with pytest.raises(ValueError, match="room for the biases of 1 compensated profiles"):
        made.set_slot(4, some(4))
    made.set_slot(2, some(3))  # its own place
    made.set_slot(2, None)
    made.set_slot(4, some(4))
    ids, slots = torch.tensor([[1]]), torch.tensor([[4], [2]], dtype=torch.int32)
    scaled, added = made(torch.ones(2, 1), ids.expand(2, 1), slots)
    torch.testing.assert_close(added, torch.stack([some(4).bias_EH[1], torch.zeros(H)]))
    assert scaled.flatten().tolist() == [float(some(4).scale_E[1]), 1]


def test_a_rank_that_adds_no_biases_allocates_none():
    made = SlotCompensation(1, torch.zeros(E, dtype=torch.bool), H, torch.float32)
    made.set_slot(0, some(0))
    slots = torch.zeros(2, 1, dtype=torch.int32)
    scaled, added = made(torch.ones(2, 1), torch.ones(2, 1, dtype=torch.int64), slots)
    assert (added, made.weight_bytes) == (None, 0)
    assert scaled.flatten().tolist() == [float(some(0).scale_E[1])] * 2


# --- from a text ----------------------------------------------------------------------------------


def test_prune_compensates(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    info = make_model("qwen3_moe", tmp_path / "model", num_hidden_layers=2)
    (tmp_path / "text.txt").write_text(random_text(3000))
    text = ("--data", "text.txt", "--seq-len", 64, "--samples", 20)
    result = run("calibrate", "model", *text, "--no-gradients", "-o", "stats.safetensors")
    assert result.exit_code == 0, result.output
    prune = ("prune", "stats.safetensors", "--method", "random", "--ratio", 0.5, "-o", "profiles")
    assert run(*prune).exit_code == 0
    result = run(*prune, "--name", "better", "--compensate", "model", *text)
    assert result.exit_code == 0, result.output
    assert "layer 1 of 1: held-out error" in result.output
    plain = PruningProfile.read(tmp_path / "profiles" / "random-50.safetensors")
    better = PruningProfile.read(tmp_path / "profiles" / "better.safetensors")
    assert all(torch.equal(better.keep[layer], plain.keep[layer]) for layer in info.layers)
    assert better.compensation.keys() == set(info.layers)
    report = json.loads(better.metadata["compensation"])
    assert all(after < before for before, after in report["held_out_error"].values())
    assert report["calibration"]["seq_len"] == 64
    assert "compensated by 0.00 MiB of biases" in run("show", "profiles").output
    assert "ok, compensated" in run("check", "model", "profiles").output

    # Again: an export carries it, an ordinary one cannot, and it is not fitted twice.
    path = tmp_path / "profiles" / "better.safetensors"
    api.export("model", path, "exported")
    carried = PruningProfile.read(tmp_path / "exported/atomic_profiles/better.safetensors")
    assert carried.digest() == better.digest()
    with pytest.raises(ValueError, match="'better' is compensated already"):
        api.export("model", path, "out", refit=True, data=["text.txt"], seq_len=64)
    whole = replace(better, keep={k: torch.ones_like(m) for k, m in better.keep.items()})
    whole.write(tmp_path / "whole.safetensors")
    with pytest.raises(
        ValueError, match="is compensated, which an ordinary checkpoint cannot express"
    ):
        api.export("model", "whole.safetensors", "out", plain=True)
    refused = run(*prune, *text)
    assert refused.exit_code == 1
    assert "--data is for --compensate MODEL" in refused.output
