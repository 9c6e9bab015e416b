"""The arrows of CONTRIBUTING: who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "vllm_atomic_moe"
LIGHT = (
    "tensor_files",
    "export_format",
    "checkpoint",
    "profiles",
    "packing",
    "scoring",
    "importing",
    "exporting",
    "plots",
    "kernels",
)
BASE = {"tensor_files", "export_format", "checkpoint", "profiles"}
# Wing -> the wings it may import. The first line of a directory's __init__ is the wing's purpose.
ARROWS = {
    "__init__": {"serving"},
    "tensor_files": set(),
    "export_format": {"packing"},
    "checkpoint": {"export_format"},
    "profiles": {"checkpoint", "tensor_files"},
    "packing": set(),
    "calibration": BASE,
    "scoring": BASE | {"calibration"},
    "importing": BASE | {"scoring"},
    "plots": {"profiles", "tensor_files"},
    "kernels": {"packing"},
    "exporting": BASE | {"packing"},
    "serving": BASE | {"packing", "calibration", "kernels"},
    "cli": BASE | {"calibration", "scoring", "importing", "exporting", "plots", "serving"},
}
# vLLM's public names; everything else of vLLM may be imported in serving/compat.py only.
PUBLIC_VLLM = (
    "vllm",
    "vllm.config",
    "vllm.distributed",
    "vllm.engine.protocol",
    "vllm.logger",
    "vllm.model_executor.model_loader",
    "vllm.model_executor.model_loader.base_loader",
    "vllm.platforms",
)


def modules_imported_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize("wing", LIGHT)
def test_light_modules_import_neither_vllm_nor_transformers(wing):
    modules = [f"vllm_atomic_moe.{wing}"]
    modules += [f"vllm_atomic_moe.{wing}.{path.stem}" for path in python_files(wing)]
    names = [name for name in modules if not name.endswith("__init__")]
    loaded = modules_imported_by("; ".join(f"import {name}" for name in names))
    assert not loaded & {"vllm", "transformers"}


def test_imports_point_down_only():
    for path in python_files(""):
        wing = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for name in imported_names(path):
            parts = name.split(".")
            if parts[0] == "vllm_atomic_moe" and len(parts) > 1 and parts[1] != wing:
                assert parts[1] in ARROWS[wing], f"{path}: {wing} may not import {parts[1]}"


def test_register_loads_no_layer():
    """Every vLLM process registers; few of them load a pruned model."""
    code = "import vllm_atomic_moe; vllm_atomic_moe.register()"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}; print(' '.join(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = done.stdout.split()
    assert "vllm_atomic_moe.serving.loader" in loaded
    assert "vllm_atomic_moe.serving.layer" not in loaded
    assert "vllm.model_executor.layers.fused_moe.routed_experts" not in loaded


def test_calibration_never_imports_vllm():
    modules = [f"vllm_atomic_moe.calibration.{path.stem}" for path in python_files("calibration")]
    loaded = modules_imported_by("; ".join(f"import {name}" for name in modules))
    assert "transformers" in loaded
    assert "vllm" not in loaded


def test_package_and_command_line_import_nothing_heavy():
    heavy = {"torch", "vllm", "transformers", "matplotlib"}
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
    return {name for name in imported_names(path) if name.split(".")[0] == "vllm"}


def imported_names(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
    return names
