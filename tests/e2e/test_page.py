"""The operator's page in a real Chromium, with a real server.

The tests share one server, in this order; the last one ends it and starts another.
The screenshots for the README go to build/page/.
"""

from __future__ import annotations

import re
import shutil
import threading
from contextlib import ExitStack
from urllib.parse import urlsplit

import pytest

from tests.e2e.conftest import ADMIN_KEY, DEMO, ROOT, SERVING_KEY, admin_server
from vllm_atomic_moe.measure.server_process import end_group

playwright_api = pytest.importorskip("playwright.sync_api")
expect = playwright_api.expect
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)"),
]

ACTIVE = "heapr-20"
LOADED = ["heapr-20", "heapr-40", "shape-20"]
OTHERS = ["heapr-60", "shape-40", "random-40"]  # two of them servable
PROMPT = "def main("
SWITCHES = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Servers:
    """The server that the page talks to, and the one that takes its place."""

    def __init__(self, directory, stack):
        self._directory, self._stack = directory, stack
        self._profiles = directory / "profiles"
        self._profiles.mkdir()
        for name in (*LOADED, *OTHERS):
            shutil.copy(DEMO / f"atomic_profiles/{name}.safetensors", self._profiles)
        self.now = self._start("first", None)

    def _start(self, name, port):
        directory = self._directory / name
        directory.mkdir()
        extra = {"profiles": str(self._profiles), "active": ACTIVE, "resident": LOADED[1:]}
        return self._stack.enter_context(admin_server(directory, extra, port=port))

    def end(self):
        end_group(self.now.server.process)

    def start_again(self):
        self.now = self._start("second", urlsplit(self.now.url).port)


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    with ExitStack() as stack:
        yield Servers(tmp_path_factory.mktemp("page"), stack)


@pytest.fixture
def server(servers):
    return servers.now


@pytest.fixture(scope="module")
def browser():
    with playwright_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, server):
    """Opens the page in its own browser; fails if the page breaks a rule of its policy."""
    with ExitStack() as stack:
        wrong = []

        def note(message):
            refused = message.text.startswith("Failed to load resource")
            if message.type == "error" and not refused:
                wrong.append(message.text)

        def open_page(key=ADMIN_KEY, **options):
            context = browser.new_context(**options)
            stack.callback(context.close)
            context.set_default_timeout(60_000)
            page = context.new_page()
            page.on("console", note)
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.goto(f"{server.url}/atomic/")
            if key:
                sign_in(page, key)
                expect(row(page, ACTIVE)).to_be_visible()
            return page

        yield open_page
    assert wrong == []


@pytest.fixture
def page(open_page):
    return open_page()


@pytest.fixture(scope="module", autouse=True)
def _patience():
    expect.set_options(timeout=60_000)


def sign_in(page, key):
    page.get_by_label("Admin key").fill(key)
    page.keyboard.press("Enter")


def row(page, name):
    return page.locator(f'#profiles tr[data-name="{name}"]')


def state(page, name):
    return row(page, name).locator(".badge")


def activate(page, name, abort=False):
    page.get_by_role("button", name=f"Activate {name}").click()
    dialog = page.get_by_role("dialog")
    if abort:
        dialog.get_by_role("checkbox").check()
    dialog.get_by_role("button", name="Activate").click()


def give_serving_key(page, key=SERVING_KEY):
    page.get_by_label("This server asks for the key of its API").fill(key)
    page.keyboard.press("Enter")


# --- the key --------------------------------------------------------------------------------------


def test_without_the_key_there_is_a_form_and_nothing_else(open_page, server):
    page = open_page(key=None)
    expect(page.get_by_label("Admin key")).to_be_focused()
    expect(page.locator("#console")).to_be_hidden()
    assert all(name not in page.content() for name in (*LOADED, *OTHERS, "demo"))
    asked = []
    page.on("request", lambda request: asked.append(urlsplit(request.url).path))
    page.reload()
    page.wait_for_load_state("networkidle")
    assert asked
    assert not [path for path in asked if path.startswith(("/v1", "/atomic/v1"))]


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("wrong", "401 UnauthorizedError: wanted the admin key"),
        (SERVING_KEY, "401 UnauthorizedError: wanted the admin key"),
        ("schlüssel", "printable ASCII characters only"),
    ],
)
def test_a_wrong_key_opens_nothing(open_page, key, words):
    page = open_page(key=None)
    sign_in(page, key)
    expect(page.locator("#login-error")).to_contain_text(words)
    expect(page.get_by_label("Admin key")).to_be_focused()
    expect(page.locator("#console")).to_be_hidden()
    assert page.evaluate("sessionStorage.length") == 0


def test_the_key_stays_in_the_tab_until_signing_out(page, server):
    page.reload()
    expect(row(page, ACTIVE)).to_be_visible()
    other = page.context.new_page()
    other.goto(f"{server.url}/atomic/")
    expect(other.get_by_label("Admin key")).to_be_visible()
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("Admin key")).to_be_visible()
    assert page.evaluate("sessionStorage.length + localStorage.length") == 0
    assert ACTIVE not in page.content()


# --- what is served -------------------------------------------------------------------------------


def test_the_table_shows_the_servers_values(page, server):
    listed = server.ask("GET", "/atomic/v1/profiles").json()["profiles"]
    shown = page.locator("#profiles tbody tr").evaluate_all("rows => rows.map(r => r.dataset.name)")
    assert shown[: len(LOADED)] == LOADED
    assert sorted(shown) == sorted(profile["name"] for profile in listed)
    for profile in listed:
        cells = row(page, profile["name"]).locator("td").all_inner_texts()
        kept, size, tiles = (cell.split(" ")[0] for cell in cells[1:4])
        assert float(kept) == pytest.approx(100 * profile["kept"], abs=0.051)
        assert float(size) == pytest.approx(profile["bytes"] / 2**20, abs=0.0051)
        one = server.ask("GET", f"/atomic/v1/profiles/{profile['name']}").json()
        if profile["loaded"]:
            assert float(tiles) == pytest.approx(100 * one["live_tiles"], abs=0.051)
        else:
            assert (tiles, one["live_tiles"]) == ("–", None)
    states = {name: state(page, name).inner_text() for name in shown}
    assert states == {
        ACTIVE: "active",
        **dict.fromkeys(LOADED[1:], "loaded"),
        "heapr-60": "servable",
        "shape-40": "servable",
        "random-40": "not in memory",
        "dense": "not in memory",
    }
    memory = server.status()["memory"]
    expect(page.locator("#resident")).to_have_text(f"{memory['resident_bytes'] / 2**20:.2f} MiB")
    expect(page.locator("#agreed")).to_have_text("all agree")
    assert page.title() == f"{ACTIVE} · atomic-moe"


def test_widths_are_shown_for_pointer_and_keyboard(page, server):
    page.get_by_role("button", name="shape-40", exact=True).click()
    expect(page.locator("#widths-name")).to_have_text("shape-40")
    widths = server.ask("GET", "/atomic/v1/profiles/shape-40").json()["widths"]
    canvas, tip = page.locator("#map-canvas"), page.locator("#map-cell")
    canvas.focus()
    canvas.press("ArrowDown")
    for expert in range(3):
        expect(tip).to_contain_text(f"Layer 1, expert {expert}: {widths['1'][expert]} of 128 atoms")
        canvas.press("ArrowRight")
    mark = page.locator("#map-mark")
    canvas.press("ArrowUp")
    box = mark.bounding_box()
    canvas.press("Escape")
    expect(tip).to_be_hidden()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    expect(tip).to_contain_text(f"Layer 0, expert 3: {widths['0'][3]} of 128 atoms")
    page.get_by_label("Profile", exact=True).select_option("heapr-40")
    expect(page.locator("#widths-name")).to_have_text("heapr-40")
    expect(row(page, "heapr-40")).to_have_class(re.compile("selected"))
    page.get_by_text("By layer").click()
    widths = server.ask("GET", "/atomic/v1/profiles/heapr-40").json()["widths"]
    cells = page.locator("#layers tbody tr").nth(2).locator("td").all_inner_texts()
    kept = sum(widths["2"]) / (16 * 128)
    assert cells[:2] == [f"{100 * kept:.1f} %", str(min(widths["2"]))]
    assert cells[3:] == [str(max(widths["2"])), str(widths["2"].count(0))]


def test_running_requests_are_shown(page, server):
    def ask():
        server.complete(PROMPT, "heapr-40", max_tokens=100, ignore_eos=True)

    with server.fault("step", "0.05"):
        request = threading.Thread(target=ask)
        request.start()
        expect(row(page, "heapr-40").locator("td").nth(4)).to_have_text("1")
        expect(page.locator("#running")).to_have_text("1")
        request.join()
    expect(row(page, "heapr-40").locator("td").nth(4)).to_have_text("0")
    chart = row(page, "heapr-40").locator("svg")
    expect(chart).to_have_attribute("aria-label", "0 requests now, 1 at most")


# --- changes --------------------------------------------------------------------------------------


def test_a_profile_is_activated_by_the_keyboard(page, server):
    before = server.status()["generation"]
    button = page.get_by_role("button", name="Activate heapr-40")
    button.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(button).to_be_focused()
    assert server.status()["generation"] == before
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog").get_by_role("button", name="Activate")).to_be_focused()
    page.keyboard.press("Enter")
    expect(state(page, "heapr-40")).to_have_text("active")
    expect(state(page, ACTIVE)).to_have_text("loaded")
    expect(page.locator("#outcome")).to_have_text(f"Activated heapr-40; generation {before + 1}.")
    expect(page.locator("#active")).to_have_text("heapr-40")
    expect(row(page, "heapr-40").locator("button.name")).to_be_focused()
    assert server.status()["active"] == "heapr-40"
    server.changed(ACTIVE)  # by somebody else
    expect(page.locator("#active")).to_have_text(ACTIVE)
    expect(state(page, ACTIVE)).to_have_text("active")


def test_requests_of_other_profiles_are_aborted_on_demand(page, server):
    ended = []

    def ask():
        answer = server.complete(PROMPT, "shape-20", max_tokens=400, ignore_eos=True)
        ended.append(answer["choices"][0]["finish_reason"])

    with server.fault("step", "0.1"):
        request = threading.Thread(target=ask)
        request.start()
        expect(page.locator("#running")).to_have_text("1")
        activate(page, "heapr-40", abort=True)
        expect(state(page, "heapr-40")).to_have_text("active")
        request.join()
    assert ended == ["abort"]
    activate(page, ACTIVE)
    expect(state(page, ACTIVE)).to_have_text("active")


def test_a_profile_is_loaded_and_unloaded(page, server):
    page.get_by_role("button", name="Load heapr-60").click()
    expect(state(page, "heapr-60")).to_have_text("loaded")
    expect(page.get_by_label("First profile", exact=True).locator("option")).to_have_count(
        len(LOADED) + 1
    )
    live = server.ask("GET", "/atomic/v1/profiles/heapr-60").json()["live_tiles"]
    expect(row(page, "heapr-60")).to_contain_text(f"{100 * live:.1f} %")
    assert "heapr-60" in server.status()["profiles"]
    page.get_by_role("button", name="Unload heapr-60").click()
    expect(state(page, "heapr-60")).to_have_text("servable")
    expect(page.locator("#outcome")).to_contain_text("Unloaded heapr-60")
    assert list(server.status()["profiles"]) == LOADED


def test_refusals_show_the_servers_own_message(page, server):
    before = server.status()
    page.get_by_role("button", name="Load random-40").click()
    error = server.load("random-40").json()["error"]
    expect(page.locator("#refusal-text")).to_have_text(f"409 {error['type']}: {error['message']}")
    assert error["type"] == "AtomsNotResidentError"
    assert server.status() == before
    page.get_by_role("button", name="Dismiss the error").click()
    expect(page.locator("#refusal")).to_be_hidden()

    def ask():
        server.complete(PROMPT, "shape-20", max_tokens=100, ignore_eos=True)

    with server.fault("step", "0.1"):
        request = threading.Thread(target=ask)
        request.start()
        expect(page.locator("#running")).to_have_text("1")
        page.get_by_role("button", name="Unload shape-20").click()
        expect(page.locator("#refusal-text")).to_contain_text("409 ProfileInUseError: profile 'sha")
        request.join()
    expect(state(page, "shape-20")).to_have_text("loaded")


def test_profile_files_that_appear_or_disappear(page, server, servers):
    file = servers._profiles / "shape-40.safetensors"
    page.get_by_role("button", name="Load shape-40").click()
    expect(state(page, "shape-40")).to_have_text("loaded")
    kept = file.read_bytes()
    file.unlink()
    page.get_by_role("button", name="Read the directory again").click()
    expect(state(page, "shape-40")).to_have_text("file gone")
    page.get_by_role("button", name="Unload shape-40").click()
    expect(row(page, "shape-40")).to_have_count(0)
    file.write_bytes(kept)
    page.get_by_role("button", name="Read the directory again").click()
    expect(state(page, "shape-40")).to_have_text("servable")


# --- two answers ----------------------------------------------------------------------------------


def test_two_profiles_answer_side_by_side(page, server):
    keys = {}

    def note(request):
        path = urlsplit(request.url).path
        key = request.headers.get("authorization", "").removeprefix("Bearer ")
        keys.setdefault(path.startswith("/v1/"), set()).add(key)

    page.on("request", note)
    page.get_by_label("Prompt").fill(PROMPT)
    page.get_by_label("Tokens").fill("48")
    page.get_by_role("button", name="Ask both").click()
    give_serving_key(page, "wrong")
    expect(page.locator("#serving-error")).to_have_text("The server does not take this key.")
    give_serving_key(page)
    answers = page.locator(".answer")
    for index, profile in enumerate(("heapr-20", "heapr-40")):
        answer = answers.nth(index)
        expect(answer).to_have_class(re.compile("done"))
        speed = answer.locator(".speed").inner_text()
        assert speed.startswith(f"answered by {profile} · 48 tokens · ")
        assert re.search(r" \d+\.\d tokens/s · first after \d+ ms$", speed)
        said = server.complete(PROMPT, profile, max_tokens=48)["choices"][0]["text"]
        assert answer.locator("pre").text_content() == said
    texts = [answers.nth(index).locator("pre").text_content() for index in (0, 1)]
    same = answers.nth(0).locator("mark").text_content()
    assert same == answers.nth(1).locator("mark").text_content()
    assert all(text.startswith(same) for text in texts)
    assert texts[0][len(same)] != texts[1][len(same)]
    expect(page.locator("#difference")).to_contain_text(f"the same {len(same)} characters")
    assert keys == {False: {ADMIN_KEY}, True: {"", "wrong", SERVING_KEY}}


def test_a_profile_is_compared_with_itself_in_sequence(page):
    page.get_by_role("button", name="Ask both").click()
    page.get_by_label("Tokens").fill("16")
    page.get_by_label("As", exact=True).select_option("a chat message")
    page.get_by_label("Second profile", exact=True).select_option(ACTIVE)
    page.get_by_label("One after the other").check()
    give_serving_key(page)
    expect(page.locator("#difference")).to_have_text("Both answers are the same.")
    for index in (0, 1):
        expect(page.locator(".answer .speed").nth(index)).to_have_text(
            re.compile(rf"answered by {ACTIVE} · \d+ tokens")
        )


def test_answers_are_stopped_and_errors_are_shown(page, server):
    page.get_by_label("Tokens").fill("400")
    page.get_by_role("button", name="Ask both").click()
    with server.fault("step", "0.1"):
        give_serving_key(page)
        expect(page.locator(".answer .speed").nth(1)).to_contain_text("tokens ·")
        page.get_by_role("button", name="Stop").click()
        for index in (0, 1):
            expect(page.locator(".answer .speed").nth(index)).to_contain_text("stopped")
    expect(page.locator("#running")).to_have_text("0")
    page.get_by_label("Tokens").fill("100000")
    page.get_by_role("button", name="Ask both").click()
    expect(page.locator(".answer .speed").nth(1)).to_contain_text("400 BadRequestError: ")


# --- the browser ----------------------------------------------------------------------------------


def test_a_hidden_page_does_not_poll(page):
    """A headless browser never hides a page, so the test simulates it."""
    asked = []
    page.on("request", lambda request: asked.append(request.url))

    def hide(hidden):
        page.evaluate(
            "hidden => { Object.defineProperty(document, 'hidden',"
            " {value: hidden, configurable: true});"
            " document.dispatchEvent(new Event('visibilitychange')); }",
            hidden,
        )

    hide(True)
    expect(page.locator("#connection")).to_have_text("paused")
    page.wait_for_timeout(500)  # a question that was under way
    asked.clear()
    page.wait_for_timeout(3000)
    assert asked == []
    with page.expect_request("**/atomic/v1/status"):
        hide(False)
    expect(page.locator("#connection")).to_have_text("live")


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_narrow_screens_show_everything(open_page, color_scheme):
    page = open_page(viewport={"width": 400, "height": 800}, color_scheme=color_scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    expect(page.get_by_role("button", name="Activate heapr-40")).to_be_visible()
    outside = page.evaluate(
        "Array.from(document.querySelectorAll('#console :is(button, input, select, textarea)'))"
        ".filter(e => e.offsetParent && (e.getBoundingClientRect().right > 400))"
        ".map(e => e.outerHTML)"
    )
    assert outside == []
    red, green, blue = page.evaluate(
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    )
    assert (red + green + blue > 382) == (color_scheme == "light")


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_screenshots_for_the_readme(open_page, server, color_scheme):
    page = open_page(viewport={"width": 1160, "height": 900}, color_scheme=color_scheme)
    page.get_by_label("Tokens").fill("96")
    page.get_by_label("Prompt").fill("The first thing to know about the kernel is")
    page.get_by_role("button", name="Ask both").click()
    give_serving_key(page)
    for index in (0, 1):
        expect(page.locator(".answer").nth(index)).to_have_class(re.compile("done"))
    page.wait_for_timeout(5000)  # something to see in the last minute
    page.get_by_role("button", name="heapr-40", exact=True).click()
    expect(page.locator("#widths-name")).to_have_text("heapr-40")
    canvas = page.locator("#map-canvas")
    canvas.scroll_into_view_if_needed()
    canvas.hover(position={"x": 420, "y": 70})
    directory = ROOT / "build/page"
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / ("page.png" if color_scheme == "light" else "page-dark.png")
    page.screenshot(path=path, full_page=True)
    small(path)


def small(path):
    """Write a picture with 128 colors: a third of the bytes, without a visible difference."""
    from PIL import Image

    Image.open(path).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(
        path, optimize=True
    )


def test_a_server_that_goes_away_and_returns(page, server, servers):
    page.get_by_role("button", name="Load heapr-60").click()
    expect(state(page, "heapr-60")).to_have_text("loaded")
    servers.end()
    trouble = page.locator("#trouble")
    expect(trouble).to_contain_text("The server does not answer.")
    expect(page.locator("#connection")).to_have_text("no answer")
    expect(page.get_by_role("button", name="Unload heapr-60")).to_be_disabled()
    expect(row(page, ACTIVE)).to_be_visible()
    servers.start_again()
    expect(trouble).to_be_hidden()
    expect(page.locator("#connection")).to_have_text("live")
    expect(state(page, "heapr-60")).to_have_text("servable")  # what a restart forgets
    expect(page.get_by_role("button", name="Load heapr-60")).to_be_enabled()
