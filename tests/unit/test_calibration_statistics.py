"""Statistics: small state, files that come back equal, broken files that are refused."""

import dataclasses
import json
from collections import Counter

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vllm_atomic_moe.calibration.accumulator import Batch, LayerAccumulator
from vllm_atomic_moe.calibration.experts import ExpertRows
from vllm_atomic_moe.calibration.findings import FewTokens, experts_with_few_tokens, inspect_sums
from vllm_atomic_moe.calibration.topk_sets import TopKSetsAccumulator
from vllm_atomic_moe.files.statistics import (
    SUMS,
    LayerSums,
    Statistics,
    add_sets,
    data_digest,
    merge,
)

MODEL = {
    "architecture": "Qwen3MoeForCausalLM",
    "num_experts": 4,
    "intermediate_size": 6,
    "hidden_size": 8,
    "layers": [1, 3],
    "router_sha256": "0" * 64,
}
WINDOWS = {"a": "0a" * 32, "b": "0b" * 32}
CALIBRATION = {
    "domains": ["a", "b"],
    "corpora": [{"name": "x.txt", "domain": "a"}],
    "tokens": 10,
    "experts_per_token": 2,
    "seed": 0,
    "windows_sha256": WINDOWS,
}
# Two domains; the sets {0, 1} and {2, 3} in both, {1, 2} in the second only.
SETS = torch.tensor([[0, 0, 1], [0, 2, 3], [1, 0, 1], [1, 1, 2], [1, 2, 3]], dtype=torch.int16)


def make_sums(count: float = 50.0) -> dict[int, LayerSums]:
    generator = torch.Generator().manual_seed(0)

    def positive(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1

    return {
        layer: LayerSums(
            count=torch.full((2, 4), count, dtype=torch.float64),
            output_norm=positive(2, 4),
            output_change=positive(2, 4),
            h2=positive(2, 4, 6),
            g2=positive(2, 4, 6),
            contribution=positive(2, 4, 6) - 0.5,
            gate_norm=positive(4, 6),
            up_norm=positive(4, 6),
            down_norm=positive(4, 6),
            sets=SETS.clone(),
            set_counts=torch.tensor([9, 4, 5, 2, 1]),
        )
        for layer in (3, 1)
    }


@pytest.fixture
def path(tmp_path):
    Statistics(MODEL, CALIBRATION, make_sums()).write(tmp_path / "stats.safetensors")
    return tmp_path / "stats.safetensors"


def rewrite(path, tensors=None, **metadata):
    """Change tensors or metadata of a file; None removes an entry."""
    with safe_open(path, framework="pt") as file:
        strings = dict(file.metadata())
    named = {**load_file(path), **(tensors or {})}
    strings.update(metadata)
    save_file(
        {name: tensor for name, tensor in named.items() if tensor is not None},
        path,
        metadata={key: value for key, value in strings.items() if value is not None},
    )


def test_a_file_comes_back_equal(path):
    read = Statistics.read(path)
    assert list(read.sums) == [1, 3]
    assert read.model == MODEL
    assert read.calibration == CALIBRATION
    for layer, sums in make_sums().items():
        for name, tensor in sums.tensors().items():
            assert torch.equal(getattr(read.sums[layer], name), tensor)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "atomic-moe-statistics"
    assert metadata["format_version"] == "1"
    assert metadata["created_by"].startswith("vllm-atomic-moe ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "atomic-moe-profile"}, "`format` is 'atomic-moe-profile'"),
        ({"format": None}, "`format` is missing, wanted 'atomic-moe-statistics'"),
        ({"format_version": "2"}, "`format_version` is '2', wanted '1'"),
        ({"model": None}, "`model` is missing, wanted a JSON object"),
        ({"model": "[]"}, r"`model` is '\[\]', wanted a JSON object"),
        ({"calibration": "{"}, "`calibration` is '{', wanted a JSON object"),
        ({"calibration": "{}"}, "`domains` is None, wanted a list"),
        (
            {"calibration": '{"domains": ["a", "b"]}'},
            "`experts_per_token` is None, wanted a number",
        ),
        ({"model": json.dumps({**MODEL, "layers": [1]})}, r"holds layers \[1, 3\]"),
        ({"calibration": json.dumps({**CALIBRATION, "shards": 3})}, "`shards` is 3, which no"),
        ({"calibration": json.dumps({**CALIBRATION, "corpora": [{}]})}, r"`corpora` is \[\{\}\]"),
        (
            {"calibration": json.dumps({**CALIBRATION, "windows_sha256": {"a": "0a"}})},
            "`windows_sha256` is {'a': '0a'}, which no",
        ),
        ({"calibration": json.dumps({**CALIBRATION, "tokens": "x"})}, "`tokens` is 'x', which no"),
        ({"model": json.dumps({**MODEL, "layers": "all"})}, "wanted a list and two numbers"),
        ({"model": json.dumps({**MODEL, "num_experts": 5})}, r"wanted float64 \[2, 5\]"),
    ],
)
def test_wrong_metadata_is_refused(change, message, path):
    rewrite(path, **change)
    with pytest.raises(ValueError, match=message) as refusal:
        Statistics.read(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"layers.1.h2": None}, "layers.1.h2 is missing"),
        ({"layers.1.hessian": torch.zeros(1)}, "unexpected tensor 'layers.1.hessian'"),
        ({"layers.1.g2": torch.ones(2, 4, 6)}, "layers.1.g2 is float32"),
        ({"layers.1.g2": torch.ones(2, 4, 7).double()}, r"layers.1.g2 is float64 \[2, 4, 7\]"),
        ({"layers.1.count": -torch.ones(2, 4).double()}, "negative or not finite"),
        ({"layers.3.h2": torch.full((2, 4, 6), torch.nan).double()}, "negative or not finite"),
        ({"layers.3.contribution": torch.full((2, 4, 6), torch.inf).double()}, "not finite"),
        ({"layers.3.up_norm": None}, "layers.3.up_norm is missing"),
        (
            {"layers.3.sets": SETS[:, :2].contiguous()},
            r"sets is int16 \[5, 2\], wanted int16 \[5, 3",
        ),
        ({"layers.3.sets": SETS + 2}, "names domains or experts that do not exist"),
        ({"layers.3.set_counts": torch.zeros(5, dtype=torch.int64)}, "names domains or experts"),
    ],
)
def test_wrong_tensors_are_refused(tensors, message, path):
    rewrite(path, tensors)
    with pytest.raises(ValueError, match=message):
        Statistics.read(path)


def test_broken_files_are_refused(path, tmp_path):
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a complete safetensors file"):
            Statistics.read(path)
    with pytest.raises(ValueError, match="no such file"):
        Statistics.read(tmp_path / "missing.safetensors")


def test_gradients_may_be_absent(path):
    rewrite(path, {"layers.1.g2": None, "layers.3.g2": None})
    assert Statistics.read(path).sums[1].g2 is None


def test_state_is_a_few_numbers_per_atom():
    """Qwen3-30B-A3B: O(E·I) per layer and domain, where the paper keeps E matrices H×H."""
    experts, size, hidden, domains = 128, 768, 2048, 3
    sums = LayerSums.zeros((domains, experts, size), True, "meta")
    held = sum(tensor.numel() for tensor in sums.tensors().values())
    assert held == domains * experts * (3 * size + 3) + 3 * experts * size
    assert held * 100 < experts * hidden * hidden


def test_the_table_of_sets_is_exact_and_waits_for_a_bounded_time(monkeypatch):
    monkeypatch.setattr("vllm_atomic_moe.calibration.topk_sets.PENDING_ROWS", 64)
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(6, generator=generator)[:3] for _ in range(300)])
    accumulator = TopKSetsAccumulator()
    for part in ids.split(50):
        accumulator.see(part, domain=1)
        assert sum(len(counts) for _, counts in accumulator._tables) <= 20 + 64
    sets, counts = accumulator.table()
    wanted = Counter(tuple(sorted(row)) for row in ids.tolist())
    found = dict(zip(map(tuple, sets[:, 1:].tolist()), counts.tolist(), strict=True))
    assert found == wanted
    assert sets.dtype == torch.int16
    # Per token at most an id of two bytes for the domain and each expert, and a count of eight.
    assert sets.nbytes + counts.nbytes <= len(ids) * (2 * (1 + 3) + 8)
    assert set(sets[:, 0].tolist()) == {1}
    assert sets.tolist() == sorted(sets.tolist())


def test_tables_of_sets_add_up():
    accumulators = TopKSetsAccumulator(), TopKSetsAccumulator()
    accumulators[0].see(torch.tensor([[1, 0], [0, 1], [2, 1]]), domain=0)
    accumulators[1].see(torch.tensor([[2, 1], [0, 1]]), domain=1)
    one, two = (accumulator.table() for accumulator in accumulators)
    sets, counts = add_sets([one, two, one])
    assert sets.tolist() == [[0, 0, 1], [0, 1, 2], [1, 0, 1], [1, 1, 2]]
    assert counts.tolist() == [4, 2, 1, 1]


def test_the_accumulator_adds_in_float64_and_leaves_its_input_alone():
    shape = (2, 3, 2)
    layer = LayerAccumulator(shape, True, Batch(domain=1), LayerSums.zeros(shape, True))
    h = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16, requires_grad=True)
    x = torch.tensor([[3.0, 4.0], [0.0, 1.0]], dtype=torch.bfloat16)
    down = torch.eye(2, dtype=torch.bfloat16)
    p, tokens = torch.tensor([0.5, 2.0]).bfloat16(), torch.arange(2)
    rows = ExpertRows(x, h * 1, (h @ down.T) * 1, p, down, tokens)
    assert layer.see_expert(2, rows) is rows.y
    rows.h.backward(h.detach())
    sums = layer.sums
    assert sums.count.tolist() == [[0, 0, 0], [0, 0, 2]]
    assert sums.h2[1, 2].tolist() == [10, 20]
    assert sums.g2[1, 2].tolist() == [10, 20]
    assert sums.h2.sum() == 30
    assert sums.output_norm[1, 2].item() == pytest.approx(0.5 * 5**0.5 + 2 * 5)
    assert h.tolist() == [[1, 2], [3, 4]]
    for total in (sums.count, sums.output_norm, sums.output_change, sums.h2, sums.contribution):
        assert total.dtype == torch.float64


def shards_of(whole: dict[int, LayerSums]) -> list[Statistics]:
    """Statistics split by domain: shard 1 saw the first domain, shard 2 the second."""
    parts = []
    for domain in (0, 1):
        sums = {}
        for layer, of_both in whole.items():
            own = {name: getattr(of_both, name).clone() for name in SUMS}
            for total in own.values():
                total[1 - domain] = 0
            here = SETS[:, 0] == domain
            own |= {"sets": SETS[here], "set_counts": of_both.set_counts[here]}
            sums[layer] = dataclasses.replace(of_both, **own)
        calibration = {**CALIBRATION, "tokens": 5, "shards": {"of": 2, "here": [domain + 1]}}
        parts.append(Statistics(MODEL, calibration, sums))
    return parts


def test_merged_shards_are_the_whole_run():
    whole = make_sums()
    for order in (1, -1):
        merged = merge(shards_of(whole)[::order])
        assert merged.calibration == CALIBRATION
        for layer, sums in whole.items():
            for name, tensor in sums.tensors().items():
                assert torch.equal(getattr(merged.sums[layer], name), tensor), name


def test_the_same_windows_may_come_from_other_files():
    one, two = shards_of(make_sums())
    other = {**two.calibration, "corpora": [{"name": "y.parquet", "domain": "a"}], "field": "body"}
    merged = merge([one, Statistics(MODEL, other, two.sums)])
    assert merged.calibration == CALIBRATION
    # Version 0.1 tells of the files alone.
    old = [
        Statistics(MODEL, {**it.calibration, "windows_sha256": None}, it.sums) for it in (one, two)
    ]
    assert data_digest(merge(old).calibration) is None
    other |= {"windows_sha256": None}
    with pytest.raises(ValueError, match="calibration `corpora` is"):
        merge([old[0], Statistics(MODEL, other, two.sums)])


def test_the_digest_of_all_data_follows_the_domains():
    statistics = Statistics(MODEL, CALIBRATION, make_sums())
    digest = data_digest(statistics.calibration)
    assert len(digest) == 16
    swapped, alone = statistics.select(["b", "a"]), statistics.select(["b"])
    assert data_digest(swapped.calibration) == digest
    assert alone.calibration["windows_sha256"] == {"b": WINDOWS["b"]}
    assert data_digest(alone.calibration) != digest


def test_an_incomplete_merge_says_so_and_may_go_on():
    one, two = shards_of(make_sums())
    half = merge([one])
    assert half.calibration["shards"] == {"of": 2, "here": [1]}
    assert merge([half, two]).calibration == CALIBRATION


@pytest.mark.parametrize(
    ("model", "calibration", "message"),
    [
        ({"router_sha256": "1" * 64}, {}, "model `router_sha256` is '1111"),
        ({}, {"seed": 3}, "calibration `seed` is 3 in one file and 0 in another"),
        ({}, {"shards": {"of": 3, "here": [2]}}, "calibration `shards` is 3 in one file and 2"),
        ({}, {"seq_len": 4, "windows_sha256": {"a": "", "b": ""}}, "calibration `seq_len` is 4 in"),
        (
            {},
            {"corpora": [], "windows_sha256": {**WINDOWS, "b": ""}},
            "calibration `windows_sha256` is '[0-9a-f]{16}' in one file and '[0-9a-f]{16}' in",
        ),
        (
            {},
            {"corpora": [], "windows_sha256": None},
            "calibration `windows_sha256` is None in one file and '[0-9a-f]{16}' in another",
        ),
        ({}, {"dtype": "bfloat16"}, "calibration `dtype` is 'bfloat16' in one file and None"),
        ({}, {"shards": {"of": 2, "here": [1]}}, "shard 1/2 occurs twice"),
    ],
)
def test_shards_of_another_run_are_refused(model, calibration, message):
    one, two = shards_of(make_sums())
    other = Statistics({**MODEL, **model}, {**two.calibration, **calibration}, two.sums)
    with pytest.raises(ValueError, match=message):
        merge([one, other])


def test_whole_runs_and_other_weights_are_not_merged():
    one, two = shards_of(make_sums())
    with pytest.raises(ValueError, match="whole run cannot be added"):
        merge([one, Statistics(MODEL, CALIBRATION, make_sums())])
    other = dataclasses.replace(two.sums[3], up_norm=two.sums[3].up_norm * 1.1)
    with pytest.raises(ValueError, match=r"layers\.3\.up_norm differs between the files"):
        merge([one, Statistics(MODEL, two.calibration, {**two.sums, 3: other})])


def test_selected_domains_are_as_if_calibrated_alone():
    statistics = Statistics(MODEL, CALIBRATION, make_sums())
    chosen = statistics.select(["b"])
    assert chosen.calibration["domains"] == ["b"]
    assert chosen.calibration["tokens"] == 100
    for layer, sums in make_sums().items():
        assert torch.equal(chosen.sums[layer].h2, sums.h2[1:])
        assert torch.equal(chosen.sums[layer].up_norm, sums.up_norm)
        assert chosen.sums[layer].sets.tolist() == [[0, 0, 1], [0, 1, 2], [0, 2, 3]]
        assert chosen.sums[layer].set_counts.tolist() == [5, 2, 1]
    swapped = statistics.select(["b", "a"])
    assert swapped.sums[1].sets.tolist() == [
        [0, 0, 1], [0, 1, 2], [0, 2, 3], [1, 0, 1], [1, 2, 3]
    ]  # fmt: skip
    for domains in (["c"], ["a", "a"]):
        with pytest.raises(ValueError, match="the statistics hold a, b"):
            statistics.select(domains)


def test_sound_sums_raise_no_warning():
    assert inspect_sums(make_sums()) == []


@pytest.mark.parametrize("name", ["h2", "g2"])
def test_dead_atoms_look_like_a_mask(name):
    sums = make_sums()
    getattr(sums[1], name)[:, 0, :2] = 0
    (warning,) = inspect_sums(sums)
    assert "2 of 48 atoms (4.2%)" in warning
    assert "already masked or pruned" in warning


def test_experts_with_few_tokens_are_counted_and_do_not_look_masked():
    sums = make_sums()
    sums[3].count[:, 2] = torch.tensor([3, 4])
    sums[1].count[:, 1] = 0
    sums[3].g2[:, 2] = 0
    (warning,) = inspect_sums(sums)
    assert "2 of 8 experts saw fewer than 32 tokens" in warning
    assert experts_with_few_tokens(sums) == [FewTokens(0, 1, 1), FewTokens(7, 3, 2)]
