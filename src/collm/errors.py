"""Errors meant for users."""

from __future__ import annotations


class CollmError(ValueError):
    """Something the user can put right. The message says what is wrong and what to do about it."""
