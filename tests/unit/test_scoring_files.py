"""Methods, score files, and profiles from statistics."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.test_calibration_statistics import CALIBRATION, MODEL, make_sums, rewrite
from vllm_atomic_moe.files.profiles import PruningProfile
from vllm_atomic_moe.files.statistics import Statistics
from vllm_atomic_moe.scoring import known_methods, method_options, score_layers, selection_options
from vllm_atomic_moe.scoring.methods.random import score_random
from vllm_atomic_moe.scoring.pruning import (
    load_scores,
    make_profile,
    score_statistics,
    unknown_groups,
)
from vllm_atomic_moe.scoring.score_file import Scores


@pytest.fixture
def statistics():
    return Statistics(MODEL, CALIBRATION, make_sums())


@pytest.fixture
def stats_path(statistics, tmp_path):
    statistics.write(tmp_path / "stats.safetensors")
    return tmp_path / "stats.safetensors"


@pytest.fixture
def scores_path(statistics, tmp_path):
    score_statistics(statistics, "random", {"seed": 3}).write(tmp_path / "scores.safetensors")
    return tmp_path / "scores.safetensors"


@pytest.mark.parametrize("method", known_methods().entries)
def test_every_method_scores_every_layer_and_leaves_the_sums_alone(method):
    sums = make_sums()
    scores = score_layers(method, sums, method_options(method, {}))
    for layer, sums_before in make_sums().items():
        before = sums_before.tensors()
        assert scores[layer].atoms.dtype == torch.float32
        assert scores[layer].atoms.shape == (4, 6)
        after = sums[layer].tensors()
        assert all(torch.equal(after[name], before[name]) for name in before)


def test_random_scores_depend_on_seed_and_layer_only():
    sums = make_sums()
    one = score_random(sums[1], layer=1, seed=0).atoms
    assert torch.equal(one, score_random(sums[3], layer=1, seed=0).atoms)
    assert not torch.equal(one, score_random(sums[1], layer=2, seed=0).atoms)
    assert not torch.equal(one, score_random(sums[1], layer=1, seed=1).atoms)
    assert 0 <= one.min() < one.max() < 1


def test_unknown_methods_and_options_are_refused():
    with pytest.raises(ValueError, match="method 'magic' is not known; wanted one of camera"):
        method_options("magic", {})
    with pytest.raises(ValueError, match="method 'heapr' has no option --seed"):
        method_options("heapr", {"seed": 1})
    assert method_options("heapr", {"seed": None, "allow_unseen": True}) == {
        "weight_by_frequency": False,
        "allow_unseen": True,
    }
    with pytest.raises(ValueError, match="method 'shape' has no option --allow-unseen"):
        method_options("shape", {"allow_unseen": True})
    with pytest.raises(ValueError, match="method 'reap' has no option --min-width"):
        selection_options("reap", {"min_width": 1})
    assert selection_options("of-others", {"align": 8})["align"] == 8
    assert method_options("random", {"seed": None}) == {"seed": 0}


def test_a_score_file_comes_back_equal(statistics, scores_path):
    read, made = Scores.read(scores_path), score_statistics(statistics, "random", {"seed": 3})
    assert (read.method, read.options) == ("random", {"seed": 3})
    assert read.model == MODEL
    assert read.calibration == CALIBRATION
    assert all(torch.equal(read.layers[layer].atoms, made.layers[layer].atoms) for layer in (1, 3))


def test_infinite_scores_survive_the_file(tmp_path):
    sums = make_sums()
    sums[1].count[:, 2] = 0
    scores = score_statistics(Statistics(MODEL, CALIBRATION, sums), "heapr", {})
    scores.write(tmp_path / "scores.safetensors")
    read = Scores.read(tmp_path / "scores.safetensors")
    assert read.layers[1].atoms[2].isposinf().all()
    assert read.layers[1].atoms.isfinite().sum() == 18


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({}, {"format": "atomic-moe-statistics"}, "wanted 'atomic-moe-scores'"),
        ({}, {"format_version": "9"}, "`format_version` is '9'"),
        ({}, {"method": None}, "metadata `method` is missing"),
        ({}, {"method_options": "3"}, "`method_options` is '3', wanted a JSON object"),
        ({}, {"model": json.dumps({**MODEL, "layers": [1, 2]})}, r"holds layers \[1, 3\]"),
        ({"layers.1.score": torch.ones(4, 6).double()}, {}, "layers.1.score is float64"),
        ({"layers.1.score": torch.full((4, 6), torch.nan)}, {}, "layers.1.score holds NaN"),
        ({"layers.1.score": None}, {}, r"holds layers \[3\]"),
        ({"layers.1.keep": torch.ones(4, 6)}, {}, "unexpected tensor 'layers.1.keep'"),
    ],
)
def test_wrong_score_files_are_refused(tensors, metadata, message, scores_path):
    rewrite(scores_path, tensors, **metadata)
    with pytest.raises(ValueError, match=message) as refusal:
        Scores.read(scores_path)
    assert str(refusal.value).count(str(scores_path)) == 1


def test_statistics_need_a_method_and_scores_carry_theirs(stats_path, scores_path):
    with pytest.raises(ValueError, match="give --method, one of camera, frequency, heapr, mag"):
        load_scores(stats_path, None, {})
    assert load_scores(scores_path, None, {}).method == "random"
    assert load_scores(scores_path, "random", {}).method == "random"
    with pytest.raises(ValueError, match="holds random scores, --method says heapr"):
        load_scores(scores_path, "heapr", {})
    for given, domains in (({"seed": 0}, None), ({}, ["a"])):
        with pytest.raises(ValueError, match=r"--(seed|domain) changes nothing"):
            load_scores(scores_path, None, given, domains)


def test_other_files_are_refused(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="`format` is None, wanted 'atomic-moe-statistics' or"):
        load_scores(tmp_path / "x.safetensors", "heapr", {})


def test_a_profile_says_where_it_comes_from(stats_path, scores_path, tmp_path):
    profile = make_profile(load_scores(stats_path, "heapr", {}), 0.25)
    assert profile.name == "heapr-25"
    assert profile.kept == 0.75
    assert profile.model == MODEL
    assert json.loads(profile.metadata["calibration"]) == CALIBRATION
    assert profile.metadata["method"] == "heapr"
    assert float(profile.metadata["ratio"]) == 0.25
    assert float(profile.metadata["kept"]) == profile.kept
    assert profile.metadata["created_by"].startswith("vllm-atomic-moe ")
    assert json.loads(profile.metadata["method_options"]) == method_options("heapr", {})
    assert json.loads(profile.metadata["selection"]) == {
        "scope": "global", "align": 1, "min_width": 0
    }  # fmt: skip
    profile.write(tmp_path / "heapr-25.safetensors")
    read = PruningProfile.read(tmp_path / "heapr-25.safetensors")
    assert all(torch.equal(read.keep[layer], profile.keep[layer]) for layer in (1, 3))

    seeded = make_profile(load_scores(scores_path, None, {}), 0.125, "mine")
    assert seeded.name == "mine"
    assert json.loads(seeded.metadata["method_options"]) == {"seed": 3}


def test_whole_expert_methods_write_what_is_routable(stats_path, tmp_path):
    for method in ("shape", "reap"):
        profile = make_profile(load_scores(stats_path, method, {}), 0.25)
        profile.write(tmp_path / "whole.safetensors")
        read = PruningProfile.read(tmp_path / "whole.safetensors")
        assert read.kept == 0.75
        for layer, mask in read.keep.items():
            assert torch.equal(mask.all(dim=1), read.routable[layer])
            assert int(read.routable[layer].sum()) >= CALIBRATION["experts_per_token"]


def test_whole_expert_scores_without_k_are_refused(stats_path):
    scores = load_scores(stats_path, "shape", {})
    without = {k: v for k, v in scores.calibration.items() if k != "experts_per_token"}
    for calibration in (without, {**without, "experts_per_token": ["a"]}):
        with pytest.raises(ValueError, match=r"`experts_per_token` is .* shape must leave"):
            make_profile(dataclasses.replace(scores, calibration=calibration), 0.25)


@pytest.mark.parametrize(
    "told",
    [
        {"number": 0, "chosen": 1, "biased": False},
        {"number": 2, "chosen": 0, "biased": False},
        {"number": "2", "chosen": 1, "biased": False},
        {"number": 3, "chosen": 1, "biased": False},
        {"number": 2, "chosen": 1},
        [2, 1],
        2,
    ],
    ids=str,
)
def test_groups_that_no_calibration_writes_are_refused(stats_path, told):
    scores = load_scores(stats_path, "reap", {})
    calibration = {**scores.calibration, "expert_groups": told}
    with pytest.raises(ValueError, match=r"`expert_groups` is .*, which no calibration writes"):
        make_profile(dataclasses.replace(scores, calibration=calibration), 0.25)


def test_statistics_that_do_not_tell_groups(stats_path):
    """As in version 0.1; profiles that do not mask routers need no groups."""
    for method, warned in (("reap", True), ("shape", True), ("heapr", False)):
        scores = load_scores(stats_path, method, {})
        profile = make_profile(scores, 0.25)
        warning = unknown_groups(scores, profile)
        assert (warning is not None) == warned
        assert not warned or (len(warning) < 290 and "`atomic-moe check`" in warning)
        told = {**scores.calibration, "expert_groups": None}
        assert unknown_groups(dataclasses.replace(scores, calibration=told), profile) is None


def test_tenp_scores_go_through_a_file(statistics, tmp_path):
    scores = score_statistics(statistics, "tenp", {})
    scores.write(tmp_path / "scores.safetensors")
    assert {"layers.1.expert_score", "layers.1.score"} <= set(
        load_file(tmp_path / "scores.safetensors")
    )
    one, two = (
        make_profile(scores, 0.25),
        make_profile(load_scores(tmp_path / "scores.safetensors", None, {}), 0.25),
    )
    assert all(torch.equal(one.keep[layer], two.keep[layer]) for layer in one.keep)
    rewrite(tmp_path / "scores.safetensors", {"layers.1.expert_score": None})
    with pytest.raises(ValueError, match=r"holds layers \[3\]"):
        Scores.read(tmp_path / "scores.safetensors")


def test_a_profile_for_one_domain_says_so(stats_path):
    profile = make_profile(load_scores(stats_path, "heapr", {}, ["b"]), 0.25)
    assert json.loads(profile.metadata["calibration"])["domains"] == ["b"]
    other = make_profile(load_scores(stats_path, "heapr", {}), 0.25)
    assert any(not torch.equal(profile.keep[layer], other.keep[layer]) for layer in (1, 3))


@pytest.mark.parametrize(
    ("ratio", "name"), [(0.29, "heapr-29"), (0.125, "heapr-12.5"), (0.0, "heapr-0")]
)
def test_default_names(ratio, name, stats_path):
    assert make_profile(load_scores(stats_path, "heapr", {}), ratio).name == name


def test_scores_on_disk_have_the_documented_names(scores_path):
    assert sorted(load_file(scores_path)) == ["layers.1.score", "layers.3.score"]
