"""How close a profile is to dense: KL divergence of predictions, agreement of greedy answers.

Legend: T positions, K likeliest tokens, A entries of a position: its own token, then the likeliest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# A remaining probability below this is float32 rounding.
ROUNDING = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """A model's predictions for the tokens of one window, except the first.

    Attributes:
        ids_TA: int32 [T, 1+K], the next token of the text, then the K likeliest, which may include
            it.
        logprobs_TA: float32 [T, 1+K], their log-probabilities over the whole vocabulary.
    """

    ids_TA: torch.Tensor
    logprobs_TA: torch.Tensor

    @property
    def of_text(self) -> list[float]:
        """Log-probabilities of the tokens of the text."""
        return self.logprobs_TA[:, 0].tolist()


@dataclass(frozen=True, slots=True)
class Answers:
    """Agreement of a profile's greedy answers with dense's.

    Attributes:
        prompts: number of prompts.
        tokens: maximum tokens per answer.
        equal: fraction of the answers that equal dense's, token by token.
        common: mean fraction of an answer before the first difference.
    """

    prompts: int
    tokens: int
    equal: float
    common: float


def divergence(dense: Predictions, other: Predictions) -> torch.Tensor:
    """KL divergence of `other` from `dense` at every position, in nats: float64 [T].

    The sum covers the tokens that both models report, and the rest of the vocabulary as one token:
    a lower bound of the divergence, exact if both report the whole vocabulary.
    """
    match_TAA = dense.ids_TA[:, :, None] == other.ids_TA[:, None, :]
    there_TA = match_TAA.any(dim=2)
    # The next token is the first entry; do not count it again among the likeliest.
    there_TA[:, 1:] &= dense.ids_TA[:, 1:] != dense.ids_TA[:, :1]
    log_q_TA = other.logprobs_TA.double().gather(1, match_TAA.int().argmax(dim=2))
    log_p_TA = dense.logprobs_TA.double()
    p_TA, q_TA = log_p_TA.exp() * there_TA, log_q_TA.exp() * there_TA
    told_T = torch.where(p_TA > 0, p_TA * (log_p_TA - log_q_TA), 0).sum(dim=1)
    rest_p_T, rest_q_T = ((1 - told.sum(dim=1)).clamp_min(ROUNDING) for told in (p_TA, q_TA))
    return told_T + rest_p_T * (rest_p_T / rest_q_T).log()


def compare_answers(
    dense: Sequence[Sequence[int]], other: Sequence[Sequence[int]], tokens: int
) -> Answers:
    """Compare answers to the same prompts, at least one, of at most `tokens` token ids each."""
    common = [
        _common_prefix(one, two) / max(len(one), len(two), 1)
        for one, two in zip(dense, other, strict=True)
    ]
    equal = sum(part == 1 for part in common)
    return Answers(len(common), tokens, equal / len(common), sum(common) / len(common))


def _common_prefix(one: Sequence[int], two: Sequence[int]) -> int:
    pairs = enumerate(zip(one, two, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(one), len(two)))
