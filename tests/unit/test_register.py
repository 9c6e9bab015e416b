"""register() runs once and never raises, whatever vLLM is installed."""

from __future__ import annotations

import logging
import subprocess
import sys

import vllm_atomic_moe
from vllm_atomic_moe import control, engine


def test_is_idempotent(monkeypatch):
    calls = []
    monkeypatch.setattr(vllm_atomic_moe, "_registered", False)
    front_ends = []

    def register_load_format(on_front_end):
        calls.append("engine")
        front_ends.append(on_front_end)

    monkeypatch.setattr(engine, "register_load_format", register_load_format)
    monkeypatch.setattr(control, "attach_to_api_servers", lambda: calls.append("control"))
    vllm_atomic_moe.register()
    vllm_atomic_moe.register()
    assert calls == ["engine"], "few processes admit requests to a pruned model"
    for on_front_end in front_ends:
        on_front_end()
    assert calls == ["engine", "control"]


def test_never_raises_but_says_so(monkeypatch, caplog):
    def broken(on_front_end) -> None:
        raise ImportError("no such internal")

    monkeypatch.setattr(vllm_atomic_moe, "_registered", False)
    monkeypatch.setattr(engine, "register_load_format", broken)
    with caplog.at_level(logging.ERROR):
        vllm_atomic_moe.register()
    assert "could not register its load format" in caplog.text


def test_a_process_with_another_load_format_notices_nothing():
    """Registering changes vLLM's loader registry by one entry, and replaces no layer."""
    code = """
from vllm.model_executor import model_loader
from vllm.model_executor.custom_op import op_registry_oot
from vllm.plugins import load_general_plugins
before, layers = dict(model_loader._LOAD_FORMAT_TO_MODEL_LOADER), dict(op_registry_oot)
load_general_plugins()
after = dict(model_loader._LOAD_FORMAT_TO_MODEL_LOADER)
assert set(after) - set(before) == {"atomic-pruned"}, after
assert all(after[name] is loader for name, loader in before.items())
assert op_registry_oot == layers
"""
    subprocess.run([sys.executable, "-c", code], check=True)
