"""Clients that know nothing of several models: LiteLLM, LangChain, lm_eval. They get what is written without HTTP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import client
from servers import Live

from collm.sampling_params import SamplingParams

USER = [{"role": "user", "content": "How many apples?"}]


def written(server: Live, prompt: Any = None, **settings: Any) -> str:
    params = SamplingParams(**{"max_tokens": 24, "seed": 7, "temperature": 1, **settings})
    return server.llm.generate(prompt or USER, params).text


def test_litellm(server: Live) -> None:
    found = json.loads(client("with_litellm.py", f"{server.url}/v1").splitlines()[-1])
    assert found["whole"] == found["streamed"] == written(server)
    assert found["several"] == [written(server), written(server, sample=1)]
    assert found["text"] == written(server, "Paris is the")
    assert found["asynchronous"] == [written(server, seed=seed) for seed in range(4)]
    assert found["usage"] == 24 and found["streamed_usage"][-1] == 24 and found["finish_reason"] == "length"
    assert found["logprobs"] > 0 and "there is no model 'nobody'" in found["refused"]


def test_langchain(server: Live) -> None:
    found = json.loads(client("with_langchain.py", f"{server.url}/v1").splitlines()[-1])
    greedy = written(server, temperature=0)
    assert found["whole"] == found["streamed"] == greedy and found["asynchronous"] == [greedy] * 4
    assert found["sampled"] == written(server, temperature=0.8)
    assert found["who"] == written(server, temperature=0, threshold=0.3)
    turns = [{"role": "system", "content": "Be brief."}, *USER, {"role": "assistant", "content": "Two."}]
    assert found["turns"] == written(server, [*turns, {"role": "user", "content": "And pears?"}], temperature=0)
    assert found["usage"] == found["streamed_usage"] == 24 and found["finish_reason"] == "length"
    assert "tools is not supported" in found["refused"]


ROWS = [{"question": f"What is {a} + {b}?", "answer": str(a + b), "other": str(a - b)} for a, b in [(12, 30), (7, 8)]]
TASKS: dict[str, dict[str, Any]] = {
    "sums": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}\n",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "picks": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["{{answer}}", "{{other}}"],
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
}


def test_lm_eval_over_http_finds_the_figures_of_the_harness_in_process(
    server: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`lm_eval --model local-completions` and our model: scores, and every answer and likelihood behind them."""
    import lm_eval.models  # noqa: F401 (it registers its own models late, and only if there are none)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from collm.evaluation.harness import CollaborativeHarnessLM

    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)  # a list of all that is installed
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")}
    for name, task in TASKS.items():
        common = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
        (tmp_path / f"{name}.yaml").write_text(json.dumps({**common, **task}))  # JSON is YAML
    server.llm.tokenizer.save_pretrained(tmp_path / "tokenizer")
    served = f"model=pair,base_url={server.url}/v1/completions,tokenizer={tmp_path / 'tokenizer'},max_length=512"
    own = CollaborativeHarnessLM(server.llm, SamplingParams(), progress=False)
    found = [
        simple_evaluate(
            model=model,
            model_args=arguments,
            tasks=list(TASKS),
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            log_samples=True,
        )
        for model, arguments in (("local-completions", served), (own, None))
    ]
    scores = [each["results"] for each in found]
    for task in TASKS:
        [there, here] = [{k: v for k, v in each[task].items() if "stderr" not in k} for each in scores]
        assert there == here
        there, here = ([row["resps"] for row in each["samples"][task]] for each in found)
        if task == "sums":
            assert there == here
        else:
            assert numbers(there) == pytest.approx(numbers(here), abs=1e-4)


def numbers(rows: list[Any]) -> list[float]:
    return [float(log_prob) for row in rows for [(log_prob, _)] in row]
