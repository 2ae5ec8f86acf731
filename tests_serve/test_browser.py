"""The page as a person uses it, in headless Chromium: with the mouse, by keyboard alone, on a telephone."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import EXAMPLES
from servers import Live, fake_pair, live

from collm.sampling_params import SamplingParams

WIDTHS = (360, 768, 1280)
QUESTION = "Is <b>this</b> bold?"
SHOTS = os.environ.get("SCREENSHOTS")
"""A folder for pictures of the page, to be looked at."""


@pytest.fixture
def page(server: Live, browser: Any) -> Iterator[Any]:
    """The page; at the end, nothing may have gone wrong in it, nor may it have asked anybody else."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=server.url)
    found = context.new_page()
    wrong: list[str] = []
    found.on("pageerror", lambda error: wrong.append(str(error)))
    found.on("console", lambda message: wrong.append(message.text) if _is_fault(message) else None)
    found.on("request", lambda asked: None if asked.url.startswith((server.url, "data:")) else wrong.append(asked.url))
    found.goto(server.url)
    found.wait_for_selector("#model option", state="attached")
    yield found
    context.close()
    assert not wrong, wrong


def _is_fault(message: Any) -> bool:
    # That a request was refused is told by the browser, too.
    return message.type == "error" and "Failed to load resource" not in message.text


def ask(page: Any, question: str, *, tokens: int = 40, model: str = "pair", by: str | None = None) -> None:
    """Ask, and wait for the whole answer."""
    turns = page.locator(".turn").count()
    page.select_option("#model", model)
    if by is not None:
        page.select_option("#by", by)
    page.locator("details").evaluate("each => { each.open = true; }")
    page.fill("#max-tokens", str(tokens))
    page.fill("#question", question)
    page.keyboard.press("Enter")
    page.locator(".turn").nth(turns).locator(".tools").last.wait_for(timeout=30_000)
    page.wait_for_selector("#stop[disabled]", state="attached")


def written(server: Live, messages: Any, **settings: Any) -> Any:
    return server.llm.generate(messages, SamplingParams(**{"max_tokens": 40, **settings}))


def shown(page: Any, turn: int = 0) -> str:
    """The text on the page, without the signs for line breaks."""
    spans = page.locator(".turn").nth(turn).locator(".answer").first.locator(".written .t")
    return "".join(spans.evaluate_all("all => all.map((each) => each.dataset.p ?? each.textContent)"))


def test_what_is_shown_is_what_the_server_wrote(server: Live, page: Any) -> None:
    ask(page, QUESTION, by="threshold")
    user = [{"role": "user", "content": QUESTION}]
    first = written(server, user, threshold=0.5)
    assert page.inner_text(".said") == QUESTION and page.locator("#talk b").count() == 0
    assert shown(page) == first.text
    tokens = page.locator(".written .t")
    authors = tokens.evaluate_all("all => all.map((each) => Number(each.dataset.a || 0))")
    assert authors == [step.author for step in first.steps] and len(set(authors)) == 2
    count = page.inner_text(".answer .quiet")
    by = first.usage.tokens_by_author
    assert f"40 tokens (base {by[0]}, helper {by[1]})" in count and "tokens/s" in count and "passes: base" in count
    # The next turn knows the one before.
    ask(page, "And now?")
    turns = [*user, {"role": "assistant", "content": first.text}, {"role": "user", "content": "And now?"}]
    assert shown(page, 1) == written(server, turns, threshold=0.5).text
    page.click("#clear")
    assert page.locator(".turn").count() == 0 and page.locator("#examples").is_visible()


def test_a_models_output_is_text(server: Live, browser: Any, page: Any) -> None:
    """A model that writes nothing but markup; nothing of it becomes any."""
    markup = "<img src=x onerror=alert(1)><script>alert(2)</script><a href=javascript:alert(3)>x</a>"

    class Evil:
        """In the place of the server's answer."""

        def __call__(self, route: Any) -> None:
            token = {"text": markup, "token_id": 1, "author": "helper", "log_prob": -0.1, "gate": None, "draft": None}
            told = {"tokens": [{**token, "base_text": markup, "fault": markup}]}
            choice = {"index": 0, "delta": {"content": markup}, "finish_reason": None, "collm": told}
            end = {"index": 0, "delta": {}, "finish_reason": "stop", "collm": {"forward_passes": {}}}
            events = [{"choices": [choice]}, {"choices": [end]}]
            body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
            route.fulfill(status=200, content_type="text/event-stream", body=body)

    page.on("dialog", lambda dialog: pytest.fail(f"a script of the model's ran: {dialog.message}"))
    page.route("**/v1/chat/completions", Evil())
    ask(page, markup)
    page.locator(".written").first.focus()
    page.keyboard.press("ArrowRight")
    assert markup in page.inner_text("#tip") and shown(page) == markup
    assert page.locator("#talk img, #talk script, #talk a, #tip img, #tip script, #tip a").count() == 0
    page.get_by_label("Copy as HTML").click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert "<img" not in copied and "&lt;img" in copied


def test_were_it_to_become_html_the_policy_would_stop_its_scripts(server: Live, browser: Any) -> None:
    context = browser.new_context()
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(server.url)
    html = """<img src=x onerror="document.title = 'ran'"><a href="javascript:document.title = 'ran'">x</a>"""
    page.evaluate("(html) => document.body.insertAdjacentHTML('beforeend', html)", html)
    page.locator("a").last.click()
    page.evaluate("""() => {
        const script = document.createElement("script");
        script.textContent = "document.title = 'ran'";
        document.body.append(script);
    }""")
    assert page.title() == "collm" and sum("Content Security Policy" in each for each in said) >= 3, said
    context.close()


def test_by_keyboard_alone(server: Live, page: Any) -> None:
    def focused() -> str:
        return str(page.evaluate("document.activeElement.id || document.activeElement.className"))

    def go_to(name: str) -> None:
        for _ in range(40):
            if focused() == name:
                return
            page.keyboard.press("Tab")
        pytest.fail(f"Tab does not lead to {name}")

    go_to("question")
    page.keyboard.type("hi")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("there")
    go_to("model")
    page.keyboard.press("ArrowDown")  # the base alone
    assert page.locator("#dial").is_disabled()
    page.keyboard.press("ArrowUp")
    go_to("dial")
    page.keyboard.press("End")
    assert page.inner_text("#dial-value") == "100.0 %"
    page.keyboard.press("Home")
    for _ in range(25):
        page.keyboard.press("ArrowRight")
    assert page.inner_text("#dial-value") == "25.0 %"
    go_to("send")
    page.keyboard.press("Enter")
    page.locator(".tools").wait_for(timeout=30_000)
    page.wait_for_selector("#stop[disabled]", state="attached")
    user = [{"role": "user", "content": "hi\nthere"}]
    found = written(server, user, deferral_rate=0.25, max_tokens=256)
    assert shown(page) == found.text and focused() == "question"
    for _ in range(40):
        if focused() == "written":
            break
        page.keyboard.press("Shift+Tab")
    for step, author in zip(range(6), found.steps, strict=False):
        page.keyboard.press("ArrowRight")
        panel = page.inner_text("#tip")
        assert f"written by {server.llm.model_names[author.author]}" in panel and "%" in panel, step
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()


def test_the_mouse_and_a_finger_open_the_panel(page: Any) -> None:
    ask(page, QUESTION)
    token = page.locator(".written .t").filter(has_text="a").first
    token.hover()
    assert "written by" in page.inner_text("#tip")
    page.mouse.move(1, 1)
    assert page.locator("#tip").is_hidden()
    token.click()
    page.mouse.move(1, 1)
    assert page.locator("#tip").is_visible()


def test_an_answer_can_be_stopped(server: Live, page: Any) -> None:
    for how in ("button", "Escape"):
        page.locator("details").evaluate("each => { each.open = true; }")
        page.fill("#max-tokens", "1400")
        page.fill("#question", "Go on")
        page.click("#send")
        page.locator(".turn").last.locator(".t").nth(3).wait_for(state="attached")
        if how == "button":
            page.click("#stop")
        else:
            page.focus("#question")
            page.keyboard.press("Escape")
        page.wait_for_selector("#stop[disabled]", state="attached")
        assert "stopped" in page.locator(".turn").last.inner_text()
        assert 0 < page.locator(".turn").last.locator(".t").count() < 1400
        server.wait_idle()
    ask(page, "And now?")


def test_side_by_side_and_what_the_others_would_have_written(server: Live, page: Any) -> None:
    ask(page, QUESTION, model="side by side", by="threshold")
    assert page.locator(".answer h2").all_inner_texts() == ["pair", "base", "helper"]
    user = [{"role": "user", "content": QUESTION}]
    for z, name in enumerate(server.llm.model_names, start=1):
        spans = page.locator(".answer").nth(z).locator(".t")
        text = "".join(spans.evaluate_all("all => all.map((each) => each.dataset.p ?? each.textContent)"))
        assert text == server.llm.generate(user, SamplingParams(max_tokens=40), alone=name).text
    pair = written(server, user, threshold=0.5)
    calls = [server.model(number).calls for number in (0, 1)]
    page.locator(".answer").first.get_by_text("What the others").click()
    page.locator(".answer").first.get_by_text("would have written otherwise").wait_for()
    assert [server.model(number).calls for number in (0, 1)] == [each + 1 for each in calls], "one block pass of each"
    base_otherwise = sum(step.token_id != step.base_token_id for step in pair.steps)
    assert f"base {base_otherwise}" in page.locator(".answer").first.inner_text()
    page.locator(".written").first.focus()
    page.keyboard.press("ArrowRight")
    told = page.inner_text("#tip")
    assert "base would write" in told and "helper would write" in told


def test_copies(server: Live, page: Any) -> None:
    ask(page, "What's `56 * 9`?", by="threshold")
    copied = {}
    for name in ("text", "JSON", "HTML", "curl"):
        page.get_by_label(f"Copy as {name}").click()
        page.get_by_text(f"copied as {name}").wait_for()
        copied[name] = page.evaluate("navigator.clipboard.readText()")
    found = written(server, [{"role": "user", "content": "What's `56 * 9`?"}], threshold=0.5)
    assert copied["text"] == found.text
    told = json.loads(copied["JSON"])
    assert told["content"] == found.text and len(told["tokens"]) == 40 and told["request"]["collm"]["threshold"] == 0.5
    assert copied["HTML"].count("<span") == 40 and 'title="helper"' in copied["HTML"]
    # The command asks for the same text again.
    import subprocess

    assert copied["curl"].startswith("curl " + server.url)
    again = subprocess.run(["sh", "-c", copied["curl"] + " -s"], capture_output=True, text=True, check=True).stdout
    assert json.loads(again)["choices"][0]["message"]["content"] == found.text


def test_examples_are_asked_with_one_click(page: Any) -> None:
    assert page.locator(".example").all_inner_texts() == list(EXAMPLES)
    page.locator("details").evaluate("each => { each.open = true; }")
    page.fill("#max-tokens", "5")
    page.locator(".example").nth(1).click()
    page.locator(".tools").wait_for(timeout=30_000)
    assert page.inner_text(".said") == EXAMPLES[1] and page.locator("#examples").is_hidden()


def test_what_the_server_refuses_is_told(server: Live, page: Any) -> None:
    server.model(0).fails_after = 0
    try:
        page.fill("#question", "hi")
        page.keyboard.press("Enter")
        page.locator(".wrong").wait_for()
        assert "cables" in page.inner_text(".wrong")
    finally:
        server.model(0).fails_after = None
    ask(page, "And now?")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_at_every_width_nothing_overflows_and_axe_finds_nothing_serious(
    server: Live, browser: Any, width: int, scheme: str
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    # axe is put into the page, which its policy would not let happen; what it finds does not depend on that.
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, bypass_csp=True)
    page = context.new_page()
    page.goto(server.url)
    page.wait_for_selector("#model option", state="attached")
    _judge(Axe(), page, "begin", width, scheme)
    ask(page, QUESTION, model="side by side")
    page.locator(".answer").first.get_by_text("What the others").click()
    page.locator(".answer").first.get_by_text("would have written otherwise").wait_for()
    page.locator(".written").first.focus()
    page.keyboard.press("ArrowRight")
    _judge(Axe(), page, "answers", width, scheme)
    context.close()


def _judge(axe: Any, page: Any, what: str, width: int, scheme: str) -> None:
    if SHOTS:
        page.screenshot(path=Path(SHOTS) / f"{width}-{scheme}-{what}.png", full_page=what == "begin")
    assert page.locator("html").evaluate("each => each.scrollWidth") <= width
    found = axe.run(page).response["violations"]
    serious = [each for each in found if each["impact"] in ("serious", "critical")]
    assert not serious, [(each["id"], [node["html"][:120] for node in each["nodes"][:3]]) for each in serious]


def test_other_sites_cannot_ask(browser: Any, server: Live) -> None:
    """A page of another origin, in the same browser: neither by fetch, nor in a frame."""
    with live(fake_pair()) as other:
        context = browser.new_context(bypass_csp=True)
        page = context.new_page()
        page.goto(other.url)
        ask_other = """async (url) => {
            try {
                const body = JSON.stringify({messages: [{role: "user", content: "hi"}], max_tokens: 1});
                const headers = {"Content-Type": "application/json"};
                const found = await fetch(url + "/v1/chat/completions", {method: "POST", headers, body});
                return "answered " + found.status;
            } catch (error) { return "refused"; }
        }"""
        assert page.evaluate(ask_other, other.url) == "answered 200"
        before = server.metrics()["collm:request_success_total"]
        assert page.evaluate(ask_other, server.url) == "refused"
        # Without a preflight, as a form would send it: it arrives, and is refused there.
        simple = """(url) => fetch(url + "/v1/chat/completions", {method: "POST", mode: "no-cors", body: "{}"})
            .then((found) => found.type, () => "refused")"""
        assert page.evaluate(simple, server.url) == "opaque"
        assert server.metrics()["collm:request_success_total"] == before
        context.close()
