"""Train the model's byte-level BPE tokenizer on the training text alone.

Eight domains in 4096 entries need a tokenizer of their own: a borrowed one would be larger than
the model. Numbers are cut into at most two digits, so that they do not use up the vocabulary.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from layout import BUILD_DIR, DOMAINS, END_OF_TEXT, split_path
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY_SIZE = 4096
PIECE_CHARACTERS = 20_000
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def untrained_tokenizer() -> Tokenizer:
    """A BPE tokenizer that splits text as GPT-like models do and can write every byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern=Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def training_pieces(corpus_dir: Path) -> Iterator[str]:
    """The training text of all domains, in pieces of a fixed length."""
    for domain in DOMAINS:
        text = split_path(corpus_dir, domain, "train").read_text(encoding="utf-8")
        for start in range(0, len(text), PIECE_CHARACTERS):
            yield text[start : start + PIECE_CHARACTERS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=BUILD_DIR / "corpus")
    parser.add_argument("--tokenizer", type=Path, default=BUILD_DIR / "tokenizer.json")
    arguments = parser.parse_args()
    tokenizer = untrained_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_pieces(arguments.corpus), trainer)
    tokenizer.save(str(arguments.tokenizer))
    for domain in DOMAINS:
        text = split_path(arguments.corpus, domain, "valid").read_text(encoding="utf-8")
        bytes_per_token = len(text.encode()) / len(tokenizer.encode(text).ids)
        print(f"{domain:8s} {bytes_per_token:.2f} bytes per token", flush=True)


if __name__ == "__main__":
    main()
