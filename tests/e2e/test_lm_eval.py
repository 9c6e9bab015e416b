"""lm-eval on a profile, as docs/pruning.md says; and datasets that its environment saves."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.checkpoints import zero_pruned
from tests.documents import blocks, example, run
from tests.e2e.conftest import DEMO, ENVIRONMENT, ROOT, free_port
from vllm_atomic_moe.calibration.documents import read_documents
from vllm_atomic_moe.calibration.text import parse_files
from vllm_atomic_moe.files.profiles import PruningProfile

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]

# The environment of the tests, with lm-eval's packages behind its own.
PRELUDE = """
lm_eval() { "$PYTHON" -m lm_eval "$@" --log_samples --output_path results; }
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of a process that finds lm-eval, and caches nothing elsewhere."""
    installed = ROOT / "build/lm-eval/.installed"
    done = subprocess.run(
        ["make", str(installed.relative_to(ROOT)), f"BIN={Path(sys.executable).parent}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"lm-eval cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    paths = [str(ROOT), str(installed.parent), os.environ.get("PYTHONPATH", "")]
    return {
        **ENVIRONMENT,
        "PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HOME": str(tmp_path_factory.mktemp("cache")),
    }


def write_task(directory: Path, count: int) -> list[dict[str, object]]:
    """Write passages with their endings, and the same endings with reversed words."""
    words = (DEMO.parent / "data/english.heldout.txt").read_text().split(" ")
    rows: list[dict[str, object]] = []
    for index in range(count):
        passage = words[index * 60 : index * 60 + 50]
        endings = [" ".join(passage[40:]), " ".join(passage[:39:-1])]
        right = index % 2
        rows.append(
            {"text": " ".join(passage[:40]), "endings": endings[:: 1 - 2 * right], "right": right}
        )
    (directory / "tasks").mkdir()
    (directory / "tasks/endings.yaml").write_text(example("docs/pruning.md", "endings.yaml"))
    (directory / "endings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@torch.inference_mode()
def log_likelihoods(model: Path, rows: list[dict]) -> list[list[float]]:
    """Log-likelihood of each ending given its text, computed by transformers."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    def score(text: str, ending: str) -> float:
        whole, begun = (tokenizer(it)["input_ids"] for it in (text + ending, text))
        ids = torch.tensor([whole])
        logprobs = loaded(ids).logits[0, :-1].log_softmax(dim=-1)
        return float(logprobs.gather(1, ids[0, 1:, None])[len(begun) - 1 :].sum())

    # lm-eval puts a space between the two.
    return [[score(row["text"], f" {ending}") for ending in row["endings"]] for row in rows]


def test_a_local_task_is_answered_by_the_profile(tmp_path, environment):
    rows = write_task(tmp_path, 12)
    (tmp_path / "MODEL").symlink_to(DEMO)
    (tmp_path / "profiles").mkdir()
    masks = PruningProfile.read(DEMO / "atomic_profiles/heapr-40.safetensors")
    dataclasses.replace(masks, name="heapr-25").write_into(tmp_path / "profiles")
    [block] = [it for it in blocks("docs/pruning.md") if "lm_eval" in it.commands]
    # For one comparison on a CPU there is nothing to compile.
    more = '"dtype": "float32", "enforce_eager": true, "max_model_len": 512, "load_format"'
    block = dataclasses.replace(block, commands=block.commands.replace('"load_format"', more))
    printed = run([block], tmp_path, free_port(), environment, PRELUDE)
    assert "Profile heapr-25: 60.0 % of atoms kept" in printed
    [results] = tmp_path.glob("results/**/results_*.json")
    [samples] = tmp_path.glob("results/**/samples_endings_*.jsonl")
    told = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda it: it["doc_id"])
    found = [[float(answer[0][0]) for answer in sample["resps"]] for sample in told]
    zero_pruned(DEMO, tmp_path / "zeroed", masks)
    wanted = log_likelihoods(tmp_path / "zeroed", rows)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-3, atol=1e-2)
    right = [scores[row["right"]] == max(scores) for scores, row in zip(wanted, rows, strict=True)]
    accuracy = json.loads(results.read_text())["results"]["endings"]["acc,none"]
    assert accuracy == pytest.approx(sum(right) / len(right))
    assert accuracy > 0.7


def test_datasets_saved_to_disk_are_read(tmp_path, environment):
    """Datasets written by the package itself: a split in two shards, and one with two splits."""
    script = """
from datasets import Dataset, DatasetDict, load_from_disk
chats = [[{"role": "user", "content": "hi"}], [], None]
split = Dataset.from_dict({"n": [1, 2, 3], "text": ["a", None, "c"], "messages": chats})
split.save_to_disk("one", num_shards=2)
DatasetDict({"train": split}).save_to_disk("dict")
load_from_disk("one").map(lambda row: {"text": "cached"})
"""
    command = [sys.executable, "-c", script]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert len(list((tmp_path / "one").glob("*.arrow"))) > 2

    class Chatty:
        chat_template = "{}"

        def apply_chat_template(self, messages, tokenize):
            return "".join(f"<{it['role']}>{it['content']}" for it in messages)

    for name, shards in (("one", 2), ("dict", 1), ("dict/train", 1)):
        files = parse_files([str(tmp_path / name)])
        assert len(files) == shards
        for field, wanted in (
            (None, ["a", None, "c"]),
            ("messages", ["<user>hi", None, None]),
        ):
            told = [it for file in files for it in read_documents(file.path, Chatty(), field)]
            assert told == wanted, (name, field)
