"""Text for calibration: files become windows of exactly `seq_len` tokens.

Documents are joined by EOS, per domain and in the order given, and cut into windows; the remainder
is dropped, so that nothing is ever padded.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from vllm_atomic_moe.calibration.data_paths import domain_of, exists, files_of
from vllm_atomic_moe.calibration.documents import read_documents
from vllm_atomic_moe.files.plain_files import one_line

DOCUMENTS_PER_BATCH = 256


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file of text.

    Attributes:
        path: an existing file with one of SUFFIXES.
        domain: of its text.
    """

    path: Path
    domain: str


@dataclass(frozen=True, slots=True)
class DataArgument:
    """One `PATH[:DOMAIN]` argument.

    Attributes:
        path: a file, a directory or a glob.
        files: its files, sorted by path.
        named: whether the domain is given; if not, it is the name of the file or directory.
    """

    path: Path
    files: tuple[DataFile, ...]
    named: bool

    @property
    def domain(self) -> str:
        """The domain of its files."""
        return self.files[0].domain


@dataclass(frozen=True, slots=True)
class Corpus:
    """A summary of one file.

    Attributes:
        name: file name, without directories.
        sha256: SHA-256 (hex) of the file's bytes.
        domain: the domain it belongs to.
        documents: number of documents with text.
        tokens: tokens of those documents, without the EOS that joins them.
        skipped: records whose text is null or empty.
    """

    name: str
    sha256: str
    domain: str
    documents: int
    tokens: int
    skipped: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class CalibrationText:
    """The windows of a run.

    Attributes:
        windows: domain -> int32 [windows, seq_len] token ids, domains in the order given. A
            negative id is padding; `draw_windows` makes none.
        corpora: one entry per file.
    """

    windows: Mapping[str, torch.Tensor]
    corpora: tuple[Corpus, ...]

    @property
    def num_windows(self) -> int:
        """Windows of all domains."""
        return sum(ids.shape[0] for ids in self.windows.values())

    @property
    def num_tokens(self) -> int:
        """Tokens of all windows of all domains, without padding."""
        return sum(int((ids >= 0).sum()) for ids in self.windows.values())

    @property
    def digests(self) -> dict[str, str]:
        """Domain -> SHA-256 (hex) over the shape and the ids of its windows, in order."""
        return {
            domain: hashlib.sha256(
                json.dumps([*ids.shape]).encode() + ids.contiguous().numpy().astype("<i4").tobytes()
            ).hexdigest()
            for domain, ids in self.windows.items()
        }

    @property
    def warnings(self) -> list[str]:
        """What a reader should know of the files, one line each."""
        return [
            f"{corpus.name}: {corpus.skipped} records without text were skipped"
            for corpus in self.corpora
            if corpus.skipped
        ]


def parse_files(arguments: Sequence[str]) -> list[DataFile]:
    """Read `PATH[:DOMAIN]` arguments: their files in the given order, those of each one sorted.

    Raises:
        ValueError: as `parse_data`; or two arguments without DOMAIN would get the same one.
    """
    parsed = [parse_data(argument) for argument in arguments]
    for index, data in enumerate(parsed):
        others = [
            one.path for one in parsed[:index] + parsed[index + 1 :] if one.domain == data.domain
        ]
        if others and data.path not in others and not data.named:
            raise ValueError(
                f"data {data.path} and {others[0]} would both be domain {data.domain!r}; name "
                f"their domains, as in {data.path}:{data.path.parent.name or 'NAME'}"
            )
    files = [file for data in parsed for file in data.files]
    for file, count in Counter(files).items():
        if count > 1:
            raise ValueError(f"data {file.path} is given twice; give every file once")
    return files


def parse_data(argument: str) -> DataArgument:
    """Read `PATH[:DOMAIN]`. A path may contain colons and *: an existing path has no DOMAIN.

    Raises:
        ValueError: the path does not exist, a suffix is unknown, a directory holds several kinds
            of files or a dataset with several splits, or the domain is empty.
    """
    path, domain = Path(argument), ""
    if not exists(path) and ":" in argument:
        head, domain = argument.rsplit(":", 1)
        path = Path(head)
        if exists(path) and not domain:
            raise ValueError(f"data {argument!r}: the domain after the colon is empty; name it")
    try:
        found = files_of(path)
    except ValueError as error:
        raise ValueError(f"data {argument!r}: {error}") from None
    named = domain or domain_of(path)
    return DataArgument(path, tuple(DataFile(file, named) for file in found), bool(domain))


def draw_windows(
    files: Sequence[DataFile],
    tokenizer: Any,
    seq_len: int,
    samples: int,
    seed: int,
    field: str | None = None,
) -> CalibrationText:
    """Tokenize the files and draw windows, per domain.

    Args:
        files: the files to read; those of one domain are joined in this order.
        tokenizer: a transformers tokenizer. The joining EOS is the only special token added.
        seq_len: tokens per window.
        samples: windows per domain, drawn without replacement; all of them, in order, if there
            are no more.
        seed: for drawing; a domain's draw does not depend on the other domains.
        field: as in `read_documents`.

    Raises:
        ValueError: a domain has less text than one window; it has several documents, but the
            tokenizer has no EOS to join them; the tokenizer is empty; or a file is unreadable.
    """
    if seq_len < 2 or samples < 1:
        raise ValueError(
            f"sequence length {seq_len} and samples {samples}: wanted at least 2 and 1"
        )
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed {seed}: wanted 0 to 2**63 - 1")
    corpora: list[Corpus] = []
    windows: dict[str, torch.Tensor] = {}
    for domain in dict.fromkeys(file.domain for file in files):
        of_domain = [file for file in files if file.domain == domain]
        ids, read = _tokenize_domain(of_domain, tokenizer, field)
        corpora += read
        windows[domain] = _draw(_cut(ids, domain, seq_len), samples, seed)
    return CalibrationText(windows, tuple(corpora))


def parse_shard(argument: str) -> tuple[int, int]:
    """Read `i/N`, 1 <= i <= N.

    Raises:
        ValueError: it is malformed.
    """
    number, slash, of = argument.partition("/")
    if not (slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise ValueError(f"shard {argument!r}: wanted i/N with 1 <= i <= N, such as 1/4")
    return int(number), int(of)


def take_shard(text: CalibrationText, number: int, of: int) -> CalibrationText:
    """Every `of`-th window, counted through all domains, starting with window `number`.

    Raises:
        ValueError: there are fewer windows than shards.
    """
    if text.num_windows < of:
        raise ValueError(
            f"shard {number}/{of}: the text makes {text.num_windows} windows, fewer than shards; "
            "use fewer shards or more text"
        )
    windows: dict[str, torch.Tensor] = {}
    passed = 0
    for domain, ids in text.windows.items():
        windows[domain] = ids[(number - 1 - passed) % of :: of]
        passed += ids.shape[0]
    return CalibrationText(windows, text.corpora)


def _cut(ids: torch.Tensor, domain: str, seq_len: int) -> torch.Tensor:
    """[tokens] -> [windows, seq_len], the remainder dropped."""
    count = ids.numel() // seq_len
    if count == 0:
        raise ValueError(
            f"domain {domain!r}: {ids.numel()} tokens, one window takes {seq_len}; "
            "give more text or a smaller --seq-len"
        )
    return ids[: count * seq_len].view(count, seq_len)


def _draw(windows: torch.Tensor, samples: int, seed: int) -> torch.Tensor:
    if windows.shape[0] <= samples:
        return windows
    generator = torch.Generator().manual_seed(seed)
    return windows[torch.randperm(windows.shape[0], generator=generator)[:samples]]


def _tokenize_domain(
    files: Sequence[DataFile], tokenizer: Any, field: str | None
) -> tuple[torch.Tensor, list[Corpus]]:
    """Token ids of all documents, joined by EOS: int32 [tokens]; and a summary of each file."""
    pieces: list[torch.Tensor] = []
    corpora: list[Corpus] = []
    for file in files:
        documents = tokens = 0
        skipped = Counter[bool]()
        texts = _with_text(read_documents(file.path, tokenizer, field), skipped)
        for ids in _tokenize(texts, tokenizer):
            if pieces:
                pieces.append(_end_of_sequence(tokenizer, file))
            pieces.append(torch.tensor(ids, dtype=torch.int32))
            documents, tokens = documents + 1, tokens + len(ids)
        if documents and not tokens:
            raise ValueError(
                f"{file.path}: the model's tokenizer makes no tokens of {documents} documents; "
                "are its tokenizer files beside the checkpoint?"
            )
        with file.path.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        corpora.append(
            Corpus(file.path.name, sha256, file.domain, documents, tokens, skipped[True])
        )
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int32), corpora


def _with_text(documents: Iterable[str | None], skipped: Counter[bool]) -> Iterator[str]:
    """The documents that are not empty; count the others."""
    for document in documents:
        skipped[not document] += 1
        if document:
            yield document


def _tokenize(documents: Iterator[str], tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of every document."""
    while batch := list(islice(documents, DOCUMENTS_PER_BATCH)):
        # verbose=False: no warning about documents longer than the context; we cut them anyway.
        try:
            encoded = tokenizer(
                batch, add_special_tokens=False, return_attention_mask=False, verbose=False
            )
        except Exception as error:  # A tokenizer may be the model's own code.
            raise ValueError(
                f"the model's tokenizer fails ({type(error).__name__}: {one_line(error)})"
            ) from error
        yield from encoded["input_ids"]


def _end_of_sequence(tokenizer: Any, file: DataFile) -> torch.Tensor:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{file.path}: several documents are joined by EOS, and the model's tokenizer has no "
            "EOS token; give one .txt file per domain"
        )
    return torch.tensor([tokenizer.eos_token_id], dtype=torch.int32)
