"""Names that every step of the recipe shares: the domains, the splits and where things lie.

The steps are separate programs so that each can be run, read and repeated on its own; this file
is the only thing they have to agree on.
"""

from pathlib import Path

DOMAINS = ("english", "spanish", "french", "python", "c", "json", "man", "rst")
SPLITS = ("train", "valid", "test")
END_OF_TEXT = "<|endoftext|>"
WINDOW_TOKENS = 512  # context length of the model, and of every window it is trained and judged on

RECIPE_DIR = Path(__file__).resolve().parent
DEMO_DIR = RECIPE_DIR.parent
BUILD_DIR = DEMO_DIR.parents[1] / "build" / "demo"  # at the root of the repository, not in git


def split_path(corpus_dir: Path, domain: str, split: str) -> Path:
    """The text file of one domain's `train`, `valid` or `test` split."""
    return corpus_dir / f"{domain}.{split}.txt"
