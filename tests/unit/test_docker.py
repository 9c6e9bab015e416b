"""Dockerfile, Compose and the release pass their linters, and what they name exists."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml
from prometheus_client import REGISTRY

from tests.dashboard import dashboard, queries, selectors
from tests.documents import ROOT, example
from vllm_atomic_moe.control.errors import Outcome
from vllm_atomic_moe.control.metrics import profile_metrics

BIN = Path(sys.executable).parent
DEPLOY = ROOT / "deploy"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
SCHEMA = ("--builtin-schema", "vendor.compose-spec")
VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")


@pytest.fixture(scope="module")
def compose():
    """The Compose file with the defaults of its variables."""
    text = (DEPLOY / "compose.yaml").read_text()
    return yaml.safe_load(VARIABLE.sub(lambda match: match[2], text))


def check(*command):
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_dockerfile_passes_its_linter():
    check(BIN / "hadolint", ROOT / "Dockerfile")


def test_release_workflow_is_valid_and_runs_what_runs_here():
    workflow = ROOT / ".github/workflows/release.yml"
    check(BIN / "check-jsonschema", "--builtin-schema", "vendor.github-workflows", workflow)
    [job] = yaml.safe_load(workflow.read_text())["jobs"].values()
    makefile = (ROOT / "Makefile").read_text()
    targets = [it["run"].split() for it in job["steps"] if it.get("run", "").startswith("make ")]
    assert ["make", "release-check"] in targets
    for _, target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_compose_file_is_valid():
    check(BIN / "check-jsonschema", *SCHEMA, DEPLOY / "compose.yaml")


def test_a_second_compose_file_is_valid(tmp_path):
    (tmp_path / "mine.yaml").write_text(example("deploy/README.md", "mine.yaml"))
    check(BIN / "check-jsonschema", *SCHEMA, tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        ("MODEL", "MODEL --load-format atomic-pruned --enforce-eager"),
        (
            "MODEL --load-format auto",
            "MODEL --load-format atomic-pruned --enforce-eager --load-format auto",
        ),
        ("--port 1 --model=M", "--load-format atomic-pruned --enforce-eager --port 1 --model=M"),
        ("", "--load-format atomic-pruned --enforce-eager"),
    ],
)
def test_flags_override_the_entry_point(arguments, command, tmp_path):
    (tmp_path / "vllm").write_text('#!/bin/sh\necho "$*"\n')
    (tmp_path / "vllm").chmod(0o755)
    defaults = "--load-format atomic-pruned --enforce-eager"
    ended = subprocess.run(
        ["/bin/sh", DEPLOY / "serve.sh", defaults, *arguments.split()],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert ended.stdout == f"serve {command}\n"


@pytest.mark.parametrize("home", ["", "there", "elsewhere"])
def test_entry_point_finds_a_writable_home(home, tmp_path):
    (tmp_path / "vllm").write_text('#!/bin/sh\ntouch "$HOME/written" && echo "$HOME"\n')
    (tmp_path / "vllm").chmod(0o755)
    (tmp_path / "there").mkdir()
    (tmp_path / "temporary").mkdir()
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "TMPDIR": str(tmp_path / "temporary")}
    if home:
        environment["HOME"] = str(tmp_path / home)
    ended = subprocess.run(
        ["/bin/sh", DEPLOY / "serve.sh", "", "MODEL"],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    found = Path(ended.stdout.strip())
    assert (
        (found == tmp_path / "there")
        if home == "there"
        else (found.parent == tmp_path / "temporary")
    )


def test_volumes_secrets_and_files_are_there(compose):
    for name, service in compose["services"].items():
        for volume in service["volumes"]:
            source, target, *mode = volume.split(":")
            if source.startswith("."):
                assert (DEPLOY / source).is_file(), source
                assert mode == ["ro"], source
            else:
                assert source in compose["volumes"], source
            assert (target in ("/models", "/profiles")) <= (mode == ["ro"]), name
        assert set(service.get("secrets", ())) <= compose["secrets"].keys()
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    secrets = re.findall(r"--from-file=([\w-]+)", (DEPLOY / "README.md").read_text())
    assert {Path(compose["secrets"]["admin-key"]["file"]).name, ".env", *secrets} <= {*ignored}


def test_nothing_is_reachable_from_outside_or_privileged(compose):
    ports = [port for service in compose["services"].values() for port in service["ports"]]
    assert len(ports) == len(compose["services"])
    assert all(port.startswith("127.0.0.1:") for port in ports)
    for service in compose["services"].values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert not {"privileged", "user", "cap_add", "network_mode", "ipc"} & service.keys()


def test_one_server_for_each_target_of_the_dockerfile(compose):
    servers = [it for it in compose["services"].values() if "profiles" in it]
    scraped = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["scrape_configs"]
    [[target]] = [it["targets"] for job in scraped for it in job["static_configs"]]
    targets = re.findall(r"^FROM \S+ AS (\w+)$", DOCKERFILE, re.M)
    assert DOCKERFILE.count("\nHEALTHCHECK") == len(servers) == 2
    for server in servers:
        [profile] = server["profiles"]
        assert profile in targets
        assert server["image"] == f"vllm-atomic-moe:{profile}"
        assert server["networks"]["default"]["aliases"] == [target.partition(":")[0]]
        assert server["ports"][0].endswith(f":{target.partition(':')[2]}")
        assert server["environment"]["ATOMIC_MOE_ADMIN_KEY_FILE"] == "/run/secrets/admin-key"
        assert ("deploy" in server) == (profile == "gpu")


def test_images_are_pinned(compose):
    for service in compose["services"].values():
        assert re.search(r":(v?\d+\.\d+\.\d+|gpu|cpu)$", service["image"]), service["image"]


def test_alerts_use_existing_metrics(compose):
    mounts = dict(it.split(":")[:2] for it in compose["services"]["prometheus"]["volumes"])
    configuration = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    assert configuration["rule_files"] == [mounts["./prometheus/alerts.yml"]]
    [job] = [it["job_name"] for it in configuration["scrape_configs"]]
    [group] = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())["groups"]
    profile_metrics()
    known = {"up": "gauge", **{family.name: family.type for family in REGISTRY.collect()}}
    for rule in group["rules"]:
        assert set(rule) <= {"alert", "expr", "for", "annotations"}
        [(metric, matchers, _)] = selectors(rule["expr"])
        name = metric.removesuffix("_total")
        assert known[name] == ("counter" if name != metric else "gauge"), metric
        labels = {label: value for label, _, value in matchers}
        assert labels.get("job", job) == job
        assert labels.get("outcome", "failed") in get_args(Outcome)


def test_grafana_gets_its_data_source_and_dashboard(compose):
    grafana = compose["services"]["grafana"]
    mounts = dict(volume.split(":")[:2] for volume in grafana["volumes"])
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert mounts["./grafana/dashboard.json"] == home
    [provider] = yaml.safe_load((DEPLOY / "grafana/dashboards.yml").read_text())["providers"]
    assert provider["options"]["path"] == str(Path(home).parent)
    [source] = yaml.safe_load((DEPLOY / "grafana/datasource.yml").read_text())["datasources"]
    assert source["type"] == "prometheus"
    name, _, port = source["url"].removeprefix("http://").partition(":")
    assert compose["services"][name]["ports"] == [f"127.0.0.1:{port}:{port}"]
    scrape = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["global"]
    assert source["jsonData"]["timeInterval"] == scrape["scrape_interval"]


def test_dashboard_asks_every_server_it_shows():
    for panel, _, query in queries():
        found = list(selectors(query))
        assert found, panel
        for metric, matchers, _ in found:
            assert ("instance", "Re", ".*") in matchers, (panel, metric)


def test_panels_do_not_overlap():
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for position in (panel["gridPos"] for panel in panels)
        for x, y in itertools.product(
            range(position["x"], position["x"] + position["w"]),
            range(position["y"], position["y"] + position["h"]),
        )
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_dashboard_uses_the_chosen_data_source():
    texts = re.findall(r'"uid": "([^"]*)"', json.dumps(dashboard()))
    assert set(texts) == {"${datasource}", "atomic-moe"}
