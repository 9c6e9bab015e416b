"""The documents' commands from a text to a served profile, run literally."""

from __future__ import annotations

import json
import os
import re

import pyarrow
import pyarrow.parquet
import pytest

from tests.documents import blocks, files_of, run
from tests.e2e.conftest import BIN, DEMO, ENVIRONMENT, free_port

DATA = DEMO.parent / "data"


def make_model(directory):
    """A MODEL with the profiles of the README; its commands make heapr-25."""
    model = directory / "MODEL"
    profiles = model / "atomic_profiles"
    profiles.mkdir(parents=True)
    for file in DEMO.iterdir():
        if file.is_file():
            (model / file.name).symlink_to(file)
    # Windows have 2048 tokens by default.
    config = json.loads((DEMO / "config.json").read_text()) | {"max_position_embeddings": 2048}
    (model / "config.json").unlink()
    (model / "config.json").write_text(json.dumps(config))
    (profiles / "heapr-40.safetensors").symlink_to(DEMO / "atomic_profiles/heapr-40.safetensors")
    (profiles / "heapr-25.safetensors").symlink_to(directory / "profiles/heapr-25.safetensors")


def make_texts(directory):
    english, python = ((DATA / f"{name}.heldout.txt").read_text() for name in ("english", "python"))
    (directory / "text.jsonl").write_text(json.dumps({"text": english[:20_000]}) + "\n")
    table = pyarrow.table({"text": [python[:20_000]]})
    pyarrow.parquet.write_table(table, directory / "code.parquet")


def test_from_text_to_a_request_for_a_profile(tmp_path):
    make_model(tmp_path)
    make_texts(tmp_path)
    environment = {**ENVIRONMENT, "PATH": f"{BIN}:{os.environ['PATH']}"}
    chosen = [block for block in blocks("README.md") if "run" in block.needs]
    # Each server replaces the one before.
    first, second = chosen[:1], chosen[1:]
    assert "heapr-25" in run(first, tmp_path, free_port(), environment)
    printed = run(second, tmp_path, free_port(), environment)
    assert "x-atomic-moe-profile: heapr-40" in printed
    assert '"model":"MODEL:heapr-40"' in printed
    assert '"active":"heapr-25","previous":"heapr-40"' in printed
    runnable = [block for block in blocks("docs/pruning.md") if "run" in block.needs]
    run(runnable, tmp_path, free_port(), environment)


@pytest.mark.full
def test_the_python_functions(tmp_path):
    make_model(tmp_path)
    make_texts(tmp_path)
    (tmp_path / "heldout.txt").write_text((DATA / "english.heldout.txt").read_text()[:30_000])
    for name, text in files_of("docs/python.md").items():
        (tmp_path / name).write_text(text)
    environment = {**ENVIRONMENT, "PATH": f"{BIN}:{os.environ['PATH']}"}
    printed = run(blocks("docs/python.md"), tmp_path, free_port(), environment)
    assert "heapr-20 80.0% of atoms kept" in printed
    rows = dict(line.split() for line in printed.splitlines() if re.match(r"\S+ \d+\.\d\d$", line))
    assert list(rows) == ["dense", "heapr-20", "heapr-40"]
    assert float(rows["dense"]) < float(rows["heapr-20"]) < float(rows["heapr-40"])
