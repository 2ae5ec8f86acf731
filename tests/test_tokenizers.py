"""Which tokenizers may write together: padding and special tokens do not matter, everything else does."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest
from conftest import make_tokenizer
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from collm.errors import CollmError
from collm.models.tokenizers import QuickDecoder, require_same_tokenizer, shared_vocab_size, tokenizer_fingerprint


def test_padded_vocabulary_and_other_special_tokens_are_tolerated(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    other = copy.deepcopy(tiny_tokenizer)
    other.add_tokens([f"[PAD{n}]" for n in range(320, 330)])
    other.add_special_tokens({"additional_special_tokens": [AddedToken("<|tool|>", special=True)]})
    other.eos_token = "<|endoftext|>"
    require_same_tokenizer(tiny_tokenizer, other)
    assert shared_vocab_size(tiny_tokenizer) == 320
    assert shared_vocab_size(other) == 331


def test_saved_and_loaded_tokenizer_is_the_same(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path) -> None:  # type: ignore[no-untyped-def]
    tiny_tokenizer.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tiny_tokenizer)


def test_other_vocabulary_is_refused_with_the_first_difference(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(CollmError, match="expert has another tokenizer than base .*token '.+' .* model family"):
        require_same_tokenizer(tiny_tokenizer, make_tokenizer(vocab_size=300), ("base", "expert"))
    with pytest.raises(CollmError, match="is not in expert's vocabulary"):
        require_same_tokenizer(make_tokenizer(vocab_size=300), tiny_tokenizer, ("expert", "base"))


def test_same_vocabulary_that_splits_otherwise_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    other = copy.deepcopy(tiny_tokenizer)
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(CollmError, match="the same vocabulary, but .* is split in another way"):
        require_same_tokenizer(tiny_tokenizer, other)


def extended(tokenizer: PreTrainedTokenizerFast, *tokens: str, first: int | None = None) -> PreTrainedTokenizerFast:
    """With ordinary tokens more, which nobody has declared special."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    start = len(vocabulary) if first is None else first
    if first is not None:
        state["model"]["vocab"] = vocabulary = {t: n + len(tokens) * (n >= first) for t, n in vocabulary.items()}
    vocabulary.update({token: start + number for number, token in enumerate(tokens)})
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|im_end|>")


@pytest.mark.parametrize("marks", [("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"), ("<|tool|>",)])
def test_marks_behind_the_shared_tokens_are_harmless(
    tiny_tokenizer: PreTrainedTokenizerFast, marks: tuple[str, ...]
) -> None:
    other = extended(tiny_tokenizer, *marks)
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tiny_tokenizer)
    require_same_tokenizer(tiny_tokenizer, other)  # as an assistant, whose marks are cut off
    require_same_tokenizer(other, tiny_tokenizer)  # as the base, whose marks the assistant cannot write
    assert shared_vocab_size(other) == shared_vocab_size(tiny_tokenizer) + len(marks)


def test_words_behind_the_shared_tokens_are_not(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    for words in (("apples",), ("▁<PRE>", "zebra")):
        other = extended(tiny_tokenizer, *words)
        with pytest.raises(CollmError, match=f"{words[-1]}.* is not in the base's vocabulary"):
            require_same_tokenizer(tiny_tokenizer, other)
        with pytest.raises(CollmError, match=f"{words[-1]}.* not in the assistant's vocabulary"):
            require_same_tokenizer(other, tiny_tokenizer)
    with pytest.raises(CollmError, match="has another tokenizer"):
        require_same_tokenizer(tiny_tokenizer, extended(tiny_tokenizer, "▁<PRE>", first=300))


def test_quick_decoding_is_the_tokenizer_s_own(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Whatever the tokens, with and without special ones; and where a tokenizer decodes in a way of its own."""

    class Own(PreTrainedTokenizerFast):
        def _decode(self, *args: Any, **kwargs: Any) -> str:
            return super()._decode(*args, **kwargs).upper()

    other = copy.deepcopy(tiny_tokenizer)
    other.add_special_tokens({"additional_special_tokens": [AddedToken("<|tool|>", special=True)]})
    own = Own(tokenizer_object=other.backend_tokenizer, eos_token=other.eos_token)
    rng = random.Random(0)
    for tokenizer in (other, own):
        quick = QuickDecoder(tokenizer)
        for _ in range(2):
            for _ in range(200):
                ids = rng.choices([*range(len(tokenizer)), *tokenizer.all_special_ids * 9], k=rng.randint(0, 6))
                for skip in (False, True):
                    expected = tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
                    assert quick.decode(ids, skip, clean_up_tokenization_spaces=False) == expected
