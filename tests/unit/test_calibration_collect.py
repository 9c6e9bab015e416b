"""The calibration run on real tiny models: what it sums, what it refuses, what it warns about."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests import checkpoints
from tests.architectures import COMMON, QUICK
from tests.unit.tiny_models import (
    ARCHITECTURES,
    CONTEXT,
    character_tokenizer,
    make_model,
    random_text,
    random_windows,
)
from vllm_atomic_moe.calibration.collect import CalibrationOptions, calibrate, collect
from vllm_atomic_moe.calibration.experts import find_experts, observe
from vllm_atomic_moe.calibration.model import (
    check_offload,
    check_vocabulary,
    load_model,
    resolve_device,
    resolve_dtype,
)
from vllm_atomic_moe.calibration.text import CalibrationText, DataFile, draw_windows
from vllm_atomic_moe.files.checkpoint import CheckpointInfo, describe_checkpoint
from vllm_atomic_moe.files.profiles import PruningProfile
from vllm_atomic_moe.files.router import RouterIdentity
from vllm_atomic_moe.files.statistics import SUMS, Statistics, merge

CPU = {"": "cpu"}
OPTIONS = CalibrationOptions(samples=4, seq_len=32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("qwen3_moe")
    return directory, make_model("qwen3_moe", directory)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "letters.txt"
    path.write_text(random_text(2000))
    return path


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def info_of(**changes) -> CheckpointInfo:
    fields = {
        "architecture": "TestForCausalLM",
        "num_experts": 8,
        "experts_per_token": 2,
        "intermediate_size": 64,
        "hidden_size": 128,
        "layers": (0, 1, 2),
        "router": RouterIdentity(""),
    }
    return CheckpointInfo(**{**fields, **changes})


def run(directory, info, windows, batch_size=1, dtype="float64"):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
    text = windows if isinstance(windows, CalibrationText) else CalibrationText({"a": windows}, ())
    return collect(model, find_experts(model, info), info, text, batch_size)


class RowCounter:
    """Counts rows, and changes nothing."""

    def __init__(self, info):
        self.info, self.rows = info, 0

    def see_routing(self, module, routed):
        return routed.topk_ids_TK

    def see_expert(self, expert, rows):
        assert rows.h.shape[1] == self.info.intermediate_size
        assert rows.down_HI.shape == (self.info.hidden_size, self.info.intermediate_size)
        # Less their bias, if they have one.
        y = rows.y - (rows.y - rows.h @ rows.down_HI.T).mean(dim=0)
        torch.testing.assert_close(rows.h @ rows.down_HI.T, y, rtol=1e-5, atol=1e-5)
        assert len(rows.tokens) == rows.h.shape[0]
        self.rows += rows.h.shape[0]
        return rows.y


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.full) for name in ARCHITECTURES],
)
def test_observed_experts_compute_what_transformers_computes(architecture, tmp_path):
    info = make_model(architecture, tmp_path)
    model = load_model(tmp_path, "float32", CPU).eval()
    experts = find_experts(model, info)
    ids = random_windows(2, 16).long()
    observers = {layer: RowCounter(info) for layer in info.layers}

    with torch.no_grad():
        model.set_experts_implementation("eager")
        wanted = model(input_ids=ids, use_cache=False).logits
        with observe(model, experts, observers):
            logits = model(input_ids=ids, use_cache=False).logits
        after = model(input_ids=ids, use_cache=False).logits

    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=5e-5)
    assert torch.equal(after, wanted)
    assert {counter.rows for counter in observers.values()} == {
        ids.numel() * info.experts_per_token
    }


def test_batch_size_does_not_change_the_sums(tiny):
    directory, info = tiny
    windows = random_windows(3, 32)
    one, two = (run(directory, info, windows, batch_size) for batch_size in (1, 2))
    for layer in info.layers:
        for name, tensor in one[layer].tensors().items():
            torch.testing.assert_close(tensor, getattr(two[layer], name), rtol=1e-6, atol=0)


def test_domains_are_summed_apart(tiny):
    directory, info = tiny
    windows = random_windows(3, 32)
    both = run(directory, info, CalibrationText({"a": windows[:1], "b": windows[1:]}, ()), 2)
    apart = [run(directory, info, part) for part in (windows[:1], windows[1:])]
    for layer in info.layers:
        for name in SUMS:
            wanted = torch.cat([getattr(part[layer], name) for part in apart])
            torch.testing.assert_close(getattr(both[layer], name), wanted, rtol=1e-6, atol=0)
        tables = [part[layer].sets for part in apart]
        tables[1][:, 0] = 1
        assert torch.equal(both[layer].sets, torch.cat(tables))


def test_selecting_a_domain_is_calibrating_on_it_alone(tiny, text_file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(random_text(1500, seed=3))
    both, _ = calibrate(str(tiny[0]), [f"{text_file}:a", f"{other}:b"], OPTIONS)
    alone, _ = calibrate(str(tiny[0]), [f"{other}:b"], OPTIONS)
    chosen = both.select(["b"])
    assert chosen.calibration == alone.calibration
    assert_equal_sums(chosen.sums, alone.sums, rtol=0)


def assert_equal_sums(found, wanted, rtol):
    """Sums may be added in another order; counts are exact."""
    assert found.keys() == wanted.keys()
    for layer, sums in wanted.items():
        named = found[layer].tensors()
        assert named.keys() == sums.tensors().keys()
        for name, tensor in sums.tensors().items():
            exact = name in ("count", "sets", "set_counts")
            scale = tensor.abs().max().item() if name == "contribution" else 0
            torch.testing.assert_close(
                named[name], tensor, rtol=0 if exact else rtol, atol=scale * rtol
            )


@pytest.mark.parametrize("shards", [2, 3, 7])
def test_merged_shards_equal_one_run_over_all(shards, tiny, text_file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(random_text(1500, seed=3))
    data = [f"{text_file}:a", f"{other}:b"]
    whole, _ = calibrate(str(tiny[0]), data, OPTIONS)
    parts = []
    for number in range(1, shards + 1):
        options = dataclasses.replace(OPTIONS, shard=f"{number}/{shards}")
        part, _ = calibrate(str(tiny[0]), data, options)
        part.write(tmp_path / f"{number}.safetensors")
        parts.append(Statistics.read(tmp_path / f"{number}.safetensors"))
    merged = merge(parts)
    assert merged.calibration == whole.calibration
    assert merged.model == whole.model
    assert_equal_sums(merged.sums, whole.sums, rtol=1e-12)


@pytest.mark.parametrize("shard", ["0/2", "3/2", "2", "1/0", "-1/2", "a/b"])
def test_shards_that_do_not_exist_are_refused(shard, tiny, text_file):
    with pytest.raises(ValueError, match=r"wanted i/N with 1 <= i <= N"):
        calibrate(str(tiny[0]), [str(text_file)], dataclasses.replace(OPTIONS, shard=shard))


def test_more_shards_than_windows_are_refused(tiny, text_file):
    with pytest.raises(ValueError, match="the text makes 4 windows, fewer than shards"):
        calibrate(str(tiny[0]), [str(text_file)], dataclasses.replace(OPTIONS, shard="1/5"))


@pytest.mark.parametrize("side", [(0, 12), (12, 0)], ids=["right", "left"])
def test_padding_never_counts(side, tiny):
    """Windows of 20 tokens padded to 32, in one batch with full ones, sum up as if cut.

    On the left, only the attention mask keeps other tokens from seeing it.
    """
    directory, info = tiny
    full, short = random_windows(1, 32), random_windows(1, 20, seed=1)
    padded = torch.cat([full, torch.nn.functional.pad(short, side, value=-1)])
    found = run(directory, info, padded, batch_size=2)
    parts = [run(directory, info, ids) for ids in (full, short)]
    for layer, sums in found.items():
        assert sums.count.sum() == (32 + 20) * info.experts_per_token
        assert sums.set_counts.sum() == 32 + 20
        for name in SUMS:
            wanted = sum(getattr(part[layer], name) for part in parts)
            # Rotary embeddings are float32, and on the left other positions are used.
            torch.testing.assert_close(getattr(sums, name), wanted, rtol=1e-4, atol=1e-6)


def test_without_gradients_everything_else_is_the_same(tiny, text_file):
    directory, _ = tiny
    with_them, _ = calibrate(str(directory), [str(text_file)], OPTIONS)
    options = dataclasses.replace(OPTIONS, gradients=False)
    without, _ = calibrate(str(directory), [str(text_file)], options)
    assert without.calibration == {**with_them.calibration, "gradients": False}
    for layer, sums in without.sums.items():
        named = with_them.sums[layer].tensors()
        assert named.keys() - sums.tensors().keys() == {"g2"}
        for name, tensor in sums.tensors().items():
            torch.testing.assert_close(tensor, named[name], rtol=1e-5, atol=1e-6)


def test_a_model_spread_by_accelerate_gives_the_same_sums(tiny, tmp_path):
    """Layer 1 offloaded to disk: its weights are there only while it runs.

    Not with gradients: the graph would keep the weights of all layers.
    """
    directory, info = tiny
    windows = random_windows(2, 32)
    device_map = {
        "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
        "model.layers.2": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
    }  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float64, device_map=device_map, offload_folder=tmp_path
    )
    experts = find_experts(model, info)
    assert experts[1].down_proj.device.type == "meta"
    text = CalibrationText({"a": windows}, ())
    found = collect(model, experts, info, text, 1, gradients=False)
    wanted = {
        layer: dataclasses.replace(sums, g2=None)
        for layer, sums in run(directory, info, windows).items()
    }
    assert_equal_sums(found, wanted, rtol=1e-9)
    check_offload(model, gradients=False)
    with pytest.raises(ValueError, match=r"weights do not fit the devices .* --no-gradients"):
        check_offload(model, gradients=True)


def test_norms_are_those_of_the_stored_weights(tiny):
    directory, info = tiny
    sums = run(directory, info, random_windows(1, 8))
    stored = load_file(directory / "model.safetensors")
    for layer, expert in ((0, 0), (2, 7)):
        block = f"model.layers.{layer}.mlp.experts.{expert}"
        for name, projection, along in (
            ("gate_norm", "gate_proj", 1), ("up_norm", "up_proj", 1), ("down_norm", "down_proj", 0)
        ):  # fmt: skip
            wanted = stored[f"{block}.{projection}.weight"].double().norm(dim=along)
            torch.testing.assert_close(getattr(sums[layer], name)[expert], wanted)


def test_only_the_embedding_output_requires_a_gradient(tiny):
    directory, info = tiny
    model = AutoModelForCausalLM.from_pretrained(directory)
    text = CalibrationText({"a": random_windows(1, 8)}, ())
    collect(model, find_experts(model, info), info, text, 1)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training


def test_calibrate_records_what_it_did(tiny, text_file):
    directory, info = tiny
    seen = []
    statistics, warnings = calibrate(
        str(directory),
        [f"{text_file}:english"],
        CalibrationOptions(samples=4, seq_len=32, batch_size=3, dtype="bfloat16", seed=5),
        lambda done, total: seen.append((done, total)),
    )
    assert seen == [(3, 4), (4, 4)]
    assert statistics.model == info.identity()
    assert not any("masked" in warning for warning in warnings)
    corpora = statistics.calibration["corpora"]
    assert [(entry["name"], entry["domain"], entry["tokens"]) for entry in corpora] == [
        ("letters.txt", "english", 2000)
    ]
    text = draw_windows([DataFile(text_file, "english")], character_tokenizer(), 32, 4, 5)
    assert {
        key: statistics.calibration[key] for key in statistics.calibration if key != "corpora"
    } == {
        "domains": ["english"],
        "tokens": 128,
        "seq_len": 32,
        "samples": 4,
        "seed": 5,
        "dtype": "bfloat16",
        "experts_per_token": 2,
        "expert_groups": None,
        "gradients": True,
        "field": None,
        "windows_sha256": text.digests,
    }


def test_a_masked_checkpoint_is_noticed(tiny, text_file, tmp_path):
    directory, info = tiny
    masks = checkpoints.ragged_masks(info, seed=0)
    masked = tmp_path / "masked"
    checkpoints.zero_pruned(directory, masked, PruningProfile("ragged", masks))
    _, warnings = calibrate(str(masked), [str(text_file)], OPTIONS)
    assert any("looks already masked or pruned" in warning for warning in warnings)


def test_starved_experts_are_reported(tiny, text_file):
    _, warnings = calibrate(str(tiny[0]), [str(text_file)], CalibrationOptions(1, 16))
    (warning,) = warnings
    assert "saw fewer than 32 tokens" in warning


def test_a_sequence_longer_than_the_context_is_refused(tiny, text_file):
    with pytest.raises(ValueError, match=f"2048 exceeds the model's context of {CONTEXT} tokens"):
        calibrate(str(tiny[0]), [str(text_file)], CalibrationOptions())


def test_a_configuration_of_another_model_is_refused_in_one_line(tmp_path, text_file):
    make_model("qwen3_moe", tmp_path)
    edit_config(tmp_path, num_attention_heads=8)
    with pytest.raises(ValueError, match=r"is config\.json of this checkpoint") as refusal:
        calibrate(str(tmp_path), [str(text_file)], OPTIONS)
    assert "\n" not in str(refusal.value)


def test_a_broken_tokenizer_is_named(tmp_path, text_file):
    make_model("qwen3_moe", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(ValueError, match=f"{tmp_path}: no tokenizer can be read"):
        calibrate(str(tmp_path), [str(text_file)], OPTIONS)


@pytest.mark.parametrize("seed", [-1, 10**30])
def test_seeds_out_of_range_are_refused(seed, tiny, text_file):
    options = dataclasses.replace(OPTIONS, samples=1, seed=seed)
    with pytest.raises(ValueError, match=f"seed {seed}: wanted 0 to"):
        calibrate(str(tiny[0]), [str(text_file)], options)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    make_model("qwen3_moe", tmp_path)
    edit_config(tmp_path, num_hidden_layers=4)
    with pytest.raises(ValueError, match=r"lacks \d+ weights of Qwen3MoeForCausalLM, the first"):
        load_model(tmp_path, "auto", CPU)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (0, 1)}, r"builds routed experts in layers \[0, 1, 2\]"),
        ({"num_experts": 9}, "are 8 of intermediate size 64, the checkpoint has 9 of 64"),
        ({"intermediate_size": 32}, "the checkpoint has 8 of 32"),
    ],
)
def test_a_model_that_is_not_the_checkpoint_is_refused(changes, message, tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny[0])
    with pytest.raises(ValueError, match=message):
        find_experts(model, info_of(**changes))


def tiny_config(architecture, **settings):
    config = CONFIG_MAPPING[architecture](**{**COMMON, **settings})
    return AutoModelForCausalLM.from_config(config)


def test_a_dense_model_is_refused():
    model = tiny_config("qwen3", intermediate_size=64, head_dim=32)
    with pytest.raises(ValueError, match="does not build its experts through the experts interf"):
        find_experts(model, info_of())


def test_other_activations_are_calibrated(tmp_path):
    model = tiny_config("mixtral", num_local_experts=8, intermediate_size=64, hidden_act="gelu")
    model.save_pretrained(tmp_path)
    info = describe_checkpoint(tmp_path)
    experts = find_experts(model, info)
    text = CalibrationText({"a": random_windows(1, 8)}, ())
    assert collect(model, experts, info, text, 1)[0].g2.sum() > 0


def test_a_tokenizer_of_another_model_is_refused(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny[0])
    text = CalibrationText({"a": torch.tensor([[3, 256]])}, ())
    with pytest.raises(ValueError, match="token id 256, the model has 256 embeddings"):
        check_vocabulary(text, model)


def test_a_loss_that_is_not_finite_is_refused(tiny):
    directory, info = tiny
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.lm_head.weight.data[0, 0] = torch.nan
    text = CalibrationText({"a": random_windows(1, 8)}, ())
    with pytest.raises(ValueError, match=r"loss of a window is nan in float32"):
        collect(model, find_experts(model, info), info, text, 1)
    assert model.config._experts_implementation != "atomic_moe_calibration"


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("tpu", "wanted auto, cpu, cuda or cuda:N"),
        ("cuda:x", "wanted auto, cpu, cuda or cuda:N"),
        ("cuda:99", "use --device cpu"),
    ],
)
def test_devices_that_do_not_exist_are_refused(device, message):
    with pytest.raises(ValueError, match=message):
        resolve_device(device)


@pytest.mark.parametrize(
    ("stored", "instructions", "wanted"),
    [
        (torch.bfloat16, (), torch.float32),
        (torch.bfloat16, ("_is_avx512_bf16_supported",), torch.bfloat16),
        (torch.bfloat16, ("_is_amx_tile_supported",), torch.bfloat16),
        (torch.float16, ("_is_avx512_bf16_supported",), torch.float32),
        (torch.float32, (), torch.float32),
    ],
)
def test_auto_is_float32_where_the_cpu_is_slow(stored, instructions, wanted, monkeypatch, tmp_path):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in instructions)
    make_model("qwen3_moe", tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path, dtype=stored).save_pretrained(tmp_path)
    edit_config(tmp_path, dtype=None)
    assert load_model(tmp_path, "auto", CPU).dtype == wanted
    edit_config(tmp_path, dtype=str(stored).removeprefix("torch."))
    assert load_model(tmp_path, "auto", CPU).dtype == wanted
    assert resolve_dtype("auto", tmp_path, "auto") == "auto"
    assert resolve_dtype("bfloat16", tmp_path, CPU) == torch.bfloat16


def test_an_unknown_dtype_is_refused(tiny):
    with pytest.raises(ValueError, match="dtype 'int8': wanted one of auto, float32"):
        load_model(tiny[0], "int8", CPU)


def test_the_tokenizer_of_the_tests_is_sound():
    assert character_tokenizer()("a b")["input_ids"] != character_tokenizer()("b a")["input_ids"]
