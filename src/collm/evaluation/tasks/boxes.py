r"""Where `\boxed{...}` stands in a text."""

from __future__ import annotations

import re

BOX = re.compile(r"\\(?:boxed|fbox)\s*(?P<brace>\{)?")


def boxed(text: str) -> list[str] | None:
    r"""The contents of every `\boxed{...}`, braces balanced; `\boxed 5` boxes one word.

    None where the last box is never closed: an answer was begun and cut off, and no earlier box stands for it (as in
    MATH's own evaluation, which looks at the last box alone).
    """
    contents = [_content(text, match) for match in BOX.finditer(text)]
    if contents and contents[-1] is None:
        return None
    return [content for content in contents if content is not None]


def _content(text: str, match: re.Match[str]) -> str | None:
    if not match["brace"]:
        rest = text[match.end() :]
        return re.split(r"[\s$]", rest, maxsplit=1)[0] if rest.strip() else None
    depth = 1
    for position in range(match.end(), len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[match.end() : position]
    return None
