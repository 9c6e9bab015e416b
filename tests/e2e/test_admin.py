"""The admin endpoint of a real server, behind two API servers: every route, code and fault.

The tests share one server, in this order.
"""

from __future__ import annotations

import json
import os
import random
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
LOADED = ["heapr-20", "heapr-40", "hollow", "shape-20"]
PROMPT = "import os\nimport sys\n\n\ndef main("
ROUTES = [
    ("GET", "/atomic/v1/status"),
    ("GET", "/atomic/v1/profiles"),
    ("GET", "/atomic/v1/profiles/heapr-40"),
    ("PUT", "/atomic/v1/active"),
    ("PUT", "/atomic/v1/profiles/heapr-60"),
    ("DELETE", "/atomic/v1/profiles/heapr-40"),
]
ATOM_BYTES = 3 * 128 * 4


@pytest.fixture(scope="module")
def profiles(tmp_path_factory):
    """The demo's profiles, one with a layer of width zero, and a broken file."""
    directory = tmp_path_factory.mktemp("profiles") / "profiles"
    shutil.copytree(DEMO / "atomic_profiles", directory)
    write_hollow(directory, seed=5)
    (directory / "broken.safetensors").write_bytes(b"nothing")
    return directory


def write_hollow(directory, seed, name="hollow"):
    """A profile with all its atoms in heapr-20, so that it can be loaded at any time."""
    model = describe_checkpoint(DEMO)
    union = PruningProfile.read(DEMO / "atomic_profiles/heapr-20.safetensors").keep
    masks = {layer: mask & union[layer] for layer, mask in ragged_masks(model, seed=seed).items()}
    masks[model.layers[1]][:] = False
    metadata = {"model": json.dumps(model.identity())}
    PruningProfile(name, masks, metadata=metadata).write(directory / f"{name}.safetensors")


@pytest.fixture(scope="module")
def server(tmp_path_factory, profiles):
    extra = {"profiles": str(profiles), "active": ACTIVE, "resident": LOADED[1:]}
    directory = tmp_path_factory.mktemp("server")
    with admin_server(directory, extra, "--api-server-count=2") as server:
        yield server


@pytest.fixture(scope="module")
def scores(server):
    """Every loaded profile's scores of a prompt."""
    return {name: server.scores(PROMPT, name) for name in LOADED}


def error_of(answer, status, kind):
    """The message of an error in vLLM's shape."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["type"]) == (status, kind)
    assert answer.json().keys() == {"error"}
    assert error.keys() == {"message", "type", "param", "code"}
    return error["message"]


# --- what is served -------------------------------------------------------------------------------


def test_status_says_what_is_served(server, profiles):
    status = server.status()
    store = ProfileStore(profiles)
    masks = {name: store.load(name).keep for name in LOADED}
    union = sum(int(sum(keep[layer] for keep in masks.values()).bool().sum()) for layer in range(4))
    active = sum(int(mask.sum()) for mask in masks[ACTIVE].values())
    assert status["active"] == ACTIVE
    assert (status["generation"], status["agreed"], status["engines"]) == (0, True, 1)
    assert {name: entry["slot"] for name, entry in status["profiles"].items()} == {
        name: slot for slot, name in enumerate(LOADED)
    }
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
    assert [profile["name"] for profile in listed if profile["loaded"]] == LOADED
    assert [profile["name"] for profile in listed if profile["active"]] == [ACTIVE]
    by_name = {profile["name"]: profile for profile in listed}
    assert by_name["heapr-60"]["servable"]
    assert not by_name["dense"]["servable"]
    for name in store.names():
        profile = store.load(name)
        assert by_name[name]["kept"] == profile.kept
        assert by_name[name]["bytes"] == profile.kept_atoms * ATOM_BYTES
        assert by_name[name]["method"] == profile.metadata.get("method", "")
    one = server.ask("GET", "/atomic/v1/profiles/hollow").json()
    assert one.pop("widths") == {
        str(layer): store.load("hollow").widths(layer).tolist() for layer in range(4)
    }
    assert 0 < one.pop("live_tiles") < 1
    assert one == by_name["hollow"]
    assert server.ask("GET", "/atomic/v1/profiles/dense").json()["live_tiles"] is None
    answer = server.ask("GET", "/atomic/v1/profiles/nope")
    assert "'nope' is unknown; known are camera-20" in error_of(answer, 404, "NotFoundError")
    write_hollow(profiles, seed=9, name="late")
    listed = server.ask("GET", "/atomic/v1/profiles").json()["profiles"]
    assert "late" in [profile["name"] for profile in listed]
    (profiles / "late.safetensors").unlink()


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
        (b'{"profile": "heapr-40", "running": "x"}', "running: Input should be 'finish' or"),
        (b'{"profile": "heapr-40", "mode": "keep"}', "mode: Input should be 'wait' or 'abort'"),
        (b'{"profile": "heapr-40", "path": "x"}', "path: Extra inputs are not permitted"),
        (b'{"profile": "' + b"x" * 5000 + b'"}', "the body is longer than 4096 bytes"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_bodies_change_nothing(server, content, words):
    answer = server.ask("PUT", "/atomic/v1/active", content=content)
    assert words in error_of(answer, 400, "BadRequestError")
    assert server.status()["generation"] == 0


# --- the active profile ---------------------------------------------------------------------------


def test_unknown_profiles_and_those_that_are_not_loaded(server):
    message = error_of(server.activate("heapr-99"), 404, "NotFoundError")
    assert "profile 'heapr-99' is unknown; known are" in message
    for name in ("tenp-40", "dense"):
        message = error_of(server.activate(name), 409, "ProfileNotLoadedError")
        assert f"profile {name!r} is not loaded, heapr-20, heapr-40, hollow, shape-20" in message


def test_every_profile_answers_in_its_own_way(server, scores):
    assert len({tuple(values) for values in scores.values()}) == len(LOADED)
    for name in (*LOADED, ACTIVE):
        server.changed(name)
        assert server.scores(PROMPT) == pytest.approx(scores[name], abs=1e-5)


def test_the_answer_of_a_change(server):
    before = server.status()["generation"]
    answer = server.changed("heapr-40")
    assert answer == {
        "active": "heapr-40",
        "previous": ACTIVE,
        "generation": before + 1,
        "running": dict.fromkeys(LOADED, 0),
    }
    assert server.changed("heapr-40") == {**answer, "previous": "heapr-40"}
    assert server.changed(ACTIVE)["generation"] == before + 2


def test_words_of_version_0_1_are_taken_with_a_warning(server):
    assert server.changed("heapr-40", mode="wait", timeout_s=5)["active"] == "heapr-40"
    assert server.changed(ACTIVE, mode="abort")["active"] == ACTIVE
    assert "`mode` and `timeout_s` belong to version 0.1" in server.log()


def test_operators_at_once_leave_one_outcome(server, scores):
    """In any race, every change is made, and both API servers agree on the last one."""
    before = server.status()["generation"]
    names = ["heapr-40", "shape-20", "hollow", ACTIVE] * 3
    with ThreadPoolExecutor(len(names)) as pool:
        answers = list(pool.map(server.changed, names))
    status = server.status()
    assert max(answer["generation"] for answer in answers) == status["generation"] > before
    last = max(answers, key=lambda answer: answer["generation"])
    assert status["active"] == last["active"]
    for _ in range(6):  # connections to either API server
        assert server.scores(PROMPT) == pytest.approx(scores[status["active"]], abs=1e-5)
    server.changed(ACTIVE)


# --- loading and unloading ------------------------------------------------------------------------


def test_a_profile_is_loaded_and_unloaded(server, profiles, scores):
    model = "demo:heapr-60"
    body = {"model": model, "prompt": PROMPT, "max_tokens": 1}
    unknown = server.ask("POST", "/v1/completions", key=SERVING_KEY, json=body)
    assert unknown.status_code == 404
    generation = server.status()["generation"]
    answer = server.load("heapr-60").json()
    assert answer == {"profile": "heapr-60", "slot": 4, "generation": generation + 1}
    assert server.load("heapr-60").json() == answer  # a repeated load changes nothing
    for _ in range(6):  # connections to either API server
        models = server.ask("GET", "/v1/models", key=SERVING_KEY).json()["data"]
        assert model in [listed["id"] for listed in models]
    found = server.scores(PROMPT, "heapr-60")
    assert all(found != pytest.approx(values, abs=1e-2) for values in scores.values())
    assert server.scores(PROMPT) == pytest.approx(scores[ACTIVE], abs=1e-5)
    server.changed("heapr-60")
    message = error_of(server.unload("heapr-60"), 409, "ProfileActiveError")
    assert "is active; activate another one first" in message
    server.changed(ACTIVE)
    assert server.unload("heapr-60").json()["profile"] == "heapr-60"
    error_of(server.unload("heapr-60"), 404, "NotFoundError")
    for _ in range(6):
        answer = server.ask("POST", "/v1/completions", key=SERVING_KEY, json=body)
        assert answer.status_code == 404
    assert list(server.status()["profiles"]) == LOADED


def test_what_cannot_be_loaded_says_why(server, profiles):
    before = server.status()
    error_of(server.load("heapr-99"), 404, "NotFoundError")
    message = error_of(server.load("dense"), 409, "AtomsNotResidentError")
    loaded = [ProfileStore(profiles).load(name).keep for name in LOADED]
    held = sum(int(sum(keep[layer] for keep in loaded).bool().sum()) for layer in range(4))
    assert f"keeps {4 * 16 * 128 - held} atoms that are not in memory" in message
    assert error_of(server.load("a b"), 404, "NotFoundError")
    assert server.status() == before


def test_a_file_that_changes_or_vanishes_leaves_what_is_loaded(server, profiles, scores):
    path = profiles / "hollow.safetensors"
    kept = path.read_bytes()
    write_hollow(profiles, seed=6)
    assert server.scores(PROMPT, "hollow") == pytest.approx(scores["hollow"], abs=1e-5)
    message = error_of(server.load("hollow"), 409, "ProfileChangedError")
    assert "is loaded from another file; unload it first" in message
    assert server.unload("hollow").status_code == 200
    assert server.load("hollow").status_code == 200
    assert server.scores(PROMPT, "hollow") != pytest.approx(scores["hollow"], abs=1e-2)
    path.unlink()
    server.changed("hollow")
    server.changed(ACTIVE)
    error_of(server.load("hollow"), 404, "NotFoundError")
    assert server.unload("hollow").status_code == 200
    outside = profiles.parent / "outside.safetensors"
    outside.write_bytes(kept)
    path.symlink_to(outside)  # as in a cache of downloads
    assert server.load("hollow").status_code == 200
    assert server.scores(PROMPT, "hollow") == pytest.approx(scores["hollow"], abs=1e-5)
    path.unlink()
    path.write_bytes(kept)


@pytest.mark.parametrize(
    ("what", "words"),
    [("fail", "rank 0: injected: fail"), ("raise", "rank 0: injected: raise")],
)
def test_a_rank_that_cannot_load_changes_nothing(server, scores, what, words):
    before = server.status()
    with server.fault("load", what):
        assert words in error_of(server.load("heapr-60"), 409, "RankError")
    assert server.status() == before
    assert server.load("heapr-60").status_code == 200
    assert server.unload("heapr-60").status_code == 200
    assert server.scores(PROMPT) == pytest.approx(scores[ACTIVE], abs=1e-5)


def test_a_change_finishes_although_its_client_leaves(server):
    with server.fault("load", "sleep 1.5"), pytest.raises(httpx.TimeoutException):
        server.ask("PUT", "/atomic/v1/profiles/heapr-60", timeout=0.5)
    deadline = time.monotonic() + 60
    while "heapr-60" not in server.status()["profiles"]:
        assert time.monotonic() < deadline
    server.complete(PROMPT, "heapr-60")
    assert server.unload("heapr-60").status_code == 200


def test_ten_thousand_bodies_change_nothing(server):
    """Random bytes, and good bodies with something broken in them."""
    before = server.status()
    draw = random.Random(0)
    good = [b'{"profile": "heapr-40"}', b'{"profile": "heapr-40", "running": "finish"}']

    def body():
        if draw.random() < 0.3:
            return draw.randbytes(draw.randrange(200))
        mutated = bytearray(draw.choice(good))
        for _ in range(draw.randrange(1, 4)):
            place = draw.randrange(len(mutated))
            mutated[place : place + draw.randrange(2)] = draw.randbytes(draw.randrange(3))
        return bytes(mutated)

    bodies = [body() for _ in range(10_000)]
    url, headers = f"{server.url}/atomic/v1/active", {"Authorization": f"Bearer {ADMIN_KEY}"}

    def send(part):
        with httpx.Client(headers=headers, timeout=120, trust_env=False) as client:
            return [(sent, client.put(url, content=sent)) for sent in part]

    with ThreadPoolExecutor(4) as pool:
        answers = [
            pair for part in pool.map(send, (bodies[i::4] for i in range(4))) for pair in part
        ]
    changed = 0
    for sent, answer in answers:
        assert answer.status_code in (200, 400, 404, 409), (sent, answer.text)
        if answer.status_code == 200:  # still a good body: white space, or another loaded name
            assert json.loads(sent)["profile"] in LOADED
            changed += 1
        else:
            assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert changed < 1000
    server.changed(ACTIVE)
    assert server.status()["profiles"].keys() == before["profiles"].keys()


# --- the client -----------------------------------------------------------------------------------


def atomic_moe(*arguments, key=ADMIN_KEY, **environment):
    """The command line as a user's shell would run it: (exit code, stdout, stderr)."""
    environment = {**os.environ, "ATOMIC_MOE_ADMIN_KEY": key, "COLUMNS": "200", **environment}
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
    assert out.count(" active") == 2 + 1  # and a column
    assert out.count(" loaded") == 2 * (len(LOADED) - 1)
    code, out, _ = atomic_moe("status", "--url", one, "--json")
    assert json.loads(out) == [{"url": one, **server.status()}]
    code, out, _ = atomic_moe("profiles", "--url", one)
    states = {line.split()[0]: line.split()[-1] for line in out.splitlines()[1:]}
    assert {name for name, state in states.items() if state == "loaded"} == {*LOADED} - {ACTIVE}
    assert (states[ACTIVE], states["heapr-60"], states["dense"]) == ("active", "servable", "-")
    file = tmp_path / "key"
    file.write_text(ADMIN_KEY)
    code, out, _ = atomic_moe("profiles", "--url", one, "--json", "--key-file", str(file), key="")
    assert code == 0
    assert (
        json.loads(out)[0]["profiles"]
        == server.ask("GET", "/atomic/v1/profiles").json()["profiles"]
    )


def test_the_client_changes_a_fleet(server):
    one, two = fleet_of(server)
    code, out, err = atomic_moe("activate", "heapr-40", "--url", one, "--running", "abort")
    assert (code, err) == (0, "")
    assert " changed " in out
    assert server.status()["active"] == "heapr-40"
    code, out, err = atomic_moe("activate", ACTIVE, "--url", one, "--url", two, "--json")
    assert code == 0
    assert [(each["url"], each["result"]) for each in json.loads(out)] == [
        (one, "changed"),
        (two, "unchanged"),
    ]
    assert err == f"[1/2] {one}\n[2/2] {two}\n"
    for command, result in (("load", "changed"), ("load", "unchanged"), ("unload", "changed")):
        code, out, err = atomic_moe(command, "heapr-60", "--url", one, "--json")
        assert (code, json.loads(out)[0]["result"]) == (0, result)
    code, _, err = atomic_moe("activate", ACTIVE, "--url", one, "--mode", "wait")
    assert code == 0
    assert "belong to version 0.1" in err


def test_the_client_talks_to_the_address_it_is_given(server):
    nobody = f"http://127.0.0.1:{free_port()}"
    proxies = {"http_proxy": nobody, "HTTP_PROXY": nobody, "ALL_PROXY": nobody}
    code, out, _ = atomic_moe("status", "--url", server.url, **proxies)
    assert code == 0
    assert f" {ACTIVE} " in out


def test_the_client_stops_at_the_first_failure(server):
    one, two = fleet_of(server)
    nobody = f"http://127.0.0.1:{free_port()}"
    generation = server.status()["generation"]
    for arguments, words in (
        (["heapr-40", "--url", one, "--url", nobody], f"error: {nobody}: "),
        (["heapr-40", "--url", "ftp://x"], "error: URL 'ftp://x': wanted http://host:port"),
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
    code, out, err = atomic_moe("activate", "heapr-99", "--url", one, "--url", two, "--json")
    assert code == 1
    first, second = json.loads(out)
    assert (first["result"], second["result"]) == ("failed", "not tried")
    assert first["error"].startswith(f"{one}: 404 NotFoundError: profile 'heapr-99' is unknown")
    # The JSON has all of it, the line is cut.
    assert err.splitlines()[-1].startswith(f"error: {first['error'][:60]}")
    assert server.status()["generation"] == generation
    code, _, err = atomic_moe("activate", "hollow")
    assert code == 2
    assert "--url" in err


# --- what is seen from outside --------------------------------------------------------------------


def test_metrics_are_those_of_all_api_servers(server):
    for name in LOADED:
        server.complete(PROMPT, name)
    time.sleep(5)  # the gauges are set every two seconds
    metrics, status = server.metrics(), server.status()

    def values(name):
        return {each: metrics[f'atomic_moe_{name}{{profile="{each}"}}'] for each in LOADED}

    assert values("active_profile") == {name: float(name == ACTIVE) for name in LOADED}
    assert values("running") == values("waiting") == dict.fromkeys(LOADED, 0)
    admitted = {name: status["profiles"][name]["admitted"] for name in LOADED}
    assert values("requests_total") == admitted
    for kind in ("dense", "resident", "active"):
        value = metrics[f'atomic_moe_expert_bytes{{kind="{kind}"}}']
        assert value == status["memory"][f"{kind}_bytes"]
    outcomes = {
        outcome: metrics[f'atomic_moe_profile_changes_total{{outcome="{outcome}"}}']
        for outcome in ("changed", "unchanged", "refused", "failed")
    }
    assert outcomes["changed"] > 10
    assert outcomes["unchanged"] >= 2
    assert outcomes["refused"] > 1000
    assert outcomes["failed"] == 0


def test_dashboard_uses_existing_metrics(server):
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
    attempts = [line for line in log.splitlines() if "Profile change: key=" in line]
    assert any(
        f"status=200 outcome=changed {ACTIVE}->heapr-40 generation=" in line for line in attempts
    )
    assert any("loaded heapr-60 generation=" in line for line in attempts)
    assert any("key=none" in line and "status=401 outcome=refused" in line for line in attempts)
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
        ("GET", "/atomic/v1/profiles/{name}"): always | {"404", "409"},
        ("PUT", "/atomic/v1/profiles/{name}"): always | {"404", "409"},
        ("DELETE", "/atomic/v1/profiles/{name}"): always | {"404", "409"},
        ("PUT", "/atomic/v1/active"): always | {"400", "404", "409"},
    }
    assert httpx.get(f"{server.url}/docs").status_code == 200


@pytest.mark.parametrize("key", [ADMIN_KEY, None])
def test_requests_of_any_kind_are_answered_as_documented(server, key):
    """schemathesis makes valid and invalid requests from the server's own description."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = list(schema.include(path_regex="^/atomic/v1/").get_all_operations())
    assert len(operations) == len(ROUTES)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            strategy = operation.ok().as_strategy(generation_mode=mode)

            @settings(max_examples=40, database=None)
            @given(case=strategy)
            def answered(case):
                case.call_and_validate(headers=headers)

            answered()
    server.changed(ACTIVE)
