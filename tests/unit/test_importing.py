"""`atomic-moe import`: every format, and every refusal with the place it names."""

import dataclasses
import hashlib
import json
import math
import pickle
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.checkpoints import make_checkpoint
from tests.import_examples import whole, write_examples
from tests.unit.test_cli import refused, run
from vllm_atomic_moe.convert.importing import import_profile, known_importers
from vllm_atomic_moe.files.checkpoint import CheckpointInfo
from vllm_atomic_moe.files.profiles import PruningProfile
from vllm_atomic_moe.files.router import RouterIdentity

EXAMPLES = (
    "pruned-experts",
    "post-topk-drop",
    "shape",
    "ranked",
    "heapr",
    "mask",
    "expert-mask",
)
# A model on paper: layer 0 dense, as the first layers of many are.
MODEL = CheckpointInfo("PaperForCausalLM", 4, 2, 3, 8, (1, 2), RouterIdentity("0" * 64))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    return directory, make_checkpoint("glm4_moe", directory, n_group=1, topk_group=1)


@pytest.fixture(scope="module")
def examples(checkpoint, tmp_path_factory):
    return write_examples(checkpoint[1], tmp_path_factory.mktemp("examples"))


def same(left, right):
    assert list(left) == sorted(right)
    for layer in left:
        torch.testing.assert_close(left[layer], right[layer])


def refusal(format_name, path, ratio=None, model=MODEL):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        import_profile(format_name, path, model, ratio=ratio, name="x")
    line = str(caught.value)
    assert "\n" not in line
    assert str(path) in line
    return line


def json_file(tmp_path, value, name="file.json"):
    path = tmp_path / name
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def mask_file(tmp_path, tensors, metadata=None):
    path = tmp_path / "file.safetensors"
    save_file(tensors, path, metadata=metadata)
    return path


def test_examples_are_of_every_format(examples):
    assert {example.format for example in examples.values()} == set(known_importers().entries)
    assert set(examples) == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_format_through_the_command_line(name, checkpoint, examples, tmp_path):
    directory, model = checkpoint
    example = examples[name]
    arguments = ("import", *example.arguments(), "--model", directory, "-o", tmp_path)
    result = run(*arguments, "--name", "mine")
    assert result.exit_code == 0, result.output
    path = tmp_path / "mine.safetensors"
    assert result.stdout.splitlines()[-1] == f"wrote {path}"
    profile = PruningProfile.read(path)
    same(profile.keep, example.keep)
    same(profile.routable, example.routable)
    assert profile.check(model) == []
    assert profile.model == model.identity()
    assert json.loads(profile.metadata["source"]) == {
        "format": example.format,
        "file": example.path.name,
        "sha256": hashlib.sha256(example.path.read_bytes()).hexdigest(),
    }
    assert profile.metadata["created_by"].startswith("vllm-atomic-moe ")
    assert float(profile.metadata["kept"]) == profile.kept
    assert profile.metadata.get("ratio") == (None if example.ratio is None else str(example.ratio))
    methods = {"shape": "shape", "heapr": "heapr"}
    assert profile.metadata["method"] == methods.get(example.format, "imported")
    assert "calibration" not in profile.metadata


def test_json_says_what_the_table_says(checkpoint, examples, tmp_path):
    example = examples["ranked"]
    arguments = ("--model", checkpoint[0], "-o", tmp_path, "--json")
    result = run("import", *example.arguments(), *arguments)
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["name"] == "ranked-50"
    assert printed["file"] == str(tmp_path / "ranked-50.safetensors")
    assert (printed["format"], printed["method"]) == ("ranked", "imported")
    assert printed["excluded_from_routing"] == 4 * len(checkpoint[1].layers)
    assert printed["kept"] == 0.5
    assert printed["widths"]["zero_width_experts"] == 4 * len(checkpoint[1].layers)


def test_experts_that_a_router_with_groups_needs_are_not_given_up(checkpoint, examples, tmp_path):
    directory = tmp_path / "model"
    info = make_checkpoint("glm4_moe", directory)
    assert info.groups is not None
    line = refused(
        "import", "shape", examples["shape"].path, "--model", directory, "-o", tmp_path / "out"
    )
    assert "experts in the router's groups, which it scores by their two best" in line
    assert not (tmp_path / "out").exists()


def test_the_command_line_refuses_in_one_line_and_writes_nothing(checkpoint, examples, tmp_path):
    directory, _ = checkpoint
    shape, heapr = examples["shape"].path, examples["heapr"].path
    end = ("--model", directory, "-o", tmp_path / "out")
    assert "format 'magic' is not known; wanted one of heapr, mask, pruned-experts" in refused(
        "import", "magic", shape, *end
    )
    assert "give --ratio" in refused("import", "heapr", heapr, *end)
    assert "--ratio 0.5 changes nothing" in refused("import", "shape", shape, "--ratio", 0.5, *end)
    assert "25 percent is 0.25" in refused("import", "heapr", heapr, "--ratio", 25, *end)
    assert "no such file" in refused("import", "shape", tmp_path / "none", *end)
    assert "no such file" in refused("import", "shape", tmp_path, *end)
    assert "is not allowed" in refused("import", "shape", shape, "--name", "No Good", *end)
    assert "reserved" in refused("import", "shape", shape, "--name", "dense", *end)
    assert "neither a directory nor" in refused(
        "import", "shape", shape, "--model", tmp_path / "no/model/there", "-o", tmp_path / "out"
    )
    assert run("import", "shape", shape, "-o", tmp_path).exit_code == 2
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("Sk_Qwen3 (wiki)", "sk_qwen3-wiki"),
        ("..v1", "v1"),
        ("a" * 80, "a" * 64),
        ("gsm8k_25_rate0.8", "gsm8k_25_rate0.8"),
    ],
)
def test_the_name_comes_from_the_file(stem, name, tmp_path):
    path = json_file(tmp_path, {"1": [0, 1]}, f"{stem}.json")
    assert import_profile("shape", path, MODEL)[0].name == name


def test_the_name_has_the_percentage_if_there_is_a_ratio(tmp_path):
    path = json_file(tmp_path, '{"1": [0,1,2,3]}\n{"2": [0,1,2,3]}', f"{'r' * 70}.jsonl")
    profile, _ = import_profile("ranked", path, MODEL, ratio=0.29)
    assert profile.name == "r" * 61 + "-29"


@pytest.mark.parametrize("stem", ["模型", "dense", "___"])
def test_a_stem_that_makes_no_name_is_refused(stem, tmp_path):
    path = json_file(tmp_path, {"1": [0, 1]}, f"{stem}.json")
    with pytest.raises(ValueError, match="give --name NAME"):
        import_profile("shape", path, MODEL)


# Whole-expert lists.

selections = st.fixed_dictionaries(
    {},
    optional={
        layer: st.lists(st.integers(0, 3), min_size=2, max_size=4, unique=True)
        for layer in MODEL.layers
    },
)


@given(
    kept=selections, style=st.sampled_from(["{}", "layer_{}", "layers.{}", "model.layers.{}.mlp"])
)
@settings(max_examples=40)
def test_whole_expert_lists_round_trip(kept, style, tmp_path_factory):
    directory = tmp_path_factory.mktemp("lists")
    keep, routable = whole(kept, MODEL)
    pruned = [
        [layer, expert]
        for layer, experts in kept.items()
        for expert in range(4)
        if expert not in experts
    ]
    pairs = json_file(directory, {"version": 1, "pruned_experts": pruned}, "pairs.json")
    profile, _ = import_profile("pruned-experts", pairs, MODEL)
    same(profile.keep, keep)
    same(profile.routable, routable)
    if kept:
        named = json_file(directory, {style.format(k): v for k, v in kept.items()}, "named.json")
        profile, _ = import_profile("shape", named, MODEL)
        same(profile.keep, keep)
        same(profile.routable, routable)


@given(
    rankings=st.tuples(*[st.permutations(range(4)) for _ in MODEL.layers]),
    ratio=st.sampled_from([0, 0.1, 0.25, 0.3, 0.5]),
)
@settings(max_examples=30)
def test_rankings_keep_the_first_of_every_layer(rankings, ratio, tmp_path_factory):
    lines = [json.dumps({str(k): v}) for k, v in zip(MODEL.layers, rankings, strict=True)]
    path = json_file(tmp_path_factory.mktemp("ranked"), "\n\n".join(lines), "r.jsonl")
    profile, _ = import_profile("ranked", path, MODEL, ratio=ratio, name="r")
    count = math.floor(4 * (1 - Fraction(str(ratio))))
    keep, routable = whole(
        {k: v[:count] for k, v in zip(MODEL.layers, rankings, strict=True)}, MODEL
    )
    same(profile.keep, keep)
    same(profile.routable, routable)


def test_the_number_that_stays_is_counted_in_decimals(tmp_path):
    model = dataclasses.replace(MODEL, num_experts=10, experts_per_token=1, layers=(0,))
    path = json_file(tmp_path, '{"0": [4, 9]}', "r.jsonl")
    profile, _ = import_profile("ranked", path, model, ratio=0.9)
    assert profile.routable[0].nonzero().flatten().tolist() == [4]


def test_dropping_after_top_k_leaves_the_router_alone(tmp_path):
    value = {"version": 2, "pruned_experts": [[1, 0], [1, 1], [1, 2]]}
    path = json_file(tmp_path, value | {"routing_mode": "post_topk_drop"})
    profile, _ = import_profile("pruned-experts", path, MODEL)
    assert not profile.routable
    assert profile.widths(1).tolist() == [0, 0, 0, 3]
    path = json_file(tmp_path, value | {"routing_mode": "pre_topk_mask"})
    assert "layers.1.routable leaves 1 experts, a token uses 2" in refusal("pruned-experts", path)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("[1", "not a JSON object"),
        ("[1]", "[1], wanted a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        ('{"pruned_experts": [], "pruned_experts": []}', "key 'pruned_experts' occurs twice"),
        ({}, "`pruned_experts` is missing"),
        ({"pruned_experts": {"1": [0]}}, "`pruned_experts` is {'1': [0]}"),
        ({"version": 3, "pruned_experts": []}, "`version` is 3, wanted 1 or 2"),
        ({"version": True, "pruned_experts": []}, "`version` is True"),
        ({"version": 2, "pruned_experts": []}, "`routing_mode` is missing"),
        (
            {"version": 2, "routing_mode": "renormalize", "pruned_experts": []},
            "`routing_mode` is 'renormalize', version 2 wants pre_topk_mask or post_topk_drop",
        ),
        (
            {"version": 1, "routing_mode": "post_topk_drop", "pruned_experts": []},
            "version 1 wants pre_topk_mask",
        ),
        ({"pruned_experts": [[1, 0], [1]]}, "pruned_experts[1]: [1], wanted a pair"),
        ({"pruned_experts": [[1, 4]]}, "[0]: expert 4, wanted an integer from 0 to 3"),
        ({"pruned_experts": [[1, -1]]}, "pruned_experts[0]: expert -1"),
        ({"pruned_experts": [[1, True]]}, "pruned_experts[0]: expert True"),
        ({"pruned_experts": [[1, "2"]]}, "pruned_experts[0]: expert '2'"),
        (
            {"pruned_experts": [[1, 0], [0, 0]]},
            "pruned_experts[1]: layer 0 is not among the model's MoE layers [1, 2]",
        ),
        ({"pruned_experts": [["x", 0]]}, "pruned_experts[0]: 'x' names no layer"),
        ({"pruned_experts": [[1, 0], [2, 0], [1, 0]]}, "[2]: [1, 0] occurs twice, first at [0]"),
        ({"pruned_experts": [[2, 0], [2, 1], [2, 2]]}, "layers.2.routable leaves 1 experts"),
    ],
)  # fmt: skip
def test_pruned_experts_refusals(value, words, tmp_path):
    assert words in refusal("pruned-experts", json_file(tmp_path, value))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({}, "names no layer"),
        ({"_metadata": {}}, "names no layer"),
        ({"1": [0, 1], "_metadata": 3}, "`_metadata` is 3"),
        ({"3": [0, 1]}, "layer 3 is not among"),
        ({"first": [0, 1]}, "'first' names no layer"),
        ({"layers.1.layers.2": [0, 1]}, "names layers [1, 2]"),
        ({"1": [0, 1], "layer_1": [0, 1]}, "keys '1' and 'layer_1' both name layer 1"),
        ('{"1": [0, 1], "1": [0, 2]}', "key '1' occurs twice"),
        ({"1": {"0": 1}}, "'1': {'0': 1}, wanted a list of expert ids"),
        ({"1": [0, 9]}, "'1'[1]: expert 9, wanted an integer from 0 to 3"),
        ({"1": [0, 1.0]}, "'1'[1]: expert 1.0"),
        ({"1": [0, 1, 0]}, "'1'[2]: expert 0 occurs twice, first at [0]"),
        ({"1": [0]}, "layers.1.routable leaves 1 experts, a token uses 2"),
        ({"1": []}, "layers.1.routable leaves 0 experts"),
        (
            {"1": [0, 1], "_metadata": {"selected_experts": 4}},
            "`_metadata` says selected_experts 4, its lists and the model give 2",
        ),
        (
            {"1": [0, 1], "_metadata": {"total_experts": 64}},
            "`_metadata` says total_experts 64, its lists and the model give 4",
        ),
    ],
)
def test_shape_refusals(value, words, tmp_path):
    assert words in refusal("shape", json_file(tmp_path, value))


@pytest.mark.parametrize(
    ("notes", "method"),
    [
        ({}, "shape"),
        ({"method": "shapley", "target_rate": 0.8}, "shape"),
        ({"method": "easyep"}, "easyep"),
        ({"method": ["x"]}, "shape"),
    ],
)
def test_a_shape_file_says_its_method(notes, method, tmp_path):
    path = json_file(tmp_path, {"1": [0, 1], "_note": "by hand", "_metadata": notes})
    assert import_profile("shape", path, MODEL)[0].metadata["method"] == method


def test_text_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b'{"1": "\xff"}')
    for kind, ratio in (("shape", None), ("pruned-experts", None), ("ranked", 0.5)):
        assert "not a UTF-8 text file (byte 7)" in refusal(kind, path, ratio)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "says nothing about layers [1, 2]"),
        ('{"1": [0, 1, 2, 3]}', "says nothing about layers [2]"),
        ('{"1": [0, 1]}\n{"2": [0]}', "line 2: layer 2 ranks 1 experts, --ratio 0.5 keeps 2 of 4"),
        ('{"1": [0, 1]}\n\n{"2": [0, 1}', "line 3: not a JSON object"),
        ('{"1": [0, 1]}\n[0]', "line 2: [0], wanted a JSON object"),
        ('{"1": [0, 1]}\n{"1": [0, 1]}', "line 2: layer 1 is ranked already, in line 1"),
        ('{"1": [0, 1]}\n{"0": [0, 1]}', "line 2: layer 0 is not among"),
        ('{"1": [0, 1]}\n{"2": [0, 4]}', "line 2, layer 2[1]: expert 4"),
        ('{"1": [0, 0]}', "line 1, layer 1[1]: expert 0 occurs twice, first at [0]"),
        ('{"1": [0.5, 0.25]}', "line 1, layer 1[0]: expert 0.5"),
        ('{"1": 7}', "line 1, layer 1: 7, wanted a list"),
    ],
)
def test_ranked_refusals(text, words, tmp_path):
    assert words in refusal("ranked", json_file(tmp_path, text, "r.jsonl"), 0.5)


def test_a_ratio_that_leaves_too_few_is_refused(tmp_path):
    path = json_file(tmp_path, '{"1": [0, 1]}\n{"2": [0, 1]}', "r.jsonl")
    assert "leaves 1 experts, a token uses 2" in refusal("ranked", path, 0.75)


# HEAPr's scores.


def score_file(tmp_path, value):
    path = tmp_path / "sk.pt"
    torch.save(value, path)
    return path


def scores(**changes):
    generator = torch.Generator().manual_seed(1)
    value = {layer: torch.rand(12, generator=generator) for layer in MODEL.layers}
    return value | {int(key[1:]): tensor for key, tensor in changes.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_heapr_scores_of_other_dtypes_and_keys(dtype, tmp_path):
    whole_numbers = torch.arange(24).reshape(2, 4, 3)
    value = {f"layer_{k}": whole_numbers[k - 1].to(dtype) for k in MODEL.layers}
    profile, warnings = import_profile("heapr", score_file(tmp_path, value), MODEL, ratio=0.25)
    assert warnings == []
    assert profile.name == "sk-25"
    assert not profile.keep[1].flatten()[:6].any()
    assert profile.keep[1].flatten()[6:].all()
    assert profile.keep[2].all()


def test_experts_that_calibration_never_reached_go_first_with_a_warning(tmp_path):
    unseen = torch.cat([torch.rand(3), torch.full((3,), -1.0), torch.rand(6)])
    path = score_file(tmp_path, scores(_2=unseen))
    profile, (warning,) = import_profile("heapr", path, MODEL, ratio=3 / 24)
    assert warning.startswith("layer 2: experts [1] score -1, no calibration token reached them")
    assert profile.widths(2).tolist() == [3, 0, 3, 3]
    assert profile.widths(1).tolist() == [3, 3, 3, 3]


class Code:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.zeros(3), "holds Tensor, wanted a dictionary"),
        ({1: torch.zeros(12)}, "says nothing about layers [2]"),
        ({0: torch.zeros(12)}, "layer 0 is not among"),
        ({True: torch.zeros(12)}, "True names no layer"),
        ({(1,): torch.zeros(12)}, "(1,) names no layer"),
        ({1: torch.zeros(12), "1": torch.zeros(12)}, "keys 1 and '1' both name layer 1"),
        (scores(_2=torch.zeros(11)), "layer 2: float32 [11], wanted floating point [12]"),
        (scores(_2=torch.zeros(3, 4)), "layer 2: float32 [3, 4]"),
        (scores(_2=torch.zeros(12, dtype=torch.int64)), "layer 2: int64 [12]"),
        (scores(_2=torch.zeros(12).to_sparse()), "layer 2: Tensor, wanted a dense tensor of 12"),
        (scores(_2=[0.0] * 12), "layer 2: list, wanted a dense tensor"),
        (
            scores(_1=torch.tensor([0.0] * 7 + [math.nan] + [0.0] * 4)),
            "layer 1: expert 2 has a score nan, wanted finite",
        ),
        (
            scores(_2=torch.tensor([0.0] * 3 + [1e300] + [0.0] * 8, dtype=torch.float64)),
            "layer 2: expert 1 has a score 1e+300, wanted finite float32",
        ),
    ],
)
def test_heapr_refusals(value, words, tmp_path):
    assert words in refusal("heapr", score_file(tmp_path, value), 0.5)


def test_heapr_files_that_are_code_or_nothing_are_refused(tmp_path, capsys):
    path = tmp_path / "sk.pt"
    torch.save({1: Code()}, path)
    assert "loads without running code" in refusal("heapr", path, 0.5)
    path.write_bytes(pickle.dumps({1: Code()}))
    assert "loads without running code" in refusal("heapr", path, 0.5)
    for content in (b"", b"not a pickle", b"PK\x03\x04 not a zip"):
        path.write_bytes(content)
        assert "loads without running code" in refusal("heapr", path, 0.5)
    assert "this must not run" not in capsys.readouterr().out


# Masks.


def atoms(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {layer: torch.rand(4, 3, generator=generator) < 0.5 for layer in MODEL.layers}


@pytest.mark.parametrize(
    "name", ["{}", "layers.{}.mask", "layer_{}_mask", "model.layers.{}.mlp.experts.mask"]
)
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
@pytest.mark.parametrize("flat", [False, True])
def test_masks_of_atoms(name, dtype, flat, tmp_path):
    masks = atoms()
    tensors = {name.format(k): (v.flatten() if flat else v).to(dtype) for k, v in masks.items()}
    profile, _ = import_profile("mask", mask_file(tmp_path, tensors), MODEL)
    same(profile.keep, masks)
    assert not profile.routable


def test_masks_by_expert(tmp_path):
    masks = atoms()
    tensors = {
        f"model.layers.{layer}.mlp.experts.{expert}.mask": mask[expert].clone()
        for layer, mask in masks.items()
        for expert in range(4)
    }
    profile, _ = import_profile("mask", mask_file(tmp_path, tensors), MODEL)
    same(profile.keep, masks)
    del tensors["model.layers.2.mlp.experts.1.mask"]
    path = mask_file(tmp_path, tensors)
    assert "no mask of layer 2, expert 1" in refusal("mask", path)


def test_masks_of_whole_experts_leave_the_router(tmp_path):
    tensors = {"1": torch.tensor([True, False, True, True]), "2": torch.ones(4, dtype=torch.bool)}
    profile, _ = import_profile("mask", mask_file(tmp_path, tensors), MODEL)
    same(profile.routable, {1: tensors["1"]})
    assert profile.widths(1).tolist() == [3, 0, 3, 3]
    assert profile.widths(2).tolist() == [3, 3, 3, 3]


FULL = torch.ones(4, 3, dtype=torch.bool)
ROW = torch.ones(3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "says nothing about layers [1, 2]"),
        ({"layers.1.mask": FULL}, "says nothing about layers [2]"),
        ({"mask": FULL}, "'mask' names no layer"),
        ({"layers.1.layers.2.mask": FULL}, "names layers [1, 2]"),
        ({"layers.0.mask": FULL}, "layer 0 is not among"),
        ({"layers.1.experts.7.mask": ROW}, "'layers.1.experts.7.mask': expert 7"),
        ({"layers.1.experts.1.experts.2": ROW}, "names experts 1, 2"),
        ({"layers.1.pruned": FULL}, "'layers.1.pruned' says what goes"),
        ({"layers.1.prune_mask": FULL}, "'layers.1.prune_mask' says what goes"),
        ({"layers.1.to_drop": FULL}, "'layers.1.to_drop' says what goes"),
        ({"layers.1.zeroed": FULL}, "'layers.1.zeroed' says what goes"),
        ({"layers.1.masked_out": FULL}, "'layers.1.masked_out' says what goes"),
        (
            {"layers.1.keep": FULL, "layers.1.mask": FULL},
            "'layers.1.keep' and 'layers.1.mask' are both masks of layer 1",
        ),
        (
            {"layers.1.experts.2.up": ROW, "layers.1.experts.2.down": ROW},
            "are both masks of layer 1, expert 2",
        ),
        (
            {"layers.1.mask": FULL, "layers.1.experts.2.mask": ROW, "layers.2.mask": FULL},
            "'layers.1.mask' is a mask of layer 1, 'layers.1.experts.2.mask' of one of its experts",
        ),
        ({"1": FULL, "2": FULL.T.contiguous()}, "'2' is [3, 4], wanted [4, 3], [12] or [4]"),
        ({"1": FULL, "2": FULL.float()}, "'2' is float32, wanted bool, or uint8 of 0 and 1"),
        ({"1": FULL, "2": FULL.to(torch.uint8) * 255}, "'2' holds 255, wanted 0 and 1 only"),
        (
            {"1": FULL, **{f"layers.2.experts.{e}": ROW[:2].clone() for e in range(4)}},
            "'layers.2.experts.0' is [2], wanted [3]",
        ),
        (
            {"1": FULL, "2": torch.tensor([True, False, False, False])},
            "layers.2.routable leaves 1 experts, a token uses 2",
        ),
    ],
)
def test_mask_refusals(tensors, words, tmp_path):
    path = mask_file(tmp_path, {name: tensor.clone() for name, tensor in tensors.items()})
    assert words in refusal("mask", path)


def test_a_profile_needs_no_import_and_a_broken_file_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    PruningProfile("x", atoms()).write(path)
    assert "is a profile already" in refusal("mask", path)
    path.write_bytes(path.read_bytes()[:-3])
    assert "not a complete safetensors file" in refusal("mask", path)
