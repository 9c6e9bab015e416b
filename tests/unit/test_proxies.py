"""Proxies of the environment never see the admin key, and are not used for this machine."""

import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.unit.test_cli import refused, run
from vllm_atomic_moe.control.client import AdminClient
from vllm_atomic_moe.files.checkpoint import resolve_model
from vllm_atomic_moe.measure.server_process import asking_directly, free_port, running

STATUS = {
    "generation": 3,
    "active": "a",
    "agreed": True,
    "engines": 1,
    "profiles": {},
    "memory": {
        **dict.fromkeys(("active_bytes", "resident_bytes", "dense_bytes", "index_bytes"), 1),
        "rank_resident_bytes": [1],
    },
}
VARIABLES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy")
DOCKERFILE = Path(__file__).parents[2] / "Dockerfile"


class Answering:
    """A server that gives one answer to everything, and records the requests."""

    def __init__(self, content, status=200, kind="application/json"):
        self.asked = asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append((self.path, self.headers.get("Authorization")))
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.end_headers()
                self.wfile.write(content.encode())

            do_PUT = do_DELETE = do_CONNECT = do_GET

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def proxy(monkeypatch):
    """A proxy that every variable names, with no exceptions."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with Answering("<html>Bad gateway</html>", 502, "text/html") as server:
        for name in VARIABLES:
            monkeypatch.setenv(name, server.url)
        yield server


def test_the_admin_key_goes_to_the_address_given(proxy, monkeypatch):
    monkeypatch.setenv("ATOMIC_MOE_ADMIN_KEY", "k")
    with Answering(json.dumps(STATUS)) as server:
        assert run("status", "--url", server.url).exit_code == 0
        assert server.asked == [("/atomic/v1/status", "Bearer k")]
    assert "127.0.0.1:9: " in refused("activate", "heapr-40", "--url", "http://127.0.0.1:9")
    assert proxy.asked == []


def test_a_proxy_may_be_named(proxy, monkeypatch):
    monkeypatch.setenv("ATOMIC_MOE_ADMIN_KEY", "k")
    with Answering(json.dumps(STATUS)) as named:
        url = "http://10.0.0.5:8000"
        result = run("status", "--url", url, "--proxy", named.url)
        assert result.exit_code == 0, result.output
        assert named.asked == [(f"{url}/atomic/v1/status", "Bearer k")]
    assert proxy.asked == []
    for other in ("socks5://127.0.0.1:9", "127.0.0.1:9", "http://"):
        line = refused("status", "--url", url, "--proxy", other)
        assert f"proxy '{other}': wanted http://host:port or https://host:port" in line


@pytest.mark.parametrize("content", ['{"generation": 1}', '{"profiles": 3}', "[]", "3", "{}"])
@pytest.mark.parametrize(
    "command", [("status",), ("profiles",), ("activate", "a"), ("load", "a"), ("unload", "a")]
)
def test_a_success_of_another_service_is_one_line(content, command):
    with Answering(content) as server:
        assert "the answer is not from a vLLM server" in refused(*command, "--url", server.url)


@pytest.mark.parametrize(
    ("value", "no_proxy"),
    [
        ("socks5://127.0.0.1:9", ""),
        ("socks://127.0.0.1:9", ""),
        ("http://127.0.0.1:9", "localhost,fe80::/10,[::1"),
    ],
)
def test_proxies_that_httpx_refuses(monkeypatch, value, no_proxy):
    for name in VARIABLES:
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NO_PROXY", no_proxy)
    with Answering(json.dumps(STATUS)) as server:
        assert run("status", "--url", server.url).exit_code == 0


@pytest.mark.parametrize("variable", ["ALL_PROXY=socks5://127.0.0.1:9", "ALL_PROXY=socks://a:9"])
def test_a_hub_that_cannot_be_asked_through_a_proxy_is_one_line(variable, tmp_path):
    """In its own process, since the hub's library keeps its client."""
    name, _, value = variable.partition("=")
    script = (
        "import os, sys\n"
        f"os.environ.update({{{name!r}: {value!r}, 'HF_HUB_OFFLINE': '0', 'HF_HOME': '.'}})\n"
        "from vllm_atomic_moe.files.checkpoint import resolve_model\n"
        "try:\n    resolve_model('org/name')\nexcept ValueError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("model 'org/name' is ")
    assert "check the path" in done.stdout


def test_exceptions_of_the_hub_become_one_line(monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise ImportError("Using SOCKS proxy, but the 'socksio' package is not installed.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    words = r"the Hugging Face Hub cannot be asked \(ImportError: Using SOCKS .*or HTTP_PROXY, ALL"
    with pytest.raises(ValueError, match=words):
        resolve_model("org/name")


@pytest.mark.parametrize(
    ("content", "status", "kind", "words"),
    [
        (
            "<html>Bad</html>",
            502,
            "text/html",
            "502 the answer is not from a vLLM server (text/html",
        ),
        ("<html>Welcome</html>", 200, "text/html", "200 the answer is not from a vLLM server"),
        ('{"status": "ok"}', 200, "application/json", "200 the answer is not from a vLLM server"),
        ("[]", 200, "application/json", "200 the answer is not from a vLLM server"),
        ('"no"', 404, "application/json", "404 the answer is not from a vLLM server"),
        ('{"error": "no model"}', 404, "application/json", "404 the answer is not from a vLLM"),
        ('{"error": ["x"]}', 404, "application/json", "404 the answer is not from a vLLM server"),
        ('{"detail": "Not Found"}', 404, "application/json", "404 no admin endpoint here; start"),
        (
            "nothing",
            404,
            "text/plain",
            "404 the answer is not from a vLLM server (text/plain, 'noth",
        ),
        (
            '{"error": {"message": "Not Found", "type": "Not Found"}}',
            404,
            "application/json",
            "404 no admin endpoint here",
        ),
        (
            '{"error": {"message": "unknown", "type": "ProfileNotFoundError"}}',
            404,
            "application/json",
            "404 ProfileNotFoundError: unknown",
        ),
        ('{"error": "busy"}', 503, "application/json", "503 the answer is not from a vLLM server"),
    ],
)
def test_answers_of_other_services(content, status, kind, words):
    with Answering(content, status, kind) as server, AdminClient(server.url, None) as client:
        for ask in (client.status, client.profiles, lambda: client.activate("a", "finish")):
            with pytest.raises(ValueError, match=re.escape(words)):
                ask()


def test_servers_of_this_machine_are_waited_for_directly(proxy, tmp_path):
    """A proxy's 200 does not mean a healthy server, and its 502 does not mean an unhealthy one."""
    port = free_port()
    script = (
        "import os, sys, time\n"
        "from http.server import HTTPServer, BaseHTTPRequestHandler as Handler\n"
        "Handler.do_GET = lambda self: (self.send_response(200), self.end_headers())\n"
        "time.sleep(0.5)\n"
        "HTTPServer(('127.0.0.1', int(sys.argv[1])), Handler).serve_forever()\n"
    )
    command = [sys.executable, "-c", script, str(port)]
    environment = asking_directly({"http_proxy": proxy.url, "NO_PROXY": "example.org"})
    with running(command, port, tmp_path / "log", environment, timeout_s=20):
        child = "from urllib.request import urlopen; print(urlopen(f'http://127.0.0.1:%d').status)"
        done = subprocess.run(
            [sys.executable, "-c", child % port], capture_output=True, text=True, env=environment
        )
        assert done.stdout == "200\n", done.stderr
    assert environment["no_proxy"] == "example.org,127.0.0.1,localhost"
    assert proxy.asked == []


def test_the_health_checks_of_the_images_pass_no_proxy(proxy):
    """What HEALTHCHECK runs, against another port."""
    joined = DOCKERFILE.read_text().replace("\\\n", "")
    commands = re.findall(r"^HEALTHCHECK .*? CMD (\[.*\])$", joined, re.M)
    assert len(commands) == 2
    with Answering("") as server:
        for number, command in enumerate(commands, 1):
            _, *arguments = json.loads(
                command.replace("localhost:8000", f"127.0.0.1:{server.port}")
            )
            subprocess.run([sys.executable, *arguments], check=True, timeout=60)
            assert server.asked == [("/health", None)] * number
    assert proxy.asked == []
