"""Tasks: what is asked, how an answer is found in a text, and what it is worth.

A task is versioned: whoever changes what it asks or counts as right raises its `version`, so that figures of different
rules are never compared unawares. A text in which no answer is found is wrong; no text makes a task raise. Those that
are shipped are in `collm.evaluation.shipped`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from collm.errors import CollmError
from collm.evaluation.tasks.answers import MARK
from collm.evaluation.tasks.shots import STOP, Shot, few_shot

if TYPE_CHECKING:
    from collm.data.examples import Example
    from collm.types import Message

Figure = tuple[float, tuple[float, float]]
"""A metric's value and its 95 % interval."""
Judge = Callable[[str | None, str], Mapping[str, float]]
OfAll = Callable[[Sequence[str | None], Sequence[str], Sequence[str] | None], Figure]
"""A metric of all answers and golds together, and their groups or None: no mean over examples."""


def same_text(answer: str | None, gold: str) -> Mapping[str, float]:
    return {"exact_match": float(answer == gold)}


@dataclass(frozen=True)
class Task:
    """`extract` finds the answer in a text a model wrote, `read_gold` in the field `answer` of an example; both give
    one spelling (JSON, for answers that are lists). `judge` compares the two: a score for each of `metrics`, of which
    the first is the task's own.

    `marked`: only an answer after `####` counts. `arithmetic`: the texts show equations whose correctness is counted.
    `lists`: the field `answer` may be a list or a mapping. `whole`: all of that field is the gold answer,
    whatever it is, or all of the last assistant turn. `of_all`: further metrics, of all answers together.
    `shots`: solved examples that go before each question; the prompt is a plain text then. `package`: what `judge`
    imports, of the extra `eval`; `needs` raises CollmError where something else is missing. `unsandboxed`: where
    `judge` runs what a model wrote in a sandbox, the same without one. `code`: answers are programs.
    """

    name: str
    version: int
    extract: Callable[[str], str | None]
    read_gold: Callable[[Any], str | None]
    marked: bool = False
    arithmetic: bool = False
    metrics: tuple[str, ...] = ("exact_match",)
    judge: Judge = same_text
    lists: bool = False
    whole: bool = False
    of_all: Mapping[str, OfAll] = field(default_factory=dict)
    shots: tuple[Shot, ...] = ()
    package: str | None = None
    needs: Callable[[], None] | None = None
    unsandboxed: Judge | None = None
    code: bool = False

    @property
    def metric(self) -> str:
        return self.metrics[0]

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end an answer, besides those that the user gives."""
        return STOP if self.shots else ()

    def question(self, example: Example) -> list[Message] | str:
        """What a model is asked."""
        return few_shot(self.shots, example) if self.shots else example.question

    def gold(self, example: Example) -> str:
        """The gold answer: the field `answer`, else what `extract` finds in the last assistant turn.

        Raises:
            CollmError: the example has no answer in either place.
        """
        given = example.fields.get("answer")
        if self.whole:
            answer = self.extract(example.reference or "") if given is None else self.read_gold(given)
        elif self.lists:
            answer = None if given is None else self.read_gold(given)
        elif given is not None and not isinstance(given, dict | list):
            text = str(given)
            answer = self.extract(text) if MARK in text else self.read_gold(text)
        else:
            answer = self.extract(example.reference or "")
        if answer is None:
            where = f"an answer after {MARK}" if self.marked else "an answer"
            turn = "" if self.lists else f", or {where} in its last assistant turn"
            raise CollmError(
                f'{example.label} has no gold answer for task {self.name!r}: give it a field "answer"{turn}'
            )
        return answer

    def without_sandbox(self) -> Task:
        """The same task; what a model wrote runs as the user then, with the user's files and network.

        Raises:
            CollmError: the task runs nothing.
        """
        if self.unsandboxed is None:
            raise CollmError(f"task {self.name!r} runs no programs: leave out --unsandboxed")
        return replace(self, judge=self.unsandboxed, needs=None, unsandboxed=None)

    def require(self) -> None:
        """Raises CollmError if what judges answers is not there: better before they are written than after."""
        if self.package is not None and find_spec(self.package) is None:
            raise CollmError(f"task {self.name!r} needs the package {self.package}; pip install 'collm[eval]'")
        if self.needs is not None:
            self.needs()

    def score(self, text: str, gold: str) -> float:
        """The task's own metric of one text, between 0 and 1."""
        return self.judge(self.extract(text), gold)[self.metric]

    def further(
        self, answers: Sequence[str | None], golds: Sequence[str], groups: Sequence[str] | None = None
    ) -> dict[str, Figure]:
        """The metrics beside the main one: value and 95 % interval of each, by name.

        `groups` of near-duplicates are resampled whole.
        """
        from collm.evaluation.stats import bootstrap_ci

        found: dict[str, Figure] = {}
        if len(self.metrics) > 1:
            judged = [self.judge(answer, gold) for answer, gold in zip(answers, golds, strict=True)]
            for metric in self.metrics[1:]:
                values = [scores[metric] for scores in judged]
                found[metric] = (sum(values) / len(values), bootstrap_ci(values, groups=groups))
        return found | {metric: measure(answers, golds, groups) for metric, measure in self.of_all.items()}
