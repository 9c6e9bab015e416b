"""Unusual disks: no modes, no locks, no room, Git LFS pointers and hidden files."""

import errno
import fcntl
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.unit.test_cli import refused, run
from tests.unit.tiny_models import make_model, random_text
from vllm_atomic_moe.convert.exporting.export import export
from vllm_atomic_moe.files import tensors
from vllm_atomic_moe.files.checkpoint import describe_checkpoint
from vllm_atomic_moe.files.plain_files import lock
from vllm_atomic_moe.files.profiles import ProfileStore, PruningProfile

SHORT = ("--samples", "4", "--seq-len", "32")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    directory = tmp_path_factory.mktemp("original") / "model"
    make_model("qwen3_moe", directory)
    (directory.parent / "text.txt").write_text(random_text(400))
    keep = torch.arange(64) < 40
    profile = PruningProfile("p", {layer: keep.expand(8, 64).contiguous() for layer in range(3)})
    profile.write(directory.parent / "p.safetensors")
    return directory


@pytest.fixture
def model(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


def calibrate(model, output):
    return run("calibrate", model, "--data", model.parent / "text.txt", "-o", output, *SHORT)


def test_a_mount_without_modes(original, tmp_path, monkeypatch):
    """CIFS, FAT, /mnt/c: every file is there, with the mode that the mount gives."""

    def chmod(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    for name in ("chmod", "fchmod"):
        monkeypatch.setattr(os, name, chmod)
    assert calibrate(original, tmp_path / "s.safetensors").exit_code == 0
    for command in (
        ("prune", tmp_path / "s.safetensors", "--method=heapr", "--ratio=.2", "-o", tmp_path / "p"),
        ("show", tmp_path / "p", "--plot", tmp_path / "x.png"),
        ("export", original, tmp_path / "p" / "heapr-20.safetensors", "-o", tmp_path / "out"),
        ("score", tmp_path / "s.safetensors", "--method=heapr", "-o", tmp_path / "c.safetensors"),
    ):
        result = run(*command)
        assert result.exit_code == 0, result.output
    assert (tmp_path / "x.png").stat().st_size
    assert describe_checkpoint(tmp_path / "out").stored


@pytest.mark.parametrize("code", ["EBADF", "ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_a_mount_without_locks(original, tmp_path, monkeypatch, code):
    def flock(*_):
        raise OSError(getattr(errno, code), "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)
    export(str(original), original.parent / "p.safetensors", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_failure_to_lock_leaves_nothing(original, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="broken"):
        export(str(original), original.parent / "p.safetensors", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    with (tmp_path / "x").open("w") as file, pytest.raises(OSError, match="broken"):
        lock(file.fileno())


def test_statistics_that_cannot_be_renamed_are_kept(original, tmp_path, monkeypatch):
    replace = os.replace

    def fail(source, target):
        if str(target).startswith(str(tmp_path / "s.")):
            raise OSError(errno.EBUSY, "busy")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    result = calibrate(original, tmp_path / "s.safetensors")
    assert result.exit_code == 1
    assert "s.safetensors: cannot be replaced (busy); what was to be there is complete in " in (
        result.stderr
    )
    (kept,) = tmp_path.glob(".s.safetensors.*")
    pruned = run("prune", kept, "--method=heapr", "--ratio=.2", "-o", tmp_path)
    assert pruned.exit_code == 0, pruned.output


def test_an_export_that_cannot_be_renamed_is_kept(original, tmp_path, monkeypatch):
    from pathlib import Path

    def fail(*_):
        raise OSError(errno.EACCES, "denied")

    monkeypatch.setattr(Path, "rename", fail)
    words = r"out: the export is complete, but .*\.out\.exporting cannot be renamed to it \(denied"
    with pytest.raises(ValueError, match=words):
        export(str(original), original.parent / "p.safetensors", tmp_path / "out")
    monkeypatch.undo()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"holds a complete export .* or remove it"):
            export(str(original), original.parent / "p.safetensors", tmp_path / "out")
        assert describe_checkpoint(tmp_path / ".out.exporting").stored


def test_statistics_are_written_elsewhere_if_the_disk_is_full(original, tmp_path):
    """A real failure: the first write is limited to files of 64 KiB."""
    script = (
        "import resource, sys\n"
        "from vllm_atomic_moe.files import tensors\n"
        "save, hard = tensors.save_file, resource.getrlimit(resource.RLIMIT_FSIZE)[1]\n"
        "def once(*args, **kwargs):\n"
        "    tensors.save_file = save\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))\n"
        "    try:\n        save(*args, **kwargs)\n"
        "    finally:\n        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, hard))\n"
        "tensors.save_file = once\n"
        "from vllm_atomic_moe.cli import app\n"
        "app(sys.argv[1:])\n"
    )
    output = tmp_path / "s.safetensors"
    command = ("calibrate", original, "--data", original.parent / "text.txt", "-o", output, *SHORT)
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, command)],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "File too large" in line
    assert "; what was computed is in " in line
    (rescued,) = tmp_path.glob("atomic-moe-*/s.safetensors")
    assert str(rescued) in line
    assert not list(tmp_path.glob("*s.safetensors")) + list(tmp_path.glob(".s*"))
    assert run("prune", rescued, "--method=heapr", "--ratio=.2", "-o", tmp_path).exit_code == 0


def test_a_file_that_cannot_be_written_is_named(original, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    profile = PruningProfile.read(original.parent / "p.safetensors").in_memory()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(ValueError, match=r"x\.safetensors: cannot be written \(.*make room"):
            profile.write(tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match=r"output .*out: cannot be written \(.*make room"):
            export(str(original), original.parent / "p.safetensors", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_hidden_files_are_ignored(model):
    """macOS puts `._x` beside every x on foreign disks."""
    wanted = describe_checkpoint(model)
    (model / "._model.safetensors").write_bytes(b"AppleDouble")
    assert describe_checkpoint(model) == wanted
    profiles = model / "atomic_profiles"
    profiles.mkdir()
    shutil.copy(model.parent / "model" / "config.json", profiles / "config.json")
    PruningProfile("p", {0: torch.ones(2, 2).bool()}).write(profiles / "p.safetensors")
    (profiles / "._p.safetensors").write_bytes(b"AppleDouble")
    store = ProfileStore(profiles)
    assert (store.names(), store.invalid) == (["p"], {})


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".parquet"])
def test_a_pointer_is_neither_text_nor_another_tools_file(original, tmp_path, suffix):
    data = tmp_path / f"x{suffix}"
    data.write_text(POINTER)
    line = refused("calibrate", original, "--data", data, "-o", tmp_path / "s", *SHORT)
    assert f"x{suffix}: a Git LFS pointer" in line
    line = refused("import", "shape", data, "--model", original, "-o", tmp_path / "out")
    assert f"x{suffix}: a Git LFS pointer" in line


def test_a_tokenizer_may_be_a_pointer(model):
    (model / "tokenizer.json").write_text(POINTER)
    data = model.parent / "t.txt"
    data.write_text("x")
    assert "tokenizer.json: a Git LFS pointer" in refused(
        "calibrate", model, "--data", data, "-o", model.parent / "s", *SHORT
    )


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "p.safetensors"])
def test_git_lfs_pointers_are_named(model, original, name):
    profile = shutil.copy(original.parent / "p.safetensors", model.parent / "p.safetensors")
    path = profile if name == "p.safetensors" else model / name
    with open(path, "w") as file:
        file.write(POINTER)
    line = refused("export", model, profile, "-o", model.parent / "out")
    assert f"{name}: a Git LFS pointer in the place of the file; run `git lfs pull` there" in line


def test_an_index_that_is_a_pointer(model):
    index = model / "model.safetensors.index.json"
    index.write_text(POINTER)
    with pytest.raises(ValueError, match=r"index.json: a Git LFS pointer .* `git lfs pull`"):
        describe_checkpoint(model)


def test_every_result_is_written_somewhere(tmp_path, monkeypatch):
    """The disk of the file is full, then the temporary directory, then the working directory."""
    places = [tmp_path / name for name in ("output", "temporary", "here")]
    for place in places:
        place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(places[1]))
    monkeypatch.chdir(places[2])
    full: list[Path] = []

    def save(contents, path, metadata):
        if any(place in path.parents for place in full):
            raise OSError(28, "No space left on device")
        save_file(contents, path, metadata=metadata)

    monkeypatch.setattr(tensors, "save_file", save)
    for place, rescue in zip(places, [*places[1:], None], strict=True):
        full.append(place)
        words = (
            rf"what was computed is in {rescue}/atomic-moe-.*: move it" if rescue else "make room"
        )
        with pytest.raises(ValueError, match=words) as refused:
            tensors.write_safetensors({"x": torch.ones(2)}, {}, places[0] / "s.safetensors")
        found = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert len(found) == (rescue is not None)
        if rescue:
            assert str(found[0]) in str(refused.value)
            assert torch.equal(tensors.read_tensor(found[0], "x"), torch.ones(2))
        for path in sorted(tmp_path.glob("*/atomic-moe-*/*")):
            path.unlink()
        for path in tmp_path.glob("*/atomic-moe-*"):
            path.rmdir()


@pytest.mark.parametrize("refusal", [None, errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_is_synced_before_it_is_renamed(tmp_path, monkeypatch, refusal):
    """So that a power cut leaves the old file or the new one; where the mount can."""
    done = []
    fsync, replace = os.fsync, os.replace

    def synced(handle):
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name[:3])
        if refusal:
            raise OSError(refusal, os.strerror(refusal))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("replace"), replace(*paths)))
    tensors.write_safetensors({"x": torch.ones(2)}, {}, tmp_path / "s.safetensors")
    assert done == [".s.", "replace", tmp_path.name[:3]]


def test_a_disk_that_fails_at_the_end_loses_nothing(tmp_path, monkeypatch):
    def fail(handle):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ValueError, match=r"cannot be replaced .* is complete in .*: move it"):
        tensors.write_safetensors({"x": torch.ones(2)}, {}, tmp_path / "s.safetensors")
    (kept,) = tmp_path.iterdir()
    assert torch.equal(tensors.read_tensor(kept, "x"), torch.ones(2))
