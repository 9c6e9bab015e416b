"""The admin key: from the environment or a file, and what cannot be one."""

from __future__ import annotations

import pytest

from vllm_atomic_moe.control.access import Access
from vllm_atomic_moe.control.key import KEY, KEY_FILE, fingerprint, read_key


def test_from_the_environment_or_a_file(tmp_path):
    file = tmp_path / "key"
    file.write_text("from-the-file\n")
    assert read_key({}) is None
    assert read_key({KEY: "", KEY_FILE: ""}) is None
    assert read_key({KEY: "from-the-environment"}) == "from-the-environment"
    assert read_key({KEY_FILE: str(file)}) == "from-the-file"


def test_invalid_keys_are_refused(tmp_path):
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.write_text("\n")
    binary.write_bytes(b"\xff\xfe")
    for environment, words in (
        ({KEY: "a", KEY_FILE: str(empty)}, f"{KEY} and {KEY_FILE} are both set; keep one"),
        ({KEY_FILE: str(tmp_path / "none")}, "none cannot be read"),
        ({KEY_FILE: str(binary)}, "binary cannot be read"),
        ({KEY_FILE: str(empty)}, "empty is empty; write the key into it"),
        ({KEY: "two words"}, "printable ASCII"),
        ({KEY: "schlüssel"}, "printable ASCII"),
    ):
        with pytest.raises(ValueError, match=words) as refusal:
            read_key(environment)
        assert "schl" not in str(refusal.value)


def test_a_serving_key_is_refused():
    Access("admin", ["serving", None])
    Access(None, [None])
    with pytest.raises(ValueError, match=r"equals a serving key .* choose another"):
        Access("serving", ["other", "serving"])


def test_a_fingerprint_distinguishes_keys_without_revealing_them():
    assert fingerprint("one") == fingerprint("one") != fingerprint("two")
    assert len(fingerprint("one")) == 8
