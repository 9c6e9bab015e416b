"""The rooms of docs/architecture.md: imports point down only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "vllm_atomic_moe"
# From the top down: a room may import those after it, and nothing above.
ROOMS = (
    "cli",
    "api",
    "measure",
    "control",
    "engine",
    "convert",
    "calibration",
    "scoring",
    "experts",
    "files",
    "__init__",
)
LIGHT = ("files", "experts", "scoring", "convert")
# vLLM's public names; everything else of vLLM may be imported in two files of engine/ only.
PUBLIC_VLLM = (
    "vllm",
    "vllm.config",
    "vllm.distributed",
    "vllm.engine.protocol",
    "vllm.exceptions",
    "vllm.logger",
    "vllm.lora.request",
    "vllm.model_executor.model_loader",
    "vllm.model_executor.model_loader.base_loader",
    "vllm.platforms",
)


def modules_imported_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize("room", LIGHT)
def test_light_rooms_import_neither_vllm_nor_transformers(room):
    loaded = modules_imported_by("; ".join(f"import {name}" for name in module_names(room)))
    assert not loaded & {"vllm", "transformers"}


def test_imports_point_down_only():
    for path in python_files(""):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for name in imported_names(path):
            parts = name.split(".")
            if parts[0] == "vllm_atomic_moe" and len(parts) > 1 and room != "__init__":
                below = ROOMS[ROOMS.index(room) :]
                assert parts[1] in below, f"{path}: {room} must not import {parts[1]}"


def test_register_loads_no_layer():
    """Every vLLM process calls it; few load a pruned model."""
    code = "import vllm_atomic_moe; vllm_atomic_moe.register()"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}; print(' '.join(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = done.stdout.split()
    assert "vllm_atomic_moe.engine.loader" in loaded
    assert "vllm_atomic_moe.engine.layer" not in loaded
    assert "vllm.model_executor.layers.fused_moe.routed_experts" not in loaded
    assert "vllm_atomic_moe.control.names" not in loaded
    assert "vllm.entrypoints.openai.models.serving" not in loaded


def test_calibration_never_imports_vllm():
    names = module_names("calibration")
    loaded = modules_imported_by("; ".join(f"import {name}" for name in names))
    assert "transformers" in loaded
    assert "vllm" not in loaded


def test_package_and_command_line_import_nothing_heavy():
    heavy = {"torch", "vllm", "transformers", "matplotlib"}
    assert not modules_imported_by("import vllm_atomic_moe") & heavy
    assert not modules_imported_by("import vllm_atomic_moe.cli") & heavy


def test_three_rooms_name_vllm_and_two_files_its_internals():
    for path in python_files(""):
        names = vllm_names(path)
        inside = path.relative_to(PACKAGE).parts
        if inside[0] not in ("engine", "control", "measure"):
            assert not names, f"{path}: {names} outside engine/, control/ and measure/"
        elif inside not in (("engine", "attach.py"), ("engine", "compat.py")):
            internal = names - set(PUBLIC_VLLM)
            assert not internal, f"{path}: {internal} belongs in engine/compat.py or attach.py"


def python_files(room: str) -> list[Path]:
    return sorted((PACKAGE / room).rglob("*.py"))


def module_names(room: str) -> list[str]:
    paths = [path.relative_to(PACKAGE.parent).with_suffix("") for path in python_files(room)]
    return [".".join(path.parts).removesuffix(".__init__") for path in paths]


def vllm_names(path: Path) -> set[str]:
    return {name for name in imported_names(path) if name.split(".")[0] == "vllm"}


def imported_names(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
    return names
