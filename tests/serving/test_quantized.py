"""Quantized checkpoints are served as they are: the same bits as what they stand for."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import make_checkpoint, write_profile
from tests.quantized import FORMATS, quantize_checkpoint
from tests.serving.conftest import engine, mixed_logprobs, packed_layers_of
from vllm_atomic_moe.experts.formats import RowFormat

NAMES = ["ragged", "second"]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A small Qwen3-MoE checkpoint in bfloat16, sizes unlike, neither a multiple of 128."""
    directory = tmp_path_factory.mktemp("quantized") / "original"
    sizes = {"hidden_size": 192, "moe_intermediate_size": 96, "num_hidden_layers": 2}
    make_checkpoint("qwen3_moe", directory, **sizes)
    path = directory / "model.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return directory


def answers(model, info, **options) -> tuple[dict[str, torch.Tensor], RowFormat]:
    for seed, name in enumerate(NAMES, start=1):
        write_profile(info, name, model / "atomic_profiles", seed)
    extra = {"active": NAMES[0], "resident": NAMES[1:], **options}
    settings = {"load_format": "atomic-pruned", "model_loader_extra_config": extra}
    with engine(model, dtype="bfloat16", **settings) as llm:
        return mixed_logprobs(llm, NAMES), packed_layers_of(llm)[0].packed.row_format


@pytest.mark.parametrize("name", FORMATS)
def test_serves_what_the_checkpoint_stands_for(original, tmp_path, name):
    from vllm_atomic_moe.files.checkpoint import describe_checkpoint

    plain = quantize_checkpoint(original, tmp_path / "model", name)
    info = describe_checkpoint(tmp_path / "model")
    assert info.identity() == describe_checkpoint(plain).identity()
    found, row_format = answers(tmp_path / "model", info, kernel="reference")
    assert not row_format.plain
    wanted, row_format = answers(plain, info, kernel="reference")
    assert row_format.plain
    for profile in NAMES:
        assert torch.equal(found[profile], wanted[profile]), profile
