"""Exports of quantized checkpoints: codes and scales of the atoms kept, bit for bit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import make_checkpoint, ragged_masks, uniform_profile, write_profile
from tests.quantized import FORMATS, gptq, quantize_checkpoint, quantize_gpt_oss
from tests.unit.tiny_models import make_model
from vllm_atomic_moe.convert.exporting import export as exporting
from vllm_atomic_moe.convert.exporting.codes import find_codes
from vllm_atomic_moe.convert.exporting.export import Refitted, export
from vllm_atomic_moe.convert.exporting.rows import find_biases, find_rows, split_names
from vllm_atomic_moe.experts.formats import decode
from vllm_atomic_moe.files.checkpoint import describe_checkpoint
from vllm_atomic_moe.files.export_format import EXPORT_DIRECTORY
from vllm_atomic_moe.files.layouts import INDEX, PACKED_ROWS
from vllm_atomic_moe.files.profiles import PruningProfile
from vllm_atomic_moe.files.row_formats import PROJECTIONS
from vllm_atomic_moe.files.shards import Shards

SHARD = f"{EXPORT_DIRECTORY}/model-00001-of-00001.safetensors"
KINDS = (*FORMATS, "gpt-oss")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    directory = tmp_path_factory.mktemp("originals")
    sizes = {"hidden_size": 192, "num_hidden_layers": 2}
    make_checkpoint("qwen3_moe", directory / "qwen", moe_intermediate_size=96, **sizes)
    make_model("gpt_oss", directory / "gpt-oss", intermediate_size=96, num_hidden_layers=2)
    return directory


def quantized(originals, model, kind):
    """A quantized checkpoint with profiles, and a plain one with the same values."""
    if kind == "gpt-oss":
        plain = quantize_gpt_oss(originals / kind, model)
    else:
        plain = quantize_checkpoint(originals / "qwen", model, kind)
    info, profiles = describe_checkpoint(model), model / "profiles"
    wide = write_profile(info, "wide", profiles, seed=1)
    more = ragged_masks(info, seed=2)
    narrow = {layer: mask & more[layer] for layer, mask in wide.keep.items()}
    PruningProfile("narrow", narrow, metadata=wide.metadata).write(profiles / "narrow.safetensors")
    return plain


def values(directory, keep):
    """(layer, part, expert) -> weights of the atoms in `keep`; (…, "bias") -> their biases."""
    info, found = describe_checkpoint(directory), {}
    with Shards(directory) as source:
        experts, _ = split_names(source, info)
        for layer, names in experts.items():
            biases = find_biases(source, info, layer, names)
            for part, projection in zip(PACKED_ROWS, PROJECTIONS, strict=True):
                plain = info.scheme(layer).of(part).kind == "plain"
                rows = (find_rows if plain else find_codes)(source, info, layer, names)
                for expert, keep_I in enumerate(keep[layer]):
                    if plain:
                        kept = rows.kept(part, expert, keep_I).float()
                    else:
                        encoded = rows.rows(part, expert, True)
                        kept = decode(encoded, rows.row_format, projection)[keep_I]
                    found[layer, part, expert] = kept
                    if biases:
                        found[layer, part, expert, "bias"] = biases.kept(part, expert, keep_I)
    return found


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", KINDS)
def test_exports_keep_the_bits_of_the_atoms_that_stay(originals, tmp_path, kind):
    model, output = tmp_path / "model", tmp_path / "out"
    plain = quantized(originals, model, kind)
    wide, narrow = (PruningProfile.read(model / f"profiles/{name}.safetensors").keep
                    for name in ("wide", "narrow"))  # fmt: skip
    result = export(str(model), model / "profiles/wide.safetensors", output)
    assert result.weight_bytes < (model / "model.safetensors").stat().st_size
    info, found = describe_checkpoint(model), describe_checkpoint(output)
    assert found == info
    assert [s.name for s in found.schemes.values()] == [s.name for s in info.schemes.values()]
    wanted, rows = values(plain, wide), values(output, wide)
    assert rows.keys() == wanted.keys()
    assert all(torch.equal(rows[key], wanted[key]) for key in rows)

    before, after = load_file(model / "model.safetensors"), load_file(output / SHARD)
    others = {name for name in before if ".experts." not in name}
    assert {name for name in after if ".packed." not in name} == others
    assert all(torch.equal(before[name], after[name]) for name in others)
    assert (output / "config.json").read_bytes() == (model / "config.json").read_bytes()
    formats = json.loads((output / EXPORT_DIRECTORY / INDEX).read_text())["metadata"]["row_formats"]
    assert {tuple(of) for of in formats.values()} == {PACKED_ROWS}

    again, at_once = tmp_path / "again", tmp_path / "at-once"
    export(str(output), model / "profiles/narrow.safetensors", again)
    export(str(model), model / "profiles/narrow.safetensors", at_once)
    assert contents(again / EXPORT_DIRECTORY) == contents(at_once / EXPORT_DIRECTORY)
    rows, wanted = values(again, narrow), values(plain, narrow)
    assert all(torch.equal(rows[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("kind", ["fp8-block", "gptq", "nvfp4", "gpt-oss"])
def test_refitted_columns_are_plain_beside_codes(originals, tmp_path, kind):
    """Gate and up keep their bits, also in an export of the export; `check` names both formats."""
    model, output = tmp_path / "model", tmp_path / "out"
    plain = quantized(originals, model, kind)
    path = model / "profiles/wide.safetensors"
    wide, narrow = (
        PruningProfile.read(model / f"profiles/{name}.safetensors").keep
        for name in ("wide", "narrow")
    )
    info = describe_checkpoint(model)
    generator = torch.Generator().manual_seed(0)
    columns = {
        layer: torch.randn(int(keep_EI.sum()), info.hidden_size, generator=generator).bfloat16()
        for layer, keep_EI in wide.items()
    }
    result = export(str(model), path, output, refit=lambda chosen: Refitted(columns, {"why": "x"}))
    export(str(model), path, tmp_path / "unchanged")
    sizes = [
        sum(
            tensor.nbytes
            for name, tensor in load_file(directory / SHARD).items()
            if ".packed.down_t" in name and not name.endswith("_bias")
        )
        for directory in (tmp_path / "unchanged", output)
    ]
    assert result.refit == {"why": "x", "down_proj_bytes": sizes}
    assert sizes[1] == sum(it.nbytes for it in columns.values()) > sizes[0]

    found = describe_checkpoint(output)
    assert found == info
    [name] = found.row_formats
    assert name == f"{next(iter(info.row_formats))}, down plain"
    wanted = values(plain, wide)
    for layer, keep_EI in wide.items():
        for expert, rows in enumerate(columns[layer].split(keep_EI.sum(dim=1).tolist())):
            wanted[layer, "down_t", expert] = rows.float()
    rows = values(output, wide)
    assert rows.keys() == wanted.keys()
    assert all(torch.equal(rows[key], wanted[key]) for key in wanted)

    export(str(output), model / "profiles/narrow.safetensors", tmp_path / "again")
    assert describe_checkpoint(tmp_path / "again").row_formats == found.row_formats
    rows, stored = values(tmp_path / "again", narrow), values(output, narrow)
    assert all(torch.equal(rows[key], stored[key]) for key in stored)


@pytest.mark.parametrize("kind", ["plain", "fp8-block", "gpt-oss"])
def test_the_disk_is_checked_for_what_a_refit_writes(originals, tmp_path, monkeypatch, kind):
    """Before the fit: as much as without one for plain rows, of float32 here; 16 bits for codes."""
    model, output, needed = tmp_path / "model", tmp_path / "out", []
    if kind == "plain":
        shutil.copytree(originals / "qwen", model)
    else:
        quantized(originals, model, kind)
    info = describe_checkpoint(model)
    keep = write_profile(info, "half", tmp_path, seed=1).keep
    monkeypatch.setattr(exporting, "check_space", lambda path, size: needed.append(size))
    export(str(model), tmp_path / "half.safetensors", output)

    def fit(chosen):
        assert len(needed) == 2
        sizes = {layer: (int(keep_EI.sum()), info.hidden_size) for layer, keep_EI in keep.items()}
        return Refitted({layer: torch.zeros(size).bfloat16() for layer, size in sizes.items()}, {})

    result = export(str(model), tmp_path / "half.safetensors", output, refit=fit)
    before, after = result.refit["down_proj_bytes"]
    assert needed[1] - needed[0] == after - before
    assert (after == before) == (kind == "plain")


def test_a_refit_of_codes_is_not_for_other_engines(originals, tmp_path):
    """Refused before anything is fitted."""
    model = tmp_path / "model"
    quantized(originals, model, "fp8-block")
    info = describe_checkpoint(model)
    path = uniform_profile(info, info.num_experts, 64).write_into(tmp_path)

    def fit(chosen):
        raise AssertionError("fitted")

    with pytest.raises(ValueError, match=r"no plain down_proj beside .* refit without --plain"):
        export(str(model), path, tmp_path / "out", plain=True, refit=fit)
    assert not (tmp_path / "out").exists()


def test_gpt_oss_of_16_bits_is_exported_with_its_biases(originals, tmp_path):
    info = describe_checkpoint(originals / "gpt-oss")
    keep = write_profile(info, "wide", tmp_path, seed=1).keep
    export(str(originals / "gpt-oss"), tmp_path / "wide.safetensors", tmp_path / "out")
    rows, wanted = values(tmp_path / "out", keep), values(originals / "gpt-oss", keep)
    assert rows.keys() == wanted.keys()
    assert all(torch.equal(rows[key], wanted[key]) for key in rows)
    gate_up = load_file(originals / "gpt-oss/model.safetensors")
    gate_up = gate_up["model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(rows[1, "up", 5], gate_up[5, :, 1::2].t()[keep[1][5]])


def test_groups_of_an_activation_order_travel_along(originals, tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)

    def shuffled(matrix):
        groups = torch.arange(matrix.shape[1]) // 32
        if matrix.shape[1] == 96:  # of down alone
            groups = groups[torch.randperm(96, generator=generator)]
        return gptq(matrix, order=groups)

    monkeypatch.setitem(FORMATS, "gptq", shuffled)
    plain = quantized(originals, tmp_path / "model", "gptq")
    profile = tmp_path / "model/profiles/wide.safetensors"
    export(str(tmp_path / "model"), profile, tmp_path / "out")
    keep = PruningProfile.read(profile).keep
    rows, wanted = values(tmp_path / "out", keep), values(plain, keep)
    assert all(torch.equal(rows[key], wanted[key]) for key in rows)


def test_scales_without_atoms_are_left_out(originals, tmp_path):
    model = tmp_path / "model"
    quantized(originals, model, "nvfp4")
    info = describe_checkpoint(model)
    keep = {layer: torch.zeros(8, 96, dtype=torch.bool) for layer in info.layers}
    for mask in keep.values():
        mask[3, 40:44] = True  # of one group of 16
    PruningProfile("few", keep).write(tmp_path / "few.safetensors")
    export(str(model), tmp_path / "few.safetensors", tmp_path / "out")
    after = load_file(tmp_path / "out" / SHARD)
    packed = "model.layers.1.mlp.experts.packed"
    assert after[f"{packed}.down_t_scales"].shape == (1, 192)
    assert after[f"{packed}.gate_scales"].shape == (4, 12)
    assert after[f"{packed}.down_t"].shape == (4, 96)


DOWN = "model.layers.1.mlp.experts.3.down_proj"


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        (
            "nvfp4",
            lambda t: t[f"{DOWN}.weight_scale"].view(torch.uint8).fill_(127),
            "3.down_proj.weight_packed, expert 3: scales are not finite",
        ),
        (
            "fp8-channel",
            lambda t: t.update({DOWN.replace("down", "up") + ".weight_scale": torch.ones(7, 1)}),
            r"3.up_proj.weight, expert 3: scales are \[7, 1\], wanted \[96, 1\]",
        ),
        (
            "int4",
            lambda t: t.update({f"{DOWN}.weight_zero_point": torch.zeros(192, 3)}),
            "asymmetric weights",
        ),
    ],
    ids=["not finite", "shape", "zero points"],
)
def test_faults_of_the_source_leave_nothing_behind(originals, tmp_path, kind, change, words):
    model, output = tmp_path / "model", tmp_path / "to/out"
    quantized(originals, model, kind)
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ValueError, match=words):
        export(str(model), model / "profiles/wide.safetensors", output)
    assert not output.parent.exists()


def test_exports_that_contradict_themselves(originals, tmp_path):
    model, output = tmp_path / "model", tmp_path / "out"
    quantized(originals, model, "int4")
    export(str(model), model / "profiles/wide.safetensors", output)
    index = (output / EXPORT_DIRECTORY / INDEX).read_text()
    packed = "model.layers.1.mlp.experts.packed"
    down = f"{packed}.down_t"
    scales = f"{down}_scales"

    def refused(words, change_index=lambda told: None, change_tensors=lambda tensors: None):
        broken = tmp_path / "broken"
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(output, broken)
        told = json.loads(index)
        change_index(told["metadata"]["row_formats"])
        (broken / EXPORT_DIRECTORY / INDEX).write_text(json.dumps(told))
        tensors = load_file(broken / SHARD)
        change_tensors(tensors)
        save_file(tensors, broken / SHARD)
        with pytest.raises(ValueError, match=words) as error:
            export(str(broken), model / "profiles/narrow.safetensors", tmp_path / "again")
        assert len(str(error.value)) < 400
        assert not (tmp_path / "again").exists()

    refused("layer 1: a row format that is not known", lambda of: of["1"]["up"].update(kind="int2"))
    refused("layer 1: a row format that is not known", lambda of: of["1"]["up"].update(rows=-1))
    refused("does not say how the rows of layer 1", lambda of: of["1"].pop("up"))
    refused(
        "projections encoded differently .gate int4 g32, up plain, down_t int4 g32",
        lambda of: of["1"].update(up={"kind": "plain"}),
    )
    refused("quantized as fp8 g32, config.json says 4 bits", lambda of: [
        of["1"][part].update(kind="fp8") for part in PACKED_ROWS
    ])  # fmt: skip
    refused(
        r"packed.down_t is U8 \[\d+, 96\], wanted floats \[\d+, 192\]",
        lambda of: of["1"].update(down_t={"kind": "plain"}),
        lambda tensors: tensors.pop(scales),
    )

    def plain_rows(tensors, dtype):
        tensors[down] = torch.ones(len(tensors[down]), 192, dtype=dtype)

    refused(
        "packed.down_t_scales is not wanted",
        lambda of: of["1"].update(down_t={"kind": "plain"}),
        lambda tensors: plain_rows(tensors, torch.bfloat16),
    )
    refused(
        "packed.down_t is I16 .*, wanted floats",
        lambda of: of["1"].update(down_t={"kind": "plain"}),
        lambda tensors: [plain_rows(tensors, torch.int16), tensors.pop(scales)],
    )
    refused("packed.down_t_scales is missing", change_tensors=lambda t: t.pop(scales))
    refused(
        r"layer 1: down_t: scales is torch.bfloat16 \[5, 192\], wanted",
        change_tensors=lambda t: t.update({scales: t[scales][:5].clone()}),
    )
    refused("scales are not finite", change_tensors=lambda t: t[scales].fill_(torch.inf))
    refused("a scale is zero", change_tensors=lambda t: t[scales].zero_())
