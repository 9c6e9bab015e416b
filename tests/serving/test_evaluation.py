"""`atomic-moe eval`: perplexity as served equals what transformers computes on zeroed weights."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from tests.checkpoints import zero_pruned
from tests.serving.conftest import DEMO
from vllm_atomic_moe.cli import app
from vllm_atomic_moe.files.profiles import PruningProfile

COMMAND = [str(Path(sys.executable).parent / "atomic-moe"), "eval"]
LENGTH = 100


@torch.inference_mode()
def perplexity(model: Path, text: str) -> float:
    """Over windows of LENGTH tokens, first tokens not scored, float32."""
    ids = torch.tensor(AutoTokenizer.from_pretrained(DEMO)(text)["input_ids"])
    windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(windows).logits
    return math.exp(
        functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    )


def test_rows_and_numbers(tmp_path):
    texts = {}
    arguments = []
    for domain in ("c", "english"):
        source = DEMO.parent / "data" / f"{domain}.heldout.txt"
        texts[domain] = source.read_text()[:3000]
        (tmp_path / f"{domain}.txt").write_text(texts[domain])
        arguments += ["--data", f"{tmp_path / domain}.txt:{domain}"]
    command = [*COMMAND, str(DEMO), *arguments, "--profile", "heapr-40", "--json"]
    command += ["--seq-len", str(LENGTH), "--dtype", "float32"]
    command += ["--plot", str(tmp_path / "plots" / "perplexity.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    dense, pruned = json.loads(done.stdout)

    masks = PruningProfile.read(DEMO / "atomic_profiles" / "heapr-40.safetensors")
    zero_pruned(DEMO, tmp_path / "zeroed", masks)
    assert (dense["profile"], pruned["profile"]) == ("dense", "heapr-40")
    assert (dense["method"], pruned["method"]) == ("dense", "heapr")
    for domain in ("all", *texts):
        change = pruned["perplexity"][domain] / dense["perplexity"][domain] - 1
        assert pruned["delta"][domain] == pytest.approx(change)
        assert dense["delta"][domain] == 0
    assert (tmp_path / "plots" / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert pruned["kept_bytes"] == masks.kept_atoms * 3 * 128 * 4
    for domain, text in texts.items():
        for row, model in ((dense, DEMO), (pruned, tmp_path / "zeroed")):
            assert row["perplexity"][domain] == pytest.approx(perplexity(model, text), rel=1e-3)
    assert dense["tokens"]["all"] == sum(dense["tokens"][domain] for domain in texts)


def test_refusals_come_before_the_engine(tmp_path, monkeypatch):
    # The command sets them for its process.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
    monkeypatch.setenv("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    (tmp_path / "t.txt").write_text("word " * 600)
    # The first profile is good, the second has a good header only.
    shutil.copytree(DEMO / "atomic_profiles", tmp_path / "profiles")
    last = tmp_path / "profiles" / "heapr-40.safetensors"
    masks = PruningProfile.read(last)
    PruningProfile("heapr-40", {0: masks.keep[0]}, metadata=masks.metadata).write(last)
    for flags, words in (
        (["--profiles", str(tmp_path / "profiles")], "profile 'heapr-40': lacks layers [1, 2, 3]"),
        (["--profile", "none"], "profile 'none' is not in"),
        (["--data", f"{tmp_path / 't.txt'}:all"], "domain 'all' stands for all text together"),
        (["--seq-len", "512"], "sequence length 512: the model's context is 512"),
    ):
        command = ["eval", str(DEMO), "--data", str(tmp_path / "t.txt"), *flags]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 1
        assert "[1/" not in done.stderr
        assert words in done.stderr.splitlines()[-1]
