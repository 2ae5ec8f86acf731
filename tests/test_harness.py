"""Pairs under the lm-evaluation-harness, with local tasks: its own evaluation, the command, resuming."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import runpy
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import yaml
from click.testing import CliRunner, Result
from conftest import make_model, make_tokenizer
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from test_llm import gate
from transformers import AutoModelForCausalLM, AutoTokenizer

from collm.cli import main
from collm.data.formatting import Formatter, PromptFormat
from collm.errors import CollmError
from collm.evaluation.harness import CollaborativeHarnessLM, run_tasks
from collm.evaluation.harness.prompts import ChatPrompt, pair_ids, prompt_ids, sampling_params
from collm.evaluation.harness.records import Records
from collm.evaluation.harness.results import eval_results
from collm.evaluation.likelihood import GivenText, likelihoods
from collm.evaluation.result import EvalResult
from collm.llm import CollaborativeLM, TokenPrompt
from collm.models.checkpoint import save_checkpoint
from collm.models.fake import FakeModel
from collm.models.info import AssistantInfo, CheckpointInfo
from collm.report.trace import read_traces
from collm.sampling_params import SamplingParams
from collm.types import Message

DOCS = Path(__file__).parent.parent / "docs" / "evaluation.md"
GREEDY = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False}
ROWS = [
    {"question": f"What is {a} + {b}?", "answer": str(a + b), "other": str(a - b), "text": f"{a} + {b} = {a + b}. " * n}
    for a, b, n in [(12, 30, 3), (56, 9, 40), (7, 8, 1), (2, 2, 5)]
]
TASKS: dict[str, dict[str, Any]] = {
    "sums": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}\n",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": GREEDY,
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "picks": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["{{answer}}", "{{other}}"],
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "prose": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder to work in: `pair`, a checkpoint whose expert has a system prompt of its own; `tasks` and their data."""
    root, tokenizer = tmp_path_factory.mktemp("harness"), make_tokenizer()
    make_model("qwen3", seed=1).save_pretrained(root / "expert")
    tokenizer.save_pretrained(root / "expert")
    expert = AssistantInfo(name="expert", spec=str(root / "expert"), format={"system_prompt": "Be brief."})
    info = CheckpointInfo(assistants=[expert, AssistantInfo(name="calculator", spec="calculator")])
    save_checkpoint(root / "pair", info, make_model(seed=2), gate(2), tokenizer)
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (root / "tasks").mkdir()
    for name, task in TASKS.items():
        data = {"data_files": {"test": str(root / "rows.jsonl")}, "cache_dir": str(root / "cache")}
        common = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
        (root / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump({**common, **task}))
    here = Path.cwd()
    os.chdir(root)
    yield root
    os.chdir(here)


@pytest.fixture(autouse=True)
def no_survey(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness's list of all that is installed takes seconds."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)


@pytest.fixture(scope="module")
def llm(world: Path) -> CollaborativeLM:
    return CollaborativeLM.from_pretrained(world / "pair")


def asked(kind: str, *arguments: Any) -> Instance:
    return Instance(kind, {}, arguments, 0, metadata=("task", 0, 1))


def harness(llm: CollaborativeLM, params: SamplingParams | None = None, **options: Any) -> CollaborativeHarnessLM:
    return CollaborativeHarnessLM(llm, params or SamplingParams(threshold=0.5), progress=False, **options)


def collm(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


# -- what is asked


def test_settings_of_tasks() -> None:
    base = SamplingParams(deferral="sampled", max_tokens=100)
    assert sampling_params({}, base) == base
    found = sampling_params({"until": "\n", "max_new_tokens": 5, "do_sample": True, "top_p": 0.9, "num_beams": 1}, base)
    assert found == SamplingParams(deferral="sampled", max_tokens=5, temperature=1.0, top_p=0.9, stop=("\n",))
    assert sampling_params({"do_sample": False, "temperature": 0.7}, base).temperature == 0
    assert sampling_params({"temperature": 0.7}, base).temperature == 0.7
    assert sampling_params({"max_gen_toks": 3, "max_tokens": 9, "until": None}, base).max_tokens == 3
    for kwargs, words in (
        ({"max_length": 9}, "max_length=9"),
        ({"temprature": 1}, "did you mean 'temperature'"),
        ({"num_beams": 4}, "num_beams=4"),
        ({"until": [""]}, "stop string must not be empty"),
    ):
        with pytest.raises(CollmError, match=re.escape(words)):
            sampling_params(kwargs, base)


CHAT: list[Message] = [
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "What is 2 + 2?"},
]


def test_a_conversation_reaches_each_model_in_its_own_template(llm: CollaborativeLM) -> None:
    prompt = harness(llm).apply_chat_template(CHAT)
    assert prompt.startswith("<|im_start|>user\nWhat is 1 + 1?") and prompt.endswith("assistant\n")
    again = pickle.loads(pickle.dumps(copy.deepcopy(prompt)))
    assert again == prompt and again.messages == tuple(CHAT)
    assert [prompt_ids(f, again) for f in llm.formatters] == [f.prompt(CHAT) for f in llm.formatters]
    assert len({len(prompt_ids(formatter, again)) for formatter in llm.formatters[:2]}) == 2
    begun = harness(llm).apply_chat_template([*CHAT, {"role": "assistant", "content": "It is"}], False)
    assert begun == prompt + "It is"
    [text] = harness(llm).generate_until([asked("generate_until", begun, GREEDY)])
    ids = tuple(f.prompt(CHAT) + f.continuation(CHAT, "It is") for f in llm.formatters)
    assert text == llm.generate(TokenPrompt(ids), SamplingParams(max_tokens=8, stop=("\n\n",), threshold=0.5)).text
    assert harness(llm).chat_template(True) and harness(llm).chat_template(False) is None
    with pytest.raises(CollmError, match="not chosen by name"):
        harness(llm).chat_template("rag")


def test_a_pair_of_context_and_continuation() -> None:
    plain = Formatter(make_tokenizer(), PromptFormat(add_bos=True))
    bos = plain.prompt("")
    prompts, shared = pair_ids([plain], "How many ", "apples")
    assert prompts[0] + shared == plain.prompt("How many apples")
    assert prompts[0] == plain.prompt("How many")  # white space counts to the continuation, as in the harness
    assert pair_ids([plain], "", "apples")[0] == (bos,)
    formatters = [plain, Formatter(plain.tokenizer, PromptFormat(system_prompt="Be kind."))]
    chat = ChatPrompt.of(plain, [*CHAT, {"role": "assistant", "content": "It is"}], False)
    prompts, shared = pair_ids(formatters, chat, " 4")
    assert [p + shared for p in prompts] == [f.prompt(CHAT) + f.continuation(CHAT, "It is 4") for f in formatters]
    with pytest.raises(CollmError, match="no tokens"):
        pair_ids([plain], "How many", "")


def test_long_prompts_are_cut_from_the_left_and_counted(llm: CollaborativeLM, caplog: pytest.LogCaptureFixture) -> None:
    lm = harness(llm)
    [text] = lm.generate_until([asked("generate_until", "apples " * 300, GREEDY)])
    ids = llm.formatters[0].prompt("apples " * 300)[-(256 - 7) :]
    assert text == llm.generate(TokenPrompt((ids,) * 3), SamplingParams(max_tokens=8, threshold=0.5)).text
    [(log_prob, _)] = lm.loglikelihood([asked("loglikelihood", "apples " * 300 + "and", " 30")])
    ids = llm.formatters[0].prompt("apples " * 300 + "and")
    shared = llm.formatters[0].continuation("x", " 30")
    [found] = likelihoods(llm.models, [GivenText((ids[-(257 - len(shared)) :],) * 3, shared)])
    assert log_prob == pytest.approx(found.log_prob, abs=1e-4)
    assert lm.figures()["task"]["cut_prompts"] == 2 and "cut from the left" in caplog.text
    with pytest.raises(CollmError, match="lower max_gen_toks"):
        lm.generate_until([asked("generate_until", "apples", {**GREEDY, "max_gen_toks": 300})])
    with pytest.raises(CollmError, match="document 0 is empty"):
        lm.generate_until([asked("generate_until", "", GREEDY)])


def test_rolling_windows_predict_each_token_once(llm: CollaborativeLM) -> None:
    formatter = llm.formatters[0]
    short, long = ROWS[0]["text"], ROWS[1]["text"]
    found = harness(llm).loglikelihood_rolling([asked("loglikelihood_rolling", text) for text in (short, long)])
    ids = formatter.continuation("", short)
    [whole] = likelihoods(llm.models, [GivenText((formatter.prompt(""),) * 3, ids)])
    assert found[0] == pytest.approx(whole.log_prob, abs=1e-3)
    ids = formatter.continuation("", long)
    assert len(ids) > 256
    first = GivenText((formatter.prompt(""),) * 3, ids[:256])
    rest = [
        GivenText((ids[end - 257 : start],) * 3, ids[start:end])
        for start in range(256, len(ids), 256)
        for end in [min(start + 256, len(ids))]
    ]
    expected = sum(each.log_prob for each in likelihoods(llm.models, [first, *rest]))
    assert found[1] == pytest.approx(expected, abs=1e-2)


def test_what_is_drawn_several_times_differs_and_what_is_greedy_is_written_once(llm: CollaborativeLM) -> None:
    drawn = {**GREEDY, "do_sample": True, "temperature": 1.5}
    requests = [asked("generate_until", "12 + 30 =", drawn)] * 4
    texts = harness(llm).generate_until(requests)
    assert len(set(texts)) > 1
    assert texts == harness(llm, batch_size=1).generate_until(requests)
    assert texts != harness(llm, SamplingParams(threshold=0.5, seed=1)).generate_until(requests)
    lm = harness(llm)
    assert len(set(lm.generate_until([asked("generate_until", "12 + 30 =", GREEDY)] * 3))) == 1
    assert lm.figures()["task"]["texts"] == 1


class Short(FakeModel):
    """It reads no more than 40 tokens."""

    context_length = 40


def test_a_baseline_is_bounded_by_its_own_context() -> None:
    """As `generate(alone=...)` is: written, scored, and in windows."""
    models = [Short("base", 320, num_assistants=1, concentration=0.05), FakeModel("helper", 320, concentration=0.05)]
    llm = CollaborativeLM(models, [Formatter(make_tokenizer())] * 2)
    lm, params = harness(llm, SamplingParams(max_tokens=45), alone="helper"), SamplingParams(max_tokens=45)
    [text] = lm.generate_until([asked("generate_until", "a" * 50, {})])
    assert (
        text == llm.generate(TokenPrompt((prompt_ids(llm.formatters[0], "a" * 50),) * 2), params, alone="helper").text
    )
    assert lm.loglikelihood([asked("loglikelihood", "b" * 60, "c")]) and lm.loglikelihood_rolling(
        [asked("loglikelihood_rolling", "d" * 90)]
    ) == [pytest.approx(expected_of(llm, "d" * 90), abs=1e-4)]
    assert lm.figures()["task"]["cut_prompts"] == 0
    with pytest.raises(CollmError, match="leave no place for it in a context of 40 tokens"):
        harness(llm, SamplingParams(max_tokens=45), alone="base").generate_until([asked("generate_until", "a", {})])


def expected_of(llm: CollaborativeLM, text: str) -> float:
    """In one window, behind a beginning of the model's own."""
    tokens = tuple(llm.tokenizer.encode(text, add_special_tokens=False))
    [found] = likelihoods(llm.models, [GivenText(tuple(f.prompt("") for f in llm.formatters), tokens)], alone=1)
    return found.log_prob


def test_whose_likelihood(llm: CollaborativeLM, world: Path) -> None:
    request = [asked("loglikelihood", "What is 2 + 2?", " 4")]
    prompts, shared = pair_ids(llm.formatters, "What is 2 + 2?", " 4")
    text = [GivenText(prompts, shared)]

    def close(lm: CollaborativeHarnessLM, alone: int | None) -> bool:
        [expected] = likelihoods(llm.models, text, alone=alone)
        return lm.loglikelihood(request)[0] == (pytest.approx(expected.log_prob, abs=1e-4), expected.greedy)

    assert close(harness(llm), None) and close(harness(llm, SamplingParams(threshold=0.01)), None)
    assert close(harness(llm, SamplingParams(deferral="never")), 0) and close(harness(llm, alone="expert"), 1)
    with pytest.raises(CollmError, match="deferral='always'"):
        harness(llm, SamplingParams(deferral="always")).loglikelihood(request)
    with pytest.raises(CollmError, match="no model 'exprt'"):
        harness(llm, alone="exprt")
    plain = CollaborativeLM.from_pretrained(world / "expert")
    assert harness(plain).loglikelihood(request)[0][0] < 0


def test_a_plain_model_answers_as_under_the_harness_s_own(world: Path) -> None:
    """White space, empty contexts, long texts and stop strings are taken as the harness takes them."""
    from lm_eval.models.huggingface import HFLM

    tokenizer = AutoTokenizer.from_pretrained(world / "expert")
    network = AutoModelForCausalLM.from_pretrained(world / "expert")
    theirs = HFLM(pretrained=network, tokenizer=tokenizer, batch_size=2, device="cpu")
    ours = harness(CollaborativeLM.from_pretrained(world / "expert"), SamplingParams())
    pairs = [
        ("What is 2 + 2?", " 4"),
        ("How many ", "apples"),
        ("", "Rome"),
        ("Paris\n", "\nis"),
        ("apples " * 300, "12"),
    ]
    scored = [asked("loglikelihood", *pair) for pair in pairs]
    expected = theirs.loglikelihood(scored, disable_tqdm=True)
    found = ours.loglikelihood(scored)
    assert [p for p, _ in found] == pytest.approx([p for p, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    texts = [asked("loglikelihood_rolling", row["text"]) for row in ROWS]
    expected = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(expected, abs=1e-2)
    # Stopped by a string from the middle of what would be written.
    longer = {"max_gen_toks": 12, "do_sample": False}
    [whole] = theirs.generate_until([asked("generate_until", "12 + 30", longer)], disable_tqdm=True)
    for stop in ([], [whole[len(whole) // 2]]):
        request = asked("generate_until", "12 + 30", {**longer, "until": stop})
        expected = theirs.generate_until([request, request], disable_tqdm=True)
        assert ours.generate_until([request, request]) == expected


# -- resuming


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_and_asks_nothing_twice(
    llm: CollaborativeLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [asked("generate_until", str(row["question"]), GREEDY) for row in ROWS]
    scored = [asked("loglikelihood", str(row["question"]), " " + str(row["answer"])) for row in ROWS]
    whole = harness(llm)
    expected, log_probs = whole.generate_until(requests), whole.loglikelihood(scored)
    written: list[int] = []
    generate_each = CollaborativeLM.generate_each

    def killed(self: CollaborativeLM, prompts: Sequence[Any], *arguments: Any, **options: Any) -> Iterator[Any]:
        for i, generation in generate_each(self, prompts, *arguments, **options):
            yield i, generation
            written.append(len(prompts))
            if len(written) == 2:
                raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(CollaborativeLM, "generate_each", killed)
        with pytest.raises(Killed):
            harness(llm, out=tmp_path, batch_size=1).generate_until(requests)
        with (tmp_path / "traces.jsonl").open("a") as file:
            file.write('{"id": "half a li')
        assert harness(llm, out=tmp_path, batch_size=1).generate_until(requests) == expected
    plain = SamplingParams(threshold=0.5, speculative=False)
    assert harness(llm, plain, out=tmp_path).generate_until(requests) == expected
    assert written == [4, 4, 2, 2]
    assert sorted(trace.generation.text for trace in read_traces(tmp_path / "traces.jsonl")) == sorted(expected)

    with monkeypatch.context() as patch:
        patch.setattr("collm.evaluation.harness.model.likelihoods", lambda models, texts, **_: _first(models, texts))
        with pytest.raises(Killed):
            harness(llm, out=tmp_path).loglikelihood(scored)
    before = len((tmp_path / "likelihoods.jsonl").read_text().splitlines())
    resumed = harness(llm, out=tmp_path).loglikelihood(scored)
    assert [p for p, _ in resumed] == pytest.approx([p for p, _ in log_probs], abs=1e-4)
    assert before == 2 and len((tmp_path / "likelihoods.jsonl").read_text().splitlines()) == 1 + len(ROWS)


def _first(models: Any, texts: Sequence[GivenText]) -> Iterator[Any]:
    yield next(iter(likelihoods(models, texts[:1])))
    raise Killed


def test_answers_of_another_run_are_refused(llm: CollaborativeLM, tmp_path: Path) -> None:
    request = [asked("generate_until", "12 + 30 =", GREEDY)]
    harness(llm, out=tmp_path).generate_until(request)
    with pytest.raises(CollmError, match=r"params.threshold: 0.5 there, 0.2 now.*another --out"):
        harness(llm, SamplingParams(threshold=0.2), out=tmp_path).generate_until(request)
    (tmp_path / "traces.jsonl").write_text('{"some": "thing"}\n')
    with pytest.raises(CollmError, match="not written by an e"):
        harness(llm, out=tmp_path).generate_until(request)
    assert Records(None, {}).folder is None


# -- the harness


def test_the_harness_knows_pairs_by_name(world: Path) -> None:
    assert get_model("collm") is CollaborativeHarnessLM
    found = lm_eval.simple_evaluate(
        model="collm",
        model_args=f"pretrained={world / 'pair'},assistants=expert={world / 'expert'};calculator,threshold=0.4,seed=3",
        batch_size=2,
        tasks=["sums", "picks"],
        task_manager=TaskManager(include_path=str(world / "tasks"), include_defaults=False),
        apply_chat_template=True,
    )
    settings = found["config"]["collm"]
    assert settings["models"] == ["base", "expert", "calculator"] and settings["params.threshold"] == 0.4
    assert settings["params.seed"] == 3 and settings["identity"]["models"]["expert"]["weights"]
    assert set(found["results"]) == {"sums", "picks"}
    for arguments, words in (
        ({"pretraned": "x"}, "did you mean 'pretrained'"),
        ({}, "pretrained=PATH"),
        ({"pretrained": "x", "batch_size": "auto"}, "not auto"),
        ({"pretrained": "x", "threshold": 2}, "threshold must lie in"),
        ({"pretrained": "x", "batch_size": 0}, "at least 1"),
    ):
        with pytest.raises(CollmError, match=re.escape(words)):
            CollaborativeHarnessLM.create_from_arg_obj(arguments)


def test_its_command_line_starts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["lm_eval", "run", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("collm.evaluation.harness", run_name="__main__")
    assert stop.value.code == 0 and "--model_args" in capsys.readouterr().out


def test_the_command(world: Path) -> None:
    arguments = ["eval", "pair", "--tasks", "sums,picks,pros*", "--include-path", "tasks", "--threshold", "0.5"]
    done = collm(*arguments, "--out", "runs/a", "--batch-size", "3")
    assert done.exit_code == 0, done.output
    assert "exact_match" in done.stdout and "credited to: base" in done.stdout
    results = json.loads((world / "runs/a/results.json").read_text())
    assert set(results["results"]) == {"sums", "picks", "prose"}
    told = results["collm"]["tasks"]
    assert told["sums"]["texts"] == 4 and told["picks"]["scored_texts"] == 8
    assert told["sums"]["tokens"] == sum(told["sums"]["written_by"].values())
    assert sum(told["picks"]["credit"].values()) == pytest.approx(1.0)
    assert results["collm"]["versions"]["lm-eval"] and "commit" in results["collm"]
    samples = (world / "runs/a/samples_sums.jsonl").read_text().splitlines()
    assert [json.loads(line)["doc"]["answer"] for line in samples] == [row["answer"] for row in ROWS]
    picks, sums = EvalResult.load(world / "runs/a/picks.json"), EvalResult.load(world / "runs/a/sums.json")
    assert picks.value == results["results"]["picks"]["acc,none"] and picks.tokens == 0
    assert sums.written_by == told["sums"]["written_by"] and sums.scores == (0.0,) * 4
    assert not (world / "runs/a/prose.json").exists()  # a perplexity is no mean over documents
    # Given answers were scored and none was written: there is no share of written tokens, and no point at a rate of 0.
    compared = collm("compare", "runs/a/picks.json", "runs/a/picks.json")
    assert compared.exit_code == 0 and picks.rate is None and " 0.0%" not in compared.stdout
    assert collm("report", "runs/a/picks.json", "--out", "runs/a/picks.html").exit_code == 0
    page = (world / "runs/a/picks.html").read_text()
    assert 'class="curve"' not in page and "No system wrote a text" in page and "None" not in page
    # Run again, nothing is asked; another batch size changes nothing.
    kept = (world / "runs/a/traces.jsonl").read_text()
    again = json.loads(collm(*arguments, "--out", "runs/a", "--json").stdout)
    assert (world / "runs/a/traces.jsonl").read_text() == kept
    alone = json.loads(collm(*arguments, "--batch-size", "1", "--json").stdout)
    for name in ("sums", "picks", "prose"):
        for metric, value in results["results"][name].items():
            if isinstance(value, float):
                assert again["results"][name][metric] == value
                assert alone["results"][name][metric] == pytest.approx(value, rel=1e-4)


def test_only_shares_are_told_as_percentages() -> None:
    """TruthfulQA's first metric is BLEU, up to 100: it stood in tables as 2040.0 %."""
    rows = [
        {"filter": "none", "metrics": ["bleu_max", "bleu_acc", "bleu_diff"], "bleu_max": most, "bleu_acc": right,
         "bleu_diff": apart, "doc_id": number, "doc_hash": str(number), "filtered_resps": ["a"]}
        for number, (most, right, apart) in enumerate([(20.5, 1, 4.0), (20.3, 0, -2.0)])
    ]  # fmt: skip
    means = {"bleu_max,none": 20.4, "bleu_acc,none": 0.5, "bleu_diff,none": 1.0}
    found = {"results": {"truthfulqa_gen": means}, "versions": {}, "collm": {"tasks": {}}}
    [(_, result)] = eval_results("pair", found, {"truthfulqa_gen": rows}, {"models": ["base"]}, 0)
    assert (result.metric, result.value, result.metrics) == ("bleu_acc", 0.5, {})


KNOWN: dict[str, dict[str, Any]] = {
    "gsm8k/gsm8k": {"question": "Anna has 2 apples and buys 3.", "answer": "2 + 3 = 5\n#### 5"},
    "hendrycks_math/hendrycks_math_algebra": {"problem": "What is $1+1$?", "solution": "It is $\\boxed{2}$."},
    "pubmedqa/pubmedqa": {"QUESTION": "Does it?", "CONTEXTS": ["We tried.", "It did."], "final_decision": "yes"},
}


def test_known_tasks_on_local_records_of_their_shape(world: Path, tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    for path, row in KNOWN.items():
        name = Path(path).name
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 8)
        files = dict.fromkeys(("train", "validation", "test"), str(tmp_path / f"{name}.jsonl"))
        task = {
            "include": str(Path(lm_eval.__file__).parent / "tasks" / f"{path}.yaml"),
            "task": f"local_{name}",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files, "cache_dir": str(world / "cache")},
        }
        (tmp_path / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(task))
    llm = CollaborativeLM.from_pretrained(world / "pair")
    results = run_tasks(
        harness(llm, SamplingParams(threshold=0.5, max_tokens=8)),
        ["local_*"],
        out=tmp_path / "out",
        include_path=[tmp_path / "tasks"],
        limit=2,
        apply_chat_template=True,
        generation={"max_gen_toks": 8},
    )
    assert {name: found["sample_len"] for name, found in results["results"].items()} == {
        "local_gsm8k": 2,
        "local_hendrycks_math_algebra": 2,
        "local_pubmedqa": 2,
    }
    assert results["n-shot"]["local_gsm8k"] == 5
    written = {path.name for path in (tmp_path / "out").glob("local_*.json")}
    assert {"local_gsm8k.strict-match.json", "local_gsm8k.flexible-extract.json", "local_pubmedqa.json"} < written
    strict = EvalResult.load(tmp_path / "out" / "local_gsm8k.strict-match.json")
    assert strict.num_examples == 2 and strict.no_answer == 2 and strict.metric == "exact_match"


def test_settings_given_by_hand_replace_those_of_tasks(world: Path) -> None:
    common = ["eval", "pair", "--tasks", "sums", "--include-path", "tasks", "--limit", "2"]
    done = collm(
        *common, "--max-tokens", "3", "--stop", "#", "--temperature", "1", "--out", "runs/b", "--alone", "base"
    )
    assert done.exit_code == 0, done.output
    traces = read_traces(world / "runs/b/traces.jsonl")
    assert len(traces) == 2 and all(len(trace.generation.steps) <= 3 for trace in traces)
    config = json.loads((world / "runs/b/results.json").read_text())["configs"]["sums"]["generation_kwargs"]
    assert config == {**GREEDY, "max_gen_toks": 3, "until": ["#"], "temperature": 1.0, "do_sample": True}
    system = ["--apply-chat-template", "--system", "Be kind.", "--num-fewshot", "0", "--out", "runs/c"]
    assert collm(*common, *system).exit_code == 0
    [first, _] = read_traces(world / "runs/c/traces.jsonl")
    assert first.prompt[0] == {"role": "system", "content": "Be kind."}


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (["--tasks", "sums", "--task", "gsm8k"], "leave out --task", 2),
        (["--tasks", "sums", "--data", "x.jsonl"], "leave out --data", 2),
        (["--tasks", "sums", "--split", "test"], "leave out --split", 2),
        (["--task", "gsm8k", "--data", "x", "--num-fewshot", "2"], "--num-fewshot says something", 2),
        (["--task", "gsm8k", "--data", "x", "--apply-chat-template"], "add --tasks", 2),
        (["--task", "gsm8k"], "--data is missing", 2),
        ([], "--task is missing", 2),
        (["--tasks", "sums", "--include-path", "nowhere"], "nowhere", 2),
        (["--tasks", "sums", "--include-path", "tasks", "--system", "x"], "--apply-chat-template", 1),
        (["--tasks", ","], "no task is named", 1),
        (["--tasks", "gone", "--include-path", "tasks"], "cannot be had", 1),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else None,
)
def test_what_is_refused(arguments: list[str], words: str, code: int, world: Path) -> None:
    gone = {**TASKS["sums"], "task": "gone", "test_split": "test", "dataset_path": "nobody/nothing"}
    (world / "tasks" / "gone.yaml").write_text(yaml.safe_dump(gone))
    done = collm("eval", "pair", *arguments)
    (world / "tasks" / "gone.yaml").unlink()
    assert done.exit_code == code, done.output
    assert words in done.stderr


def test_an_unknown_task_names_the_nearest(llm: CollaborativeLM, monkeypatch: pytest.MonkeyPatch, world: Path) -> None:
    own = TaskManager(include_path="tasks", include_defaults=False)
    monkeypatch.setattr("collm.evaluation.harness.run.TaskManager", lambda **_: own)
    with pytest.raises(CollmError, match="did you mean 'sums'"):
        run_tasks(harness(llm), ["summs"], include_path=["tasks"])


def test_the_example_of_the_docs_runs(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files as they stand there, its command with a tiny pair."""
    section = DOCS.read_text().partition("## Tasks of your own for the harness")[2]
    task, rows = re.search(r"```yml\n(.*?)```", section, re.DOTALL), re.search(r"```json\n(.*?)```", section, re.DOTALL)
    command = re.search(r"^collm (eval PAIR .*)$", section, re.MULTILINE)
    assert task and rows and command
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "capitals.yaml").write_text(task[1])
    (tmp_path / "capitals.jsonl").write_text(rows[1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    done = collm(*shlex.split(command[1].replace("PAIR", str(world / "pair"))))
    assert done.exit_code == 0, done.output
    [results] = tmp_path.rglob("results.json")
    assert "capitals" in json.loads(results.read_text())["results"]
