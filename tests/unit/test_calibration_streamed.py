"""Calibration layer by layer gives the same sums as calibration in memory."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer, Qwen3MoeModel

from tests.architectures import COMMON, FIRST_DENSE, LATENT, MIXED, QUICK, ROUTED
from tests.gated_delta_net import make_qwen3_5, save_random
from tests.quantized import FORMATS, quantize_checkpoint, quantize_gpt_oss
from tests.unit.tiny_models import (
    ARCHITECTURES,
    CONTEXT,
    make_model,
    random_text,
    random_windows,
)
from vllm_atomic_moe.calibration import free_memory, streaming
from vllm_atomic_moe.calibration.collect import CalibrationOptions, calibrate, collect
from vllm_atomic_moe.calibration.experts import find_experts
from vllm_atomic_moe.calibration.kept import InMemory
from vllm_atomic_moe.calibration.layer_reader import LayerReader, weight_bytes
from vllm_atomic_moe.calibration.model import load_model
from vllm_atomic_moe.calibration.streamed import collect_streamed
from vllm_atomic_moe.calibration.text import CalibrationText
from vllm_atomic_moe.files.checkpoint import describe_checkpoint
from vllm_atomic_moe.files.shards import Shards
from vllm_atomic_moe.scoring import method_options, score_layers, select_masks
from vllm_atomic_moe.scoring.router import RouterNeeds

CPU = torch.device("cpu")
ROOM = 1 << 40


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("qwen3_moe")
    return directory, make_model("qwen3_moe", directory)


def text_of(*counts, seq_len=24):
    windows = {f"d{n}": random_windows(count, seq_len, seed=n) for n, count in enumerate(counts)}
    return CalibrationText(windows, ())


def in_memory(directory, info, text, batch_size=2, gradients=True, dtype="float32"):
    model = load_model(directory, dtype, {"": "cpu"})
    return collect(model, find_experts(model, info), info, text, batch_size, gradients=gradients)


def streamed(directory, info, text, batch_size=2, gradients=True, dtype="float32", kept=None):
    reader = LayerReader(directory, info, getattr(torch, dtype), CPU)
    return collect_streamed(reader, kept or InMemory(ROOM), text, batch_size, gradients=gradients)


def check_equal(found, wanted, tolerance=1e-6):
    """Within `tolerance` of the largest sum of a layer; counts are equal."""
    assert found.keys() == wanted.keys()
    for layer, sums in wanted.items():
        named = found[layer].tensors()
        assert named.keys() == sums.tensors().keys()
        for name, tensor in sums.tensors().items():
            if name in ("count", "sets", "set_counts"):
                assert torch.equal(named[name], tensor), (layer, name)
                continue
            limit = tolerance * float(tensor.abs().max())
            torch.testing.assert_close(
                named[name], tensor, rtol=0, atol=limit, msg=f"{layer} {name}"
            )


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.full) for name in ARCHITECTURES],
)
@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "forward"])
def test_sums_are_those_of_memory(architecture, gradients, tmp_path):
    info = make_model(architecture, tmp_path)
    text = text_of(3, 2)
    wanted = in_memory(tmp_path, info, text, gradients=gradients)
    found = streamed(tmp_path, info, text, gradients=gradients)
    check_equal(found, wanted)
    method = "heapr" if gradients else "camera"
    for one, two in zip(masks(method, found), masks(method, wanted), strict=True):
        assert torch.equal(one, two)


def masks(method, sums):
    """The kept atoms if 40 % are pruned."""
    layers = score_layers(method, sums, method_options(method, {"allow_unseen": True}))
    return select_masks(method, layers, 0.4, RouterNeeds(1), {}).keep.values()


@pytest.mark.parametrize(
    "kind",
    ["fp8-block", "gpt-oss"]
    + [pytest.param(it, marks=pytest.mark.full) for it in FORMATS if it != "fp8-block"],
)
def test_quantized_checkpoints_are_decoded_layer_by_layer(kind, tmp_path, monkeypatch):
    model = tmp_path / "model"
    if kind == "gpt-oss":
        make_model("gpt_oss", tmp_path / "plain", intermediate_size=96, num_hidden_layers=2)
        quantize_gpt_oss(tmp_path / "plain", model)
    else:
        settings = {"moe_intermediate_size": 96, "num_hidden_layers": 2}
        make_model("qwen3_moe", tmp_path / "plain", **settings)
        quantize_checkpoint(tmp_path / "plain", model, kind, True)
    info, text = describe_checkpoint(model), text_of(2)
    wanted = in_memory(model, info, text)
    read = Shards.tensor
    names = []
    monkeypatch.setattr(Shards, "tensor", lambda *it: names.append(it[1]) or read(*it))
    check_equal(streamed(model, info, text), wanted)
    layers = [int(found[1]) for name in names if (found := re.search(r"layers\.(\d+)\.", name))]
    assert [layer for layer, _ in groupby(layers)] == [0, 1, 0]
    # Every tensor of the last layer is read twice, upwards and downwards; or once if both meet.
    assert max(Counter(names).values()) == 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.1.self_attn.o_proj.weight", "layer 1: activations of a window are not fin"),
        ("lm_head.weight", "the loss of a window is nan in float32; are the checkpoint's weights"),
    ],
)
def test_numbers_that_are_not_finite_are_refused(name, words, tmp_path):
    info = make_model("qwen3_moe", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name][0] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=words):
        streamed(tmp_path, info, text_of(1))


def test_a_checkpoint_that_lacks_weights_is_refused_before_any_is_read(tmp_path, monkeypatch):
    info = make_model("qwen3_moe", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.2.self_attn.o_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(Shards, "tensor", lambda *call: pytest.fail("a tensor is read"))
    with pytest.raises(ValueError, match=r"lacks 1 weights of Qwen3MoeForCausalLM"):
        streamed(tmp_path, info, text_of(1))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_hidden_layers": 4, "layer_types": MIXED[1:] * 2, "num_kv_shared_layers": 2},
        {"hidden_size_per_layer_input": 32},
    ],
    ids=["shared keys and values", "inputs per layer"],
)
def test_what_other_layers_made_is_carried_with_its_gradients(settings, tmp_path):
    """Gemma-4: a layer attends to keys and values of one far below it."""
    info = make_model("gemma4", tmp_path, **settings)
    text = text_of(3)
    check_equal(streamed(tmp_path, info, text), in_memory(tmp_path, info, text))


def test_further_outputs_of_layers_are_carried(tmp_path):
    """GLM's sparse attention: a layer takes the indices that the one below it chose."""
    settings = {
        **{key: COMMON[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")},
        **{"max_position_embeddings": CONTEXT, "num_attention_heads": 4},
        **ROUTED,
        **LATENT,
        **{"n_shared_experts": 1, "mlp_layer_types": FIRST_DENSE},
        **{"index_topk": 8, "index_head_dim": 32, "index_n_heads": 2},
        "indexer_types": ["full", "shared", "full"],
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["glm_moe_dsa"](**settings))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.2)
    model.save_pretrained(tmp_path)
    info = describe_checkpoint(tmp_path)
    text = text_of(3)
    check_equal(streamed(tmp_path, info, text), in_memory(tmp_path, info, text))


def test_a_configuration_within_another(tmp_path):
    """For models that take images: the text model is built from the inner part."""
    info = save_random(make_qwen3_5(), tmp_path, fused=True)
    text = text_of(2)
    check_equal(streamed(tmp_path, info, text), in_memory(tmp_path, info, text))


def test_a_model_that_computes_between_its_layers_is_refused(tmp_path, monkeypatch):
    info = make_model("qwen3_moe", tmp_path)
    forward = Qwen3MoeModel.forward

    def with_sums(self, *args, **kwargs):
        for layer in self.layers:
            layer.register_forward_hook(lambda *call: call[-1] + 1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Qwen3MoeModel, "forward", with_sums)
    words = "Qwen3MoeForCausalLM computes between its layers, so the model cannot be .* --no-stream"
    with pytest.raises(ValueError, match=words):
        streamed(tmp_path, info, text_of(1))


def test_a_layer_that_writes_into_what_it_only_reads_is_refused(tmp_path, monkeypatch):
    """What DeepSeek-V4 gives all layers in a dictionary would reach no other layer."""
    info = make_model("qwen3_moe", tmp_path)
    forward = Qwen3MoeModel.forward

    def with_angles(self, *args, **kwargs):
        return forward(self, *args, **kwargs, angles={"main": torch.zeros(1)})

    def writing(self, *args, angles=None, **kwargs):
        angles["main"] = torch.ones(1)
        return layer(self, *args, **kwargs)

    layer = Qwen3MoeDecoderLayer.forward
    monkeypatch.setattr(Qwen3MoeModel, "forward", with_angles)
    monkeypatch.setattr(Qwen3MoeDecoderLayer, "forward", writing)
    with pytest.raises(ValueError, match="'mappingproxy' object does not support item assignment"):
        streamed(tmp_path, info, text_of(1))


def test_padding_counts_nowhere(tiny):
    directory, info = tiny
    short = torch.nn.functional.pad(random_windows(1, 15), (0, 9), value=-1)
    windows = torch.cat([random_windows(2, 24), short])
    text = CalibrationText({"a": windows}, ())
    check_equal(streamed(directory, info, text), in_memory(directory, info, text))


def test_bfloat16_is_computed_in_the_same_way(tiny):
    directory, info = tiny
    text = text_of(2)
    wanted = in_memory(directory, info, text, dtype="bfloat16")
    check_equal(streamed(directory, info, text, dtype="bfloat16"), wanted)


@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "forward"])
def test_one_layer_is_in_memory_at_a_time(tiny, gradients, monkeypatch):
    directory, info = tiny
    held = []
    read = LayerReader._read

    @contextmanager
    def watched(self, wanted):
        with read(self, wanted) as model:
            held.append(sum(it.nbytes for it in model.parameters() if not it.is_meta))
            weights = [it for it in model.parameters() if not it.is_meta]
            yield model
        assert not any(it.numel() for it in weights)

    monkeypatch.setattr(LayerReader, "_read", watched)
    reader = LayerReader(directory, info, torch.float32, CPU)
    collect_streamed(reader, InMemory(ROOM), text_of(2), 1, gradients=gradients)
    assert max(held) == reader.largest_layer_bytes
    # What is around the layers, the layers upwards, and with gradients both again.
    assert len(held) == (2 * (1 + info.layers[-1] + 1) if gradients else 1 + info.layers[-1] + 1)
    assert bytes_of(reader.outline) > 3 * reader.largest_layer_bytes


def bytes_of(model):
    return sum(parameter.nbytes for parameter in model.parameters())


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "letters.txt"
    path.write_text(random_text(400))
    return path


OPTIONS = CalibrationOptions(samples=2, seq_len=32, batch_size=2, dtype="float32")


@pytest.mark.parametrize(
    ("changes", "free", "notes"),
    [
        ({}, 1 << 40, []),
        ({}, 1 << 20, ["the weights take 0.0 GiB in float32, 0.0 GiB are free: calibrating layer"]),
        ({"stream": True}, 1 << 40, []),
        ({"stream": False}, 1 << 20, []),
    ],
)
def test_streams_by_itself_where_weights_do_not_fit(
    changes, free, notes, tiny, text_file, monkeypatch
):
    monkeypatch.setattr(streaming, "free_bytes", lambda device: free)
    monkeypatch.setattr(InMemory, "room", lambda self: ROOM)
    said, data = [], [str(text_file)]
    found = calibrate(str(tiny[0]), data, replace(OPTIONS, **changes), on_note=said.append)
    wanted = calibrate(str(tiny[0]), data, replace(OPTIONS, stream=False))
    assert len(said) == len(notes)
    assert all(line.startswith(note) for line, note in zip(said, notes, strict=True))
    assert found[0].calibration == wanted[0].calibration
    assert found[1] == wanted[1]
    check_equal(found[0].sums, wanted[0].sums)


def test_weights_are_as_large_as_the_file_says(tiny):
    directory, info = tiny
    size = sum(it.nbytes for it in load_file(directory / "model.safetensors").values())
    assert weight_bytes(directory, torch.float32) == size
    assert weight_bytes(directory, torch.bfloat16) == size // 2
    assert bytes_of(LayerReader(directory, info, torch.float32, CPU).outline) == size


def test_scratch_without_streaming_is_refused(tiny, text_file, tmp_path):
    options = replace(OPTIONS, stream=False, scratch=tmp_path)
    with pytest.raises(ValueError, match="--scratch is for calibration layer by layer; leave out"):
        calibrate(str(tiny[0]), [str(text_file)], options)


def test_memory_that_does_not_hold_the_inputs_is_told(tiny, text_file, monkeypatch):
    monkeypatch.setattr(streaming, "free_bytes", lambda device: 1 << 10)
    with pytest.raises(ValueError, match=r"layers' inputs take 0\.0 GiB, .* use --scratch"):
        calibrate(str(tiny[0]), [str(text_file)], OPTIONS)


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({"meminfo": "MemTotal: 900 kB\nMemAvailable:     800 kB\n"}, 800 * 1024),
        ({"meminfo": "MemAvailable: 800 kB\n", "memory.max": "max\n"}, 800 * 1024),
        (
            {
                "meminfo": "MemAvailable: 800 kB\n",
                "memory.max": "500000\n",
                "memory.stat": "anon 100000\nfile 300000\n",
            },
            400_000,
        ),
        ({}, 0),
    ],
    ids=["machine", "no limit", "control group", "unknown"],
)
def test_free_memory(files, free, tmp_path, monkeypatch):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(free_memory, "CGROUP", tmp_path)
    monkeypatch.setattr(free_memory, "MEMINFO", tmp_path / "meminfo")
    assert free_memory.free_bytes(CPU) == free
