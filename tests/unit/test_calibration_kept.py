"""Scratch directories: killed runs resume; damaged stages are made again."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import torch

from tests.documents import ROOT
from tests.unit.test_calibration_streamed import CPU, check_equal, in_memory, text_of
from tests.unit.tiny_models import make_model, random_text
from vllm_atomic_moe.calibration.collect import CalibrationOptions, calibrate
from vllm_atomic_moe.calibration.kept import Scratch
from vllm_atomic_moe.calibration.layer_reader import LayerReader
from vllm_atomic_moe.calibration.streamed import StreamedRun, collect_streamed

TEXT = text_of(2, 1)
# Layer 0 is dense; 3 windows through 3 layers, the loss, and 2 layers backward, each for three.
STEPS = 3 * (3 + 1 + 2 * 3)


class KilledError(Exception):
    pass


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model whose first layer is dense, and its sums with and without gradients."""
    directory = tmp_path_factory.mktemp("glm4_moe")
    info = make_model("glm4_moe", directory)
    sums = {it: in_memory(directory, info, TEXT, 1, gradients=it) for it in (True, False)}
    return directory, info, sums


def run(tiny, scratch, gradients=True, kill_at=None, **changes):
    """The sums, and the number of steps finished before this run."""
    directory, info, _ = tiny
    steps = []

    def progress(done, total):
        steps.append(done)
        if kill_at is not None and done >= kill_at:
            raise KilledError

    reader = LayerReader(directory, info, torch.float32, CPU)
    kept = Scratch(scratch, {"text": "TEXT", "gradients": gradients, **changes})
    try:
        sums = collect_streamed(reader, kept, TEXT, 1, progress, gradients)
        assert steps[-1] == total_of(gradients)
        return sums, steps[0]
    finally:
        kept.close()


def total_of(gradients):
    return STEPS if gradients else 3 * 3


@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "forward"])
def test_killed_anywhere_and_resumed(tiny, gradients, tmp_path):
    for kill_at in range(1, total_of(gradients), 4):
        scratch = tmp_path / str(kill_at)
        with pytest.raises(KilledError):
            run(tiny, scratch, gradients, kill_at)
        sums, before = run(tiny, scratch, gradients)
        check_equal(sums, tiny[2][gradients])
        # No more than the layer that it was in is run again.
        assert kill_at - 3 * 3 <= before <= kill_at


def test_killed_again_and_again(tiny, tmp_path):
    for kill_at in (4, 8, 11, 17, 25):
        with pytest.raises(KilledError):
            run(tiny, tmp_path, kill_at=kill_at)
    check_equal(run(tiny, tmp_path)[0], tiny[2][True])


@pytest.mark.parametrize("stage", ["inputs-1", "gradients-2", "sums-2"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_damaged_stages_are_made_again(tiny, stage, damage, tmp_path):
    with pytest.raises(KilledError):
        run(tiny, tmp_path, kill_at=STEPS - 3)
    file = tmp_path / stage / "0.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    else:
        data[-1] ^= 1
        file.write_bytes(data[:-8] if damage == "cut" else data)
    sums, before = run(tiny, tmp_path)
    check_equal(sums, tiny[2][True])
    assert before < STEPS - 9


def test_a_finished_run_repeats_no_work(tiny, tmp_path, monkeypatch):
    run(tiny, tmp_path)
    monkeypatch.setattr(StreamedRun, "each_batch", None)
    monkeypatch.setattr(StreamedRun, "_loss", None)
    sums, before = run(tiny, tmp_path)
    check_equal(sums, tiny[2][True])
    assert before == STEPS


def test_a_scratch_directory_of_another_run_is_refused(tiny, tmp_path):
    run(tiny, tmp_path)
    with pytest.raises(ValueError, match="of another calibration: its text is 'TEXT', here 'OTHE"):
        run(tiny, tmp_path, text="OTHER")


def test_a_scratch_directory_in_use_is_refused(tmp_path):
    first = Scratch(tmp_path, {})
    with pytest.raises(ValueError, match="is used by another calibration; name another directory"):
        Scratch(tmp_path, {})
    first.close()
    Scratch(tmp_path, {})


def test_a_scratch_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/deep: cannot be written .* name another directory"):
        Scratch(tmp_path / "file" / "deep", {})


def test_inputs_without_room_are_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(Scratch, "room", lambda self: 1000)
    with pytest.raises(ValueError, match=r"layers' inputs take 0\.0 GiB, .* use --scratch with a"):
        run(tiny, tmp_path)


CHILD = """
import os, signal, sys
from pathlib import Path
from vllm_atomic_moe.calibration.collect import CalibrationOptions, calibrate

model, text, scratch, kill_at = sys.argv[1:]

def progress(done, total):
    if done >= int(kill_at):
        os.kill(os.getpid(), signal.SIGKILL)

options = CalibrationOptions(samples=3, seq_len=24, scratch=Path(scratch), dtype="float32")
calibrate(model, [text], options, progress)
"""


@pytest.mark.full
def test_a_killed_process_resumes(tiny, tmp_path):
    """By SIGKILL: in the forward sweep, the loss and the backward sweep. No stages remain."""
    text, scratch = tmp_path / "text.txt", tmp_path / "scratch"
    text.write_text(random_text(400))
    options = CalibrationOptions(samples=3, seq_len=24, dtype="float32")
    wanted, _ = calibrate(str(tiny[0]), [str(text)], options)
    for kill_at in (5, 11, 20):
        arguments = [*map(str, (tiny[0], text, scratch, kill_at))]
        child = subprocess.run([sys.executable, "-c", CHILD, *arguments], cwd=ROOT, check=False)
        assert child.returncode == -signal.SIGKILL
    steps = []
    found, _ = calibrate(
        str(tiny[0]),
        [str(text)],
        CalibrationOptions(samples=3, seq_len=24, dtype="float32", scratch=scratch),
        lambda done, total: steps.append(done),
    )
    assert steps[0] >= 12
    assert found.calibration == wanted.calibration
    check_equal(found.sums, wanted.sums)
    assert list(scratch.iterdir()) == []
