"""Errors meant for users."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CollmError(ValueError):
    """Something the user can put right. The message says what is wrong and what to do about it."""


def nearest(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """`did you mean 'x'?` with the known name that a misspelt one comes nearest to; `otherwise` if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else otherwise
