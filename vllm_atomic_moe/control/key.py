"""The admin key, for the server and its client. Importable without vLLM."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

KEY = "ATOMIC_MOE_ADMIN_KEY"
KEY_FILE = "ATOMIC_MOE_ADMIN_KEY_FILE"


def read_key(environment: Mapping[str, str] = os.environ) -> str | None:
    """The admin key, from the environment or the file that it names; None if it has neither.

    Raises:
        ValueError: both are given, the file cannot be read or holds no key, or the key has
            characters that a header cannot carry.
    """
    key, path = environment.get(KEY), environment.get(KEY_FILE)
    if key and path:
        raise ValueError(f"{KEY} and {KEY_FILE} are both set; keep one")
    if path:
        try:
            key = Path(path).read_text(encoding="utf-8-sig").strip()
        except (OSError, ValueError) as error:
            raise ValueError(f"{KEY_FILE}: {path} cannot be read ({error})") from None
        if not key:
            raise ValueError(f"{KEY_FILE}: {path} is empty; write the key into it")
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise ValueError(
            "the admin key has spaces or characters beyond printable ASCII, which a header cannot "
            "carry; choose another"
        )
    return key or None


def fingerprint(key: str | None) -> str:
    """How logs name a key: the first 8 hex digits of its SHA-256, or `none`."""
    return hashlib.sha256(key.encode()).hexdigest()[:8] if key else "none"
