"""Processes started by torchrun share the windows; the sums are those of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.architectures import QUICK
from tests.documents import ROOT
from tests.unit.test_calibration_streamed import check_equal, masks, text_of
from tests.unit.tiny_models import make_model, random_text
from vllm_atomic_moe.calibration.collect import CalibrationOptions, calibrate
from vllm_atomic_moe.calibration.ranks import Ranks
from vllm_atomic_moe.files.statistics import Statistics

BIN = Path(sys.executable).parent


def test_alone_unless_torchrun_started_it(monkeypatch):
    """Batch systems set RANK too."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert Ranks.here() == Ranks()


def test_shares_cover_all_windows():
    text = text_of(4, 3)
    shares = [Ranks(rank, 3).share(text) for rank in range(3)]
    assert sum(share.num_windows for share in shares) == 7
    for domain, windows in text.windows.items():
        parts = torch.cat([share.windows[domain] for share in shares])
        assert sorted(parts.tolist()) == sorted(windows.tolist())


def test_fewer_windows_than_processes_are_refused():
    with pytest.raises(ValueError, match="4 processes share 3 windows; start fewer processes"):
        Ranks(0, 4).share(text_of(2, 1))


@pytest.mark.parametrize(
    ("devices", "wanted", "device"),
    [(2, "auto", "cuda:1"), (2, "cuda", "cuda:1"), (0, "auto", "cpu"), (2, "cpu", "cpu")],
)
def test_every_process_has_a_device(devices, wanted, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    assert Ranks(3, 4, 1, 2).device(wanted) == device


@pytest.mark.parametrize(
    ("devices", "wanted", "words"),
    [
        (1, "auto", "2 processes and 1 CUDA devices on this machine; use --nproc-per-node 1"),
        (2, "cuda:0", "device 'cuda:0': 4 processes take a device each; use --device auto"),
    ],
)
def test_devices_that_processes_would_share_are_refused(devices, wanted, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    with pytest.raises(ValueError, match=words):
        Ranks(3, 4, 1, 2).device(wanted)


@pytest.mark.parametrize(
    ("architecture", "flags"),
    [
        ("qwen3_moe", ("--stream",)),
        pytest.param("qwen3_moe", (), marks=pytest.mark.full),
        *(
            pytest.param(name, flags, marks=pytest.mark.full)
            for name in QUICK
            if name != "qwen3_moe"
            for flags in ((), ("--stream",))
        ),
    ],
)
def test_two_processes_sum_up_the_same_as_one(architecture, flags, tmp_path):
    model = tmp_path / "model"
    make_model(architecture, model)
    for name, length in (("a", 1000), ("b", 120)):
        (tmp_path / f"{name}.txt").write_text(random_text(length))
    data = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    options = CalibrationOptions(samples=4, seq_len=32, dtype="float32")
    wanted, warnings = calibrate(str(model), data, options)
    command = [
        *(BIN / "torchrun", "--nproc-per-node", "2", "--no-python", BIN / "atomic-moe"),
        *("calibrate", model, "--data", data[0], "--data", data[1], "-o", tmp_path / "out"),
        *("--samples", "4", "--seq-len", "32", "--dtype", "float32", *flags),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*map(str, command)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = Statistics.read(tmp_path / "out")
    assert found.calibration == wanted.calibration
    assert found.model == wanted.model
    check_equal(found.sums, wanted.sums)
    for one, two in zip(masks("heapr", found.sums), masks("heapr", wanted.sums), strict=True):
        assert torch.equal(one, two)
    # One of them reports.
    assert done.stdout.count("tokens, domains a, b") == 1
    assert sum(line.startswith("warning: ") for line in done.stderr.splitlines()) == len(warnings)
