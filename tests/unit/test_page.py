"""The operator's page over HTTP: static files that need no key and reveal nothing."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from vllm_atomic_moe.control import page
from vllm_atomic_moe.control.admin import AdminPlugin

DIRECTORY = Path(page.__file__).parent
FILES = sorted(path.name for path in DIRECTORY.iterdir() if path.suffix in page.TYPES)
SCRIPTS = [name for name in FILES if name.endswith(".js")]
KEY = "the-key"


@pytest.fixture
def client(monkeypatch):
    monkeypatch.setenv("ATOMIC_MOE_ADMIN_KEY", KEY)
    monkeypatch.delenv("ATOMIC_MOE_ADMIN_KEY_FILE", raising=False)
    app = FastAPI()
    app.state.args = SimpleNamespace(api_key=["serving"])
    AdminPlugin().attach_router(app)
    return TestClient(app)


class Tags(HTMLParser):
    """The tags of the page with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.labelled: set[int] = set()  # elements inside of a label, by index
        self.feed((DIRECTORY / "index.html").read_text())

    def handle_starttag(self, tag, attrs):
        if "label" in self.open:
            self.labelled.add(len(self.found))
        self.found.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass


def test_the_page_and_its_files_need_no_key(client):
    assert client.get("/atomic/").content == (DIRECTORY / "index.html").read_bytes()
    for name in FILES:
        answer = client.get(f"/atomic/page/{name}")
        assert answer.status_code == 200
        assert answer.content == (DIRECTORY / name).read_bytes()
        assert answer.headers["content-type"].partition(";")[0] == page.TYPES[Path(name).suffix]
    assert client.get("/atomic", follow_redirects=False).headers["location"].endswith("/atomic/")
    assert client.head("/atomic/").status_code == 200
    assert client.post("/atomic/").status_code == 405


def test_what_the_page_shows_needs_the_key(client):
    for path in ("status", "profiles", "profiles/dense"):
        assert client.get(f"/atomic/v1/{path}").status_code == 401
    answer = client.get("/atomic/v1/status", headers={"Authorization": f"Bearer {KEY}"})
    assert answer.status_code == 503  # no engine runs here


def test_the_page_is_the_same_whoever_asks(client):
    plain = client.get("/atomic/")
    for key in ("wrong", KEY):
        asked = client.get("/atomic/", headers={"Authorization": f"Bearer {key}"})
        assert (asked.content, asked.headers) == (plain.content, plain.headers)
    assert "set-cookie" not in plain.headers


@pytest.mark.parametrize("path", ["/atomic/", *(f"/atomic/page/{name}" for name in FILES)])
def test_the_policy_lets_nothing_in_from_elsewhere(client, path):
    headers = client.get(path).headers
    policy = dict(
        directive.strip().partition(" ")[::2]
        for directive in headers["content-security-policy"].split(";")
    )
    assert policy.pop("default-src") == "'none'"
    for name in ("script-src", "style-src", "img-src", "connect-src"):
        assert policy.pop(name) == "'self'"
    for name in ("base-uri", "form-action", "frame-ancestors", "trusted-types"):
        assert policy.pop(name) == "'none'"
    assert policy == {"require-trusted-types-for": "'script'"}
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-cache"


@pytest.mark.parametrize(
    "name",
    [
        "__init__.py",
        "../admin.py",
        "..%2fadmin.py",
        "%2e%2e/admin.py",
        "..%5cadmin.py",
        "%2fetc%2fpasswd",
        "//etc/passwd",
        "main.js/",
        "main.js%00.css",
        "MAIN.JS",
        "",
        ".",
    ],
)
def test_no_other_file_is_served(client, name):
    answer = client.get(f"/atomic/page/{name}", follow_redirects=False)
    assert answer.status_code in (307, 404)
    assert b"import" not in answer.content
    if answer.status_code == 307:  # a slash too many: back to the file itself
        assert answer.headers["location"].endswith("/atomic/page/main.js")


def test_the_page_is_not_among_the_documented_routes(client):
    documented = client.get("/openapi.json").json()["paths"]
    assert documented
    assert all(path.startswith("/atomic/v1/") for path in documented)


# --- what is in the files -------------------------------------------------------------------------


def test_nothing_is_inline_and_everything_that_is_named_is_there():
    linked = []
    for tag, attributes in Tags().found:
        assert tag != "style"
        assert not {name for name in attributes if name.startswith("on") or name == "style"}
        linked += [attributes.get(name) for name in ("src", "href") if attributes.get(name)]
        assert tag != "script" or attributes["src"]
    files = {link for link in linked if not link.startswith("#")}
    assert {"page/main.js", "page/style.css", "page/icon.svg"} == files
    for script in SCRIPTS:
        text = (DIRECTORY / script).read_text()
        for imported in re.findall(r'from "([^"]+)"', text):
            assert imported.removeprefix("./") in SCRIPTS, (script, imported)


@pytest.mark.parametrize("name", FILES)
def test_no_file_names_another_host_or_makes_markup_of_text(name):
    text = (DIRECTORY / name).read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//\w+\.\w|@import|url\(", text)
    code = re.sub(r"//.*", "", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|\beval\b|new Function", code)
    assert "localStorage" not in code
    assert "cookie" not in code


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_element_that_a_script_names_is_on_the_page(name):
    on_page = {attributes["id"] for _, attributes in Tags().found if "id" in attributes}
    named = re.findall(r'byId\("([^"]+)"\)', (DIRECTORY / name).read_text())
    assert set(named) <= on_page


def test_every_field_and_button_has_a_name_for_screen_readers():
    tags = Tags()
    labels = {attributes.get("for") for tag, attributes in tags.found if tag == "label"}
    ids = [attributes["id"] for _, attributes in tags.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    for index, (tag, attributes) in enumerate(tags.found):
        if tag in ("input", "select", "textarea") and "hidden" not in attributes:
            named = "aria-label" in attributes or attributes["id"] in labels
            assert named or index in tags.labelled, attributes
        for name in ("aria-labelledby", "aria-describedby"):
            assert set((attributes.get(name) or "").split()) <= set(ids)
