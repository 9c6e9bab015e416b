"""What is deployed is well-formed: Dockerfile by hadolint, manifests by Kubernetes' schemas."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from tests.documents import ROOT

BIN = Path(sys.executable).parent
KUBERNETES = ROOT / "deploy/kubernetes"
COMPONENTS = sorted(path.name for path in (KUBERNETES / "components").iterdir())
RENDERED = [KUBERNETES / "base", *sorted((KUBERNETES / "overlays").iterdir())]
# Its schema is the Prometheus operator's, which no package has.
CUSTOM = {"ServiceMonitor"}
VERSIONS = ("1.34", "1.37")


def render(directory: Path) -> list[dict]:
    command = [BIN / "kubectl", "kustomize", "--load-restrictor=LoadRestrictionsNone", directory]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    return list(yaml.safe_load_all(ended.stdout))


def validate(resource: dict) -> None:
    if resource["kind"] not in CUSTOM:
        for version in VERSIONS:
            kubernetes_validate.validate(resource, version, strict=True)


def with_component(name: str, directory: Path) -> list[dict]:
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["base"],
        "components": ["component"],
    }
    (directory / "base").symlink_to(KUBERNETES / "base")
    (directory / "component").symlink_to(KUBERNETES / "components" / name)
    (directory / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return render(directory)


def test_dockerfile_passes_its_linter():
    ended = subprocess.run(
        [BIN / "hadolint", ROOT / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout


@pytest.mark.parametrize("directory", RENDERED, ids=lambda directory: directory.name)
def test_manifests_are_valid(directory):
    resources = render(directory)
    assert {"Deployment", "Service"} <= {resource["kind"] for resource in resources}
    for resource in resources:
        validate(resource)
        assert resource["kind"] != "Secret", "it is made by the operator and only referenced"


@pytest.mark.parametrize("name", COMPONENTS)
def test_components_are_valid(name, tmp_path):
    for resource in with_component(name, tmp_path):
        validate(resource)


def test_ingress_does_not_expose_the_admin_endpoint(tmp_path):
    resources = with_component("ingress", tmp_path)
    [ingress] = [resource for resource in resources if resource["kind"] == "Ingress"]
    paths = [path["path"] for rule in ingress["spec"]["rules"] for path in rule["http"]["paths"]]
    assert paths
    for path in paths:
        assert not "/atomic/v1/active".startswith(path.rstrip("/") + "/"), path


@pytest.mark.parametrize("directory", RENDERED, ids=lambda directory: directory.name)
def test_the_service_finds_the_server_and_its_health(directory):
    resources = {
        resource["kind"]: resource
        for resource in render(directory)
        if resource["metadata"]["name"] == "atomic-moe"
    }
    template = resources["Deployment"]["spec"]["template"]
    [server] = template["spec"]["containers"]
    assert (
        resources["Service"]["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    )
    ports = {port["name"] for port in server["ports"]}
    assert {port["targetPort"] for port in resources["Service"]["spec"]["ports"]} <= ports
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server[probe]["httpGet"] == {"path": "/health", "port": "http"}
    volumes = {volume["name"] for volume in template["spec"]["volumes"]}
    assert {mount["name"] for mount in server["volumeMounts"]} <= volumes
