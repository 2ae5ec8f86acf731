"""Tasks: what is asked, how an answer is found in a text, and what it is worth.

A task is versioned: whoever changes what it asks or counts as right raises its `version`, so that figures of different
rules are never compared unawares. A text in which no answer is found is wrong; no text makes a task raise. The rules
are in `collm.evaluation.tasks`; docs/tasks.md tells of each task where its data come from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from collm.errors import CollmError, nearest
from collm.evaluation.tasks.answers import MARK, any_number, first_number, marked_number, marked_text, normalised
from collm.evaluation.tasks.choices import YES_NO, YES_NO_MAYBE, label_field, label_in, macro_f1, same_label
from collm.evaluation.tasks.entities import candidates, gold_names, judge_factoid, judge_list, listed
from collm.evaluation.tasks.ifeval import (
    PROMPT_METRICS,
    instructions_field,
    judge_prompt,
    loose_instructions,
    require_sentences,
    strict_instructions,
    text_as_it_is,
)
from collm.evaluation.tasks.latex import mathematical_answer, mathematical_gold, same_mathematics
from collm.evaluation.tasks.mbpp import PASS, judge_program, program, tests_field
from collm.evaluation.tasks.sandbox import require_sandbox
from collm.evaluation.tasks.shots import CHAIN_OF_THOUGHT, STOP, Shot, few_shot
from collm.evaluation.tasks.summaries import METRICS, judge_summary, reference_texts, whole_text

if TYPE_CHECKING:
    from collm.data.examples import Example
    from collm.types import Message

__all__ = ["TASKS", "Figure", "Task", "get_task"]

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


def _labels(name: str, labels: tuple[str, ...]) -> Task:
    return Task(
        name,
        3,
        label_in(labels),
        label_field(labels),
        metrics=("accuracy",),
        judge=same_label,
        of_all=MappingProxyType({"macro_f1": macro_f1}),
    )


_FACTOID = ("strict_accuracy", "lenient_accuracy", "mrr")
_LIST = ("f1", "precision", "recall")

TASKS: Mapping[str, Task] = MappingProxyType(
    {
        task.name: task
        for task in (
            Task("exact_match", 2, marked_text, normalised, marked=True),
            Task("gsm8k", 3, marked_number, first_number, marked=True, arithmetic=True),
            Task("gsm8k_flexible", 3, any_number, first_number, arithmetic=True),
            Task("gsm8k_8shot", 3, any_number, first_number, arithmetic=True, shots=CHAIN_OF_THOUGHT),
            Task("word_problems", 3, marked_number, first_number, marked=True, arithmetic=True),
            Task("word_problems_flexible", 3, any_number, first_number, arithmetic=True),
            Task(
                "math",
                3,
                mathematical_answer,
                mathematical_gold,
                metrics=("accuracy",),
                judge=same_mathematics,
                package="math_verify",
            ),
            Task(
                "mbpp",
                1,
                program,
                tests_field,
                metrics=(PASS,),
                judge=judge_program,
                lists=True,
                needs=require_sandbox,
                unsandboxed=partial(judge_program, sandboxed=False),
                code=True,
            ),
            Task(
                "ifeval",
                1,
                text_as_it_is,
                instructions_field,
                metrics=PROMPT_METRICS,
                judge=judge_prompt,
                lists=True,
                of_all=MappingProxyType(
                    {"inst_level_strict_acc": strict_instructions, "inst_level_loose_acc": loose_instructions}
                ),
                package="lm_eval",
                needs=require_sentences,
            ),
            _labels("pubmedqa", YES_NO_MAYBE),
            _labels("bioasq_yesno", YES_NO),
            Task("bioasq_factoid", 2, candidates, gold_names, metrics=_FACTOID, judge=judge_factoid, lists=True),
            Task("bioasq_list", 2, listed, gold_names, metrics=_LIST, judge=judge_list, lists=True),
            Task(
                "bioasq_summary",
                1,
                whole_text,
                reference_texts,
                metrics=METRICS,
                judge=judge_summary,
                lists=True,
                package="rouge_score",
            ),
        )
    }
)
"""The tasks shipped. `exact_match` compares short answers of any kind; the `_flexible` ones take an unmarked answer,
too, which is what a model that never saw `####` deserves."""


def get_task(name: str, *, sandboxed: bool = True) -> Task:
    """The shipped task of that name, or one's own, `MODULE:FUNCTION` (`collm.evaluation.own`); with `sandboxed=False`,
    see `Task.without_sandbox`.

    Raises:
        CollmError: unknown; the message names the nearest. Or it runs nothing that needs a sandbox.
    """
    if ":" in name:
        from collm.evaluation.own import own_task

        found = own_task(name)
        return found if sandboxed else found.without_sandbox()
    if name not in TASKS:
        hint = nearest(name, TASKS)
        there = f"there are: {', '.join(TASKS)}; or MODULE:FUNCTION, of your own"
        raise CollmError(f"unknown task {name!r}{hint and '; '}{hint} ({there})")
    return TASKS[name] if sandboxed else TASKS[name].without_sandbox()
