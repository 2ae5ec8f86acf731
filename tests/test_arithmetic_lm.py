"""The word problems' arithmetic language model: its sums are right, placing changes no law, a stopped run goes on."""

from __future__ import annotations

import importlib
import random
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from collm.errors import CollmError
from collm.models.loading import load_model, load_tokenizer

STUDY = Path(__file__).parent.parent / "recipes" / "word_problems"


@pytest.fixture(scope="module")
def study() -> Iterator[dict[str, ModuleType]]:
    """The study's scripts; they import one another by name, as scripts in one folder do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(STUDY))
        yield {name: importlib.import_module(name) for name in ("equations", "lessons", "arithmetic_lm")}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Digits by themselves, a space before an operator a part of it: as SmolLM2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["1 + 2 - 3 * 4 / 5 = 6\n#### 6", "the apples that Tom has"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")


@pytest.fixture(scope="module")
def words(study: dict[str, ModuleType], tokenizer: PreTrainedTokenizerFast) -> Any:
    return study["lessons"].SubVocabulary(tokenizer)


def exact(before: str) -> Fraction:
    left, sign, right, _ = before.split()
    a, b = Fraction(left), Fraction(right)
    return {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else Fraction(0)}[sign]


def test_sums_are_right_and_some_are_kept_for_testing(study: dict[str, ModuleType]) -> None:
    equations, rng = study["equations"], random.Random(0)
    lines = [line for _ in range(2000) for line in equations.solution(rng)]
    sums = [(before, after) for before, after in lines if before != "####"]
    for before, after in sums:
        assert abs(exact(before) - Fraction(after.strip())) <= Fraction(1, 20_000), (before, after)
        assert after.strip() == equations.written(equations.Decimal(after.strip()))
    kept = equations.test_sums(300)
    assert not {before for before, _ in sums} & {before for before, _ in kept}
    assert all(abs(exact(before) - Fraction(after)) <= Fraction(1, 20_000) for before, after in kept)
    signs = Counter(before.split()[1] for before, _ in sums)
    assert all(abs(signs[sign] / len(sums) - share) < 0.04 for sign, share in equations.OPERATORS.items())


def test_a_solution_ends_with_its_last_result(study: dict[str, ModuleType]) -> None:
    rng = random.Random(1)
    solutions = [list(study["equations"].solution(rng)) for _ in range(50)]
    assert all(last[0] == "####" and last[1] == before[1].rstrip("\n") for *_, before, last in solutions)
    assert {len(solution) for solution in solutions} == {2, 3, 4}


def test_the_sub_vocabulary_reads_as_the_tokenizer_does(
    study: dict[str, ModuleType], words: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    rng = random.Random(2)
    full = words.of_full()
    for _ in range(50):
        text = "".join(part for line in study["equations"].solution(rng) for part in line)
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert words.encode(text) == full[ids].tolist()
        assert tokenizer.decode([words.token_ids[n - 1] for n in words.encode(text)]) == text
    assert not full[tokenizer.encode("apples", add_special_tokens=False)].any()


def test_other_tokenizers_are_refused(study: dict[str, ModuleType]) -> None:
    whole_numbers = Tokenizer(models.WordLevel({"12": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(CollmError, match="each digit by itself"):
        study["lessons"].SubVocabulary(PreTrainedTokenizerFast(tokenizer_object=whole_numbers, unk_token="<unk>"))


def test_results_count_and_clutter_does_not(study: dict[str, ModuleType], words: Any) -> None:
    tokens, weights = study["lessons"].rows(random.Random(3), words, 20, 256, True)
    assert tokens.shape == weights.shape == (20, 256)
    assert not weights[tokens == study["lessons"].OTHER].any() and not weights[tokens == words.start].any()
    equals = (tokens == words.numbers[" ="])[:, :-1]
    assert equals.any() and bool((weights[:, 1:][equals] == 1).all())


def test_placed_in_the_full_vocabulary_its_law_is_the_same(
    study: dict[str, ModuleType], words: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    script = study["arithmetic_lm"]
    small = script.fresh_model(script.Plan(hidden_size=32, layers=1, heads=2), words).eval()
    script.place(small, words).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    placed = load_model(str(tmp_path))
    ids = torch.tensor([load_tokenizer(str(tmp_path)).encode("Tom has 3 apples.\n3 + 4 = 7", add_special_tokens=False)])
    with torch.inference_mode():
        law = placed(ids).logits.log_softmax(-1)[0]
        expected = words.log_probs(small(words.of_full()[ids]).logits)[0]
    torch.testing.assert_close(law[:, words.token_ids], expected[:, 1:], atol=1e-5, rtol=0)
    others = law[:, words.of_full() == study["lessons"].OTHER]
    assert others.isfinite().all() and bool((others == others[:, :1]).all())
    torch.testing.assert_close(others.exp().sum(-1), expected[:, 0].exp(), atol=1e-5, rtol=0)
    assert placed.generation_config.eos_token_id == tokenizer.eos_token_id


def test_a_stopped_run_goes_on_to_the_same_weights(
    study: dict[str, ModuleType], words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = study["arithmetic_lm"]
    plan = script.Plan(hidden_size=32, layers=1, heads=2, steps=6, tokens=256, rows=(32, 64), first_lesson=0.5)
    monkeypatch.setattr(script, "test", lambda *_: {})
    whole = script.train(plan, words, tmp_path / "whole", False)
    loss_of, calls = script.loss_of, iter(range(6))

    def stopping(*arguments: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return loss_of(*arguments)

    monkeypatch.setattr(script, "loss_of", stopping)
    with pytest.raises(KeyboardInterrupt):
        script.train(plan, words, tmp_path / "parts", False, save_every=2)
    monkeypatch.setattr(script, "loss_of", loss_of)
    resumed = script.train(plan, words, tmp_path / "parts", False, save_every=2)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, msg=name)
    with pytest.raises(CollmError, match="other settings"):
        script.train(script.Plan(steps=7), words, tmp_path / "parts", False)


def test_it_learns(study: dict[str, ModuleType], words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = study["arithmetic_lm"]
    plan = script.Plan(hidden_size=32, layers=1, heads=2, steps=40, tokens=512, learning_rate=1e-2)
    monkeypatch.setattr(script, "test", lambda *_: {})
    rows = script.batch(plan, words, plan.steps + 1)
    before = script.loss_of(script.fresh_model(plan, words), words, *rows, False)
    assert script.loss_of(script.train(plan, words, tmp_path, False), words, *rows, False) < 0.7 * before
