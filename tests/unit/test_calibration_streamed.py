"""Calibration layer by layer sums up what calibration in memory does."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeModel

from tests.architectures import COMMON, FIRST_DENSE, LATENT, MIXED, QUICK, ROUTED
from tests.unit.tiny_models import ARCHITECTURES, CONTEXT, make_model, random_windows
from vllm_atomic_moe.calibration.collect import collect
from vllm_atomic_moe.calibration.experts import find_experts
from vllm_atomic_moe.calibration.kept import InMemory
from vllm_atomic_moe.calibration.layer_reader import LayerReader
from vllm_atomic_moe.calibration.model import load_model
from vllm_atomic_moe.calibration.streamed import collect_streamed
from vllm_atomic_moe.calibration.text import CalibrationText
from vllm_atomic_moe.files.checkpoint import describe_checkpoint

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
    """Within `tolerance` of the largest sum of a layer; what is counted is the same."""
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
    check_equal(streamed(tmp_path, info, text, gradients=gradients), wanted)


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
    assert reader.weight_bytes > 3 * reader.largest_layer_bytes
