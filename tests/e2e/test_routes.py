"""All of vLLM's routes answer with the profile that a request names, or with the active one.

One server of the demo under two names, without the admin endpoint: profiles need none.
"""

from __future__ import annotations

import json
import subprocess

import anthropic
import httpx
import openai
import pytest

from tests.e2e.conftest import BIN, DEMO, ENVIRONMENT, ROOT, free_port, running, serve_command

ACTIVE, OTHER = "heapr-20", "random-40"
PROFILES = [ACTIVE, OTHER, "dense"]
PROMPT = "import os\nimport sys\n\n\ndef main("
MESSAGES = [{"role": "user", "content": "The history of the city begins in the year"}]
HEADER = "x-atomic-moe-profile"
GREEDY = {"temperature": 0, "max_tokens": 12}
OPTIONS = {"active": ACTIVE, "resident": PROFILES[1:]}


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    port = free_port()
    command = serve_command(
        DEMO,
        OPTIONS,
        "--dtype=float32",
        "--served-model-name",
        "demo",
        "other-name",
        f"--port={port}",
        "--enable-scale-out",
        "--enable-prompt-tokens-details",
    )
    log = tmp_path_factory.mktemp("server") / "log"
    with running(command, port, log, VLLM_PLUGINS="atomic_moe") as server:
        yield server.url


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def completions(client, model, **settings):
    raw = client.completions.with_raw_response.create(
        model=model, prompt=PROMPT, **{**GREEDY, **settings}
    )
    answer = raw.parse()
    return raw.headers[HEADER], answer.model, [choice.text for choice in answer.choices]


def streamed_completions(client, model, **settings):
    raw = client.completions.with_raw_response.create(
        model=model, prompt=PROMPT, stream=True, **{**GREEDY, **settings}
    )
    parts = list(raw.parse())
    text = "".join(part.choices[0].text for part in parts)
    return raw.headers[HEADER], parts[0].model, [text]


def beam_search(client, model, **settings):
    extra = {"use_beam_search": True, **settings.pop("extra_body", {})}
    return completions(client, model, n=2, extra_body=extra, **settings)


def chat(client, model, **settings):
    raw = client.chat.completions.with_raw_response.create(
        model=model, messages=MESSAGES, **{**GREEDY, **settings}
    )
    answer = raw.parse()
    return raw.headers[HEADER], answer.model, [it.message.content for it in answer.choices]


def streamed_chat(client, model, **settings):
    raw = client.chat.completions.with_raw_response.create(
        model=model, messages=MESSAGES, stream=True, **{**GREEDY, **settings}
    )
    parts = list(raw.parse())
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    return raw.headers[HEADER], parts[0].model, [text]


def responses(client, model, **settings):
    raw = client.responses.with_raw_response.create(
        model=model, input=MESSAGES[0]["content"], temperature=0, max_output_tokens=12, **settings
    )
    answer = raw.parse()
    return raw.headers[HEADER], answer.model, [answer.output_text]


def messages(client, model, **settings):
    other = anthropic.Anthropic(base_url=str(client.base_url)[:-4], api_key="none", max_retries=0)
    extra = {"temperature": 0, **settings.pop("extra_body", {})}
    raw = other.messages.with_raw_response.create(
        model=model, messages=MESSAGES, max_tokens=12, extra_body=extra, **settings
    )
    answer = raw.parse()
    return raw.headers[HEADER], answer.model, [answer.content[0].text]


def inference(client, model, extra_body=None):
    """vLLM's token-in-token-out route, which takes sampling parameters as they are."""
    named = (extra_body or {}).get("vllm_xargs")
    sampling = {"temperature": 0, "max_tokens": 12, **({"extra_args": named} if named else {})}
    body = {"model": model, "token_ids": list(range(5, 30)), "sampling_params": sampling}
    url = str(client.base_url).replace("/v1/", "/inference/v1/generate")
    answer = httpx.post(url, json=body, timeout=60)
    if answer.status_code != 200:
        raise openai.APIStatusError(answer.text, response=answer, body=None)
    return answer.headers[HEADER], model, [str(answer.json()["choices"][0]["token_ids"])]


ROUTES = [
    completions,
    streamed_completions,
    beam_search,
    chat,
    streamed_chat,
    responses,
    messages,
    inference,
]


def test_profiles_are_listed_like_adapters(client):
    listed = {model.id: (model.model_dump().get("parent")) for model in client.models.list()}
    wanted = {alias: None for alias in ("demo", "other-name")}
    wanted |= {f"{alias}:{name}": alias for alias in wanted for name in PROFILES}
    assert listed == wanted


@pytest.mark.parametrize("route", ROUTES)
def test_a_request_is_answered_by_the_profile_it_names(client, route):
    answers = {name: route(client, f"demo:{name}") for name in PROFILES}
    assert [answers[name][0] for name in PROFILES] == PROFILES
    assert [answers[name][1] for name in PROFILES] == [f"demo:{name}" for name in PROFILES]
    texts = {name: answers[name][2] for name in PROFILES}
    assert texts[ACTIVE] != texts[OTHER] != texts["dense"]
    for alias in ("demo", "other-name"):
        assert route(client, alias) == (ACTIVE, alias, texts[ACTIVE])
    assert route(client, f"other-name:{OTHER}") == (OTHER, f"other-name:{OTHER}", texts[OTHER])
    named = {"vllm_xargs": {"profile": OTHER}}
    assert route(client, "demo", extra_body=named) == (OTHER, "demo", texts[OTHER])
    both = route(client, f"demo:{OTHER}", extra_body=named)
    assert both == (OTHER, f"demo:{OTHER}", texts[OTHER])


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("model", "argument", "status"),
    [
        ("demo:nope", None, 404),
        ("demo", "nope", 404),
        ("demo:nope", OTHER, 404),
        (f"demo:{ACTIVE}", OTHER, 400),
        ("demo", 7, 400),
        ("demo", ["heapr-20"], 400),
    ],
)
def test_wrong_names_are_refused_before_a_stream_begins(client, route, model, argument, status):
    extra = {} if argument is None else {"extra_body": {"vllm_xargs": {"profile": argument}}}
    with pytest.raises((openai.APIStatusError, anthropic.APIStatusError)) as refused:
        route(client, model, **extra)
    assert refused.value.status_code == status
    assert HEADER not in refused.value.response.headers
    assert completions(client, "demo")[0] == ACTIVE


def test_all_parts_of_a_request_share_a_profile(client):
    """Several prompts, and several answers to each."""
    one = completions(client, f"demo:{OTHER}")[2]
    answer = client.completions.create(model=f"demo:{OTHER}", prompt=[PROMPT] * 3, n=1, **GREEDY)
    assert [choice.text for choice in answer.choices] == one * 3
    almost = {**GREEDY, "temperature": 0.001}
    many = client.completions.create(model=f"demo:{OTHER}", prompt=PROMPT, n=3, **almost)
    assert [choice.text for choice in many.choices] == one * 3


def test_a_cached_prefix_serves_its_own_profile_only(client):
    """A block has 128 tokens on CPU."""
    prompt = (DEMO.parent / "data/english.heldout.txt").read_text()[:900]

    def cached(profile):
        answer = client.completions.create(model=f"demo:{profile}", prompt=prompt, max_tokens=1)
        details = answer.usage.prompt_tokens_details
        return details.cached_tokens if details else 0

    assert [cached(name) for name in PROFILES] == [0, 0, 0]
    assert all(cached(name) >= 128 for name in PROFILES)


def test_other_routes_report_the_profile_too(url):
    answer = httpx.post(f"{url}/tokenize", json={"model": f"demo:{OTHER}", "prompt": "hi"})
    assert (answer.status_code, answer.headers[HEADER]) == (200, OTHER)
    answer = httpx.get(f"{url}/v1/models")
    assert HEADER not in answer.headers
    metrics = httpx.get(f"{url}/metrics").text
    assert f'atomic_moe_requests_total{{profile="{OTHER}"}}' in metrics
    assert httpx.get(f"{url}/atomic/v1/status").status_code == 404


@pytest.mark.full
def test_batch_files(tmp_path):
    """`vllm run-batch`, which knows chat but no completions."""
    lines = [
        {
            "custom_id": str(number),
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": model, "messages": MESSAGES, **GREEDY, **extra},
        }
        for number, (model, extra) in enumerate(
            [
                ("demo", {}),
                (f"demo:{ACTIVE}", {}),
                (f"demo:{OTHER}", {}),
                ("demo", {"vllm_xargs": {"profile": OTHER}}),
                ("demo:nope", {}),
            ]
        )
    ]
    asked, told = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = subprocess.run(
        [
            *(str(BIN / "vllm"), "run-batch", "-i", str(asked), "-o", str(told)),
            *("--model", str(DEMO), "--served-model-name", "demo", "--dtype=float32"),
            *("--load-format=atomic-pruned", "--enforce-eager"),
            f"--model-loader-extra-config={json.dumps(OPTIONS)}",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = {answer["custom_id"]: answer for answer in map(json.loads, told.open())}
    choices = [found[str(i)]["response"]["body"]["choices"][0] for i in range(4)]
    texts = [choice["message"]["content"] for choice in choices]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    assert "does not exist" in json.dumps(found["4"])


@pytest.mark.full
def test_embeddings(tmp_path):
    port = free_port()
    flags = ("--dtype=float32", "--runner=pooling", "--convert=embed", f"--port={port}")
    command = serve_command(DEMO, OPTIONS, *flags, "--served-model-name=demo")
    with running(command, port, tmp_path / "log", VLLM_PLUGINS="atomic_moe") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

        def embed(model, **extra):
            raw = client.embeddings.with_raw_response.create(
                model=model, input=[PROMPT, "hi"], encoding_format="float", **extra
            )
            answer = raw.parse()
            return raw.headers[HEADER], answer.model, [it.embedding for it in answer.data]

        answers = {name: embed(f"demo:{name}") for name in PROFILES}
        assert [answer[0] for answer in answers.values()] == PROFILES
        assert len({str(answer[2]) for answer in answers.values()}) == len(PROFILES)
        assert embed("demo")[0::2] == answers[ACTIVE][0::2]
        named = {"vllm_xargs": {"profile": OTHER}}
        assert embed("demo", extra_body=named)[0::2] == answers[OTHER][0::2]
        with pytest.raises(openai.NotFoundError):
            embed("demo:nope")
        with pytest.raises(openai.NotFoundError):
            embed("demo", extra_body={"vllm_xargs": {"profile": "nope"}})
        with pytest.raises(openai.BadRequestError):
            embed(f"demo:{ACTIVE}", extra_body=named)
