"""Which of the assistants that are given takes which place of the gate."""

from __future__ import annotations

from pathlib import Path

import pytest

from collm.errors import CollmError
from collm.llm.sources import matched
from collm.models.info import AssistantInfo


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[AssistantInfo]:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "other"):
        (tmp_path / name).mkdir()
    return [AssistantInfo(name="first", spec="a"), AssistantInfo(name="second", spec="b")]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([], ["a", "b"]),
        (["other"], ["other", "b"]),
        (["a", "other"], ["a", "other"]),
        # The second one's own took the first one's place, and a stranger, or itself, the second's.
        (["b", "other"], ["other", "b"]),
        (["b"], ["a", "b"]),
        (["b?dtype=bfloat16"], ["a", "b?dtype=bfloat16"]),
        (["./b", "a"], ["a", "./b"]),
        (["second=other", "b"], ["b", "other"]),
    ],
)
def test_who_takes_whose_place(trained: list[AssistantInfo], given: list[str], wanted: list[str]) -> None:
    assert matched(given, trained) == (trained, wanted)


def test_a_name_that_is_given_twice_is_refused(trained: list[AssistantInfo]) -> None:
    with pytest.raises(CollmError, match="two assistants have one name"):
        matched(["first=a", "first=other"], trained)
