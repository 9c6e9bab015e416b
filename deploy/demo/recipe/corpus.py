"""Build the eight-domain corpus: shuffle, cap and split the documents of each source.

A pruning method can only show what it does to domains if the domains differ and weigh the same,
so every domain is capped at the same size and split the same way, in blocks that alternate along
the whole text rather than at one end of it.
"""

import argparse
import hashlib
import json
from pathlib import Path

from layout import BUILD_DIR, DOMAINS, SPLITS, split_path
from readers import READERS

DOMAIN_BYTES = 4_500_000  # text kept per domain
BLOCK_CHARACTERS = 16_384  # length of one contiguous block, before it is extended to a line end
VALID_BLOCK, TEST_BLOCK, CYCLE = 7, 17, 20  # which block of every twenty goes to which split


def shuffled_text(documents: list[str]) -> str:
    """The distinct documents in the order of their digests: random, but the same every time."""
    distinct = {hashlib.sha256(document.encode()).digest(): document for document in documents}
    return "\n".join(distinct[digest] for digest in sorted(distinct)).replace("\r\n", "\n")


def cut_blocks(text: str) -> list[str]:
    """Contiguous blocks that end at a line end, until the domain has its bytes."""
    blocks, start, size = [], 0, 0
    while start < len(text) and size < DOMAIN_BYTES:
        line_end = text.find("\n", start + BLOCK_CHARACTERS)
        end = len(text) if line_end < 0 else line_end + 1
        blocks.append(text[start:end])
        size += len(blocks[-1].encode())
        start = end
    return blocks


def split_of(block_index: int) -> str:
    """The split that a block belongs to."""
    return {VALID_BLOCK: "valid", TEST_BLOCK: "test"}.get(block_index % CYCLE, "train")


def write_domain(domain: str, downloads: Path, corpus_dir: Path) -> dict[str, int]:
    """Write the three splits of one domain; return their sizes in bytes."""
    documents = READERS[domain](downloads)
    blocks = cut_blocks(shuffled_text(documents))
    sizes = {"documents": len(documents)}
    for split in SPLITS:
        chosen = [block for index, block in enumerate(blocks) if split_of(index) == split]
        content = "".join(chosen).encode()
        split_path(corpus_dir, domain, split).write_bytes(content)
        sizes[f"{split}_bytes"] = len(content)
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--downloads", type=Path, default=BUILD_DIR / "downloads")
    parser.add_argument("--corpus", type=Path, default=BUILD_DIR / "corpus")
    arguments = parser.parse_args()
    arguments.corpus.mkdir(parents=True, exist_ok=True)
    statistics = {}
    for domain in DOMAINS:
        statistics[domain] = write_domain(domain, arguments.downloads, arguments.corpus)
        print(domain, statistics[domain], flush=True)
    report = json.dumps(statistics, indent=1) + "\n"
    (arguments.corpus / "corpus.json").write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()
