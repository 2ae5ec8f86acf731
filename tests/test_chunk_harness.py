"""Models with different tokenizers under lm-evaluation-harness: likelihoods by the law of chunks, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chunk_toys import byte_level
from lm_eval.api.instance import Instance
from test_chunked import system

from collm.errors import CollmError
from collm.evaluation.chunk_likelihood import chunk_likelihoods, chunk_windows
from collm.evaluation.harness.model import CollaborativeHarnessLM
from collm.evaluation.harness.prompts import pair_ids
from collm.evaluation.likelihood import GivenText
from collm.llm import CollaborativeLM
from collm.models.local import LocalModel
from collm.sampling_params import SamplingParams

PAIRS = [("How many apples?", " 12 + 30 = 42"), ("return", " sum(values)\n\n"), ("Anna ", "naïve café, привет")]
TEXT = "Paris is the capital of 12 + 30 = 42\n\nreturn x, " * 3 + "the end"


def asked(kind: str, *arguments: Any, task: str = "task") -> Instance:
    return Instance(kind, {}, arguments, 0, metadata=(task, 0, 1))


def harness(llm: CollaborativeLM, params: SamplingParams | None = None, **options: Any) -> CollaborativeHarnessLM:
    return CollaborativeHarnessLM(llm, params or SamplingParams(threshold=0.5), progress=False, **options)


@pytest.fixture(scope="module")
def pair() -> CollaborativeLM:
    return system()


@pytest.mark.parametrize(
    ("alone", "never", "law"), [(None, False, None), ("base", False, 0), ("one", False, 1), (None, True, 0)]
)
def test_likelihoods_are_by_the_law_of_chunks(
    pair: CollaborativeLM, alone: str | None, never: bool, law: int | None
) -> None:
    assert pair.sharing is not None
    lm = harness(pair, SamplingParams(deferral="never") if never else None, alone=alone)
    found = lm.loglikelihood([asked("loglikelihood", *each) for each in PAIRS])
    given = [GivenText(*pair_ids(pair.formatters, *each)) for each in PAIRS]
    expected = list(chunk_likelihoods(pair.models, pair.sharing, given, alone=law))
    assert [score for score, _ in found] == pytest.approx([each.log_prob for each in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [each.greedy for each in expected]
    figures = lm.figures()["task"]
    assert figures["cut_prompts"] == 0


def test_the_mixture_is_no_model_s_own_law(pair: CollaborativeLM) -> None:
    requests = [asked("loglikelihood", *each) for each in PAIRS]
    each = {who: harness(pair, alone=who).loglikelihood(requests) for who in (None, "base", "one")}
    for both, base, one in zip(*(each[who] for who in (None, "base", "one")), strict=True):
        assert len({round(score, 3) for score, _ in (both, base, one)}) == 3


def test_what_a_model_writes_is_greedy_to_it() -> None:
    llm = system(own=[byte_level("gpt2", 259), byte_level("llama3", 460, seed=1)], ascii=True)
    text = llm.generate("12 + 30 =", SamplingParams(max_tokens=12), alone="base").text
    other = text[:-1] + chr(ord(text[-1]) ^ 1)
    requests = [asked("loglikelihood", "12 + 30 =", continuation) for continuation in (text, other)]
    (best, greedy), (worse, not_greedy) = harness(llm, alone="base").loglikelihood(requests)
    assert greedy and not not_greedy and best > worse


def test_long_texts_are_scored_in_windows_that_all_models_can_hold(pair: CollaborativeLM, tmp_path: Path) -> None:
    assert pair.sharing is not None
    bounded = CollaborativeLM(pair.models, pair.formatters, pair.info, max_model_len=40, sharing=pair.sharing)
    request = [asked("loglikelihood_rolling", TEXT), asked("loglikelihood_rolling", "Rome 1")]
    beginnings = [formatter.prompt("") for formatter in pair.formatters]
    for llm, several in ((pair, False), (bounded, True)):
        lm = harness(llm, out=tmp_path / f"kept-{several}")
        windows = list(chunk_windows(pair.sharing, beginnings, TEXT, llm.context_lengths))
        assert (len(windows) > 1) == several
        expected = sum(each.log_prob for each in chunk_likelihoods(pair.models, pair.sharing, windows))
        first, second = lm.loglikelihood_rolling(request)
        assert first == pytest.approx(expected, abs=1e-2) and second > first
        # Kept: another run asks no model again.
        again = harness(llm, out=tmp_path / f"kept-{several}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LocalModel, "predict", lambda *_: pytest.fail("asked again"))
            assert again.loglikelihood_rolling(request) == [first, second]


def test_code_needs_closing_factors() -> None:
    """Of a model that does not tell them, prose is scored, code is not, unless that is asked for."""
    llm = system()

    class Silent(LocalModel):
        closing_told = False
        closing_approximated = False

    llm.models[1].__class__ = Silent
    lm = harness(llm)
    settings = {"max_gen_toks": 4, "until": []}
    for task in ("mbpp", "humaneval_instruct", "code2text"):
        refused = pytest.raises(CollmError, match=f"'{task}' is code, and one: a server does not tell")
        with refused:
            lm.loglikelihood([asked("loglikelihood", *PAIRS[1], task=task)])
        with refused:
            lm.loglikelihood_rolling([asked("loglikelihood_rolling", TEXT, task=task)])
        with refused:
            lm.generate_until([asked("generate_until", "def f", settings, task=task)])
    assert lm.loglikelihood([asked("loglikelihood", *PAIRS[0], task="gsm8k")])[0][0] < 0
    assert harness(llm, alone="base").loglikelihood([asked("loglikelihood", *PAIRS[1], task="mbpp")])[0][0] < 0
    Silent.closing_approximated = True
    assert lm.loglikelihood([asked("loglikelihood", *PAIRS[1], task="mbpp")])[0][0] < 0


def test_texts_that_a_tokenizer_does_not_keep_are_refused(pair: CollaborativeLM) -> None:
    with pytest.raises(CollmError, match="special tokens in it means nothing to the other models"):
        harness(pair).loglikelihood([asked("loglikelihood", "a", " b <|im_start|> c")])
    with pytest.raises(CollmError, match="does not give .* back byte for byte"):
        harness(pair).loglikelihood_rolling([asked("loglikelihood_rolling", "a <|im_start|> b")])
