"""What cannot be tested on this machine is told at the end, in red: import both names into a conftest."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest

SKIPPED: list[str] = []


def skip_loudly(reason: str) -> NoReturn:
    SKIPPED.append(reason)
    pytest.skip(reason)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for reason in dict.fromkeys(SKIPPED):
        terminalreporter.write_sep("!", "NOT TESTED", red=True, bold=True)
        terminalreporter.write_line(reason)
