"""An exported checkpoint answers like the original, bit for bit, or is refused by name."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import make_checkpoint, ragged_masks, write_profile
from tests.quantized import FORMATS, in_bfloat16, quantize_checkpoint, quantize_gpt_oss
from tests.serving.conftest import check_resident, engine, logprobs_of, prompt_logprobs
from tests.unit import tiny_models
from vllm_atomic_moe.convert.exporting.export import export
from vllm_atomic_moe.files.checkpoint import describe_checkpoint
from vllm_atomic_moe.files.profiles import PruningProfile


def make_model(directory, architecture, layout="per_expert"):
    """A checkpoint with the profiles `wide`, `narrow` and `whole` within it, and `other`."""
    info, profiles = make_checkpoint(architecture, directory, layout=layout), directory / "profiles"
    wide = write_profile(info, "wide", profiles, seed=1)
    write_profile(info, "other", profiles, seed=3)
    more = ragged_masks(info, seed=2)
    narrow = {layer: mask & more[layer] for layer, mask in wide.keep.items()}
    PruningProfile("narrow", narrow, metadata=wide.metadata).write(profiles / "narrow.safetensors")
    routable = {layer: mask.any(dim=1) for layer, mask in narrow.items()}
    PruningProfile("whole", narrow, routable).write(profiles / "whole.safetensors")
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "model", "qwen3_moe")


@pytest.fixture(scope="module")
def exported(model):
    """The model with the atoms of `wide`, in several shards."""
    output = model.with_name("exported")
    wide = model / "profiles" / "wide.safetensors"
    assert export(str(model), wide, output, shard_bytes=300_000).shards > 3
    return output


def served(directory, profiles=None, **extra):
    """Prompt log-probabilities through the loader."""
    if profiles is not None:
        extra["profiles"] = str(profiles / "profiles")
    return logprobs_of(directory, load_format="atomic-pruned", model_loader_extra_config=extra)


def test_an_export_answers_as_the_masked_original(model, exported):
    from vllm_atomic_moe.engine.loader import packed_layers

    with engine(exported, load_format="atomic-pruned") as llm:
        found = prompt_logprobs(llm)
        network = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
        check_resident(packed_layers(network), describe_checkpoint(exported).stored)
        assert "load_weights" not in vars(network)
    assert torch.equal(found, served(model, model, active="wide"))


@pytest.mark.parametrize(
    "options",
    [
        # Alone it omits stored rows; with `wide` it changes their order.
        {"active": "narrow"},
        pytest.param({"active": "narrow", "resident": ["wide"]}, marks=pytest.mark.full),
        pytest.param({"active": "whole"}, marks=pytest.mark.full),
    ],
)
def test_profiles_within_the_export_are_served_from_it(model, exported, options):
    assert torch.equal(served(exported, model, **options), served(model, model, **options))


@pytest.mark.full
def test_other_inner_formats_give_the_same(exported):
    multithreaded = {"enable_multithread_load": True, "num_threads": 2}
    found = served(exported, inner_format="hf", **multithreaded)
    assert torch.equal(found, served(exported))


@pytest.mark.parametrize("name", ["dense", "other"])
def test_profiles_beyond_the_export_are_refused_before_weights_are_read(
    model, exported, monkeypatch, name
):
    from vllm.model_executor.model_loader import DefaultModelLoader

    def read(*arguments, **options):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(DefaultModelLoader, "_get_weights_iterator", read)
    with pytest.raises(ValueError, match=f"'{name}': .* the exported checkpoint does not hold"):
        served(exported, model, active=name)


@pytest.mark.parametrize("load_format", ["auto", "safetensors"])
def test_stock_loaders_find_no_weights(exported, load_format):
    """They do not check that expert weights arrived, so they would not notice missing experts."""
    with pytest.raises(RuntimeError, match="Cannot find any model weights"):
        logprobs_of(exported, load_format=load_format)


def test_transformers_finds_no_weights(exported):
    from transformers import AutoModelForCausalLM

    with pytest.raises(OSError, match=r"no file named model.safetensors"):
        AutoModelForCausalLM.from_pretrained(exported)


def test_experts_that_are_stored_twice_are_refused(exported, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(exported, broken)
    shard = max((broken / "atomic_weights").glob("*.safetensors"))
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    save_file({**load_file(shard), name: torch.zeros(64, 128)}, shard)
    with pytest.raises(ValueError, match="up_proj of expert 3 arrives twice"):
        served(broken)


def test_vllm_reads_the_same_configuration(model, tmp_path):
    """The export's configuration has what vLLM reads from the original's shards."""
    from vllm.engine.arg_utils import EngineArgs

    source = tmp_path / "model"
    shutil.copytree(model, source)
    config = json.loads((source / "config.json").read_text())
    del config["dtype"]
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = load_file(source / "model.safetensors")
    save_file({name: t.bfloat16() for name, t in tensors.items()}, source / "model.safetensors")
    profile = tmp_path / "wide.safetensors"
    masks = PruningProfile.read(model / "profiles" / "wide.safetensors").keep
    PruningProfile("wide", masks).write(profile)
    export(str(source), profile, tmp_path / "exported")
    found = []
    for directory in (source, tmp_path / "exported"):
        arguments = {"load_format": "atomic-pruned", "skip_tokenizer_init": True}
        model_config = EngineArgs(str(directory), **arguments).create_engine_config().model_config
        found.append((model_config.dtype, model_config.hf_config.tie_word_embeddings))
    assert found == [(torch.bfloat16, False)] * 2


@pytest.mark.parametrize(
    "kind",
    [
        "fp8-block",
        "gpt-oss",
        *(pytest.param(kind, marks=pytest.mark.full) for kind in FORMATS if kind != "fp8-block"),
        pytest.param("gpt-oss-16-bit", marks=pytest.mark.full),
    ],
)
def test_quantized_checkpoints(tmp_path, kind):
    """Rows, scales, groups, factors and biases; also in an export of the export."""
    original, model = tmp_path / "original", tmp_path / "model"
    if kind.startswith("gpt-oss"):
        tiny_models.make_model("gpt_oss", original, intermediate_size=96)
    else:
        sizes = {"hidden_size": 192, "moe_intermediate_size": 96, "num_hidden_layers": 2}
        make_checkpoint("qwen3_moe", original, **sizes)
    in_bfloat16(original)
    if kind == "gpt-oss":
        quantize_gpt_oss(original, model)
    elif kind in FORMATS:
        quantize_checkpoint(original, model, kind)
    else:
        model = original
    info = describe_checkpoint(model)
    wide = write_profile(info, "wide", model / "profiles", seed=1)
    more = ragged_masks(info, seed=2)
    narrow = {layer: mask & more[layer] for layer, mask in wide.keep.items()}
    PruningProfile("narrow", narrow, metadata=wide.metadata).write(
        model / "profiles" / "narrow.safetensors"
    )
    export(str(model), model / "profiles/wide.safetensors", tmp_path / "wide")
    export(str(tmp_path / "wide"), model / "profiles/narrow.safetensors", tmp_path / "narrow")
    extra = {"kernel": "reference", "profiles": str(model / "profiles")}
    settings = {"load_format": "atomic-pruned", "dtype": "bfloat16"}
    for name, directories in {"wide": ["wide"], "narrow": ["wide", "narrow"]}.items():
        options = {**extra, "active": name}
        wanted = logprobs_of(model, model_loader_extra_config=options, **settings)
        for directory in directories:
            found = logprobs_of(tmp_path / directory, model_loader_extra_config=options, **settings)
            assert torch.equal(found, wanted), (name, directory)
