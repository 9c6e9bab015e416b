"""Quality as served: perplexity, and agreement with dense in predictions and greedy answers.

Engines run one after another in this process: the dense model in vLLM's own loader, then as many
profiles as an engine holds, one by one over the same windows of text. This needs
`VLLM_ENABLE_V1_MULTIPROCESSING=0` before vLLM is imported (`api.evaluate` sets it).
"""

from __future__ import annotations

import gc
import json
import logging
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from vllm_atomic_moe.calibration.model import (
    ALL_OF_IT,
    check_model_code,
    check_tokenizer_code,
    load_tokenizer,
)
from vllm_atomic_moe.calibration.text import CalibrationText, draw_windows, parse_files
from vllm_atomic_moe.engine import LOAD_FORMAT
from vllm_atomic_moe.engine.options import (
    dense_through_loader,
    profile_directory,
    profiles_to_measure,
)
from vllm_atomic_moe.engine.requests import ARGUMENT
from vllm_atomic_moe.experts.encoding import dense_bytes
from vllm_atomic_moe.experts.packing import SLOTS
from vllm_atomic_moe.files.checkpoint import describe_checkpoint, resolve_model
from vllm_atomic_moe.files.config import context_length, read_config
from vllm_atomic_moe.files.plain_files import one_line
from vllm_atomic_moe.files.profiles import DENSE, ProfileStore, PruningProfile
from vllm_atomic_moe.measure.incomplete import IncompleteError
from vllm_atomic_moe.measure.likeness import Answers, Predictions, compare_answers, divergence

logger = logging.getLogger(f"vllm.{__name__}")

ALL_DOMAINS = "all"
MAX_SEQ_LEN = 2048
# Number of windows to compare with dense, and number of likeliest tokens to compare, or the whole
# vocabulary if it is smaller.
COMPARED, LIKELIEST = 128, 256
PROMPT_TOKENS, ANSWER_TOKENS = 256, 32
# Maximum log-probabilities per call, since vLLM turns them into Python objects.
TOLD_AT_ONCE = 2**22

Progress = Callable[[int, int, str], None]
"""Called with (rows done, rows in all, next profile)."""


@dataclass(frozen=True, slots=True)
class Row:
    """The measurements of one profile.

    Attributes:
        profile: its name; `dense` uses vLLM's own loader, or ours for quantized experts on a CPU.
        method: from its metadata, "" if unknown; `dense` for the dense model.
        settings: options of the method, except ratio and seed (JSON).
        kept: fraction of atoms kept.
        kept_bytes: bytes of those atoms as served, scales included.
        perplexity: domain -> perplexity; `all` is over the tokens of all domains.
        tokens: domain -> tokens scored (the first of a window is not).
        windows: domain -> log-likelihood of each of its windows, in nats.
        kl: domain -> mean `divergence` from dense over the scored tokens of its compared windows,
            in nats; `all` is over those of all domains.
        answers: agreement of greedy answers to the beginnings of the compared windows.
    """

    profile: str
    method: str
    settings: str
    kept: float
    kept_bytes: int
    perplexity: Mapping[str, float]
    tokens: Mapping[str, int]
    windows: Mapping[str, Sequence[float]]
    kl: Mapping[str, float]
    answers: Answers


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """The results of one profile.

    Attributes:
        predictions: domain -> predictions for each of its windows; those of the first windows,
            which are compared with dense, have the likeliest tokens.
        answers: token ids of the greedy answer to the beginning of each compared window.
        itemsize: bytes of a number of the engine's dtype.
    """

    predictions: Mapping[str, Sequence[Predictions]]
    answers: Sequence[Sequence[int]]
    itemsize: int


@contextmanager
def engine(model: Path | str, **options: Any) -> Iterator[LLM]:
    """A vLLM engine in this process; its memory is freed at the end."""
    llm = None
    try:
        llm = LLM(str(model), **options)
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        torch._dynamo.reset()
        gc.collect()


def predictions(
    llm: LLM, prompts: Sequence[Sequence[int]], likeliest: int = 0, profile: str | None = None
) -> list[Predictions]:
    """The engine's predictions for all tokens of every prompt except its first.

    Args:
        llm: an engine whose `max_logprobs` is at least `likeliest`.
        prompts: token ids, at least two each.
        likeliest: number of likeliest tokens besides the actual one; at most the vocabulary.
        profile: its name; None where the engine has no profiles, or means the active one.
    """
    settings = SamplingParams(
        max_tokens=1,
        temperature=0,
        prompt_logprobs=likeliest,
        flat_logprobs=True,
        detokenize=False,
        extra_args=_naming(profile),
    )
    outputs = llm.generate(
        [{"prompt_token_ids": list(prompt)} for prompt in prompts], settings, use_tqdm=False
    )
    shape = (-1, 1 + likeliest)
    return [
        Predictions(
            torch.tensor(output.prompt_logprobs.token_ids, dtype=torch.int32).view(shape),
            torch.tensor(output.prompt_logprobs.logprobs).view(shape),
        )
        for output in outputs
    ]


def prompt_logprobs(llm: LLM, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
    """Log-probabilities of all tokens of every prompt except its first."""
    return [of_prompt.of_text for of_prompt in predictions(llm, prompts)]


def greedy_answers(
    llm: LLM, prompts: Sequence[Sequence[int]], tokens: int, profile: str | None = None
) -> list[Sequence[int]]:
    """Token ids of the greedy answers, at most `tokens` each; `profile` as in `predictions`."""
    outputs = llm.generate(
        [{"prompt_token_ids": list(prompt)} for prompt in prompts],
        SamplingParams(
            max_tokens=tokens, temperature=0, detokenize=False, extra_args=_naming(profile)
        ),
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def evaluate(
    model: str,
    profiles: str | None,
    data: Sequence[str],
    *,
    names: Sequence[str] = (),
    seq_len: int | None = None,
    samples: int = 128,
    compared: int = COMPARED,
    dtype: str = "auto",
    field: str | None = None,
    trust_remote_code: bool = False,
    on_progress: Progress = lambda done, total, name: None,
) -> list[Row]:
    """Measure the dense model and every profile on the same text.

    Args:
        model: a local directory or a Hugging Face id.
        profiles: directory of profile files, or a Hub repository of them; None means
            MODEL/atomic_profiles.
        data: `PATH[:DOMAIN]` arguments.
        names: profiles to measure; empty means all.
        seq_len: tokens per window; None means the model's context, 2048 at most.
        samples: maximum windows per domain, drawn with seed 0.
        compared: windows to compare with dense, at least 1; rounded up to the same number per
            domain.
        dtype: as vLLM's --dtype.
        field: field or column of the data files; None for `text`, else `messages`.
        trust_remote_code: whether the model's own Python files may run.
        on_progress: called before every row and at the end.

    Raises:
        ValueError: text, model, profile or sequence length is refused, before any engine starts.
        IncompleteError: vLLM fails; it has the rows measured before.
    """
    files = parse_files(data)
    if any(file.domain == ALL_DOMAINS for file in files):
        raise ValueError(
            f"domain {ALL_DOMAINS!r} stands for all text together; give the file's domain another "
            "name (PATH:DOMAIN)"
        )
    directory = resolve_model(model)
    checkpoint = describe_checkpoint(directory)
    store = ProfileStore(profile_directory(profiles, directory, None))
    chosen = profiles_to_measure(store, checkpoint, names)
    length = _window_length(read_config(directory), seq_len)
    check_model_code(directory, trust_remote_code)
    check_tokenizer_code(directory, trust_remote_code)
    tokenizer = load_tokenizer(directory, trust_remote_code)
    text = draw_windows(files, tokenizer, length, samples, 0, field)
    for warning in text.warnings:
        logger.warning("%s", warning)

    rows: list[Row] = []
    dense: Served | None = None
    position = {profile.name: number for number, profile in enumerate(chosen)}
    for group in _engines(chosen, dense_through_loader(checkpoint)):
        options = group.load_options(store) | {"dtype": dtype, "max_model_len": length + 1}
        options["trust_remote_code"] = trust_remote_code
        with closing(_serve(directory, text, group.names, compared, **options)) as results:
            for number, profile in enumerate(group.profiles):
                on_progress(len(rows), len(chosen), profile.name)
                try:
                    served = next(results)
                except Exception as error:  # vLLM raises exceptions of any kind.
                    # The first one starts the engine, with all of them.
                    failed = group.profiles[number : number + 1] if number else group.profiles
                    name = ", ".join(it.name for it in failed)
                    line = f"{name}: {error}"
                    if not isinstance(error, ValueError):
                        kind = type(error).__name__
                        line = f"{name}: vLLM fails ({kind}: {one_line(error)}){ALL_OF_IT}"
                    raise IncompleteError(line, rows) from error
                dense = dense or served  # Dense comes first.
                of_dense = dense_bytes(checkpoint, served.itemsize)
                kept_bytes = profile.kept_atoms * of_dense // checkpoint.atoms
                rows.append(_summarize(profile, kept_bytes, served, dense, answer_tokens(length)))
    on_progress(len(rows), len(chosen), "")
    return sorted(rows, key=lambda row: position[row.profile])


def prompt_tokens(length: int) -> int:
    """Tokens per prompt from a window of `length` tokens: half of them, 256 at most."""
    return min(PROMPT_TOKENS, length // 2)


def answer_tokens(length: int) -> int:
    """Tokens per answer: as many as fit, since a window leaves one token of the context free."""
    return min(ANSWER_TOKENS, length + 1 - prompt_tokens(length))


@dataclass(frozen=True, slots=True)
class _Engine:
    """What one engine measures.

    Attributes:
        profiles: in order; the first is active.
        stock: whether vLLM's own loader reads the model, which is dense.
    """

    profiles: Sequence[PruningProfile]
    stock: bool = False

    @property
    def names(self) -> list[str | None]:
        """Names of the profiles for requests."""
        return [None if self.stock else profile.name for profile in self.profiles]

    def load_options(self, store: ProfileStore) -> dict[str, Any]:
        """Options of vLLM's engine."""
        if self.stock:
            return {}
        active, *resident = self.names
        extra = {"profiles": str(store.directory), "active": active, "resident": resident}
        return {"load_format": LOAD_FORMAT, "model_loader_extra_config": extra}


def _engines(chosen: Sequence[PruningProfile], own_loader: bool) -> list[_Engine]:
    """The engines for profiles of which dense comes first; `own_loader` also reads dense.

    Profiles that not every model can serve, since they mask routing, have engines of their own.
    """
    stock = 0 if own_loader else 1
    found = [_Engine([it], stock=True) for it in chosen[:stock]]
    for masking in (False, True):
        alike = [it for it in chosen[stock:] if it.masks_routing == masking]
        found += [_Engine(alike[at : at + SLOTS]) for at in range(0, len(alike), SLOTS)]
    return found


def _serve(
    directory: Path,
    text: CalibrationText,
    profiles: Sequence[str | None],
    compared: int,
    **options: Any,
) -> Generator[Served]:
    """Start one engine in which each profile scores the text and answers some beginnings."""
    with engine(
        directory,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
        max_logprobs=LIKELIEST,
        **options,
    ) as llm:
        config = llm.llm_engine.vllm_config.model_config
        likeliest = min(LIKELIEST, config.get_vocab_size())
        compared = -(-compared // len(text.windows))
        for profile in profiles:
            scored: dict[str, list[Predictions]] = {}
            prompts: list[list[int]] = []
            for domain, ids in text.windows.items():
                length = ids.shape[1]
                scored[domain] = [
                    of_window
                    for windows, told in ((ids[:compared], likeliest), (ids[compared:], 0))
                    for part in windows.split(max(1, TOLD_AT_ONCE // (length * (1 + told))))
                    if len(part)
                    for of_window in predictions(llm, part.tolist(), told, profile)
                ]
                prompts += ids[:compared, : prompt_tokens(length)].tolist()
            answers = greedy_answers(llm, prompts, answer_tokens(length), profile)
            yield Served(scored, answers, config.dtype.itemsize)


def _naming(profile: str | None) -> dict[str, str] | None:
    """Extra arguments of a request for a profile."""
    return {ARGUMENT: profile} if profile else None


def _window_length(config: Mapping[str, Any], seq_len: int | None) -> int:
    """Tokens per window; vLLM needs room for one generated token after a prompt."""
    context = context_length(config) or MAX_SEQ_LEN + 1
    if seq_len is None:
        return min(MAX_SEQ_LEN, context - 1)
    if seq_len >= context:
        raise ValueError(
            f"sequence length {seq_len}: the model's context is {context} tokens and vLLM keeps "
            f"one free; use --seq-len {context - 1} or less"
        )
    return seq_len


def _settings(profile: PruningProfile) -> str:
    """Options and calibrated domains from its metadata, without the seed; JSON."""
    told: dict[str, Any] = {}
    for key in ("method_options", "selection", "calibration"):
        with suppress(ValueError):
            told[key] = json.loads(profile.metadata.get(key, "{}"))
    calibration = told.pop("calibration", None)
    if isinstance(calibration, dict):
        told["domains"] = calibration.get("domains")
    if isinstance(told.get("method_options"), dict):
        told["method_options"].pop("seed", None)
    return json.dumps(told, sort_keys=True)


def _summarize(
    profile: PruningProfile, kept_bytes: int, served: Served, dense: Served, tokens: int
) -> Row:
    scores = {
        domain: [of_window.of_text for of_window in windows]
        for domain, windows in served.predictions.items()
    }
    windows = {domain: [*map(math.fsum, rows)] for domain, rows in scores.items()}
    counts = {domain: sum(map(len, rows)) for domain, rows in scores.items()}
    diverged = {
        domain: torch.cat(
            [
                divergence(of_dense, of_window)
                for of_dense, of_window in zip(dense.predictions[domain], of_domain, strict=True)
                if of_window.ids_TA.shape[1] > 1
            ]
        )
        for domain, of_domain in served.predictions.items()
    }
    diverged[ALL_DOMAINS] = torch.cat([*diverged.values()])
    likelihoods = {domain: math.fsum(of_domain) for domain, of_domain in windows.items()}
    likelihoods[ALL_DOMAINS] = math.fsum(likelihoods.values())
    counts[ALL_DOMAINS] = sum(counts.values())
    return Row(
        profile=profile.name,
        method=DENSE if profile.name == DENSE else profile.metadata.get("method", ""),
        settings=_settings(profile),
        kept=profile.kept,
        kept_bytes=kept_bytes,
        perplexity={it: math.exp(-total / counts[it]) for it, total in likelihoods.items()},
        tokens=counts,
        windows=windows,
        kl={it: float(of_token.mean()) for it, of_token in diverged.items()},
        answers=compare_answers(dense.answers, served.answers, tokens),
    )
