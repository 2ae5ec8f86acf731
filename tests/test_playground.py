"""The page at `/`, by its headers and its source; `make test-serve` uses it in a browser."""

from __future__ import annotations

import re
from importlib.resources import files

import httpx
import pytest
from servers import Live, fake_pair, live

from collm.report import pages
from collm.serving.playground import FILES, SHARED


def source(name: str) -> str:
    return (files("collm.serving") / "page" / name).read_text(encoding="utf-8")


def test_the_page_is_served_under_a_policy() -> None:
    with live(fake_pair()) as server:
        for path in (*FILES, *SHARED):
            found = httpx.get(server.url + path)
            policy = found.headers["content-security-policy"]
            assert found.status_code == 200 and found.content
            assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert httpx.get(server.url + "/tokens.js").text == pages.source("tokens.js"), "the script of the reports"
        references(server)


def references(server: Live) -> None:
    """All that the page names is there."""
    text = httpx.get(server.url).text + "".join(source(name) for name in scripts())
    for name in re.findall(r'(?:src|href)="([\w.]+)"|from "\./([\w.]+)"', text):
        assert f"/{''.join(name)}" in {*FILES, *SHARED}


def scripts() -> list[str]:
    return [name for name, kind in FILES.values() if "javascript" in kind]


@pytest.mark.parametrize("name", [name for name, _ in FILES.values()])
def test_it_asks_nobody_else_and_makes_no_html_of_texts(name: str) -> None:
    assert not re.search(r"(https?:)?//[\w-]+\.\w", source(name))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", source(name))
    if name.endswith(".html"):
        assert not re.search(r"\son\w+=|<script>|style=", source(name))
