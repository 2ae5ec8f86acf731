"""What the website does otherwise than the repository: files outside docs/ that pages link to are shown as pages, and
formulas are MathML, which browsers show without a script from elsewhere."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
LANGUAGES = {".py": "python", ".yml": "yaml", ".yaml": "yaml", ".json": "json", ".mk": "makefile"}


def _page(name: str) -> str:
    return f"files/{re.sub(r'[^a-z0-9]+', '_', name.lower())}.md"


def on_files(files: Any, config: Any) -> Any:
    """A page for each file outside docs/ that a page links to; of Markdown its text, of others a listing."""
    from mkdocs.structure.files import File

    linked = set()
    for file in list(files.documentation_pages()):
        if file.abs_src_path and file.src_path.endswith(".md"):
            linked |= {match[1] for match in OUTSIDE.finditer(Path(file.abs_src_path).read_text(encoding="utf-8"))}
    for name in sorted(linked):
        path = ROOT / name
        if not path.is_file():
            raise SystemExit(f"a page links to {name}, which is not there")
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".md":
            text = f"# {name}\n\n```{LANGUAGES.get(path.suffix, '')}\n{text.rstrip()}\n```\n"
        else:  # its own links lead to where it lies
            text = re.sub(r"\]\((?!https?://|#)([^)]+)\)", "]", text).replace("[", "").replace("]", "")
        files.append(File.generated(config, _page(name), content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    depth = "../" * page.file.src_path.count("/")
    return OUTSIDE.sub(lambda match: f"]({depth}{_page(match[1])})", markdown)


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    from latex2mathml.converter import convert

    def formula(match: re.Match[str]) -> str:
        inline = match[2] == "("
        shown = str(convert(html.unescape(match[3]).strip(), display="inline" if inline else "block"))
        return shown if inline else f'<div class="formula">{shown}</div>'

    return FORMULA.sub(formula, content)
