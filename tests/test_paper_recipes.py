"""The recipes for the paper's experiments, end to end: their makefile's own commands, with tiny models as stand-ins.

The assistant is as awkward as Llemma is: pickled shards, padded embeddings, no chat template, and tokens behind the
base's. Records are made up, in the shape of the published files.
"""

from __future__ import annotations

import json
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from collm.cli import main
from collm.data.examples import load_examples
from collm.data.formatting import Formatter
from collm.errors import CollmError
from collm.models.info import load_info
from collm.models.loading import load_model, load_tokenizer
from collm.models.tokenizers import require_same_tokenizer
from collm.training.recipe import load_recipe

ROOT = Path(__file__).parent.parent
PAPER = ROOT / "recipes" / "paper"
KINDS = ("tulu", "gsm8k", "math", "bioasq")
EXTRA = ["▁<SU", "▁<SUF", "▁<PRE>"]

adopt = runpy.run_path(str(PAPER / "adopt.py"))["adopt"]


def untemplated(tokenizer: PreTrainedTokenizerFast, extra: list[str], folder: Path) -> PreTrainedTokenizerFast:
    """A copy without chat template, with `extra` ordinary tokens at the end of its vocabulary."""
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    told["model"]["vocab"] |= {token: len(tokenizer) + i for i, token in enumerate(extra)}
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(told))
    names = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token")}
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **names)


@pytest.fixture(scope="module")
def models(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """`llama` (base) and `llemma` (assistant)."""
    root = tmp_path_factory.mktemp("hub")
    tiny_model(seed=0).save_pretrained(root / "llama")
    untemplated(tiny_tokenizer, [], root / "llama").save_pretrained(root / "llama")
    assistant = tiny_model(seed=1, vocab_size=len(tiny_tokenizer) + 8)
    assistant.config.save_pretrained(root / "llemma")
    untemplated(tiny_tokenizer, EXTRA, root / "llemma").save_pretrained(root / "llemma")
    weights = list(assistant.state_dict().items())
    for number, part in enumerate((weights[:5], weights[5:]), start=1):
        torch.save(dict(part), root / "llemma" / f"pytorch_model-0000{number}-of-00002.bin")
    return root


# -- records in the shape of the published files


def gsm8k(first: int, count: int) -> str:
    rows = [
        {"question": f"Anna has {n} apples, buys {n + 3}.", "answer": f"{n}+{n + 3}=<<{n}+3={2 * n + 3}>>{2 * n + 3}\n"}
        for n in range(first, first + count)
    ]
    return "".join(json.dumps({**row, "answer": f"{row['answer']}#### {n}"}) + "\n" for n, row in enumerate(rows))


def mathematics(first: int, count: int) -> str:
    rows = [
        {"problem": f"What is $\\frac{{{n}}}{{2}}$?", "solution": f"It is $\\boxed{{\\frac{{{n}}}{{2}}}}$.", "level": 1}
        for n in range(first, first + count)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def bioasq(first: int, count: int) -> str:
    def question(n: int) -> dict[str, Any]:
        kind = ("factoid", "list", "yesno", "summary")[n % 4]
        exact = {"factoid": [["Paris", "Lutetia"]], "list": [["Paris"], ["Rome"]], "yesno": "yes", "summary": None}
        given = {} if kind == "summary" else {"exact_answer": exact[kind]}
        return {"id": f"q{n}", "type": kind, "body": f"Which is {n}?", "ideal_answer": ["It is Paris."], **given}

    return json.dumps({"questions": [question(n) for n in range(first, first + count)]})


def tulu(first: int, count: int) -> str:
    rows = []
    for n in range(first, first + count):
        turns = [("user", f"What is {n}?"), ("assistant", "A number."), ("user", "And 2?"), ("assistant", "Likewise.")]
        turns = [("system", "Be brief."), *turns] if n % 2 else turns[: 2 + n % 4]
        messages = [{"role": role, "content": content} for role, content in turns]
        rows.append({"dataset": "made_up", "id": f"made_up_{n}", "messages": messages})
    return "".join(json.dumps(row) + "\n" for row in rows)


SOURCES = {"gsm8k": gsm8k, "math": mathematics, "bioasq": bioasq, "tulu": tulu}


# -- the makefile


class Study:
    """One experiment's makefile with stand-ins, whose commands run in this process."""

    def __init__(self, kind: str, models: Path, root: Path, **variables: str) -> None:
        self.root, self.name = root, f"{kind}_tiny_tiny"
        suffix = ".json" if kind == "bioasq" else ".jsonl"
        paths = {"SOURCE": root / f"{kind}_source{suffix}", "TEST": root / f"{kind}_test{suffix}"}
        paths["SOURCE"].write_text(SOURCES[kind](0, 16))
        paths["TEST"].write_text(SOURCES[kind](100, 4))
        if kind == "tulu":
            paths["TEST"] = root / "alpaca_eval.json"
            paths["TEST"].write_text(json.dumps([{"instruction": "What is 2?", "dataset": "made_up"}]))
        self.variables = {
            **{"NAME": self.name, "PYTHON": "python", "DATA": f"{root}/data", "RUNS": f"{root}/runs"},
            **{"BASE": f"{models}/llama", "ASSISTANT": f"{models}/llemma", "DEVICE": "cpu", "DTYPE": "float32"},
            **{"LENGTH": "96", "MAX_TOKENS": "4", "RATES": "0,0.5,1", "ROUNDS": "1"},
            **{"PARTS": "train=0.6,calibration=0.4", "SETTINGS": "training.evaluations=1 training.epochs=1"},
            **{name: str(path) for name, path in paths.items()},
            **variables,
        }

    @property
    def out(self) -> Path:
        return self.root / "runs" / self.name

    def commands(self, *targets: str) -> list[list[str]]:
        return commands(*(targets or ("all",)), **self.variables)

    def run(self, monkeypatch: pytest.MonkeyPatch, *targets: str) -> list[list[str]]:
        monkeypatch.chdir(ROOT)
        found = self.commands(*targets)
        for words in found:
            if words[1] == "-m":
                result = CliRunner().invoke(main, words[3:], catch_exceptions=False)
                assert result.exit_code == 0, (words, result.output)
            else:
                monkeypatch.setattr(sys, "argv", words[1:])
                runpy.run_path(words[1], run_name="__main__")
        return found


def commands(*targets: str, **variables: str) -> list[list[str]]:
    """What make would run, as words."""
    given = [f"{name}={value}" for name, value in variables.items()]
    done = subprocess.run(
        ["make", "-n", "-f", "recipes/paper/study.mk", *targets, *given],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith("python ")]


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


# -- the experiments


@pytest.mark.slow
def test_reasoning_from_the_published_files_to_the_report(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study("gsm8k", models, tmp_path)
    study.run(monkeypatch)
    results = {path.stem: json.loads(path.read_text()) for path in (study.out / "test" / "gsm8k").glob("*.json")}
    assert len(results) == 12 and {result["num_examples"] for result in results.values()} == {4}
    assert (study.out / "test" / "gsm8k" / "report.html").stat().st_size > 0
    info = load_info(study.out / "pair")
    assert info is not None and [a.name for a in info.assistants] == ["llemma"] and len(info.calibration) == 2
    assert set(results["proxy_tuning"]["forward_passes"]) == {"base", "llemma", "untuned"}
    assert results["random"]["deferral_rate"] > 0 and results["untouched"]["deferral_rate"] == 0
    # Every target is the file that its step makes: nothing is left to do.
    assert study.commands() == []
    # The pair is asked at the rate that was best on the calibration part; so are its rivals.
    curve = study.out / "calibration" / "pair" / "gsm8k" / "curve.csv"
    header, *rows = curve.read_text().splitlines()
    curve.write_text("\n".join([header, *(row[:-1] + "0" for row in rows), "0.37,0.4,0.5,0,exact_match,1,,,1"]))
    for name in ("pair.json", "random.json", "entropy.json", "report.html"):
        (study.out / "test" / "gsm8k" / name).unlink()
    assert [option(w, "--deferral-rate") for w in study.commands() if w[3] == "eval"] == ["0.37"] * 3


def test_domain_questions_are_asked_kind_by_kind(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study("bioasq", models, tmp_path, SYSTEMS="pair untouched")
    assert sorted(option(w, "--task") for w in study.commands() if w[3] == "calibrate") == [
        f"bioasq_{kind}" for kind in ("factoid", "list", "summary", "yesno")
    ]
    study.variables["TASKS"] = "bioasq_factoid bioasq_list"  # the packages of the others take a while to import
    found = study.run(monkeypatch)
    for task in ("bioasq_factoid", "bioasq_list"):
        result = json.loads((study.out / "test" / task / "pair.json").read_text())
        assert result["task"] == task and result["num_examples"] == 1
    assert sum(words[3] == "train" for words in found if words[1] == "-m") == 1
    assert study.commands() == []


def test_instruction_following_learns_every_turn(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study("tulu", models, tmp_path, SYSTEMS="pair random")
    study.run(monkeypatch)
    [answer] = json.loads((study.out / "answers" / "pair.json").read_text())
    assert answer["instruction"] == "What is 2?" and answer["generator"] == "tulu_tiny_tiny_pair"
    assert study.commands() == []
    tokenizer = load_tokenizer(str(tmp_path / "runs" / "models" / "llama"))
    examples = load_examples(tmp_path / "data" / "tulu" / "train.jsonl")
    example = next(e for e in examples if e.messages is not None and len(e.messages) == 5)
    encoded = Formatter(tokenizer).encode(example)
    learned = [t for t, labelled in zip(encoded.token_ids, encoded.labelled, strict=True) if labelled]
    assert tokenizer.decode(learned) == "A number.<|im_end|>Likewise.<|im_end|>"
    assert tokenizer.decode(encoded.token_ids).startswith("<|endoftext|><|system|>\nBe brief.\n<|user|>\nWhat is")


# -- recipes


@pytest.mark.parametrize("kind", KINDS)
def test_recipes_have_the_settings_of_the_paper(kind: str) -> None:
    recipe = load_recipe(PAPER / f"{kind}.yaml")
    training = recipe.training
    assert (recipe.tune, recipe.objective, recipe.data.max_length) == ("full", "marginal", 1024)
    assert (training.learning_rate, training.warmup, training.weight_decay) == (2e-5, 0.04, 0)
    assert (training.epochs, training.schedule, training.bf16) == (2, "linear", True)
    assert training.batch_size * training.gradient_accumulation * 8 == 128


@pytest.mark.parametrize("gpus", ["1", "8"])
def test_a_recipe_is_what_the_makefile_trains(gpus: str) -> None:
    found = commands("train", NAME="math_7b_llemma34b", PYTHON="python", GPUS=gpus)
    [words] = [words for words in found if "out=runs/paper/math_7b_llemma34b/pair" in words]
    _, recipe, *changes = words[words.index("train") :]
    made, shipped = load_recipe(ROOT / recipe, changes), load_recipe(PAPER / "math.yaml")
    accumulation = made.training.gradient_accumulation
    assert accumulation * int(gpus) * made.training.batch_size == 128
    training = made.training.model_copy(update={"gradient_accumulation": shipped.training.gradient_accumulation})
    assert made.model_copy(update={"training": training}) == shipped
    assert ("accelerate.commands.launch" in words) == (gpus == "8")


def test_baselines_are_the_pair_with_another_objective() -> None:
    found = commands("train", NAME="gsm8k_7b_13b", PYTHON="python")
    changes = [words for words in found if "train" in words]
    weak = next(words for words in changes if "objective=weak_supervision" in words)
    adapters = next(words for words in changes if "tune=lora" in words)
    assert any("Llama-2-13b-hf" in word and word.startswith("assistants=") for word in weak)
    assert "lora={r: 64, alpha: 16, dropout: 0.1}" in adapters and "training.learning_rate=1.0e-4" in adapters
    assert any(word.startswith("base={model: runs/paper/models/Llama-2-13b-hf") for word in adapters)
    # Adapters beside 70B in bfloat16 fit no GPU.
    large = commands("train", NAME="gsm8k_7b_70b", PYTHON="python")
    assert not any("tune=lora" in words for words in large)


def names() -> list[str]:
    """Every experiment that the README tells of."""
    reasoning = [f"{kind}_7b_{name}" for kind in ("gsm8k", "math") for name in ("llemma7b", "llemma34b", "13b", "70b")]
    medicine = [f"bioasq_7b_{name}" for name in ("meditron7b", "meditron70b", "13b", "70b")]
    return ["tulu_7b_13b", "tulu_7b_70b", *reasoning, *medicine]


@pytest.mark.parametrize("name", names())
def test_every_command_of_every_experiment_is_understood(name: str) -> None:
    found = [words[3:] for words in commands(NAME=name, PYTHON="python", RUNS="x", DATA="y") if words[1] == "-m"]
    for command, *arguments in found:
        with click.Context(main.commands[command]) as ctx:
            _, left, _ = main.commands[command].make_parser(ctx).parse_args(list(arguments))
        assert left == [], arguments
    assert {"prepare", "score", "train"} < {command for command, *_ in found}


def test_mathematics_is_prepared_from_the_published_fields(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study("math", models, tmp_path)
    study.run(monkeypatch, "data")
    rows = load_examples(tmp_path / "data" / "math" / "test.jsonl")
    assert len(rows) == 4 and rows[0].reference == "It is $\\boxed{\\frac{100}{2}}$."
    parts = [load_examples(tmp_path / "data" / "math" / f"{part}.jsonl") for part in ("train", "calibration")]
    assert sum(map(len, parts)) == 16


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"NAME": "gsm8k_7b_llemma"}, "llemma34b"),
        ({"NAME": "aime_7b_13b"}, "tulu, gsm8k, math or bioasq"),
        ({"GPUS": "3"}, "128 examples"),
        ({"BASE": "a/tiny", "ASSISTANT": "b/tiny"}, "different names"),
    ],
)
def test_a_name_that_is_none_is_refused(given: dict[str, str], word: str) -> None:
    arguments = [f"{name}={value}" for name, value in given.items()]
    done = subprocess.run(
        ["make", "-n", "-f", "recipes/paper/study.mk", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0 and word in done.stderr


# -- models


def test_an_assistant_with_more_tokens_is_refused_until_it_is_adopted(models: Path, tmp_path: Path) -> None:
    base, assistant = str(models / "llama"), str(models / "llemma")
    with pytest.raises(CollmError, match="▁<SU.* is not in the base's vocabulary"):
        require_same_tokenizer(load_tokenizer(base), load_tokenizer(assistant))
    adopt(assistant, base, PAPER / "tulu.jinja", tmp_path / "llemma")
    adopted = load_tokenizer(str(tmp_path / "llemma"))
    require_same_tokenizer(load_tokenizer(base), adopted)
    assert adopted.chat_template == (PAPER / "tulu.jinja").read_text()
    model = load_model(str(tmp_path / "llemma"))
    weights = {}
    for shard in (models / "llemma").glob("*.bin"):
        weights |= torch.load(shard, weights_only=True)
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights.items())


def test_weights_are_linked(models: Path, tmp_path: Path) -> None:
    base = str(models / "llama")
    for _ in range(2):  # once more does no harm
        adopt(base, base, PAPER / "tulu.jinja", tmp_path / "llama")
    assert (tmp_path / "llama" / "model.safetensors").is_symlink()
    AutoModelForCausalLM.from_pretrained(tmp_path / "llama")


def test_another_vocabulary_cannot_be_adopted(
    models: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    told = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    vocabulary = told["model"]["vocab"]
    vocabulary["7"], vocabulary["8"] = vocabulary["8"], vocabulary["7"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(told))
    PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="<|im_end|>").save_pretrained(
        tmp_path
    )
    with pytest.raises(CollmError, match="token '[78]' is"):
        adopt(str(tmp_path), str(models / "llama"), PAPER / "tulu.jinja", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pickles_that_hold_more_than_tensors_are_refused(
    models: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_tokenizer.save_pretrained(tmp_path / "odd")
    torch.save({"weight": Path("/")}, tmp_path / "odd" / "pytorch_model.bin")
    with pytest.raises(CollmError, match="plain tensors"):
        adopt(str(tmp_path / "odd"), str(models / "llama"), PAPER / "tulu.jinja", tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
