"""Hostile input: the index and the chat template of a checkpoint, headers of an admin request."""

from __future__ import annotations

import json

import pytest
from fastapi import APIRouter, FastAPI, Request
from fastapi.testclient import TestClient

from tests.checkpoints import make_checkpoint
from tests.unit.tiny_models import character_tokenizer
from vllm_atomic_moe.calibration.documents import read_documents
from vllm_atomic_moe.control import access
from vllm_atomic_moe.control.access import Access, AdminRoute
from vllm_atomic_moe.files.checkpoint import describe_checkpoint
from vllm_atomic_moe.files.layouts import INDEX

KEY = "the-key"
router = APIRouter(route_class=AdminRoute)


@router.put("/{name}")
async def put(request: Request, name: str) -> str:
    return name


@pytest.fixture
def client():
    app = FastAPI()
    app.include_router(router)
    app.state.atomic_moe_access = Access(KEY, [])
    return TestClient(app)


@pytest.mark.parametrize("absolute", [False, True])
def test_an_index_reads_nothing_outside_of_the_checkpoint(tmp_path, absolute):
    make_checkpoint("qwen3_moe", tmp_path / "other")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").write_bytes((tmp_path / "other/config.json").read_bytes())
    place = str(tmp_path / "other/model.safetensors") if absolute else "../other/model.safetensors"
    (mine / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": place}}))
    with pytest.raises(ValueError, match="wanted files of this directory"):
        describe_checkpoint(mine)


@pytest.mark.parametrize("name", [3, None, [], {}])
def test_an_index_with_entries_that_are_not_names(tmp_path, name):
    make_checkpoint("qwen3_moe", tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(ValueError, match=f"{INDEX}: .*fetch it again"):
        describe_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
        "{% for m in messages %}{{ m.update({'role': 'x'}) }}{% endfor %}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_chat_template_runs_in_a_sandbox(tmp_path, monkeypatch, template):
    monkeypatch.chdir(tmp_path)
    tokenizer = character_tokenizer()
    tokenizer.chat_template = template
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}) + "\n")
    with pytest.raises(ValueError, match="the model's chat template refuses it"):
        list(read_documents(path, tokenizer))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "given",
    [
        {"cookies": {"Authorization": f"Bearer {KEY}", "key": KEY}},
        {"params": {"key": KEY, "token": KEY, "Authorization": f"Bearer {KEY}"}},
        {"auth": ("admin", KEY)},
        {"headers": {"X-Api-Key": KEY, "Proxy-Authorization": f"Bearer {KEY}"}},
        {"headers": {"Authorization": KEY}},
        {"headers": {"Authorization": f"Bearer {KEY[:-1]}"}},
        {"headers": {"Authorization": "Bearer "}},
    ],
)
def test_the_key_counts_in_one_header_only(client, given):
    """Pages of other sites cannot make a browser send that header."""
    client.cookies = given.pop("cookies", None)
    assert client.put("/anything", **given).status_code == 401
    headers = {"Authorization": f"Bearer {KEY}"}
    assert client.put("/anything", headers=headers).status_code == 200


def test_requests_cannot_forge_log_lines(client, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(access.logger, "info", lambda text, *words: lines.append(text % words))
    forged = "x%0aINFO%20Profile%20change:%20key=none%1b[31m%e2%80%ae" + "y" * 300
    assert client.put(f"/{forged}").status_code == 401
    [line] = lines
    assert line.isascii()
    assert line.isprintable()
    assert line.startswith("Profile change: key=none client=")
    assert len(line) < 400
