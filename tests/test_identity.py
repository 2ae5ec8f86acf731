"""What decides an answer: nothing goes on, and nothing is taken over, under another system."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import make_model, make_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from writers import PairWriter, questions

from collm.cli import main
from collm.data.formatting import Formatter, PromptFormat
from collm.data.scores import load_info, load_scores, scores_fingerprint
from collm.data.scoring import score
from collm.errors import CollmError
from collm.evaluation.evaluate import evaluate
from collm.evaluation.reading import read
from collm.evaluation.system import settings_of
from collm.identity.comparing import differences, differing
from collm.identity.finding import local_identity, remote_identity, system_identity, weights_identity, writer_identity
from collm.llm import CollaborativeLM
from collm.models.checkpoint import save_checkpoint
from collm.models.head import DeferralHead
from collm.models.info import AssistantInfo, CalibrationRow, CalibrationTable, CheckpointInfo
from collm.models.tools import Calculator
from collm.sampling_params import SamplingParams

PARAMS = SamplingParams(max_tokens=2, deferral="never")

# ---- weights


def test_any_bit_makes_other_weights(tiny_model: Callable[..., PreTrainedModel]) -> None:
    """Samples of them would let a single changed weight pass."""
    model = tiny_model()
    before = weights_identity(model)
    assert weights_identity(tiny_model()) == before
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        place = int(torch.randint(parameter.numel(), (), generator=generator))
        with torch.no_grad():
            kept = parameter.view(-1)[place].clone()
            parameter.view(-1)[place] = torch.nextafter(kept, kept + 1)
            assert weights_identity(model) != before, name
            parameter.view(-1)[place] = kept
    assert weights_identity(model) == before
    with torch.no_grad():
        first = model.get_parameter("model.layers.0.mlp.up_proj.weight")
        first.copy_(first[torch.tensor([1, 0, *range(2, len(first))])])
    assert weights_identity(model) != before  # the same numbers in another order


def test_tied_weights_and_other_dtypes(tiny_model: Callable[..., PreTrainedModel]) -> None:
    tied = tiny_model(tie_word_embeddings=True)
    assert weights_identity(tied) == weights_identity(tiny_model(tie_word_embeddings=True))
    full, half = local_identity(tied), local_identity(copy.deepcopy(tied).bfloat16())
    assert (full["dtype"], half["dtype"]) == ("float32", "bfloat16") and full["weights"] != half["weights"]


def test_offloaded_weights_are_fetched(tiny_model: Callable[..., PreTrainedModel]) -> None:
    from accelerate import cpu_offload

    here, away = tiny_model(), cpu_offload(tiny_model())
    assert any(parameter.is_meta for parameter in away.parameters())
    assert weights_identity(away) == weights_identity(here) != weights_identity(cpu_offload(tiny_model(seed=1)))


# ---- comparing


def test_where_a_model_lies_decides_nothing_and_a_model_s_name_does() -> None:
    there = {
        "identity": {"named": {"checkpoint": "a"}, "models": {"base": {"weights": "1"}, "named": {"weights": "2"}}}
    }
    moved = copy.deepcopy(there)
    moved["identity"]["named"] = {"checkpoint": "b"}
    assert not differing(there, moved)
    for name in ("base", "named"):
        other = copy.deepcopy(there)
        other["identity"]["models"][name]["weights"] = "3"
        assert set(differing(there, other)) == {f"identity.models.{name}.weights"}
    assert differences({"a": 1, "b": (1, 2)}, {"b": [1, 2]}) == "a: 1 there, None now"
    assert not differing({"t": float("inf")}, {"t": float("inf")})


def test_what_is_remote_is_never_what_is_local(
    tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """A server is known by its answers to a fixed text, which in 16 bits differ in their last digits."""
    probe = [-1.0, -2.5, -0.01]
    there = remote_identity("llama-70b", "v1", tiny_tokenizer, probe)
    assert not differing(there, remote_identity("llama-70b", "v1", tiny_tokenizer, [x + 0.05 for x in probe]))
    # llama.cpp tells no number of a token that ends inside a character; which token comes there may be due to rounding.
    partly = remote_identity("llama-70b", "v1", tiny_tokenizer, [-1.0, math.nan, -0.01])
    assert partly["probe"] == [-1.0, None, -0.01] and json.loads(json.dumps(partly, allow_nan=False)) == partly
    assert not differing(there, partly) and not differing(partly, there) and not differing(partly, partly)
    for other in (
        remote_identity("llama-70b", "v2", tiny_tokenizer, probe),
        remote_identity("llama-7b", "v1", tiny_tokenizer, probe),
        remote_identity("llama-70b", "v1", make_tokenizer(300), probe),
        remote_identity("llama-70b", "v1", tiny_tokenizer, [-1.0, -2.5, -0.5]),
        remote_identity("llama-70b", "v1", tiny_tokenizer, probe[:2]),
        remote_identity("llama-70b", "v1", tiny_tokenizer, [-1.5, math.nan, -0.01]),
        remote_identity("llama-70b", "v1", tiny_tokenizer, [math.nan] * 3),
        local_identity(tiny_model()),
    ):
        assert differing(there, other) and differing(other, there)
    fingerprints = [
        scores_fingerprint(questions(1), identity, Formatter(tiny_tokenizer))
        for identity in (there, local_identity(tiny_model()), writer_identity(Calculator(tiny_tokenizer)))
    ]
    assert len({fingerprint["model"]["kind"] for fingerprint in fingerprints}) == 3


class Served(Calculator):
    """A model that says itself what decides its answers."""

    def identity(self) -> dict[str, Any]:
        return remote_identity("large", "1", self.tokenizer, [-1.0])


def test_a_model_may_say_who_it_is(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert writer_identity(Served(tiny_tokenizer)) == remote_identity("large", "1", tiny_tokenizer, [-1.0])


# ---- systems


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """`pair`, a checkpoint with a gate and a calibration, and `helper`, its assistant."""
    tokenizer = make_tokenizer()
    save_model(tmp_path / "helper", seed=1)
    torch.manual_seed(3)
    head = DeferralHead(32, 1)
    torch.nn.init.normal_(head.weight)
    rows = [
        CalibrationRow(target_rate=r, achieved_rate=r, threshold=0.5, log_odds=1 - r, metric_value=0)
        for r in (0.2, 0.4)
    ]
    info = CheckpointInfo(
        assistants=[AssistantInfo(name="helper", spec=str(tmp_path / "helper"))],
        calibration=[CalibrationTable(task="exact_match", metric="m", seed=0, num_prompts=1, rows=rows)],
    )
    save_checkpoint(tmp_path / "pair", info, make_model(seed=0), head, tokenizer)
    return tmp_path


def save_model(folder: Path, seed: int) -> None:
    make_model(seed=seed).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def run(place: Path, params: SamplingParams = PARAMS, stop_after: int | None = None, **options: Any) -> Any:
    llm = CollaborativeLM.from_pretrained(place / "pair", **options)
    if stop_after is not None:
        whole, left = llm.generate_each, [stop_after]

        def stopped(*arguments: Any, **named: Any) -> Any:
            for each in whole(*arguments, **named):
                if not left[0]:
                    raise KeyboardInterrupt
                left[0] -= 1
                yield each

        llm.generate_each = stopped  # type: ignore[method-assign]
    return evaluate(llm, "exact_match", questions(4), params, out=place / "run.jsonl", batch_size=1, progress=False)


def new_base(place: Path) -> None:
    make_model(seed=7).save_pretrained(place / "pair")


def new_assistant(place: Path) -> None:
    save_model(place / "helper", seed=8)


def new_gate(place: Path) -> None:
    DeferralHead(32, 1).save(place / "pair")


def new_template(place: Path) -> None:
    tokenizer = make_tokenizer(chat_template="{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}")
    tokenizer.save_pretrained(place / "pair")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (new_base, "identity.models.base.weights"),
        (new_assistant, "identity.models.helper.weights"),
        (new_gate, "identity.gate"),
        (new_template, "identity.models.base.prompts"),
    ],
)
def test_a_stopped_evaluation_does_not_go_on_under_another_system(
    place: Path, change: Callable[[Path], None], told: str
) -> None:
    """It once gave some answers of the old weights and some of the new ones in one figure."""
    with pytest.raises(KeyboardInterrupt):
        run(place, stop_after=2)
    before = (place / "run.jsonl").read_bytes()
    change(place)
    with pytest.raises(CollmError, match=told):
        run(place)
    assert (place / "run.jsonl").read_bytes() == before


def test_a_finished_evaluation_is_not_told_again_of_another_system(place: Path) -> None:
    run(place)
    assert run(place).num_examples == 4  # of the same one it is
    (place / "helper").rename(place / "elsewhere")
    assert run(place, assistants=[str(place / "elsewhere")]).num_examples == 4  # wherever it lies
    for options, told in (({"dtype": "bfloat16"}, "dtype: 'float32' there"), ({}, "weights")):
        if not options:
            new_base(place)
        with pytest.raises(CollmError, match=told):
            run(place, assistants=[str(place / "elsewhere")], **options)


def test_a_new_calibration_is_another_threshold(place: Path) -> None:
    """The rate is the same, what it stands for is not."""
    llm = CollaborativeLM.from_pretrained(place / "pair")
    at_rate = SamplingParams(deferral_rate=0.2)
    before = settings_of(llm, at_rate, None, None)
    llm.info.calibration[0].rows[0] = llm.info.calibration[0].rows[0].model_copy(update={"log_odds": 3.0})
    assert set(differing(before, settings_of(llm, at_rate, None, None))) == {"decides"}


def test_a_writer_without_weights_is_known_by_its_name() -> None:
    settings = settings_of(PairWriter(), PARAMS, None, None, {"dtype": "int4"})
    assert settings["identity"] == {"dtype": "int4"} and settings["models"] == ["base", "helper"]


def test_a_reading_does_not_go_on_with_other_models(place: Path) -> None:
    texts = [question.__class__(question.id, prompt="12 + 30 =", completion=" 42") for question in questions(2)]
    llm = CollaborativeLM.from_pretrained(place / "pair")
    read(llm.models, llm.formatters, texts, out=place / "read.jsonl", progress=False)
    new_assistant(place)
    llm = CollaborativeLM.from_pretrained(place / "pair")
    with pytest.raises(CollmError, match=r"another system.*identity\.models\.helper\.weights"):
        read(llm.models, llm.formatters, texts, out=place / "read.jsonl", progress=False)


def test_what_a_template_renders_is_a_part_of_it(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """The same text of a template may show another day."""
    template = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"

    def prompts(day: str) -> str:
        formatter = Formatter(tiny_tokenizer, PromptFormat(chat_template=template, date=day))
        found = system_identity([Calculator(tiny_tokenizer)], [formatter])["models"]["calculator"]["prompts"]
        assert isinstance(found, str)
        return found

    assert prompts("2026-11-25") == prompts("2026-11-25") != prompts("2026-11-26")


TELLS_DAY = (
    "{{ strftime_now('%d %b %Y') }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_another_day_is_told_with_the_way_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template may tell the day: what was begun yesterday then goes on with yesterday's prompts, if that is said."""
    monkeypatch.setattr("collm.data.formatting.date", Yesterday)
    make_model().save_pretrained(tmp_path / "plain")
    make_tokenizer(chat_template=TELLS_DAY).save_pretrained(tmp_path / "plain")
    rows = [{"messages": [{"role": "user", "content": f"{n} + 1"}], "answer": "2"} for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    learnt = [{"messages": [*row["messages"], {"role": "assistant", "content": "2"}]} for row in rows]
    (tmp_path / "learnt.jsonl").write_text("".join(json.dumps(row) + "\n" for row in learnt))
    plain, out = str(tmp_path / "plain"), str(tmp_path / "out.jsonl")
    asking = ["eval", plain, "--data", str(tmp_path / "rows.jsonl"), "--task", "exact_match", "--deferral", "never"]
    asking += ["--max-tokens", "1", "--out", out]
    scoring = ["score", str(tmp_path / "learnt.jsonl"), "--model", plain, "--out", str(tmp_path / "scores")]
    for command in (asking, scoring):
        run_cli(*command)
    monkeypatch.undo()
    for command in (asking, scoring):
        told = re.sub(r"\s+", " ", run_cli(*command, fails=True))
        assert "2026-07-25" in told and "; --date 2026-07-25 is the day of the earlier run" in told
        run_cli(*command, "--date", "2026-07-25")
    undated = ["eval", str(tmp_path / "undated"), *asking[2:-1], str(tmp_path / "other.jsonl"), "--date", "2026-07-25"]
    make_model().save_pretrained(tmp_path / "undated")
    make_tokenizer().save_pretrained(tmp_path / "undated")
    assert "no chat template of this system tells the day" in run_cli(*undated, fails=True)


class Yesterday(date):
    @classmethod
    def today(cls) -> date:
        return date(2026, 7, 25)


def run_cli(*arguments: str, fails: bool = False) -> str:
    found = CliRunner().invoke(main, arguments)
    assert found.exit_code == int(fails), found.output
    return found.output


# ---- scores


def test_scoring_does_not_go_on_in_another_dtype(
    tmp_path: Path, tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Half the rows were once scored in float32 and half in bfloat16."""
    texts = [question.__class__(question.id, prompt="12 + 30 =", completion=" 42") for question in questions(3)]
    formatter = Formatter(tiny_tokenizer)
    out = score(texts, tiny_model(), formatter, tmp_path / "s", progress=False)
    with pytest.raises(CollmError, match=r"the model's dtype \(float32 there, bfloat16 here\)"):
        score(texts, tiny_model().bfloat16(), formatter, out, progress=False)
    assert load_info(out)["fingerprint"]["model"]["dtype"] == "float32"
    expect = scores_fingerprint(texts, local_identity(tiny_model()), formatter)
    assert len(load_scores(out, expect=expect)) == 3
