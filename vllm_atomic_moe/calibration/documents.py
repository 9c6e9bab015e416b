"""Text files -> documents: plain text, JSON, lines of JSON, parquet, Arrow, also compressed."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from vllm_atomic_moe.files.plain_files import check_not_pointer, one_line

# The first three also followed by .gz; upper or lower case.
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet", ".arrow")
COLUMNAR = (".parquet", ".arrow")
# An Arrow file with random access starts with this; otherwise it is a stream.
ARROW_FILE = b"ARROW1"
FIELDS = ("text", "messages")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def split_name(path: Path) -> tuple[str, str, bool]:
    """Stem, suffix in lower case, and whether the file is compressed."""
    name = Path(path.name)
    compressed = name.suffix.lower() == ".gz"
    if compressed:
        name = Path(name.stem)
    suffix = name.suffix.lower()
    # A compressed parquet file does not exist: parquet compresses itself.
    known = suffix in SUFFIXES and not (compressed and suffix in COLUMNAR)
    return (name.stem, suffix, compressed) if known else (path.stem, "", False)


def read_documents(
    path: Path, tokenizer: Any = None, field: str | None = None
) -> Iterator[str | None]:
    """Documents of a file: a .txt is one; others have one per line, entry or row, None if empty.

    Args:
        path: the file, with one of SUFFIXES.
        tokenizer: whose chat template turns a list of messages into text.
        field: field or column to read; None means the first of FIELDS that exists.

    Raises:
        ValueError: the file is a Git LFS pointer, not UTF-8, or broken, or a record lacks the
            field or has no text in it.
    """
    check_not_pointer(path)
    _, suffix, _ = split_name(path)
    try:
        if suffix == ".txt":
            with _open_text(path) as file:
                yield file.read()
            return
        records = _read_columns(path, field) if suffix in COLUMNAR else _read_json(path)
        for place, record in records:
            yield _document(record, field, tokenizer, f"{path}: {place}")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 at byte {error.start} of what was read; convert it"
        ) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a complete gzip file ({error}); fetch it again") from None


def _open_text(path: Path) -> IO[str]:
    """A text file, compressed or not; a byte order mark is dropped."""
    opened = gzip.open if split_name(path)[2] else open
    return opened(path, "rt", encoding="utf-8-sig")


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """Place and record: the entries of a file that is one list, else one record per line."""
    with _open_text(path) as file:
        head = file.read(4096)
        file.seek(0)
        if split_name(path)[1] == ".json" and head.lstrip().startswith("["):
            try:
                entries = json.load(file)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}: not a JSON list ({error})") from None
            yield from ((f"entry {number}", entry) for number, entry in enumerate(entries, 1))
            return
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}: line {number} is not JSON ({error})") from None


def _document(record: Any, field: str | None, tokenizer: Any, place: str) -> str | None:
    """The text of one record; None if it is null."""
    if record is None:
        return None
    if not isinstance(record, dict):
        raise ValueError(f"{place} is a {type(record).__name__}, wanted an object with a text")
    name = next((name for name in ((field,) if field else FIELDS) if name in record), None)
    if name is None:
        there = ", ".join(map(str, record))[:100] or "none"
        raise ValueError(
            f"{place} has no field `{field or FIELDS[0]}`; its fields are {there}: name one with "
            "--field"
        )
    value = record[name]
    if isinstance(value, list) and value:
        value = _render_chat(value, tokenizer, f"{place}, `{name}`")
    if value is None or value == []:
        return None
    if not isinstance(value, str):
        raise ValueError(
            f"{place}: `{name}` is a {type(value).__name__}, wanted a string or a list of messages"
        )
    return LONE_SURROGATE.sub("\ufffd", value)


def _render_chat(messages: list[Any], tokenizer: Any, place: str) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{place} holds messages, and the model's tokenizer has no chat template; name a field "
            "of text with --field"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # The template is the model's own program.
        raise ValueError(
            f"{place}: the model's chat template refuses it ({one_line(error)})"
        ) from error


def _read_columns(path: Path, field: str | None) -> Iterator[tuple[str, Any]]:
    """Place and record of every row, with only the column that is read."""
    from pyarrow import ArrowException

    number = 0
    try:
        with ExitStack() as opened:
            schema, batches = _open_columns(path, opened)
            name = _text_column(path, schema, field)
            for batch in batches(name):
                for value in batch.column(name).to_pylist():
                    number += 1
                    yield f"row {number}", {name: value}
    except (ArrowException, OSError) as error:  # Broken pages are plain OSErrors.
        kind = split_name(path)[1].removeprefix(".")
        raise ValueError(f"{path}: not a readable {kind} file ({one_line(error)})") from None


def _open_columns(path: Path, opened: ExitStack) -> tuple[Any, Callable[[str], Iterator[Any]]]:
    """The schema of a file, and a function that returns the batches of one column."""
    from pyarrow import ipc, parquet

    if split_name(path)[1] == ".parquet":
        table = opened.enter_context(parquet.ParquetFile(path))
        return table.schema_arrow, lambda name: table.iter_batches(1024, columns=[name])
    file = opened.enter_context(path.open("rb"))
    if file.peek(len(ARROW_FILE)).startswith(ARROW_FILE):
        reader = opened.enter_context(ipc.open_file(file))
        return reader.schema, lambda _: map(reader.get_batch, range(reader.num_record_batches))
    stream = opened.enter_context(ipc.open_stream(file))
    return stream.schema, lambda _: iter(stream)


def _text_column(path: Path, schema: Any, field: str | None) -> str:
    columns = {column.name: column.type for column in schema}
    for name in (field,) if field else FIELDS:
        if _holds_text(columns.get(name)):
            return name
    there = ", ".join(f"{name} ({kind})" for name, kind in columns.items())
    raise ValueError(
        f"{path}: no column `{field or FIELDS[0]}` of strings or messages among {there[:160]}; "
        "name one with --field"
    )


def _holds_text(kind: Any) -> bool:
    """Whether a column may hold text: strings of any encoding, lists (messages), or only nulls, as
    in a shard without text.
    """
    from pyarrow import types

    if kind is None:
        return False
    if types.is_dictionary(kind):
        kind = kind.value_type
    strings = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    lists = (types.is_list, types.is_large_list, types.is_list_view, types.is_large_list_view)
    return any(test(kind) for test in (*strings, *lists))
