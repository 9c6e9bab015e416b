"""Tiny checkpoints that can be calibrated: a random model with a tokenizer, and text for it."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tests import architectures
from tests.checkpoints import make_checkpoint
from vllm_atomic_moe.files.checkpoint import CheckpointInfo

CONTEXT = architectures.COMMON["max_position_embeddings"]
EOS_ID = architectures.COMMON["eos_token_id"]
ARCHITECTURES = tuple(
    name
    for name, it in architectures.ARCHITECTURES.items()
    if not (it.not_calibrated or it.tensors)
)


def make_model(architecture: str, directory: Path, **more_settings: int) -> CheckpointInfo:
    """Write a random float32 checkpoint with a tokenizer to `directory`."""
    character_tokenizer().save_pretrained(directory)
    return make_checkpoint(architecture, directory, **more_settings)


def character_tokenizer(eos: str | None = "<eos>") -> PreTrainedTokenizerFast:
    """One token per printable ASCII character; EOS is id 1, anything else id 0."""
    vocabulary = {"<unknown>": 0, "<eos>": EOS_ID}
    for character in string.printable:
        vocabulary[character] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unknown>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, unk_token="<unknown>")


def random_text(length: int, seed: int = 0) -> str:
    """Lower-case letters and spaces."""
    generator = torch.Generator().manual_seed(seed)
    letters = torch.randint(0, 27, (length,), generator=generator).tolist()
    return "".join(" abcdefghijklmnopqrstuvwxyz"[letter] for letter in letters)


def random_windows(count: int, seq_len: int, seed: int = 0) -> torch.Tensor:
    """Token ids: int32 [count, seq_len]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 102, (count, seq_len), generator=generator, dtype=torch.int32)
