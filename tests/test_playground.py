"""The page at `/`: by its headers and its source, and, where a browser is there, as a person uses it."""

from __future__ import annotations

import re
import shutil
from importlib.resources import files

import httpx
import pytest
from servers import Live, fake_pair, live

CHROMIUM = shutil.which("chromium")


def source(name: str) -> str:
    return (files("collm.serving") / "page" / name).read_text(encoding="utf-8")


def test_the_page_is_served_under_a_policy() -> None:
    with live(fake_pair()) as server:
        for path in ("/", "/page.js", "/page.css"):
            found = httpx.get(server.url + path)
            policy = found.headers["content-security-policy"]
            assert found.status_code == 200 and found.content
            assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy


def test_it_asks_nobody_else_and_makes_no_html_of_texts() -> None:
    for name in ("index.html", "page.js", "page.css"):
        assert not re.search(r"(https?:)?//[\w-]+\.\w", source(name)), name
    script = source("page.js")
    # `innerHTML` is read once, to escape a text; it is never set, nor is anything like it.
    assert not re.search(r"innerHTML\s*\+?=|outerHTML|insertAdjacentHTML|document\.write|eval\(", script)
    assert not re.search(r"\son\w+=|<script>|style=", source("index.html"))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_a_person_asks_reads_and_stops() -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    with live(fake_pair(seconds=0.005, max_model_len=2000)) as server, playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            for width in (360, 1280):
                use(server, browser.new_page(viewport={"width": width, "height": 800}))
        finally:
            browser.close()
        server.wait_idle()


def use(server: Live, page: object) -> None:
    from playwright.sync_api import Page

    assert isinstance(page, Page)
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.goto(server.url)
    page.wait_for_selector("#model option", state="attached")
    page.fill("#dial", "0.3")
    page.fill("#max-tokens", "40")
    page.fill("#question", "Is <b>this</b> bold?")
    page.keyboard.press("Enter")
    page.wait_for_selector(".token[tabindex='0']", state="attached", timeout=20_000)
    assert page.inner_text(".said") == "Is <b>this</b> bold?" and page.locator("#talk b").count() == 0
    # What the page shows is what the server wrote.
    params = {"model": "pair", "messages": [{"role": "user", "content": "Is <b>this</b> bold?"}], "max_tokens": 40}
    own = {**params, "temperature": 0, "seed": 0, "collm": {"threshold": 0.3, "tokens": True}}
    told = server.post("/v1/chat/completions", json=own).json()["choices"][0]
    assert page.locator(".text").first.evaluate("each => each.textContent") == told["message"]["content"]
    # By keyboard: the first token, then the next.
    page.locator(".token[tabindex='0']").first.focus()
    assert told["collm"]["tokens"][0]["author"] in page.inner_text("#panel")
    page.keyboard.press("ArrowRight")
    assert "gate" in page.inner_text("#panel")
    page.keyboard.press("Escape")
    assert page.locator("#panel").is_hidden()
    assert page.locator("html").evaluate("each => each.scrollWidth") <= page.viewport_size["width"]  # type: ignore[index]
    # Another turn, side by side, stopped in the middle.
    page.select_option("#model", "side by side")
    page.fill("#max-tokens", "1500")
    page.fill("#question", "And now?")
    page.click("#send")
    page.wait_for_selector(".turn:nth-child(2) .token", state="attached")
    page.click("#stop")
    page.wait_for_selector("#stop[disabled]", state="attached")
    assert page.locator(".turn:nth-child(2) .answer").count() == 3
    assert not wrong, wrong
