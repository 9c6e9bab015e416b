"""Ordinary checkpoints: the tensors are cut and the numbers updated, or one line says why not.

`tests/serving/test_plain_export.py` reads them with other engines.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.architectures import ARCHITECTURES, NARROW, PER_EXPERT
from tests.checkpoints import make_checkpoint, uniform_profile, write_profile, zero_pruned
from tests.prediction_heads import make_glm4_moe_with_head
from tests.quantized import in_bfloat16, quantize_checkpoint, quantize_gpt_oss
from tests.serving.conftest import masked_transformers_logprobs, transformers_logprobs
from tests.unit.test_exporting import change, contents
from tests.unit.tiny_models import make_model, random_text
from vllm_atomic_moe.cli import app
from vllm_atomic_moe.convert.exporting.export import export
from vllm_atomic_moe.files.checkpoint import describe_checkpoint
from vllm_atomic_moe.files.layouts import expert_tensor
from vllm_atomic_moe.files.profiles import PruningProfile


def plain(model, output, profile=None, experts=6, width=64, **options):
    """Export a profile, by default a uniform one; returns the tensors of the result."""
    if profile is None:
        profile = uniform_profile(describe_checkpoint(model), experts, width)
    path = output.parent / f"{profile.name}.safetensors"
    profile.write(path)
    export(str(model), path, output, plain=True, **options)
    return tensors_of(output)


def tensors_of(directory):
    tensors = {}
    for shard in directory.glob("*.safetensors"):
        tensors |= load_file(shard)
    return tensors


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


def one_by_one(tensors, layer, part):
    """Matrices of one projection of a layer, by expert, whatever the layout."""
    found = {}
    for name, tensor in tensors.items():
        it = expert_tensor(name)
        if it is None or it.layer != layer:
            continue
        if it.part == part and it.expert is not None:
            found[it.expert] = tensor
        elif it.part == part:
            found = dict(enumerate(tensor))
        elif it.part == "gate_up" and part != "down":
            half = 0 if part == "gate" else 1
            found = {e: matrix.chunk(2)[half] for e, matrix in enumerate(tensor)}
    return [found[expert] for expert in range(len(found))]


# --- what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
@pytest.mark.parametrize("architecture", PER_EXPERT)
def test_experts_and_routers_are_cut_and_the_rest_is_copied(tmp_path, architecture, layout):
    model = tmp_path / "model"
    info = make_checkpoint(architecture, model, layout=layout)
    width = 64 if architecture == "glm4_moe" else 24
    profile = uniform_profile(info, 4, width)
    after = plain(model, tmp_path / "out", profile)
    before = load_file(model / "model.safetensors")
    for layer in info.layers:
        kept = profile.routable[layer].nonzero().flatten().tolist()
        for part in ("gate", "up", "down"):
            wanted = one_by_one(before, layer, part)
            found = one_by_one(after, layer, part)
            assert len(found) == 4
            for expert, matrix in zip(kept, found, strict=True):
                atoms = profile.keep[layer][expert]
                whole = wanted[expert]
                assert torch.equal(matrix, whole[:, atoms] if part == "down" else whole[atoms])
        router = f"{info.blocks[layer]}.gate"
        for name in ("weight", "e_score_correction_bias"):
            if f"{router}.{name}" in before:
                wanted = before[f"{router}.{name}"][profile.routable[layer]]
                assert torch.equal(after[f"{router}.{name}"], wanted)
    blocks = tuple(
        f"{block}.{part}." for block in info.blocks.values() for part in ("experts", "gate")
    )
    others = {name for name in before if not name.startswith(blocks)}
    assert others == {name for name in after if not name.startswith(blocks)}
    assert all(torch.equal(before[name], after[name]) for name in others)

    told, original = config_of(tmp_path / "out"), config_of(model)
    changed = {key: value for key, value in told.items() if value != original[key]}
    assert list(told) == list(original)
    assert set(changed.values()) == {4, width} - {64}
    found = describe_checkpoint(tmp_path / "out")
    assert (found.num_experts, found.intermediate_size) == (4, width)


@pytest.mark.parametrize("architecture", NARROW)
def test_transformers_computes_what_it_does_with_pruned_atoms_zeroed(tmp_path, architecture):
    model = tmp_path / "model"
    profile = uniform_profile(make_checkpoint(architecture, model), 8, 32)
    zero_pruned(model, tmp_path / "zeroed", profile)
    plain(model, tmp_path / "out", profile)
    wanted = transformers_logprobs(tmp_path / "zeroed")
    assert (transformers_logprobs(tmp_path / "out") - wanted).abs().max() < 1e-4
    assert (transformers_logprobs(model) - wanted).abs().max() > 0.01, "the test is blind"


@pytest.mark.parametrize(
    "architecture",
    [
        *("qwen2_moe", "olmoe", "mixtral", "glm4_moe", "exaone_moe"),
        *("deepseek_v3", "glm4_moe_lite", "axk1"),
    ],
)
def test_transformers_computes_what_it_does_with_masked_routers(tmp_path, architecture):
    model = tmp_path / "model"
    profile = uniform_profile(make_checkpoint(architecture, model), 6, 64)
    plain(model, tmp_path / "out", profile)
    wanted = masked_transformers_logprobs(model, profile)
    assert (transformers_logprobs(tmp_path / "out") - wanted).abs().max() < 1e-4
    assert (transformers_logprobs(model) - wanted).abs().max() > 0.01, "the test is blind"


REFUSED = {
    "dbrx": "the experts are stacked in one matrix, which --plain does not export",
    "longcat_flash": "wanted a row or a value for each of 8 experts; this router is not exported",
    "deepseek_v4": "names the experts of every token; a model with hash routing keeps all of them",
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_loses_experts(tmp_path, architecture):
    """transformers, if it has the class, loads every tensor of the result."""
    model, it = tmp_path / "model", ARCHITECTURES[architecture]
    profile = uniform_profile(make_checkpoint(architecture, model), 6, 64)
    if refusal := REFUSED.get(architecture):
        with pytest.raises(ValueError, match=refusal):
            plain(model, tmp_path / "out", profile)
        return
    plain(model, tmp_path / "out", profile)
    if it.tensors is None:
        assert transformers_logprobs(tmp_path / "out").isfinite().all()


def test_transposed_tensors_stay_transposed(tmp_path):
    info = make_checkpoint("qwen2_moe", tmp_path / "model", layout="fused")
    wanted = plain(tmp_path / "model", tmp_path / "one", width=24)

    def turn(tensors):
        return {
            name: tensor.transpose(1, 2).contiguous() if ".mlp.experts." in name else tensor
            for name, tensor in tensors.items()
        }

    change(tmp_path / "model" / "model.safetensors", turn)
    found = plain(tmp_path / "model", tmp_path / "two", width=24)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(turn(found)[name], wanted[name]) for name in wanted)
    assert describe_checkpoint(tmp_path / "two").intermediate_size == 24 < info.intermediate_size


def test_a_head_behind_the_decoder_keeps_its_largest_router_rows_of_every_group(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    info = make_glm4_moe_with_head(model)
    block = f"model.layers.{info.layers[-1] + 1}.mlp"
    before, after = load_file(model / "model.safetensors"), plain(model, tmp_path / "out")
    norms = before[f"{block}.gate.weight"].norm(dim=1)
    kept = [
        *norms[:4].topk(3).indices.sort().values,
        *(4 + norms[4:].topk(3).indices).sort().values,
    ]
    for name in ("weight", "e_score_correction_bias"):
        wanted = before[f"{block}.gate.{name}"][torch.stack(kept)]
        assert torch.equal(after[f"{block}.gate.{name}"], wanted)
    for new, old in enumerate(kept):
        name = f"{block}.experts.{new}.up_proj.weight"
        assert torch.equal(after[name], before[f"{block}.experts.{int(old)}.up_proj.weight"])
    assert f"{block}.experts.6.up_proj.weight" not in after


def test_a_head_with_a_name_of_its_own_keeps_its_largest_atoms(tmp_path):
    model = tmp_path / "model"
    make_checkpoint("qwen3_next", model)
    layer, head = "model.layers.1.mlp.", "mtp.layers.0.mlp."

    def with_head(tensors):
        own = {head + n.removeprefix(layer): t + 0 for n, t in tensors.items() if layer in n}
        return tensors | own

    change(model / "model.safetensors", with_head)
    before = load_file(model / "model.safetensors")
    after = plain(model, tmp_path / "out", experts=8, width=32)
    parts = [one_by_one(before, 1, part)[5] for part in ("gate", "up", "down")]
    scores = parts[0].norm(dim=1) * parts[1].norm(dim=1) * parts[2].norm(dim=0)
    atoms = scores.topk(32).indices.sort().values
    found = {name: t for name, t in after.items() if name.startswith(head)}
    assert len(found) == sum(name.startswith(layer) for name in before)
    down = next(t for n, t in found.items() if (it := expert_tensor(n)) and it.part == "down")
    down = down[5] if down.dim() == 3 else found[f"{head}experts.5.down_proj.weight"]
    assert torch.equal(down, parts[2][:, atoms])


@pytest.mark.parametrize("kind", ["fp8-block", "int4", "gpt-oss"])
def test_quantized_experts_are_removed_whole(tmp_path, kind):
    original, model = tmp_path / "original", tmp_path / "model"
    if kind == "gpt-oss":
        make_checkpoint("gpt_oss", original, intermediate_size=96)
        in_bfloat16(original)
        quantize_gpt_oss(original, model)
    else:
        make_checkpoint("qwen3_moe", original, hidden_size=192, moe_intermediate_size=96)
        in_bfloat16(original)
        quantize_checkpoint(original, model, kind)
    info = describe_checkpoint(model)
    profile = uniform_profile(info, 5, 96)
    after = plain(model, tmp_path / "out", profile)
    found = describe_checkpoint(tmp_path / "out")
    assert (found.num_experts, found.row_formats) == (5, info.row_formats)
    before = tensors_of(model)
    assert {name for name in after if ".experts." not in name} == {
        name for name in before if ".experts." not in name
    }
    number = profile.routable[1].nonzero().flatten().tolist()
    checked = 0
    for name, tensor in after.items():
        if name.startswith("model.layers.1.mlp.experts.4."):
            old = name.replace("experts.4.", f"experts.{number[4]}.")
            assert torch.equal(tensor.view(torch.uint8), before[old].view(torch.uint8))
            checked += 1
        elif name.startswith("model.layers.1.mlp.experts.") and kind == "gpt-oss":
            assert torch.equal(tensor[4], before[name][number[4]])
            checked += 1
    assert checked == {"fp8-block": 6, "int4": 9, "gpt-oss": 6}[kind]
    with pytest.raises(
        ValueError, match=r"narrows experts, which are quantized .* 16-bit original"
    ):
        plain(model, tmp_path / "narrow", experts=8, width=32)


def test_files_shards_and_doing_it_again(tmp_path):
    model = tmp_path / "model"
    info = make_checkpoint("qwen3_moe", model)
    write_profile(info, "ragged", model / "atomic_profiles", seed=1)
    (model / "tokenizer.json").write_text("{}")
    plain(model, tmp_path / "out", shard_bytes=100_000)
    files = contents(tmp_path / "out")
    shards = [name for name in files if name.endswith(".safetensors")]
    assert len(shards) > 5
    assert files.keys() - shards == {
        *("config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json")
    }
    index = json.loads(files["model.safetensors.index.json"])
    assert set(index["weight_map"].values()) == set(shards)
    plain(model, tmp_path / "out")
    plain(model, tmp_path / "two")
    assert contents(tmp_path / "out") == contents(tmp_path / "two")
    ragged = model / "atomic_profiles" / "ragged.safetensors"
    export(str(model), ragged, tmp_path / "packed")
    for output, words in (("out", "another model or profile"), ("packed", "not a finished export")):
        with pytest.raises(ValueError, match=words):
            plain(model, tmp_path / output, experts=4)
    with pytest.raises(ValueError, match="not a finished export"):
        export(str(model), ragged, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt, which would be lost"):
        plain(model, tmp_path / "out")


# --- the remedies ---------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("architecture", "remedy", "shape"),
    [
        ("qwen2_moe", "--method heapr --scope expert --align 32 --allow-unseen", (8, 32)),
        ("qwen2_moe", "--method reap --scope layer", (4, 64)),
        ("glm4_moe", "--method reap --scope group", (4, 64)),
        ("glm4_moe", "--method shape --scope group", (4, 64)),
    ],
)
def test_the_options_that_refusals_name_make_such_profiles(tmp_path, architecture, remedy, shape):
    model, statistics = tmp_path / "model", tmp_path / "statistics"
    make_model(architecture, model)
    (tmp_path / "text.txt").write_text(random_text(1200))
    command = ("--data", tmp_path / "text.txt", "--samples", 16, "--seq-len", 64)
    assert run("calibrate", model, *command, "-o", statistics).exit_code == 0
    # 40 %: without --align a width of 38, without --scope group 5 experts of a layer.
    ratio = 0.4 if "align" in remedy else 0.5
    prune = ("prune", statistics, "--ratio", ratio, *remedy.split(), "--name", "p")
    result = run(*prune, "-o", tmp_path)
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    result = run("export", model, tmp_path / "p.safetensors", "-o", out, "--plain", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["experts"], told["width"]) == shape
    result = run("export", model, tmp_path / "p.safetensors", "-o", out, "--plain")
    assert f"{shape[0]} experts of width {shape[1]} a layer" in result.stdout


# --- what is refused ------------------------------------------------------------------------------


def refused(model, profile, words):
    """One line, and nothing is written."""
    output = model.parent / "refused"
    with pytest.raises(ValueError, match=words) as error:
        plain(model, output, profile)
    assert "\n" not in str(error.value)
    assert not output.exists()


def test_profiles_that_are_not_uniform(tmp_path):
    info = make_checkpoint("qwen2_moe", tmp_path / "model")
    ragged = write_profile(info, "ragged", tmp_path, seed=1)
    refused(
        tmp_path / "model",
        ragged,
        r"keeps 0 to 64 atoms of an expert, .* one width; prune with --scope expert .* or whole "
        r"experts: --method reap --scope layer",
    )
    uniform = uniform_profile(info, 6, 64)
    routable = {**uniform.routable, 1: torch.arange(8) > 2}
    keep = {layer: mask[:, None].expand(-1, 64) for layer, mask in routable.items()}
    refused(
        tmp_path / "model",
        PruningProfile("shape-40", keep, routable),
        "leaves 5 to 6 experts of a layer, .* one number; prune .*--method reap --scope layer",
    )
    none = {layer: torch.zeros(8, 64, dtype=torch.bool) for layer in info.layers}
    refused(tmp_path / "model", PruningProfile("none", none), "keeps no atoms")


def test_groups_that_differ(tmp_path):
    info = make_checkpoint("glm4_moe", tmp_path / "model")
    routable = {layer: torch.arange(8) > 1 for layer in info.layers}
    keep = {layer: mask[:, None].expand(-1, 64) for layer, mask in routable.items()}
    refused(
        tmp_path / "model",
        PruningProfile("reap-25", keep, routable),
        r"leaves \[2, 4\] experts in the router's groups of layer 1, .*--method reap --scope group",
    )


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("deepseek_v3", "moe_intermediate_size is also the width of the shared experts"),
        ("glm4_moe", "moe_intermediate_size is also the width of the shared experts"),
        ("llama4", "intermediate_size is also the width of the shared experts"),
        ("jamba", "intermediate_size is also the width of the dense layers"),
    ],
)
def test_widths_that_config_json_cannot_express(tmp_path, architecture, words):
    info = make_checkpoint(architecture, tmp_path / "model")
    scope = "group" if info.groups else "layer"
    words = f"{words}.*; prune whole experts: --method reap --scope {scope}"
    refused(tmp_path / "model", uniform_profile(info, 8, 32), words)


def test_models_that_are_not_understood(tmp_path):
    model = tmp_path / "model"
    info = make_checkpoint("qwen3_moe", model)
    weights, profile = model / "model.safetensors", uniform_profile(info, 6, 64)
    profile = PruningProfile("uniform", profile.keep, profile.routable)
    original, told = weights.read_bytes(), config_of(model)

    def tell(**changes):
        (model / "config.json").write_text(json.dumps({**told, **changes}))

    tell(**dict.fromkeys([key for key, value in told.items() if value == 8], None))
    refused(model, profile, "no known key gives the number of experts, 8")
    tell(moe_intermediate_size=None)
    narrow = uniform_profile(info, 8, 32)
    refused(model, narrow, "no known key gives the width of routed experts, 64")
    tell()
    for name, tensor, words in (
        (
            "experts.1.gate_proj.bias",
            torch.ones(64),
            "is not a known part of an expert's projection",
        ),
        ("gate.other", torch.ones(8, dtype=torch.int64), "I64; routers of plain floats"),
        ("gate.rank", torch.ones(3, 5), r"is \[3, 5\], wanted a row or a value for each of 8"),
    ):
        save_file({**load_file(weights), f"model.layers.1.mlp.{name}": tensor}, weights)
        refused(model, profile, words)
        weights.write_bytes(original)
    export(str(model), write(profile, tmp_path), tmp_path / "packed")
    refused(tmp_path / "packed", profile, "holds packed rows of an earlier export")


def write(profile, directory):
    path = directory / f"{profile.name}.safetensors"
    profile.write(path)
    return path


def test_quantization_that_names_experts_by_number(tmp_path):
    original, model = tmp_path / "original", tmp_path / "model"
    make_checkpoint("qwen3_moe", original, hidden_size=192, moe_intermediate_size=96)
    in_bfloat16(original)
    quantize_checkpoint(original, model, "int4")
    config = config_of(model)
    config["quantization_config"]["ignore"] += ["model.layers.0.mlp.shared.experts.3.up_proj"]
    (model / "config.json").write_text(json.dumps(config))
    profile = uniform_profile(describe_checkpoint(model), 6, 96)
    refused(model, profile, r"quantization settings name experts\.3, and experts get other numbers")
