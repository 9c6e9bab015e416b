"""The output of `kubectl kustomize` for deploy/kubernetes is valid and consistent.

Every base, overlay and component is rendered by kustomize itself, validated strictly against
Kubernetes' own schemas, and its container's command is run with stand-ins for `vllm` and `ray`, so
that the arguments reach vLLM's parser as a pod would give them.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from tests.documents import ROOT, example
from vllm_atomic_moe import __version__
from vllm_atomic_moe.engine.options import OPTION_KEYS, LoaderOptions

KUBERNETES = ROOT / "deploy/kubernetes"
KUBECTL = Path(sys.executable).parent / "kubectl"
# The oldest release that is still maintained, and the newest that has schemas here.
VERSIONS = ("1.34", "1.37")
COMPONENTS = sorted(path.name for path in (KUBERNETES / "components").iterdir())
OVERLAYS = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())
SETUPS = ["base", *OVERLAYS, *COMPONENTS, "all-components"]
WITH_ARGUMENTS = [name for name in ("base", *OVERLAYS) if name != "demo-cpu"]
WRITABLE = {"/home/vllm", "/tmp", "/dev/shm"}


@pytest.fixture(scope="module")
def setups(tmp_path_factory):
    """Every setup's objects by name; a component is added to the base."""
    directory = tmp_path_factory.mktemp("kustomize")

    def with_components(name, components):
        path = directory / name
        path.mkdir()
        kustomization = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [os.path.relpath(KUBERNETES / "base", path)],
            "components": [
                os.path.relpath(KUBERNETES / "components" / component, path)
                for component in components
            ],
        }
        (path / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return render(path)

    return (
        {"base": render(KUBERNETES / "base")}
        | {name: render(KUBERNETES / "overlays" / name) for name in OVERLAYS}
        | {name: with_components(name, [name]) for name in COMPONENTS}
        | {"all-components": with_components("all-components", COMPONENTS)}
    )


def render(directory):
    ended = subprocess.run(
        [KUBECTL, "kustomize", directory], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert not ended.stderr, ended.stderr  # deprecated fields
    return list(yaml.safe_load_all(ended.stdout))


def of_kind(resources, *kinds):
    return [resource for resource in resources if resource["kind"] in kinds]


def the(resources, kind, name="atomic-moe"):
    [resource] = [it for it in of_kind(resources, kind) if it["metadata"]["name"] == name]
    return resource


def workloads(resources):
    return of_kind(resources, "Deployment", "StatefulSet")


def pods(resources):
    return [workload["spec"]["template"] for workload in workloads(resources)]


def container_of(pod):
    [container] = pod["spec"]["containers"]
    return container


def server_of(resources):
    return container_of(the(resources, "Deployment")["spec"]["template"])


def selected(resources, labels):
    assert labels
    return [pod for pod in pods(resources) if labels.items() <= pod["metadata"]["labels"].items()]


def port_names(pod):
    return {port["name"]: port["containerPort"] for port in container_of(pod).get("ports", [])}


def environment(container):
    return {entry["name"]: entry for entry in container["env"]}


def command_of(container, directory):
    """The container's calls of `vllm` and `ray`, each as its list of arguments."""
    calls = directory / "calls"
    for name in ("vllm", "ray"):
        (directory / name).write_text(
            f'#!{sys.executable}\nimport json, sys\nwith open("{calls}", "a") as file:\n'
            f'    print(json.dumps(["{name}", *sys.argv[1:]]), file=file)\n'
        )
        (directory / name).chmod(0o755)
    entry_points = re.findall(r"^ENTRYPOINT (.*)$", (ROOT / "Dockerfile").read_text(), re.M)
    assert container["image"] == "vllm-atomic-moe:gpu"  # the Dockerfile's last target
    command = container.get("command") or json.loads(entry_points[-1])
    command = [word.replace("/opt/atomic-moe/serve", str(directory / "serve")) for word in command]
    shutil.copy(ROOT / "deploy/serve.sh", directory / "serve")
    (directory / "serve").chmod(0o755)
    variables = {"PATH": f"{directory}:/usr/bin:/bin", "VLLM_HOST_IP": "10.0.0.7"}
    variables |= {name: it["value"] for name, it in environment(container).items() if "value" in it}
    subprocess.run([*command, *container.get("args", [])], env=variables, check=True)
    return [json.loads(line) for line in calls.read_text().splitlines()]


@functools.cache
def serve_parser():
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser(exit_on_error=False))


def parsed(container, directory):
    *_, (program, subcommand, *arguments) = command_of(container, directory)
    assert (program, subcommand) == ("vllm", "serve")
    return serve_parser().parse_args(arguments)


@pytest.mark.parametrize("name", SETUPS)
def test_every_object_is_valid(setups, name):
    identities = [(it["kind"], it["metadata"]["name"]) for it in setups[name]]
    assert len(set(identities)) == len(identities) >= 2
    for resource in setups[name]:
        if resource["kind"] != "ServiceMonitor":
            for version in VERSIONS:
                kubernetes_validate.validate(resource, version, strict=True)


def test_service_monitor_scrapes_the_service(setups):
    # Its schema belongs to the Prometheus operator, so the few fields are looked at one by one.
    resources = setups["service-monitor"]
    monitor = the(resources, "ServiceMonitor")
    assert set(monitor) == {"apiVersion", "kind", "metadata", "spec"}
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    assert set(monitor["spec"]) == {"selector", "endpoints"}
    assert set(monitor["spec"]["selector"]) == {"matchLabels"}
    [endpoint] = monitor["spec"]["endpoints"]
    assert set(endpoint) == {"port", "path", "interval"}
    assert re.fullmatch(r"[1-9][0-9]*s", endpoint["interval"])
    assert endpoint["path"] == "/metrics"
    labels = monitor["spec"]["selector"]["matchLabels"]
    for setup in ("service-monitor", "multi-node"):
        services = of_kind(setups[setup], "Service")
        [service] = [it for it in services if labels.items() <= it["metadata"]["labels"].items()]
        assert service["metadata"]["name"] == "atomic-moe"
        assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}


@pytest.mark.parametrize("name", SETUPS)
def test_selectors_find_their_pods(setups, name):
    resources = setups[name]
    for workload in workloads(resources):
        labels = workload["spec"]["selector"]["matchLabels"]
        assert selected(resources, labels) == [workload["spec"]["template"]]
    server = the(resources, "Deployment")["spec"]["template"]
    for service in of_kind(resources, "Service"):
        assert selected(resources, service["spec"]["selector"]) == [server]
    [port] = the(resources, "Service")["spec"]["ports"]
    assert (port["name"], port["port"], port["targetPort"]) == ("http", 8000, "http")
    assert port_names(server) == {"http": 8000}


@pytest.mark.parametrize("name", SETUPS)
def test_health_decides_about_the_server(setups, name):
    server = server_of(setups[name])
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server[probe]["httpGet"] == {"path": "/health", "port": "http"}
    startup = server["startupProbe"]
    # Ray's half an hour for its workers comes on top of loading.
    minutes = 60 if name == "multi-node" else 30
    assert startup["periodSeconds"] * startup["failureThreshold"] == minutes * 60
    assert the(setups[name], "Deployment")["spec"]["progressDeadlineSeconds"] > minutes * 60


@pytest.mark.parametrize("name", SETUPS)
def test_pods_run_without_privileges(setups, name):
    for pod in pods(setups[name]):
        spec, container = pod["spec"], container_of(pod)
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & set(spec)
        assert spec["securityContext"] == {
            "runAsNonRoot": True,
            "runAsUser": 2000,
            "runAsGroup": 0,
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


@pytest.mark.parametrize("name", SETUPS)
def test_mounts_are_there_and_read_only_but_three(setups, name):
    resources = setups[name]
    claims = {claim["metadata"]["name"] for claim in of_kind(resources, "PersistentVolumeClaim")}
    assert claims == (set() if name == "demo-cpu" else {"atomic-moe-models"})
    for pod in pods(resources):
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        mounts = {mount["mountPath"]: mount for mount in container_of(pod)["volumeMounts"]}
        assert sorted(mount["name"] for mount in mounts.values()) == sorted(volumes)
        assert {path for path, mount in mounts.items() if not mount.get("readOnly")} == WRITABLE
        assert all("emptyDir" in volumes[mounts[path]["name"]] for path in WRITABLE)
        assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"]["medium"] == "Memory"
        assert ("/models" in mounts) == bool(claims)
        if claims:
            models = volumes[mounts["/models"]["name"]]["persistentVolumeClaim"]
            assert models == {"claimName": "atomic-moe-models", "readOnly": True}


@pytest.mark.parametrize("name", SETUPS)
def test_keys_come_from_a_secret_that_is_not_included(setups, name):
    resources = setups[name]
    assert not of_kind(resources, "Secret")
    for pod in pods(resources):
        container, files = container_of(pod), set()
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        for volume in pod["spec"]["volumes"]:
            if secret := volume.get("secret"):
                assert secret["secretName"] == "atomic-moe"
                # Group 0 reads it; a missing key stops the pod.
                assert secret["defaultMode"] == 0o440
                assert not secret.get("optional")
                files |= {f"{mounts[volume['name']]}/{item['path']}" for item in secret["items"]}
        variables = environment(container)
        named = {
            entry["value"]
            for variable, entry in variables.items()
            if variable in ("ATOMIC_MOE_ADMIN_KEY_FILE", "RAY_AUTH_TOKEN_PATH")
        }
        assert files == named
        assert "ATOMIC_MOE_ADMIN_KEY" not in variables
        assert "RAY_AUTH_TOKEN" not in variables
    variables = environment(server_of(resources))
    assert variables["ATOMIC_MOE_ADMIN_KEY_FILE"]["value"].endswith("/admin-key")
    assert variables["VLLM_API_KEY"]["valueFrom"] == {
        "secretKeyRef": {"name": "atomic-moe", "key": "api-key", "optional": True}
    }


@pytest.mark.parametrize("name", ["ingress", "all-components"])
def test_ingress_forwards_v1_only(setups, name):
    resources = setups[name]
    [ingress] = of_kind(resources, "Ingress")
    assert "defaultBackend" not in ingress["spec"]
    [rule] = ingress["spec"]["rules"]
    [path] = rule["http"]["paths"]
    # A prefix in the sense of whole path elements, so that it covers neither / nor /atomic.
    assert (path["path"], path["pathType"]) == ("/v1", "Prefix")
    assert "annotations" not in ingress["metadata"]  # nothing that rewrites paths
    backend = path["backend"]["service"]
    service = the(resources, "Service", backend["name"])
    assert backend["port"]["name"] in {port["name"] for port in service["spec"]["ports"]}
    assert ingress["spec"]["tls"][0]["hosts"] == [rule["host"]]


@pytest.mark.parametrize("name", ["network-policy", "all-components", "multi-node"])
def test_network_policy_names_everyone_it_lets_in(setups, name):
    resources = setups[name]
    policy = the(resources, "NetworkPolicy")["spec"]
    assert selected(resources, policy["podSelector"]["matchLabels"]) == pods(resources)
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    [entry] = policy["ingress"]
    assert entry["ports"] == [{"port": "http"}]
    assert entry["from"] == [
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress"}}},
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}},
        {"podSelector": {"matchLabels": {"atomic-moe-client": "operator"}}},
    ]
    [names] = policy["egress"]
    assert names["to"] == [
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}}
    ]
    assert sorted((port["protocol"], port["port"]) for port in names["ports"]) == [
        ("TCP", 53),
        ("UDP", 53),
    ]


@pytest.mark.parametrize("name", WITH_ARGUMENTS)
def test_vllm_takes_the_arguments(setups, name, tmp_path):
    resources = setups[name]
    server = server_of(resources)
    arguments = parsed(server, tmp_path)
    assert Path(arguments.model_tag).parent == Path("/models")
    assert arguments.load_format == "atomic-pruned"
    assert arguments.port == 8000
    assert arguments.data_parallel_size == 1
    extra = arguments.model_loader_extra_config
    assert set(extra) <= set(OPTION_KEYS)
    options = LoaderOptions.parse(extra)
    assert options.active
    assert options.resident
    gpus = sum(
        workload["spec"]["replicas"]
        * container_of(workload["spec"]["template"])["resources"]["limits"]["nvidia.com/gpu"]
        for workload in workloads(resources)
    )
    assert arguments.tensor_parallel_size * arguments.pipeline_parallel_size == gpus
    executor = "ray" if gpus > 1 else None
    assert arguments.distributed_executor_backend == executor
    pod = the(resources, "Deployment")["spec"]["template"]["spec"]
    before = server["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert before + arguments.shutdown_timeout < pod["terminationGracePeriodSeconds"]


def test_the_demo_uses_the_images_settings(setups):
    server = server_of(setups["demo-cpu"])
    assert server["image"] == "vllm-atomic-moe:cpu"
    assert not {"args", "command"} & set(server)
    assert "nvidia.com/gpu" not in server["resources"]["limits"]


@pytest.mark.parametrize("name", SETUPS)
def test_updates_need_no_additional_gpu(setups, name):
    strategy = the(setups[name], "Deployment")["spec"]["strategy"]
    assert strategy == {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}


def test_head_and_workers_find_each_other(setups, tmp_path):
    resources = setups["multi-node"]
    head, workers = the(resources, "Deployment"), the(resources, "StatefulSet", "atomic-moe-worker")
    assert head["spec"]["replicas"] == 1  # a second one would be a second cluster
    assert workers["spec"]["podManagementPolicy"] == "Parallel"
    service = the(resources, "Service", workers["spec"]["serviceName"])
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True  # the head waits for the workers
    [port] = service["spec"]["ports"]
    address = f"{service['metadata']['name']}:{port['port']}"

    calls = {}
    for workload in (head, workers):
        container = container_of(workload["spec"]["template"])
        (directory := tmp_path / workload["kind"]).mkdir()
        calls[workload["kind"]] = command_of(container, directory)
        gpus = container["resources"]["limits"]["nvidia.com/gpu"]
        [start] = [call for call in calls[workload["kind"]] if call[:2] == ["ray", "start"]]
        assert f"--num-gpus={gpus}" in start
        assert "--node-ip-address=10.0.0.7" in start
        variables = environment(container)
        host = variables["VLLM_HOST_IP"]["valueFrom"]["fieldRef"]["fieldPath"]
        assert host == "status.podIP"
        assert variables["RAY_AUTH_MODE"]["value"] == "token"
    start, serve = calls["Deployment"]
    assert {"--head", f"--port={port['port']}"} <= set(start)
    assert "--block" not in start
    assert serve[:2] == ["vllm", "serve"]
    wait, start = calls["StatefulSet"]
    assert wait == ["ray", "health-check", "--address", address]
    assert {"--block", f"--address={address}"} <= set(start)

    # $(NAME) is replaced by what stands before it.
    names = list(environment(container_of(head["spec"]["template"])))
    variables = environment(container_of(head["spec"]["template"]))
    assert variables["RAY_ADDRESS"]["value"] == f"$(VLLM_HOST_IP):{port['port']}"
    assert names.index("VLLM_HOST_IP") < names.index("RAY_ADDRESS")

    policy = the(resources, "NetworkPolicy", "atomic-moe-ray")["spec"]
    group = {"podSelector": policy["podSelector"]}
    assert selected(resources, policy["podSelector"]["matchLabels"]) == pods(resources)
    assert (policy["ingress"], policy["egress"]) == ([{"from": [group]}], [{"to": [group]}])


@pytest.mark.parametrize("name", ["operator", "all-components"])
def test_operator_fills_the_volume_and_may_change_profiles(setups, name):
    resources = setups[name]
    operator = the(resources, "Pod", "atomic-moe-operator")
    labels, container = operator["metadata"]["labels"], container_of(operator)
    server = server_of(resources)
    for service in of_kind(resources, "Service"):
        assert not service["spec"]["selector"].items() <= labels.items()
    for policy in of_kind(resources, "NetworkPolicy"):
        assert not policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
        assert {"podSelector": {"matchLabels": labels}} in policy["spec"]["ingress"][0]["from"]
    assert container["securityContext"] == server["securityContext"]
    assert container["image"] == server["image"]
    pod = the(resources, "Deployment")["spec"]["template"]["spec"]["securityContext"]
    assert pod.items() <= operator["spec"]["securityContext"].items()
    key = "ATOMIC_MOE_ADMIN_KEY_FILE"
    assert environment(container)[key] == environment(server)[key]
    [claim] = [it for it in operator["spec"]["volumes"] if "persistentVolumeClaim" in it]
    assert claim["persistentVolumeClaim"] == {"claimName": "atomic-moe-models"}


@pytest.mark.parametrize("name", WITH_ARGUMENTS)
def test_example_of_the_guide(setups, name, tmp_path_factory, tmp_path):
    directory = tmp_path_factory.mktemp("example")
    (directory / "deploy").symlink_to(ROOT / "deploy")
    (directory / "mine").mkdir()
    text = example("deploy/README.md", "mine/kustomization.yaml")
    if name != "base":
        text = text.replace("kubernetes/base ", f"kubernetes/overlays/{name} ")
    if name == "multi-node":
        text = re.sub(r"^.*# not with multi-node.*\n", "", text, flags=re.M)
    (directory / "mine/kustomization.yaml").write_text(text)
    resources = render(directory / "mine")
    for resource in resources:
        assert resource["metadata"]["namespace"] == "moe"
        for version in VERSIONS:
            kubernetes_validate.validate(resource, version, strict=True)
    images = {container_of(it)["image"] for it in pods(resources)}
    images.add(the(resources, "Pod", "atomic-moe-operator")["spec"]["containers"][0]["image"])
    assert images == {f"registry.example.com/vllm-atomic-moe:{__version__}-gpu"}

    def arguments_of(server, directory):
        directory.mkdir()
        return parsed({**server, "image": "vllm-atomic-moe:gpu"}, directory)

    arguments = arguments_of(server_of(resources), tmp_path / "example")
    plain = arguments_of(server_of(setups[name]), tmp_path / "plain")
    assert arguments.model_tag == "/models/Qwen3-30B-A3B"
    assert (arguments.served_model_name, arguments.max_model_len) == (["qwen3"], 32768)
    assert LoaderOptions.parse(arguments.model_loader_extra_config).active == "heapr-25"
    for argument in ("load_format", "tensor_parallel_size", "pipeline_parallel_size"):
        assert getattr(arguments, argument) == getattr(plain, argument)
    assert arguments.distributed_executor_backend == plain.distributed_executor_backend
    assert arguments.shutdown_timeout == plain.shutdown_timeout
    [ingress] = of_kind(resources, "Ingress")
    [rule] = ingress["spec"]["rules"]
    assert ingress["spec"]["tls"][0]["hosts"] == [rule["host"]] == ["moe.example.org"]
    [controller, *_] = the(resources, "NetworkPolicy")["spec"]["ingress"][0]["from"]
    assert set(controller["namespaceSelector"]["matchLabels"].values()) == {"traefik"}


def test_comments_name_their_own_directory():
    for directory in (KUBERNETES / "base", *(KUBERNETES / "overlays" / it for it in OVERLAYS)):
        text = (directory / "kustomization.yaml").read_text()
        for path in re.findall(r"-k (deploy/kubernetes/\S+)", text):
            assert ROOT / path == directory
