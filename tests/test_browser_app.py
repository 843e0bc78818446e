"""Does the dashboard work in a real browser? Debian's Chromium through Playwright, one server for all tests.

Without Chromium the tests are skipped, or fail when ENGRAM_REQUIRE_BROWSER=1. Pictures of every page are written for a
person to look at into ENGRAM_SCREENSHOTS (default: a temporary folder).
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
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
SECONDS = 1000.0
WAIT = 60 * SECONDS  # a busy machine is slow; nothing here measures speed
TEXT = "By the way, Alexander the Great was a king of Macedon."
OTHER = "The Prince of Wales lives in London."
STRANGE = '<img src=x onerror="document.title=\'owned\'"> <script>document.title="owned"</script> 🙂 東京 שלום עולם'

if CHROMIUM is None and os.environ.get("ENGRAM_REQUIRE_BROWSER") != "1":
    pytest.skip(
        "no Chromium found (apt-get install chromium); set ENGRAM_REQUIRE_BROWSER=1 to fail instead",
        allow_module_level=True,
    )

from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright  # noqa: E402 - only where there is a browser

from engram_interp.app_launcher import app_command, app_environment  # noqa: E402
from engram_interp.models.checkpoint import save_model  # noqa: E402

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def server(tmp_path_factory, tiny_engram, tiny_moe, tokenizer) -> Iterator[str]:
    """The dashboard with two small checkpoints, on a free port of this machine."""
    root = tmp_path_factory.mktemp("server")
    for name, model in (("tiny-engram", tiny_engram), ("tiny-moe", tiny_moe)):
        save_model(model, tokenizer, root / name)
    with serve(root, [str(root / "tiny-engram"), str(root / "tiny-moe")]) as address:
        yield address


@contextmanager
def serve(root: Path, models: list[str]) -> Iterator[str]:
    """A server that works in a folder and is gone afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = app_environment() | {"XDG_CACHE_HOME": str(root)}
    with (root / "log.txt").open("w") as log:
        command = app_command(models, port=port, headless=True)
        process = subprocess.Popen(command, env=environment, cwd=root, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_until_up(f"http://127.0.0.1:{port}", process, root / "log.txt")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(20)


def wait_until_up(address: str, process: subprocess.Popen, log: Path) -> None:
    """Until the server answers its own health question."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"{address}/_stcore/health", timeout=2) as answer:
                if answer.read() == b"ok":
                    return
        except OSError:
            time.sleep(0.3)
    raise AssertionError(f"the server did not start: {log.read_text()}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One Chromium."""
    assert CHROMIUM, "Chromium is required (ENGRAM_REQUIRE_BROWSER=1) and was not found"
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Where screenshots go."""
    folder = Path(os.environ.get("ENGRAM_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    print("screenshots:", folder)
    return folder


@pytest.fixture
def tab(browser: Browser, server: str):
    """Open tabs; afterwards nothing may have been asked of another machine or complained of."""
    contexts, outside, complaints = [], [], []

    def new(text: str = TEXT, path: str = "", **options: object) -> Page:
        context = browser.new_context(viewport={"width": 1280, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT)
        page.on(
            "request",
            lambda r: outside.append(r.url) if urlsplit(r.url).hostname not in ("127.0.0.1", None, "") else None,
        )
        page.on("console", lambda m: complaints.append(f"{m.text} {m.location}") if complains(m) else None)
        page.on("pageerror", lambda e: complaints.append(str(e)))
        page.goto(f"{server}/{path}?model=tiny-engram&text={quote(text)}" + ("&baseline=tiny-moe" if path else ""))
        return page

    yield new
    for context in contexts:
        context.close()
    assert not outside, f"asked of other machines: {outside}"
    assert not complaints, f"console errors: {complaints}"


def complains(message: ConsoleMessage) -> bool:
    """Any error but Streamlit's own two questions below a page's path, which it asks again at the root."""
    asked = urlsplit(message.location.get("url", "")).path
    return message.type == "error" and not re.fullmatch(r"/\w+/_stcore/(health|host-config)", asked)


def tokens_of(page: Page) -> list[str]:
    """The words of the strip."""
    page.wait_for_selector(".token")
    return page.locator(".token .text").all_inner_texts()


def token_heading(page: Page, at: int) -> None:
    """Wait until the inspector is about a token."""
    page.wait_for_selector(f"h3:has-text('Token {at} ')")


def quiet(page: Page) -> None:
    """Wait until the script has ended and drawings have settled."""
    page.wait_for_timeout(400)
    page.wait_for_function("!document.querySelector('[data-testid=stApp][data-test-script-state=running]')")
    page.wait_for_function("!document.querySelector('[data-testid=stSkeleton]')")
    page.wait_for_timeout(500)


def focused(page: Page) -> str | None:
    """Position of the token with the keyboard focus."""
    return page.evaluate("document.activeElement?.shadowRoot?.activeElement?.dataset.at ?? null")


def test_click_keys_cell_and_a_shared_address(tab, pictures):
    page = tab()
    words = tokens_of(page)
    assert words[0] == "<bos>" and "".join(words[1:]).replace("·", " ") == TEXT
    page.locator(".token").nth(3).click()
    token_heading(page, 3)
    page.keyboard.press("ArrowRight")
    token_heading(page, 4)
    assert focused(page) == "4"
    page.keyboard.press("End")
    token_heading(page, len(words) - 1)
    assert focused(page) == str(len(words) - 1)
    page.keyboard.press("Home")
    token_heading(page, 0)
    title = page.locator(".token").nth(5).get_attribute("title")
    for part in ("2-gram", "slots", "gate by branch", "score by branch", "write / stream", "log p of the next token"):
        assert part in title
    grid = page.locator(".gate-strip canvas")
    box = grid.bounding_box()
    grid.click(position={"x": box["width"] * 6.5 / len(words), "y": box["height"] - 4})  # token 6, last row: block 3
    token_heading(page, 6)
    page.wait_for_function("location.search.includes('layer=3') && location.search.includes('token=6')")
    quiet(page)
    shown = page.locator(".token .text").evaluate_all("boxes => boxes.map(b => b.style.background)")
    page.screenshot(path=pictures / "gates.png", full_page=True)
    again = page.context.new_page()
    again.set_default_timeout(WAIT)
    again.goto(page.url)
    token_heading(again, 6)
    assert tokens_of(again) == words
    assert again.locator(".token .text").evaluate_all("boxes => boxes.map(b => b.style.background)") == shown


def test_two_tabs_have_their_own_results(tab):
    first, second = tab(TEXT), tab(OTHER)
    second.wait_for_selector(".token")
    first.wait_for_selector(".token")
    first.locator(".token").nth(2).click()
    second.locator(".token").nth(5).click()
    token_heading(first, 2)
    token_heading(second, 5)
    assert "".join(tokens_of(first)[1:]).replace("·", " ") == TEXT
    assert "".join(tokens_of(second)[1:]).replace("·", " ") == OTHER
    first.get_by_role("textbox", name="Text").fill(OTHER)
    first.get_by_role("textbox", name="Text").press("Control+Enter")
    first.locator(f".token .text:text-is('{tokens_of(second)[-2]}')").wait_for()
    first.locator(".token").nth(3).click()
    token_heading(first, 3)
    first.locator(".token").nth(2).click()  # chosen before, in another text
    token_heading(first, 2)


def test_strange_text_is_inert_and_readable(tab, pictures):
    page = tab(STRANGE)
    words = tokens_of(page)
    quiet(page)
    assert page.title() != "owned"
    assert page.locator(".gate-strip img, .gate-strip script").count() == 0
    assert any("<" in word for word in words)
    page.locator(".token").nth(2).click()
    token_heading(page, 2)
    page.screenshot(path=pictures / "gates_strange.png")


def test_downloads_open_and_parse(tab, tmp_path):
    page = tab()
    tokens = len(tokens_of(page))
    quiet(page)
    files = {}
    for label in ("SVG", "CSV", "JSON", "HTML", "PNG"):
        with page.expect_download() as download:
            page.get_by_role("button", name=label, exact=False).first.click()
        path = tmp_path / download.value.suggested_filename
        download.value.save_as(path)
        files[label] = path
    import xml.etree.ElementTree as ElementTree

    import pandas as pd
    from PIL import Image

    assert ElementTree.parse(files["SVG"]).getroot().tag.endswith("svg")
    assert len(pd.read_csv(files["CSV"])) == tokens * 4
    assert len(json.loads(files["JSON"].read_text())["gates"]) == tokens
    assert "<script" not in files["HTML"].read_text() and "tiny-engram" in files["HTML"].read_text()
    with Image.open(files["PNG"]) as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(maxcolors=10**6)) > 20


@pytest.mark.parametrize("name", ["lens", "similarity", "ablate", "memory", "runs"])
def test_every_page_opens_by_its_address(tab, pictures, name):
    page = tab(path=name)
    page.wait_for_selector("h1")
    quiet(page)
    assert page.get_by_test_id("stException").count() == 0
    assert page.get_by_text("Details for a report").count() == 0
    page.screenshot(path=pictures / f"{name}.png", full_page=True)
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 390, "height": 844})
    quiet(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.screenshot(path=pictures / f"{name}_narrow.png", full_page=True)


def test_a_job_shows_progress_is_cancelled_and_met_again(tab):
    page = tab(path="lens")
    page.get_by_role("button", name="Compare over").click()
    page.get_by_role("button", name="Cancel").wait_for()
    page.wait_for_function("location.search.includes('job=')")
    assert "forwards" in page.get_by_test_id("stProgress").inner_text()
    again = page.context.new_page()
    again.set_default_timeout(WAIT)
    again.goto(page.url)
    again.get_by_role("button", name="Cancel").click()
    again.get_by_text("Cancelled after").wait_for()
    page.get_by_text("Cancelled after").wait_for()


def test_dark_and_narrow(tab, pictures):
    page = tab(color_scheme="dark")
    page.wait_for_selector(".token")
    quiet(page)
    dark = page.evaluate("getComputedStyle(document.querySelector('[data-testid=stApp]')).backgroundColor")
    assert max(int(c) for c in dark.removeprefix("rgb(").removesuffix(")").split(",")) < 60
    page.screenshot(path=pictures / "gates_dark.png")
    page.set_viewport_size({"width": 390, "height": 844})
    quiet(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    right = page.locator(".token").evaluate_all("boxes => Math.max(...boxes.map(b => b.getBoundingClientRect().right))")
    assert right <= 390
    page.screenshot(path=pictures / "gates_narrow.png")


def resident_megabytes(address: str) -> float:
    """Memory of the server that answers there, with its children."""
    port = urlsplit(address).port
    pids = [p for p in Path("/proc").iterdir() if p.name.isdigit()]
    for pid in pids:
        try:
            if f"--server.port\0{port}".encode() in (pid / "cmdline").read_bytes():
                status = (pid / "status").read_text()
                return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024
        except OSError:
            continue
    raise AssertionError(f"no server on port {port}")


@pytest.mark.slow
def test_times_of_the_bundled_model(browser, tmp_path):
    """Prints what a user waits for, cold and warm; what is asserted is that the wait ended in the right picture."""
    sentence = "The old harbour of London lies below the castle of the king, and the Prince of Wales looks over it. "
    times, begun = {}, time.monotonic()
    with serve(tmp_path, []) as address:
        page = browser.new_page()
        page.set_default_timeout(WAIT)
        page.goto(address)
        page.wait_for_selector(".token")
        times["first page, cold"] = time.monotonic() - begun
        for copies, last in ((3, 50), (92, 511)):
            quiet(page)
            box = page.get_by_role("textbox", name="Text")
            box.fill(sentence * copies)
            begun = time.monotonic()
            box.press("Control+Enter")
            page.locator(".token").nth(last).wait_for()
            seconds = time.monotonic() - begun
            quiet(page)
            tokens = int(re.search(r"(\d+) tokens · ", page.content())[1])
            assert tokens > 20 * copies and len(tokens_of(page)) == min(tokens, 512)
            times[f"gate map of {tokens} tokens"] = seconds
            begun = time.monotonic()
            page.locator(".token").nth(9).click()
            token_heading(page, 9)
            times[f"click in {tokens} tokens"] = time.monotonic() - begun
        page.close()
    print("; ".join(f"{what} {seconds:.2f} s" for what, seconds in times.items()))


@pytest.mark.slow
def test_sessions_in_parallel_stay_apart_and_memory_stays_flat(tab, server):
    """Random use of several sessions; ENGRAM_SOAK="10 300" runs ten sessions for five minutes (the default is short)."""
    sessions, seconds = map(int, os.environ.get("ENGRAM_SOAK", "4 20").split())
    rng = random.Random(0)
    words = ["king", "harbour", "castle", "river", "Paris", "London", "Wales", "sea", "town", "queen", "lord", "gate"]
    texts = [
        f"The {a} of {b} saw session number {i} pass."
        for i, (a, b) in enumerate(rng.sample(words, 2) for _ in range(sessions))
    ]
    pages = [tab(text) for text in texts]
    for page in pages:
        page.wait_for_selector(".token", timeout=120_000)
    use = {
        "click": lambda page: page.locator(".token").nth(rng.randrange(2, 7)).click(),
        "layer": lambda page: page.get_by_role("radio", name=rng.choice(["1", "3"])).first.click(),
        "colour": lambda page: page.get_by_role("radio", name=rng.choice(["gate", "score", "write"])).first.click(),
        "reload": lambda page: page.reload(),
    }
    done, settled = dict.fromkeys(use, 0), None
    started = time.monotonic()
    while (elapsed := time.monotonic() - started) < seconds or sum(done.values()) < 4 * sessions:
        at = rng.randrange(sessions)
        action = rng.choices(list(use), weights=[6, 2, 2, 1])[0]
        use[action](pages[at])
        done[action] += 1
        pages[at].wait_for_selector(".token")
        assert "".join(tokens_of(pages[at])[1:]).replace("·", " ") == texts[at], "another session's text"
        if settled is None and elapsed > seconds / 4 and sum(done.values()) >= sessions:
            settled = resident_megabytes(server)
    for page, text in zip(pages, texts, strict=True):
        quiet(page)
        assert "".join(tokens_of(page)[1:]).replace("·", " ") == text
        assert page.get_by_test_id("stException").count() == 0
    grown = resident_megabytes(server) - settled
    print(
        f"{sessions} sessions, {seconds} s, {done}; server {settled:.0f} MB after a quarter, {grown:+.0f} MB at the end"
    )
    assert grown < 0.1 * settled, f"the server grew by {grown:.0f} MB"
