"""Exports: the same rows bit for bit, the same bytes every time, all of it or nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.architectures import PER_EXPERT
from tests.checkpoints import make_checkpoint, ragged_masks, write_profile
from vllm_atomic_moe.convert.exporting.export import export
from vllm_atomic_moe.convert.exporting.place import working_directory
from vllm_atomic_moe.files.checkpoint import describe_checkpoint
from vllm_atomic_moe.files.export_format import EXPORT_DIRECTORY, INDEX
from vllm_atomic_moe.files.profiles import PruningProfile

SHARD = f"{EXPORT_DIRECTORY}/model-00001-of-00001.safetensors"


@dataclass
class Model:
    """A tiny Qwen3-MoE with the profiles `wide` and, within it, `narrow`."""

    path: Path

    @property
    def weights(self) -> Path:
        return self.path / "model.safetensors"

    def profile(self, name: str = "wide") -> Path:
        return self.path / "atomic_profiles" / f"{name}.safetensors"

    def export(self, output: Path, name: str = "wide", **options) -> Path:
        export(str(self.path), self.profile(name), output, **options)
        return output


def make_model(path: Path, architecture: str = "qwen3_moe", layout: str = "per_expert") -> Model:
    info = make_checkpoint(architecture, path, layout=layout)
    wide = write_profile(info, "wide", path / "atomic_profiles", seed=1)
    other = ragged_masks(info, seed=2)
    narrow = {layer: mask & other[layer] for layer, mask in wide.keep.items()}
    PruningProfile("narrow", narrow, metadata=wide.metadata).write(
        path / "atomic_profiles" / "narrow.safetensors"
    )
    return Model(path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One model for all tests that do not change it."""
    return make_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def model(shared, tmp_path):
    """A copy that may be changed."""
    shutil.copytree(shared.path, tmp_path / "model")
    return Model(tmp_path / "model")


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def data_bytes(path: Path) -> int:
    """Bytes of a safetensors file after its header."""
    with open(path, "rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def change(path: Path, changed) -> None:
    tensors = load_file(path)
    save_file(changed({name: t.clone() for name, t in tensors.items()}), path)


# --- what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", PER_EXPERT)
def test_rows_are_the_originals_and_both_layouts_give_the_same_bytes(tmp_path, architecture):
    model = make_model(tmp_path / "model", architecture)
    fused = tmp_path / "fused"
    make_checkpoint(architecture, fused, layout="fused")
    result = export(str(model.path), model.profile(), tmp_path / "out")
    export(str(fused), model.profile(), tmp_path / "out-fused")
    assert contents(tmp_path / "out-fused") == contents(tmp_path / "out")

    info, profile = describe_checkpoint(model.path), PruningProfile.read(model.profile())
    found = describe_checkpoint(tmp_path / "out")
    assert found == info
    assert all(torch.equal(found.stored[layer], profile.keep[layer]) for layer in info.layers)
    assert (result.kept, result.shards) == (profile.kept, 1)
    before, after = load_file(model.weights), load_file(tmp_path / "out" / SHARD)
    names = (
        ("w1", "w3", "w2") if architecture == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    )
    for layer in info.layers:
        prefix = f"{info.blocks[layer]}.experts"
        for part, name in zip(("gate", "up", "down_t"), names, strict=True):
            matrices = [before.pop(f"{prefix}.{expert}.{name}.weight") for expert in range(8)]
            rows = torch.stack([m.t() if part == "down_t" else m for m in matrices])
            assert torch.equal(after.pop(f"{prefix}.packed.{part}"), rows[profile.keep[layer]])
        assert torch.equal(after.pop(f"{prefix}.packed.keep"), profile.keep[layer])
        offsets = after.pop(f"{prefix}.packed.offsets")
        assert offsets.tolist() == [0, *profile.widths(layer).cumsum(0).tolist()]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    pruned = (info.atoms - profile.kept_atoms) * 3 * info.hidden_size * 4
    index = len(info.layers) * (8 * 64 + 9 * 8)
    assert data_bytes(model.weights) - data_bytes(tmp_path / "out" / SHARD) == pruned - index
    assert result.weight_bytes == (tmp_path / "out" / SHARD).stat().st_size
    assert result.source_bytes == model.weights.stat().st_size


def test_transposed_fused_tensors_are_told_by_their_shapes(tmp_path, shared):
    transposed = make_model(tmp_path / "transposed", layout="fused")

    def turn(tensors):
        for name in tensors:
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                tensors[name] = tensors[name].transpose(1, 2).contiguous()
        return tensors

    change(transposed.weights, turn)
    export(str(transposed.path), shared.profile(), tmp_path / "one")
    assert contents(tmp_path / "one") == contents(shared.export(tmp_path / "two"))


def test_stored_dtypes_are_kept_and_experts_of_other_layers_copied_whole(model, tmp_path):
    def mix(tensors):
        for name in tensors:
            if "experts" in name:
                tensors[name] = tensors[name].bfloat16()
        for name in [name for name in tensors if "layers.1." in name]:
            rest = name.removeprefix("model.layers.1.")
            tensors[f"model.layers.3.{rest}"] = tensors[name].half()
            tensors[f"mtp.layers.0.{rest}"] = tensors[name].clone()
        tensors["steps"] = torch.tensor(7)
        return tensors

    change(model.weights, mix)
    config = json.loads((model.path / "config.json").read_text())
    (model.path / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    before, after = load_file(model.weights), load_file(model.export(tmp_path / "out") / SHARD)
    assert after["model.layers.0.mlp.experts.packed.down_t"].dtype == torch.bfloat16
    copied = before.keys() & after.keys()
    assert {"steps", "model.layers.0.mlp.gate.weight"} <= copied
    assert {name for name in before if "layers.3." in name or "mtp." in name} <= copied
    assert all(before[name].dtype == after[name].dtype for name in copied)
    assert all(torch.equal(before[name], after[name]) for name in copied)


def test_a_correction_bias_among_the_experts_is_copied(model, tmp_path):
    """As in Laguna."""
    name = "model.layers.0.mlp.experts.e_score_correction_bias"
    before = describe_checkpoint(model.path).router
    change(model.weights, lambda tensors: {**tensors, name: torch.arange(8.0)})
    info = describe_checkpoint(model.path)
    assert info.router.sha256 != before.sha256
    profile = PruningProfile.read(model.profile())
    PruningProfile("own", profile.keep).write(tmp_path / "own.safetensors")
    export(str(model.path), tmp_path / "own.safetensors", tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / SHARD)[name], torch.arange(8.0))
    assert describe_checkpoint(tmp_path / "out") == info


def test_layers_without_atoms_and_experts_that_are_not_routable(model, tmp_path):
    wide = PruningProfile.read(model.profile())
    keep = {**wide.keep, 0: torch.zeros(8, 64).bool()}
    routable = {1: torch.arange(8) > 2}
    keep[1] = keep[1] & routable[1][:, None]
    PruningProfile("whole", keep, routable).write(tmp_path / "whole.safetensors")
    result = export(str(model.path), tmp_path / "whole.safetensors", tmp_path / "out")
    assert result.warnings == [
        "profile 'whole' does not say which model it was made for; its masks fit, their origin is "
        "unknown"
    ]
    tensors = load_file(tmp_path / "out" / SHARD)
    assert tensors["model.layers.0.mlp.experts.packed.gate"].shape == (0, 128)
    assert tensors["model.layers.1.mlp.experts.packed.offsets"][:4].tolist() == [0, 0, 0, 0]
    (written,) = (tmp_path / "out" / "atomic_profiles").iterdir()
    assert torch.equal(PruningProfile.read(written).routable[1], routable[1])


def test_other_files_are_copied_and_other_weights_are_not(model, tmp_path):
    for name in (
        *("LICENSE", "tokenizer.json", "chat_templates/tool.jinja", "modeling.py"),
        *("pytorch_model.bin", "pytorch_model.bin.index.json", "original/params.json"),
        *("consolidated.pth", ".gitattributes", ".cache/x.json", "onnx/config.json"),
    ):
        (model.path / name).parent.mkdir(exist_ok=True)
        (model.path / name).write_text(name)
        (model.path / name).chmod(0o600)
    (model.path / "link.txt").symlink_to(model.path / "LICENSE")
    output = model.export(tmp_path / "deep" / "out")
    files = contents(output)
    assert sorted(files) == [
        *("LICENSE", "atomic_profiles/wide.safetensors", SHARD, f"{EXPORT_DIRECTORY}/{INDEX}"),
        *("chat_templates/tool.jinja", "config.json", "generation_config.json", "link.txt"),
        *("modeling.py", "tokenizer.json"),
    ]
    assert files["link.txt"] == files["LICENSE"]
    assert files["config.json"] == (model.path / "config.json").read_bytes()
    assert files["atomic_profiles/wide.safetensors"] == model.profile().read_bytes()
    assert not any(path.is_symlink() for path in output.rglob("*"))
    modes = {path.stat().st_mode & 0o777 for path in output.rglob("*") if path.is_file()}
    folders = {path.stat().st_mode & 0o777 for path in (output, output / EXPORT_DIRECTORY)}
    assert (modes, folders) == ({0o644}, {0o755})
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_configuration_says_what_vllm_would_read_from_the_shards(model, tmp_path):
    config = json.loads((model.path / "config.json").read_text())
    del config["dtype"]
    config["tie_word_embeddings"] = True
    (model.path / "config.json").write_text(json.dumps(config))
    exported = json.loads((model.export(tmp_path / "one") / "config.json").read_text())
    assert exported == {**config, "dtype": "float32", "tie_word_embeddings": False}

    def without_head(tensors):
        del tensors["lm_head.weight"]
        return {name: tensor.bfloat16() for name, tensor in tensors.items()}

    change(model.weights, without_head)
    profile = PruningProfile.read(model.profile())
    PruningProfile("wide", profile.keep).write(model.profile())
    exported = json.loads((model.export(tmp_path / "two") / "config.json").read_text())
    assert exported == {**config, "dtype": "bfloat16"}


# --- again and from exports -----------------------------------------------------------------------


def test_exporting_again_and_exporting_an_export_give_the_same_bytes(shared, tmp_path):
    output = shared.export(tmp_path / "out")
    before = contents(output)
    assert contents(shared.export(output)) == before
    again = tmp_path / "again"
    export(str(output), output / "atomic_profiles" / "wide.safetensors", again)
    assert contents(again) == before
    # The profile may be the one inside of what is replaced.
    export(str(shared.path), output / "atomic_profiles" / "wide.safetensors", output)
    assert contents(output) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "out"]


def test_shards_are_bounded_and_make_no_difference(shared, tmp_path):
    limit = 100_000
    output = shared.export(tmp_path / "out", shard_bytes=limit)
    shards = list(output.glob(f"{EXPORT_DIRECTORY}/*.safetensors"))
    assert len(shards) > 5
    assert all(data_bytes(shard) <= limit or len(load_file(shard)) == 1 for shard in shards)
    index = json.loads((output / EXPORT_DIRECTORY / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(map(data_bytes, shards))
    assert describe_checkpoint(output) == describe_checkpoint(shared.path)
    export(str(output), shared.profile(), tmp_path / "one")
    assert contents(tmp_path / "one") == contents(shared.export(tmp_path / "two"))
    # Cut otherwise, it is replaced all the same.
    assert contents(shared.export(output)) == contents(tmp_path / "two")


def test_a_smaller_profile_may_be_exported_from_an_export(shared, tmp_path):
    wide = shared.export(tmp_path / "wide")
    export(str(wide), shared.profile("narrow"), tmp_path / "one")
    assert contents(tmp_path / "one") == contents(shared.export(tmp_path / "two", "narrow"))
    with pytest.raises(
        ValueError, match=r"'wide': layers.0.keep keeps \d+ atoms that the exported"
    ):
        export(str(tmp_path / "one"), shared.profile(), tmp_path / "three")


def test_profiles_of_an_export_are_checked_against_what_it_holds(shared, tmp_path):
    found = describe_checkpoint(shared.export(tmp_path / "out", "narrow"))
    assert PruningProfile.read(shared.profile("narrow")).check(found) == []
    for profile in (PruningProfile.read(shared.profile()), PruningProfile.dense(found)):
        with pytest.raises(
            ValueError, match=r"exported checkpoint does not hold; use the original"
        ):
            profile.check(found)


# --- interrupted ----------------------------------------------------------------------------------

# Arguments: model, profile, output, where to die.
DIES = """
import os, signal, sys
from pathlib import Path
from vllm_atomic_moe.convert.exporting.export import export

model, profile, output, point = sys.argv[1:]
event, _, wanted = point.partition(" ")
seen = 0

def die_at(name):
    global seen
    seen += name == event
    if name == event and seen == int(wanted):
        os.kill(os.getpid(), signal.SIGKILL)

def before(name, call):
    def replacement(*arguments):
        die_at(name)
        return call(*arguments)
    return replacement

os.fsync = before("fsync", os.fsync)
Path.rename = before("rename", Path.rename)
export(model, Path(profile), Path(output), on_progress=lambda *_: die_at("piece"))
"""


def die(model: Model, output: Path, point: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DIES, str(model.path), str(model.profile()), str(output), point],
        capture_output=True,
        text=True,
    )
    assert done.returncode == -9, done.stderr


@pytest.mark.parametrize("point", ["piece 60", "fsync 1", "fsync 4"])
def test_a_killed_export_leaves_nothing_that_looks_finished(shared, tmp_path, point):
    output = tmp_path / "out"
    die(shared, output, point)
    (left,) = tmp_path.iterdir()
    assert left.name == ".out.exporting"
    with pytest.raises(ValueError, match="config"):
        describe_checkpoint(left)
    assert contents(shared.export(output)) == contents(shared.export(tmp_path / "whole"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize("point", ["piece 60", "rename 1", "rename 2"])
def test_a_killed_replacement_keeps_what_was_there(shared, tmp_path, point):
    output = shared.export(tmp_path / "out")
    before = contents(output)
    die(shared, output, point)
    if point == "rename 2":
        assert not output.exists()
    else:
        assert contents(output) == before
    # Even a run that is refused puts back what was moved aside.
    with pytest.raises(ValueError, match="holds an export of another model or profile, 'wide'"):
        shared.export(output, "narrow")
    assert contents(output) == before
    assert contents(shared.export(output)) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failing_export_leaves_nothing(shared, tmp_path):
    def fail(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shared.export(tmp_path / "a" / "b", on_progress=fail)
    assert list(tmp_path.iterdir()) == []


def test_two_exports_to_one_place_are_kept_apart(shared, tmp_path):
    output = tmp_path / "out"
    with working_directory(output) as work:
        (work / "file").touch()
        with pytest.raises(ValueError, match="another export to it is running"):
            shared.export(output)
        assert (work / "file").exists()


# --- refusals -------------------------------------------------------------------------------------


def refused(model: Model, output: Path, words: str, name: str = "wide") -> None:
    there = {path: path.read_bytes() for path in output.parent.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=words):
        model.export(output, name)
    assert there == {path: path.read_bytes() for path in output.parent.rglob("*") if path.is_file()}
    assert not list(output.parent.glob(".*"))


def test_places_that_are_refused(model, tmp_path):
    refused(model, model.path, "is inside the model")
    refused(model, model.path / "exported", "is inside the model")
    (tmp_path / "file").touch()
    refused(model, tmp_path / "file", "is a file; name a directory")
    shutil.copytree(model.path, tmp_path / "other")
    refused(model, tmp_path / "other", "holds something that is not a finished export; remove it")
    (tmp_path / "empty").mkdir()
    output = model.export(tmp_path / "empty")
    refused(model, output, "export of another model or profile, 'wide'; wanted 'narrow'", "narrow")
    (output / "notes.txt").touch()
    refused(model, output, r"holds notes.txt, which would be lost: .* move it away")


def test_mount_points_are_refused(model):
    with pytest.raises(ValueError, match=r"output /proc is a mount point, .* name a directory"):
        model.export(Path("/proc"))


def test_an_export_of_a_sibling_or_of_other_masks_is_not_replaced(model, tmp_path):
    output = model.export(tmp_path / "out")
    profile = PruningProfile.read(model.profile())
    narrow = PruningProfile.read(model.profile("narrow"))
    PruningProfile("wide", narrow.keep, metadata=narrow.metadata).write(model.profile())
    refused(model, output, "holds an export of another model or profile, 'wide'")
    PruningProfile("wide", profile.keep).write(model.profile())
    gate = "model.layers.0.mlp.gate.weight"
    change(model.weights, lambda tensors: {**tensors, gate: tensors[gate] + 1})
    refused(model, output, "holds an export of another model or profile, 'wide'")


def test_a_full_disk_is_refused_before_writing(shared, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(ValueError, match=r"\d\.\d MiB are needed, 1.0 MiB are free; make room"):
        shared.export(tmp_path / "a" / "out")
    assert list(tmp_path.iterdir()) == []


E0 = "model.layers.1.mlp.experts.0"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            lambda t: t | {f"{E0}.up_proj.bias": torch.zeros(64)},
            "0.up_proj.bias is not a known part of an",
        ),
        (
            lambda t: t | {f"{E0}.up_proj.weight_scale": torch.zeros(1)},
            "layer 1: up of its experts has weight_scale, down_proj is plain; projections of one",
        ),
        (
            lambda t: {n: x.to(torch.float8_e4m3fn) if "experts" in n else x for n, x in t.items()},
            "down_proj: weight is float8 and has no weight_scale",
        ),
        (
            lambda t: t | {f"{E0}.up_proj.weight": t[f"{E0}.up_proj.weight"].half()},
            "layer 1: experts are stored as F16, F32; weights of one dtype",
        ),
        (
            lambda t: {n: x for n, x in t.items() if n != f"{E0}.gate_proj.weight"},
            "layer 1 has 8 experts and 7 gate projections; fetch the checkpoint again",
        ),
        (
            lambda t: t | {f"{E0}.up_proj.weight": torch.zeros(32, 128)},
            r"experts.0.up_proj.weight is \[32, 128\], wanted \[64, 128\]",
        ),
    ],
)
def test_experts_that_are_not_plain_weights_are_refused(model, tmp_path, changed, words):
    change(model.weights, changed)
    refused(model, tmp_path / "out", words)


def test_fused_tensors_of_other_shapes_are_refused(tmp_path):
    model = make_model(tmp_path / "model", layout="fused")
    name = "model.layers.2.mlp.experts.gate_up_proj"
    change(model.weights, lambda t: {**t, name: torch.zeros(8, 64, 128)})
    refused(model, tmp_path / "out", r"gate_up of its experts is \[8, 64, 128\], down is")
    change(model.weights, lambda t: {**t, name: torch.zeros(8, 64, 256)})
    refused(model, tmp_path / "out", r"gate_up_proj and .*down_proj are \[8, 64, 256\] and")


def test_profiles_and_models_that_do_not_fit_are_refused(model, tmp_path):
    sibling = make_checkpoint("olmoe", tmp_path / "sibling")
    with pytest.raises(ValueError, match="made for architecture"):
        export(str(tmp_path / "sibling"), model.profile(), tmp_path / "out")
    with pytest.raises(ValueError, match="no such file"):
        export(str(model.path), tmp_path / "none.safetensors", tmp_path / "out")
    (model.path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="hidden_size"):
        model.export(tmp_path / "out")
    assert sibling.blocks[0] == "model.layers.0.mlp"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "changed", "words"),
    [
        (INDEX, lambda text: text.replace('"format_version": "1"', '"format_version": "3"'),
         "version '3', wanted 'atomic-moe-export' version 1 or 2"),
        (INDEX, lambda text: text.replace('"format_version": "1"', '"format_version": "2"'),
         "does not say how the rows of layer 0 are encoded; export the model again"),
        (INDEX, lambda text: text[:100], f"holds no readable {INDEX} of an export"),
        ("../model.safetensors", lambda text: "x", "beside the exported ones in atomic_weights/"),
    ],
)  # fmt: skip
def test_incomplete_exports_are_refused(shared, tmp_path, file, changed, words):
    output = shared.export(tmp_path / "out")
    path = output / EXPORT_DIRECTORY / file
    path.write_text(changed(path.read_text() if path.exists() else ""))
    with pytest.raises(ValueError, match=words):
        describe_checkpoint(output)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (lambda t, p: t.pop(f"{p}.up"), "layer 1: .*packed.up is missing; export the model again"),
        (lambda t, p: t[f"{p}.offsets"].add_(1), r"packed.offsets does not count the atoms of"),
        (lambda t, p: t[f"{p}.keep"].logical_not_(), r"packed.offsets does not count the atoms of"),
        (
            lambda t, p: t.update({f"{p}.gate": t[f"{p}.gate"][1:].clone()}),
            r"packed.gate is F32 \[\d+, 128\], wanted floats \[\d+, 128\]",
        ),
    ],
)
def test_packed_rows_that_do_not_fit_together_are_refused(shared, tmp_path, changed, words):
    output = shared.export(tmp_path / "out")

    def apply(tensors):
        changed(tensors, "model.layers.1.mlp.experts.packed")
        return tensors

    change(output / SHARD, apply)
    with pytest.raises(ValueError, match=words):
        describe_checkpoint(output)
