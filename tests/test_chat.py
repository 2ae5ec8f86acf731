"""Chat as it is: real templates, templates that rewrite, tools, thoughts, parts; what is shown, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tokenizer
from transformers import PreTrainedTokenizerFast

from collm.data.examples import Example, parse_example
from collm.data.formatting import Formatter, PromptFormat, require_read
from collm.data.messages import Conversation, read_conversation, read_messages
from collm.data.scores import scores_fingerprint
from collm.errors import CollmError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = Path(__file__).parent / "chat_templates"
QWEN = "Qwen-Qwen3-0.6B"
R1 = "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B"
MISTRAL = "mistralai-Mistral-Small-3.1-24B-Instruct-2503"
SPECIAL = {
    QWEN: ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"],
    R1: ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"],
    MISTRAL: ["<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"],
}
END = {QWEN: "<|im_end|>", R1: "<｜end▁of▁sentence｜>", MISTRAL: "</s>"}
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": '{"x": 1, "y": 2}'}}


def tokenizer_for(name: str) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[name]})
    tokenizer.eos_token = END[name]
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return tokenizer


def formatter_for(name: str, **format: Any) -> Formatter:
    return Formatter(tokenizer_for(name), PromptFormat(**format))


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def row(*messages: dict[str, Any], **more: Any) -> Example:
    return parse_example({"messages": list(messages), **more}, "d.jsonl, line 3", "3")


def split(formatter: Formatter, example: Example) -> tuple[str, str]:
    """What stands before the labelled tokens, and those, as texts."""
    encoded = formatter.encode(example)
    first = encoded.labelled.index(True)
    assert all(encoded.labelled[first:])
    decode: Callable[..., str] = formatter.tokenizer.decode
    return decode(encoded.token_ids[:first]), decode(encoded.token_ids[first:])


TWO_TURNS = (user("a"), said("1"), user("b"), said("2"))


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("messages", [TWO_TURNS[:2], TWO_TURNS], ids=["one turn", "two turns"])
def test_real_templates_are_learnt_and_asked_alike(name: str, messages: tuple[dict[str, Any], ...]) -> None:
    """The last turn is learnt behind exactly what decoding sees before it."""
    formatter = formatter_for(name)
    encoded = formatter.encode(row(*messages))
    prompt = formatter.prompt(list(messages[:-1]))
    assert encoded.token_ids[: len(prompt)] == prompt
    learnt = formatter.completions(row(*messages))
    assert formatter.tokenizer.decode(learnt[-1]) == messages[-1]["content"] + END[name]
    assert learnt[-1] == encoded.token_ids[-len(learnt[-1]) :]
    assert encoded.rewritten == (len(messages) // 2 - 1 if name != MISTRAL else 0)
    assert len(learnt) == (len(messages) // 2 if name == MISTRAL else 1)


def test_qwen_thinks_or_not() -> None:
    thinking, not_thinking = formatter_for(QWEN), formatter_for(QWEN, template_kwargs={"enable_thinking": False})
    asked = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    empty = "<think>\n\n</think>\n\n"
    # Nobody wrote the empty thoughts: they stand before what is learnt, whether or not the prompt has them.
    assert split(thinking, row(user("a"), said("1"))) == (asked + empty, "1<|im_end|>")
    assert split(not_thinking, row(user("a"), said("1"))) == (asked + empty, "1<|im_end|>")
    assert thinking.tokenizer.decode(thinking.prompt([user("a")])) == asked
    assert thinking.tokenizer.decode(not_thinking.prompt([user("a")])) == asked + empty
    # Thoughts that a row has are learnt, in either place.
    thoughts = "<think>\nwell\n</think>\n\n1<|im_end|>"
    assert split(thinking, row(user("a"), said("1", reasoning_content="well"))) == (asked, thoughts)
    assert split(thinking, row(user("a"), said("1", reasoning="well"))) == (asked, thoughts)
    assert split(thinking, row(user("a"), said("<think>\nwell\n</think>\n\n1"))) == (asked, thoughts)
    with pytest.raises(CollmError, match="does not read 'enable_thinkin'"):
        formatter_for(QWEN, template_kwargs={"enable_thinkin": False})


def test_deepseek_opens_thoughts() -> None:
    formatter = formatter_for(R1)
    opened = "<｜begin▁of▁sentence｜><｜User｜>a<｜Assistant｜><think>\n"
    opened = (
        opened.removeprefix("<｜begin▁of▁sentence｜>") if formatter.tokenizer.bos_token == "<|endoftext|>" else opened
    )
    before, learnt = split(formatter, row(user("a"), said("1")))
    assert before.endswith(opened + "</think>\n\n") and learnt == "1<｜end▁of▁sentence｜>"
    before, learnt = split(formatter, row(user("a"), said("<think>\nwell\n</think>\n\n1")))
    assert before.endswith(opened) and learnt == "well\n</think>\n\n1<｜end▁of▁sentence｜>"
    with pytest.raises(CollmError, match="line 3: message 2.*reasoning_content, which the chat template never shows"):
        formatter.encode(row(user("a"), said("1", reasoning_content="well")))


def test_what_was_thought_before_is_not_shown_again() -> None:
    formatter = formatter_for(QWEN)
    history = [user("a"), said("1", reasoning_content="well"), user("b")]
    assert "well" not in formatter.rendered(history) and formatter.prompt(history)


@pytest.mark.parametrize("name", SPECIAL)
def test_tools(name: str) -> None:
    formatter = formatter_for(name)
    result = {"role": "tool", "tool_call_id": "abcdefghi", "name": "add", "content": "3"}
    called = [user("1 and 2?"), said(None, tool_calls=[CALL])]
    text = formatter.rendered([*called, result])
    assert '"x": 1, "y": 2' in text and "3" in text and "\\" not in text
    assert formatter.rendered([user("1 and 2?"), said("", tool_calls=[CALL], refusal=None), result]) == text
    parsed = {**CALL, "function": {"name": "add", "arguments": {"x": 1, "y": 2}}}
    assert formatter.rendered([user("1 and 2?"), said("", tool_calls=[parsed]), result]) == text
    before, learnt = split(formatter, row(*called))
    assert '"x": 1, "y": 2' in learnt and "add" in learnt and learnt.endswith(END[name])
    assert "add" not in before
    offered = Conversation([user("1 and 2?")], tools=[TOOL])
    if name == R1:
        with pytest.raises(CollmError, match="shows no tools"):
            formatter.prompt(offered)
    else:
        assert "Adds." in formatter.rendered(offered)
        assert "Adds." in split(formatter, row(*called, tools=[TOOL]))[0]


def test_dates_are_fixed_and_kept() -> None:
    formatter = formatter_for(MISTRAL, date="2026-07-26")
    assert "The current date is 2026-07-26." in formatter.rendered([user("a")])
    today = formatter_for(MISTRAL)
    assert today.format.date is not None and today.fingerprint() != formatter.fingerprint()
    assert formatter_for(MISTRAL, **today.format.to_dict()).fingerprint() == today.fingerprint()
    assert formatter_for(QWEN).format.date is None
    template = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    template += "Today: {{ date_string }}\n" + CHATML
    llama = Formatter(make_tokenizer(), PromptFormat(chat_template=template, date="2026-07-26"))
    assert llama.rendered([user("a")]).startswith("Today: 26 Jul 2026")
    own = PromptFormat(chat_template=template, template_kwargs={"date_string": "never"})
    assert Formatter(make_tokenizer(), own).rendered([user("a")]).startswith("Today: never")
    with pytest.raises(CollmError, match="a day as"):
        Formatter(make_tokenizer(), PromptFormat(date="26/7/2026"))


def test_kwargs_of_one_conversation() -> None:
    formatter = formatter_for(QWEN)
    own = read_conversation([user("a")], template_kwargs={"enable_thinking": False})
    assert formatter.rendered(own).endswith("<think>\n\n</think>\n\n")
    for name in ("x", "messages", "bos_token"):
        with pytest.raises(CollmError, match=f"no chat template reads '{name}'"):
            require_read([formatter], {name: 1})
    with pytest.raises(CollmError, match="cannot set 'messages'"):
        formatter_for(QWEN, template_kwargs={"messages": []})
    both = (formatter, Formatter(make_tokenizer()))
    require_read(both, {"enable_thinking": False})
    assert formatter.told({"enable_thinking": False}).rendered([user("a")]) == formatter.rendered(own)
    assert both[1].rendered(own) == both[1].rendered([user("a")])


def test_parts_of_text_are_one_text() -> None:
    assert read_messages([user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])], "x") == (user("a\nb"),)


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (user([{"type": "image_url", "image_url": {"url": "x"}}]), "part 1 of its content is of type 'image_url'"),
        (user([]), "no text as its content"),
        (user(None), "no text as its content"),
        ({"role": "robot", "content": "a"}, "role 'robot'; a role is one of system, developer, user"),
        (said("a", tool_calls=[{"function": {}}]), "tool call 1 names no function"),
        (said("a", tool_calls=[{"type": "custom", "custom": {}, "name": "a"}]), "of type 'custom'"),
        ({**user("a"), "tool_calls": [CALL]}, "only the assistant calls tools"),
        ({**user("a"), "reasoning_content": "b"}, "only the assistant thinks"),
        (said("a", audio={"id": "1"}), "has 'audio', which is not read"),
        (said("a", weight=0), "weight"),
        (said("say \ud83d now"), r"message 1: character 4 is half a surrogate pair \(U\+D83D\)"),
        (said("", tool_calls=[{"function": {"name": "f", "arguments": {"\udc80": "b"}}}]), "half a surrogate pair"),
        (said("", tool_calls=[{"function": {"name": "f", "arguments": 3}}]), "arguments is a JSON object"),
    ],
)
def test_messages_that_cannot_be_read_are_refused_by_name(message: dict[str, Any], told: str) -> None:
    with pytest.raises(CollmError, match=told):
        read_messages([message], "d.jsonl, line 3")


def test_what_says_nothing_is_no_fault() -> None:
    message = {**said("a"), "refusal": None, "annotations": [], "tool_calls": None, "name": None, "weight": 1}
    assert read_messages([message], "x") == (said("a"),)


PARTS = CHATML.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text if p.type == 'text' }}{% endfor %}")


def test_a_template_that_wants_parts_is_given_parts() -> None:
    example = row(user("a"), said("1"))
    own, chatml = Formatter(make_tokenizer(), PromptFormat(chat_template=PARTS)), Formatter(make_tokenizer())
    assert own.encode(example) == chatml.encode(example) and own.end_ids == chatml.end_ids
    assert own.prompt([user("a")]) == chatml.prompt([user("a")])


def results(*ids: str | None) -> tuple[dict[str, Any], ...]:
    """Two calls, and what came of them; the text is the id's, too, so that a template that shows no ids may be read."""
    calls = [{**CALL, "id": id} for id in ("callaaaaa", "callbbbbb")]
    told = [{"role": "tool", "content": f"of {id}", **({} if id is None else {"tool_call_id": id})} for id in ids]
    return user("1 and 2?"), said(None, tool_calls=calls), *told, said("3 and 3")


@pytest.mark.parametrize("name", SPECIAL)
def test_results_belong_to_their_calls(name: str) -> None:
    """What came of the second call was once shown in the place of the first one's, by templates without ids."""
    formatter = formatter_for(name)
    for ids in (("callaaaaa", "callbbbbb"), (None, None), (None, "callbbbbb"), ("callaaaaa",)):
        if name != MISTRAL or None not in ids:  # which shows ids, and wants them
            formatter.encode(row(*results(*ids)))
    for ids, told in ((("callbbbbb", "callaaaaa"), "callaaaaa"), (("callaaaaa", "callccccc"), "callbbbbb")):
        if name == MISTRAL:
            assert all(id in formatter.rendered(results(*ids)) for id in ids)
            continue
        with pytest.raises(CollmError, match=rf"message \d \(tool\) is the result of call .* that of '{told}' is due"):
            formatter.encode(row(*results(*ids)))


@pytest.mark.parametrize(
    ("template", "messages", "told"),
    [
        (CHATML.replace("m.content", "m.content | upper"), TWO_TURNS, "changes the text of messages"),
        (CHATML.replace("m.content", "m.contents"), TWO_TURNS, "shows nothing of a message's text"),
        (CHATML.replace("m.content", "(m.role + 1)"), TWO_TURNS, "line 3.*message 1 .*TypeError"),
        (CHATML + "{{ 1 / 0 }}", TWO_TURNS, "line 3.*message 1 .*ZeroDivisionError"),
        (CHATML + "{{ 1 / (3 - messages | length) }}", TWO_TURNS, "line 3, up to message 4 .*ZeroDivisionError"),
        ("{% for m in messages %}", TWO_TURNS, "no valid template"),
        (CHATML, ({"role": "system", "content": "s"}, *TWO_TURNS[:3]), None),
        (
            "{% for m in messages if m.role != 'system' %}{{ m.content }}<|im_end|>{% endfor %}",
            ({"role": "system", "content": "s"}, *TWO_TURNS),
            r"shows nothing of message 1 \(system\)",
        ),
        (CHATML.replace("m.content", "m.content.split('X')[0]"), (user("a"), said("bXc")), "as it is written"),
        (CHATML, (user("a"), said("1", tool_calls=[CALL])), r"message 2 \(assistant\) calls tools"),
        (CHATML, (user("a"), said("1", reasoning_content="b")), "message 2.*reasoning_content"),
        (CHATML, ({**user("a"), "name": "Ann"}, said("1")), "message 1.*has a name"),
        (CHATML, (user("a"), said("the end is <|im_end|> and the cat sat")), "'<|im_end|>' stands within"),
        ("{{ messages[0].content }}{{ messages[1].content }}", (said("a"), user("b")), "opens with the assistant"),
    ],
)
def test_what_a_template_would_lose_is_told(template: str, messages: Any, told: str | None) -> None:
    formatter = Formatter(make_tokenizer(), PromptFormat(chat_template=template))
    if told is None:
        formatter.encode(row(*messages))
        return
    with pytest.raises(CollmError, match=told.replace("|", r"\|")) as caught:
        formatter.encode(row(*messages))
    assert "\n" not in str(caught.value)


def test_messages_are_counted_without_the_system_prompt() -> None:
    template = CHATML.replace("%}<|im_start|>{{ m.role", "if m.role != 'system' %}<|im_start|>{{ m.role")
    formatter = Formatter(make_tokenizer(), PromptFormat(chat_template=template, system_prompt="s"))
    with pytest.raises(CollmError, match="shows nothing of the system prompt"):
        formatter.prompt([user("a")])
    own = PromptFormat(chat_template=CHATML.replace("m.content", "m.content.split('X')[0]"), system_prompt="s")
    with pytest.raises(CollmError, match=r"show message 2 \(assistant\) as it is"):
        Formatter(make_tokenizer(), own).encode(row(user("a"), said("bXc")))


def test_a_conversation_may_open_with_the_assistant() -> None:
    example = row(said("hello"), user("hi"), said("yes"))
    encoded = Formatter(make_tokenizer()).encode(example)
    assert make_tokenizer().decode(encoded.token_ids).startswith("<|im_start|>assistant\nhello<|im_end|>")
    assert encoded.num_labelled > 2


def test_an_end_within_what_was_said_before_may_be_gone_on_from() -> None:
    formatter = Formatter(make_tokenizer())
    assert formatter.prompt([user("a"), said("b<|im_end|>c"), user("d")])


def test_an_end_within_a_question_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        Formatter(make_tokenizer()).encode(row(user("a<|im_end|>b"), said("1")))
    assert "line 3: message 1 (user) holds '<|im_end|>', which models read as an end" in caplog.text


KEEPING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content and (keep or loop.last) %}"
    "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Keeps the thoughts of earlier turns where it is told to, as newer templates do."""


def test_variables_that_change_what_is_learnt_are_told_in_scores() -> None:
    """Scores of last turns alone stood at the first tokens of all turns."""
    forgets, keeps = (
        formatter_for(QWEN, chat_template=KEEPING, template_kwargs=kwargs) for kwargs in ({}, {"keep": True})
    )
    example = row(*(said("b", reasoning_content="e") if m["role"] == "assistant" else m for m in TWO_TURNS))
    assert [len(formatter.completions(example)) for formatter in (forgets, keeps)] == [1, len(TWO_TURNS) // 2]
    assert forgets.completions_fingerprint() != keeps.completions_fingerprint()
    by_base = [scores_fingerprint([example], {}, keeps, completions_from=base) for base in (forgets, keeps)]
    assert by_base[0] != by_base[1] == scores_fingerprint([example], {}, keeps)
    # Nothing that is learnt differs by whether thoughts are asked for: an empty block stands before it.
    asked, unasked = formatter_for(QWEN), formatter_for(QWEN, template_kwargs={"enable_thinking": False})
    assert asked.completions_fingerprint() == unasked.completions_fingerprint()


def test_last_turns_alone_where_one_model_rewrites() -> None:
    base, other = Formatter(tokenizer_for(QWEN), PromptFormat(chat_template=CHATML)), formatter_for(QWEN)
    example = row(*TWO_TURNS)
    with pytest.raises(CollmError, match="line 3: .*last_turn: true"):
        other.encode(example, completions=base.completions(example))
    last = parse_example({"messages": list(TWO_TURNS)}, "x", "3", last_turn=True)
    shared = base.completions(last)
    assert len(shared) == 1
    own, others = base.encode(last), other.encode(last, completions=shared)
    assert own.num_labelled == others.num_labelled == len(shared[0]) and others.rewritten == 0
    # The base that rewrites settles it for all.
    shared = other.completions(example)
    assert base.encode(example, completions=shared).num_labelled == len(shared[0])
