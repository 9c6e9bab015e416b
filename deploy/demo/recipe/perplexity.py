"""Encode the corpus and measure perplexity: used by the training and by the analysis.

Perplexity here is over adjacent windows of 512 tokens that do not overlap, each read from an
empty context; the first token of a window is only context for the next one.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from layout import DOMAINS, WINDOW_TOKENS, split_path
from tokenizers import Tokenizer
from transformers import PreTrainedModel

PIECE_CHARACTERS = 1 << 20
BATCH_WINDOWS = 8


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Token ids [tokens] as int64, encoded in pieces of a fixed length to bound the memory."""
    starts = range(0, len(text), PIECE_CHARACTERS)
    pieces = [tokenizer.encode(text[start : start + PIECE_CHARACTERS]).ids for start in starts]
    return np.concatenate([np.array(piece, dtype=np.int64) for piece in pieces])


def encode_split(tokenizer: Tokenizer, corpus_dir: Path, split: str) -> dict[str, np.ndarray]:
    """The token ids of every domain's split."""
    paths = {domain: split_path(corpus_dir, domain, split) for domain in DOMAINS}
    return {d: encode(tokenizer, path.read_text(encoding="utf-8")) for d, path in paths.items()}


def window_batches(token_ids: np.ndarray, every: int = 1) -> Iterator[torch.Tensor]:
    """Batches [at most 8, 513] of windows with the token after them; `every` skips windows."""
    starts = range(0, len(token_ids) - WINDOW_TOKENS, WINDOW_TOKENS * every)
    windows = [token_ids[start : start + WINDOW_TOKENS + 1] for start in starts]
    for first in range(0, len(windows), BATCH_WINDOWS):
        yield torch.from_numpy(np.stack(windows[first : first + BATCH_WINDOWS]))


@torch.no_grad()
def loss_sum(model: PreTrainedModel, token_ids: np.ndarray, every: int = 1) -> tuple[float, int]:
    """Summed negative log-likelihood in nats and the number of tokens predicted."""
    total, count = 0.0, 0
    for batch in window_batches(token_ids, every):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits.float()
        targets = batch[:, 1:].reshape(-1)
        losses = functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum")
        total += losses.item()
        count += targets.numel()
    return total, count


def perplexities(
    model: PreTrainedModel, tokens: dict[str, np.ndarray], every: int = 1
) -> dict[str, float]:
    """Perplexity of each domain, and `all`: over the tokens of all domains together."""
    sums = {domain: loss_sum(model, token_ids, every) for domain, token_ids in tokens.items()}
    sums["all"] = tuple(sum(column) for column in zip(*sums.values(), strict=True))
    return {domain: math.exp(total / count) for domain, (total, count) in sums.items()}
