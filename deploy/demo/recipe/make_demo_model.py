"""Make a small model from nothing but package names: the whole recipe, top to bottom.

Every step is a program of its own in this folder. About 35 minutes on two idle cores, nearly all
of it training. `--output` leaves the shipped model alone: for a quick trial, with `--steps`, or for
another kind of model, with `--kind`.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from kinds import KINDS
from layout import BUILD_DIR, DEMO_DIR, RECIPE_DIR

# Two threads, as pinned in the steps; passive waiting keeps them from spinning on a busy machine.
ENVIRONMENT = {
    **{"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"},
    # Keep freed memory: glibc would map and clear the large tensors anew in every step.
    **{"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 33)},
}


def run_step(script: str, **options: object) -> None:
    """Run one step and stop the recipe when it fails."""
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    print(f"--- {script}", flush=True)
    command = [sys.executable, str(RECIPE_DIR / script), *arguments]
    status = subprocess.run(command, env=os.environ | ENVIRONMENT).returncode
    if status != 0:
        sys.exit(f"{script} ended with status {status}, expected 0; its message is above")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=BUILD_DIR, help="downloads and corpus")
    parser.add_argument("--output", type=Path, default=DEMO_DIR, help="gets model/ and data/")
    parser.add_argument("--kind", choices=KINDS, default="qwen3", help="what to train")
    parser.add_argument("--steps", type=int, help="training steps, if not those of the kind")
    options = parser.parse_args()
    downloads, corpus = options.build / "downloads", options.build / "corpus"
    tokenizer, training = options.build / "tokenizer.json", options.build / "training.json"
    model, data = options.output / "model", options.output / "data"

    run_step("fetch.py", downloads=downloads)
    run_step("corpus.py", downloads=downloads, corpus=corpus)
    run_step("train_tokenizer.py", corpus=corpus, tokenizer=tokenizer)
    run_step(
        "train.py",
        corpus=corpus,
        tokenizer=tokenizer,
        model=model,
        report=training,
        kind=options.kind,
        steps=options.steps or KINDS[options.kind].steps,
    )
    run_step("excerpts.py", corpus=corpus, data=data)
    run_step("analyse.py", corpus=corpus, training=training, demo=options.output)
    run_step("card.py", demo=options.output)


if __name__ == "__main__":
    main()
