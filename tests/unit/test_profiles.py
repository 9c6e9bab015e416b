"""The profile file: written files read back equal, and everything else is refused in one line."""

from __future__ import annotations

import json
import pickle
import stat
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from vllm_atomic_moe.files.checkpoint import CheckpointInfo
from vllm_atomic_moe.files.profiles import ProfileStore, PruningProfile
from vllm_atomic_moe.files.router import RouterIdentity

MODEL = CheckpointInfo(
    architecture="Qwen3MoeForCausalLM",
    num_experts=4,
    experts_per_token=2,
    intermediate_size=6,
    hidden_size=8,
    layers=(1, 3),
    router=RouterIdentity("ab" * 32),
)
HEADER = {"format": "atomic-moe-profile", "format_version": "1", "name": "code-25"}
REUSE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True).filter(lambda n: n != "dense")


def keep_masks(model: CheckpointInfo = MODEL) -> dict[int, torch.Tensor]:
    shape = (model.num_experts, model.intermediate_size)
    return {layer: torch.arange(24).reshape(shape) % 3 > 0 for layer in model.layers}


def profile(**changes) -> PruningProfile:
    metadata = {"model": json.dumps(MODEL.identity()), "method": "heapr"}
    return replace(PruningProfile("code-25", keep_masks(), metadata=metadata), **changes)


def raw_file(path, tensors=None, metadata=None):
    """A file as another tool might write it."""
    if tensors is None:
        tensors = {f"layers.{layer}.keep": mask for layer, mask in keep_masks().items()}
    save_file(tensors, path, metadata=HEADER if metadata is None else metadata)
    return path


def refusal(action) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        action()
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 600
    return line


# --- write and read -------------------------------------------------------------------------------


@REUSE
@given(
    name=names,
    seed=st.integers(0, 1 << 20),
    layers=st.sets(st.integers(0, 200), min_size=1, max_size=5),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 40)),
    with_routable=st.booleans(),
    extra=st.dictionaries(st.text(min_size=1, max_size=20), st.text(max_size=40), max_size=4),
)
def test_a_written_file_reads_back_equal(tmp_path, name, seed, layers, shape, with_routable, extra):
    generator = torch.Generator().manual_seed(seed)
    keep = {layer: torch.rand(shape, generator=generator) < 0.5 for layer in layers}
    routable = {layer: mask.any(dim=1) for layer, mask in keep.items()} if with_routable else {}
    extra = {key: value for key, value in extra.items() if key not in HEADER}
    written = PruningProfile(name, keep, routable, extra)
    written.write(tmp_path / "file.safetensors")
    found = PruningProfile.read(tmp_path / "file.safetensors")
    assert (found.name, dict(found.metadata)) == (name, extra)
    for seen, wanted in ((found.keep, keep), (found.routable, routable)):
        assert list(seen) == sorted(wanted)
        assert all(torch.equal(seen[layer], wanted[layer]) for layer in wanted)
    assert found.kept_atoms == sum(int(mask.sum()) for mask in keep.values())


def test_file_is_readable_by_others_and_complete_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "profiles" / "code-25.safetensors"
    profile().write(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    before = path.read_bytes()

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("vllm_atomic_moe.files.tensors.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        profile().write(path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_any_tool_can_write_one_in_three_lines(tmp_path):
    tensors = {"layers.1.keep": torch.ones(4, 6).bool(), "layers.3.keep": torch.ones(4, 6).bool()}
    save_file(tensors, tmp_path / "x.safetensors", metadata=HEADER)
    found = PruningProfile.read(tmp_path / "x.safetensors")
    (warning,) = found.check(MODEL)
    assert "does not say which model" in warning


def test_profiles_are_frozen():
    with pytest.raises(AttributeError):
        profile().name = "other"
    with pytest.raises(TypeError):
        profile().keep[1] = torch.zeros(4, 6).bool()


def test_widths_and_kept():
    assert profile().widths(1).tolist() == [4, 4, 4, 4]
    assert profile().kept == pytest.approx(2 / 3)


def test_digest_covers_the_name_and_what_is_computed():
    masks = {1: torch.ones(4, 6).bool(), 3: torch.zeros(4, 6).bool()}
    masks[1][2] = False
    everyone = {layer: torch.ones(4).bool() for layer in masks}
    fewer = {1: torch.tensor([True, True, False, True])}
    one = PruningProfile("one", masks)
    assert one.digest() == PruningProfile("one", masks, metadata={"method": "any"}).digest()
    assert one.digest() == PruningProfile("one", masks, everyone).digest()
    others = (
        PruningProfile("two", masks),
        PruningProfile("one", {1: masks[3], 3: masks[1]}),
        PruningProfile("one", {1: masks[1]}),
        PruningProfile("one", {2: masks[1], 3: masks[3]}),
        PruningProfile("one", {layer: mask.view(6, 4) for layer, mask in masks.items()}),
        PruningProfile("one", masks, fewer),
    )
    assert len({one.digest(), *(other.digest() for other in others)}) == 1 + len(others)


def test_a_copy_in_memory_does_not_follow_its_file(tmp_path):
    path = tmp_path / "code-25.safetensors"
    profile().write(path)
    copy = PruningProfile.read(path).in_memory()
    path.write_bytes(bytes(path.stat().st_size))
    assert copy.digest() == profile().digest()
    assert copy.metadata == profile().metadata


# --- broken files ---------------------------------------------------------------------------------


@REUSE
@given(cut=st.floats(0, 0.999))
def test_truncated_files_are_refused(tmp_path, cut):
    path = raw_file(tmp_path / "x.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * cut)])
    line = refusal(lambda: PruningProfile.read(path))
    assert "not a complete safetensors file" in line


@REUSE
@given(position=st.floats(0, 0.999), value=st.integers(0, 255))
def test_corrupted_files_never_raise_anything_else(tmp_path, position, value):
    path = raw_file(tmp_path / "x.safetensors")
    content = bytearray(path.read_bytes())
    content[int(len(content) * position)] = value
    path.write_bytes(content)
    try:
        PruningProfile.read(path).check(MODEL)
    except ValueError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("content", [b"", b"\x00" * 8, b"\xff" * 64, pickle.dumps({"a": 1})])
def test_foreign_files_are_refused(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert str(path) in refusal(lambda: PruningProfile.read(path))


def test_unknown_dtypes_are_refused(tmp_path):
    """The file opens, but this torch cannot read a tensor in it."""
    header = {
        "__metadata__": HEADER,
        "layers.1.keep": {"dtype": "F6_E2M3", "shape": [4, 6], "data_offsets": [0, 18]},
    }
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(18))
    assert str(path) in refusal(lambda: PruningProfile.read(path))


def test_missing_file_is_refused(tmp_path):
    assert "no such file" in refusal(lambda: PruningProfile.read(tmp_path / "none"))


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({**HEADER, "format": "other"}, "metadata `format` is 'other'"),
        ({"format_version": "1", "name": "a"}, "metadata `format` is missing"),
        ({**HEADER, "format_version": "3"}, "metadata `format_version` is '3', wanted '1' or '2'"),
        ({"format": "atomic-moe-profile", "format_version": "1"}, "metadata `name` is ''"),
        ({**HEADER, "name": "../../etc/passwd"}, "metadata `name` is '../../etc/passwd'"),
        ({**HEADER, "name": "A" * 1000}, "AAAA…"),
        ({**HEADER, "name": "a\nb"}, r"'a\nb'"),
        ({**HEADER, "name": "a\n"}, r"'a\n'"),
        ({**HEADER, "name": "dense"}, "'dense' is reserved"),
    ],
)
def test_hostile_metadata_is_refused(tmp_path, metadata, words):
    path = raw_file(tmp_path / "x.safetensors", metadata=metadata)
    assert words in refusal(lambda: PruningProfile.read(path))


@pytest.mark.parametrize("model", ["[]", "{", "[" * 100_000, "null"])
def test_hostile_model_metadata_is_refused(tmp_path, model):
    path = raw_file(tmp_path / "x.safetensors", metadata={**HEADER, "model": model})
    line = refusal(lambda: PruningProfile.read(path).check(MODEL))
    assert "metadata `model` is not a JSON object" in line


@REUSE
@given(name=st.text(max_size=80))
def test_only_allowed_names_are_accepted(name):
    try:
        accepted = PruningProfile(name, keep_masks()).name
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert accepted == name
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-")
        assert len(name) <= 64


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "holds no layers.N.keep mask"),
        ({"layers.1.keep": torch.ones(4, 6)}, "layers.1.keep is float32 [4, 6], wanted bool"),
        ({"layers.1.keep": torch.ones(24).bool()}, "layers.1.keep is bool [24], wanted"),
        ({"layers.1.weight": torch.ones(4, 6).bool()}, "unexpected tensor 'layers.1.weight'"),
        ({"layers.01.keep": torch.ones(4, 6).bool()}, "unexpected tensor 'layers.01.keep'"),
        (
            {"layers.1.keep": torch.ones(4, 6).bool(), "layers.3.keep": torch.ones(4, 7).bool()},
            "masks have shapes [[4, 6], [4, 7]]",
        ),
        (
            {"layers.1.keep": torch.ones(4, 6).bool(), "layers.1.routable": torch.ones(3).bool()},
            "layers.1.routable is [3]",
        ),
        (
            {"layers.1.keep": torch.ones(4, 6).bool(), "layers.2.routable": torch.ones(4).bool()},
            "layers.2.routable",
        ),
        (
            {"layers.1.keep": torch.ones(4, 6).bool(), "layers.1.routable": torch.zeros(4).bool()},
            "keeps atoms of experts that layers.1.routable excludes",
        ),
    ],
)
def test_wrong_tensors_are_refused(tmp_path, tensors, words):
    path = raw_file(tmp_path / "x.safetensors", tensors)
    assert words in refusal(lambda: PruningProfile.read(path))


# --- against the model ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": (1, 2, 3)}, "lacks layers [2]; the model's MoE layers are [1, 2, 3]"),
        ({"layers": (1,)}, "has unknown layers [3]"),
        ({"layers": (0, 3)}, "lacks layers [0] and has unknown layers [1]"),
        ({"intermediate_size": 7}, "layers.1.keep is [4, 6], the model has [4, 7]"),
        ({"num_experts": 5}, "layers.1.keep is [4, 6], the model has [5, 6]"),
        ({"router": RouterIdentity("cd" * 32)}, "made for router_sha256"),
        ({"hidden_size": 9}, "made for hidden_size 8, the model has 9"),
        ({"architecture": "MixtralForCausalLM"}, "made for architecture"),
    ],
)
def test_profile_of_another_model_is_refused(changes, words):
    assert profile().check(MODEL) == []
    assert words in refusal(lambda: profile().check(replace(MODEL, **changes)))


def test_a_router_in_another_dtype_is_the_same_or_differs_by_rounding():
    """Profiles of version 0.1 carry the digest of the stored bytes; neither is a sample."""
    stored = replace(MODEL, router=RouterIdentity("cd" * 32, stored_sha256="ab" * 32))
    assert profile().check(stored) == []
    made = replace(MODEL, router=RouterIdentity("cd" * 32, sample=(0.1, -2.003, 1e-9, 0.0)))
    of_copy = profile(metadata={"model": json.dumps(made.identity())})
    rounded = tuple(torch.tensor(made.router.sample).bfloat16().tolist())
    scaled = tuple(1.004 * value for value in made.router.sample)
    copies = {rounded: True, scaled: False, (0.1, -2.02, 0.0, 0.0): False, (0.1,): False}
    for sample, same in copies.items():
        copy = replace(MODEL, router=RouterIdentity("ef" * 32, sample=sample))
        if same:
            (warning,) = of_copy.check(copy)
            assert "differs by rounding only" in warning
        else:
            assert "made for router_sha256" in refusal(lambda copy=copy: of_copy.check(copy))


def test_fewer_routable_experts_than_a_token_uses_are_refused():
    routable = torch.tensor([True, False, False, False])
    keep = {layer: mask & routable[:, None] for layer, mask in keep_masks().items()}
    narrow = profile(keep=keep, routable={1: routable})
    line = refusal(lambda: narrow.check(MODEL))
    assert "layers.1.routable leaves 1 experts, a token uses 2" in line


def test_dense_keeps_everything_and_is_never_a_file(tmp_path):
    dense = PruningProfile.dense(MODEL)
    assert (dense.kept, dense.check(MODEL)) == (1.0, [])
    assert "reserved" in refusal(lambda: dense.write(tmp_path / "x.safetensors"))


# --- directories ----------------------------------------------------------------------------------


def test_store_lists_by_the_name_inside(tmp_path):
    profile().write(tmp_path / "some-file.safetensors")
    profile(name="prose").write(tmp_path / "prose.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    (tmp_path / "notes.txt").write_text("not a profile")
    store = ProfileStore(tmp_path)
    assert store.names() == ["code-25", "prose"]
    assert store.load("code-25").name == "code-25"
    assert list(store.invalid) == [tmp_path / "broken.safetensors"]
    line = refusal(lambda: store.load("code-50"))
    assert "profiles there: code-25, prose; unreadable:" in line


def test_store_refuses_two_files_of_one_name(tmp_path):
    profile().write(tmp_path / "a.safetensors")
    profile().write(tmp_path / "b.safetensors")
    assert "both carry the name 'code-25'" in refusal(lambda: ProfileStore(tmp_path))


def test_store_refuses_a_missing_directory(tmp_path):
    assert "does not exist" in refusal(lambda: ProfileStore(tmp_path / "none"))
