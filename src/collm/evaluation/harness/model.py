"""A pair as a model of EleutherAI's lm-evaluation-harness (`--model collm`)."""

from __future__ import annotations

import logging
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import simple_parse_args_string

from collm.cuts import START
from collm.decoding.policies import Policy
from collm.errors import CollmError
from collm.evaluation.chunk_likelihood import chunk_likelihoods, chunk_windows, tokens_read
from collm.evaluation.evaluate import example_seed
from collm.evaluation.harness.arguments import from_arguments
from collm.evaluation.harness.identity import harness_settings, law_of
from collm.evaluation.harness.progress import counting
from collm.evaluation.harness.prompts import ChatPrompt, cut_to, pair_ids, prompt_ids, sampling_params, windows
from collm.evaluation.harness.records import Records, fingerprint
from collm.evaluation.likelihood import GivenText, Likelihood, likelihoods
from collm.llm import CollaborativeLM, TokenPrompt
from collm.llm.sharing import require_closing
from collm.report.trace import Trace, base_pieces
from collm.sampling_params import SamplingParams
from collm.types import BASE, Message

_log = logging.getLogger(__name__)

GREEDY = SamplingParams()
CODE = re.compile("humaneval|mbpp|code", re.IGNORECASE)
"""In the names of tasks whose answers are programs."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A text to be written: its name in the records, how it is asked for, and whether its prompt had to be cut."""

    name: str
    context: str | ChatPrompt
    prompt: TokenPrompt
    params: SamplingParams
    cut: bool


@register_model("collm")
class CollaborativeHarnessLM(LM):  # type: ignore[misc]
    """Answers the harness's requests with a pair.

    `generate_until` decodes collaboratively, as `params` say; how tokens are drawn and when a text ends is the task's.
    `loglikelihood` and `loglikelihood_rolling` are those of the marginal `prod_t sum_z P(Z_t = z) P_z(x_t)`, whatever
    the threshold; of one model with `alone`, or of the base with `deferral="never"`.

    Args:
        params: who writes, and the token limit where a task has none.
        policy: who writes, instead of what `params` say.
        alone: name of the only model to be used: the baselines.
        out: a folder in which each answer is kept as it comes; a killed run that finds its own answers goes on.
    """

    def __init__(
        self,
        llm: CollaborativeLM,
        params: SamplingParams = GREEDY,
        *,
        policy: Policy | None = None,
        alone: str | None = None,
        batch_size: int = 8,
        out: str | Path | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__()
        if alone is not None and alone not in llm.model_names:
            raise CollmError(f"there is no model {alone!r}; the models are {', '.join(llm.model_names)}")
        self.llm, self.params, self.policy, self.alone = llm, params, policy, alone
        self.batch_size, self.progress = batch_size, progress
        self._contexts = llm.contexts(alone)
        self._records = Records(None if out is None else Path(out), harness_settings(llm, params, policy, alone))
        self._asked: dict[str, dict[str, None]] = defaultdict(dict)
        self._cut: Counter[str] = Counter()

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> CollaborativeHarnessLM:
        """What `--model_args` lead to; see `arguments.from_arguments`."""
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        llm, options = from_arguments({**given, **arg_dict})
        return cls(llm, **options)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> CollaborativeHarnessLM:
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    # -- what the harness asks of every model

    @property
    def tokenizer_name(self) -> str:
        """Of the harness's cache of prompts, which hold the template's text."""
        return fingerprint([formatter.fingerprint() for formatter in self.llm.formatters])

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        if isinstance(chat_template, str):
            raise CollmError("templates are not chosen by name: each model has its own, from its checkpoint")
        base = self.llm.formatters[BASE]
        return (base.format.chat_template or base.tokenizer.chat_template) if chat_template else None

    def apply_chat_template(self, chat_history: Sequence[Message], add_generation_prompt: bool = True) -> ChatPrompt:
        return ChatPrompt.of(self.llm.formatters[BASE], chat_history, add_generation_prompt)

    def get_model_info(self) -> dict[str, Any]:
        return {"collm": self.settings}

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        seen: Counter[str] = Counter()
        self._require_closing(requests)
        asked = [self._generation(request, seen) for request in requests]
        self._tell_of_cuts(_task(request) for request, each in zip(requests, asked, strict=True) if each.cut)
        with self._records.keeping_traces() as keep:
            todo = list({each.name: each for each in asked if each.name not in self._records.traces}.values())
            with self._bar("writing", len({each.name for each in asked}), len(todo), disable_tqdm) as advance:
                for trace in self._written(todo):
                    keep(trace)
                    advance()
        texts = [self._records.traces[each.name].generation.text for each in asked]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        texts, long = [], []
        for request in requests:
            prompts, completion = pair_ids(self.llm.formatters, *request.args)
            rooms = (
                [len(completion) - 1] * len(prompts)  # the last token is not read
                if self.llm.sharing is None
                else tokens_read(self.llm.sharing, completion)
            )
            cut = cut_to(prompts, self._contexts, rooms)
            long += [_task(request)] if cut.tokens else []
            texts.append(GivenText(cut.ids, completion))
        self._tell_of_cuts(long)
        answers = [(found.log_prob, found.greedy) for found in self._scored(requests, texts, disable_tqdm)]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """A text that is longer than a context is taken in windows, each token (or chunk) predicted once."""
        owners: list[int] = []
        texts: list[GivenText] = []
        for number, request in enumerate(requests):
            text, sharing = request.args[0], self.llm.sharing
            beginnings = [formatter.prompt("") for formatter in self.llm.formatters]
            for window in (
                windows(self.llm.formatters, text, self._contexts)
                if sharing is None
                else chunk_windows(sharing, beginnings, text, self._contexts)
            ):
                owners.append(number)
                texts.append(window)
        sums = [0.0] * len(requests)
        found = self._scored([requests[number] for number in owners], texts, disable_tqdm)
        for number, each in zip(owners, found, strict=True):
            sums[number] += each.log_prob
        for request, answer in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return sums

    # -- texts to be written

    def _generation(self, request: Instance, seen: Counter[str]) -> Asked:
        context, kwargs = request.args
        params = sampling_params(kwargs, self.params)
        source = [context.messages, context.prefix] if isinstance(context, ChatPrompt) else context
        name = fingerprint("generate", source, {**asdict(params), "seed": None, "speculative": None})
        if params.temperature > 0 or params.deferral in ("sampled", "random") or self.policy is not None:
            seen[name] += 1  # what is asked several times is to be drawn several times
            name = fingerprint(name, seen[name])
        if not context:
            raise CollmError(f"{request.task_name}: the prompt of document {request.doc_id} is empty")
        ids = tuple(prompt_ids(formatter, context) for formatter in self.llm.formatters)
        cut = cut_to(ids, self._contexts, [params.max_tokens - 1] * len(ids))
        self._asked[_task(request)][name] = None
        params = replace(params, seed=example_seed(self.params.seed, name))
        return Asked(name, context, TokenPrompt(cut.ids), params, cut.tokens > 0)

    def _written(self, todo: Sequence[Asked]) -> Iterator[Trace]:
        prompts, params = [each.prompt for each in todo], [each.params for each in todo]
        begin = time.perf_counter()
        each_done = self.llm.generate_each(prompts, params, self.batch_size, policy=self.policy, alone=self.alone)
        for i, generation in each_done if todo else ():
            if generation.error is not None:  # what is finished is kept, and the next start goes on from there
                raise CollmError(generation.error)
            now, context = time.perf_counter(), todo[i].context
            yield Trace(
                id=todo[i].name,
                generation=generation,
                prompt=context.messages if isinstance(context, ChatPrompt) and not context.prefix else str(context),
                base_pieces=base_pieces(generation, lambda token: self.llm.decode([token])),
                seconds=now - begin,
            )
            begin = now

    # -- texts to be scored

    def _scored(self, requests: Sequence[Instance], texts: Sequence[GivenText], quiet: bool) -> list[Likelihood]:
        self._require_closing(requests)
        law = law_of(self.llm, self.params, self.policy, self.alone)
        names = [_name(text) for text in texts]
        for request, name in zip(requests, names, strict=True):
            self._asked[_task(request)][name] = None
        with self._records.keeping_likelihoods() as keep:
            todo = {
                name: text for name, text in zip(names, texts, strict=True) if name not in self._records.likelihoods
            }
            models, given = self.llm.models, list(todo.values())
            if self.llm.sharing is None:
                found = likelihoods(models, given, alone=law, batch_size=self.batch_size)
            else:
                found = chunk_likelihoods(models, self.llm.sharing, given, alone=law)
            with self._bar("scoring", len(set(names)), len(todo), quiet) as advance:
                for name, each in zip(todo, found, strict=True):
                    keep(name, each)
                    advance()
        return [self._records.likelihoods[name] for name in names]

    def _require_closing(self, requests: Iterable[Instance]) -> None:
        code = next((_task(request) for request in requests if CODE.search(_task(request))), None)
        if code is not None and self.llm.sharing is not None and self.alone is None:
            require_closing(self.llm.models, f"task {code!r}")

    # -- what is told of it

    @property
    def settings(self) -> dict[str, Any]:
        """What decides all answers."""
        return self._records.settings

    def figures(self) -> dict[str, dict[str, Any]]:
        """For each task, who wrote, what it cost and how many prompts were cut."""
        return {
            task: {"cut_prompts": self._cut[task], **self._records.figures(asked, self.llm.model_names)}
            for task, asked in self._asked.items()
        }

    def _tell_of_cuts(self, tasks: Iterable[str]) -> None:
        for task, count in Counter(tasks).items():
            self._cut[task] += count
            _log.warning("%s: %d prompts are longer than a model's context and were cut from the left", task, count)

    def _bar(self, doing: str, total: int, left: int, quiet: bool) -> AbstractContextManager[Callable[[], None]]:
        return counting(doing, total, total - left, hidden=quiet or not self.progress)


def _task(request: Instance) -> str:
    return str(request.task_name)


def _name(text: GivenText) -> str:
    """Of a likelihood. (A byte before it came later: names that do without stay as they were.)"""
    behind = () if text.last_byte == START else (text.last_byte,)
    return fingerprint("likelihood", text.prompts, text.completion, *behind)
