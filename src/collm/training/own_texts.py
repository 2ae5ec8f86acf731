"""Texts that models write themselves: drawn, kept where a task's scorer accepts them, learnt beside the gold ones.

A gate that is fitted to gold texts has never seen what the pair makes of its own mistakes and ways of speaking. Drawing
from P(X), keeping what is right and going on with the same loss is EM on log P(X), filtered by the scorer
(docs/method.md). It still learns from no label of who is to write.
"""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from collm.data.examples import Example, examples_fingerprint
from collm.errors import CollmError
from collm.evaluation.evaluate import evaluate, example_seed
from collm.evaluation.result import EvalResult, result_path
from collm.evaluation.shipped import get_task
from collm.evaluation.task import Task
from collm.files import write_text
from collm.identity.comparing import NAMED
from collm.report.trace import Trace, stream_traces
from collm.sampling_params import SamplingParams
from collm.training.dataset import digest, load_asked
from collm.training.folder import OWN_TEXTS
from collm.training.own_writer import load_writer, looks
from collm.training.recipe import OwnTextsSection, Recipe

logger = logging.getLogger(__name__)

PAIR = "pair"


def accepted(traces: Iterable[Trace], least: float = 1.0) -> dict[str, list[str]]:
    """The texts that scored at least so much, by the id of their question.

    A text that was cut off is none: learnt, it would teach to end there.
    """
    found: dict[str, list[str]] = {}
    for trace in traces:
        text = trace.generation.text
        whole = trace.generation.finish_reason == "stop" and text.strip()
        if whole and trace.score is not None and trace.score >= least:
            found.setdefault(trace.id, []).append(text)
    return found


def own_examples(asked: Iterable[Example], texts: Mapping[str, Sequence[str]], *, gold: bool = True) -> list[Example]:
    """The questions with answers of the models' own in the place of the gold ones, each different text once.

    Args:
        texts: by the id of their question.
        gold: the gold texts are learnt as well, so that an own text that says the same is left out.
    """
    found = []
    for example in asked:
        seen = {(example.reference or "").strip()} if gold else set()
        for text in texts.get(example.id, ()):
            if text.strip() not in seen:
                seen.add(text.strip())
                found.append(_answered(example, text, f"{example.id}-own-{len(seen) - gold}"))
    return found


def _answered(example: Example, text: str, name: str) -> Example:
    if example.messages is None:
        return replace(example, id=name, completion=text, where="")
    before = example.messages[: len(example.question)]
    answer = {"role": "assistant", "content": text.strip()}
    # Earlier answers are of the gold text, and are learnt there.
    earlier = any(message["role"] == "assistant" for message in before)
    return replace(example, id=name, messages=(*before, answer), last_turn=example.last_turn or earlier, where="")


def drawn(examples: list[Example], most: int | None, seed: int) -> list[Example]:
    """At most so many, by a hash of seed and text: others that are added move none of them from its place."""
    if most is None or len(examples) <= most:
        return examples
    places = {example.id: example_seed(seed, examples_fingerprint([example])) for example in examples}
    last = sorted(places.values())[most - 1]
    return [example for example in examples if places[example.id] <= last]


def as_row(example: Example) -> dict[str, Any]:
    """The row of a data file that is read as this example (one of which the last turn alone is learnt, with
    `data.last_turn: true`)."""
    texts = {"messages": example.messages, "prompt": example.prompt, "completion": example.completion}
    told = {key: value for key, value in texts.items() if value is not None}
    return {"id": example.id, **told, **({"tools": example.tools} if example.tools else {}), **example.fields}


def write_rows(path: Path, examples: Iterable[Example]) -> None:
    """Values of other fields that JSON does not know (a table's days, bytes, decimals) are written as texts."""
    rows = (json.dumps(as_row(example), ensure_ascii=False, default=str) for example in examples)
    write_text(path, "".join(f"{row}\n" for row in rows))


@dataclass(frozen=True)
class OwnTexts:
    """What is learnt, and figures of how it came about, for `collm.json`."""

    examples: list[Example]
    told: dict[str, Any]


def own_texts(
    recipe: Recipe,
    train: Sequence[Example],
    held_out: Sequence[Example],
    fitting: Callable[[list[Example]], list[Example]],
    *,
    progress: bool = True,
) -> OwnTexts:
    """Let the writer of a recipe's `own_texts` answer, and choose what is learnt; a stopped run goes on.

    The traces lie in the recipe's cache, named by what they were made from; what is learnt in `out/own_texts.jsonl`,
    as rows of data.

    Args:
        held_out: nobody learns an answer to these questions.
        fitting: leaves out what some model cannot be shown.

    Raises:
        CollmError: no text is accepted, or a fault of models or data.
    """
    section = recipe.own_texts
    assert section is not None
    task = get_task(section.task)
    asked = _questions(recipe, train, held_out)
    files = _written(recipe, section, task, asked, progress)
    results = [EvalResult.load(result_path(file)) for file in files]
    texts = accepted((trace for file in files for trace in stream_traces(file)), section.keep)
    different = own_examples(asked, texts, gold=section.gold)
    told = {
        "writer": section.writer,
        "task": f"{task.name} v{task.version}",
        "gold": section.gold,
        "questions": len(asked),
        "written": sum(result.num_examples for result in results),
        "accepted": sum(map(len, texts.values())),
        "unfinished": sum(result.finish_reasons.get("length", 0) for result in results),
        "different": len(different),
    }
    counts = (
        f"own texts: of {told['written']} by {section.writer} {told['accepted']} are accepted "
        f"by {task.name}, and {told['unfinished']} were cut off after {section.max_tokens} tokens"
    )
    if not different:
        raise CollmError(
            f"{counts}; none is left to be learnt{' beside the gold ones' if section.gold else ''}. Look at {files[0]} "
            "(collm trace shows it): does the task find the answers? Then raise own_texts.samples or max_tokens, or "
            "let a better model write"
        )
    learnt = drawn(fitting(different), section.max_texts, section.seed)
    told["learnt"] = len(learnt)
    logger.info(
        "%s; %d are different%s, %d are learnt", counts, told["different"], " and not gold" * section.gold, len(learnt)
    )
    if section.max_texts is not None and len(learnt) < section.max_texts:
        logger.warning(
            "own_texts.max_texts is %d, and there are %d: to compare writers by as many texts each, raise samples, or "
            "lower max_texts",
            section.max_texts,
            len(learnt),
        )
    write_rows(recipe.out / OWN_TEXTS, learnt)
    return OwnTexts(learnt, told)


def _questions(recipe: Recipe, train: Sequence[Example], held_out: Sequence[Example]) -> list[Example]:
    found = load_asked(recipe, train)
    kept_back = {str(example.question) for example in held_out}
    asked = [example for example in found if str(example.question) not in kept_back]
    if len(asked) < len(found):
        logger.info("own texts: %d questions are held out, and not asked", len(found) - len(asked))
    if not asked:
        raise CollmError("own_texts: all questions are held out: give own_texts.data others than data.validation")
    return asked


def _written(
    recipe: Recipe, section: OwnTextsSection, task: Task, asked: Sequence[Example], progress: bool
) -> list[Path]:
    """Files of traces, one for each sample, every question answered."""
    golds = [task.gold(example) for example in asked]
    made_from = [
        section.model_dump(include={"writer", "seed", "temperature", "max_tokens", "dtype"}),
        [task.name, task.version, examples_fingerprint(asked), golds],
        looks(recipe, section),
    ]
    folder = recipe.cache_folder / f"own-texts-{section.writer}-{digest(made_from)}"
    files = [folder / f"{number}.jsonl" for number in range(1, section.samples + 1)]
    if all(result_path(file).is_file() for file in files):
        return files  # no model is loaded for what is there
    logger.info("own texts: %s writes %d for each of %d questions", section.writer, section.samples, len(asked))
    llm = load_writer(recipe, section)
    try:
        for number, file in enumerate(files):
            evaluate(
                llm,
                task,
                asked,
                SamplingParams(
                    max_tokens=section.max_tokens,
                    temperature=section.temperature,
                    seed=section.seed,
                    sample=number,
                    deferral="sampled" if section.writer == PAIR else None,
                ),
                alone=None if section.writer == PAIR else _alone(section),
                batch_size=section.batch_size,
                out=file,
                name=f"own texts, {number + 1} of {section.samples}",
                identity={NAMED: {"checkpoint": section.checkpoint, "writer": section.writer}},
                progress=progress,
            )
    finally:
        llm.close()
        del llm
        gc.collect()  # its memory is wanted by what is trained
    return files


def _alone(section: OwnTextsSection) -> int | str:
    """A model that was loaded by itself is the base of its system."""
    return section.writer if section.checkpoint is not None else 0
