"""Cut the small texts that are committed with the model: what to calibrate on, what to judge on.

The demo prunes the model for a domain and measures what that costs. Both texts must be there
without the corpus, and must not overlap: calibration text comes out of the training split and
held-out text out of the test split, each in pieces spread over the whole split.
"""

import argparse
from pathlib import Path

from layout import BUILD_DIR, DEMO_DIR, DOMAINS, split_path

PIECE_CHARACTERS = 4_000
EXCERPTS = {"calibration": ("train", 12), "heldout": ("test", 8)}  # name: split, pieces


def line_start(text: str, position: int) -> int:
    """The start of the first line that begins at or after a position."""
    return 0 if position == 0 else text.index("\n", position - 1) + 1


def spread_excerpt(text: str, pieces: int) -> str:
    """Pieces of whole lines that start at equal distances along the text."""
    starts = [line_start(text, index * len(text) // pieces) for index in range(pieces)]
    return "".join(text[start : line_start(text, start + PIECE_CHARACTERS)] for start in starts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=BUILD_DIR / "corpus")
    parser.add_argument("--data", type=Path, default=DEMO_DIR / "data")
    arguments = parser.parse_args()
    arguments.data.mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        for name, (split, pieces) in EXCERPTS.items():
            text = split_path(arguments.corpus, domain, split).read_text(encoding="utf-8")
            content = spread_excerpt(text, pieces).encode()
            (arguments.data / f"{domain}.{name}.txt").write_bytes(content)
            print(f"{domain}.{name}.txt: {len(content):,} bytes", flush=True)


if __name__ == "__main__":
    main()
