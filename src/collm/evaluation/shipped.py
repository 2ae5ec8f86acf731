"""The tasks that are shipped, by name. Their rules are in `collm.evaluation.tasks`; docs/tasks.md tells of each
where its data come from."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

from collm.errors import CollmError, nearest
from collm.evaluation.own import own_task
from collm.evaluation.task import Task
from collm.evaluation.tasks.answers import any_number, first_number, marked_number, marked_text, normalised
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
from collm.evaluation.tasks.shots import CHAIN_OF_THOUGHT
from collm.evaluation.tasks.summaries import METRICS, judge_summary, reference_texts, whole_text


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
                2,
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
        found = own_task(name)
        return found if sandboxed else found.without_sandbox()
    if name not in TASKS:
        hint = nearest(name, TASKS)
        there = f"there are: {', '.join(TASKS)}; or MODULE:FUNCTION, of your own"
        raise CollmError(f"unknown task {name!r}{hint and '; '}{hint} ({there})")
    return TASKS[name] if sandboxed else TASKS[name].without_sandbox()
