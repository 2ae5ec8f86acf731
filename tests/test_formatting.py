"""Templates, masks and truncation: what is labelled, and that a prompt is what training saw before the completion."""

from __future__ import annotations

import copy
import logging

import pytest
from conftest import CHAT_TEMPLATE, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from collm.data.encoding import encode_examples
from collm.data.examples import Example
from collm.data.formatting import Formatter, PromptFormat
from collm.errors import CollmError
from collm.types import Message

TOKENIZER = make_tokenizer()
BOS, START, END = 0, 1, 2

TEMPLATES = {
    "chatml": CHAT_TEMPLATE,
    "default system prompt": "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n{% endif %}"
    + CHAT_TEMPLATE,
    "bos and stripped": "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{% if m.role == "
    "'assistant' %}<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}",
    "no header, no end": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    "other end of turn": CHAT_TEMPLATE.replace("<|im_end|>", "<|im_start|>"),
}

# Letters, digits, white space that merges with what stands beside it, and characters of several bytes.
text = st.text(alphabet="ab 12\n\té世👋#=", max_size=12)


@st.composite
def conversations(draw: st.DrawFn) -> tuple[Message, ...]:
    messages = [{"role": "system", "content": draw(text)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [{"role": "user", "content": draw(text)}, {"role": "assistant", "content": draw(text)}]
    return tuple(messages)


formats = st.builds(
    PromptFormat, system_prompt=st.none() | text, chat_template=st.sampled_from(list(TEMPLATES.values()))
)


def labelled(encoded) -> list[int]:  # type: ignore[no-untyped-def]
    return [token for token, flag in zip(encoded.token_ids, encoded.labelled, strict=True) if flag]


@settings(max_examples=60, deadline=None)
@given(conversations(), formats)
def test_labelled_tokens_are_the_completions(messages: tuple[Message, ...], format: PromptFormat) -> None:
    formatter = Formatter(TOKENIZER, format)
    example = Example("x", messages=messages)
    encoded = formatter.encode(example)
    completions = formatter.completions(example)
    assert labelled(encoded) == [token for completion in completions for token in completion]
    assert not encoded.labelled[0] and encoded.truncated_tokens == 0
    turns = [m["content"] for m in messages if m["role"] == "assistant"]
    for completion, turn in zip(completions, turns, strict=True):
        assert completion[-1] in formatter.end_ids
        assert not formatter.end_ids & set(completion[:-1])
        assert TOKENIZER.decode(completion[:-1]).strip() == turn.strip()


@settings(max_examples=60, deadline=None)
@given(conversations(), formats)
def test_a_prompt_is_what_training_saw_before_each_turn(messages: tuple[Message, ...], format: PromptFormat) -> None:
    formatter = Formatter(TOKENIZER, format)
    encoded = formatter.encode(Example("x", messages=messages))
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = formatter.prompt(messages[:i])
            assert encoded.token_ids[: len(prompt)] == prompt
            assert encoded.labelled[len(prompt)] and not encoded.labelled[len(prompt) - 1]


@settings(max_examples=60, deadline=None)
@given(text, text, st.booleans())
def test_plain_rows(prompt: str, completion: str, add_bos: bool) -> None:
    formatter = Formatter(TOKENIZER, PromptFormat(add_bos=add_bos))
    example = Example("x", prompt=prompt, completion=completion)
    encoded = formatter.encode(example)
    before = formatter.prompt(prompt)
    assert encoded.token_ids == before + formatter.completions(example)[0]
    assert encoded.labelled == (False,) * len(before) + (True,) * (len(encoded) - len(before))
    assert TOKENIZER.decode([t for t in encoded.token_ids if t > END]) == prompt + completion
    assert encoded.token_ids[-1] == END
    # Something to predict after, even for an empty prompt.
    assert (before[0] == BOS) == (add_bos or not prompt)


@settings(max_examples=60, deadline=None)
@given(conversations(), formats, st.integers(2, 60))
def test_truncation_cuts_from_the_right_and_counts(
    messages: tuple[Message, ...], format: PromptFormat, max_length: int
) -> None:
    formatter = Formatter(TOKENIZER, format)
    example = Example("x", messages=messages)
    whole, cut = formatter.encode(example), formatter.encode(example, max_length)
    assert cut.token_ids == whole.token_ids[:max_length] and cut.labelled == whole.labelled[:max_length]
    assert len(cut) + cut.truncated_tokens == len(whole)


@settings(max_examples=30, deadline=None)
@given(conversations(), formats, formats)
def test_models_with_other_templates_share_the_completions(
    messages: tuple[Message, ...], base: PromptFormat, other: PromptFormat
) -> None:
    example = Example("x", messages=messages)
    shared = Formatter(TOKENIZER, base).completions(example)
    assert labelled(Formatter(TOKENIZER, other).encode(example, completions=shared)) == [t for c in shared for t in c]


def test_only_what_the_assistant_says_is_labelled_in_a_dialogue_of_two_turns() -> None:
    messages = (
        {"role": "user", "content": "12 + 30?"},
        {"role": "assistant", "content": "42"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "yes"},
    )
    encoded = Formatter(TOKENIZER, PromptFormat(system_prompt="Add.")).encode(Example("x", messages=messages))
    assert TOKENIZER.decode(labelled(encoded)) == "42<|im_end|>yes<|im_end|>"
    assert TOKENIZER.decode(encoded.token_ids) == (
        "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n12 + 30?<|im_end|>\n"
        "<|im_start|>assistant\n42<|im_end|>\n"
        "<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"
    )


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("answer", ["12 + 30 = 42", " apples", "\n7"])
def test_the_beginning_of_an_answer_is_what_training_saw(template: str, answer: str) -> None:
    formatter = Formatter(TOKENIZER, PromptFormat(system_prompt="Be kind", chat_template=template))
    asked: list[Message] = [{"role": "user", "content": "How many apples?"}]
    trained = formatter.encode(Example("x", messages=(*asked, {"role": "assistant", "content": answer})))
    begun = formatter.prompt(asked) + formatter.continuation(asked, answer)
    if "trim" not in template or not answer[0].isspace():
        assert trained.token_ids[: len(begun)] == begun
    plain = formatter.prompt("How many") + formatter.continuation("How many", answer)
    assert plain == formatter.encode(Example("x", prompt="How many", completion=answer)).token_ids[:-1]


def test_a_given_system_prompt_stays() -> None:
    messages = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "?"}]
    assert "Other" not in TOKENIZER.decode(Formatter(TOKENIZER, PromptFormat(system_prompt="Other")).prompt(messages))


def test_end_of_turn_of_the_template_is_known_where_eos_is_another_token() -> None:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.eos_token = "<|endoftext|>"
    formatter = Formatter(tokenizer)
    assert formatter.end_ids == {BOS, END}
    example = Example("x", messages=({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}))
    assert formatter.completions(example)[0][-1] == END


def test_an_end_within_what_is_to_be_learnt_is_refused() -> None:
    turn = {"role": "assistant", "content": "b<|im_end|>never said"}
    rows = [Example("x", messages=({"role": "user", "content": "a"}, turn))]
    rows.append(Example("x", prompt="a", completion="b<|im_end|>never said"))
    for row in rows:
        with pytest.raises(CollmError, match=r"'x': '<\|im_end\|>' stands within what is to be learnt"):
            Formatter(TOKENIZER).completions(row)


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Words with a leading "▁", one put before any text, and BOS added to texts: Llama 2's ways."""
    words = ["<unk>", "<s>", "</s>", "▁", "▁a", "▁b", "a", "b"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_no_space_creeps_in_between_prompt_and_completion() -> None:
    formatter = Formatter(sentencepiece_like())
    assert formatter.encode(Example("x", prompt="a a", completion=" b")).token_ids == (1, 4, 4, 5, 2)


def llama_like() -> PreTrainedTokenizerFast:
    """Llama 2's other way: the normaliser puts the space, and what is no word is spelt in bytes."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "b", "a", "r", "▁b", "▁ba", "ba"]
    merges = [("▁", "b"), ("▁b", "a"), ("b", "a")]
    inner = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges, unk_token="<unk>", byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("b: ", "bar"),
        ("b:\n    ", "bar\n"),
        ("b", "ar"),
        ("b: ", "\n\nbar"),
        ("b:", " bar"),
        ("b:\n", "bar"),
        ("", "bar"),
    ],
)
def test_a_space_that_the_prompt_ends_with_is_not_learnt_twice(prompt: str, completion: str) -> None:
    tokenizer = llama_like()
    ids = Formatter(tokenizer).encode(Example("x", prompt=prompt, completion=completion)).token_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == prompt + completion


def test_add_bos_as_the_tokenizer_does_or_as_told() -> None:
    assert Formatter(sentencepiece_like()).prompt("a") == (1, 4)
    assert Formatter(sentencepiece_like(), PromptFormat(add_bos=False)).prompt("a") == (4,)
    assert BOS not in Formatter(TOKENIZER).prompt("a")
    bare = copy.deepcopy(TOKENIZER)
    bare.bos_token = None
    with pytest.raises(CollmError, match="no BOS"):
        Formatter(bare, PromptFormat(add_bos=True))
    assert Formatter(bare).prompt("") == (END,)


def test_no_chat_template_says_what_to_do() -> None:
    formatter = Formatter(make_tokenizer(chat_template=None))
    with pytest.raises(CollmError, match="no chat template.*pass one"):
        formatter.prompt([{"role": "user", "content": "a"}])
    assert formatter.end_ids == {END}
    assert formatter.prompt("a")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system role') }}", "refuses this conversation: no system role"),
        ("{% for m in messages %}{{ m.oops.oops }}{% endfor %}", "refuses this conversation"),
        ("{{ messages[-1].content }}{% if add_generation_prompt %}>{% endif %}", "shows nothing of message 1"),
    ],
)
def test_templates_that_cannot_be_used(template: str, message: str) -> None:
    formatter = Formatter(TOKENIZER, PromptFormat(chat_template=template))
    example = Example("x", messages=({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}))
    with pytest.raises(CollmError, match=message):
        formatter.encode(example)


def test_a_template_may_say_that_it_hides_a_role() -> None:
    """As the demo's experts do: they go on with what is written and never see the question."""
    shows = "{{ messages[-1].content }}{% if add_generation_prompt %}>{% endif %}"
    example = Example("x", messages=({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}))
    for roles in ("user", "system, user"):
        assert Formatter(TOKENIZER, PromptFormat(chat_template=f"{{# collm: hides {roles} #}}{shows}")).encode(example)
    with pytest.raises(CollmError, match="shows nothing of message 1"):
        Formatter(TOKENIZER, PromptFormat(chat_template=f"{{# collm: hides system #}}{shows}")).encode(example)


def test_nothing_to_learn_from() -> None:
    formatter = Formatter(TOKENIZER)
    with pytest.raises(CollmError, match=r"d\.jsonl, line 4: there is no assistant turn"):
        formatter.encode(Example("x", messages=({"role": "user", "content": "a"},), where="d.jsonl, line 4"))
    with pytest.raises(CollmError, match="'x': there is no completion"):
        formatter.encode(Example("x", prompt="a"))
    with pytest.raises(CollmError, match="nothing to answer"):
        formatter.prompt([{"role": "assistant", "content": "a"}])
    with pytest.raises(CollmError, match="at least 2"):
        formatter.encode(Example("x", prompt="a", completion="b"), max_length=1)


def test_fingerprint_tells_formats_apart_but_not_the_way_they_are_given() -> None:
    formats = [
        PromptFormat(),
        PromptFormat(system_prompt=""),
        PromptFormat(system_prompt="a"),
        PromptFormat(chat_template=TEMPLATES["bos and stripped"]),
        PromptFormat(add_bos=True),
    ]
    assert len({Formatter(TOKENIZER, format).fingerprint() for format in formats}) == len(formats)
    same = PromptFormat(chat_template=CHAT_TEMPLATE, add_bos=False)
    assert Formatter(TOKENIZER, same).fingerprint() == Formatter(TOKENIZER).fingerprint()


def test_a_set_keeps_its_order_and_counts_what_it_lost(caplog: pytest.LogCaptureFixture) -> None:
    examples = [
        Example("long", prompt="1" * 20, completion="2"),
        Example("cut", prompt="1" * 5, completion="2" * 10),
        Example("short", prompt="1", completion="2"),
    ]
    with caplog.at_level(logging.WARNING):
        encoded = encode_examples(examples, Formatter(TOKENIZER), max_length=8)
    assert encoded.kept == [1, 2]
    assert (encoded.dropped, encoded.truncated) == (1, 2)
    assert encoded.truncated_tokens == (20 + 2 - 8) + (5 + 11 - 8)
    assert encoded.labelled_tokens == 3 + 2
    assert "cut 22 tokens off 2 of 3 examples; 1 of them" in caplog.text
    with pytest.raises(CollmError, match="none of 3 examples .* raise max_length"):
        encode_examples(examples[:1] * 3, Formatter(TOKENIZER), max_length=8)
