"""The admin endpoint of a real server, behind two API servers: every route, code and fault.

The tests share one server, in this order; the last ones end it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import pytest
import schemathesis
from hypothesis import given, settings
from prometheus_client.parser import text_string_to_metric_families
from schemathesis import GenerationMode

from tests.checkpoints import ragged_masks
from tests.dashboard import dashboard, queries, selectors
from tests.e2e.conftest import ADMIN_KEY, BIN, DEMO, SERVING_KEY, admin_server, free_port
from vllm_atomic_moe.files.checkpoint import describe_checkpoint
from vllm_atomic_moe.files.profiles import ProfileStore, PruningProfile

ACTIVE = "heapr-20"
RESIDENT = ["heapr-20", "heapr-40", "hollow", "shape-20"]
PROMPT = "import os\nimport sys\n\n\ndef main("
ROUTES = [
    ("GET", "/atomic/v1/status"),
    ("GET", "/atomic/v1/profiles"),
    ("GET", "/atomic/v1/profiles/heapr-40"),
    ("PUT", "/atomic/v1/active"),
]
ATOM_BYTES = 3 * 128 * 4


@pytest.fixture(scope="module")
def profiles(tmp_path_factory):
    """The demo's profiles, one with a layer of width zero, and a broken file."""
    directory = tmp_path_factory.mktemp("profiles") / "profiles"
    shutil.copytree(DEMO / "atomic_profiles", directory)
    model = describe_checkpoint(DEMO)
    masks = ragged_masks(model, seed=5)
    masks[model.layers[1]][:] = False
    PruningProfile("hollow", masks, metadata={"model": json.dumps(model.identity())}).write(
        directory / "hollow.safetensors"
    )
    (directory / "broken.safetensors").write_bytes(b"nothing")
    return directory


@pytest.fixture(scope="module")
def server(tmp_path_factory, profiles):
    extra = {"profiles": str(profiles), "active": ACTIVE, "resident": RESIDENT[1:]}
    directory = tmp_path_factory.mktemp("server")
    with admin_server(directory, extra, "--api-server-count=2") as server:
        yield server


@pytest.fixture(scope="module")
def scores(server):
    """What every resident profile makes of a prompt, by switching to it."""
    found = {}
    for name in [*RESIDENT, ACTIVE]:
        server.switched(name)
        found[name] = server.scores(PROMPT)
    return found


def error_of(answer, status, kind):
    """The message of an error in vLLM's shape."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["type"]) == (status, kind)
    assert answer.json().keys() == {"error"}
    assert error.keys() == {"message", "type", "param", "code"}
    return error["message"]


def test_status_says_what_is_served(server, profiles):
    status = server.status()
    store = ProfileStore(profiles)
    masks = {name: store.load(name).keep for name in RESIDENT}
    union = sum(int(sum(keep[layer] for keep in masks.values()).bool().sum()) for layer in range(4))
    active = sum(int(mask.sum()) for mask in masks[ACTIVE].values())
    assert status["active"] == ACTIVE
    assert (status["generation"], status["state"], status["failure"]) == (0, "serving", None)
    assert sorted(status["resident"]) == RESIDENT
    assert status["last_switch"] is None
    assert server.ask("GET", "/weight_info").json() == {"weight_version": ACTIVE}
    memory = status["memory"]
    assert memory["dense_bytes"] == 4 * 16 * 128 * ATOM_BYTES
    assert memory["active_bytes"] == active * ATOM_BYTES
    assert 0 <= memory["resident_bytes"] - union * ATOM_BYTES <= 4 * 16 * ATOM_BYTES
    assert memory["rank_resident_bytes"] == [memory["resident_bytes"]]
    assert 0 < memory["index_bytes"] < 0.05 * memory["resident_bytes"]


def test_profiles_are_those_of_the_directory(server, profiles):
    listed = server.ask("GET", "/atomic/v1/profiles").json()["profiles"]
    store = ProfileStore(profiles)
    assert [profile["name"] for profile in listed] == sorted([*store.names(), "dense"])
    assert [profile["name"] for profile in listed if profile["resident"]] == RESIDENT
    assert [profile["name"] for profile in listed if profile["active"]] == [ACTIVE]
    by_name = {profile["name"]: profile for profile in listed}
    for name in store.names():
        profile = store.load(name)
        assert by_name[name]["kept"] == profile.kept
        assert by_name[name]["bytes"] == profile.kept_atoms * ATOM_BYTES
        assert by_name[name]["method"] == profile.metadata.get("method", "")
    one = server.ask("GET", "/atomic/v1/profiles/hollow").json()
    assert one.pop("widths") == {
        str(layer): store.load("hollow").widths(layer).tolist() for layer in range(4)
    }
    assert one == by_name["hollow"]
    answer = server.ask("GET", "/atomic/v1/profiles/nope")
    assert "'nope' is unknown; known are camera-20" in error_of(answer, 404, "NotFoundError")


@pytest.mark.parametrize("key", [None, "", "wrong", SERVING_KEY, ADMIN_KEY + "x", ADMIN_KEY[:-1]])
@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_nothing_without_the_key(server, method, path, key):
    answer = server.ask(method, path, key=key, content=b'{"profile": "heapr-40"}')
    error_of(answer, 401, "UnauthorizedError")
    assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_the_admin_key_opens_no_serving_route(server):
    assert server.ask("GET", "/v1/models").status_code == 401
    assert server.ask("GET", "/v1/models", key=SERVING_KEY).status_code == 200


@pytest.mark.parametrize(("key", "status"), [("wrong", b"401"), (ADMIN_KEY, b"400")])
def test_long_bodies_are_not_waited_for(server, key, status):
    """The answer comes while the body is still being sent."""
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        connection.sendall(
            f"PUT /atomic/v1/active HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
            "Content-Length: 1000000\r\n\r\n".encode()
            + b" " * 5000
        )
        assert connection.recv(1000).split()[1] == status


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "body: Field required"),
        (b"{", "body: JSON decode error"),
        (b"[]", "body: "),
        (b"\xff\xfe", "body: JSON decode error"),
        (b"\xc3", "body: There was an error parsing the body"),
        (b"{}", "profile: Field required"),
        (b'{"profile": 7}', "profile: Input should be a valid string"),
        (b'{"profile": "../x"}', "profile: String should match pattern"),
        (b'{"profile": "x/y.safetensors"}', "profile: String should match pattern"),
        (b'{"profile": "heapr-40\\n"}', "profile: String should match pattern"),
        (b'{"profile": "heapr-40", "mode": "keep"}', "mode: Input should be 'wait' or 'abort'"),
        (b'{"profile": "heapr-40", "timeout_s": 0}', "timeout_s: Input should be greater than 0"),
        (b'{"profile": "heapr-40", "timeout_s": 1e9}', "timeout_s: Input should be less than"),
        (b'{"profile": "heapr-40", "timeout_s": NaN}', ""),
        (b'{"profile": "heapr-40", "path": "x"}', "path: Extra inputs are not permitted"),
        (b'{"profile": "' + b"x" * 5000 + b'"}', "the body is longer than 4096 bytes"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_bodies_change_nothing(server, content, words):
    answer = server.ask("PUT", "/atomic/v1/active", content=content)
    assert words in error_of(answer, 400, "BadRequestError")
    assert server.status()["active"] == ACTIVE


def test_unknown_and_not_resident_profiles(server):
    message = error_of(server.switch("heapr-99"), 404, "NotFoundError")
    assert "profile 'heapr-99' is unknown; known are" in message
    for name in ("tenp-40", "dense"):
        message = error_of(server.switch(name), 409, "ProfileNotResidentError")
        assert f"profile {name!r} is not resident" in message
        assert "list it in `resident` and restart" in message


def test_every_profile_answers_in_its_own_way(server, scores):
    assert len({tuple(values) for values in scores.values()}) == len(RESIDENT)
    status = server.status()
    assert (status["active"], status["state"]) == (ACTIVE, "serving")
    assert status["generation"] == len(RESIDENT)
    assert server.scores(PROMPT) == pytest.approx(scores[ACTIVE], abs=1e-5)
    last = status["last_switch"]
    assert (last["profile"], last["previous"], last["outcome"]) == (ACTIVE, "shape-20", "switched")
    assert last["total_ms"] >= last["drain_ms"] > 0 < last["commit_ms"]


def test_the_answer_of_a_switch(server):
    before = server.status()["generation"]
    answer = server.switched("heapr-40", mode="abort", timeout_s=5)
    assert (answer["active"], answer["previous"]) == ("heapr-40", ACTIVE)
    assert answer["generation"] == before + 1
    assert answer["total_ms"] >= answer["drain_ms"] > 0 < answer["commit_ms"]
    assert server.ask("GET", "/weight_info").json() == {"weight_version": "heapr-40"}
    assert server.switched(ACTIVE)["previous"] == "heapr-40"
    assert server.ask("GET", "/weight_info").json() == {"weight_version": ACTIVE}


def test_the_active_profile_again_is_no_work(server):
    before = server.status()
    answer = server.switched(ACTIVE)
    assert answer == {
        "active": ACTIVE,
        "previous": ACTIVE,
        "generation": before["generation"],
        "drain_ms": 0.0,
        "commit_ms": 0.0,
        "total_ms": 0.0,
    }
    assert server.status() == before


def test_one_of_two_wins(server):
    before = server.status()["generation"]
    with server.fault("prepare", "sleep 2"), ThreadPoolExecutor() as pool:
        first = pool.submit(server.switch, "heapr-40")
        time.sleep(0.5)
        others = [pool.submit(server.switch, name) for name in ("shape-20", ACTIVE, "hollow")]
        state = server.status()["state"]
        answers = [future.result() for future in others]
        assert first.result().status_code == 200, first.result().text
    for answer in answers:
        if answer.status_code == 409:  # those that were heard before the switch was done
            assert "under way" in error_of(answer, 409, "SwitchInProgressError")
    assert 409 in [answer.status_code for answer in answers]
    assert state in ("switching", "serving")
    wins = sum(answer.status_code == 200 for answer in answers)
    assert server.status()["generation"] == before + 1 + wins
    server.switched(ACTIVE)


def test_switches_at_once_are_one_or_told_so(server):
    """Whatever the race: a switch, or the right reason, and never a paused engine."""
    before = server.status()["generation"]
    names = ["heapr-40", "shape-20", "hollow", "heapr-40", "shape-20", "hollow"]
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(server.switch, names))
    refused = [answer for answer in answers if answer.status_code != 200]
    for answer in refused:
        error_of(answer, 409, "SwitchInProgressError")
    assert len({answer.json()["generation"] for answer in answers if answer not in refused}) == (
        server.status()["generation"] - before
    )
    assert server.ask("GET", "/is_paused").json() == {"is_paused": False}
    server.switched(ACTIVE)


def test_a_client_that_goes_away_leaves_no_paused_engine(server, scores):
    before = server.status()["generation"]
    with server.fault("commit", "sleep 1.5"), pytest.raises(httpx.TimeoutException):
        server.switch("heapr-40", timeout=0.5)
    deadline = time.monotonic() + 60
    while server.status()["state"] != "serving":
        assert time.monotonic() < deadline
    status = server.status()
    assert (status["active"], status["generation"]) == ("heapr-40", before + 1)
    assert server.scores(PROMPT) == pytest.approx(scores["heapr-40"], abs=1e-5)
    server.switched(ACTIVE)


def test_a_switch_that_was_never_finished_is_displaced(server, scores):
    """What an API server leaves behind that dies in the middle: paused, half changed, leased."""
    generation = server.status()["generation"]

    def call(verb, **arguments):
        body = {"method": "atomic_moe_control", "args": [verb, {"owner": "gone", **arguments}]}
        results = server.ask("POST", "/collective_rpc", json=body).json()["results"]
        assert all(result["ok"] for result in results), results

    def leave(lease_s):
        call(
            "begin",
            profile="heapr-40",
            generation=generation,
            displaced=None,
            lease_s=lease_s,
        )

    leave(3)
    assert server.ask("POST", "/pause?mode=wait").status_code == 200
    call("commit")
    assert server.status()["state"] == "switching"
    error_of(server.switch("shape-20"), 409, "SwitchInProgressError")
    time.sleep(3)
    assert server.switched("shape-20")["generation"] == generation + 1
    assert server.scores(PROMPT) == pytest.approx(scores["shape-20"], abs=1e-5)
    assert server.switched(ACTIVE)["previous"] == "shape-20"
    assert server.scores(PROMPT) == pytest.approx(scores[ACTIVE], abs=1e-5)


def test_an_engine_paused_by_somebody_else_is_left_alone(server):
    assert server.ask("POST", "/pause?mode=wait").status_code == 200
    try:
        message = error_of(server.switch("heapr-40"), 409, "EnginePausedError")
        assert "resume it first" in message
        assert server.ask("GET", "/is_paused").json() == {"is_paused": True}
    finally:
        server.ask("POST", "/resume")
    server.switched("heapr-40")
    server.switched(ACTIVE)


@pytest.mark.parametrize(
    ("where", "what", "words"),
    [
        ("begin", "fail", "injected: fail"),
        ("prepare", "fail", "prepare failed on rank 0: injected: fail"),
        ("commit", "fail", "commit failed on rank 0: injected: fail"),
        ("commit", "half", "commit failed on rank 0: injected: half"),
        ("reset_prefix_cache", "fail", "the prefix cache was not reset"),
    ],
)
def test_what_fails_goes_back(server, scores, where, what, words):
    before = server.status()
    with server.fault(where, what):
        answer = server.switch("hollow")
    if where == "begin":
        assert words in error_of(answer, 409, "SwitchInProgressError")
    else:
        message = error_of(answer, 503, "SwitchFailedError")
        assert message == f"{words}; {ACTIVE} goes on serving"
        last = server.status()["last_switch"]
        assert (last["outcome"], last["error"]) == ("rolled_back", words)
    after = server.status()
    assert (after["active"], after["generation"]) == (ACTIVE, before["generation"])
    assert after["state"] == "serving"
    assert server.scores(PROMPT) == pytest.approx(scores[ACTIVE], abs=1e-5)
    assert server.ask("GET", "/weight_info").json() == {"weight_version": ACTIVE}
    assert server.ask("GET", "/health").status_code == 200


def atomic_moe(*arguments, key=ADMIN_KEY):
    """The command line as a user's shell would run it: (exit code, stdout, stderr)."""
    environment = {**os.environ, "ATOMIC_MOE_ADMIN_KEY": key, "COLUMNS": "200"}
    done = subprocess.run(
        [str(BIN / "atomic-moe"), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def fleet_of(server):
    """The server twice, by two names."""
    return [server.url, server.url.replace("127.0.0.1", "localhost")]


def test_the_client_shows_servers_and_profiles(server, tmp_path):
    one, two = fleet_of(server)
    code, out, _ = atomic_moe("status", "--url", one, "--url", f"{two}/")
    assert code == 0
    assert len(out.splitlines()) == 3
    assert out.count(f" {ACTIVE} ") == out.count(" serving ") == 2
    code, out, _ = atomic_moe("status", "--url", one, "--json")
    assert json.loads(out) == [{"url": one, **server.status()}]
    code, out, _ = atomic_moe("profiles", "--url", one)
    states = {line.split()[0]: line.split()[-1] for line in out.splitlines()[1:]}
    assert {name for name, state in states.items() if state == "resident"} == {*RESIDENT} - {ACTIVE}
    assert states[ACTIVE] == "active"
    assert states["dense"] == "-"
    file = tmp_path / "key"
    file.write_text(ADMIN_KEY)
    code, out, _ = atomic_moe("profiles", "--url", one, "--json", "--key-file", str(file), key="")
    assert code == 0
    assert (
        json.loads(out)[0]["profiles"]
        == server.ask("GET", "/atomic/v1/profiles").json()["profiles"]
    )


def test_the_client_switches_a_fleet(server):
    one, two = fleet_of(server)
    code, out, err = atomic_moe("activate", "heapr-40", "--url", one, "--mode", "abort")
    assert (code, err) == (0, "")
    assert " switched " in out
    assert server.status()["active"] == "heapr-40"
    assert server.status()["last_switch"]["mode"] == "abort"
    code, out, err = atomic_moe("activate", ACTIVE, "--url", one, "--url", two, "--json")
    assert code == 0
    assert [(each["url"], each["result"]) for each in json.loads(out)] == [
        (one, "switched"),
        (two, "unchanged"),
    ]
    assert err == f"[1/2] {one}\n[2/2] {two}\n"


def test_the_client_stops_at_the_first_failure(server):
    one, two = fleet_of(server)
    nobody = f"http://127.0.0.1:{free_port()}"
    generation = server.status()["generation"]
    for arguments, words in (
        (["heapr-40", "--url", one, "--url", nobody], f"error: {nobody}: "),
        (["heapr-99", "--url", one], f"error: {one}: profile 'heapr-99' is not resident"),
        (["heapr-40", "--url", "ftp://x"], "error: URL 'ftp://x' does not start with http"),
    ):
        code, out, err = atomic_moe("activate", *arguments)
        assert (code, out) == (1, "")
        assert err.startswith(words)
        assert err.count("\n") == 1
    code, out, err = atomic_moe("status", "--url", nobody, "--url", one)
    assert code == 1
    assert f" {ACTIVE} " in out
    assert err.startswith(f"error: {nobody}: ")
    code, _, err = atomic_moe("status", "--url", one, key="wrong")
    assert code == 1
    assert err.startswith(f"error: {one}: 401 UnauthorizedError: ")
    assert server.status()["generation"] == generation
    with server.fault("prepare", "fail"):
        code, out, err = atomic_moe("activate", "hollow", "--url", one, "--url", two, "--json")
    assert code == 1
    first, second = json.loads(out)
    assert (first["result"], second["result"]) == ("failed", "not tried")
    assert first["error"].startswith(f"{one}: 503 SwitchFailedError: prepare failed on rank 0")
    assert err.splitlines()[-1] == f"error: {first['error']}"
    assert server.status()["active"] == ACTIVE
    code, _, err = atomic_moe("activate", "hollow")
    assert code == 2
    assert "--url" in err


def test_metrics_are_those_of_all_api_servers(server):
    metrics = server.metrics()
    active = {name: metrics[f'atomic_moe_active_profile{{profile="{name}"}}'] for name in RESIDENT}
    assert active == {name: float(name == ACTIVE) for name in RESIDENT}
    memory = server.status()["memory"]
    for kind in ("dense", "resident", "active"):
        value = metrics[f'atomic_moe_expert_bytes{{kind="{kind}"}}']
        assert value == memory[f"{kind}_bytes"]
    switched = metrics['atomic_moe_switches_total{outcome="switched"}']
    assert switched == server.status()["generation"]
    assert metrics['atomic_moe_switches_total{outcome="rolled_back"}'] == 5
    assert metrics['atomic_moe_switches_total{outcome="unchanged"}'] >= 1
    assert metrics['atomic_moe_switches_total{outcome="refused"}'] > 20
    assert metrics["atomic_moe_switch_seconds_count"] == switched + 5
    assert metrics["atomic_moe_drain_seconds_count"] == switched + 5
    assert metrics["atomic_moe_switch_seconds_sum"] >= metrics["atomic_moe_drain_seconds_sum"] > 0


def test_dashboard_asks_for_metrics_that_are_there(server):
    server.complete(PROMPT)
    answer = httpx.get(f"{server.url}/metrics", timeout=60)
    samples = [
        (sample.name, {**sample.labels, "instance": "added by Prometheus"})
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    ]

    def fits(labels, name, operator, value):
        assert operator in ("Equal", "Re")
        pattern = value if operator == "Re" else re.escape(value)
        return re.fullmatch(pattern, labels[name]) is not None

    for panel, legend, query in queries():
        for metric, matchers, grouped in selectors(query):
            found = [labels for name, labels in samples if name == metric]
            assert found, (panel, metric)
            named = {*grouped, *re.findall(r"{{(\w+)}}", legend)}
            assert all(named <= labels.keys() for labels in found), (panel, metric, named)
            assert any(all(fits(labels, *it) for it in matchers) for labels in found), panel
    [servers] = [it for it in dashboard()["templating"]["list"] if it["type"] == "query"]
    metric = re.fullmatch(r"label_values\((\w+), instance\)", servers["query"]["query"])[1]
    assert metric in {name for name, _ in samples}


def test_attempts_are_in_the_log_and_keys_are_not(server):
    log = server.log()
    attempts = [line for line in log.splitlines() if "Profile switch: key=" in line]
    assert any(
        f"status=200 outcome=switched {ACTIVE}->heapr-40 mode=abort drain_ms=" in line
        for line in attempts
    )
    assert any("key=none" in line and "status=401 outcome=refused" in line for line in attempts)
    assert any("status=503 outcome=rolled_back" in line for line in attempts)
    [used] = {line.partition("key=")[2].split()[0] for line in attempts if "status=200" in line}
    assert f"Admin endpoint: key={used}" in log
    assert ADMIN_KEY not in log
    assert "left out: " in log
    assert "broken.safetensors" in log


def test_the_documentation_names_every_code(server):
    documented = httpx.get(f"{server.url}/openapi.json").json()
    found = {
        (method.upper(), path): set(operation["responses"])
        for path, operations in documented["paths"].items()
        for method, operation in operations.items()
        if path.startswith("/atomic/")
    }
    always = {"200", "401", "403", "503"}

    assert found == {
        ("GET", "/atomic/v1/status"): always,
        ("GET", "/atomic/v1/profiles"): always,
        ("GET", "/atomic/v1/profiles/{name}"): always | {"404"},
        ("PUT", "/atomic/v1/active"): always | {"400", "404", "409"},
    }
    assert httpx.get(f"{server.url}/docs").status_code == 200


@pytest.mark.parametrize("key", [ADMIN_KEY, None])
def test_requests_of_any_kind_are_answered_as_documented(server, key):
    """schemathesis makes requests out of the server's own description, good and bad ones."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = list(schema.include(path_regex="^/atomic/v1/").get_all_operations())
    assert len(operations) == len(ROUTES)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            strategy = operation.ok().as_strategy(generation_mode=mode)

            @settings(max_examples=40, deadline=None, database=None)
            @given(case=strategy)
            def answered(case):
                case.call_and_validate(headers=headers)

            answered()
    server.switched(ACTIVE)


def test_a_switch_that_cannot_go_back_stays_paused_and_says_so(server):
    server.switched(ACTIVE)
    with server.fault("commit", "half"), server.fault("rollback", "fail"):
        answer = server.switch("hollow")
    message = error_of(answer, 503, "SwitchFailedError")
    assert "going back failed: rollback failed on rank 0: injected: fail" in message
    assert "the engine stays paused, restart the server" in message
    for _ in range(6):
        server.wait_for_health(503)
    assert server.ask("GET", "/is_paused").json() == {"is_paused": True}
    for _ in range(6):  # connections to either API server
        status = server.status()
        assert (status["state"], status["active"]) == ("failed", ACTIVE)
        assert "going back failed" in status["failure"]
        assert status["last_switch"]["outcome"] == "failed"
        message = error_of(server.switch(ACTIVE), 503, "SwitchFailedError")
        assert "an earlier switch failed" in message
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": 1}
    with pytest.raises(httpx.TimeoutException):
        server.ask("POST", "/v1/completions", key=SERVING_KEY, json=body, timeout=3)
    assert server.metrics()['atomic_moe_switches_total{outcome="failed"}'] == 1
