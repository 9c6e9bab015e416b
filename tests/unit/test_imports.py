"""The arrows of CONTRIBUTING: who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "vllm_atomic_moe"
LIGHT = ("tensor_files", "checkpoint", "profiles", "packing", "scoring", "kernels")
# vLLM's public names; everything else of vLLM may be imported in serving/compat.py only.
PUBLIC_VLLM = (
    "vllm",
    "vllm.config",
    "vllm.distributed",
    "vllm.logger",
    "vllm.model_executor.model_loader",
    "vllm.model_executor.model_loader.base_loader",
    "vllm.platforms",
)


def modules_imported_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_neither_vllm_nor_transformers(module):
    loaded = modules_imported_by(f"import vllm_atomic_moe.{module}")
    assert not loaded & {"vllm", "transformers"}


def test_calibration_never_imports_vllm():
    modules = [f"vllm_atomic_moe.calibration.{path.stem}" for path in python_files("calibration")]
    loaded = modules_imported_by("; ".join(f"import {name}" for name in modules))
    assert "transformers" in loaded
    assert "vllm" not in loaded


def test_package_and_command_line_import_nothing_heavy():
    heavy = {"torch", "vllm", "transformers"}
    assert not modules_imported_by("import vllm_atomic_moe") & heavy
    assert not modules_imported_by("import vllm_atomic_moe.cli") & heavy


def test_only_serving_names_vllm_and_only_compat_its_internals():
    for path in python_files(""):
        names = vllm_names(path)
        inside = path.relative_to(PACKAGE).parts
        if inside[0] != "serving":
            assert not names, f"{path}: {names} outside serving/"
        elif inside[1] != "compat.py":
            internal = names - set(PUBLIC_VLLM)
            assert not internal, f"{path}: {internal} belongs into serving/compat.py"


def python_files(wing: str) -> list[Path]:
    return sorted((PACKAGE / wing).rglob("*.py"))


def vllm_names(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
    return {name for name in names if name.split(".")[0] == "vllm"}
