"""An assistant with another tokenizer behind a server: chunks whose closing factors nobody tells."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chunk_toys import byte_level
from click.testing import CliRunner
from served import Served, Trouble, listening
from test_chunked import PROMPT, PROMPTS, data, local
from transformers import PreTrainedTokenizerFast

from collm.cli import main
from collm.cuts import Cuts
from collm.data.chunks import Reader
from collm.data.examples import load_examples
from collm.data.formatting import Formatter
from collm.data.scores import load_info, load_scores
from collm.data.scoring import openings_of
from collm.data.served import APPROXIMATE, is_code
from collm.errors import CollmError
from collm.evaluation.evaluate import evaluate
from collm.llm import CollaborativeLM
from collm.llm.sharing import share
from collm.models.codec import ByteCodec
from collm.models.info import CheckpointInfo
from collm.models.local import LocalModel
from collm.models.openings import places
from collm.models.pairing import cuts_between
from collm.remote.connecting import connect
from collm.sampling_params import SamplingParams
from collm.values import LanguageModel


@dataclass
class Place:
    """A base and an assistant with another tokenizer, in folders; the assistant behind a server, too."""

    base: LocalModel
    assistant: LocalModel
    tokenizers: tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]
    folders: tuple[Path, Path]
    server: Served

    @property
    def url(self) -> str:
        return f"vllm+{self.server.url}?tokenizer={self.folders[1]}"

    def system(self, *others: LanguageModel) -> CollaborativeLM:
        models: list[LanguageModel] = [self.base, *others]
        formatters = [Formatter(t) for t in self.tokenizers]
        cuts = cuts_between(self.tokenizers, ["base", "one"])
        assert cuts is not None
        info = CheckpointInfo(cuts=cuts.fingerprint)
        return CollaborativeLM(models, formatters, info, sharing=share(models, formatters, info, True))

    def remote(self, **more: Any) -> CollaborativeLM:
        with pytest.warns(UserWarning, match="one: a server does not tell how probable it is that a chunk closes"):
            return self.system(connect(self.url + more.get("setting", ""), self.tokenizers[1], name="one"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("chunks")
    tokenizers = byte_level("gpt2", 400), byte_level("llama3", 460, seed=1)
    models = [local(tokenizers[0], "base", 0, 1), local(tokenizers[1], "one", 1)]
    # Rows that only fill the model up would be written by its server.
    models[1].model.resize_token_embeddings(len(tokenizers[1]))
    folders = root / "base", root / "one"
    for model, tokenizer, folder in zip(models, tokenizers, folders, strict=True):
        model.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    rows = [
        {"id": f"{n}", "prompt": f"{n} + {n} =", "completion": f" {2 * n} apples, says Paris.\n#### {2 * n}"}
        for n in range(20)
    ]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = [{**row, "completion": "def mean(values):\n    return sum(values)\n"} for row in rows]
    (root / "code.jsonl").write_text("".join(json.dumps(row) + "\n" for row in code))
    server = Served(models[1].model, tokenizers[1], name="one")
    with listening(server):
        yield Place(models[0], models[1], tokenizers, folders, server)


@pytest.mark.parametrize(
    "who",
    [
        {"deferral": "threshold"},
        {"deferral": "random", "threshold": 0.5},
        {"deferral": "always"},
        {"deferral": "nudging", "threshold": 0.05},
    ],
)
def test_greedy_texts_are_those_of_the_same_model_here(place: Place, who: dict[str, Any]) -> None:
    """What opens a chunk is found among the most probable tokens that a server tells; what closing factors would change
    are log-probabilities alone, and what nudging takes for doubt."""
    here, there = place.system(place.assistant), place.remote()
    params = SamplingParams(max_tokens=24, **who)
    written = 0
    for prompt in PROMPTS:
        one, other = here.generate(prompt, params), there.generate(prompt, params)
        assert there.sharing is not None
        assert [step.data for step in other.steps] == there.sharing.cuts.chunks(data(other))
        assert other.text == "".join(chunk.text for chunk in there.stream(prompt, params))
        if who["deferral"] != "nudging":
            assert [(s.data, s.author) for s in one.steps] == [(s.data, s.author) for s in other.steps]
            # A model here, whom nobody reads along, looks behind its chunk in its next pass; a server is asked at once.
            told = list(here.stream(prompt, params))[-1].generation
            assert told is not None and told.forward_passes == other.forward_passes
            assert one.forward_passes[0] >= other.forward_passes[0], "what is taken back is written again"
            assert one.forward_passes[1] <= other.forward_passes[1]
        written += sum(step.author == 1 for step in other.steps)
    assert written > 5


def test_drawn_chunks_open_and_differ_by_their_seed(place: Place) -> None:
    there = place.remote()
    assert there.sharing is not None
    texts = set()
    for seed in range(4):
        params = SamplingParams(max_tokens=20, temperature=1.0, seed=seed, deferral="always")
        found = there.generate(PROMPT, params)
        assert [step.data for step in found.steps] == there.sharing.cuts.chunks(data(found))
        texts.add(found.text)
    assert len(texts) == 4


def test_a_server_that_fails_and_a_base_behind_one(place: Place) -> None:
    there = place.remote()
    params = SamplingParams(max_tokens=12, deferral="always")
    place.server.always = Trouble(status=400)
    try:
        [failed] = there.generate_batch([PROMPT], params)
        assert failed.finish_reason == "error" and "status 400" in str(failed.error)
        whole = there.generate(PROMPT, replace(params, on_assistant_error="base"))
        assert whole.completion_tokens == 12 and all(step.author == 0 and step.fault for step in whole.steps)
    finally:
        place.server.always = None
    base = connect(f"vllm+{place.server.url}", place.tokenizers[1], name="base")
    formatters = [Formatter(t) for t in place.tokenizers[::-1]]
    with pytest.raises(CollmError, match="load the base here"):
        share([base, place.base], formatters, CheckpointInfo(), False)


def test_code_is_refused_unless_asked_for(place: Place) -> None:
    examples = load_examples(str(place.folders[0].parent / "code.jsonl"))
    examples = [replace(example, fields={"answer": ["assert mean([1]) == 1"]}) for example in examples[:2]]
    params = SamplingParams(max_tokens=4, deferral="random", threshold=0.5)
    with pytest.raises(CollmError, match="'mbpp' is code, and one: a server does not tell .* closing=approximate"):
        evaluate(place.remote(), "mbpp", examples, params, progress=False)
    asked = place.remote(setting="&closing=approximate")
    assert evaluate(asked, "mbpp", examples, params, progress=False).name
    assert evaluate(place.remote(), "mbpp", examples, params, alone="base", progress=False).name
    with pytest.raises(CollmError, match="closing is approximate or left out"):
        connect(place.url + "&closing=exact", place.tokenizers[1])


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, list(map(str, arguments)))
    return result.exit_code, result.output + (result.stderr if result.stderr_bytes else "")


def test_scores_are_sums_over_tokens_and_say_so(place: Place, tmp_path: Path) -> None:
    file = place.folders[0].parent / "data.jsonl"
    base, one = place.folders
    code, told = run("score", file, "--model", place.url, "--base", base, "--out", tmp_path / "there")
    assert code == 0, told
    assert run("score", file, "--model", one, "--base", base, "--out", tmp_path / "here")[0] == 0
    info = load_info(tmp_path / "there")
    assert info["approximate"] == APPROXIMATE and info["fingerprint"]["closing"] == "taken for 1"
    assert "approximate" in told and info["fingerprint"]["cuts"] == load_info(tmp_path / "here")["fingerprint"]["cuts"]
    cuts = cuts_between(place.tokenizers, ["base", "one"])
    assert isinstance(cuts, Cuts)
    codecs = [ByteCodec(t, cuts) for t in place.tokenizers]
    of_base = Reader(Formatter(place.tokenizers[0]), codecs[0])
    reader = Reader(Formatter(place.tokenizers[1]), codecs[1], of_base)
    openings = openings_of(place.assistant.model, reader, len(place.tokenizers[1]))
    right = 0
    exact = list(load_scores(tmp_path / "here"))
    for example, row, full in zip(load_examples(str(file)), load_scores(tmp_path / "there"), exact, strict=True):
        item = reader.read(example)
        with torch.inference_mode():
            logits = place.assistant.model(torch.tensor([item.token_ids])).logits[0, :-1].float()
        found = places(logits.clone(), torch.tensor(item.token_ids[1:]), torch.tensor(item.opens[1:]), openings)
        law = torch.log_softmax(logits, dim=-1)
        gold = law.gather(1, torch.tensor(item.token_ids[1:])[:, None])[:, 0]
        for n, (start, stop) in enumerate(item.spans):
            tokens = range(start - 1, start if stop is None else stop - 1)
            assert row["log_score"][n] == pytest.approx(float(gold[tokens].sum()), abs=1e-3)
            top = [int(law[t].argmax()) == item.token_ids[t + 1] for t in tokens]
            assert row["right"][n] == all(top)
            right += row["right"][n]
            # What is left out are the closing factors.
            closing = (0.0 if stop is None else float(found.log_close[stop - 1])) - float(found.log_close[start - 1])
            assert full["log_score"][n] == pytest.approx(row["log_score"][n] + closing, abs=2e-3)
        assert row["chunk_start"] == full["chunk_start"]
    assert len(exact) == 20


def test_scores_of_code_are_refused_unless_asked_for(place: Place, tmp_path: Path) -> None:
    file = place.folders[0].parent / "code.jsonl"
    asked = ("score", file, "--base", place.folders[0], "--out", tmp_path / "out", "--model")
    code, told = run(*asked, place.url)
    assert code == 1 and "closing=approximate" in told and not (tmp_path / "out").exists()
    code, told = run(*asked, place.url + "&closing=approximate")
    assert code == 0, told
    assert is_code(load_examples(str(file))) and not is_code(load_examples(str(file.with_name("data.jsonl"))))
    # The base's scores name the server with the others; nobody asks it for anything.
    code, told = run("score", file, "--model", place.folders[0], "--with", place.url, "--out", tmp_path / "base")
    assert code == 0, told
    cuts = [load_info(tmp_path / name)["fingerprint"]["cuts"] for name in ("out", "base")]
    assert cuts[0] == cuts[1]


def test_from_a_recipe_to_a_text(place: Place, tmp_path: Path) -> None:
    recipe = {
        "out": str(tmp_path / "pair"),
        "cache": str(tmp_path / "cache"),
        "tune": "gate",
        "base": {"model": str(place.folders[0])},
        "assistants": [{"name": "one", "model": place.url}],
        "data": {name: str(place.folders[0].parent / "data.jsonl") for name in ("train", "validation")},
        "training": {"epochs": 1},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    code, told = run("train", tmp_path / "recipe.yaml")
    assert code == 0, told
    code, told = run("generate", tmp_path / "pair", "3 + 1", "--assistant", f"one={place.url}", "--deferral", "random",
                     "--threshold", "0.5", "--max-tokens", 8, "--json")  # fmt: skip
    assert code == 0, told
    steps = json.loads(next(line for line in told.splitlines() if line.startswith("{")))["steps"]
    assert any(step["author"] in (1, "one") for step in steps), steps
