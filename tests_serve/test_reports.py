"""The pages of `collm report` and `collm trace --html` as a person uses them, in headless Chromium, from a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import Live

from collm.data.examples import Example
from collm.evaluation.evaluate import evaluate
from collm.evaluation.overview import Overview, write_overview
from collm.evaluation.result import EvalResult
from collm.evaluation.written import read_written
from collm.report.html import write_html
from collm.report.trace import read_traces
from collm.sampling_params import SamplingParams

WIDTHS = (360, 768, 1280)
SYSTEMS: dict[str, dict[str, Any]] = {
    "base alone": {"alone": "base"},
    "seldom": {"threshold": 0.75},
    "often": {"threshold": 0.25},
}


@pytest.fixture(scope="module")
def folder(server: Live, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`report.html` of three systems, and `trace.html` of one."""
    root = tmp_path_factory.mktemp("pages")
    examples = [
        Example(id=f"q{n}", messages=({"role": "user", "content": f"What is {n} + 1?"},), fields={"answer": str(n + 1)})
        for n in range(6)
    ]
    files = []
    for name, how in SYSTEMS.items():
        alone = how.get("alone")
        settings = {key: value for key, value in how.items() if key != "alone"}
        params = SamplingParams(max_tokens=30, **settings)
        out = root / f"{name.replace(' ', '_')}.jsonl"
        evaluate(server.llm, "exact_match", examples, params, alone=alone, out=out, name=name, progress=False)
        files.append(out.with_suffix(".json"))
    results = [EvalResult.load(file) for file in files]
    written = tuple(read_written(file, result) for file, result in zip(files, results, strict=True))
    write_overview(Overview("Three systems", written, results[0]), root / "report.html")
    write_html(read_traces(root / "often.jsonl"), root / "trace.html")
    return root


@pytest.fixture
def opened(browser: Any, folder: Path) -> Iterator[Any]:
    """Opens one of the pages at a width; nothing may go wrong in it, nor may it ask anybody."""
    contexts, wrong = [], []

    def open_page(name: str, width: int, *, touch: bool = False) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 800}, has_touch=touch)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: None if asked.url.startswith("file:") else wrong.append(asked.url))
        page.goto((folder / name).as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong, wrong


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["report.html", "trace.html"])
def test_at_every_width_nothing_overflows_and_axe_finds_nothing_serious(opened: Any, name: str, width: int) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page = opened(name, width)
    assert page.locator("html").evaluate("each => each.scrollWidth") <= width
    for chart in page.locator("svg").all():
        box = chart.bounding_box()
        assert box is None or box["width"] <= width
    found = Axe().run(page).response["violations"]
    serious = [each for each in found if each["impact"] in ("serious", "critical")]
    assert not serious, [(each["id"], [node["html"][:120] for node in each["nodes"][:3]]) for each in serious]


def test_a_curve_has_the_models_alone_as_lines(opened: Any) -> None:
    page = opened("report.html", 1280)
    texts = page.locator("svg").evaluate_all("all => all.map((each) => each.textContent)")
    curves = [text for text in texts if "share written by an assistant" in text]
    assert curves and all("base alone" in text for text in curves)


@pytest.mark.parametrize("name", ["report.html", "trace.html"])
def test_pointing_at_a_token_and_tapping_it_open_the_panel(opened: Any, name: str) -> None:
    page = opened(name, 1280)
    token = page.locator(".t:visible").nth(3)
    token.hover()
    assert "written by" in page.inner_text("#tip")
    phone = opened(name, 360, touch=True)
    token = phone.locator(".t:visible").nth(3)
    token.scroll_into_view_if_needed()
    token.tap()
    assert "written by" in phone.inner_text("#tip") and phone.locator("#tip").is_visible()


def test_texts_are_filtered_and_gates_shown(opened: Any) -> None:
    page = opened("trace.html", 1280)
    shown = page.locator(".sample:visible").count()
    assert shown == 6
    page.locator('[data-filter="right"]').click()
    assert page.locator(".sample:visible").count() == page.locator(".sample.right").count() < shown
    page.locator('[data-filter="all"]').click()
    assert page.locator(".sample:visible").count() == shown
    page.locator('[data-view="gate"]').click()
    assert page.locator("body.gates").count() == 1
